"""Owns the context of a refresh: work folder, store, provider of texts and clock, which all phases share."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rich.console import Console

from kar_offline.generate.provider import Provider
from kar_offline.work_folder import WorkFolder
from kar_sidecar.store import Store

__all__ = ["RefreshContext"]


@dataclass(frozen=True, slots=True)
class RefreshContext:
    """Work folder, store, provider, clock and console of one refresh."""

    work: WorkFolder
    open_store: Callable[[], Store]
    """Opens the store in which the release is published."""
    provider: Provider
    """Writes the texts."""
    now: Callable[[], datetime]
    console: Console | None
    """Shows progress; None: no progress is shown."""

    def status(self, text: str) -> AbstractContextManager[Any]:
        """A context that shows `text` until its block ends."""
        return self.console.status(text) if self.console else nullcontext()

    def now_ms(self) -> int:
        """The time, in milliseconds since the epoch."""
        return round(self.now().timestamp() * 1000)
