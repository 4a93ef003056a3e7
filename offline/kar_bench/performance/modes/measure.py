"""Owns the measurement of both serving modes of one release.

Each mode serves from its own temporary work folder, which links the stages of the original and copies its active
release. Both serve side by side and answer the same requests in turns, so that what slows the machine down slows them
alike. Then a model that was trained but never released is rolled out in both: exported, published where the mode needs
it, and activated while the old model serves. The start-up time of the commands is not counted.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Final, get_args

from rich.console import Group

from kar_bench.harness import (
    BusyCores,
    LatencyPercentiles,
    OnStep,
    busy_cores_now,
    machine,
    new_table,
    notes,
)
from kar_bench.performance.modes.site import Bytes, LiveSite, Request, Rollout, Site
from kar_offline.dataset.dataset import Dataset
from kar_offline.models import BACKBONES, RERANKERS
from kar_offline.replay.measurement import TIMEOUT_S
from kar_offline.replay.serving import serving
from kar_offline.replay.slates import slates
from kar_offline.train.checkpoint import run_folder
from kar_offline.work_folder import WorkFolder
from kar_sidecar.client import KarClient
from kar_sidecar.errors import InputError, KarError, PreconditionError, UnavailableError
from kar_sidecar.experiments.assignment import CONTROL, KNOWLEDGE
from kar_sidecar.releases.manifest import Release, read_active
from kar_sidecar.releases.serving_view import PRESTORED, Mode

__all__ = ["MODES", "ModesBenchmarkOptions", "ModesReport", "measure_modes", "modes_table", "next_model"]

MODES: Final[tuple[Mode, ...]] = get_args(Mode)
TURN_REQUESTS: Final = 50
"""Requests that a mode gets in a row."""
WARM_UP_REQUESTS: Final = 20
"""Requests that are not counted, for each mode and number of candidates."""
SEED: Final = 7


@dataclass(frozen=True, slots=True)
class ModesBenchmarkOptions:
    """How much is asked of each mode, and which model is rolled out."""

    candidates: Sequence[int] = (100, 500)
    """Candidates of a request; each number is measured."""
    requests: int = 1000
    """Requests for each mode and number of candidates."""
    model: str = ""
    """The trained model that is rolled out; empty: the first one beside the served one that has its arm."""


@dataclass(frozen=True, slots=True)
class ModeLatency:
    """Latencies that one client saw."""

    mode: str
    candidates: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    errors: int
    """Requests that failed or were answered by a lower rung."""


@dataclass(frozen=True, slots=True)
class ModesReport:
    """Both modes of one release, by mode where there is one value for each."""

    dataset: str
    release_id: str
    requests: int
    rows: Sequence[ModeLatency]
    bytes_per_entity: Mapping[Mode, Bytes]
    checkpoint_to_serving: Mapping[Mode, Rollout]
    others_busy_cores: BusyCores
    machine: str


def next_model(work: WorkFolder, served: str, recipe: str, requested: str = "") -> str:
    """The model to roll out: trained with the arm of the served model, and with the control.

    Args:
        work: The work folder.
        served: The backbone of the served model.
        recipe: Its arm.
        requested: The model's name; empty: the first that is trained.

    Raises:
        InputError: the requested model is the served one.
        PreconditionError: the requested model is not trained, or no other one is.
    """
    if requested == served:
        raise InputError(f"{requested} is served already: name another trained model with --model")
    for name in (requested,) if requested else (*BACKBONES, *RERANKERS):
        trained = all((run_folder(work, name, arm) / "config.json").is_file() for arm in (recipe, CONTROL))
        if name != served and trained:
            return name
    missing = requested or "another model"
    raise PreconditionError(
        f"{missing} is not trained with the arms {recipe} and {CONTROL} below {work}, so nothing can follow {served}: "
        f"run `kar train --work {work} --backbone {requested or 'NAME'} --arm {recipe} --arm {CONTROL}`"
    )


def measure_modes(work: WorkFolder, options: ModesBenchmarkOptions, *, on_step: OnStep) -> ModesReport:
    """Measure both modes on the active release of `work`, which stays as it is.

    `on_step` is called with what runs, the requests done, and their number.

    Raises:
        PreconditionError: no release is active, or no other model is trained with its arm.
        InputError: the requested model is served already, or there are fewer items than candidates.
        UnavailableError: serving does not start or does not answer.
    """
    release = Release.load(work.releases, read_active(work.releases))
    served = release.model(KNOWLEDGE)
    model = next_model(work, served.backbone, served.recipe or KNOWLEDGE, options.model)
    dataset = work.read(Dataset)
    traffic = {candidates: _requests(dataset, candidates) for candidates in options.candidates}
    total = len(MODES) * options.requests * len(options.candidates)
    on_step("look whether the machine is idle", 0, total)
    busy_before = busy_cores_now()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kar-modes-")))
        live = {}
        for mode in MODES:
            on_step(f"publish and serve, {mode}", 0, total)
            live[mode] = _serve(Site.create(scratch / mode, mode, work), release, stack)
        bytes_per_entity = {
            mode: live_site.site.bytes_per_entity(release, scratch / f"{mode}_alone")
            for mode, live_site in live.items()
        }
        rows, finished = [], count(1)
        for candidates, requests in traffic.items():
            rows += _latencies(
                live, requests, candidates, options.requests, lambda text: on_step(text, next(finished), total)
            )
        # The first export of a process also imports the exporter, which is not to be counted.
        on_step(f"export {model}", total, total)
        Site.create(scratch / "warm_up", PRESTORED, work).export(release, model)
        rollouts = {}
        for mode, live_site in live.items():
            on_step(f"roll {model} out, {mode}", total, total)
            rollouts[mode] = live_site.roll_out(release, model, next(iter(traffic.values()))[0])
    return ModesReport(
        dataset.name,
        release.release_id,
        options.requests,
        rows,
        bytes_per_entity,
        rollouts,
        BusyCores(busy_before, busy_cores_now()),
        machine(),
    )


def _requests(dataset: Dataset, candidates: int) -> list[Request]:
    """A request for every test user with this many candidates.

    Raises:
        InputError: no test user has them.
    """
    requests = [
        (dataset.users[slate.user].id, [dataset.items[row].id for row in slate.items[:candidates]])
        for slate in slates(dataset, size=candidates, seed=SEED)
        if len(slate.items) >= candidates
    ]
    if not requests:
        raise InputError(f"no test user has {candidates} candidates among {len(dataset.items)} items: ask for fewer")
    return requests


def _serve(site: Site, release: Release, stack: ExitStack) -> LiveSite:
    """Publish `release` and serve it until `stack` closes."""
    site.copy_release(release)
    site.publish(release.release_id)
    addresses = stack.enter_context(serving(site.work, site.mode))
    return LiveSite(site, addresses, stack.enter_context(KarClient(addresses.grpc, timeout_s=TIMEOUT_S)))


@dataclass(slots=True)
class _Answers:
    seconds: list[float] = field(default_factory=list)
    errors: int = 0

    def rank(self, client: KarClient, user: str, items: Sequence[str]) -> None:
        """Send one request of the arm that reads knowledge; an answer of a lower rung counts as an error."""
        began = time.perf_counter()
        try:
            ranking = client.rank(user, items, arm=KNOWLEDGE)
        except KarError:
            self.errors += 1
            return
        self.seconds.append(time.perf_counter() - began)
        self.errors += ranking.rung != KNOWLEDGE

    def row(self, mode: Mode, candidates: int) -> ModeLatency:
        """Percentiles of all answers.

        Raises:
            UnavailableError: there was no answer.
        """
        if not self.seconds:
            raise UnavailableError(f"no request of {candidates} candidates was answered in the mode {mode}")
        return ModeLatency(mode, candidates, *LatencyPercentiles.of(self.seconds), self.errors)


def _latencies(
    live: Mapping[Mode, LiveSite],
    traffic: Sequence[Request],
    candidates: int,
    requests: int,
    on_request: Callable[[str], None],
) -> list[ModeLatency]:
    """Time the same requests in both modes, in turns; the mode that begins alternates."""
    for live_site in live.values():
        for number in range(WARM_UP_REQUESTS):
            live_site.client.rank(*traffic[number % len(traffic)], arm=KNOWLEDGE)
    answers = {mode: _Answers() for mode in live}
    for turn, first in enumerate(range(0, requests, TURN_REQUESTS)):
        for mode in MODES if turn % 2 == 0 else reversed(MODES):
            for number in range(first, min(first + TURN_REQUESTS, requests)):
                answers[mode].rank(live[mode].client, *traffic[number % len(traffic)])
                on_request(f"{candidates} candidates, {mode}")
    return [answers[mode].row(mode, candidates) for mode in live]


def modes_table(report: ModesReport) -> Group:
    """Latency, bytes and the time to serve a new model in each mode, ready to print."""
    title = f"{report.dataset}: {report.requests:,} requests each, one client, ms"
    latency = new_table(title, ("candidates", "mode"), ("p50", "p95", "p99", "errors"))
    for row in report.rows:
        times = [f"{ms:.2f}" for ms in (row.p50_ms, row.p95_ms, row.p99_ms)]
        latency.add_row(str(row.candidates), row.mode, *times, str(row.errors))
    rollouts = report.checkpoint_to_serving
    first = next(iter(rollouts.values()))
    costs = new_table(
        f"bytes an entity, and seconds from trained to serving ({first.model} after {first.served})",
        ("mode",),
        ("record", "in LMDB", "export", "publish", "load", "in all"),
    )
    lines = []
    for mode, rollout in rollouts.items():
        size = report.bytes_per_entity[mode]
        seconds = (rollout.export_s, rollout.publish_s, rollout.load_s, rollout.total_s)
        costs.add_row(
            mode, f"{size.record_bytes:,.0f}", f"{size.lmdb_bytes:,.0f}", *(f"{step_s:.2f}" for step_s in seconds)
        )
        if rollout.vectors_per_s:
            lines.append(
                f"{mode}: published {rollout.entities:,} entities, {rollout.vectors_per_s:,.0f} vectors a second; "
                f"a million would take {1e6 / rollout.vectors_per_s:,.0f} s"
            )
    return Group(latency, costs, *notes(lines + report.others_busy_cores.warnings()))
