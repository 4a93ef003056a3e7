"""Owns the benchmarks of speed and size, each beside the bare library that does the work."""
