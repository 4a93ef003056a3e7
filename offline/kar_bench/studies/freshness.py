"""Owns the study of freshness: what a budget of calls a day is worth in a simulated month, and what it costs.

The protocol, on a log with one clock:

1. `month` lives with each budget from the log's first day on: on every evening the policy of `kar refresh` chooses
   what to ask, and texts are in use from the next morning.
2. On the first morning of the month a model is trained on all events before it, with the knowledge that its budget has
   bought by then: items with the texts of that morning, users with the one that was in use on each event's own morning.
   The last of these events choose the epoch. It is not trained again.
3. The events of the month are scored day by day with what was known on that day's morning (`mornings`). The rated
   history is that of the moment, as in serving. Items without a text of their own borrow in one of the ways `LOANS`.

No text about a user knows an event that is trained or scored with it. Released texts stand in for the language model's
answers about items, template-made ones (`month.taste`) for those about users, at every cut-off.

<work>/freshness/<month>/user_texts/                     vectors of template-made texts, one a user and cut-off
<work>/freshness/<month>/<model>_<arm>_<budget>_seed<s>/, .._<budget>_on_loans_seed<s>/
    predictions_<loans>.npy                              [S] of the month's events, in their order
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kar_bench.studies.freshness_inputs import Mornings
from kar_bench.studies.freshness_simulation import Call, Month, SimulatedHistory, live, taste
from kar_kernels.benchmark.machine import machine
from kar_offline.dataset.dataset import PROMPT_EVENTS, Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.dataset.splits import SPLITS, TEST, TRAIN, VALIDATION
from kar_offline.encode.vector_files import SOURCES, imputed_ids
from kar_offline.encoders.text_encoder import TextEncoder
from kar_offline.evaluate.metrics import auc, bootstrap_weights, gauc, interval, logloss, resampled_auc
from kar_offline.generate.estimate import TOKENS_PER_CHAR
from kar_offline.knowledge.records import read_knowledge
from kar_offline.prompts import read_prompts, read_renderer
from kar_offline.stage_runner import StageResult, folder_hash, run_stage
from kar_offline.train.arms import ARMS
from kar_offline.train.batches import Batches
from kar_offline.train.features import EncodedDataset, encode_dataset
from kar_offline.train.fit import STATE, fit
from kar_offline.train.predict import predict_logits
from kar_offline.train.processes import in_processes
from kar_offline.train.run import Run, new_model
from kar_offline.train.settings import TrainSettings
from kar_offline.train.vectors import load_text_vectors
from kar_offline.work_folder import WorkFolder
from kar_sidecar.content_hash import file_sha256
from kar_sidecar.entities import ITEM, EntityKind
from kar_sidecar.errors import PreconditionError

__all__ = ["CONTROL", "LOANS", "READERS", "Job", "Line", "Options", "measure_freshness"]

CONTROL: Final = "control"
READERS: Final = ("knowledge", "paper")
"""Arms that can be measured: the default recipe, which reads texts about items, and one that also reads those about
users. Calls are made about what the arm reads."""
LOANS: Final = ("never", "served", "trained")
"""Items without a text of their own never borrow from those most like them by raw text, or do when they are served
alone, or in training, too (as `kar encode` has it)."""
CAVEATS: Final = (
    "Released texts stand in for a language model's answers about items, template-made ones for those about users.",
    "Most users of MovieLens-100K rate all they ever rate on one day: a text of the next morning finds few of them.",
    "The writer of the released texts knew the films' later reputation and may have seen MovieLens.",
    "Traffic is what was rated, not what was asked for; a call brings a text unless gates refused the released one.",
)
VERSION: Final = 2
USER_TEXTS: Final = "user_texts"
METRICS: Final = ("auc", "logloss", "gauc")


@dataclass(frozen=True, slots=True)
class Options:
    """What is compared."""

    arms: Sequence[str] = READERS
    budgets: Sequence[int] = (1, 3, 10)
    """Calls a day; none at all and any number are measured, too."""
    model: str = "dcnv2"
    seeds: Sequence[int] = (0, 1)
    share: float = 0.7
    """Of the events, those before the day with which the month begins."""
    days: int = 30
    usd_per_million: tuple[float, float] = (0.15, 0.60)
    """An example of a price, in USD a million tokens: read, and written."""


class Line(NamedTuple):
    """One line of the table."""

    arm: str
    budget: int | None
    """Calls a day; None: any number."""
    loans: str = LOANS[0]


class Job(NamedTuple):
    """One training, and the ways in which items borrow that it is scored with."""

    arm: str
    budget: int | None
    loans: tuple[str, ...]
    seed: int

    @property
    def on_loans(self) -> bool:
        """Whether it is trained on borrowed vectors."""
        return LOANS[2] in self.loans


def _jobs(options: Options) -> list[Job]:
    """What is trained, lines with the most knowledge first."""
    found = []
    for seed in options.seeds:
        for arm in reversed(options.arms):
            for budget in (None, *sorted(set(options.budgets) - {0}, reverse=True), 0):
                # Without a call nobody lends, with any number nearly nobody borrows; affinities are what loans change.
                some = budget and ARMS[arm].text_affinity
                found += [Job(arm, budget, ways, seed) for ways in ((LOANS[:2], LOANS[2:]) if some else (LOANS[:1],))]
        found.append(Job(CONTROL, 0, LOANS[:1], seed))
    return found


def _lines(options: Options) -> list[Line]:
    """The table, control first, each arm by rising budget."""
    found = {Line(job.arm, job.budget, loans) for job in _jobs(options) for loans in job.loans}
    arms = (CONTROL, *options.arms)
    return sorted(found, key=lambda x: (arms.index(x.arm), LOANS.index(x.loans), x.budget is None, x.budget or 0))


def _kinds(arm: str) -> list[str]:
    """The kinds of entities whose texts an arm reads."""
    recipe = ARMS[arm]
    return [kind for kind in EntityKind if kind in recipe.towers or (kind == "item" and recipe.text_affinity)]


class _Study(NamedTuple):
    """Where a study takes place."""

    work: WorkFolder
    base: str
    """Folder in `work` with the vectors of released and raw texts."""
    options: Options

    @property
    def folder(self) -> Path:
        """Where its stages write."""
        return self.work.root / "freshness" / f"{self.options.days}_days_from_{self.options.share:g}"

    def job_folder(self, job: Job) -> Path:
        """Where one training writes."""
        budget = "any" if job.budget is None else job.budget
        name = f"{self.options.model}_{job.arm}_{budget}" + ("_on_loans" if job.on_loans else "")
        return self.folder / f"{name}_seed{job.seed}"

    def month(self) -> tuple[Month, EncodedDataset]:
        """The log and its arrays."""
        folder = self.work.dataset
        return _month(folder, folder_hash(folder), self.options.share, self.options.days)

    def life(self, arm: str, budget: int | None) -> SimulatedHistory:
        """What a budget buys for an arm."""
        folder = self.work.dataset
        return _life(folder, folder_hash(folder), self.options.share, self.options.days, arm, budget)

    def mornings(self, arm: str, budget: int | None, *, on_loans: bool = False) -> Mornings:
        """What an arm is given by a budget; `on_loans`: borrowed vectors in training, too.

        Raises:
            PreconditionError: texts about users and about items were encoded by different encoders.
        """
        (month, data), life = self.month(), self.life(arm, budget)
        released, raw = (load_text_vectors(self.work.root / self.base, source, month.dataset) for source in SOURCES)
        lent = imputed_ids(self.work.root / self.base, "knowledge", "item")
        own = torch.tensor([item.id not in lent for item in month.dataset.items])
        released = replace(released, item_present=released.item_present & own)
        versions = np.zeros((0, released.dim), np.float32)
        if life.versions:
            about = self.user_texts()
            if about["encoder_id"] != released.encoder_id:
                raise PreconditionError(
                    f"{self.work.root / self.base} is of {released.encoder_id}, texts about users are of "
                    f"{about['encoder_id']}: encode both with one encoder"
                )
            number = {key: at for at, key in enumerate(about["prompt_chars"])}
            versions = np.load(self.folder / USER_TEXTS / "vectors.npy")[[number[_key(one)] for one in life.versions]]
        return Mornings.of(month, data, life, ARMS[arm], released, raw.item.numpy(), versions, on_loans=on_loans)

    def user_texts(self) -> dict[str, Any]:
        """Of the encoded texts about users: `encoder_id`, and `prompt_chars` by `_key` in the order of vectors."""
        about: dict[str, Any] = json.loads((self.folder / USER_TEXTS / "about.json").read_text())
        return about


Task = tuple[_Study, Job, TrainSettings]


@lru_cache(maxsize=1)
def _month(folder: Path, content: str, share: float, days: int) -> tuple[Month, EncodedDataset]:
    """Kept for this process' next job; `content` is the dataset folder's hash."""
    month = Month.of(Dataset.load(folder), share=share, days=days)
    return month, encode_dataset(month.dataset)


@lru_cache(maxsize=16)
def _life(folder: Path, content: str, share: float, days: int, arm: str, budget: int | None) -> SimulatedHistory:
    return live(_month(folder, content, share, days)[0], _kinds(arm), budget)


def _key(call: Call) -> str:
    """What names a version of a user's text: user row and cut-off."""
    return f"{call.row}/{call.cutoff}"


