"""Owns the comparison of the two serving modes of one release: latency, bytes in the store, time to a new model.

Each mode has a work folder of its own, a temporary one that borrows the stages of the original and copies its active
release, and a `kar serve` on it. Both run side by side and take turns, so that what slows the machine slows them
alike. Then a model that was trained but never released comes to life in both: exported, published where the mode needs
it, activated while the old one serves. What the commands take to start is not counted.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Final, get_args

import grpc
import numpy as np

from kar.admin.v1 import admin_pb2, admin_pb2_grpc
from kar_kernels import HybridExpertAdaptor
from kar_kernels.benchmark.machine import machine, others_busy
from kar_offline.dataset.dataset import Dataset
from kar_offline.export import export
from kar_offline.models import BACKBONES, RERANKERS
from kar_offline.publish.stage import publish_release
from kar_offline.replay.online import TIMEOUT_S
from kar_offline.replay.serving import ServingAddresses, serving
from kar_offline.replay.slates import slates
from kar_offline.train.checkpoint import run_folder
from kar_offline.work_folder import WorkFolder
from kar_sidecar.client import KarClient
from kar_sidecar.errors import InputError, KarError, PreconditionError, UnavailableError
from kar_sidecar.experiments.assignment import CONTROL, KNOWLEDGE
from kar_sidecar.releases.manifest import Release, read_active, write_active
from kar_sidecar.releases.serving_view import PRESTORED, Mode, ServedRelease
from kar_sidecar.store import FEATURES, TEXT, EntityKey, Record, Store, vector_part
from kar_sidecar.store.lmdb import DATA, LmdbStore

__all__ = ["MODES", "MeteredStore", "Options", "Written", "measure_modes", "next_model"]

MODES: Final[tuple[Mode, ...]] = get_args(Mode)
STAGES: Final = ("dataset", "encoding", "knowledge", "training")
"""Folders of a work folder that an export and a publish read."""
TURN: Final = 50
"""Requests that a mode gets in a row."""
WARM: Final = 20
"""Requests that are not counted, of each mode and number of candidates."""
SEED: Final = 7
POLL_S: Final = 0.02
LINK_TIMEOUT_S: Final = 10.0
ACTIVATE_TIMEOUT_S: Final = 120.0

Request = tuple[str, list[str]]
"""A user's id and its candidates'."""


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured."""

    candidates: Sequence[int] = (100, 500)
    """Of a request."""
    requests: int = 1000
    """Of each mode and number of candidates."""
    model: str = ""
    """The trained model that comes to life; empty: the first other one with the arm that is served."""


@dataclass(slots=True)
class Written:
    """What was written of one part: records offered, their bytes, and the seconds to make and write them."""

    records: int = 0
    bytes: int = 0
    seconds: float = 0.0


class MeteredStore:
    """A `Store` that notes what is written through it, by part."""

    def __init__(self, store: Store) -> None:
        """Meter `store`, and close it in the end."""
        self.store = store
        self.blocking = store.blocking
        self.parts: dict[str, Written] = {}

    def read(self, keys: Sequence[EntityKey], parts: Sequence[str], timeout_s: float | None = None) -> list[Record]:
        """See `Store.read`."""
        return self.store.read(keys, parts, timeout_s)

    def write(self, part: str, records: Iterable[tuple[EntityKey, bytes]], *, newer_only: bool = False) -> int:
        """See `Store.write`."""
        noted = self.parts.setdefault(part, Written())

        def note() -> Iterable[tuple[EntityKey, bytes]]:
            for key, blob in records:
                noted.records += 1
                noted.bytes += len(blob)
                yield key, blob

        began = time.perf_counter()
        written = self.store.write(part, note(), newer_only=newer_only)
        noted.seconds += time.perf_counter() - began
        return written

    def remove_part(self, part: str) -> int:
        """See `Store.remove_part`."""
        return self.store.remove_part(part)

    def read_meta(self, name: str) -> bytes | None:
        """See `Store.read_meta`."""
        return self.store.read_meta(name)

    def write_meta(self, name: str, value: bytes | None) -> None:
        """See `Store.write_meta`."""
        self.store.write_meta(name, value)

    def close(self) -> None:
        """See `Store.close`."""
        self.store.close()


