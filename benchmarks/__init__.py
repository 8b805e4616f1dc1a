"""Measurements of the performance goals, runnable by anyone: `python -m benchmarks NAME`."""
