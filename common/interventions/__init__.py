"""What is taken away, and what that costs. An intervention is a set of edits made at the door, undone after every run.

`edits` are the interventions by name, `paths` those between two heads, `runner` runs many on the same rows, `effects`
measures them with intervals and controls; `ablation`, `experiments` and `causal_labels` are the experiments themselves.
"""
