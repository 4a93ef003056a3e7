"""Owns where knowledge texts come from: language models behind one Protocol, released packs, and the stage around."""

from kar_offline.generate.model import Completion, LanguageModel, ScriptedModel
from kar_offline.generate.openai import OpenAIChat, Price, Retry
from kar_offline.generate.pack import Pack
from kar_offline.generate.records import read_knowledge, write_knowledge
from kar_offline.generate.stage import generate

__all__ = [
    "Completion",
    "LanguageModel",
    "OpenAIChat",
    "Pack",
    "Price",
    "Retry",
    "ScriptedModel",
    "generate",
    "read_knowledge",
    "write_knowledge",
]
