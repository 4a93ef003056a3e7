"""Owns the trainings of the study of freshness: which there are, and each one as a stage.

The protocol, on a log with one clock:

1. `simulation` spends each budget from the first day of the log on: on every evening the policy of `kar refresh`
   chooses what to ask about, and texts are in use from the next morning.
2. On the first morning of the month a model is trained on all earlier events, with the knowledge that its budget has
   bought by then: items with the texts of that morning, users with the text in use on the morning of each event. The
   last of these events choose the epoch. The model is not trained again.
3. The events of the month are scored day by day with the knowledge of that day's morning (`inputs`). The rated history
   is up to date, as in serving. Items without a text may have imputed vectors, see `IMPUTATION`.

No text about a user knows an event that is trained or scored with it. Released texts stand in for a language model's
answers about items, and template-made texts (`simulation.preference_text`) for answers about users, at every cut-off.

<work>/freshness/<month>/user_texts/                     vectors of template-made texts, one a user and cut-off
<work>/freshness/<month>/<model>_<arm>_<budget>_seed<s>/, .._<budget>_on_loans_seed<s>/
    predictions_<imputation>.npy                         [S] of the month's events, in their order
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from kar_bench.studies.freshness.inputs import KnowledgeByMorning
from kar_bench.studies.freshness.simulation import Call, Month, SimulatedHistory, preference_text, simulate
from kar_offline.dataset.dataset import PROMPT_EVENTS, Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.dataset.splits import TEST, TRAIN, VALIDATION
from kar_offline.encode.vector_files import SOURCES, imputed_ids
from kar_offline.encoders.text_encoder import TextEncoder
from kar_offline.prompts import read_renderer
from kar_offline.stage_runner import StageResult, folder_hash, run_stage
from kar_offline.train.arms import ARMS
from kar_offline.train.batches import Batches
from kar_offline.train.features import EncodedDataset, encode_dataset
from kar_offline.train.fit import STATE, fit
from kar_offline.train.predict import predict_logits
from kar_offline.train.run import Run, new_model
from kar_offline.train.settings import TrainSettings
from kar_offline.train.vectors import load_text_vectors
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import EntityKind
from kar_sidecar.errors import PreconditionError

__all__ = [
    "CONTROL",
    "IMPUTATION",
    "NEVER_IMPUTED",
    "READERS",
    "FreshnessBenchmarkOptions",
    "FreshnessStudy",
    "FreshnessVariant",
    "ReplayJob",
    "ReplayTask",
    "encode_user_texts",
    "replay_jobs",
    "run_replay",
    "variants",
]

CONTROL: Final = "control"
READERS: Final = ("knowledge", "paper")
"""Arms that can be measured: "knowledge" reads texts about items, "paper" also those about users. An arm's calls are
about the kinds of entities that it reads."""
NEVER_IMPUTED, SERVED, TRAINED = IMPUTATION = ("never", "served", "trained")
"""When the vectors of items without an own text are imputed: never; only when serving; in training too, as the stage
`encode` does."""
VERSION: Final = 2
USER_TEXTS: Final = "user_texts"


@dataclass(frozen=True, slots=True)
class FreshnessBenchmarkOptions:
    """Which arms and budgets are compared, and in which month."""

    arms: Sequence[str] = READERS
    budgets: Sequence[int] = (1, 3, 10)
    """Calls a day; no calls and any number of calls are measured in any case."""
    model: str = "dcnv2"
    seeds: Sequence[int] = (0, 1)
    share: float = 0.7
    """Share of the events before the first day of the month."""
    days: int = 30
    usd_per_million: tuple[float, float] = (0.15, 0.60)
    """Price of a million tokens, read and written; an example."""


class FreshnessVariant(NamedTuple):
    """One line of the table."""

    arm: str
    budget: int | None
    """Calls a day; None: any number."""
    imputation: str = NEVER_IMPUTED

    def to_json(self) -> dict[str, Any]:
        """With the key of earlier reports."""
        return {"arm": self.arm, "budget": self.budget, "loans": self.imputation}


class ReplayJob(NamedTuple):
    """One training, and the ways of imputation that it is scored with."""

    arm: str
    budget: int | None
    imputations: tuple[str, ...]
    seed: int

    @property
    def train_imputed(self) -> bool:
        """Whether it is trained on imputed vectors."""
        return TRAINED in self.imputations

    def variants(self) -> list[FreshnessVariant]:
        """The lines of the table that it is scored for."""
        return [FreshnessVariant(self.arm, self.budget, imputation) for imputation in self.imputations]


def replay_jobs(options: FreshnessBenchmarkOptions) -> list[ReplayJob]:
    """All trainings, those with the most knowledge first."""
    jobs = []
    for seed in options.seeds:
        for arm in reversed(options.arms):
            for budget in (None, *sorted(set(options.budgets) - {0}, reverse=True), 0):
                # Without calls there are no neighbours, and with any number of calls hardly any vector is imputed.
                # Imputation changes affinities only.
                ways = (
                    [(NEVER_IMPUTED, SERVED), (TRAINED,)] if budget and ARMS[arm].text_affinity else [(NEVER_IMPUTED,)]
                )
                jobs += [ReplayJob(arm, budget, imputations, seed) for imputations in ways]
        jobs.append(ReplayJob(CONTROL, 0, (NEVER_IMPUTED,), seed))
    return jobs


def variants(options: FreshnessBenchmarkOptions) -> list[FreshnessVariant]:
    """The lines of the table: control first, each arm by rising budget."""
    measured = {variant for job in replay_jobs(options) for variant in job.variants()}
    arms = (CONTROL, *options.arms)

    def position(variant: FreshnessVariant) -> tuple[int, int, bool, int]:
        unlimited = variant.budget is None
        return arms.index(variant.arm), IMPUTATION.index(variant.imputation), unlimited, variant.budget or 0

    return sorted(measured, key=position)


def _kinds(arm: str) -> list[str]:
    """The kinds of entities whose texts an arm reads."""
    recipe = ARMS[arm]
    return [kind for kind in EntityKind if kind in recipe.towers or (kind == "item" and recipe.text_affinity)]


class UserTexts(NamedTuple):
    """The encoded template-made texts about users."""

    encoder_id: str
    prompt_chars: dict[str, int]
    """Characters of the prompt for each version of a text, in the order of the vectors."""
    vectors: Path
    """The file of the vectors [versions, D]."""


class FreshnessStudy(NamedTuple):
    """One study in a work folder: its month, the simulated histories, and the inputs of its arms."""

    work: WorkFolder
    base: str
    """Folder in `work` with the vectors of released and raw texts."""
    options: FreshnessBenchmarkOptions

    @property
    def folder(self) -> Path:
        """The folder of its stages."""
        return self.work.root / "freshness" / f"{self.options.days}_days_from_{self.options.share:g}"

    def job_folder(self, job: ReplayJob) -> Path:
        """The folder of one training."""
        budget = "any" if job.budget is None else job.budget
        name = f"{self.options.model}_{job.arm}_{budget}" + ("_on_loans" if job.train_imputed else "")
        return self.folder / f"{name}_seed{job.seed}"

    def month(self) -> tuple[Month, EncodedDataset]:
        """The log and its arrays."""
        folder = self.work.dataset
        return _month(folder, folder_hash(folder), self.options.share, self.options.days)

    def history(self, arm: str, budget: int | None) -> SimulatedHistory:
        """The calls that a budget buys for an arm."""
        folder = self.work.dataset
        return _history(folder, folder_hash(folder), self.options.share, self.options.days, arm, budget)

    def reads_users(self, arm: str) -> bool:
        """Whether an arm reads texts about users."""
        return "user" in _kinds(arm)

    def knowledge(self, arm: str, budget: int | None, *, train_imputed: bool = False) -> KnowledgeByMorning:
        """An arm's inputs by morning.

        Raises:
            PreconditionError: texts about users and about items were encoded by different encoders.
        """
        (month, data), history = self.month(), self.history(arm, budget)
        released, raw = (load_text_vectors(self.work.folder(self.base), source, month.dataset) for source in SOURCES)
        imputed = imputed_ids(self.work.folder(self.base), "knowledge", "item")
        own = torch.tensor([item.id not in imputed for item in month.dataset.items])
        released = replace(released, item_present=released.item_present & own)
        versions = np.zeros((0, released.dim), np.float32)
        if history.versions:
            texts = self.user_texts()
            if texts.encoder_id != released.encoder_id:
                raise PreconditionError(
                    f"{self.work.folder(self.base)} holds vectors of {released.encoder_id}, but texts about users were "
                    f"encoded by {texts.encoder_id}: encode both with one encoder"
                )
            position = {version: number for number, version in enumerate(texts.prompt_chars)}
            versions = np.load(texts.vectors)[[position[call.version] for call in history.versions]]
        return KnowledgeByMorning.of(
            month, data, history, ARMS[arm], released, raw.item.numpy(), versions, train_imputed=train_imputed
        )

    def user_texts(self) -> UserTexts:
        """The texts that `encode_user_texts` encoded."""
        folder = self.folder / USER_TEXTS
        about = json.loads((folder / "about.json").read_text())
        return UserTexts(about["encoder_id"], about["prompt_chars"], folder / "vectors.npy")


@lru_cache(maxsize=1)
def _month(folder: Path, content: str, share: float, days: int) -> tuple[Month, EncodedDataset]:
    """The month, kept for the next job of this process; `content` is the dataset folder's hash."""
    month = Month.of(Dataset.load(folder), share=share, days=days)
    return month, encode_dataset(month.dataset)


