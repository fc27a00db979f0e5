"""Comparison of runs: by each other, by golden curves, and on pages to look at."""
