"""Owns the study of collective knowledge: what fewer calls to a language model cost in quality.

The texts of released knowledge stand in for the language model: for each share of the calls
`kar_offline.generate.collective` plans who is asked about and who borrows, by the vectors of raw texts. Who has a
prompt of its own has its released text; the text about a cluster is the released one about its medoid. Models are then
trained and tested as `kar bench quality` does.

<work>/collective/<way>_<share>_seed<s>/    an encodings folder with the lent vectors
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kar_bench.studies.quality_runs import Job, Protocol, run_job, split_dataset
from kar_kernels.benchmark.machine import machine
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.splits import TEST
from kar_offline.evaluate.metrics import auc, bootstrap_weights, gauc, interval, logloss, resampled_auc
from kar_offline.generate.collective import HEAD, CallPlan, event_counts, plan_calls
from kar_offline.knowledge.imputation import NEIGHBOURS, mean_of_neighbours
from kar_offline.prompts import read_prompts
from kar_offline.stage_runner import run_stage
from kar_offline.train.processes import in_processes
from kar_offline.train.settings import TrainSettings
from kar_offline.work_folder import WorkFolder
from kar_sidecar.content_hash import file_sha256
from kar_sidecar.entities import EntityKind

__all__ = ["OWN", "WAYS", "Line", "Options", "lend_texts", "lines", "measure_collective"]

OWN: Final = "own"
WAYS: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "nearest": {"head": 0.0, "neighbours": 1},
        "clusters": {"head": 0.0, "neighbours": NEIGHBOURS},
        "head": {"head": HEAD, "neighbours": NEIGHBOURS},
    }
)
"""How calls are shared: each borrows from its own cluster, from the nearest ones, or from these and frequent items."""
ALONE: Final = ("control", "raw_text")
"""Arms that read no knowledge."""


@dataclass(frozen=True, slots=True)
class Options:
    """What is compared."""

    arms: Sequence[str] = ("knowledge", "both_texts")
    """Arms that read knowledge: the first with each way to share calls, the others with the default one."""
    shares: Sequence[float] = (0.3, 0.1, 0.03)
    """Calls by entities; everybody's own text is measured in any case."""
    model: str = "dcnv2"
    folds: int = 5
    seeds: Sequence[int] = (0,)
    """Of training and of k-means."""


class Line(NamedTuple):
    """One line of the table: an arm, and where its knowledge comes from."""

    arm: str
    share: float
    """Calls by entities; 0 for arms that read no knowledge."""
    way: str
    """A name of `WAYS`, or `OWN` where nobody borrows."""

    def encodings(self, base: str, seed: int) -> str:
        """The folder with its vectors, below the work folder."""
        return base if self.way == OWN else f"collective/{self.way}_{self.share:g}_seed{seed}"


def lines(options: Options) -> list[Line]:
    """What is measured: arms to compare with, then each arm with all calls and with fewer."""
    found = [Line(arm, 0.0, OWN) for arm in ALONE]
    for number, arm in enumerate(options.arms):
        found.append(Line(arm, 1.0, OWN))
        found += [Line(arm, share, way) for way in list(WAYS)[-1 if number else 0 :] for share in options.shares]
    return found


def lend_texts(work: WorkFolder, base: str, line: Line, seed: int) -> Mapping[str, int]:
    """Write the encodings folder of a line as a stage, and return how many calls each kind of entity takes."""

    def build(draft: Path) -> dict[str, Any]:
        counts = event_counts(work.read(Dataset))
        calls: dict[str, int] = {}
        for kind in EntityKind:
            prompts = {prompt.id: prompt.raw_text for prompt in read_prompts(work.prompts) if prompt.entity == kind}
            header = json.loads((work.root / base / f"knowledge_{kind}.json").read_text())
            raw, own = (np.load(work.root / base / f"{source}_{kind}.npy") for source in ("raw", "knowledge"))
            ids, lent = header["ids"], set(header.pop("lent", ()))
            own[np.isin(ids, list(lent))] = 0
            digests = zip(ids, header["text_sha256"], strict=True)
            header["text_sha256"] = [None if id_ in lent else digest for id_, digest in digests]
            texts = [prompts.get(id_, "") for id_ in ids]
            found = plan_calls(ids, texts, raw, line.share, counts=counts[kind], seed=seed, **WAYS[line.way])
            np.save(draft / f"knowledge_{kind}.npy", _lent(found, ids, own))
            (draft / f"knowledge_{kind}.json").write_text(json.dumps(header))
            for suffix in ("npy", "json"):
                shutil.copyfile(work.root / base / f"raw_{kind}.{suffix}", draft / f"raw_{kind}.{suffix}")
            calls[kind] = found.calls
        return calls

    params = {"share": line.share, "seed": seed, **WAYS[line.way]}
    inputs = {"dataset": work.dataset, "encoding": work.root / base, "prompts": work.prompts}
    folder = work.root / line.encodings(base, seed)
    return run_stage(f"lend {folder.name}", folder, build, inputs=inputs, params=params, version=2).report


