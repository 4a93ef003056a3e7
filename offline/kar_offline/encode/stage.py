"""Owns the stage `encode`: texts in, one memory-mappable array of vectors a text source and entity kind out.

WORK/FOLDER/{knowledge,raw}_{item,user}.npy     float32 [dataset rows, D]; a zero row where there is no text
WORK/FOLDER/{knowledge,raw}_{item,user}.json    encoder_id, dim, ids, text_sha256 (null where there is no text)
"""

import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from kar_offline.dataset.samples import Dataset
from kar_offline.encode.encoder import TextEncoder
from kar_offline.generate.records import KINDS, read_knowledge
from kar_offline.prompts import read_prompts
from kar_offline.stage import StageResult, run_stage
from kar_sidecar.errors import InputError, PreconditionError

__all__ = ["SOURCES", "encode"]

SOURCES: Final = ("knowledge", "raw")
FOLDER: Final = re.compile(r"encoding(_\w+)?")
JOURNAL: Final = "vectors.journal"
SLICE_TOKENS: Final = 1 << 14
"""Tokens between two writes of the journal: a few seconds of work."""
COLUMNS: Final = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())

Vectors = dict[str, NDArray[np.float32]]
"""Vectors [D] by the SHA-256 of their text."""


def encode(
    work: Path,
    encoder: TextEncoder,
    folder: str = "encoding",
    *,
    kinds: Sequence[str] = KINDS,
    words: int | None = None,
    console: Console | None = None,
) -> StageResult:
    """Run the stage `encode`: encode the texts of `work`/knowledge and `work`/prompts into `work`/`folder`.

    Each distinct text is encoded once; a vector of the former output is taken over where encoder and text are the
    same; an interrupted run goes on where it ended.

    Args:
        work: The work folder.
        encoder: The encoder.
        folder: The name of the output folder; several encoders can stand side by side.
        kinds: Of "item" and "user", whose texts to encode; the others count as entities without a text.
        words: Only so many of each text, from its first; default: all.
        console: Where progress is shown; default: nowhere.

    Raises:
        InputError: `folder` is no name for vectors.
        PreconditionError: an earlier stage did not run, or made knowledge for another dataset.
    """
    inputs = {name: work / name for name in ("dataset", "prompts", "knowledge")}
    for name, source in inputs.items():
        if not source.is_dir():
            raise PreconditionError(
                f"{source} is missing: run `kar {'generate' if name == 'knowledge' else name}` first"
            )
    if not FOLDER.fullmatch(folder):
        raise InputError(f"{folder!r} cannot hold vectors: call the folder encoding, or encoding_ and a word")
    former = work / folder

    def build(draft: Path) -> Mapping[str, Any]:
        dataset = Dataset.load(work / "dataset")
        ids = {"item": [entity.id for entity in dataset.items], "user": [entity.id for entity in dataset.users]}
        texts = {
            (source, kind): _align(found, ids[kind], f"{source} texts")
            for source, kind, found in _texts(work, kinds, words)
        }
        hashes = {at: [text and _sha256(text) for text in column] for at, column in texts.items()}
        wanted = {
            digest: text
            for at, column in texts.items()
            for digest, text in zip(hashes[at], column, strict=True)
            if digest and text
        }
        vectors = {digest: v for digest, v in _former(former, encoder.encoder_id).items() if digest in wanted}
        reused = len(vectors)
        journal = draft / JOURNAL
        vectors |= _read_journal(journal, encoder.dim)
        resumed = len(vectors) - reused
        missing = [text for digest, text in wanted.items() if digest not in vectors]
        began = time.perf_counter()
        tokens = 0
        for digest, vector, count in _encode(encoder, missing, journal, console):
            vectors[digest] = vector
            tokens += count
        seconds = time.perf_counter() - began
        for (source, kind), digests in hashes.items():
            array = np.lib.format.open_memmap(
                draft / f"{source}_{kind}.npy", "w+", np.dtype(np.float32), (len(digests), encoder.dim)
            )
            for row, known in enumerate(digests):
                if known:
                    array[row] = vectors[known]
            array.flush()
            about = {"encoder_id": encoder.encoder_id, "dim": encoder.dim, "ids": ids[kind], "text_sha256": digests}
            (draft / f"{source}_{kind}.json").write_text(json.dumps(about) + "\n")
        journal.unlink(missing_ok=True)
        return {
            "encoder_id": encoder.encoder_id,
            "dim": encoder.dim,
            "texts": {f"{source}_{kind}": sum(map(bool, column)) for (source, kind), column in hashes.items()},
            "encoded": len(missing),
            "reused": reused,
            "resumed": resumed,
            "tokens": tokens,
            "tokens_per_s": round(tokens / seconds, 1) if tokens else 0.0,
        }

    params = {"encoder_id": encoder.encoder_id, "kinds": sorted(kinds)} | ({"words": words} if words else {})
    return run_stage("encode", former, build, inputs=inputs, params=params, version=2)


