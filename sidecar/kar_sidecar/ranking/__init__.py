"""Owns the way of one ranking request: request, fetch, assembly, scores, response."""