@dataclass(frozen=True, slots=True)
class _Published:
    seconds: float
    parts: Mapping[str, Written]


@dataclass(frozen=True, slots=True)
class _Site:
    """The work folder that one mode serves from."""

    mode: Mode
    work: WorkFolder

    @staticmethod
    def make(folder: Path, mode: Mode, source: WorkFolder) -> "_Site":
        """Borrow the stages of the work folder `source`; there is no release yet."""
        site = _Site(mode, WorkFolder(folder))
        site.releases.mkdir(parents=True)
        for stage in STAGES:
            (folder / stage).symlink_to(source.folder(stage).resolve(), target_is_directory=True)
        return site

    def take(self, release: Release) -> None:
        """Copy a release, since Python's caches land beside the models, and make it the active one."""
        shutil.copytree(release.folder, self.releases / release.release_id)
        write_active(self.releases, release.release_id)

    @property
    def releases(self) -> Path:
        return self.work.releases

    @property
    def store(self) -> Path:
        return self.work.store

    def publish(self, release_id: str) -> _Published:
        """What `kar publish` does, metered."""
        began = time.perf_counter()
        release = Release.load(self.releases, release_id)
        dataset = self.work.read(Dataset)
        store = MeteredStore(LmdbStore(self.store))
        try:
            publish_release(release, dataset, store, self.work.index / release_id)
        finally:
            store.close()
        return _Published(time.perf_counter() - began, store.parts)


def next_model(work: WorkFolder, served: str, recipe: str, asked: str = "") -> str:
    """The model that comes to life: one trained with the same arm as the served one, and with the control.

    Raises:
        InputError: `asked` is served already.
        PreconditionError: it, or any other, is not trained.
    """
    if asked == served:
        raise InputError(f"{asked} is served already: name another trained model with --model")
    for name in (asked,) if asked else (*BACKBONES, *RERANKERS):
        trained = all((run_folder(work, name, arm) / "config.json").is_file() for arm in (recipe, CONTROL))
        if name != served and trained:
            return name
    what = asked or "another model"
    raise PreconditionError(
        f"{what} is not trained with the arms {recipe} and {CONTROL} below {work}, so nothing can follow {served}: "
        f"run `kar train --work {work} --backbone {asked or 'NAME'} --arm {recipe} --arm {CONTROL}`"
    )


def _requests(dataset: Dataset, candidates: int) -> list[Request]:
    """A user and `candidates` items for every test user that has as many.

    Raises:
        InputError: none has.
    """
    found = [
        (dataset.users[slate.user].id, [dataset.items[row].id for row in slate.items[:candidates]])
        for slate in slates(dataset, size=candidates, seed=SEED)
        if len(slate.items) >= candidates
    ]
    if not found:
        raise InputError(f"no test user has {candidates} candidates among {len(dataset.items)} items: ask for fewer")
    return found


@dataclass(slots=True)
class _Latencies:
    answered_ms: list[float] = field(default_factory=list)
    errors: int = 0

    def rank(self, client: KarClient, user: str, items: Sequence[str]) -> None:
        """One request of the arm that reads knowledge; an answer of a lower rung is late or broken: an error."""
        began = time.perf_counter()
        try:
            ranking = client.rank(user, items, arm=KNOWLEDGE)
        except KarError:
            self.errors += 1
            return
        self.answered_ms.append((time.perf_counter() - began) * 1e3)
        self.errors += ranking.rung != KNOWLEDGE

    def row(self, mode: Mode, candidates: int) -> dict[str, Any]:
        """Percentiles of all answers.

        Raises:
            UnavailableError: there are none.
        """
        if not self.answered_ms:
            raise UnavailableError(f"no request of {candidates} candidates was answered in the mode {mode}")
        p50, p95, p99 = np.percentile(self.answered_ms, [50, 95, 99]).tolist()
        times = {"p50_ms": p50, "p95_ms": p95, "p99_ms": p99}
        return {"mode": mode, "candidates": candidates, **times, "errors": self.errors}


