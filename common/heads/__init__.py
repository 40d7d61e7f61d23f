"""From token ids to a verdict on every attention head.

tokens (which cells) → scores (what each head pays to them), attribution (what that does) → detection (threshold and
verdict). survey does all of it on drawn rows, texts on a text of the user's; labels and metrics say how right it is.
detection, metrics and statistics see NumPy arrays, never a model. Nothing here edits attention: see interventions.
"""
