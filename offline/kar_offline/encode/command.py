"""Owns `kar encode`."""

import os
from enum import StrEnum
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table

from kar_offline.cli_options import DEFAULT_WORK, JsonFile, Work, write_json
from kar_offline.encode.stage import encode as run
from kar_offline.encoders.text_encoder import TextEncoder
from kar_sidecar.entities import EntityKind
from kar_sidecar.errors import InputError

__all__ = ["ENDPOINT", "encode", "endpoint_encoder", "local_encoder"]

ENDPOINT: Final = "openai"


class Runtime(StrEnum):
    """What runs a model here."""

    ONNX = "onnx"
    TORCH = "torch"


class Pooling(StrEnum):
    """How token vectors become one."""

    MEAN = "mean"
    CLS = "cls"
    LAST = "last"
    WEIGHTED = "weighted"


class Runner(StrEnum):
    """Where texts are encoded."""

    HERE = "here"
    RAY = "ray"


def encode(
    work: Work = DEFAULT_WORK,
    encoder: Annotated[
        str,
        typer.Option(
            help="minilm (fast); mpnet (better, a 400 MB download); openai: any OpenAI-compatible embeddings endpoint, "
            "key in $KAR_LLM_API_KEY; or an encoder's folder or hub name."
        ),
    ] = "minilm",
    folder: Annotated[
        str | None, typer.Option(help="Folder in WORK for the vectors; default: encoding, for mpnet encoding_mpnet.")
    ] = None,
    kind: Annotated[EntityKind | None, typer.Option(help="Only texts of items, or of users.")] = None,
    runtime: Annotated[
        Runtime,
        typer.Option(help="Not openai: what runs the model; vectors are the same. torch takes some more models."),
    ] = Runtime.ONNX,
    pooling: Annotated[
        Pooling | None,
        typer.Option(help="Not openai: how token vectors become one; default: as the encoder was trained."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Not openai: cores to use; default: all there are.")
    ] = None,
    base_url: Annotated[str | None, typer.Option(help="openai: address, such as http://127.0.0.1:8000/v1.")] = None,
    model: Annotated[str | None, typer.Option(help="openai: the model's name at the endpoint.")] = None,
    chunk_chars: Annotated[
        int | None,
        typer.Option(min=1, help="openai: characters that the model takes at once; longer texts are cut and pooled."),
    ] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="openai: requests in flight at once.")] = None,
    runner: Annotated[
        Runner, typer.Option(help="Where texts are encoded: here, or by Ray Data (extra ray), one core an actor.")
    ] = Runner.HERE,
    workers: Annotated[int, typer.Option(min=1, help="ray: actors.")] = 2,
    ray_address: Annotated[
        str | None, typer.Option(help="ray: a running cluster, such as auto; default: one in this machine.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Turn knowledge texts, and the raw facts for comparison, into vectors."""
    console = Console()
    with console.status("loading the encoder"):
        if encoder == ENDPOINT:
            chosen = endpoint_encoder(base_url, model, chunk_chars=chunk_chars, concurrency=concurrency)
        else:
            if runner is Runner.RAY:
                threads = threads or 1
            chosen = local_encoder(encoder, runtime=runtime, pooling=pooling, threads=threads)
    if runner is Runner.RAY:
        from kar_offline.encoders.ray import OnRay  # an extra of its own

        chosen = OnRay(chosen, workers, ray_address)
    folder = folder or ("encoding_mpnet" if encoder == "mpnet" else "encoding")
    result = run(work, chosen, folder=folder, kinds=(kind,) if kind else tuple(EntityKind), console=console)
    report = result.report
    table = Table("texts", "count", "borrowed")
    for name, count in report["texts"].items():
        label = name.replace("_", " of ", 1).replace("_", " ")
        table.add_row(label, f"{count:,}", f"{report['lent'].get(name, 0):,}")
    console.print(table)
    console.print(
        f"{report['encoded']:,} texts encoded by {report['encoder_id']} ({report['tokens']:,} tokens, "
        f"{report['tokens_per_s']:,.0f} a second), {report['reused'] + report['resumed']:,} taken from before",
        soft_wrap=True,
    )
    console.print(f"{result.folder}: {result.outcome}")
    write_json(json_file, report)


def local_encoder(encoder: str, **options: Any) -> TextEncoder:
    """The encoder of a name, a folder or a hub name; options that are None are left to it."""
    from kar_offline.encoders.huggingface import ENCODERS, HuggingFace

    return ENCODERS[encoder](**_given(options)) if encoder in ENCODERS else HuggingFace(encoder, **_given(options))


def endpoint_encoder(base_url: str | None, model: str | None, **options: Any) -> TextEncoder:
    """The encoder behind an endpoint, its key in $KAR_LLM_API_KEY.

    Raises:
        InputError: no address or no model is given.
    """
    from kar_offline.encoders.openai_embeddings import EndpointEncoder

    if not base_url or not model:
        raise InputError(f"--encoder {ENDPOINT} needs an endpoint: give --base-url and --model")
    return EndpointEncoder(base_url, model, os.environ.get("KAR_LLM_API_KEY"), **_given(options))


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
