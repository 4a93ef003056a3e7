"""Owns the stage `encode`: each text is encoded once, and entities without a text get an imputed vector."""

from kar_offline.encode.stage import SOURCES, encode

__all__ = ["SOURCES", "encode"]
