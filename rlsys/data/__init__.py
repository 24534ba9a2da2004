"""What a step trains on: prompts, demonstrations, rows and pairs."""
