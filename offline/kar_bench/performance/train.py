"""Owns the training benchmark: samples a second of our trainer, of a per-sample loop and of FuxiCTR, in one run.

Everything runs on one thread. Implementations take turns in rounds, so that what slows the machine slows them alike;
the first round warms up and does not count.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from kar_bench.performance.fuxictr_process import FuxiCTR, Loader, install, write_task
from kar_bench.performance.per_sample import score_seconds, train_seconds
from kar_bench.studies.quality_runs import Protocol, split_dataset
from kar_kernels.benchmark.machine import machine, others_busy
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.splits import TEST, TRAIN
from kar_offline.evaluate.metrics import auc
from kar_offline.train.arms import ARMS
from kar_offline.train.batches import Batches
from kar_offline.train.features import EncodedDataset, encode_dataset
from kar_offline.train.fit import fit
from kar_offline.train.knowledge_inputs import KnowledgeInputs
from kar_offline.train.predict import predict_logits
from kar_offline.train.run import Run, new_model, train_run
from kar_offline.train.samples import samples_of_split
from kar_offline.train.settings import TrainSettings
from kar_offline.work_folder import WorkFolder

__all__ = ["Options", "measure_training"]

SHARED_ARMS: Final = ("control", "knowledge", "paper")
EVALUATION_BATCH: Final = 2048
SLOW_ROWS: Final = 2_048
"""Rows of a turn of the per-sample loop."""
LOADERS: Final[dict[str, Loader]] = {"fuxictr": "npz", "fuxictr_in_memory": "memory"}


@dataclass(frozen=True, slots=True)
class Options:
    """What the benchmark runs."""

    models: Sequence[str] = ("dcnv2", "din")
    rows: int = 16_384
    """Of a turn."""
    rounds: int = 5
    """That count."""
    fuxictr: Path | None = None
    """Folder of FuxiCTR's environment, made if missing; None leaves it out."""
    fit: bool = True
    """Also train our control and FuxiCTR to the end on every fold, for their AUC."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One implementation of one phase; `turn` returns the seconds that `rows` rows took."""

    model: str
    arm: str
    implementation: str
    phase: str
    rows: int
    turn: Callable[[], float]


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


class _Ours:
    """Our trainer on the first rows of the training split, with one model and arm."""

    def __init__(self, data: EncodedDataset, encodings: Path, run: Run, options: Options) -> None:
        self.run, self.data, self.settings = run, data, TrainSettings(epochs=1)
        every = samples_of_split(data, TRAIN)
        order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
        self.rows = every.rows(order[: options.rows])
        self.given = KnowledgeInputs.for_training(ARMS[run.arm], data, every, encodings, seed=0)
        self.feed = Batches(data, self.rows, self.given)
        few = torch.arange(min(SLOW_ROWS, options.rows))
        self.slow = Batches(data, self.rows.rows(few), self.given)
        self.one = Batches(data, self.rows.rows(few[:1]), self.given)

    def model(self) -> Any:
        """A new model."""
        return new_model(self.run, self.data, self.given, self.settings)

    def train(self) -> float:
        """Seconds of an epoch of `fit`, its checkpoint included."""
        with tempfile.TemporaryDirectory() as folder:
            work = partial(fit, self.model, self.feed, self.one, self.settings)
            return _timed(lambda: work(folder=Path(folder), on_epoch=lambda epoch: None))

    def score(self) -> float:
        """Seconds to score the rows; affinities are computed on the way."""
        model = self.model()
        return _timed(lambda: predict_logits(model, Batches(self.data, self.rows, self.given)))

    def contenders(self) -> Iterator[Contender]:
        """Our turns and those of the per-sample loop."""
        model, arm = self.run.backbone, self.run.arm
        yield Contender(model, arm, "ours", "train", len(self.feed), self.train)
        yield Contender(model, arm, "ours", "score", len(self.feed), self.score)
        slow = len(self.slow)
        yield Contender(
            model, arm, "per_sample", "train", slow, lambda: train_seconds(self.model(), self.slow, self.settings)
        )
        yield Contender(
            model, arm, "per_sample", "score", slow, lambda: score_seconds(self.model(), self.slow, EVALUATION_BATCH)[0]
        )