def _known(dataset: Dataset, call: Call) -> list[tuple[Entity, float]]:
    """The items and ratings that a text about a user may know, oldest first."""
    start = int(dataset.offsets[call.row])
    events = range(start, start + call.cutoff)
    return [(dataset.items[dataset.event_item[event]], float(dataset.event_rating[event])) for event in events]


def _encode_user_texts(study: _Study, encoder: Callable[[], TextEncoder]) -> StageResult:
    """Encode all versions that some budget of some arm asks for, as a stage."""
    lives = {(line.arm, line.budget): study.life(line.arm, line.budget) for line in _lines(study.options)}
    about = {_key(call): call for life in lives.values() for call in life.versions}

    def build(draft: Path) -> dict[str, Any]:
        dataset, renderer, made = study.month()[0].dataset, read_renderer(study.work.prompts), encoder()
        prompt_chars = {}
        for key, call in about.items():
            shown = _known(dataset, call)[-PROMPT_EVENTS:]
            items, ratings = [item for item, _ in shown], [rating for _, rating in shown]
            prompt_chars[key] = len(renderer.reasoning(dataset.users[call.row], items, ratings).prompt)
        np.save(draft / "vectors.npy", made.encode([taste(_known(dataset, call)) for call in about.values()]))
        header = {"encoder_id": made.encoder_id, "prompt_chars": prompt_chars}
        (draft / "about.json").write_text(json.dumps(header) + "\n")
        return {"texts": len(about)}

    inputs = {name: study.work.root / name for name in ("dataset", "prompts")}
    params = {"versions": sorted(about)}
    return run_stage("user texts", study.folder / USER_TEXTS, build, inputs=inputs, params=params, version=VERSION)