def _texts(work: Path, kinds: Sequence[str], words: int | None) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Each source and kind with its texts by entity id; none of kinds that are not asked for."""

    def cut(text: str) -> str:
        return " ".join(text.split()[:words]) if words else text

    prompts = read_prompts(work / "prompts")
    for kind in KINDS:
        records = read_knowledge(work / "knowledge", kind) if kind in kinds else []
        yield "knowledge", kind, {record.id: cut(record.text) for record in records}
        asked = (prompt for prompt in prompts if prompt.entity == kind and kind in kinds)
        yield "raw", kind, {prompt.id: cut(prompt.raw_text) for prompt in asked}


def _align(texts: Mapping[str, str], ids: Sequence[str], what: str) -> list[str | None]:
    if unknown := texts.keys() - set(ids):
        raise PreconditionError(f"{what} are about {min(unknown)!r}, which the dataset lacks: make them again")
    return [texts.get(entity_id) or None for entity_id in ids]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _former(folder: Path, encoder_id: str) -> Vectors:
    vectors: Vectors = {}
    for path in folder.glob("*_*.json"):
        about = json.loads(path.read_text())
        if about["encoder_id"] == encoder_id:
            array = np.load(path.with_suffix(".npy"), mmap_mode="r")
            vectors |= {digest: array[row] for row, digest in enumerate(about["text_sha256"]) if digest}
    return vectors


def _entry(dim: int) -> np.dtype[np.void]:
    return np.dtype([("sha256", np.uint8, 32), ("vector", np.float32, dim)])


def _read_journal(path: Path, dim: int) -> Vectors:
    """The vectors of an interrupted run. An entry that a kill cut short is removed, so that appending can go on."""
    entry = _entry(dim)
    if not path.is_file() or path.stat().st_size < entry.itemsize:
        path.unlink(missing_ok=True)
        return {}
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // entry.itemsize * entry.itemsize)
    entries = np.fromfile(path, entry)
    return {row["sha256"].tobytes().hex(): row["vector"] for row in entries}


def _encode(
    encoder: TextEncoder, texts: Sequence[str], journal: Path, console: Console | None
) -> Iterator[tuple[str, NDArray[np.float32], int]]:
    """Encode texts, the longest first; yield each one's hash, vector and tokens once it is in the journal."""
    lengths = encoder.count_tokens(texts)
    order = sorted(range(len(texts)), key=lambda i: lengths[i], reverse=True)
    columns = Progress(*COLUMNS, console=console, disable=console is None, transient=True)
    with journal.open("ab") as file, columns as progress:
        bar = progress.add_task("encoding", total=sum(lengths))
        while order:
            size = max(SLICE_TOKENS // max(lengths[order[0]], 1), 1)
            slice_, order = order[:size], order[size:]
            chosen = [texts[i] for i in slice_]
            entries = np.empty(len(chosen), _entry(encoder.dim))
            entries["vector"] = encoder.encode(chosen)
            digests = [_sha256(text) for text in chosen]
            entries["sha256"] = [np.frombuffer(bytes.fromhex(digest), np.uint8) for digest in digests]
            file.write(entries.tobytes())
            file.flush()
            progress.advance(bar, sum(lengths[i] for i in slice_))
            yield from zip(digests, entries["vector"], (lengths[i] for i in slice_), strict=True)
