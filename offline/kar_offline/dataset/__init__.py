"""Owns raw logs turned into leakage-safe samples."""
