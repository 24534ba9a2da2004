"""Tree search over typed thought nodes."""
