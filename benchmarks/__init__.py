"""Benchmarks: `python -m benchmarks` (or `make bench`) prints the tables, writes the CSV and draws it.

python -m benchmarks --sweep       step and encoder over B, d, F and L0, into the same CSV
python -m benchmarks.plots CSV     the pictures of a CSV
python -m benchmarks.candidates    how much the screen lets through
python -m benchmarks.crossover     where the dense routes become the faster ones
"""
