"""Owns the benchmark of the adaptor's implementations, on processors and on GPUs."""
