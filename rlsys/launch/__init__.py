"""The only place that wires: Ray, placement, actors and learner ranks."""
