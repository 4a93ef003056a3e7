"""Owns the preparation of a benchmark's work folder: all stages of a named dataset, up to the vectors."""

from pathlib import Path
from typing import Final

from rich.console import Console

from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.movielens_1m import MovieLens1M
from kar_offline.dataset.movielens_100k import MovieLens100K
from kar_offline.dataset.stage import build_dataset
from kar_offline.encode import encode
from kar_offline.encoders.packaged import ENCODERS
from kar_offline.generate import Pack, generate
from kar_offline.prompts import render_prompts
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import ITEM, EntityKind
from kar_sidecar.errors import InputError

__all__ = ["DATASETS", "PREPARED", "QUALITY_WORK", "prepare"]

QUALITY_WORK: Final = WorkFolder(Path("var/quality"))
"""The work folder of quality studies."""
DATASETS: Final = ("ml-100k", "ml-1m")
PREPARED: Final = "prepared"
"""In place of a dataset's name: the work folder already holds the dataset and its vectors."""
ENCODING: Final = "encoding"
"""The folder with the vectors that `kar encode` writes."""


def prepare(
    work: WorkFolder,
    dataset: str,
    *,
    console: Console,
    source: Path | None = None,
    encoder: str = "minilm",
    words: int | None = None,
) -> str:
    """Bring the stages of `dataset` in `work` up to date and return the name of the folder with the vectors.

    Args:
        work: The work folder.
        dataset: "ml-100k" with the released knowledge, "ml-1m", or "prepared", which changes nothing.
        console: Shows progress.
        source: ml-1m: the folder with its data and with texts about items; there are no texts about users.
        encoder: A name of `ENCODERS`.
        words: Encode only this many words of each text; None: all.

    Raises:
        InputError: the name is unknown, ml-1m has no folder, or the work folder holds another dataset.
        KarError: a stage fails.
    """
    if dataset == PREPARED:
        return ENCODING
    if dataset not in DATASETS or encoder not in ENCODERS:
        raise InputError(
            f"dataset {dataset!r} or encoder {encoder!r} is not known: choose from {', '.join(DATASETS)} and "
            f"{', '.join(ENCODERS)}"
        )
    if (work.dataset).is_dir() and (existing := work.read(Dataset).name) != dataset:
        raise InputError(f"{work} holds {existing}: name another folder for {dataset} with --work")
    if dataset == "ml-100k":
        build_dataset(work, MovieLens100K())
    elif source is None:
        raise InputError("ml-1m is not downloaded: name the folder that holds it with --from")
    else:
        build_dataset(work, MovieLens1M(source))
    render_prompts(work)
    generate(work, Pack.load(dataset if source is None else str(source)))
    vectors = "_".join([ENCODING, *([] if encoder == "minilm" else [encoder]), *([f"{words}_words"] if words else [])])
    # mpnet is slow, and only the paper's arms read texts about users.
    kinds = tuple(EntityKind) if dataset == "ml-100k" and vectors == ENCODING else (ITEM,)
    encode(work, ENCODERS[encoder](), folder=vectors, kinds=kinds, words=words, console=console)
    return vectors
