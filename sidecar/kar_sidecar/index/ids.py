"""Owns the ids of an index, memory-mapped: an id is found by its row, and a row by its id, without reading all ids.

ids.utf8        all ids, one after the other
id_ends.npy     [n] uint64, the byte where each id ends
id_order.npy    [n] uint32, the rows sorted by id (as bytes), for binary search
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Self

import numpy as np
from numpy.typing import NDArray

from kar_sidecar.errors import IntegrityError

__all__ = ["Ids"]

TEXT: Final = "ids.utf8"
ENDS: Final = "id_ends.npy"
ORDER: Final = "id_order.npy"
ERRORS: Final = "surrogatepass"


@dataclass(frozen=True, slots=True)
class Ids:
    """The ids of n rows, all different."""

    _text: NDArray[np.uint8]
    _ends: NDArray[np.uint64]
    _order: NDArray[np.uint32]

    @classmethod
    def of(cls, ids: Sequence[str]) -> Self:
        """The ids of n rows in memory, in the order of the rows."""
        encoded = [id_.encode(errors=ERRORS) for id_ in ids]
        order = sorted(range(len(encoded)), key=encoded.__getitem__)
        text = np.frombuffer(b"".join(encoded), np.uint8)
        return cls(text, np.cumsum([len(id_) for id_ in encoded], dtype=np.uint64), np.array(order, np.uint32))

    @classmethod
    def load(cls, folder: Path, *, mapped: bool = True) -> Self:
        """Read or map the files that `save` wrote.

        Raises:
            IntegrityError: the files do not belong together.
        """
        mode: Literal["r"] | None = "r" if mapped else None
        ends, order = (np.load(folder / name, mmap_mode=mode, allow_pickle=False) for name in (ENDS, ORDER))
        size = (folder / TEXT).stat().st_size
        if ends.dtype != np.uint64 or order.dtype != np.uint32 or ends.shape != order.shape or ends[-1:].sum() != size:
            raise IntegrityError(f"{folder / ENDS} does not match the ids beside it: publish again")
        # An empty file cannot be mapped.
        text = np.memmap(folder / TEXT, np.uint8, "r") if mapped and size else np.fromfile(folder / TEXT, np.uint8)
        # Views as plain arrays: indexing a memmap object costs several times as much.
        return cls(text.view(np.ndarray), ends.view(np.ndarray), order.view(np.ndarray))

    def save(self, folder: Path) -> None:
        """Write `ids.utf8`, `id_ends.npy` and `id_order.npy` into a folder."""
        self._text.tofile(folder / TEXT)
        np.save(folder / ENDS, self._ends)
        np.save(folder / ORDER, self._order)

    def __len__(self) -> int:
        return len(self._ends)

    def at(self, rows: NDArray[np.integer]) -> list[str]:
        """Ids of rows [m]."""
        ends = self._ends[rows]
        starts = np.where(rows > 0, self._ends[rows - 1], np.uint64(0))
        text = self._text.data
        return [
            str(text[start:end], "utf-8", ERRORS) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
        ]

    def row(self, id_: str) -> int | None:
        """The row of an id; None for an unknown one."""
        target, low, high = id_.encode(errors=ERRORS), 0, len(self)
        while low < high:
            middle = (low + high) // 2
            row = int(self._order[middle])
            start = int(self._ends[row - 1]) if row else 0
            candidate = self._text[start : int(self._ends[row])].tobytes()
            if candidate == target:
                return row
            low, high = (middle + 1, high) if candidate < target else (low, middle)
        return None
