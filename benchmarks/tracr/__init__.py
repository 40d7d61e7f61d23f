"""Models that Tracr compiled, a foreign compiler, and whether detection finds their induction heads."""
