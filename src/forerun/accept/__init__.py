"""Acceptance: which part of a proposal is kept. Exact rules, lossy ones that say so, and the judge
who chooses between them."""
