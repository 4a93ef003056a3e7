"""Owns the comparison with asking a language model to rank: the same lists, its orders and the time it takes.

This is the way of ChatRec (Gao et al., arXiv 2303.14524), with a model small enough to run anywhere: a toy, which
tells what the request path costs, not what large models can do.
"""

import asyncio
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from kar_bench.studies.quality_runs import Protocol, split_dataset
from kar_kernels.benchmark.machine import machine
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.rerank_lists import LIST_LENGTH, rerank_lists
from kar_offline.dataset.splits import TEST
from kar_offline.evaluate.ranking import average_precision, hit, ndcg
from kar_offline.generate.provider import Failure, PendingBatch, Provider, Question
from kar_offline.prompts.rendering import Renderer
from kar_offline.prompts.scenario import load_scenario
from kar_offline.prompts.untrusted import quoted
from kar_offline.train.batches import Batches
from kar_offline.train.features import encode_dataset
from kar_offline.train.fit import Epoch
from kar_offline.train.predict import knowledge_vectors, predict_logits
from kar_offline.train.run import Run, train_run
from kar_offline.train.samples import lists_of_split
from kar_offline.train.settings import TrainSettings
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import USER

__all__ = ["ARMS_BESIDE", "Lists", "measure_direct", "read_order"]

SHOWN: Final = 10
"""Rated items that the model is told of, the last ones."""
ARMS_BESIDE: Final = ("control", "knowledge")


def read_order(text: str, candidates: int) -> tuple[list[int], bool]:
    """The order that an answer names by the numbers 1 to `candidates`, and whether it named all.

    What it does not name follows, as it was shown.
    """
    named = (int(number) - 1 for number in re.findall(r"(?<!\d)\d{1,3}(?!\d)", text))
    order = list(dict.fromkeys(number for number in named if 0 <= number < candidates))
    return order + [number for number in range(candidates) if number not in order], len(order) == candidates


@dataclass(frozen=True, slots=True)
class Lists:
    """The first list of each of some test users: labels [n, 10], prompts, and the lists' numbers among all."""

    labels: NDArray[np.float32]
    prompts: list[str]
    numbers: list[int]

    @staticmethod
    def of(dataset: Dataset, users: int) -> "Lists":
        """Take the first `users` test users that have a list with a positive item, in dataset order."""
        lists = rerank_lists(dataset, TEST, seed=0)
        renderer = Renderer(load_scenario())
        owner = dataset.event_user[lists.event[:, 0]]
        positive = np.flatnonzero(lists.label.any(1))
        numbers = positive[np.unique(owner[positive], return_index=True)[1]][:users].tolist()
        prompts = [_prompt(dataset, renderer, int(lists.event[n, 0]), lists.item[n].tolist()) for n in numbers]
        return Lists(lists.label[numbers], prompts, numbers)


def _prompt(dataset: Dataset, renderer: Renderer, event: int, candidates: Sequence[int]) -> str:
    before, ratings = dataset.history_windows(np.array([event]), SHOWN)
    rated = [
        f"- {quoted(renderer.title(dataset.items[item]))}: {rating:g}"
        for item, rating in zip(before[0].tolist(), ratings[0].tolist(), strict=True)
        if item >= 0
    ]
    shown = [f"{n}. {quoted(renderer.title(dataset.items[item]))}" for n, item in enumerate(candidates, 1)]
    return "\n".join(
        [
            f"A user rated, with {renderer.scenario.words.ratings}:",
            *rated,
            "Candidates:",
            *shown,
            f"Rank all {len(shown)} candidates for this user, best first. Answer with numbers only, like 3, 1, 2.",
        ]
    )


def _metrics(labels: NDArray[np.float32], scores: NDArray[np.floating]) -> dict[str, float]:
    whole = labels.shape[1]
    return {
        "map": float(average_precision(labels, scores, whole).mean()),
        "ndcg": float(ndcg(labels, scores, whole).mean()),
        "hits_at_1": float(hit(labels, scores, 1).mean()),
    }


