"""The loops of the stages, one class for each kind of loop."""
