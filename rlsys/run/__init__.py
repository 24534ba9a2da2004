"""A run directory: checkpoints, resume, metrics and ledger."""
