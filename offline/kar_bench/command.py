"""Owns `kar bench`."""

import os
import shlex
import sys
import time
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kar_bench.performance.kernels import Device, measure_kernels, write_docs
from kar_bench.performance.train import Options, measure_training
from kar_bench.studies.collective import Options as Collective
from kar_bench.studies.collective import measure_collective
from kar_bench.studies.freshness import READERS, measure_freshness
from kar_bench.studies.freshness import Job as FreshnessJob
from kar_bench.studies.freshness import Options as Freshness
from kar_bench.studies.gates import gates_table, measure_gates
from kar_bench.studies.llm_reranking import measure_direct
from kar_bench.studies.preparation import DATASETS, prepare
from kar_bench.studies.quality import measure, train_jobs
from kar_bench.studies.quality_report import (
    collective_table,
    direct_table,
    freshness_table,
    modes_table,
    quality_table,
    training_table,
    write_collective_plot,
    write_freshness_plot,
    write_quality_report,
)
from kar_bench.studies.quality_runs import Job, Protocol, default_jobs, possible_arms
from kar_offline.check import facts_table
from kar_offline.cli_options import DEFAULT_WORK, JsonFile, Work, once, refuse_unknown, write_json
from kar_offline.dataset.splits import FOLDS
from kar_offline.encoders.packaged import ENCODERS
from kar_offline.generate.llama_cpp import MODEL, LocalChat
from kar_offline.generate.pack import Pack
from kar_offline.generate.stage import generation_tasks, utc_now
from kar_offline.models import BACKBONES, RERANKERS
from kar_offline.train.arms import ARMS
from kar_offline.train.settings import TrainSettings
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import ITEM
from kar_sidecar.errors import InputError
from kar_sidecar.index.config import KINDS, STORAGES
from kar_sidecar.settings import Settings

__all__ = ["bench"]

bench = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


PREPARED: Final = "prepared"


QUALITY_WORK: Final = WorkFolder(Path("var/quality"))


class By(StrEnum):
    """What splits events."""

    USER = "user"
    TIME = "time"


def _typed() -> str:
    """The command as it was given."""
    return shlex.join(["kar", *sys.argv[1:]])


@bench.callback()
def _bench() -> None:
    """Measure models' quality, the speed of training, serving and searching, and asking a language model instead."""


@bench.command()
def quality(
    dataset: Annotated[
        str, typer.Option(help=f"Of {', '.join(DATASETS)}; or 'prepared': WORK already holds dataset and vectors.")
    ] = "ml-100k",
    folder: Annotated[Path | None, typer.Option("--from", help="ml-1m: the folder that holds it and texts.")] = None,
    encoder: Annotated[str, typer.Option(help="Of minilm, mpnet.")] = "minilm",
    words: Annotated[int | None, typer.Option(min=1, help="Encode so many words of each text; default: all.")] = None,
    work: Work = QUALITY_WORK,
    model: Annotated[
        list[str] | None, typer.Option("--backbone", "--model", help="Backbones to train; default: all.")
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(help=f"Of {', '.join(ARMS)}; default: all but the last two for dcnv2 and din, else three."),
    ] = None,
    folds: Annotated[int, typer.Option(min=2, help="Folds that users are dealt into.")] = FOLDS,
    fold: Annotated[list[int] | None, typer.Option(help="Only these folds, from 0; default: all.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds of training; default: 0.")] = None,
    ranker: Annotated[
        str, typer.Option(help="Rerankers alone, on lists in the order of this model, trained without knowledge.")
    ] = "",
    split: Annotated[By, typer.Option(help="Test on other users, or on the latest events.")] = By.USER,
    share: Annotated[
        float, typer.Option(min=0.01, max=1, help="Split by user: train on this share of the training users.")
    ] = 1.0,
    encodings: Annotated[str, typer.Option(help="prepared: folder in WORK with the vectors.")] = "encoding",
    epochs: Annotated[int, typer.Option(min=1, help="At most; early stopping ends sooner.")] = TrainSettings().epochs,
    workers: Annotated[int, typer.Option(min=0, help="Processes, one thread each; 0: train in this one.")] = 2,
    json_file: JsonFile = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page with plots.")] = None,
) -> None:
    """Train models with every arm on every fold, and tell what each arm gives and how sure that is.

    Killed and started again, it goes on where it was.
    """
    models, arms, chosen, seeds = once(model), once(arm), once(fold) or range(folds), once(seed) or [0]
    refuse_unknown("model", models, (*BACKBONES, *RERANKERS))
    refuse_unknown("arm", arms, ARMS)
    if outside := [number for number in chosen if not 0 <= number < folds]:
        raise InputError(f"fold {outside[0]} is not one of {folds}: choose from 0 to {folds - 1}")
    refuse_unknown("ranker", [ranker] if ranker else [], BACKBONES)
    if ranker and (others := [name for name in models if name not in RERANKERS]):
        raise InputError(f"{others[0]} takes no order of another model: leave it or --ranker out")
    if split is By.TIME:
        if share < 1:
            raise InputError("--share is of users, whom a split by time does not split: leave one of the two out")
        if fold:
            raise InputError("--fold is of users, whom a split by time does not deal: leave one of the two out")
        chosen = [0]
    protocol = Protocol(split.value, folds, share)
    console = Console()
    began = time.perf_counter()
    if dataset != PREPARED:
        encodings = prepare(work, dataset, folder, encoder, words, console=console)
    jobs = default_jobs(models, arms, chosen, seeds, ranker, possible_arms(work.root / encodings))
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    ) as progress:
        task = progress.add_task("train", total=len(jobs))

        def on_epoch(job: Job, epoch: int) -> None:
            if epoch:
                progress.update(task, description=f"{job.model} {job.arm}, fold {job.fold}, epoch {epoch}")
            else:
                progress.advance(task)

        settings = TrainSettings(epochs=epochs)
        trained = train_jobs(work, protocol, encodings, jobs, settings, workers=workers, on_epoch=on_epoch)
        task = progress.add_task("measure", total=len(jobs))
        report = measure(work, protocol, encodings, jobs, on_job=lambda job: progress.advance(task))
    report |= {
        "settings": settings.to_json(),
        "trained": trained,
        "seconds": time.perf_counter() - began,
        "command": _typed(),
    }
    console.print(quality_table(report))
    write_json(json_file, report)
    if html is not None:
        write_quality_report(report, html)
        console.print(f"{html}: plots and all differences")


