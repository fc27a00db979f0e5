"""Applies parallelism to a built model and reports what was applied."""
