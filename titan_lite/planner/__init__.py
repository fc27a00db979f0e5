"""Hardware peaks and parameter and FLOP counts. Never imports torch."""
