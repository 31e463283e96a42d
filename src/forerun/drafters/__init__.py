"""One file, or one folder, per method."""
