"""The run directory: checkpoints, resume, metrics and ledger."""
