"""Owns HTTP requests to OpenAI-compatible endpoints: chat, batches and embeddings share one client."""
