"""Owns calls of a ranker and of the knowledge service on the tiny world, whose release is loaded and warm."""

import asyncio

from kar.knowledge.v1 import knowledge_pb2
from kar.ranking.v1.ranking_pb2 import Candidates, RankRequest, User
from kar_sidecar.entities import EntityKind
from kar_sidecar.index.live import LiveIndexes
from kar_sidecar.ranking.ranker import Ranker
from kar_sidecar.server.services import KnowledgeService
from kar_sidecar.telemetry import Telemetry


class Clock:
    """A clock in seconds, which only the test and each reading (by `tick`) move."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now, self.tick = 100.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


class CallWithoutDeadline:
    """The context of a gRPC call whose caller waits for ever."""

    def time_remaining(self):
        return None


def rank_request(*items, user="u1", arm="knowledge", caller_scores=(), **more) -> RankRequest:
    return RankRequest(
        request_id="r",
        user=User(id=user),
        candidates=Candidates(ids=items or ("i2", "i1", "i4"), caller_scores=caller_scores),
        experiment_overrides={"knowledge": arm} if arm else {},
        **more,
    )


def rank(
    world,
    *requests,
    left_s=None,
    clock=None,
    mode="prestored",
    before=lambda: None,
    telemetry=None,
    at_ms=2,
    **settings,
):
    """The answer to each request (alone if there is one) at the time of day `at_ms`.

    `before` runs when the release is warm, ahead of the requests.
    """

    async def run():
        releases = world.releases(mode)
        await releases.open()
        await releases.restore()
        world.scorer.calls.clear()
        before()
        ranker = Ranker(
            releases,
            world.store,
            world.scorer,
            world.settings(**settings),
            telemetry or Telemetry(),
            clock=clock or Clock(),
            wall_ms=lambda: at_ms,
        )
        return [await ranker.rank(request, left_s) for request in requests]

    answers = asyncio.run(run())
    return answers[0] if len(answers) == 1 else answers


def read_knowledge(world, kind: EntityKind, *ids, telemetry, at_ms=0, before=lambda: None):
    """The answer of BatchGetKnowledge at the time of day `at_ms`; `before` as in `rank`."""

    async def run():
        releases = world.releases()
        await releases.open()
        await releases.restore()
        before()
        service = KnowledgeService(
            releases,
            world.store,
            LiveIndexes(world.folder.parent / "index"),
            telemetry,
            max_ids=10,
            max_similar=10,
            timeout_s=30,
            wall_ms=lambda: at_ms,
        )
        request = knowledge_pb2.BatchGetKnowledgeRequest(entity=kind.number, ids=ids)
        return await service.BatchGetKnowledge(request, CallWithoutDeadline())

    return asyncio.run(run())
