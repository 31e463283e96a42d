"""Where texts are looked up: what was said, and what was written elsewhere."""