def _fit_ours(data: EncodedDataset, encodings: Path, model: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        trained = train_run(data, encodings, Run(model, "control"), TrainSettings(), folder=Path(folder))
    test = samples_of_split(data, TEST)
    scores = predict_logits(trained.model, Batches(data, test, trained.knowledge_inputs))
    return {"auc": auc(test.label.numpy(), scores.numpy()), "epochs": len(trained.fitted.epochs)}


def _fit_all(
    dataset: Dataset, encodings: Path, options: Options, on_turn: Callable[[str, int, int], None]
) -> Iterator[dict[str, Any]]:
    """What training to the end gives: our control and FuxiCTR on each fold of users."""
    protocol = Protocol()
    turns = protocol.folds * len(options.models)
    for fold in range(protocol.folds):
        data = encode_dataset(split_dataset(dataset, protocol, fold))
        with ExitStack() as stack:
            peer: FuxiCTR | None = None
            if options.fuxictr is not None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                write_task(folder, data, TrainSettings())
                peer = stack.enter_context(FuxiCTR(options.fuxictr, folder))
            for number, model in enumerate(options.models, fold * len(options.models)):
                on_turn(f"{model}, fold {fold}, to the end", number, turns)
                told = {"model": model, "fold": fold}
                yield {**told, "implementation": "ours", **_fit_ours(data, encodings, model)}
                if peer:
                    answer = peer.ask("fit", model, "memory", TrainSettings().epochs)
                    yield {**told, "implementation": "fuxictr", **answer}


def measure_training(
    work: WorkFolder, encodings: Path, options: Options, *, on_turn: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Time all implementations on fold 0 of `work`/dataset.

    `rows` of the report has `{model, arm, implementation, phase, samples_per_s, low, high}` with the median and the
    extremes over rounds; `ratios` what the product promises; `auc` has `{model, fold, implementation, auc, epochs}` of
    our control and of FuxiCTR, trained to the end.
    `on_turn` hears of a turn that is about to start, its number and the number of all.

    Raises:
        PreconditionError: the dataset or the encodings are missing.
        UnavailableError: FuxiCTR cannot be installed or broke down.
    """
    dataset = work.read(Dataset)
    data = encode_dataset(split_dataset(dataset, Protocol(), 0))
    busy = others_busy()
    versions = {"torch": str(torch.__version__)}
    with ExitStack() as stack:
        contenders = [
            contender
            for model in options.models
            for arm in SHARED_ARMS
            for contender in _Ours(data, encodings, Run(model, arm), options).contenders()
        ]
        if options.fuxictr is not None:
            on_turn("install FuxiCTR", 0, 0)
            versions["fuxictr"] = install(options.fuxictr)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_task(folder, data, TrainSettings())
            peer = stack.enter_context(FuxiCTR(options.fuxictr, folder))
            contenders += _fuxictr(peer, options)
            contenders.sort(key=lambda contender: options.models.index(contender.model))
        seconds: dict[int, list[float]] = {number: [] for number in range(len(contenders))}
        turns = (options.rounds + 1) * len(contenders)
        for turn in range(turns):
            number = turn % len(contenders)
            contender = contenders[number]
            name = f"{contender.model} {contender.arm}, {contender.implementation}, {contender.phase}"
            on_turn(name, turn, turns)
            taken = contender.turn()
            if turn >= len(contenders):
                seconds[number].append(taken)
        busy_after = others_busy()
    rows = [_row(contender, seconds[number]) for number, contender in enumerate(contenders)]
    return {
        "dataset": data.dataset.name,
        "rows": rows,
        "ratios": _ratios(rows, options.models),
        "auc": list(_fit_all(dataset, encodings, options, on_turn)) if options.fit else [],
        "others_busy_cores": {"before": busy, "after": busy_after},
        "versions": versions,
        "machine": machine(),
    }


def _fuxictr(peer: FuxiCTR, options: Options) -> Iterator[Contender]:
    """FuxiCTR's turns: without knowledge, through its own loader and on batches cut from memory."""
    for model in options.models:
        for name, loader in LOADERS.items():
            for phase in ("train", "score"):
                turn = partial(peer.seconds, phase, model, loader, options.rows)
                yield Contender(model, "control", name, phase, options.rows, turn)


def _row(contender: Contender, seconds: Sequence[float]) -> dict[str, Any]:
    rates = sorted(contender.rows / taken for taken in seconds)
    return {
        "model": contender.model,
        "arm": contender.arm,
        "implementation": contender.implementation,
        "phase": contender.phase,
        "samples_per_s": statistics.median(rates),
        "low": rates[0],
        "high": rates[-1],
    }


def _ratios(rows: Sequence[dict[str, Any]], models: Sequence[str]) -> list[dict[str, Any]]:
    """What knowledge costs, and how much faster we are than the others, of each model and phase."""
    rate = {(r["model"], r["arm"], r["implementation"], r["phase"]): r["samples_per_s"] for r in rows}
    found = []
    for model in models:
        for phase in ("train", "score"):
            ours = {arm: rate[model, arm, "ours", phase] for arm in SHARED_ARMS}
            ratios = {
                "knowledge_costs": ours["control"] / ours["knowledge"],
                "paper_costs": ours["control"] / ours["paper"],
                **{f"per_sample_{arm}": ours[arm] / rate[model, arm, "per_sample", phase] for arm in SHARED_ARMS},
            }
            for name in LOADERS:
                if (key := (model, "control", name, phase)) in rate:
                    ratios[name] = ours["control"] / rate[key]
            found.append({"model": model, "phase": phase, **ratios})
    return found
