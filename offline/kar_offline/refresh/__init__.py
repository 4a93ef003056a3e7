"""Owns keeping knowledge true as the world goes on: what is due, in which order, and the way to the stores."""
