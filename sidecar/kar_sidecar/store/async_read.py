"""Owns calls of a store from the event loop: directly where a read is a memory access, otherwise in a thread."""

import asyncio
from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar

from kar_sidecar.store import Store

__all__ = ["STORE_SHARE", "call_store"]

P = ParamSpec("P")
T = TypeVar("T")

STORE_SHARE: Final = 0.8
"""Share of the time limit that the store may use, so that a partial answer arrives before the limit ends."""


async def call_store(store: Store, method: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Call `method`, a method of `store`, and return its result; a store that may block is called in a thread."""
    if store.blocking:
        return await asyncio.to_thread(method, *arguments, **options)
    return method(*arguments, **options)
