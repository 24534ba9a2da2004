"""Count a letter in a word."""
