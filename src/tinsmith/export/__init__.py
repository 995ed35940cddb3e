"""Weights out: an adapter as `peft` and serving engines read it, or merged into a whole model."""
