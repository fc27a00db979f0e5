"""What each model family is, as data. Never imports torch."""
