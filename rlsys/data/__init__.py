"""Training data of a step: prompts, demonstrations, rows and pairs."""
