"""Owns how texts become vectors: encoders behind one Protocol, and the stage that encodes each text once.

The encoders are in `kar_offline.encoders`; the slow ones are imported where they are used.
"""

from kar_offline.encode.stage import SOURCES, encode
from kar_offline.encoders.text_encoder import HashingEncoder, TextEncoder

__all__ = ["SOURCES", "HashingEncoder", "TextEncoder", "encode"]
