"""Owns the generation of knowledge texts: providers behind one Protocol, the ledger, the run, and the stage."""

from kar_offline.generate.ledger import Ledger
from kar_offline.generate.openai_chat import OpenAIChat, Price, Retry
from kar_offline.generate.pack import Pack
from kar_offline.generate.provider import Provider, Question, Reply, ScriptedModel
from kar_offline.generate.stage import generate
from kar_offline.knowledge.records import read_knowledge, write_knowledge

__all__ = [
    "Ledger",
    "OpenAIChat",
    "Pack",
    "Price",
    "Provider",
    "Question",
    "Reply",
    "Retry",
    "ScriptedModel",
    "generate",
    "read_knowledge",
    "write_knowledge",
]
