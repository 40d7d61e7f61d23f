"""What the two scripts share. Arrows point one way: scripts, report, plots, detection and metrics, scores, sequences and models."""
