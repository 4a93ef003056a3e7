"""Owns the process in which the index benchmark loads a snapshot, so that nothing else is in its memory.

    python -m kar_bench.performance.index.load_process FOLDER read|mapped

It prints as JSON how long loading took, and how much memory of its own the process needed for loading and a few
searches.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Final, Literal, NamedTuple

import numpy as np

from kar_sidecar.index.faiss import FaissIndex
from kar_sidecar.index.library import import_faiss

__all__ = ["LoadCost", "load_in_own_process"]

SEARCHES: Final = 64


class LoadCost(NamedTuple):
    """The cost of loading an index and searching it a few times in a new process."""

    seconds: float
    anonymous_bytes: int
    """Memory of the process's own; unlike pages of a mapped file, it cannot be dropped and read again."""


def load_in_own_process(folder: Path, way: Literal["read", "mapped"]) -> LoadCost:
    """Load the snapshot in `folder` in a new process, read into memory or mapped."""
    command = [sys.executable, "-m", "kar_bench.performance.index.load_process", str(folder), way]
    return LoadCost(**json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))


def _main(folder: Path, way: str) -> None:
    import_faiss()  # before the clock runs
    before = _anonymous_bytes()
    began = time.perf_counter()
    index = FaissIndex.load(folder, mapped=way == "mapped", verify=False)
    seconds = time.perf_counter() - began
    index.search(np.random.default_rng(0).standard_normal((SEARCHES, index.dim)), 10)
    print(json.dumps(LoadCost(seconds, _anonymous_bytes() - before)._asdict()))
    index.close()


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), sys.argv[2])
