"""Owns the demo: every stage in one command, real requests to the served release, and a report."""
