"""Owns how the event loop calls a store: inline where a read is a memory access, else from a thread."""

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from kar_sidecar.store import Store

__all__ = ["call_store"]

P = ParamSpec("P")
T = TypeVar("T")


async def call_store(store: Store, method: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """The result of `store`'s bound `method`, without holding up the event loop for longer than a memory access."""
    if store.blocking:
        return await asyncio.to_thread(method, *arguments, **options)
    return method(*arguments, **options)
