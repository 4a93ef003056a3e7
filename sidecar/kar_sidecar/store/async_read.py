"""Owns calls of a store from the event loop: directly where a read is a memory access, otherwise in a thread."""

import asyncio
from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar

from kar_sidecar.store import Store

__all__ = ["STORE_SHARE", "call_store"]

P = ParamSpec("P")
T = TypeVar("T")

STORE_SHARE: Final = 0.8
"""Share of the limit that the store itself is given: a partial answer then arrives before the limit is over."""


async def call_store(store: Store, method: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """The result of `method`, a method of `store`; the event loop is never blocked for longer than a memory access."""
    if store.blocking:
        return await asyncio.to_thread(method, *arguments, **options)
    return method(*arguments, **options)