@lru_cache(maxsize=16)
def _history(folder: Path, content: str, share: float, days: int, arm: str, budget: int | None) -> SimulatedHistory:
    return simulate(_month(folder, content, share, days)[0], _kinds(arm), budget)


def _known_ratings(dataset: Dataset, call: Call) -> list[tuple[Entity, float]]:
    """The items and ratings that a text about a user may know, oldest first."""
    start = int(dataset.offsets[call.row])
    events = range(start, start + call.cutoff)
    return [(dataset.items[dataset.event_item[event]], float(dataset.event_rating[event])) for event in events]


def encode_user_texts(study: FreshnessStudy, make_encoder: Callable[[], TextEncoder]) -> StageResult:
    """Encode, as a stage, all versions of users' texts that some budget of some arm asks for."""
    histories: Iterable[SimulatedHistory] = {
        (variant.arm, variant.budget): study.history(variant.arm, variant.budget) for variant in variants(study.options)
    }.values()
    calls = {call.version: call for history in histories for call in history.versions}

    def build(draft: Path) -> dict[str, Any]:
        dataset, renderer, encoder = study.month()[0].dataset, read_renderer(study.work.prompts), make_encoder()
        prompt_chars = {}
        for version, call in calls.items():
            shown = _known_ratings(dataset, call)[-PROMPT_EVENTS:]
            items, ratings = [item for item, _ in shown], [rating for _, rating in shown]
            prompt_chars[version] = len(renderer.reasoning(dataset.users[call.row], items, ratings).prompt)
        texts = [preference_text(_known_ratings(dataset, call)) for call in calls.values()]
        np.save(draft / "vectors.npy", encoder.encode(texts))
        header = {"encoder_id": encoder.encoder_id, "prompt_chars": prompt_chars}
        (draft / "about.json").write_text(json.dumps(header) + "\n")
        return {"texts": len(texts)}

    inputs = {"dataset": study.work.dataset, "prompts": study.work.prompts}
    params = {"versions": sorted(calls)}
    return run_stage("user texts", study.folder / USER_TEXTS, build, inputs=inputs, params=params, version=VERSION)


