"""`tinsmith demo`: fine-tunes the shipped model through the real SDK and shows it. A client like any other."""
