"""Owns what all phases of a refresh share: the work folder, the store, the provider of texts, the clock."""

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
    """What all phases of a refresh share."""

    work: WorkFolder
    open_store: Callable[[], Store]
    """Opens the store in which the release is published."""
    provider: Provider
    """Writes the texts."""
    now: Callable[[], datetime]
    console: Console | None
    """Shows progress; None: no progress is shown."""

    def status(self, text: str) -> AbstractContextManager[Any]:
        """Shows `text` until the block ends."""
        return self.console.status(text) if self.console else nullcontext()

    def now_ms(self) -> int:
        """The time, in milliseconds since the epoch."""
        return round(self.now().timestamp() * 1000)
