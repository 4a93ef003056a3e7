"""Owns the process in which the index benchmark loads a snapshot, so that nothing else is in its memory.

    python -m kar_bench.performance.index_process FOLDER read|mapped

It prints how long that took, and the memory of the process's own that it and a few searches took, as JSON.
"""

import json
import sys
import time
from pathlib import Path
from typing import Final

import numpy as np

from kar_sidecar.index.faiss import FaissIndex
from kar_sidecar.index.library import import_faiss

SEARCHES: Final = 64


def main(folder: Path, way: str) -> None:
    """Load and search once, and print the report."""
    import_faiss()  # before the clock runs
    before = _anonymous_bytes()
    began = time.perf_counter()
    index = FaissIndex.load(folder, mapped=way == "mapped", verify=False)
    seconds = time.perf_counter() - began
    index.search(np.random.default_rng(0).standard_normal((SEARCHES, index.dim)), 10)
    print(json.dumps({"seconds": seconds, "anonymous_bytes": _anonymous_bytes() - before}))
    index.close()


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