@bench.command()
def collective(
    dataset: Annotated[str, typer.Option(help="ml-100k; or 'prepared': WORK already holds the stages.")] = "ml-100k",
    work: Work = QUALITY_WORK,
    model: Annotated[str, typer.Option("--backbone", "--model", help="Backbone to train.")] = Collective().model,
    share: Annotated[
        list[float] | None, typer.Option(min=0.001, max=0.999, help="Calls by entities; default: 0.3, 0.1 and 0.03.")
    ] = None,
    folds: Annotated[int, typer.Option(min=2, help="Folds that users are dealt into.")] = FOLDS,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds of training and of clusters; default: 0.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="At most; early stopping ends sooner.")] = TrainSettings().epochs,
    workers: Annotated[int, typer.Option(min=0, help="Processes, one thread each; 0: train in this one.")] = 2,
    json_file: JsonFile = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw AUC against calls into this picture.")] = None,
) -> None:
    """Tell what fewer calls to a language model cost in quality, with released texts in its place.

    Killed and started again, it goes on where it was.
    """
    refuse_unknown("model", [model], BACKBONES)
    console = Console()
    base = "encoding" if dataset == PREPARED else prepare(work, dataset, None, "minilm", console=console)
    options = Collective(model=model, shares=once(share) or Collective().shares, folds=folds, seeds=once(seed) or (0,))
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("train", total=None)

        def on_epoch(job: Job, epoch: int, done: int, total: int) -> None:
            what = f"{job.arm}, fold {job.fold}, epoch {epoch}" if epoch else None
            progress.update(task, description=what, completed=done, total=total)

        report = measure_collective(
            work, base, options, TrainSettings(epochs=epochs), workers=workers, on_epoch=on_epoch
        )
    report |= {"command": _typed()}
    console.print(collective_table(report))
    write_json(json_file, report)
    if plot is not None:
        write_collective_plot(report, plot)
        console.print(f"{plot}: AUC against calls")