def _lent(found: CallPlan, ids: Sequence[str], own: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors [n, D] as the stage `encode` would make them: medoids' own ones [n, D] stand for their clusters'."""
    row_of = dict(zip(ids, range(len(ids)), strict=True)) | {id_: int(rows[0]) for id_, rows in found.clusters.items()}
    vectors = mean_of_neighbours(
        own[np.array([row_of[id_] for id_ in found.record_ids])[found.neighbours]], found.weights
    )
    vectors[found.own] = own[found.own]
    return vectors


class _Scored(NamedTuple):
    """What a line scores on one fold with one seed."""

    auc: float
    logloss: float
    gauc: float
    resampled: NDArray[np.float64]
    """AUC [resamples] under the bootstrap's weights."""


def measure_collective(
    work: WorkFolder,
    base: str,
    options: Options,
    settings: TrainSettings,
    *,
    workers: int,
    resamples: int = 1000,
    on_epoch: Callable[[Job, int, int, int], None] = lambda job, epoch, done, total: None,
) -> dict[str, Any]:
    """Train what is missing and report on every line.

    Args:
        work: Holds `dataset`, `prompts` and the vectors.
        base: Folder in `work` with everybody's own vectors.
        options: What is compared.
        settings: Of training; the seed is the options'.
        workers: Processes side by side, one thread each; 0: this one.
        resamples: Of the bootstrap over users.
        on_epoch: Hears of epochs, 0 when a training is done, with how many trainings are done and how many there are.

    Returns:
        A report with `rows` (one a training), `summary` (one a line: `item_calls`, mean metrics and differences in AUC
        `minus` the control, raw text and the same arm with all calls, with 95 % intervals from a paired bootstrap
        over users) and `machine`.
    """
    protocol = Protocol("user", options.folds)
    chosen = lines(options)
    calls = {
        (line, seed): lend_texts(work, base, line, seed) for line in chosen for seed in options.seeds if line.way != OWN
    }
    todo = [
        (line, Job(options.model, line.arm, fold, seed))
        for fold in range(options.folds)
        for seed in options.seeds
        for line in chosen
    ]
    tasks = [(work, protocol, line.encodings(base, job.seed), job, settings) for line, job in todo]
    done = 0

    def hear(notice: tuple[Job, int]) -> None:
        nonlocal done
        job, epoch = notice
        done += epoch == 0
        on_epoch(job, epoch, done, len(tasks))

    in_processes(run_job, tasks, workers, hear)

    dataset = work.read(Dataset)
    scored: dict[Line, list[_Scored]] = {line: [] for line in chosen}
    rows, users = [], 0
    for fold in range(options.folds):
        split = split_dataset(dataset, protocol, fold)
        events = split.samples(TEST)
        labels, of = split.labels[events], split.event_user[events]
        weights = bootstrap_weights(len(np.unique(of)), seed=fold, resamples=resamples)
        users += weights.shape[1]
        for line, job in ((line, job) for line, job in todo if job.fold == fold):
            file = job.folder(work, protocol, line.encodings(base, job.seed)) / "predictions.npy"
            scores = np.load(file, allow_pickle=False)
            found = _Scored(
                auc(labels, scores),
                logloss(labels, scores),
                gauc(labels, scores, of),
                resampled_auc(labels, scores, of, weights),
            )
            scored[line].append(found)
            row = {**line._asdict(), "fold": fold, "seed": job.seed, "predictions_sha256": file_sha256(file)}
            rows.append(row | {name: getattr(found, name) for name in ("auc", "logloss", "gauc")})
    return {
        "dataset": dataset.name,
        "model": options.model,
        "folds": options.folds,
        "seeds": list(options.seeds),
        "test_users": users,
        "entities": {"item": len(dataset.items), "user": len(dataset.users)},
        "rows": rows,
        "summary": list(_summary(scored, calls, len(dataset.items))),
        "machine": machine(),
    }


def _summary(
    scored: Mapping[Line, Sequence[_Scored]], calls: Mapping[tuple[Line, int], Mapping[str, int]], items: int
) -> Iterator[dict[str, Any]]:
    for line, ours in scored.items():
        taken = [found["item"] for (of, _), found in calls.items() if of == line]
        others = {arm: Line(arm, 0.0, OWN) for arm in ALONE} | {"all_calls": Line(line.arm, 1.0, OWN)}
        minus = {}
        for name, other in others.items():
            if line not in (other, others["control"]) and other in scored:
                pairs = list(zip(ours, scored[other], strict=True))
                mean = float(np.mean([a.auc - b.auc for a, b in pairs]))
                minus[name] = asdict(interval(mean, np.mean([a.resampled - b.resampled for a, b in pairs], 0)))
        yield {
            **line._asdict(),
            "item_calls": float(np.mean(taken)) if taken else items * line.share,
            **{name: float(np.mean([getattr(one, name) for one in ours])) for name in ("auc", "logloss", "gauc")},
            "minus": minus,
        }
