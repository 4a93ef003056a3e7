"""Owns the choice of the text encoder that the options name."""

import os
from typing import Any

from kar_offline.encoders.text_encoder import TextEncoder
from kar_offline.settings import API_KEY_VARIABLE, EncoderOptions
from kar_sidecar.errors import InputError

__all__ = ["make_encoder"]

ENDPOINT = "openai"


def make_encoder(options: EncoderOptions) -> TextEncoder:
    """The encoder that the options choose; nothing is encoded yet.

    Raises:
        InputError: an endpoint is chosen without its address or model.
        NotFoundError: there is no encoder of this name.
        UnsupportedError: the encoder's folder asks for layers or pooling that are not supported.
    """
    encoder = _endpoint(options) if options.name == ENDPOINT else _local(options)
    if options.runner == "ray":
        from kar_offline.encoders.ray import RayEncoder  # needs the extra `ray`

        return RayEncoder(encoder, options.workers, options.ray_address)
    return encoder


def _endpoint(options: EncoderOptions) -> TextEncoder:
    from kar_offline.encoders.openai_embeddings import EndpointEncoder  # httpx loads slowly

    if not options.base_url or not options.model:
        raise InputError(f"--encoder {ENDPOINT} needs an endpoint: give --encoder-url and --encoder-model")
    limits = _without_unset(chunk_chars=options.chunk_chars, concurrency=options.concurrency)
    return EndpointEncoder(options.base_url, options.model, os.environ.get(API_KEY_VARIABLE), **limits)


def _local(options: EncoderOptions) -> TextEncoder:
    from kar_offline.encoders.huggingface import HuggingFaceEncoder  # tokenizers load slowly
    from kar_offline.encoders.packaged import ENCODERS

    threads = options.threads or (1 if options.runner == "ray" else None)
    overrides = _without_unset(runtime=options.runtime, pooling=options.pooling, threads=threads)
    return (
        ENCODERS[options.name](**overrides)
        if options.name in ENCODERS
        else HuggingFaceEncoder(options.name, **overrides)
    )


def _without_unset(**options: Any) -> dict[str, Any]:
    """The options that are set; the encoder's defaults apply to the others."""
    return {name: value for name, value in options.items() if value is not None}
