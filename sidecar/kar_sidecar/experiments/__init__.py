"""Owns experiments: which arm a user gets."""
