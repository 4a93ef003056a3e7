"""Owns `kar refresh`: new events and items in, texts that are due rewritten, fresh knowledge published."""
