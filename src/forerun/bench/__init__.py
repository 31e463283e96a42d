"""Measuring: prompts to measure on, runs, other engines beside ours, and the report."""
