"""Owns the stage `encode`: texts in, one memory-mappable array of vectors a text source and entity kind out.

WORK/FOLDER/{knowledge,raw}_{item,user}.npy       float32 [dataset rows, D]; a zero row where there is no text
WORK/FOLDER/{knowledge,raw}_{item,user}.json      encoder_id, dim, ids, text_sha256 (null where there is no text), lent
WORK/FOLDER/knowledge_{item,user}_clusters.*      the same of clusters' texts, where there are some

An entity without a text of its own but with loans has the mean of its lenders' vectors, weighted by the loans and
scaled to unit length; lenders without a text do not count. One without loans borrows from the entities with texts of
their own that are most like it by their raw texts. `lent` lists the ids of all who borrow, and their `text_sha256` is a
hash of what they borrow.
"""

import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from kar_offline.dataset.dataset import Dataset
from kar_offline.encoders.text_encoder import TextEncoder
from kar_offline.knowledge.imputation import impute_from_neighbours, mean_of_neighbours
from kar_offline.knowledge.records import read_clusters, read_knowledge
from kar_offline.prompts import read_prompts
from kar_offline.stage_runner import StageResult, run_stage
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import EntityKind
from kar_sidecar.errors import InputError, PreconditionError

__all__ = ["SOURCES", "encode", "encode_texts", "lent_ids"]

SOURCES: Final = ("knowledge", "raw")
FOLDER: Final = re.compile(r"encoding(_\w+)?")
JOURNAL: Final = "vectors.journal"
COLUMNS: Final = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())

Vectors = dict[str, NDArray[np.float32]]
"""Vectors [D] by the SHA-256 of their text."""


class _Loan(NamedTuple):
    """A text that stands for another entity, by its SHA-256, and what it counts."""

    text_sha256: str
    weight: float


class _Table(NamedTuple):
    """What one array holds, row by row."""

    ids: Sequence[str]
    texts: Sequence[str | None]
    """Rows' own texts."""
    loans: Mapping[int, Sequence[_Loan]]
    """Of rows without a text of their own that borrow."""


