"""Benchmarks: how far onclock is from what the machine can do. They report ratios; they are not tests."""
