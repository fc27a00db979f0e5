"""Builds a run and trains it."""
