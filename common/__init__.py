"""What the scripts share."""


class UserError(ValueError):
    """Something the user can mend: what was wrong, what was needed, what to do. Ends a script with exit code 2."""