def _latency(seconds: Sequence[float]) -> dict[str, float]:
    return {
        "p50_ms": statistics.median(seconds) * 1e3,
        "p99_ms": float(np.percentile(seconds, 99)) * 1e3,
    }


class _Unnoted:
    """A log that keeps nothing: the model is asked anew in each measurement."""

    def sending(self, questions: Sequence[Question], handle: str = "") -> None:
        pass

    def pending_batches(self) -> Sequence[PendingBatch]:
        return ()


async def _ask(llm: Provider, prompts: Sequence[str], on_answer: Callable[[], None]) -> list[tuple[str, float]]:
    answers = []
    async with llm:
        for number, prompt in enumerate(prompts):
            began = time.perf_counter()
            async for _, outcome in llm.ask([Question(USER, str(number), prompt, "")], _Unnoted()):
                text = "" if isinstance(outcome, Failure) else outcome.text
                answers.append((text, time.perf_counter() - began))
            on_answer()
    return answers


def measure_direct(
    work: WorkFolder,
    encodings: Path,
    llm: Provider,
    *,
    model: str = "prm",
    users: int = 50,
    settings: TrainSettings | None = None,
    on_answer: Callable[[], None] = lambda: None,
    on_epoch: Callable[[str, Epoch], None] = lambda arm, epoch: None,
) -> dict[str, Any]:
    """Rank the lists of fold 0 with the language model, in random order, and with a reranker trained for it.

    `rows` of the report has `{ranker, map, ndcg, hits_at_1, p50_ms, p99_ms}`, for the language model also `complete`,
    the share of its answers that named every candidate. Each list is one request, one at a time; ours are scored on
    one thread from prestored vectors, affinities computed on the way.

    Raises:
        PreconditionError: the dataset or the encodings are missing.
        UnavailableError: the language model does not answer.
    """
    dataset = split_dataset(work.read(Dataset), Protocol(), 0)
    lists = Lists.of(dataset, users)
    answers = asyncio.run(_ask(llm, lists.prompts, on_answer))
    orders = [read_order(text, LIST_LENGTH) for text, _ in answers]
    said = np.array([[-order.index(n) for n in range(LIST_LENGTH)] for order, _ in orders], np.float64)
    shuffled = np.random.default_rng(0).permuted(np.tile(np.arange(LIST_LENGTH), (len(lists.numbers), 1)), axis=1)
    rows: list[dict[str, Any]] = [
        {
            "ranker": llm.model,
            **_metrics(lists.labels, said),
            **_latency([seconds for _, seconds in answers]),
            "complete": float(np.mean([complete for _, complete in orders])),
        },
        {"ranker": "random order", **_metrics(lists.labels, shuffled)},
    ]
    data = encode_dataset(dataset)
    samples = lists_of_split(data, TEST, seed=0)
    settings = settings or TrainSettings()
    for arm in ARMS_BESIDE:
        with tempfile.TemporaryDirectory() as folder:
            trained = train_run(
                data,
                encodings,
                Run(model, arm),
                settings,
                folder=Path(folder),
                on_epoch=lambda epoch, arm=arm: on_epoch(arm, epoch),  # type: ignore[misc]
            )
        tables = knowledge_vectors(trained.model.eval(), trained.knowledge_inputs)
        scores, seconds = [], []
        for number in lists.numbers:
            at = torch.arange(number * LIST_LENGTH, (number + 1) * LIST_LENGTH)
            began = time.perf_counter()
            scores.append(
                predict_logits(trained.model, Batches(data, samples.rows(at), trained.knowledge_inputs), tables).numpy()
            )
            seconds.append(time.perf_counter() - began)
        rows.append({"ranker": f"{model} {arm}", **_metrics(lists.labels, np.stack(scores)), **_latency(seconds)})
    return {"dataset": dataset.name, "lists": len(lists.numbers), "rows": rows, "machine": machine()}
