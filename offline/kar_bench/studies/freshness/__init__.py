"""Owns the study of freshness: the value and the cost of a daily budget of calls, in a replayed month."""
