"""Benchmarks: `python -m benchmarks` (or `make bench`) prints the table and writes the CSV."""
