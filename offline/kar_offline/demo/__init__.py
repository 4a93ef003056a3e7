"""Owns the whole way in one command: every stage, real requests against the served release, and the report."""
