"""Values of thought nodes before the first right answer."""
