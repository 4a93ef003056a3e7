"""Owns access to the FAISS library: which package provides it, and how many threads it uses."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any, Final

from kar_sidecar.errors import PreconditionError, UnsupportedError

__all__ = ["faiss_threads", "import_faiss", "require_one_faiss"]

DISTRIBUTIONS: Final = ("faiss-cpu", "faiss-gpu")


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def require_one_faiss(installed: Collection[str]) -> None:
    """Check that exactly one of the distributions that provide the module `faiss` is installed.

    Raises:
        UnsupportedError: none is.
        PreconditionError: both are; they overwrite each other's files.
    """
    if not installed:
        raise UnsupportedError("FAISS is not installed: install kar-sidecar with its extra `cpu` or `gpu`")
    if len(installed) > 1:
        raise PreconditionError(
            f"{' and '.join(sorted(installed))} are both installed and overwrite each other's module `faiss`: "
            "uninstall both, then install kar-sidecar with one of its extras `cpu` and `gpu`"
        )


def import_faiss() -> Any:
    """The module `faiss`; raises as `require_one_faiss` does."""
    require_one_faiss([name for name in DISTRIBUTIONS if _is_installed(name)])
    import faiss  # an optional extra

    return faiss


@contextmanager
def faiss_threads(threads: int) -> Iterator[Any]:
    """The module `faiss`, using `threads` OpenMP threads inside the block. The number belongs to the calling thread."""
    faiss = import_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        yield faiss
    finally:
        faiss.omp_set_num_threads(before)