@bench.command()
def freshness(
    dataset: Annotated[str, typer.Option(help="ml-100k; or 'prepared': WORK already holds the stages.")] = "ml-100k",
    work: Work = QUALITY_WORK,
    arm: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(READERS)}, each beside the control; default: all.")
    ] = None,
    budget: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Calls a day, beside none and any number; default: 1, 3 and 10."),
    ] = None,
    model: Annotated[str, typer.Option("--backbone", "--model", help="Backbone to train.")] = Freshness().model,
    share: Annotated[
        float, typer.Option(min=0.01, max=0.99, help="Of the events, those before the month's first day.")
    ] = Freshness().share,
    days: Annotated[int, typer.Option(min=1, help="Of the month.")] = Freshness().days,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds of training; default: 0 and 1.")] = None,
    usd_per_million: Annotated[
        tuple[float, float],
        typer.Option(min=0, help="Price of a million tokens, read and written; the default is an example."),
    ] = Freshness().usd_per_million,
    epochs: Annotated[int, typer.Option(min=1, help="At most; early stopping ends sooner.")] = TrainSettings().epochs,
    workers: Annotated[int, typer.Option(min=0, help="Processes, one thread each; 0: train in this one.")] = 2,
    json_file: JsonFile = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw AUC and cost against the budget into this picture.")
    ] = None,
) -> None:
    """Replay a month, its knowledge refreshed with a budget of calls a day, and tell what each budget gives and costs.

    Killed and started again, it goes on where it was.
    """
    refuse_unknown("model", [model], BACKBONES)
    arms, default = once(arm) or READERS, Freshness()
    refuse_unknown("arm", arms, READERS)
    console = Console()
    base = "encoding" if dataset == PREPARED else prepare(work, dataset, None, "minilm", console=console)
    options = Freshness(
        arms=arms,
        budgets=once(budget) or default.budgets,
        model=model,
        seeds=once(seed) or default.seeds,
        share=share,
        days=days,
        usd_per_million=usd_per_million,
    )
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("encode texts about users", total=None)

        def on_epoch(job: FreshnessJob, epoch: int, done: int, total: int) -> None:
            what = f"{job.arm}, seed {job.seed}, epoch {epoch}" if epoch else None
            progress.update(task, description=what, completed=done, total=total)

        report = measure_freshness(
            work,
            base,
            options,
            TrainSettings(epochs=epochs),
            ENCODERS["minilm"],
            workers=workers,
            on_epoch=on_epoch,
        )
    report |= {"command": _typed()}
    console.print(freshness_table(report))
    write_json(json_file, report)
    if plot is not None:
        write_freshness_plot(report, plot)
        console.print(f"{plot}: AUC and cost against the budget")


@bench.command()
def train(
    dataset: Annotated[
        str, typer.Option(help=f"Of {', '.join(DATASETS)}; or 'prepared': WORK already holds dataset and vectors.")
    ] = "ml-100k",
    folder: Annotated[Path | None, typer.Option("--from", help="ml-1m: the folder that holds it and texts.")] = None,
    work: Work = QUALITY_WORK,
    model: Annotated[
        list[str] | None, typer.Option("--backbone", "--model", help="Backbones to train; default: dcnv2 and din.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Samples of a turn.")] = Options().rows,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each; one more warms up.")] = Options().rounds,
    fuxictr: Annotated[
        Path | None, typer.Option(help="Compare with FuxiCTR (dcnv2, din) in this environment, made if missing.")
    ] = None,
    fit: Annotated[bool, typer.Option(help="Also train to the end on every fold, for AUC.")] = True,
    json_file: JsonFile = None,
) -> None:
    """Compare samples a second: our trainer with and without knowledge, a loop over samples, FuxiCTR."""
    models = once(model) or list(Options().models)
    refuse_unknown("model", models, BACKBONES)
    if fuxictr is not None and (others := [name for name in models if name not in Options().models]):
        raise InputError(f"FuxiCTR is compared on {' and '.join(Options().models)}: leave {others[0]} or --fuxictr out")
    console = Console()
    encodings = "encoding" if dataset == PREPARED else prepare(work, dataset, folder, "minilm", console=console)
    options = Options(models, rows, rounds, fuxictr, fit)
    torch.set_num_threads(1)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    ) as progress:
        task = progress.add_task("train", total=None)
        report = measure_training(
            work,
            work.root / encodings,
            options,
            on_turn=lambda name, turn, turns: progress.update(
                task, description=name, completed=turn, total=turns or None
            ),
        )
    report |= {"command": _typed()}
    console.print(training_table(report))
    write_json(json_file, report)


