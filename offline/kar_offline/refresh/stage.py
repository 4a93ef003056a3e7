"""Owns one refresh of a work folder and a published release, in five phases: ingest, plan, rewrite, encode, publish.

A phase whose output is up to date does nothing, so a killed refresh is completed by running it again with the same
files. Each phase takes the values of the phases before it, and no file is read twice.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from rich.console import Console

from kar_offline.check import FactsTable
from kar_offline.dataset.dataset import Dataset
from kar_offline.encode.vector_files import Encoding
from kar_offline.encoders.text_encoder import TextEncoder
from kar_offline.generate.provider import Provider
from kar_offline.generate.stage import utc_now
from kar_offline.knowledge.knowledge_folder import Knowledge
from kar_offline.prompts import RenderedPrompts
from kar_offline.refresh.context import RefreshContext
from kar_offline.refresh.encode import encode_knowledge
from kar_offline.refresh.ingest import read_arrivals
from kar_offline.refresh.plan import Budget, kinds_read, plan_refresh
from kar_offline.refresh.policy import Policy
from kar_offline.refresh.publish import publish_fresh
from kar_offline.refresh.report import RefreshReport
from kar_offline.refresh.rewrite import rewrite
from kar_offline.refresh.target import check_target
from kar_offline.stage_runner import settle
from kar_offline.work_folder import WorkFolder
from kar_sidecar.errors import PreconditionError
from kar_sidecar.lock import held
from kar_sidecar.releases.manifest import Release
from kar_sidecar.store import Store

__all__ = ["refresh"]


def refresh(
    work: WorkFolder,
    provider: Provider,
    make_encoder: Callable[[], TextEncoder],
    *,
    release_id: str,
    open_store: Callable[[], Store],
    events: Path | None = None,
    entities: Path | None = None,
    policy: Policy,
    budget: Budget,
    facts: FactsTable | None = None,
    retries: int | None = None,
    dry_run: bool = False,
    now: Callable[[], datetime] = utc_now,
    console: Console | None = None,
) -> RefreshReport:
    """Bring a work folder and a published release up to date.

    Args:
        work: The work folder, with `dataset`, `prompts`, `knowledge` and `encoding`.
        provider: Writes the texts.
        make_encoder: Makes the release's encoder.
        release_id: The release that takes the fresh knowledge.
        open_store: Opens the store in which the release is published.
        events: A file of new events; see `kar_offline.refresh.ingest`.
        entities: A file of new users and items.
        policy: The conditions for a text to be due.
        budget: Limits the calls and their cost.
        facts: Facts that texts must not contradict, beside the dataset's.
        retries: How often to ask again for a text that a gate refuses; default: as the scenario says.
        dry_run: Only ingest and plan; nothing is changed or sent.
        now: Gives the time.
        console: Shows progress; default: no progress is shown.

    Raises:
        InputError: a file is wrong; nothing was changed.
        NotFoundError: no such release.
        PreconditionError: an earlier stage did not run, or another refresh of this work folder is under way.
        IntegrityError: the work folder or the release is corrupt, or they do not belong together.
        UnavailableError: the language model or the store does not answer; a refresh that is started again continues.
    """
    began = time.perf_counter()
    context = RefreshContext(work, open_store, provider, now, console)
    under_way = PreconditionError(f"another refresh of {work} is under way: wait until it ends")
    with held(work.root / ".refresh.lock", under_way):
        for folder in (work.dataset, work.prompts, work.knowledge, work.encoding):
            settle(folder)
        started_at = now()
        release = Release.load(work.releases, release_id, verify=not dry_run)
        if policy.kinds is None:
            policy = replace(policy, kinds=kinds_read(release))
        dataset, rendered = work.read(Dataset), work.read(RenderedPrompts)
        renderer = rendered.renderer(started_at.date())
        with context.status("reading new entities and events"):
            title = renderer.scenario.item.title
            arrivals = read_arrivals(dataset, title, events=events, entities=entities, now=started_at)
        with context.status("looking for texts that are due"):
            knowledge = work.read(Knowledge)
            plan = plan_refresh(
                work,
                arrivals.dataset,
                knowledge.records,
                renderer,
                provider,
                policy=policy,
                budget=budget,
                now=started_at,
            )
        report = RefreshReport.planned(arrivals, plan, release_id, dry_run=dry_run)
        if dry_run:
            return replace(report, seconds=time.perf_counter() - began)
        encoding = work.read(Encoding)
        with context.status("checking the release and loading its encoder"):
            target = check_target(context, release, make_encoder, arrivals.dataset, encoding)
        rewritten = rewrite(context, arrivals, plan, knowledge, renderer, budget=budget, facts=facts, retries=retries)
        encoded = encode_knowledge(context, rewritten, encoding, target.encoder)
        with context.status("publishing"):
            written = publish_fresh(context, target.release, arrivals, rewritten, encoded)
        return replace(
            report,
            calls=rewritten.calls,
            cost_usd=rewritten.cost_usd,
            texts=rewritten.texts,
            encoded=encoded.encoded_texts,
            written=written,
            seconds=time.perf_counter() - began,
        )