def _latency(
    live: Mapping[Mode, "_Live"],
    traffic: Sequence[Request],
    candidates: int,
    requests: int,
    on_request: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Time the same requests in all modes, which take turns; who begins alternates."""
    for one in live.values():
        for number in range(WARM):
            one.client.rank(*traffic[number % len(traffic)], arm=KNOWLEDGE)
    found = {mode: _Latencies() for mode in live}
    for turn, begin in enumerate(range(0, requests, TURN)):
        for mode in MODES if turn % 2 == 0 else reversed(MODES):
            for number in range(begin, min(begin + TURN, requests)):
                found[mode].rank(live[mode].client, *traffic[number % len(traffic)])
                on_request(f"{candidates} candidates, {mode}")
    return [found[mode].row(mode, candidates) for mode in live]


def _keys(release: Release) -> list[EntityKey]:
    """Entities whose adapted vectors the release has; in both modes these are the ones that it reads vectors of."""
    return [
        EntityKey(kind, identity)
        for kind in release.towers
        for identity in (release.folder / "vectors" / f"{kind}_ids.txt").read_text().splitlines()
    ]


def _bytes_per_entity(site: _Site, release: Release, folder: Path) -> dict[str, float]:
    """Of the vectors that a mode reads: a record, and what it takes in an LMDB file in `folder` of nothing else."""
    part, keys = vector_part(ServedRelease(release, site.mode).space.space_id), _keys(release)
    store = LmdbStore(site.store, readonly=True)
    blobs = [record[0] for record in store.read(keys, [part])]
    store.close()
    alone = MeteredStore(LmdbStore(folder))
    alone.write(part, ((key, blob) for key, blob in zip(keys, blobs, strict=True) if blob is not None))
    alone.close()
    written = alone.parts[part]
    file_bytes = (folder / DATA).stat().st_size
    return {"record_bytes": written.bytes / written.records, "lmdb_bytes": file_bytes / written.records}


@dataclass(frozen=True, slots=True)
class _Live:
    """A site that serves, and a client of it."""

    site: _Site
    addresses: ServingAddresses
    client: KarClient

    def bring(self, release: Release, model: str, request: Request) -> dict[str, Any]:
        """Bring a trained model to life beside the served `release`, with its arm and precision; time every step.

        Raises:
            UnavailableError: the server does not see it, or does not answer with it.
        """
        site, served = self.site, release.model(KNOWLEDGE)
        began = time.perf_counter()
        made = _export(site.work, release, model)
        export_s = time.perf_counter() - began
        new = Release.load(site.releases, made, verify=False)
        # The encoder's vectors and the features are in the store since the release before.
        published = site.publish(made) if site.mode == PRESTORED else _Published(0.0, {})
        began = time.perf_counter()
        self._activate(new, request)
        load_s = time.perf_counter() - began
        manifest = new.manifest
        names = {
            FEATURES: "features",
            TEXT: "texts",
            vector_part(manifest.adapted_space.space_id): "adapted",
            vector_part(manifest.encoded_space.space_id): "encoded",
            vector_part(manifest.affinity.space.space_id): "affinity",
        }
        parts = {names[part]: asdict(written) for part, written in published.parts.items()}
        adapted = parts.get("adapted")
        return {
            "served": served.backbone,
            "model": model,
            "export_s": export_s,
            "publish_s": published.seconds,
            "load_s": load_s,
            "total_s": export_s + published.seconds + load_s,
            "entities": len(_keys(new)),
            "vectors_per_s": adapted["records"] / adapted["seconds"] if adapted else None,
            "parts": parts,
        }

    def _activate(self, new: Release, first: Request) -> None:
        """Return when the `first` request was answered by the new release."""
        links = [self.site.work.serving / "models" / name for name in new.triton_models()]
        began = time.monotonic()
        while not all(link.is_dir() for link in links):
            if time.monotonic() - began > LINK_TIMEOUT_S:
                raise UnavailableError(f"kar serve did not see release {new.release_id} in {LINK_TIMEOUT_S:.0f} s")
            time.sleep(POLL_S)
        with grpc.insecure_channel(self.addresses.grpc) as channel:
            request = admin_pb2.ActivateReleaseRequest(release_id=new.release_id)
            try:
                admin_pb2_grpc.AdminServiceStub(channel).ActivateRelease(request, timeout=ACTIVATE_TIMEOUT_S)
            except grpc.RpcError as error:
                raise UnavailableError(f"release {new.release_id} cannot be activated: {error.details()}") from error
        answer = self.client.rank(*first, arm=KNOWLEDGE)
        if answer.response.release_id != new.release_id or answer.rung != KNOWLEDGE:
            raise UnavailableError(f"release {new.release_id} does not answer: {answer.response.reason}")


def _export(work: WorkFolder, release: Release, model: str) -> str:
    """Export a model with the arm and precision of `release`; returns its release id."""
    precision = HybridExpertAdaptor.load(release.folder / "adaptor.safetensors").precision
    made = export(work, model, release.model(KNOWLEDGE).recipe or KNOWLEDGE, precision=precision)
    return str(made.report["release_id"])


def measure_modes(work: WorkFolder, options: Options, *, on_step: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Measure both modes on the active release of `work`, which stays as it is.

    `rows` of the report has `{mode, candidates, p50_ms, p95_ms, p99_ms, errors}` of one client; `bytes_per_entity`, by
    mode, `{record_bytes, lmdb_bytes}` of the vectors that the mode reads; `checkpoint_to_serving`, by mode, `{served,
    model, export_s, publish_s, load_s, total_s, entities, vectors_per_s, parts}`: from a trained model on disk to an
    answer of it, the seconds of each step, the entities that have vectors, how many of these a second were made and
    written, and `parts`, everything that publishing wrote. `on_step` hears what runs, the requests done, and of how
    many.

    Raises:
        PreconditionError: no release is active, or no other model is trained with its arm.
        InputError: the model asked for is served already, or there are too few items for so many candidates.
        UnavailableError: serving does not start or does not answer.
    """
    release = Release.load(work.releases, read_active(work.releases))
    served = release.model(KNOWLEDGE)
    model = next_model(work, served.backbone, served.recipe or KNOWLEDGE, options.model)
    dataset = work.read(Dataset)
    traffic = {candidates: _requests(dataset, candidates) for candidates in options.candidates}
    total = len(MODES) * options.requests * len(options.candidates)
    on_step("look at the machine", 0, total)
    busy = {"before": others_busy()}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kar-modes-")))
        sites = {mode: _Site.make(scratch / mode, mode, work) for mode in MODES}
        live: dict[Mode, _Live] = {}
        for mode, site in sites.items():
            on_step(f"publish and serve, {mode}", 0, total)
            site.take(release)
            site.publish(release.release_id)
            addresses = stack.enter_context(serving(site.work, mode))
            live[mode] = _Live(site, addresses, stack.enter_context(KarClient(addresses.grpc, timeout_s=TIMEOUT_S)))
        bytes_ = {mode: _bytes_per_entity(site, release, scratch / f"{mode}_alone") for mode, site in sites.items()}
        rows, done = [], count(1)

        def on_request(what: str) -> None:
            on_step(what, next(done), total)

        for candidates, requests in traffic.items():
            rows += _latency(live, requests, candidates, options.requests, on_request)
        # The first export of a process imports the exporter.
        on_step(f"export {model}", total, total)
        _export(_Site.make(scratch / "warm", PRESTORED, work).work, release, model)
        brought = {}
        for mode, one in live.items():
            on_step(f"bring {model} to life, {mode}", total, total)
            brought[mode] = one.bring(release, model, next(iter(traffic.values()))[0])
    busy["after"] = others_busy()
    return {
        "dataset": dataset.name,
        "release_id": release.release_id,
        "requests": options.requests,
        "rows": rows,
        "bytes_per_entity": bytes_,
        "checkpoint_to_serving": brought,
        "others_busy_cores": busy,
        "machine": machine(),
    }