@bench.command()
def throughput(
    work: Work = DEFAULT_WORK,
    prompts: Annotated[int, typer.Option(min=0, help="Prompts about items of WORK to ask in a turn; 0: none.")] = 12,
    texts: Annotated[int, typer.Option(min=1, help="Texts of the released pack to encode in a turn.")] = 150,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each; one more warms up.")] = 5,
    json_file: JsonFile = None,
) -> None:
    """Compare tokens a second with the bare runtimes: of asking a llama.cpp server, and of encoding."""
    # It loads all that runs encoders, which takes seconds.
    from kar_bench.performance.generation import generation_contenders
    from kar_bench.performance.throughput import encoding_contenders, measure_throughput, throughput_table
    from kar_offline.encoders.packaged import mini_lm

    released = [line.text for line in Pack.load("ml-100k").lines.values()]
    chosen = released[:: max(len(released) // texts, 1)][:texts]
    console = Console()
    with ExitStack() as stack:
        with console.status("loading the models"):
            contenders = encoding_contenders(lambda runtime, threads: mini_lm(runtime=runtime, threads=threads), chosen)
            if prompts:
                cases, _ = generation_tasks(work, ITEM, prompts, None, None, utc_now().date())
                contenders += stack.enter_context(generation_contenders(cases))
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        progress = stack.enter_context(Progress(*columns, console=console))
        task = progress.add_task("encode", total=None)
        report = measure_throughput(
            contenders,
            rounds=rounds,
            on_turn=lambda name, turn, turns: progress.update(task, description=name, completed=turn, total=turns),
        )
    report |= {"command": _typed()}
    console.print(throughput_table(report))
    write_json(json_file, report)


@bench.command()
def direct(
    work: Work = QUALITY_WORK,
    model: Annotated[str, typer.Option("--backbone", "--model", help="Reranker to compare with.")] = "prm",
    users: Annotated[int, typer.Option(min=1, help="Test users, one list of ten each.")] = 50,
    json_file: JsonFile = None,
) -> None:
    """Ask a small local language model to rank, beside a reranker trained for it: a toy (extra local-llm)."""
    if model not in RERANKERS:
        raise InputError(f"model {model!r} is no reranker: choose from {', '.join(RERANKERS)}")
    console = Console()
    encodings = prepare(work, "ml-100k", None, "minilm", console=console)
    llm = LocalChat(parameters={"temperature": 0.0, "max_tokens": 60, "seed": 1}, concurrency=1)
    torch.set_num_threads(1)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    ) as progress:
        asked = progress.add_task(f"ask {MODEL}", total=users)
        trained = progress.add_task("train", total=None)
        report = measure_direct(
            work,
            work.root / encodings,
            llm,
            model=model,
            users=users,
            on_answer=lambda: progress.advance(asked),
            on_epoch=lambda arm, epoch: progress.update(trained, description=f"{model} {arm}, epoch {epoch.number}"),
        )
    report |= {"command": _typed()}
    console.print(direct_table(report))
    write_json(json_file, report)


@bench.command()
def modes(
    work: Work = DEFAULT_WORK,
    candidates: Annotated[
        list[int] | None, typer.Option(min=1, help="Candidates of a request; default: 100 and 500.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Of each mode and number of candidates.")] = 1000,
    model: Annotated[
        str,
        typer.Option(
            "--backbone",
            "--model",
            help="Trained backbone that follows the served one; default: the first other one.",
        ),
    ] = "",
    json_file: JsonFile = None,
) -> None:
    """Serve the active release in both modes, in turns: latency, bytes in the store, and time to a new model."""
    # It needs what serving needs, an LMDB store and an index, which no other benchmark does.
    from kar_bench.performance.modes import Options as Modes
    from kar_bench.performance.modes import measure_modes

    refuse_unknown("model", [model] if model else [], (*BACKBONES, *RERANKERS))
    console = Console()
    torch.set_num_threads(1)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    ) as progress:
        task = progress.add_task("serve", total=None)
        report = measure_modes(
            work,
            Modes(once(candidates) or (100, 500), requests, model),
            on_step=lambda what, done, total: progress.update(task, description=what, completed=done, total=total),
        )
    report |= {"command": _typed()}
    console.print(modes_table(report))
    write_json(json_file, report)


