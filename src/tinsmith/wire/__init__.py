"""The wire: bytes of requests and results to the vocabulary of `types` and back. No HTTP, no store, no torch."""
