"""Owns the stage `encode`: each distinct text is encoded once, and entities without a text get an imputed vector.

The output files are described in `kar_offline.encode.vector_files`. An entity without a text of its own gets its
knowledge vector in one of two ways:

- Its record names neighbours (with weights) among other entities or clusters: the weighted mean of the vectors of those
  neighbours that have a text, scaled to unit length.
- It has no record with neighbours: the vector is imputed from the entities with a text whose raw texts are most
  similar (`impute_from_neighbours`).
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from rich.console import Console

from kar.records.v1 import records_pb2
from kar_offline.dataset.dataset import Dataset
from kar_offline.encode.journal import Vectors, encode_texts, read_journal, text_sha256
from kar_offline.encode.vector_files import Encoding, VectorHeader, create_array, write_header
from kar_offline.encoders.text_encoder import TextEncoder
from kar_offline.knowledge.imputation import impute_from_neighbours, mean_of_neighbours
from kar_offline.knowledge.knowledge_folder import Knowledge
from kar_offline.prompts import Prompt, RenderedPrompts
from kar_offline.stage_runner import StageResult, run_stage
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import ITEM, USER, EntityKind
from kar_sidecar.errors import InputError, PreconditionError

__all__ = ["EncodeReport", "EncodingInputs", "encode", "encode_inputs"]

FOLDER: Final = re.compile(r"encoding(_\w+)?")
JOURNAL: Final = "vectors.journal"
VERSION: Final = 4


class EncodingInputs(NamedTuple):
    """The texts to encode, and the entities that they are about."""

    dataset: Dataset
    prompts: Sequence[Prompt]
    knowledge: Knowledge
    former: Encoding
    """The former output, whose vectors are reused; it may be empty."""


@dataclass(frozen=True, slots=True)
class EncodeReport:
    """Counts of the texts that the stage encoded, reused and imputed."""

    encoder_id: str
    dim: int
    """Number of components of a vector."""
    texts: Mapping[str, int]
    """Rows with an own text, by array."""
    lent: Mapping[str, int]
    """Rows with an imputed vector, by array; arrays without such rows are left out."""
    encoded: int
    """Distinct texts encoded in this run."""
    reused: int
    """Distinct texts whose vector was in the former output."""
    resumed: int
    """Distinct texts whose vector was in the journal of an interrupted run."""
    tokens: int
    """Tokens encoded in this run."""
    tokens_per_s: float


class _Neighbour(NamedTuple):
    """A text that an imputed vector is made from, and its weight."""

    text_sha256: str
    weight: float


class _TextTable(NamedTuple):
    """The rows of one array before encoding."""

    ids: Sequence[str]
    texts: Sequence[str | None]
    """Own text of each row."""
    neighbours: Mapping[int, Sequence[_Neighbour]]
    """Neighbours of each row that has no text of its own and a record that names neighbours with a text."""


class _VectorTable(NamedTuple):
    """The rows of one array after encoding."""

    header: VectorHeader
    vectors: "np.memmap[Any, np.dtype[np.float32]]"
    """[rows, D]"""


def encode(
    work: WorkFolder,
    encoder: TextEncoder,
    folder: str = "encoding",
    *,
    kinds: Sequence[EntityKind] = tuple(EntityKind),
    words: int | None = None,
    console: Console | None = None,
) -> StageResult[EncodeReport]:
    """Run the stage `encode`: encode the texts of `work`/knowledge and `work`/prompts into `work`/`folder`.

    A vector of the former output is reused where encoder and text are the same. An interrupted run is resumed.

    Args:
        work: The work folder.
        encoder: The encoder.
        folder: Name of the output folder; there may be one per encoder.
        kinds: Kinds of entities whose texts are encoded; entities of other kinds count as having no text.
        words: Encode only this number of words of each text, from its start; default: all.
        console: Shows progress; default: no progress is shown.

    Raises:
        InputError: `folder` is neither `encoding` nor begins with `encoding_`.
        PreconditionError: an earlier stage did not run, or wrote knowledge about another dataset.
    """
    for name, command in (("dataset", "dataset"), ("prompts", "prompts"), ("knowledge", "generate")):
        if not work.folder(name).is_dir():
            raise PreconditionError(f"{work.folder(name)} is missing: run `kar {command}` first")

    def read_inputs() -> EncodingInputs:
        return EncodingInputs(
            work.read(Dataset),
            work.read(RenderedPrompts).prompts,
            work.read(Knowledge),
            Encoding.load(work.folder(folder)),
        )

    return encode_inputs(work, encoder, read_inputs, folder, kinds=kinds, words=words, console=console)


def encode_inputs(
    work: WorkFolder,
    encoder: TextEncoder,
    read_inputs: Callable[[], EncodingInputs],
    folder: str = "encoding",
    *,
    kinds: Sequence[EntityKind] = tuple(EntityKind),
    words: int | None = None,
    console: Console | None = None,
) -> StageResult[EncodeReport]:
    """Like `encode`, with the inputs as values; `read_inputs` is called only if the output is out of date."""
    if not FOLDER.fullmatch(folder):
        raise InputError(f"{folder!r} cannot hold vectors: call the folder encoding, or encoding_ and a word")

    def build(draft: Path) -> EncodeReport:
        inputs = read_inputs()
        tables = _text_tables(inputs, kinds, words)
        texts = {text_sha256(text): text for table in tables.values() for text in table.texts if text}
        former_vectors = inputs.former.vectors_by_text(encoder.encoder_id)
        reused = {digest: vector for digest, vector in former_vectors.items() if digest in texts}
        resumed = {
            digest: vector
            for digest, vector in read_journal(draft / JOURNAL, encoder.dim).items()
            if digest not in reused
        }
        vectors = reused | resumed
        missing = [text for digest, text in texts.items() if digest not in vectors]
        began = time.perf_counter()
        tokens = 0
        for digests, encoded, count in encode_texts(encoder, missing, draft / JOURNAL, console):
            vectors |= zip(digests, encoded, strict=True)
            tokens += count
        seconds = time.perf_counter() - began
        headers = _write_tables(draft, tables, vectors, encoder)
        imputed = {f"knowledge_{kind}": len(headers[f"knowledge_{kind}"].imputed) for kind in EntityKind}
        (draft / JOURNAL).unlink(missing_ok=True)
        return EncodeReport(
            encoder_id=encoder.encoder_id,
            dim=encoder.dim,
            texts={name: sum(map(bool, table.texts)) for name, table in tables.items()},
            lent={name: count for name, count in imputed.items() if count},
            encoded=len(missing),
            reused=len(reused),
            resumed=len(resumed),
            tokens=tokens,
            tokens_per_s=round(tokens / seconds, 1) if tokens else 0.0,
        )

    sources = {name: work.folder(name) for name in ("dataset", "prompts", "knowledge")}
    params = {"encoder_id": encoder.encoder_id, "kinds": sorted(kinds)} | ({"words": words} if words else {})
    return run_stage(
        "encode",
        work.folder(folder),
        build,
        inputs=sources,
        params=params,
        version=VERSION,
        report_type=EncodeReport,
    )


def _text_tables(inputs: EncodingInputs, kinds: Sequence[EntityKind], words: int | None) -> dict[str, _TextTable]:
    """The rows of each array, by its name; entities of other kinds than `kinds` have rows without texts."""

    def shorten(text: str) -> str:
        return " ".join(text.split()[:words]) if words else text

    tables = {}
    for kind in (ITEM, USER):
        ids = [entity.id for entity in inputs.dataset.entities[kind]]
        is_encoded = kind in kinds
        records = inputs.knowledge.records[kind] if is_encoded else {}
        clusters = inputs.knowledge.clusters[kind] if is_encoded else {}
        entity_texts = {id_: shorten(record.text) for id_, record in records.items()}
        cluster_texts = {id_: shorten(cluster.text) for id_, cluster in clusters.items()}
        raw_texts = {
            prompt.id: shorten(prompt.raw_text) for prompt in inputs.prompts if prompt.entity == kind and is_encoded
        }
        aligned = _align(entity_texts, ids, "knowledge texts")
        neighbours = _neighbours(records.values(), cluster_texts | entity_texts)
        rows_with_neighbours = {row: neighbours[id_] for row, id_ in enumerate(ids) if id_ in neighbours}
        tables[f"knowledge_{kind}"] = _TextTable(ids, aligned, rows_with_neighbours)
        if cluster_texts:
            texts = [text or None for text in cluster_texts.values()]
            tables[f"knowledge_{kind}_clusters"] = _TextTable(list(cluster_texts), texts, {})
        tables[f"raw_{kind}"] = _TextTable(ids, _align(raw_texts, ids, "raw texts"), {})
    return tables


def _neighbours(
    records: Iterable[records_pb2.KnowledgeRecord], texts: Mapping[str, str]
) -> dict[str, list[_Neighbour]]:
    """By id of a record without a text: its neighbours with a text. A record without such neighbours is left out."""
    digests = {id_: text_sha256(text) for id_, text in texts.items() if text}
    neighbours = {
        record.id: [_Neighbour(digests[loan.id], loan.weight) for loan in record.loans if loan.id in digests]
        for record in records
        if not record.text
    }
    return {id_: entries for id_, entries in neighbours.items() if entries}


def _align(texts: Mapping[str, str], ids: Sequence[str], label: str) -> list[str | None]:
    """The text of each id, None without one; `label` names the texts in the error."""
    if unknown := texts.keys() - set(ids):
        raise PreconditionError(f"{label} are about {min(unknown)!r}, which the dataset lacks: make them again")
    return [texts.get(entity_id) or None for entity_id in ids]


def _write_tables(
    draft: Path, tables: Mapping[str, _TextTable], vectors: Vectors, encoder: TextEncoder
) -> dict[str, VectorHeader]:
    """Write the array and the header of each table; returns the headers."""
    encoded = {name: _fill_table(draft, name, table, vectors, encoder) for name, table in tables.items()}
    for kind in EntityKind:
        knowledge = encoded[f"knowledge_{kind}"]
        encoded[f"knowledge_{kind}"] = _impute_by_content(knowledge, encoded[f"raw_{kind}"].vectors)
    for name, table in encoded.items():
        table.vectors.flush()
        write_header(draft, name, table.header)
    return {name: table.header for name, table in encoded.items()}


def _fill_table(draft: Path, name: str, table: _TextTable, vectors: Vectors, encoder: TextEncoder) -> _VectorTable:
    """Write the vectors of own texts and of rows whose record names neighbours."""
    digests = [text_sha256(text) if text else None for text in table.texts]
    array = create_array(draft, name, len(digests), encoder.dim)
    for row, digest in enumerate(digests):
        if digest:
            array[row] = vectors[digest]
    for row, neighbours in table.neighbours.items():
        neighbour_vectors = np.stack([vectors[neighbour.text_sha256] for neighbour in neighbours])  # (m, D)
        weights = np.array([neighbour.weight for neighbour in neighbours])
        array[row] = mean_of_neighbours(neighbour_vectors, weights)
        digests[row] = text_sha256(json.dumps(neighbours))
    imputed = [table.ids[row] for row in table.neighbours]
    return _VectorTable(VectorHeader(encoder.encoder_id, encoder.dim, list(table.ids), digests, imputed), array)


def _impute_by_content(knowledge: _VectorTable, raw_vectors: "np.memmap[Any, np.dtype[np.float32]]") -> _VectorTable:
    """Impute the vectors of rows that have none, from the rows with an own text whose raw texts are most similar."""
    header, array = knowledge
    imputed_before = set(header.imputed)
    has_vector = np.array([bool(digest) for digest in header.text_sha256], dtype=bool)
    has_text = has_vector & np.array([id_ not in imputed_before for id_ in header.ids], dtype=bool)
    # Rows that were imputed from their record's neighbours must not serve as neighbours: they get no content.
    content = np.where((has_text | ~has_vector)[:, None], raw_vectors, np.float32(0))  # (rows, D)
    result = impute_from_neighbours(content, has_text, array)
    digests, imputed = list(header.text_sha256), list(header.imputed)
    for row in np.flatnonzero(result.imputed):
        array[row] = result.vectors[row]
        digests[row] = hashlib.sha256(result.vectors[row].tobytes()).hexdigest()
        imputed.append(header.ids[row])
    return _VectorTable(header._replace(text_sha256=digests, imputed=imputed), array)
