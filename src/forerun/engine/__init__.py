"""The engine: requests come and go, and one loop serves them all."""
