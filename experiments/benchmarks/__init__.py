"""The measures of `benchmark.py`, one file each."""
