"""Owns the dataset: raw logs in, leakage-safe samples and their splits out."""
