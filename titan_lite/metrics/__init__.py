"""Measurements and where they are written."""
