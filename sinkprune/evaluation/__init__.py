"""How good, how large, how fast: predictions, written text, memory, and the report."""
