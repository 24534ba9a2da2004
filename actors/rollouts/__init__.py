"""How an actor samples completions."""
