"""Owns the packs of released knowledge that come with the product, one folder each."""
