"""Judge of answers: finds the answer in a completion and compares it with a reference, in layers."""
