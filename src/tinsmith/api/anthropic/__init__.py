"""The Anthropic-compatible endpoint under /anthropic/api: Messages and the counting of their tokens."""
