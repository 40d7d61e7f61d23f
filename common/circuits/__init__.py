"""What a layer's scores are made of. Everything here is algebra on what the door shows and on the weights; a map or a
sum that does not reproduce the model's own numbers is refused, so touch nothing here without its check.

`maps` lets queries and keys meet, `decomposition` splits a score by source, `weights` and `composition` read the
weights alone.
"""