def run_job(task: Task, notify: Callable[[tuple[Job, int]], None]) -> StageResult:
    """Train one job and replay the month with it, as a stage; `notify` hears of each epoch, and 0 at the end."""
    study, job, settings = task
    settings = replace(settings, seed=job.seed)

    def build(draft: Path) -> dict[str, Any]:
        mornings = study.mornings(job.arm, job.budget, on_loans=job.on_loans)
        month, data = mornings.month, mornings.data
        train, held_out = (mornings.samples(month.dataset.samples(split)) for split in (TRAIN, VALIDATION))
        learned = mornings.learned(train)
        fitted = fit(
            partial(new_model, Run(study.options.model, job.arm), data, learned, settings),
            Batches(data, train, learned),
            Batches(data, held_out, learned),
            settings,
            folder=draft,
            on_epoch=lambda epoch: notify((job, epoch.number)),
        )
        events = month.dataset.samples(TEST)
        for loans in job.loans:
            scores = np.empty(len(events), np.float32)
            for day in np.unique(month.event_day[events]).tolist():
                today = month.event_day[events] == day
                given = mornings.given(day, learned, lending=loans != LOANS[0])
                feed = Batches(data, mornings.samples(events[today]), given)
                scores[today] = torch.sigmoid(predict_logits(fitted.model, feed)).numpy()
            np.save(draft / f"predictions_{loans}.npy", scores)
        (draft / STATE).unlink()
        return {"validation_loss": fitted.best.validation_loss, "best_epoch": fitted.best.number}

    inputs = {"dataset": study.work.dataset, "encoding": study.work.root / study.base}
    if "user" in _kinds(job.arm):
        inputs[USER_TEXTS] = study.folder / USER_TEXTS
    params = {"model": study.options.model, **job._asdict(), **settings.to_json()}
    name = f"{study.options.model} {job.arm}"
    result = run_stage(name, study.job_folder(job), build, inputs=inputs, params=params, version=VERSION)
    notify((job, 0))
    return result