@bench.command()
def store(
    store: Annotated[
        list[str] | None,
        typer.Option(
            help="lmdb:FOLDER (for temporary ones) or aerospike:HOST:PORT/NAMESPACE/SET; "
            "default: LMDB, and Aerospike where AEROSPIKE_HOSTS is set."
        ),
    ] = None,
    entities: Annotated[int, typer.Option(min=1_000, help="Entities to load.")] = 1_000_000,
    reads: Annotated[float, typer.Option(min=1, help="Batches of 200 entities read a second.")] = 100.0,
    quiet: Annotated[float, typer.Option(min=0.1, help="Seconds of reading before the load, and after it.")] = 10.0,
    text_bytes: Annotated[int, typer.Option(min=0, help="Of each entity's text; 0: no texts.")] = 0,
    config: Annotated[Path | None, typer.Option(help="TOML file of settings, as `kar sidecar` reads it.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Load a store while batches are read at a steady rate, beside the bare client: rates, sizes, latencies."""
    from kar_bench.performance.store import Options as Stores
    from kar_bench.performance.store import measure_store, store_table

    hosts = os.environ.get("AEROSPIKE_HOSTS")
    urls = once(store) or ["lmdb:", *([f"aerospike:{hosts}/test/bench"] if hosts else [])]
    console = Console()
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    ) as progress:
        task = progress.add_task("load", total=None)
        report = measure_store(
            Stores(urls, entities, reads, quiet, text_bytes),
            Settings.read(config).aerospike,
            on_step=lambda what, done, total: progress.update(task, description=what, completed=done, total=total),
        )
    report |= {"command": _typed()}
    console.print(store_table(report))
    write_json(json_file, report)


@bench.command()
def index(
    size: Annotated[
        list[int] | None, typer.Option(min=100, help="Vectors; repeat for several.", show_default="10000 and 1000000")
    ] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="Of flat, ivf, hnsw.", show_default="all, flat up to 200,000 vectors")
    ] = None,
    storage: Annotated[
        list[str] | None, typer.Option(help="Of float32, float16, int8.", show_default="float32")
    ] = None,
    recall: Annotated[float, typer.Option(help="Share of the exact 10 nearest that must be found.")] = 0.95,
    dim: Annotated[int, typer.Option(min=2, help="Components of a vector.")] = 384,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each; one more warms up.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.01, help="Of a turn.")] = 1.0,
    threads: Annotated[int | None, typer.Option(min=1, help="That build.", show_default="this machine's cores")] = None,
    json_file: JsonFile = None,
) -> None:
    """Build, search and load nearest-neighbour indexes, beside bare FAISS."""
    from kar_bench.performance.index import SIZES, index_table, measure_index
    from kar_bench.performance.index import Options as Indexes

    refuse_unknown("kind", kind or (), KINDS)
    refuse_unknown("storage", storage or (), STORAGES)
    console = Console()
    options = Indexes(
        sizes=once(size) or SIZES,
        kinds=[known for known in KINDS if known in (kind or ())],
        storages=[known for known in STORAGES if known in (storage or ("float32",))],
        recall=recall,
        dim=dim,
        threads=threads or len(os.sched_getaffinity(0)),
        rounds=rounds,
        seconds=seconds,
    )
    with console.status("") as status:
        report = measure_index(options, on_step=status.update)
    report |= {"command": _typed()}
    console.print(index_table(report))
    write_json(json_file, report)


@bench.command()
def gates(
    work: Work = DEFAULT_WORK,
    records: Annotated[
        Path | None, typer.Option(help="Knowledge folder with generated texts about items, quarantined ones included.")
    ] = None,
    facts: Annotated[
        str, typer.Option(help="Facts table: 'wikidata', a CSV or JSON Lines file, or '' for none.")
    ] = "wikidata",
    texts: Annotated[int, typer.Option(min=1, help="Texts that each fault is put into, at most.")] = 500,
    json_file: JsonFile = None,
) -> None:
    """Judge the released pack, generated texts, and texts of the pack with one fault each: what quality gates find."""
    console = Console()
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    ) as progress:
        task = progress.add_task("judge", total=None)
        report = measure_gates(
            work,
            records=records,
            facts=facts_table(facts) if facts else None,
            most=texts,
            on_text=lambda done, total: progress.update(task, completed=done, total=max(done, total)),
        )
    report |= {"command": _typed()}
    console.print(gates_table(report))
    write_json(json_file, report)


@bench.command()
def kernels(
    device: Annotated[Device, typer.Option(help="Where forms are compared.")] = Device.CPU,
    rows: Annotated[int, typer.Option(min=1, help="cpu: vectors to prestore.")] = 1_000_000,
    seconds: Annotated[float, typer.Option(min=0.01, help="cpu: that each form is measured for.")] = 1.0,
    budget: Annotated[float, typer.Option(min=1, help="cuda: seconds; what has not begun by then is left out.")] = 420,
    plots: Annotated[Path | None, typer.Option(help="cuda: folder for pictures and CSV files.")] = None,
    docs: Annotated[Path | None, typer.Option(help="Put the tables into this page's blocks: docs/kernels.md.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Compare the adaptor's implementations, and compile every kernel ahead of time for two GPU generations."""
    console = Console()
    report = measure_kernels(device, console, rows=rows, seconds=seconds, budget_s=budget, plots=plots)
    report |= {"command": _typed()}
    if docs is not None:
        write_docs(report, docs)
    write_json(json_file, report)
