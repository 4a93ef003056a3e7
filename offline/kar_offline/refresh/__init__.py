"""Owns `kar refresh`: it adds new events and items, rewrites the texts that are due, and publishes the result."""