class _Scored(NamedTuple):
    """What a line scores with one seed; `resampled` is its AUC [resamples] under the bootstrap's weights."""

    auc: float
    logloss: float
    gauc: float
    resampled: NDArray[np.float64]


def measure_freshness(
    work: WorkFolder,
    base: str,
    options: Options,
    settings: TrainSettings,
    encoder: Callable[[], TextEncoder],
    *,
    workers: int,
    resamples: int = 1000,
    on_epoch: Callable[[Job, int, int, int], None] = lambda job, epoch, done, total: None,
) -> dict[str, Any]:
    """Train what is missing, replay the month with every budget and report.

    Args:
        work: Holds `dataset`, `prompts`, `knowledge` and the vectors.
        base: Folder in `work` with the vectors of released and raw texts.
        options: What is compared.
        settings: Of training; the seed is the options'.
        encoder: Makes the encoder of `base`; called if texts about users are not encoded yet.
        workers: Processes side by side, one thread each; 0: this one.
        resamples: Of the bootstrap over users.
        on_epoch: Hears of epochs, 0 when a training is done, with how many trainings are done and how many there are.

    Returns:
        A report with `month`, `rows` (one a line and seed), `summary` (one a line: mean metrics, calls and cost,
        levels, and differences in AUC `minus` the control and the same arm with `no_calls` and with `all_calls`, with
        95 % intervals from a paired bootstrap over users), `caveats` and `machine`.

    Raises:
        PreconditionError: a stage is missing, users have no clock in common, or vectors are of two encoders.
        UnavailableError: a worker process was killed; the next call goes on.
    """
    study = _Study(work, base, options)
    if any("user" in _kinds(arm) for arm in options.arms):
        _encode_user_texts(study, encoder)
    jobs = _jobs(options)
    done = 0

    def hear(notice: tuple[Job, int]) -> None:
        nonlocal done
        job, epoch = notice
        done += epoch == 0
        on_epoch(job, epoch, done, len(jobs))

    in_processes(run_job, [(study, job, settings) for job in jobs], workers, hear)

    month, _ = study.month()
    events = month.dataset.samples(TEST)
    labels, users = month.dataset.labels[events], month.dataset.event_user[events]
    weights = bootstrap_weights(len(np.unique(users)), seed=0, resamples=resamples)
    scored: dict[Line, list[_Scored]] = {}
    rows = []
    for job in jobs:
        for loans in job.loans:
            file = study.job_folder(job) / f"predictions_{loans}.npy"
            scores = np.load(file, allow_pickle=False)
            found = _Scored(
                auc(labels, scores),
                logloss(labels, scores),
                gauc(labels, scores, users),
                resampled_auc(labels, scores, users, weights),
            )
            line = Line(job.arm, job.budget, loans)
            scored.setdefault(line, []).append(found)
            row = {**line._asdict(), "seed": job.seed, **{name: getattr(found, name) for name in METRICS}}
            rows.append(row | {"predictions_sha256": file_sha256(file)})
    spend = _Spending.of(study)
    return {
        "dataset": month.dataset.name,
        "model": options.model,
        "month": {
            "first_day": month.first,
            "days": month.days,
            **{f"{name}_events": len(month.dataset.samples(split)) for split, name in enumerate(SPLITS)},
            "users": weights.shape[1],
            "events_of_users_seen_before": float((month.events_by_morning[events] > 0).mean()),
            "events_of_items_seen_before": float(
                (month.item_day[month.dataset.event_item[events]] < month.event_day[events]).mean()
            ),
        },
        "usd_per_million_tokens": {"read": options.usd_per_million[0], "written": options.usd_per_million[1]},
        "rows": rows,
        "summary": [
            _compared(line, scored)
            | spend.on(month, study.life(line.arm, line.budget))
            | {"levels": study.mornings(line.arm, line.budget).levels(events, lending=line.loans != LOANS[0])}
            for line in _lines(options)
        ],
        "caveats": list(CAVEATS),
        "machine": machine(),
    }


