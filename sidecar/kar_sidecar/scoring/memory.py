"""Owns the in-memory scorer, whose models are functions; for tests."""

import asyncio
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from kar_sidecar.errors import DeadlineError, UnavailableError
from kar_sidecar.scoring import Tensors

__all__ = ["MemoryScorer", "Model"]

Model = Callable[[Tensors], NDArray[np.float32]]


class MemoryScorer:
    """A `Scorer` whose models are named functions. Tests make a model fail or hang by its name."""

    def __init__(self, models: Mapping[str, Model]) -> None:
        """Take functions by model name; none is loaded yet."""
        self.models = dict(models)
        self.down: set[str] = set()
        """Names of models that cannot be loaded and do not score."""
        self.hanging: set[str] = set()
        """Names of models that do not answer before the deadline."""
        self.loaded: list[str] = []
        self.calls: list[tuple[str, Tensors]] = []
        """Model and tensors of every call of `score`."""

    async def score(self, model: str, tensors: Tensors, timeout_s: float | None = None) -> NDArray[np.float32]:
        """See `Scorer.score`."""
        self.calls.append((model, tensors))
        if not await self.ready(model):
            raise UnavailableError(f"model {model} does not answer: load it first")
        if model in self.hanging:
            try:
                await asyncio.wait_for(asyncio.Event().wait(), timeout_s)
            except TimeoutError:
                raise DeadlineError(f"model {model} gave no answer in time: allow more") from None
        return self.models[model](tensors)

    async def load(self, model: str) -> None:
        """See `Scorer.load`."""
        if model in self.down or model not in self.models:
            raise UnavailableError(f"model {model} cannot be loaded: start its server")
        if model not in self.loaded:
            self.loaded.append(model)

    async def ready(self, model: str) -> bool:
        """See `Scorer.ready`."""
        return model in self.loaded and model not in self.down

    async def close(self) -> None:
        """See `Scorer.close`."""
