"""Process set-up: process groups, seeds, garbage collection, logging, profiling."""
