"""What is known of base models without loading them: their directories, layers, weights, tokenizers, the hub."""
