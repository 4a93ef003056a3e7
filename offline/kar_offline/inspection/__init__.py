"""Owns the inspection of knowledge (`kar knowledge`): single texts, their freshness, their cost."""
