"""Owns how texts become vectors: encoders behind one Protocol, and the stage that encodes each text once.

`kar_offline.encode.huggingface` holds the real encoders; it is imported where it is used, since torch is slow to load.
"""

from kar_offline.encode.encoder import HashingEncoder, TextEncoder
from kar_offline.encode.stage import SOURCES, encode

__all__ = ["SOURCES", "HashingEncoder", "TextEncoder", "encode"]
