"""Owns the benchmarks: quality of models, speed of training."""
