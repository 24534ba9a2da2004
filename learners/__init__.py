"""Learners turn trajectories into weights."""
