"""Pictures of what was measured: one style for all of them, on light and on dark ground."""
