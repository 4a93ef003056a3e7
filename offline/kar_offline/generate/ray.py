"""Owns requests from many machines: Ray actors ask, each through its own provider; the driver keeps the ledger.

A question is one Ray task that Ray never repeats. So the driver knows at any moment which questions were sent and
answered. Ray Data could not promise that: it moves blocks of questions and repeats them.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from itertools import cycle
from types import MappingProxyType, TracebackType
from typing import Any, Final, Self

from kar_offline.generate.provider import Answer, Failure, Log, PendingBatch, Provider, Question, Reply, each
from kar_sidecar.errors import KarError, UnavailableError

__all__ = ["OnRay"]

QUIET: Final[Mapping[str, Any]] = MappingProxyType(
    {"include_dashboard": False, "log_to_driver": False, "configure_logging": False}
)


class _IgnoredLog:
    """The log of an actor's provider: the driver writes the real one."""

    def sending(self, questions: Sequence[Question], handle: str = "") -> None:
        pass

    def pending_batches(self) -> Sequence[PendingBatch]:
        return ()


class _Asker:
    """Runs in an actor and asks through its own copy of the provider."""

    def __init__(self, provider: Provider) -> None:
        self._provider = provider

    async def start(self) -> None:
        await self._provider.__aenter__()

    async def ask(self, question: Question) -> Reply | Failure:
        answers = self._provider.ask([question], _IgnoredLog())
        (answer,) = [answer async for answer in answers]
        return answer.outcome

    async def stop(self) -> None:
        await self._provider.__aexit__(None, None, None)


class OnRay:
    """A provider whose requests are made by `workers` Ray actors, which share its concurrency.

    Args:
        inner: A provider that asks one question a request; each actor gets a copy.
        workers: Number of actors, at most the concurrency of `inner`.
        address: Address of a running cluster, such as "auto"; None: a cluster inside this machine while it is used.
    """

    def __init__(self, inner: Provider, workers: int, address: str | None = None) -> None:
        """Remember the options; nothing is started yet."""
        self._inner, self._address = inner, address
        self._workers = min(workers, inner.concurrency)
        self._actors: list[Any] = []
        self.provider, self.model, self.provenance = inner.provider, inner.model, inner.provenance
        self.parameters: Mapping[str, Any] = inner.parameters
        self.concurrency, self.attempts = inner.concurrency, inner.attempts
        self.cost_usd, self.worst_usd = inner.cost_usd, inner.worst_usd

    async def __aenter__(self) -> Self:
        """Join or start the cluster, and the actors.

        Raises:
            ModuleNotFoundError: ray is not installed (extra `ray`).
            UnavailableError: there is no cluster at the address.
        """
        import ray

        self._started_cluster = not ray.is_initialized()
        if self._started_cluster:
            try:
                os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # this cluster sends no usage reports
                ray.init(self._address, **QUIET)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise UnavailableError(f"no Ray cluster at {self._address!r} ({error}): start it first") from error
        questions_per_actor = -(-self.concurrency // self._workers)
        make = ray.remote(_Asker).options(max_concurrency=questions_per_actor, max_restarts=0, max_task_retries=0)
        self._actors = [make.remote(self._inner) for _ in range(self._workers)]
        await asyncio.gather(*(_result(actor.start.remote()) for actor in self._actors))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the actors, and the cluster if it was started here."""
        import ray

        if error is None:
            await asyncio.gather(*(_result(actor.stop.remote()) for actor in self._actors))
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        if self._started_cluster:
            ray.shutdown()

    def ask(self, questions: Sequence[Question], log: Log) -> AsyncGenerator[Answer, None]:
        """See `Provider`."""
        actors = cycle(self._actors)

        async def complete(question: Question) -> Reply | Failure:
            outcome: Reply | Failure = await _result(next(actors).ask.remote(question))
            return outcome

        return each(complete, questions, log, self.concurrency)


async def _result(reference: Any) -> Any:
    """The result of a task. Our own errors are raised again; the end of an actor becomes `UnavailableError`."""
    from ray.exceptions import RayActorError, RayTaskError

    try:
        return await reference
    except RayActorError as error:
        raise UnavailableError(f"a Ray worker ended ({error}): run the same command to go on") from error
    except RayTaskError as error:
        if isinstance(error.cause, KarError):
            raise error.cause from None
        raise
