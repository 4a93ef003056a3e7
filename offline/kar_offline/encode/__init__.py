"""Owns the stage `encode`: each text is encoded once, and entities without a text get an imputed vector."""

from kar_offline.encode.stage import encode
from kar_offline.encode.vector_files import SOURCES

__all__ = ["SOURCES", "encode"]
