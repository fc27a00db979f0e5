"""Predicts memory, time, cost and energy of runs. Never imports torch."""
