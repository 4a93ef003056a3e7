"""Owns the study of collective knowledge: the loss of quality when entities share texts, to save calls."""
