"""Contracts and coordination: moves trajectories one way, weights the other, and counts versions."""
