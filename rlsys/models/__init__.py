"""Model folders, tiny models made from scratch, and text as token ids."""
