"""Owns the files of encoded texts: an array of vectors and a header per text source and kind of entity.

<folder>/{knowledge,raw}_{item,user}.npy     float32 [dataset rows, D]; zeros for an entity without a vector
<folder>/{knowledge,raw}_{item,user}.json    the header, see `VectorHeader`
<folder>/knowledge_{item,user}_clusters.*    the same for texts about clusters, if there are any
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kar_sidecar.errors import PreconditionError

__all__ = ["SOURCES", "Encoding", "VectorHeader", "create_array", "imputed_ids", "read_header", "write_header"]

SOURCES: Final = ("knowledge", "raw")
"""Text sources: texts of the language model, and the facts that its prompts show."""


class VectorHeader(NamedTuple):
    """The origin of each row of one array."""

    encoder_id: str
    dim: int
    ids: list[str]
    """Id of each row."""
    text_sha256: list[str | None]
    """SHA-256 of each row's text. An imputed row has the hash of its sources, a row without a vector None."""
    imputed: list[str]
    """Ids of the rows whose vector was imputed. The file's name for this field is `lent`."""


def read_header(folder: Path, name: str) -> VectorHeader:
    """The header of an array such as "knowledge_item".

    Headers of older releases have no imputed rows.

    Raises:
        PreconditionError: the texts were not encoded.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        raise PreconditionError(f"{path} does not exist: run `kar encode` first")
    values = json.loads(path.read_text())
    return VectorHeader(
        values["encoder_id"], values["dim"], values["ids"], values["text_sha256"], values.get("lent", [])
    )


def write_header(folder: Path, name: str, header: VectorHeader) -> None:
    """Write a header for `read_header`."""
    values = header._asdict()
    values["lent"] = values.pop("imputed")
    (folder / f"{name}.json").write_text(json.dumps(values) + "\n")


def create_array(folder: Path, name: str, rows: int, dim: int) -> "np.memmap[Any, np.dtype[np.float32]]":
    """A new memory-mapped array [rows, dim] of zeros, whose file belongs to the header of the same name."""
    return np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.dtype(np.float32), (rows, dim))


def imputed_ids(folder: Path, source: str, kind: str) -> set[str]:
    """Ids of the entities of one kind whose vector was imputed."""
    return set(read_header(folder, f"{source}_{kind}").imputed)


@dataclass(frozen=True)
class Encoding:
    """All vectors of a folder; the arrays are opened when they are first needed."""

    FOLDER: ClassVar[str] = "encoding"

    folder: Path
    headers: Mapping[str, VectorHeader]
    """By the name of the array, such as "knowledge_item"."""
    _arrays: dict[str, NDArray[np.float32]] = field(default_factory=dict, compare=False, repr=False)

    @staticmethod
    def load(folder: Path) -> "Encoding":
        """Read the headers of a folder; a folder that does not exist has none."""
        return Encoding(folder, {path.stem: read_header(folder, path.stem) for path in folder.glob("*_*.json")})

    def header(self, name: str) -> VectorHeader:
        """The header of an array.

        Raises:
            PreconditionError: the texts were not encoded.
        """
        if name not in self.headers:
            raise PreconditionError(f"{self.folder / name}.json does not exist: run `kar encode` first")
        return self.headers[name]

    def vectors(self, name: str) -> NDArray[np.float32]:
        """An array [rows, D], memory-mapped once."""
        if name not in self._arrays:
            self._arrays[name] = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        return self._arrays[name]

    def vectors_by_text(self, encoder_id: str) -> dict[str, NDArray[np.float32]]:
        """Vectors [D] of the encoder `encoder_id`, by the SHA-256 of their text; imputed vectors are left out."""
        vectors: dict[str, NDArray[np.float32]] = {}
        for name, header in self.headers.items():
            if header.encoder_id == encoder_id:
                array, imputed = self.vectors(name), set(header.imputed)
                rows = enumerate(zip(header.ids, header.text_sha256, strict=True))
                vectors |= {digest: array[row] for row, (id_, digest) in rows if digest and id_ not in imputed}
        return vectors
