"""Plan in a blocks world."""
