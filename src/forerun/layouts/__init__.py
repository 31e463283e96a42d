"""Draft heads in the layouts of the outside world, both ways."""
