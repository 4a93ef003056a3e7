"""Owns the count of files that are read: an audit hook sees every `open` of every library."""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["count_reads"]

WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_APPEND | os.O_CREAT


class _Recorder:
    """Counts reads below `root`, unless it is None. An audit hook cannot be removed, so all tests share one."""

    def __init__(self) -> None:
        self.root: str | None = None
        self.reads: Counter[tuple[str, int]] = Counter()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.root is None or event != "open":
            return
        path, mode, flags = arguments
        if sys._getframe(1).f_code.co_name == "open_memmap" or sys._getframe(1).f_code.co_filename.endswith(
            "memmap.py"
        ):
            return  # `numpy.load` opens a mapped array three times: to see its kind, for its header, and to map it
        if not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(self.root):
            return
        writes = flags & WRITE_FLAGS if isinstance(flags, int) else False
        if not writes and not (isinstance(mode, str) and set(mode) & set("wax+")):
            with suppress(FileNotFoundError):
                self.reads[os.fspath(path), Path(path).stat().st_ino] += 1


_RECORDER: _Recorder | None = None


@contextmanager
def count_reads(root: Path) -> Iterator[Counter[str]]:
    """Count how often each file below `root` is opened for reading, by its path relative to `root`.

    A file that replaces another is counted by itself; the largest count of all files at a path is reported.
    """
    global _RECORDER
    _RECORDER = _RECORDER or _Recorder()
    counts: Counter[str] = Counter()
    _RECORDER.root, _RECORDER.reads = str(root), Counter()
    try:
        yield counts
    finally:
        _RECORDER.root = None
        for (path, _), number in _RECORDER.reads.items():
            name = str(Path(path).relative_to(root))
            counts[name] = max(counts[name], number)
