"""Owns how texts become vectors: encoders behind one Protocol, and the stage that encodes each text once.

`kar_offline.encode.huggingface` and `kar_offline.encode.endpoint` hold the real encoders; they are imported where they
are used, since they are slow to load.
"""

from kar_offline.encode.encoder import HashingEncoder, TextEncoder
from kar_offline.encode.stage import SOURCES, encode

__all__ = ["SOURCES", "HashingEncoder", "TextEncoder", "encode"]
