"""Measurements of speed and memory. Not part of the package: `python -m benchmarks.ops`."""
