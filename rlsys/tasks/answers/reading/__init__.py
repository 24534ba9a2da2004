"""Reading of answers: from a normalised text to its value."""
