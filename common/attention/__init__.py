"""The one door to attention: nothing outside this room may read a pattern or change one in any other way.

`head` names heads and layers, `call` is one layer's attention under edits, `door` runs a model, `inlets` lead in the
families that transformers does not exchange, `batches` says how many rows fit at once.
"""
