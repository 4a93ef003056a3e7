"""Owns what a benchmark works on: the stages of a named dataset, up to the vectors."""

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

__all__ = ["DATASETS", "prepare"]

DATASETS: Final = ("ml-100k", "ml-1m")


def prepare(
    work: WorkFolder, dataset: str, folder: Path | None, encoder: str, words: int | None = None, *, console: Console
) -> str:
    """Bring the stages of `dataset` in `work` up to date and return the name of the folder with the vectors.

    Args:
        work: The work folder.
        dataset: "ml-100k", with the released knowledge, or "ml-1m".
        folder: Of ml-1m: data and texts about items. There are none about users.
        encoder: A name of `ENCODERS`.
        words: Only so many of each text; default: all.
        console: Where progress is shown.

    Raises:
        InputError: an unknown name, ml-1m without a folder, or a work folder that holds another dataset.
        KarError: what a stage raises.
    """
    if dataset not in DATASETS or encoder not in ENCODERS:
        raise InputError(
            f"dataset {dataset!r} or encoder {encoder!r} is not known: choose from {', '.join(DATASETS)} and "
            f"{', '.join(ENCODERS)}"
        )
    if work.dataset.is_dir() and (held := work.read(Dataset).name) != dataset:
        raise InputError(f"{work} holds {held}: name another folder for {dataset} with --work")
    if dataset == "ml-100k":
        build_dataset(work, MovieLens100K())
    elif folder is None:
        raise InputError("ml-1m is not fetched: name its folder with --from")
    else:
        build_dataset(work, MovieLens1M(folder))
    render_prompts(work)
    generate(work, Pack.load(dataset if folder is None else str(folder)))
    plain = encoder == "minilm" and words is None
    vectors = "_".join(
        ["encoding", *([] if encoder == "minilm" else [encoder]), *([f"{words}_words"] if words else [])]
    )
    # mpnet is slow, and only the paper's arms read texts about users.
    kinds = tuple(EntityKind) if dataset == "ml-100k" and plain else (ITEM,)
    encode(work, ENCODERS[encoder](), folder=vectors, kinds=kinds, words=words, console=console)
    return vectors
