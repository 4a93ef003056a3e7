"""Owns `kar bench direct`: a language model ranks the same lists as a trained reranker; quality and latency.

This is the method of ChatRec (Gao et al., arXiv 2303.14524) with a model that is small enough to run anywhere. It shows
the cost of asking a language model in the path of a request, not the quality of large models.
"""

import asyncio
import dataclasses
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Final

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console, Group

from kar_bench.harness import OMIT_IF_NONE, OnStep, finish, machine, new_table, notes, progress, show_nothing
from kar_bench.preparation import QUALITY_WORK, prepare
from kar_bench.splits import SplitProtocol, split_dataset
from kar_offline.cli_options import JsonFile, Work
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.rerank_lists import LIST_LENGTH, rerank_lists
from kar_offline.dataset.splits import TEST
from kar_offline.evaluate.ranking import average_precision, hit, ndcg
from kar_offline.generate.llama_cpp import LocalChat
from kar_offline.generate.provider import Failure, PendingBatch, Provider, Question
from kar_offline.models import RERANKERS
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
from kar_sidecar.errors import InputError

__all__ = [
    "Lists",
    "LlmRerankingOptions",
    "LlmRerankingReport",
    "direct",
    "direct_table",
    "measure_direct",
    "read_order",
]

HISTORY_SHOWN: Final = 10
"""Rated items that the prompt shows, the latest ones."""
ARMS: Final = ("control", "knowledge")
"""Arms of the trained reranker."""
ANSWER: Final = {"temperature": 0.0, "max_tokens": 60, "seed": 1}


@dataclass(frozen=True, slots=True)
class LlmRerankingOptions:
    """Which reranker stands beside the language model, and on how many lists."""

    model: str = "prm"
    users: int = 50
    """Test users, with one list of ten each."""


@dataclass(frozen=True, slots=True)
class RankerRow:
    """One ranker on all lists; no latency for the random order."""

    ranker: str
    map: float
    ndcg: float
    hits_at_1: float
    p50_ms: float | None = dataclasses.field(default=None, metadata=OMIT_IF_NONE)
    p99_ms: float | None = dataclasses.field(default=None, metadata=OMIT_IF_NONE)
    complete: float | None = dataclasses.field(default=None, metadata=OMIT_IF_NONE)
    """Language model: share of the answers that named every candidate."""


@dataclass(frozen=True, slots=True)
class LlmRerankingReport:
    """The language model, a random order and the trained reranker on the same lists."""

    dataset: str
    lists: int
    rows: Sequence[RankerRow]
    machine: str


def read_order(text: str, candidates: int) -> tuple[list[int], bool]:
    """The order that an answer gives by the numbers 1 to `candidates`, and whether it named all of them.

    Candidates that it does not name follow in the order in which they were shown.
    """
    numbers = (int(number) - 1 for number in re.findall(r"(?<!\d)\d{1,3}(?!\d)", text))
    named = list(dict.fromkeys(number for number in numbers if 0 <= number < candidates))
    return named + [number for number in range(candidates) if number not in named], len(named) == candidates


@dataclass(frozen=True, slots=True)
class Lists:
    """The first list of each of some test users."""

    labels: NDArray[np.float32]
    """[n, 10]"""
    prompts: list[str]
    numbers: list[int]
    """Position of each list among all test lists."""

    @staticmethod
    def of(dataset: Dataset, users: int) -> "Lists":
        """Take the first `users` test users that have a list with a positive item, in the dataset's order."""
        lists = rerank_lists(dataset, TEST, seed=0)
        renderer = Renderer(load_scenario())
        owner = dataset.event_user[lists.event[:, 0]]
        positive = np.flatnonzero(lists.label.any(1))
        numbers = positive[np.unique(owner[positive], return_index=True)[1]][:users].tolist()
        prompts = [_prompt(dataset, renderer, int(lists.event[n, 0]), lists.item[n].tolist()) for n in numbers]
        return Lists(lists.label[numbers], prompts, numbers)


