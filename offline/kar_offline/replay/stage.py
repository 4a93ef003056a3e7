"""Owns one replay: the active release is served, every test user's slate is ranked, and requests are timed."""

from contextlib import ExitStack
from typing import Final

from rich.console import Console

from kar_offline.dataset.dataset import Dataset
from kar_offline.replay.measurement import TIMEOUT_S, measure_latency, measure_quality
from kar_offline.replay.offline_scores import OfflineScorer
from kar_offline.replay.report import ReplayReport
from kar_offline.replay.serving import ServingAddresses, serving
from kar_offline.replay.slates import slates
from kar_offline.work_folder import WorkFolder
from kar_sidecar.client import KarClient
from kar_sidecar.experiments.assignment import KNOWLEDGE
from kar_sidecar.releases.manifest import Release, read_active

__all__ = ["SEED", "replay_release"]

SEED: Final = 7
"""Seed of the sampled candidates and of the bootstrap."""


def replay_release(
    work: WorkFolder,
    addresses: ServingAddresses | None,
    *,
    requests: int,
    candidates: int,
    seed: int,
    console: Console,
) -> ReplayReport:
    """Replay the test users of a work folder through its active release.

    Args:
        work: The work folder.
        addresses: Addresses of a running `kar serve`; None: one is started for the replay.
        requests: Number of requests that latency is measured over.
        candidates: Number of candidates of a slate.
        seed: Seed of the sampled candidates and of the bootstrap.
        console: Shows progress.

    Raises:
        PreconditionError: an earlier stage did not run.
        UnavailableError: serving does not answer.
    """
    release = Release.load(work.releases, read_active(work.releases), verify=False)
    dataset = work.read(Dataset)
    model = release.model(KNOWLEDGE)
    offline = OfflineScorer(dataset, model.backbone, work, model.recipe)
    test_slates = list(slates(dataset, size=candidates, seed=seed))
    with ExitStack() as stack:
        if addresses is None:
            with console.status("starting Triton and the sidecar"):
                addresses = stack.enter_context(serving(work))
        client = stack.enter_context(KarClient(addresses.grpc, timeout_s=TIMEOUT_S))
        quality = measure_quality(client, dataset, test_slates, offline, seed=seed, console=console)
        latency = measure_latency(
            client, dataset, test_slates, addresses, requests=requests, candidates=candidates, console=console
        )
    return ReplayReport(quality, latency)
