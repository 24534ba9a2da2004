"""Model folders, models made from scratch, and text as token ids."""