def encode(
    work: WorkFolder,
    encoder: TextEncoder,
    folder: str = "encoding",
    *,
    kinds: Sequence[EntityKind] = tuple(EntityKind),
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
    inputs = {name: work.root / name for name in ("dataset", "prompts", "knowledge")}
    for name, source in inputs.items():
        if not source.is_dir():
            raise PreconditionError(
                f"{source} is missing: run `kar {'generate' if name == 'knowledge' else name}` first"
            )
    if not FOLDER.fullmatch(folder):
        raise InputError(f"{folder!r} cannot hold vectors: call the folder encoding, or encoding_ and a word")
    former = work.root / folder

    def build(draft: Path) -> Mapping[str, Any]:
        tables = _tables(work, kinds, words)
        wanted = {_sha256(text): text for table in tables.values() for text in table.texts if text}
        vectors = {digest: v for digest, v in _former(former, encoder.encoder_id).items() if digest in wanted}
        reused = len(vectors)
        journal = draft / JOURNAL
        vectors |= _read_journal(journal, encoder.dim)
        resumed = len(vectors) - reused
        missing = [text for digest, text in wanted.items() if digest not in vectors]
        began = time.perf_counter()
        tokens = 0
        for digests, found, count in encode_texts(encoder, missing, journal, console):
            vectors |= zip(digests, found, strict=True)
            tokens += count
        seconds = time.perf_counter() - began
        for name, table in tables.items():
            _write(draft / name, table, vectors, encoder)
        for kind in EntityKind:
            _lend_by_content(draft, kind)
        lent = {f"knowledge_{kind}": len(lent_ids(draft, "knowledge", kind)) for kind in EntityKind}
        journal.unlink(missing_ok=True)
        return {
            "encoder_id": encoder.encoder_id,
            "dim": encoder.dim,
            "texts": {name: sum(map(bool, table.texts)) for name, table in tables.items()},
            "lent": {name: count for name, count in lent.items() if count},
            "encoded": len(missing),
            "reused": reused,
            "resumed": resumed,
            "tokens": tokens,
            "tokens_per_s": round(tokens / seconds, 1) if tokens else 0.0,
        }

    params = {"encoder_id": encoder.encoder_id, "kinds": sorted(kinds)} | ({"words": words} if words else {})
    return run_stage("encode", former, build, inputs=inputs, params=params, version=4)


def lent_ids(folder: Path, source: str, kind: str) -> set[str]:
    """Ids of the entities of one kind whose vector is borrowed, in a finished stage's folder.

    Folders written before there were loans have none.
    """
    return set(json.loads((folder / f"{source}_{kind}.json").read_text()).get("lent", ()))


def _tables(work: WorkFolder, kinds: Sequence[str], words: int | None) -> dict[str, _Table]:
    """What each array holds, by its name; nothing is known of kinds that are not asked for."""

    def cut(text: str) -> str:
        return " ".join(text.split()[:words]) if words else text

    dataset = work.read(Dataset)
    prompts = read_prompts(work.prompts)
    tables = {}
    for kind, entities in (("item", dataset.items), ("user", dataset.users)):
        ids = [entity.id for entity in entities]
        asked = kind in kinds
        records = read_knowledge(work.knowledge, kind) if asked else []
        clusters = read_clusters(work.knowledge, kind) if asked else []
        texts = {record.id: cut(record.text) for record in records}
        of_clusters = {cluster.id: cut(cluster.text) for cluster in clusters}
        raw = {prompt.id: cut(prompt.raw_text) for prompt in prompts if prompt.entity == kind and asked}
        own = _align(texts, ids, "knowledge texts")
        digests = {id_: _sha256(text) for id_, text in (of_clusters | texts).items() if text}
        loans = {
            record.id: [_Loan(digests[loan.id], loan.weight) for loan in record.loans if loan.id in digests]
            for record in records
            if not record.text
        }
        borrowed = {row: lenders for row, id_ in enumerate(ids) if (lenders := loans.get(id_))}
        tables[f"knowledge_{kind}"] = _Table(ids, own, borrowed)
        if of_clusters:
            tables[f"knowledge_{kind}_clusters"] = _Table(
                list(of_clusters), [text or None for text in of_clusters.values()], {}
            )
        tables[f"raw_{kind}"] = _Table(ids, _align(raw, ids, "raw texts"), {})
    return tables


def _align(texts: Mapping[str, str], ids: Sequence[str], what: str) -> list[str | None]:
    if unknown := texts.keys() - set(ids):
        raise PreconditionError(f"{what} are about {min(unknown)!r}, which the dataset lacks: make them again")
    return [texts.get(entity_id) or None for entity_id in ids]


def _write(path: Path, table: _Table, vectors: Vectors, encoder: TextEncoder) -> None:
    """Write the array and the header of one table to `path` and its two suffixes."""
    digests = [text and _sha256(text) for text in table.texts]
    array = np.lib.format.open_memmap(path.with_suffix(".npy"), "w+", np.dtype(np.float32), (len(digests), encoder.dim))
    for row, known in enumerate(digests):
        if known:
            array[row] = vectors[known]
    for row, loans in table.loans.items():
        lenders = np.stack([vectors[loan.text_sha256] for loan in loans])
        array[row] = mean_of_neighbours(lenders, np.array([loan.weight for loan in loans]))
        digests[row] = _sha256(json.dumps(loans))
    array.flush()
    about = {
        "encoder_id": encoder.encoder_id,
        "dim": encoder.dim,
        "ids": table.ids,
        "text_sha256": digests,
        "lent": [table.ids[row] for row in table.loans],
    }
    path.with_suffix(".json").write_text(json.dumps(about) + "\n")


def _lend_by_content(folder: Path, kind: str) -> None:
    """Have entities of one kind without a text and loans borrow by their raw texts, in the files that `_write` made."""
    path = folder / f"knowledge_{kind}.json"
    about = json.loads(path.read_text())
    digests = about["text_sha256"]
    borrowers = set(about["lent"])
    # Who borrows lends nothing: without content it is left out.
    own = np.array(
        [bool(digest) and id_ not in borrowers for id_, digest in zip(about["ids"], digests, strict=True)], dtype=bool
    )
    bare = np.array([not digest for digest in digests], dtype=bool)
    array = np.load(path.with_suffix(".npy"), mmap_mode="r+")
    content = np.where((own | bare)[:, None], np.load(folder / f"raw_{kind}.npy", mmap_mode="r"), np.float32(0))
    found, lent = impute_from_neighbours(content, own, array)
    for row in np.flatnonzero(lent):
        array[row] = found[row]
        digests[row] = hashlib.sha256(found[row].tobytes()).hexdigest()
        about["lent"].append(about["ids"][row])
    array.flush()
    path.write_text(json.dumps(about) + "\n")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _former(folder: Path, encoder_id: str) -> Vectors:
    vectors: Vectors = {}
    for path in folder.glob("*_*.json"):
        about = json.loads(path.read_text())
        if about["encoder_id"] == encoder_id:
            array = np.load(path.with_suffix(".npy"), mmap_mode="r")
            lent = set(about.get("lent", ()))
            rows = enumerate(zip(about["ids"], about["text_sha256"], strict=True))
            vectors |= {digest: array[row] for row, (id_, digest) in rows if digest and id_ not in lent}
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


def encode_texts(
    encoder: TextEncoder, texts: Sequence[str], journal: Path, console: Console | None
) -> Iterator[tuple[Sequence[str], NDArray[np.float32], int]]:
    """Encode texts; yield hashes, vectors [n, D] and tokens of some at a time, once they are in the journal."""
    columns = Progress(*COLUMNS, console=console, disable=console is None, transient=True)
    with journal.open("ab") as file, columns as progress:
        bar = progress.add_task("encoding", total=sum(map(len, texts)))
        for rows, vectors, tokens in encoder.stream(texts):
            digests = [_sha256(texts[row]) for row in rows]
            entries = np.empty(len(rows), _entry(encoder.dim))
            entries["vector"] = vectors
            entries["sha256"] = np.frombuffer(bytes.fromhex("".join(digests)), np.uint8).reshape(-1, 32)
            file.write(entries.tobytes())
            file.flush()
            progress.advance(bar, sum(len(texts[row]) for row in rows))
            yield digests, vectors, tokens
