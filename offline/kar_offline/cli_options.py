"""Owns what every subcommand has: the work folder, the JSON report."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import typer

from kar_sidecar.errors import InputError

__all__ = ["DEFAULT_WORK", "JsonFile", "Work", "once", "refuse_unknown", "write_json"]

DEFAULT_WORK: Final = Path("var/demo")
Work = Annotated[Path, typer.Option(help="Work folder.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the report to this file.")]
T = TypeVar("T")


def once(values: Sequence[T] | None) -> list[T]:
    """Each value of an option that may be repeated, once, in the order given."""
    return list(dict.fromkeys(values or ()))


def refuse_unknown(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Check that an option's values are among those that it knows.

    Raises:
        InputError: one is not; the text names those that are.
    """
    known = tuple(known)
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"{kind} {unknown[0]!r} is not known: choose from {', '.join(known)}")


def write_json(file: Path | None, report: object) -> None:
    """Write a report to `file`, if one was named; numbers that are not finite become null."""
    if file is not None:
        file.write_text(json.dumps(_finite(report), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
