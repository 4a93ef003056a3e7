import asyncio

import numpy as np
import pytest

from kar_sidecar.errors import IntegrityError, PreconditionError, UnavailableError
from kar_sidecar.releases.manifest import read_active, write_active

pytestmark = pytest.mark.unit


def with_releases(world, body, mode="prestored"):
    async def run():
        return await body(world.releases(mode))

    return asyncio.run(run())


def refuse_to_open(world, error, match, mode="prestored"):
    async def body(releases):
        with pytest.raises(error, match=match):
            await releases.open()

    with_releases(world, body, mode)


def test_a_corrupt_file_refuses_to_open_naming_it(world):
    (world.folder / world.release_id / "vectors" / "neutral.npy").write_bytes(b"rubbish")
    refuse_to_open(world, IntegrityError, "neutral.npy")


def test_a_missing_file_refuses_to_open_naming_it(world):
    (world.folder / world.release_id / "item_ids.txt").unlink()
    refuse_to_open(world, IntegrityError, "item_ids.txt")


def test_a_changed_manifest_refuses_to_open_naming_it(world):
    manifest = world.folder / world.release_id / "manifest.json"
    manifest.write_text(manifest.read_text().replace("tiny", "huge"))
    refuse_to_open(world, IntegrityError, "manifest.json")


@pytest.mark.parametrize(
    ("mode", "name", "what"),
    [
        ("prestored", "space:aaaaaaaaaaaa", "vectors"),
        ("encoded", "space:eeeeeeeeeeee", "vectors"),
        ("prestored", "schema:", "features"),
    ],
)
def test_a_release_with_an_unpublished_part_refuses_to_open(world, mode, name, what):
    for key in list(world.store._meta):
        if key.startswith(name):
            world.store.write_meta(key, None)
    refuse_to_open(world, PreconditionError, f"the store has no {what}.*publish it first", mode)


def test_no_active_release_refuses_to_open(world):
    (world.folder / "active").unlink()
    refuse_to_open(world, PreconditionError, "kar export")


def test_an_unreachable_store_is_waited_for(world):
    async def body(releases):
        world.store.fault = UnavailableError("gone")
        await releases.open()
        await releases.restore()
        with pytest.raises(UnavailableError, match="gone"):
            await releases.check()
        world.store.fault = None
        await releases.check()

    with_releases(world, body)


def test_releases_can_serve_only_after_every_model_was_loaded_and_has_scored(world):
    async def body(releases):
        await releases.open()
        with pytest.raises(UnavailableError, match="not loaded yet"):
            await releases.check()
        await releases.restore()
        await releases.check()

    with_releases(world, body)
    names = [f"{kind}_{world.release_id}" for kind in ("control", "knowledge")]
    assert world.scorer.loaded == names
    assert [model for model, _ in world.scorer.calls] == names


def test_encoded_mode_loads_the_ensemble_before_its_parts(world):
    async def body(releases):
        await releases.open()
        await releases.restore()

    with_releases(world, body, "encoded")
    kinds = [model.split("_")[0] for model in world.scorer.loaded]
    assert kinds == ["encoded", "adaptor", "control", "knowledge"]
    assert [model.split("_")[0] for model, _ in world.scorer.calls] == ["control", "encoded"]


def test_models_that_the_scorer_lost_are_loaded_again(world):
    async def body(releases):
        await releases.open()
        await releases.restore()
        world.scorer.loaded.clear()
        with pytest.raises(UnavailableError, match="no longer ready"):
            await releases.check()
        model = f"knowledge_{world.release_id}"
        world.scorer.down.add(model)
        await releases.restore()
        with pytest.raises(UnavailableError, match=f"{model} cannot be loaded"):
            await releases.check()
        world.scorer.down.clear()
        await releases.restore()
        await releases.check()

    with_releases(world, body)


def test_activation_switches_and_is_remembered(world):
    other = world.add_release(backbone="din", created_s=2)

    async def body(releases):
        await releases.open()
        await releases.restore()
        assert await releases.activate(other) == world.release_id
        assert releases.active.id == releases.get("").id == other
        assert read_active(world.folder) == other
        assert await releases.activate(world.release_id) == other
        assert releases.get(other).id == other
        return await releases.list()

    listed = with_releases(world, body)
    assert [(release.release_id, release.active, release.loaded) for release in listed] == [
        (other, False, True),
        (world.release_id, True, True),
    ]
    assert [release.created_at.seconds for release in listed] == [2, 1]
    assert {release.dataset for release in listed} == {"tiny"}


def refuse_to_activate(world, release_id, error, match):
    async def body(releases):
        await releases.open()
        with pytest.raises(error, match=match):
            await releases.activate(release_id)
        assert releases.active.id == read_active(world.folder) == world.release_id
        with pytest.raises(PreconditionError, match="is not loaded"):
            releases.get(release_id)

    with_releases(world, body)


def test_activation_without_vectors_changes_nothing(world):
    other = world.add_release(space="bbbbbbbbbbbb", created_s=2)
    refuse_to_activate(world, other, PreconditionError, "no vectors.*space:bbbbbbbbbbbb.*publish")


@pytest.mark.parametrize("failure", ["down", "nan"])
def test_activation_of_models_that_do_not_score_changes_nothing(world, failure):
    other = world.add_release(backbone="din", created_s=2)
    if failure == "down":
        world.scorer.down.add(f"control_{other}")
    else:
        world.scorer.models[f"control_{other}"] = lambda tensors: np.array([np.nan], np.float32)
    refuse_to_activate(world, other, UnavailableError, f"control_{other}")


def test_activation_of_a_corrupt_release_changes_nothing(world):
    other = world.add_release(backbone="din", created_s=2)
    (world.folder / other / "item_ids.txt").write_text("i1\n")
    refuse_to_activate(world, other, IntegrityError, "item_ids.txt")


@pytest.mark.parametrize("release_id", ["nothing", "../releases", "/etc", "."])
def test_an_unknown_release_cannot_be_activated(world, release_id):
    refuse_to_activate(world, release_id, PreconditionError, f"known: {world.release_id}")


def test_a_folder_that_cannot_be_written_keeps_the_active_release(world):
    other = world.add_release(backbone="din", created_s=2)
    (world.folder / ".active").mkdir()  # where the new name would be drafted
    refuse_to_activate(world, other, PreconditionError, "make it writable")


def test_a_crash_after_activation_starts_with_the_new_release(world):
    other = world.add_release(backbone="din", created_s=2)
    write_active(world.folder, other)

    async def body(releases):
        await releases.open()
        return releases.active.release.model("knowledge").backbone

    assert with_releases(world, body) == "din"
