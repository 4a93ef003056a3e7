"""Owns text encoders: one Protocol, its implementations, pooling and chunking."""
