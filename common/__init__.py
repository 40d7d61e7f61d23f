"""The shared rooms, from the ground up. A room imports from the rooms before it in this list, never from those after.

| room | the question it answers |
|---|---|
| attention | how is a model run, its attention read, and edited? the one door to attention |
| loading | how does a name become a model, and can what it shows be believed? |
| heads | which heads are induction heads, how sure is that, and who else says so? |
| circuits | what are a head's scores made of, and which earlier heads feed it? |
| interventions | what changes when a head, or a part of it, is taken away? |
| results | the two analyses, what they return, and how that is drawn, tabled and saved |
| cli | flags, exit codes, and all that is printed |

Importing any of them does nothing else: no backend is chosen, no setting changed, nothing downloaded.
"""


class UserError(ValueError):
    """Something the user can mend: what was wrong, what was needed, what to do. Ends a script with exit code 2."""
