"""What every drafter is made of: the seam, growth, stopping, heads and their checkpoints, and how
one is named and built."""
