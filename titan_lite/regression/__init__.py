"""Whether a run follows another's curve: comparison, golden curves, and pages to look at."""
