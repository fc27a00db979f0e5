"""Starts a module as `python -m` does, but imports nothing from the current folder."""

import sys

# Python has an option for it (-P) from 3.11 on.
_RUN_MODULE = """import sys; sys.path[:] = filter(None, sys.path)
import runpy; runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)"""
PYTHON = (sys.executable, "-u", "-c", _RUN_MODULE)
"""Command of which the next argument is the module's name."""
