"""Owns the comparison of the two serving modes: latency, bytes in the store, and time to serve a new model."""
