"""Owns experiments: the arms, and the assignment of each user to one of them."""