class ReplayTask(NamedTuple):
    """A job with everything that a process needs to run it."""

    study: FreshnessStudy
    job: ReplayJob
    settings: TrainSettings
    """The seed is the job's."""


def run_replay(task: ReplayTask, notify: Callable[[tuple[ReplayJob, int]], None]) -> StageResult:
    """Train one job and score the month with it, as a stage; `notify` gets each epoch's number, and 0 at the end."""
    study, job, settings = task.study, task.job, replace(task.settings, seed=task.job.seed)

    def build(draft: Path) -> dict[str, Any]:
        knowledge = study.knowledge(job.arm, job.budget, train_imputed=job.train_imputed)
        month, data = knowledge.month, knowledge.data
        train, held_out = (knowledge.samples(month.dataset.samples(split)) for split in (TRAIN, VALIDATION))
        learned = knowledge.training_inputs(train)
        fitted = fit(
            partial(new_model, Run(study.options.model, job.arm), data, learned, settings),
            Batches(data, train, learned),
            Batches(data, held_out, learned),
            settings,
            folder=draft,
            on_epoch=lambda epoch: notify((job, epoch.number)),
        )
        events = month.dataset.samples(TEST)
        for imputation in job.imputations:
            scores = np.empty(len(events), np.float32)
            for day in np.unique(month.event_day[events]).tolist():
                today = month.event_day[events] == day
                inputs = knowledge.inputs(day, learned, impute=imputation != NEVER_IMPUTED)
                feed = Batches(data, knowledge.samples(events[today]), inputs)
                scores[today] = torch.sigmoid(predict_logits(fitted.model, feed)).numpy()
            np.save(draft / f"predictions_{imputation}.npy", scores)
        (draft / STATE).unlink()
        return {"validation_loss": fitted.best.validation_loss, "best_epoch": fitted.best.number}

    inputs = {"dataset": study.work.dataset, "encoding": study.work.folder(study.base)}
    if study.reads_users(job.arm):
        inputs[USER_TEXTS] = study.folder / USER_TEXTS
    # Names as in work folders of earlier versions.
    params = {"model": study.options.model, "arm": job.arm, "budget": job.budget, "loans": job.imputations}
    params |= {"seed": job.seed, **settings.to_json()}
    name = f"{study.options.model} {job.arm}"
    result = run_stage(name, study.job_folder(job), build, inputs=inputs, params=params, version=VERSION)
    notify((job, 0))
    return result
