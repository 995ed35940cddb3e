"""`tinsmith top`: a live view of a server in a terminal, from its `/metrics` and its list of busy runs."""
