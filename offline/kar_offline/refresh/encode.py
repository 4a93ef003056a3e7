"""Owns the phase `encode` of a refresh: vectors of new texts, and imputed vectors of entities without a text."""

from dataclasses import dataclass

from kar_offline.encode.stage import EncodingInputs, encode_inputs
from kar_offline.encode.vector_files import Encoding
from kar_offline.encoders.text_encoder import TextEncoder
from kar_offline.refresh.context import RefreshContext
from kar_offline.refresh.rewrite import RewrittenKnowledge

__all__ = ["EncodedKnowledge", "encode_knowledge"]


@dataclass(frozen=True, slots=True)
class EncodedKnowledge:
    """The vectors of the work folder."""

    encoding: Encoding
    encoded_texts: int
    """Texts encoded in this phase; the other vectors were there already."""


def encode_knowledge(
    context: RefreshContext, rewritten: RewrittenKnowledge, former: Encoding, encoder: TextEncoder
) -> EncodedKnowledge:
    """Encode the texts that have no vector yet.

    Args:
        context: The work folder.
        rewritten: The texts.
        former: The vectors before.
        encoder: The release's encoder.
    """
    inputs = EncodingInputs(rewritten.dataset, rewritten.prompts, rewritten.knowledge, former)
    result = encode_inputs(context.work, encoder, lambda: inputs, console=context.console)
    if not result.ran:
        return EncodedKnowledge(former, 0)
    return EncodedKnowledge(Encoding.load(context.work.encoding), result.report.encoded)
