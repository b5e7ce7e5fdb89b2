"""Training: the curriculum of the paper, and a small one for a CPU."""
