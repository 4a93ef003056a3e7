"""Owns the measurement of training speed: samples a second of all implementations, in turns, on one thread.

The ratios say how much longer training takes with knowledge, and how much faster our trainer is than the others. On
request the control is also trained to the end by our trainer and by FuxiCTR, to compare their AUC.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Group

from kar_bench.harness import BusyCores, OnStep, Spread, busy_cores_now, machine, new_table, notes, take_turns
from kar_bench.performance.train.contenders import FUXICTR_LOADERS, PHASES, Contender, OurTrainer, fuxictr_contenders
from kar_bench.performance.train.fuxictr_process import FuxiCTR, install, write_task
from kar_bench.splits import SplitProtocol, split_dataset
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.splits import TEST
from kar_offline.evaluate.metrics import auc
from kar_offline.train.batches import Batches
from kar_offline.train.features import EncodedDataset, encode_dataset
from kar_offline.train.predict import predict_logits
from kar_offline.train.run import Run, train_run
from kar_offline.train.samples import samples_of_split
from kar_offline.train.settings import TrainSettings
from kar_offline.work_folder import WorkFolder

__all__ = ["TrainBenchmarkOptions", "TrainReport", "measure_training", "training_table"]

ARMS_COMPARED: Final = ("control", "knowledge", "paper")


@dataclass(frozen=True, slots=True)
class TrainBenchmarkOptions:
    """What is trained, how long a turn is, and what it is compared with."""

    models: Sequence[str] = ("dcnv2", "din")
    rows: int = 16_384
    """Samples in a turn."""
    rounds: int = 5
    """Rounds that count; one more warms up."""
    fuxictr: Path | None = None
    """Folder of FuxiCTR's environment, made if missing; None: do not compare with FuxiCTR."""
    fit: bool = True
    """Also train the control to the end on every fold, for its AUC."""


@dataclass(frozen=True, slots=True)
class SpeedRow:
    """Samples a second of one implementation: median, slowest and fastest round."""

    model: str
    arm: str
    implementation: str
    phase: str
    samples_per_s: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class SpeedRatios:
    """Ratios of rates for one model and phase, by name.

    "knowledge_costs" and "paper_costs" are the control's rate by the arm's; "per_sample_ARM", "fuxictr" and
    "fuxictr_in_memory" are our rate by that of the other implementation.
    """

    model: str
    phase: str
    values: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Names of ratios are keys beside the model and the phase."""
        return {"model": self.model, "phase": self.phase, **self.values}


@dataclass(frozen=True, slots=True)
class FittedAuc:
    """Test AUC on one fold of the control trained to the end."""

    model: str
    fold: int
    implementation: str
    auc: float
    epochs: int


@dataclass(frozen=True, slots=True)
class TrainReport:
    """All rates, their ratios, and AUC of the fitted controls."""

    dataset: str
    rows: Sequence[SpeedRow]
    ratios: Sequence[SpeedRatios]
    auc: Sequence[FittedAuc]
    others_busy_cores: BusyCores
    versions: Mapping[str, str]
    machine: str


def measure_training(
    work: WorkFolder,
    encodings: Path,
    options: TrainBenchmarkOptions,
    *,
    on_turn: OnStep,
    busy_cores: Callable[[], float] = busy_cores_now,
) -> TrainReport:
    """Time all implementations on fold 0 of the dataset in `work`.

    Args:
        work: The work folder with the dataset.
        encodings: The folder with the texts' vectors.
        options: What is timed.
        on_turn: Called before each turn with its name, its number and the number of turns (None: unknown).
        busy_cores: Measures the cores that other processes keep busy.

    Raises:
        PreconditionError: the dataset or the encodings are missing.
        UnavailableError: FuxiCTR cannot be installed, or its process ended early.
    """
    dataset = work.read(Dataset)
    data = encode_dataset(split_dataset(dataset, SplitProtocol(), 0))
    busy_before = busy_cores()
    versions = {"torch": str(torch.__version__)}
    with ExitStack() as stack:
        contenders = [
            contender
            for model in options.models
            for arm in ARMS_COMPARED
            for contender in OurTrainer(data, encodings, Run(model, arm), options.rows).contenders()
        ]
        if options.fuxictr is not None:
            on_turn("install FuxiCTR", 0, None)
            versions["fuxictr"] = install(options.fuxictr)
            fuxictr = stack.enter_context(_fuxictr(options.fuxictr, data))
            contenders += fuxictr_contenders(fuxictr, options.models, options.rows)
            contenders.sort(key=lambda contender: options.models.index(contender.model))
        seconds = take_turns(
            [contender.turn for contender in contenders],
            options.rounds,
            lambda number, turn, turns: on_turn(contenders[number].name, turn, turns),
        )
        busy = BusyCores(busy_before, busy_cores())
    rows = [_row(contender, turns) for contender, turns in zip(contenders, seconds, strict=True)]
    return TrainReport(
        data.dataset.name,
        rows,
        _ratios(rows, options.models),
        list(_fit_all(dataset, encodings, options, on_turn)) if options.fit else [],
        busy,
        versions,
        machine(),
    )


@contextmanager
def _fuxictr(environment: Path, data: EncodedDataset) -> Iterator[FuxiCTR]:
    """FuxiCTR's process with the arrays of `data`."""
    with tempfile.TemporaryDirectory() as folder:
        write_task(Path(folder), data, TrainSettings())
        with FuxiCTR(environment, Path(folder)) as fuxictr:
            yield fuxictr


