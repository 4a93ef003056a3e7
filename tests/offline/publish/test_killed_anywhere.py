"""A publish that is killed at any step is seen as not published, and the next one completes it."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.killed_publish import KilledPublish, PublishKiller, publish_killer
from tests.support.publishable import World, assert_complete, make_dataset, make_release, schema_of

from kar_offline.stage_runner import folder_hash
from kar_sidecar.entities import USER
from kar_sidecar.features import FeatureLayout
from kar_sidecar.store import FEATURES, space_meta

pytestmark = pytest.mark.service


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World.make(tmp_path)


STEPS = 1 + (5 + 2) + 3 * (4 + 2) + 4
"""The claim of the schema; features, texts and two vector spaces with a checkpoint each; seals, checkpoint removed."""


@pytest.fixture(scope="module")
def killer() -> Iterator[PublishKiller]:
    with publish_killer() as killer:
        yield killer


def killed(killer: PublishKiller, world: World, release_id: str, dies_at: int, force: bool = False) -> int:
    """Exit code of a publish that is killed at a step."""
    return killer.run(
        KilledPublish(
            str(world.work),
            release_id,
            world.url,
            f"index/{release_id}",
            dies_at,
            dataset_hash=folder_hash(world.work.dataset),
            force=force,
        )
    )


def kill(killer: PublishKiller, world: World, release_id: str, dies_at: int, force: bool = False) -> None:
    assert killed(killer, world, release_id, dies_at, force) == -signal.SIGKILL


@pytest.mark.parametrize("dies_at", [1, 4, 7, 8, 12, 14, 15, 20, 26, 27, 28, 29, STEPS])
def test_a_publish_killed_anywhere_is_seen_and_completed(killer: PublishKiller, world: World, dies_at: int) -> None:
    kill(killer, world, world.release, dies_at)
    assert world.meta(space_meta("aaaaaaaaaaaa")) is None  # the last seal: readers see that it is not published
    features = world.read(USER, ["ann"], FEATURES)[0]
    assert FeatureLayout(schema_of(), USER).decode_user(features).history.item_ids in {(), ("heat", "alien")}
    assert world.publish()["ran"]
    assert_complete(world)
    assert not world.publish()["ran"]


@pytest.mark.parametrize("claimed_back", [False, True])
def test_a_checkpoint_does_not_count_after_features_of_another_schema(
    killer: PublishKiller, world: World, claimed_back: bool
) -> None:
    ours, theirs = schema_of(), schema_of(history_length=9)
    kill(killer, world, world.release, dies_at=9, force=True)  # with the first text: the checkpoint counts the features
    make_dataset(world.work, theirs)
    world.publish(make_release(world.work, theirs, adapted="bbbbbbbbbbbb"), force=True)
    make_dataset(world.work, ours)
    if claimed_back:
        # Another release of our schema, which writes no more than its claim.
        kill(killer, world, make_release(world.work, ours, adapted="dddddddddddd"), dies_at=4, force=True)
    assert world.publish(force=True)["written"]["features"] == 5
    assert_complete(world)


def test_the_last_step_of_the_kill_test_is_the_last_step_of_publishing(killer: PublishKiller, world: World) -> None:
    assert killed(killer, world, world.release, STEPS + 1) == 0
