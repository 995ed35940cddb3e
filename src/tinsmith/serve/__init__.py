"""`tinsmith serve`: which processes there are, and keeping them alive."""