def _row(contender: Contender, seconds: Sequence[float]) -> SpeedRow:
    rate = Spread.of([contender.rows / turn_s for turn_s in seconds])
    return SpeedRow(contender.model, contender.arm, contender.implementation, contender.phase, *rate)


def _ratios(rows: Sequence[SpeedRow], models: Sequence[str]) -> list[SpeedRatios]:
    rate = {(row.model, row.arm, row.implementation, row.phase): row.samples_per_s for row in rows}
    ratios = []
    for model in models:
        for phase in PHASES:
            ours = {arm: rate[model, arm, "ours", phase] for arm in ARMS_COMPARED}
            values = {
                "knowledge_costs": ours["control"] / ours["knowledge"],
                "paper_costs": ours["control"] / ours["paper"],
                **{f"per_sample_{arm}": ours[arm] / rate[model, arm, "per_sample", phase] for arm in ARMS_COMPARED},
            }
            for name in FUXICTR_LOADERS:
                if (key := (model, "control", name, phase)) in rate:
                    values[name] = ours["control"] / rate[key]
            ratios.append(SpeedRatios(model, phase, values))
    return ratios


def _fit_all(dataset: Dataset, encodings: Path, options: TrainBenchmarkOptions, on_turn: OnStep) -> Iterator[FittedAuc]:
    """Train the control to the end on each fold of users, by our trainer and by FuxiCTR."""
    protocol = SplitProtocol()
    turns = protocol.folds * len(options.models)
    for fold in range(protocol.folds):
        data = encode_dataset(split_dataset(dataset, protocol, fold))
        with ExitStack() as stack:
            fuxictr = None if options.fuxictr is None else stack.enter_context(_fuxictr(options.fuxictr, data))
            for turn, model in enumerate(options.models, fold * len(options.models)):
                on_turn(f"{model}, fold {fold}, to the end", turn, turns)
                yield _fit_ours(data, encodings, model, fold)
                if fuxictr:
                    answer = fuxictr.ask("fit", model, "memory", TrainSettings().epochs)
                    yield FittedAuc(model, fold, "fuxictr", float(answer["auc"]), int(answer["epochs"]))


def _fit_ours(data: EncodedDataset, encodings: Path, model: str, fold: int) -> FittedAuc:
    with tempfile.TemporaryDirectory() as folder:
        trained = train_run(data, encodings, Run(model, "control"), TrainSettings(), folder=Path(folder))
    test = samples_of_split(data, TEST)
    scores = predict_logits(trained.model, Batches(data, test, trained.knowledge_inputs))
    return FittedAuc(model, fold, "ours", auc(test.label.numpy(), scores.numpy()), len(trained.fitted.epochs))


def training_table(report: TrainReport) -> Group:
    """Samples a second, ratios and AUC, ready to print."""
    title = f"{report.dataset}: thousand samples a second, one thread"
    table = new_table(title, ("model", "arm", "implementation"), PHASES)
    rates: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in report.rows:
        by_phase = rates.setdefault((row.model, row.arm, row.implementation), {})
        by_phase[row.phase] = f"{row.samples_per_s / 1e3:.1f} [{row.low / 1e3:.1f}, {row.high / 1e3:.1f}]"
    former = ""
    for (model, arm, implementation), by_phase in rates.items():
        if former not in ("", model):
            table.add_section()
        former = model
        table.add_row(model, arm, implementation, *(by_phase[phase] for phase in PHASES))
    lines = []
    for ratios in report.ratios:
        values = ", ".join(f"{name} {value:.2f}x" for name, value in ratios.values.items())
        lines.append(f"{ratios.model} {ratios.phase}: {values}")
    folds: dict[str, list[float]] = {}
    for fitted in report.auc:
        folds.setdefault(f"{fitted.model} {fitted.implementation}", []).append(fitted.auc)
    for name, aucs in folds.items():
        by_fold = ", ".join(f"{auc:.4f}" for auc in aucs)
        lines.append(f"{name}: test AUC {statistics.fmean(aucs):.4f} (by fold: {by_fold})")
    return Group(table, *notes(lines + report.others_busy_cores.warnings()))
