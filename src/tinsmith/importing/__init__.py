"""Adapters and run states that come from elsewhere: looked at, checked against the served base, made into states."""
