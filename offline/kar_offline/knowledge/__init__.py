"""Owns knowledge: its records on disk, and the imputation of vectors for entities without a text."""
