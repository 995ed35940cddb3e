"""The OpenAI-compatible endpoint under /oai/api/v1: models, completions, chat completions."""
