"""Model families as data. Never imports torch."""
