"""What the OpenAI- and the Anthropic-compatible endpoints share: from prompts to samples and back to text."""
