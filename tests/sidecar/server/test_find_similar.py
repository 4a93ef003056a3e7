"""FindSimilar of a real gRPC server in this process, while snapshots are published."""

import asyncio
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import grpc
import numpy as np
import pytest
from tests.support.open_files import no_file_left

from kar.knowledge.v1 import knowledge_pb2, knowledge_pb2_grpc
from kar.records.v1 import records_pb2
from kar_sidecar.client import KarClient
from kar_sidecar.entities import ITEM, USER
from kar_sidecar.errors import (
    InputError,
    IntegrityError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
    UnsupportedError,
)
from kar_sidecar.index import live
from kar_sidecar.index.faiss import FaissIndex
from kar_sidecar.index.library import require_one_faiss
from kar_sidecar.index.live import LiveIndexes
from kar_sidecar.index.snapshot import make_current
from kar_sidecar.server.process import Sidecar
from kar_sidecar.store.records import now_ms

pytestmark = pytest.mark.service

SPACE = records_pb2.VectorSpace(space_id="eeeeeeeeeeee", dim=3, dtype="float16")
VECTORS = {"i1": [1, 0, 0], "i2": [1, 1, 0], "i3": [0, 0, 2], "i4": [-1, 4, 0]}
PATIENCE_S = 30


def publish(root: Path, vectors: dict, *, space_id: str = SPACE.space_id, at_ms: int | None = None) -> str:
    index = FaissIndex.build(list(vectors), np.array(list(vectors.values()), np.float32))
    snapshot_id = index.save(root, space_id=space_id)
    index.close()
    make_current(root, snapshot_id, now_ms() if at_ms is None else at_ms)
    return snapshot_id


def root_of(world, kind="item") -> Path:
    return world.folder.parent / "index" / world.release_id / kind


def with_sidecar(world, body, *, indexes=None, **changes):
    async def run():
        settings = world.settings(index=world.folder.parent / "index", **changes)
        async with Sidecar(settings, world.store, world.scorer, indexes=indexes) as sidecar:
            return await asyncio.wait_for(body(sidecar), PATIENCE_S)

    return asyncio.run(run())


def with_client(world, body, **changes):
    """Run `body(client)` on a thread beside a sidecar."""

    async def run(sidecar):
        with KarClient(sidecar.addresses.grpc, timeout_s=PATIENCE_S) as client:
            return await asyncio.to_thread(body, client)

    return with_sidecar(world, run, **changes)


def test_neighbours_of_an_entity_and_of_a_vector(world):
    snapshot_id = publish(root_of(world), VECTORS)

    def body(client):
        like, to = client.find_similar("item", "i1", 2), client.find_similar("item", np.array([0, 0.5, 5]), 10)
        return like, to, client.find_similar("item", [3, 0, 0], 1, space_id=SPACE.space_id, release_id=world.release_id)

    like, to, checked = with_client(world, body)
    assert (like.release_id, like.snapshot_id) == (world.release_id, snapshot_id)
    assert 0 <= like.snapshot_age_ms < 1000 * PATIENCE_S
    assert like.ids == ("i2", "i3")  # itself is not among them
    assert like.similarities == pytest.approx((0.5**0.5, 0), abs=1e-6)
    assert to.ids == ("i3", "i4", "i2", "i1")  # all there are
    assert to.similarities == pytest.approx((5 / 25.25**0.5, 2 / (17 * 25.25) ** 0.5, 0.5 / 50.5**0.5, 0), abs=1e-6)
    assert checked.ids == ("i1",)


def test_searches_that_cannot_be_answered_are_refused_with_the_reason(world):
    publish(root_of(world), VECTORS)

    def body(client):
        for error, match, arguments, more in [
            (NotFoundError, "'stranger' has no vector", ("item", "stranger"), {}),
            (InputError, "id is empty", ("item", ""), {}),
            (InputError, "8 bytes, not 12", ("item", [1, 2]), {}),
            (InputError, "not finite", ("item", [1, 2, np.nan]), {}),
            (InputError, "all zeros", ("item", [0, 0, 0]), {}),
            (InputError, "limit is 0: ask for 1 to 7", ("item", "i1", 0), {}),
            (InputError, "limit is 8", ("item", "i1", 8), {}),
            (InputError, "of space 'other'", ("item", [1, 2, 3]), {"space_id": "other"}),
            (PreconditionError, "'other' is not loaded", ("item", "i1"), {"release_id": "other"}),
            (PreconditionError, "user holds no index snapshot: run `kar publish`", ("user", "u1"), {}),
        ]:
            limit = arguments[2] if len(arguments) > 2 else 7
            with pytest.raises(error, match=match):
                client.find_similar(*arguments[:2], limit, **more)

    with_client(world, body, max_similar=7)


