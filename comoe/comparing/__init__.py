"""Comparison of variants ("arms") of one recipe: what experts, gate and losses are worth, over seeds."""