def _compared(line: Line, scored: Mapping[Line, Sequence[_Scored]]) -> dict[str, Any]:
    """Mean metrics of a line, and what it gives above others, seed by seed."""
    others = {"control": Line(CONTROL, 0), "no_calls": Line(line.arm, 0), "all_calls": Line(line.arm, None)}
    minus = {}
    for name, other in others.items():
        if line.arm != CONTROL and line != other:
            pairs = list(zip(scored[line], scored[other], strict=True))
            mean = float(np.mean([a.auc - b.auc for a, b in pairs]))
            minus[name] = asdict(interval(mean, np.mean([a.resampled - b.resampled for a, b in pairs], 0)))
    means = {name: float(np.mean([getattr(one, name) for one in scored[line]])) for name in METRICS}
    return {**line._asdict(), **means, "minus": minus}


@dataclass(frozen=True, slots=True)
class _Spending:
    """What calls take, in characters and USD."""

    item_prompts: Mapping[str, int]
    """Characters by id."""
    user_prompts: Mapping[str, int]
    """Characters by `_key`."""
    item_answers: Mapping[str, int]
    mean_answers: Mapping[str, float]
    """By kind: for users, and for items whose text the gates refused."""
    usd_per_million: tuple[float, float]

    @staticmethod
    def of(study: _Study) -> "_Spending":
        answers = {
            kind: {record.id: len(record.text) for record in read_knowledge(study.work.knowledge, kind)}
            for kind in EntityKind
        }
        prompts = {one.id: len(one.prompt) for one in read_prompts(study.work.prompts) if one.entity == "item"}
        users = (study.folder / USER_TEXTS).is_dir()
        return _Spending(
            prompts,
            study.user_texts()["prompt_chars"] if users else {},
            answers[ITEM],
            {kind: float(np.mean([*found.values()] or [0])) for kind, found in answers.items()},
            study.options.usd_per_million,
        )

    def on(self, month: Month, life: SimulatedHistory) -> dict[str, Any]:
        """What a life spent in the month, and before."""
        parts = [[call for call in life.calls if (call.day < month.first) is before] for before in (False, True)]
        (read, written, usd), (_, _, usd_before) = (self._tokens(month, calls) for calls in parts)
        return {
            "calls": dict(Counter(call.kind for call in parts[0])),
            "calls_by_reason": dict(Counter(f"{call.kind} {call.reason}" for call in parts[0])),
            "calls_before": len(parts[1]),
            "waiting": int(life.waiting[-1]),
            "tokens_read": round(read),
            "tokens_written": round(written),
            "usd": usd,
            "usd_before": usd_before,
        }

    def _tokens(self, month: Month, calls: Sequence[Call]) -> tuple[float, float, float]:
        """Tokens that calls read and write, and what they cost."""
        read = written = 0.0
        for call in calls:
            id_ = month.dataset.items[call.row].id if call.kind == "item" else ""
            read += self.item_prompts[id_] if id_ else self.user_prompts[_key(call)]
            written += self.item_answers.get(id_, self.mean_answers[call.kind])
        read, written = TOKENS_PER_CHAR * read, TOKENS_PER_CHAR * written
        return read, written, (read * self.usd_per_million[0] + written * self.usd_per_million[1]) / 1e6
