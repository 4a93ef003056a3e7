"""Owns what `kar knowledge` shows: single texts, their freshness, their cost."""