def test_a_request_without_kind_or_query_is_an_invalid_argument(world):
    async def body(sidecar):
        async with grpc.aio.insecure_channel(sidecar.addresses.grpc) as channel:
            stub = knowledge_pb2_grpc.KnowledgeServiceStub(channel)
            for request, match in [
                ({"id": "i1"}, "entity is not set"),
                ({"entity": ITEM.number}, "vector has 0 bytes"),
            ]:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.FindSimilar(knowledge_pb2.FindSimilarRequest(limit=1, **request))
                assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
                assert match in caught.value.details()

    with_sidecar(world, body)


def test_a_snapshot_of_another_space_or_a_corrupt_one_is_refused(world):
    publish(root_of(world), VECTORS, space_id="ffffffffffff")
    snapshot_id = publish(root_of(world, "user"), {"u1": [1, 0, 0]})
    (root_of(world, "user") / snapshot_id / "index.faiss").write_bytes(b"?")

    def body(client):
        for _ in range(2):
            with pytest.raises(IntegrityError, match="another space"):
                client.find_similar("item", "i1")
            with pytest.raises(IntegrityError, match=r"index\.faiss is missing or corrupt"):
                client.find_similar("user", "u1")
        publish(root_of(world), VECTORS)
        publish(root_of(world, "user"), {"u1": [1, 0, 0], "u2": [0, 1, 0]})
        return until(lambda: client.find_similar("item", "i1").ids), until(
            lambda: client.find_similar("user", "u1").ids
        )

    items, users = with_client(world, body)
    assert (items[0], users) == ("i2", ("u2",))


def until(call):
    """The first answer that is not refused: the server looks for snapshots every few milliseconds."""
    ends = time.monotonic() + PATIENCE_S
    while True:
        try:
            return call()
        except PreconditionError:
            if time.monotonic() > ends:
                raise


def test_a_swap_under_concurrent_searches_gives_no_error_and_no_mixed_answer(world):
    # In generation g, item "q" has the neighbours g-0, g-1, ...: an answer from two snapshots would mix generations.
    def generation(number: int) -> dict:
        angles = np.linspace(0.1, 1, 40)
        near = {f"{number}-{at}": [np.cos(angle), np.sin(angle), 0] for at, angle in enumerate(angles)}
        return {"q": [1, 0, 0], **near}

    expected = {}
    root = root_of(world)
    expected[publish(root, generation(0))] = 0

    async def body(sidecar):
        done = asyncio.Event()
        answers = []

        async def ask(stub):
            while not done.is_set():
                request = knowledge_pb2.FindSimilarRequest(entity=ITEM.number, id="q", limit=5)
                answers.append(await stub.FindSimilar(request))

        async with grpc.aio.insecure_channel(sidecar.addresses.grpc) as channel:
            stub = knowledge_pb2_grpc.KnowledgeServiceStub(channel)
            asking = [asyncio.create_task(ask(stub)) for _ in range(8)]
            while not answers:
                await asyncio.sleep(0.001)
                assert not any(task.done() for task in asking)
            for number in range(1, 6):
                snapshot_id = await asyncio.to_thread(publish, root, generation(number))
                expected[snapshot_id] = number
                while not (answers and answers[-1].snapshot_id == snapshot_id):
                    await asyncio.sleep(0.001)
                    assert not any(task.done() for task in asking)
            done.set()
            await asyncio.gather(*asking)
        return answers

    answers = with_sidecar(world, body)
    for answer in answers:
        number = expected[answer.snapshot_id]
        assert list(answer.ids) == [f"{number}-{at}" for at in range(5)]
    assert {expected[answer.snapshot_id] for answer in answers} == set(range(6))
    # The next publish deletes snapshots that nobody reads any more.
    publish(root, generation(6))
    assert len([path for path in root.iterdir() if path.is_dir()]) == 2


def test_publishing_the_same_content_again_renews_its_age_without_loading_it(world, caplog):
    caplog.set_level("INFO", "kar_sidecar.index.live")
    root = root_of(world)
    publish(root, VECTORS, at_ms=now_ms() - 3_600_000)

    async def body():
        indexes = LiveIndexes(root.parents[1])
        before = await indexes.get(world.release_id, SPACE, ITEM)
        publish(root, VECTORS, at_ms=7)
        await indexes.refresh(world.release_id, SPACE)
        after = await indexes.get(world.release_id, SPACE, ITEM)
        await indexes.close()
        return before, after

    before, after = asyncio.run(body())
    assert after.index is before.index
    assert (after.snapshot_id, after.published_at_ms) == (before.snapshot_id, 7)
    assert before.published_at_ms < now_ms() - 3_000_000
    assert len([record for record in caplog.records if record.message.startswith("index_loaded")]) == 1


