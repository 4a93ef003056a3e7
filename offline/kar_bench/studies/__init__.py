"""Owns the studies of quality: what knowledge gives, with fewer calls, kept fresh, and judged by gates."""
