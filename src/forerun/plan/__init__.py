"""Planning: which models draft for which, and how much, from acceptance rates and seconds that were
measured elsewhere."""
