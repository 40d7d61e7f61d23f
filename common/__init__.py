"""What the scripts share.

Arrows point one way: scripts -> report, plots -> detection, metrics -> scores -> sequences, models.
"""
