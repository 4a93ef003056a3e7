"""Owns a sidecar on the tiny world: a real gRPC server in this process, on free loopback ports."""

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2

from kar.ranking.v1 import ranking_pb2
from kar_sidecar.server.process import Sidecar

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
PATIENCE_S = 30


def with_sidecar(world, body, *, wait=True, **changes):
    """Run `body(sidecar, channel)` against a sidecar that is ready, unless `wait` is False."""

    async def run():
        ready = asyncio.Event()
        sidecar = Sidecar(world.settings(**changes), world.store, world.scorer, ready=lambda _: ready.set())
        async with sidecar, grpc.aio.insecure_channel(sidecar.addresses.grpc) as channel:
            if wait:
                await asyncio.wait_for(ready.wait(), PATIENCE_S)
            return await asyncio.wait_for(body(sidecar, channel), PATIENCE_S)

    return asyncio.run(run())


async def refused(call, status):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() == status
    return caught.value.details()


def rank_request(**more):
    return ranking_pb2.RankRequest(
        **{
            "user": ranking_pb2.User(id="u1"),
            "candidates": ranking_pb2.Candidates(ids=["i2", "i1"]),
            "experiment_overrides": {"knowledge": "knowledge"},
            **more,
        }
    )
