"""Pages about a run: its curves, the time of its steps, its rollouts and its trees. See `rlsys view`."""
