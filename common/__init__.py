"""What the scripts share.

Arrows point one way: scripts -> report, plots, qk_plots -> circuits -> qk; detection, metrics -> scores -> sequences,
models.
"""
