"""Owns HTTP requests to OpenAI-compatible endpoints."""
