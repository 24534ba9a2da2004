"""Actors turn prompts into trajectories."""
