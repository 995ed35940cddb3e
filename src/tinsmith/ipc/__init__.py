"""What the processes of one server tell each other: signs of life, wake-ups, lines of text, tokens under way."""
