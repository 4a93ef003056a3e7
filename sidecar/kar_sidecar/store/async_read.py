"""Owns how the event loop calls a store: inline where a read is a memory access, else from a thread."""

import asyncio
from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar

from kar_sidecar.store import Store

__all__ = ["STORE_SHARE", "call_store"]

P = ParamSpec("P")
T = TypeVar("T")

STORE_SHARE: Final = 0.8
"""Of the time for the store, what it may take itself: so its answer in part gets here before that time is over."""


async def call_store(store: Store, method: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """The result of `store`'s bound `method`, without holding up the event loop for longer than a memory access."""
    if store.blocking:
        return await asyncio.to_thread(method, *arguments, **options)
    return method(*arguments, **options)