def test_after_a_bad_snapshot_the_former_one_answers_and_the_fault_is_logged_once(world, caplog):
    root = root_of(world)
    good = publish(root, VECTORS)

    async def body():
        indexes = LiveIndexes(root.parents[1])
        await indexes.refresh(world.release_id, SPACE)
        bad = publish(root, {"i1": [1, 1, 1]}, space_id="ffffffffffff")
        for _ in range(3):
            await indexes.refresh(world.release_id, SPACE)
        snapshot = await indexes.get(world.release_id, SPACE, ITEM)
        found = snapshot.index.search_like("i1", 1)
        await indexes.close()
        return bad, snapshot.snapshot_id, found.ids

    bad, answered, found = asyncio.run(body())
    assert (answered, found) == (good, [["i2"]])
    assert len([record for record in caplog.records if bad in record.message]) == 1


@pytest.mark.parametrize(
    "fault", [OSError(5, "Input/output error"), MemoryError(), RuntimeError("can't start new thread")]
)
def test_a_temporary_fault_is_retried_and_does_not_delay_the_other_kind(world, caplog, fault):
    publish(root_of(world), VECTORS)
    publish(root_of(world, "user"), {"u1": [1, 0, 0], "u2": [0, 1, 0]})
    faulty = {root_of(world, "user")}

    def load(folder):
        if folder.parent in faulty:
            raise fault
        return FaissIndex.load(folder)

    caplog.set_level("INFO", live.__name__)

    async def body():
        indexes = LiveIndexes(root_of(world).parents[1], load=load)
        for _ in range(2):
            await indexes.refresh(world.release_id, SPACE)
        with pytest.raises(UnavailableError, match="user could not be loaded"):
            await indexes.get(world.release_id, SPACE, USER)
        logged = [record for record in caplog.records if record.name == live.__name__]
        assert len(logged) == 2  # items are loaded, users are not
        faulty.clear()
        await indexes.refresh(world.release_id, SPACE)
        items, users = [await indexes.get(world.release_id, SPACE, kind) for kind in (ITEM, USER)]
        found = [items.index.search_like("i1", 1).ids, users.index.search_like("u1", 1).ids]
        await indexes.close()
        return found

    assert asyncio.run(body()) == [[["i2"]], [["u2"]]]


def test_after_a_temporary_fault_the_earlier_answer_is_given_again(world):
    snapshot_id = publish(root_of(world, "user"), {"u1": [1, 0, 0]})
    (root_of(world, "user") / snapshot_id / "index.faiss").write_bytes(b"?")

    async def body():
        indexes = LiveIndexes(root_of(world).parents[1])
        for kind, before in ((USER, IntegrityError), (ITEM, PreconditionError)):
            for context, error in ((nullcontext, before), (no_file_left, UnavailableError), (nullcontext, before)):
                with context(), pytest.raises(error) as caught:
                    await indexes.get(world.release_id, SPACE, kind)
                assert caught.type is error
        await indexes.close()

    asyncio.run(body())


def test_a_load_continues_when_its_caller_is_gone(world):
    publish(root_of(world), VECTORS)
    begun, go = threading.Event(), threading.Event()
    loads = []

    def slow(folder):
        loads.append(folder)
        begun.set()
        assert go.wait(PATIENCE_S)
        return FaissIndex.load(folder)

    async def body():
        indexes = LiveIndexes(root_of(world).parents[1], load=slow)
        impatient = asyncio.create_task(indexes.get(world.release_id, SPACE, ITEM))
        assert await asyncio.to_thread(begun.wait, PATIENCE_S)
        impatient.cancel()
        await asyncio.wait([impatient])
        go.set()
        found = (await indexes.get(world.release_id, SPACE, ITEM)).index.search_like("i1", 1)
        await indexes.close()
        return found.ids

    assert asyncio.run(body()) == [["i2"]]
    assert len(loads) == 1


def test_without_faiss_it_is_unimplemented(world):
    publish(root_of(world), VECTORS)
    indexes = LiveIndexes(root_of(world).parents[1], load=lambda folder: require_one_faiss([]))

    def body(client):
        with pytest.raises(UnsupportedError, match="FAISS is not installed"):
            client.find_similar("item", "i1")

    with_client(world, body, indexes=indexes)


def test_each_kind_has_its_own_folder(world):
    publish(root_of(world), VECTORS)
    publish(root_of(world, "user"), {"u1": [1, 0, 0], "u2": [0, 1, 0]})
    assert with_client(world, lambda client: client.find_similar("user", "u1").ids) == ("u2",)
