"""Owns performance benchmarks, one file each."""