def _prompt(dataset: Dataset, renderer: Renderer, event: int, candidates: Sequence[int]) -> str:
    history, ratings = dataset.history_windows(np.array([event]), HISTORY_SHOWN)
    rated = [
        f"- {quoted(renderer.title(dataset.items[item]))}: {rating:g}"
        for item, rating in zip(history[0].tolist(), ratings[0].tolist(), strict=True)
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


def _row(
    ranker: str,
    labels: NDArray[np.float32],
    scores: NDArray[np.floating],
    seconds: Sequence[float] = (),
    complete: float | None = None,
) -> RankerRow:
    length = labels.shape[1]
    return RankerRow(
        ranker,
        float(average_precision(labels, scores, length).mean()),
        float(ndcg(labels, scores, length).mean()),
        float(hit(labels, scores, 1).mean()),
        statistics.median(seconds) * 1e3 if seconds else None,
        float(np.percentile(seconds, 99)) * 1e3 if seconds else None,
        complete,
    )


class _NoLog:
    """A log that keeps nothing, so that the model is asked again in each measurement."""

    def sending(self, questions: Sequence[Question], handle: str = "") -> None:
        pass

    def pending_batches(self) -> Sequence[PendingBatch]:
        return ()


async def _ask(llm: Provider, prompts: Sequence[str], on_step: OnStep) -> list[tuple[str, float]]:
    """The text and the seconds of each answer, asked one after another."""
    answers = []
    async with llm:
        for number, prompt in enumerate(prompts):
            began = time.perf_counter()
            async for _, outcome in llm.ask([Question(USER, str(number), prompt, "")], _NoLog()):
                text = "" if isinstance(outcome, Failure) else outcome.text
                answers.append((text, time.perf_counter() - began))
            on_step(f"ask {llm.model}", number + 1, len(prompts))
    return answers


def measure_direct(
    work: WorkFolder,
    encodings: Path,
    llm: Provider,
    options: LlmRerankingOptions,
    *,
    settings: TrainSettings | None = None,
    on_step: OnStep = show_nothing,
) -> LlmRerankingReport:
    """Rank the lists of fold 0 with the language model, in random order, and with a reranker trained for it.

    Each list is one request, one at a time. The reranker scores on one thread, from prestored vectors; the time for
    affinities is included.

    Raises:
        PreconditionError: the dataset or the encodings are missing.
        UnavailableError: the language model does not answer.
    """
    dataset = split_dataset(work.read(Dataset), SplitProtocol(), 0)
    lists = Lists.of(dataset, options.users)
    answers = asyncio.run(_ask(llm, lists.prompts, on_step))
    orders = [read_order(text, LIST_LENGTH) for text, _ in answers]
    places = np.array([[-order.index(n) for n in range(LIST_LENGTH)] for order, _ in orders], np.float64)
    complete = float(np.mean([complete for _, complete in orders]))
    shuffled = np.random.default_rng(0).permuted(np.tile(np.arange(LIST_LENGTH), (len(lists.numbers), 1)), axis=1)
    rows = [
        _row(llm.model, lists.labels, places, [seconds for _, seconds in answers], complete),
        _row("random order", lists.labels, shuffled),
    ]
    data = encode_dataset(dataset)
    samples = lists_of_split(data, TEST, seed=0)
    for arm in ARMS:
        with tempfile.TemporaryDirectory() as folder:
            trained = train_run(
                data,
                encodings,
                Run(options.model, arm),
                settings or TrainSettings(),
                folder=Path(folder),
                on_epoch=partial(_show_epoch, on_step, f"{options.model} {arm}"),
            )
        vectors = knowledge_vectors(trained.model.eval(), trained.knowledge_inputs)
        scores, seconds = [], []
        for number in lists.numbers:
            candidates = samples.rows(torch.arange(number * LIST_LENGTH, (number + 1) * LIST_LENGTH))
            began = time.perf_counter()
            feed = Batches(data, candidates, trained.knowledge_inputs)
            scores.append(predict_logits(trained.model, feed, vectors).numpy())
            seconds.append(time.perf_counter() - began)
        rows.append(_row(f"{options.model} {arm}", lists.labels, np.stack(scores), seconds))
    return LlmRerankingReport(dataset.name, len(lists.numbers), rows, machine())


def _show_epoch(on_step: OnStep, run: str, epoch: Epoch) -> None:
    on_step(f"{run}, epoch {epoch.number}", 0, None)


def direct_table(report: LlmRerankingReport) -> Group:
    """Quality and latency of all rankers, ready to print."""
    title = f"{report.dataset}: {report.lists} lists of 10, one request each"
    table = new_table(title, ("ranker",), ("MAP", "NDCG", "hits at 1", "p50, ms", "p99, ms", "named all"))
    for row in report.rows:
        quality = [f"{value:.4f}" for value in (row.map, row.ndcg, row.hits_at_1)]
        times = ["" if ms is None else f"{ms:,.1f}" for ms in (row.p50_ms, row.p99_ms)]
        table.add_row(row.ranker, *quality, *times, "" if row.complete is None else f"{row.complete:.0%}")
    return Group(table, *notes(["A toy: this language model is small enough to run anywhere."], style="dim"))


DEFAULTS: Final = LlmRerankingOptions()


def direct(
    work: Work = QUALITY_WORK,
    model: Annotated[str, typer.Option("--backbone", "--model", help="Reranker to compare with.")] = DEFAULTS.model,
    users: Annotated[int, typer.Option(min=1, help="Test users, with one list of ten each.")] = DEFAULTS.users,
    json_file: JsonFile = None,
) -> None:
    """Let a small local language model rank candidates, beside a trained reranker (extra local-llm).

    A toy: it shows the latency of asking a language model for each request, not the quality of large models.
    """
    if model not in RERANKERS:
        raise InputError(f"model {model!r} is no reranker: choose from {', '.join(RERANKERS)}")
    console = Console()
    encodings = prepare(work, "ml-100k", console=console)
    llm = LocalChat(parameters=ANSWER, concurrency=1)
    torch.set_num_threads(1)
    with progress(console, f"ask {llm.model}", users) as show:
        report = measure_direct(work, work.folder(encodings), llm, LlmRerankingOptions(model, users), on_step=show)
    finish(console, report, direct_table(report), json_file)
