"""Compares runs with each other and with golden curves, and shows them on HTML pages."""
