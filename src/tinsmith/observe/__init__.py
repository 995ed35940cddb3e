"""What an operator sees: logs, the series of `/metrics`, traces."""
