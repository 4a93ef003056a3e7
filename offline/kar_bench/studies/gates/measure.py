"""Owns the measurement of quality gates on released texts, generated texts, and released texts with one fault each.

A verdict against a released text counts as a false alarm until somebody shows the text to be wrong. Texts with a known
fault show what each gate finds.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from kar.records.v1 import records_pb2
from kar_bench.harness import machine
from kar_bench.studies.gates.corruptions import CORRUPTIONS, Corruption, EntityRef, Material
from kar_offline.check import (
    DUPLICATE_GATE,
    GATES,
    GATES_VERSION,
    FactsTable,
    Rules,
    Subject,
    judge,
    near_duplicates,
    subjects,
)
from kar_offline.check.name_matching import year_of
from kar_offline.dataset.dataset import Dataset
from kar_offline.generate.pack import Pack
from kar_offline.knowledge.records import read_knowledge, read_quarantine
from kar_offline.prompts.scenario import Scenario, load_scenario
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import ITEM, EntityKind

__all__ = ["GatesBenchmarkOptions", "GatesReport", "measure_gates"]

SEED: Final = 0
DEVELOPED, HELD_OUT = "developed on", "held out"
"""The authors of the gates looked at every other text of the pack, and at the first 100 generated ones."""
DEVELOPED_GENERATED: Final = 100


@dataclass(frozen=True, slots=True)
class GatesBenchmarkOptions:
    """Which texts are judged."""

    records: Path | None = None
    """A knowledge folder with generated texts about items of the dataset; None: no generated texts."""
    pack: str = "ml-100k"
    texts: int = 500
    """The most texts that each fault is put into."""
    duplicate_texts: int = 10_000
    """Number of made-up texts in which the search for near-duplicates is timed."""


class GateCounts(NamedTuple):
    """Texts that a gate failed, and texts that it could not judge."""

    failed: int
    unknown: int


@dataclass(frozen=True, slots=True)
class ConfusionRow:
    """Verdicts on one half of one set of texts."""

    texts: str
    half: str
    judged: int
    failed: int
    gates: Mapping[str, GateCounts]

    def to_json(self) -> dict[str, Any]:
        """Counts of a gate are a list: failed, unknown."""
        counts = {gate: [count.failed, count.unknown] for gate, count in self.gates.items()}
        return {
            "texts": self.texts,
            "half": self.half,
            "judged": self.judged,
            "failed": self.failed,
            "gates": counts,
        }


@dataclass(frozen=True, slots=True)
class RejectedText:
    """A released text that gates failed, with the reason by gate."""

    entity: EntityKind
    id: str
    reasons: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Gates are keys beside the others."""
        return {"entity": self.entity, "id": self.id, **self.reasons}


@dataclass(frozen=True, slots=True)
class CorruptionResult:
    """Texts with one fault: those that a gate found that should, and those that any gate failed."""

    corruption: str
    gates: Sequence[str]
    texts: int
    found: int
    failed: int


@dataclass(frozen=True, slots=True)
class FactsMatch:
    """Items of the dataset that the facts table knows."""

    name: str
    films: int
    items: int
    matched: int


@dataclass(frozen=True, slots=True)
class DuplicateSearch:
    """Processor time of the search for near-duplicates."""

    texts: int
    cpu_s: float


@dataclass(frozen=True, slots=True)
class GatesReport:
    """The study of quality gates."""

    dataset: str
    pack: str
    gates_version: int
    facts: FactsMatch | None
    rows: Sequence[ConfusionRow]
    failures: Sequence[RejectedText]
    """Released texts that failed."""
    accepted: Sequence[str]
    """Item ids of generated texts that passed."""
    corruptions: Sequence[CorruptionResult]
    cpu_ms_per_text: float
    near_duplicates: DuplicateSearch
    machine: str


_Verdicts = list[records_pb2.Verdict]
_Judge = Callable[[str, EntityRef, Rules], _Verdicts]


def measure_gates(
    work: WorkFolder,
    options: GatesBenchmarkOptions,
    *,
    scenario: Scenario | None = None,
    facts: FactsTable | None = None,
    on_text: Callable[[int, int], None] = lambda judged, total: None,
) -> GatesReport:
    """Judge the texts of a pack, generated texts, and corrupted texts of the pack's held-out half.

    Args:
        work: A work folder with the pack's dataset.
        options: Which texts are judged.
        scenario: The scenario of the prompts; None: films.
        facts: The facts table; None: claims are not compared with facts.
        on_text: Called with the number of texts judged so far and the estimated number of all.

    Raises:
        PreconditionError: there is no dataset, or no knowledge in `options.records`.
    """
    scenario = scenario or load_scenario()
    dataset = work.read(Dataset)
    known = subjects(dataset, scenario, facts)
    pack = Pack.load(options.pack)
    lines = pack.lines.items()
    texts = {key: line.text for kind in EntityKind for key, line in lines if key[0] == kind and key in known}
    rules = {kind: _rules(scenario, kind, pack.header.templates.get(kind, "")) for kind in EntityKind}
    records = _generated(options.records, dataset) if options.records else {}
    judge("Load what is loaded once, such as the model of languages.", Subject(ITEM, ""), rules[ITEM])
    began = time.thread_time()
    released = {key: list(judge(text, known[key], rules[key[0]])) for key, text in texts.items()}
    cpu_ms_per_text = (time.thread_time() - began) * 1e3 / max(len(texts), 1)
    judged, total = len(texts), len(texts) + len(records) + options.texts * len(CORRUPTIONS)

    def judge_text(text: str, key: EntityRef, text_rules: Rules) -> _Verdicts:
        nonlocal judged
        judged += 1
        on_text(judged, total)
        return list(judge(text, known[key], text_rules))

    generated = {
        key: judge_text(record.text, key, _rules(scenario, key[0], record.template)) for key, record in records.items()
    }
    _add_duplicates(released, texts, known)
    _add_duplicates(generated, {key: record.text for key, record in records.items()}, known)
    held_out = [key for kind in EntityKind for key in [key for key in texts if key[0] == kind][1::2]]
    material = Material.of(dataset, texts, known, scenario)
    corruptions = [
        _corrupted(corruption, held_out, material, _without(rules, corruption.withheld), options.texts, judge_text)
        for corruption in CORRUPTIONS
    ]
    return GatesReport(
        dataset=dataset.name,
        pack=pack.name,
        gates_version=GATES_VERSION,
        facts=None if facts is None else _match(dataset, scenario, facts),
        rows=list(_confusion(released, generated if options.records else None)),
        failures=[RejectedText(*key, reasons) for key in texts if (reasons := _failed(released[key]))],
        accepted=[item_id for (_, item_id), verdicts in generated.items() if not _failed(verdicts)],
        corruptions=[*corruptions, _copied(held_out, material, options.texts)],
        cpu_ms_per_text=cpu_ms_per_text,
        near_duplicates=_time_duplicates(options.duplicate_texts),
        machine=machine(),
    )


def _generated(folder: Path, dataset: Dataset) -> dict[EntityRef, records_pb2.KnowledgeRecord]:
    """Generated texts about items, quarantined ones included, in the order of the dataset."""
    records = (*read_knowledge(folder, ITEM), *read_quarantine(folder))
    by_id = {record.id: record for record in records if record.entity == ITEM.number and record.text}
    return {(ITEM, item.id): by_id[item.id] for item in dataset.items if item.id in by_id}


def _rules(scenario: Scenario, kind: EntityKind, template: str) -> Rules:
    """The rules for texts that may answer another version of the template than the scenario's."""
    question = scenario.questions[kind]
    asked = question.model_copy(update={"template": template or question.template})
    return Rules.of(scenario.model_copy(update={kind: asked}), kind)


def _without(rules: Mapping[EntityKind, Rules], fact: str) -> dict[EntityKind, Rules]:
    """The rules where the scenario does not allow a fact."""
    return {kind: replace(of_kind, allowed=of_kind.allowed - {fact}) for kind, of_kind in rules.items()}


def _failed(verdicts: Iterable[records_pb2.Verdict]) -> dict[str, str]:
    """The reasons of failed gates, by gate."""
    return {verdict.gate: verdict.reason for verdict in verdicts if verdict.outcome == records_pb2.OUTCOME_FAILED}


def _add_duplicates(
    verdicts: Mapping[EntityRef, _Verdicts], texts: Mapping[EntityRef, str], known: Mapping[EntityRef, Subject]
) -> None:
    """Add a failed verdict to each near-duplicate of another text."""
    for key, (other, likeness) in near_duplicates(texts, known).items():
        reason = f"{likeness:.0%} of it stands in the text of {other[0]} {other[1]}"
        verdict = records_pb2.Verdict(gate=DUPLICATE_GATE, outcome=records_pb2.OUTCOME_FAILED, reason=reason)
        verdicts[key].append(verdict)


def _confusion(
    released: Mapping[EntityRef, _Verdicts], generated: Mapping[EntityRef, _Verdicts] | None
) -> Iterator[ConfusionRow]:
    for kind in EntityKind:
        of_kind = [verdicts for key, verdicts in released.items() if key[0] == kind]
        yield _confusion_row(f"released, {kind}s", DEVELOPED, of_kind[::2])
        yield _confusion_row(f"released, {kind}s", HELD_OUT, of_kind[1::2])
    if generated is not None:
        verdicts = list(generated.values())
        yield _confusion_row("generated, items", DEVELOPED, verdicts[:DEVELOPED_GENERATED])
        yield _confusion_row("generated, items", HELD_OUT, verdicts[DEVELOPED_GENERATED:])


def _confusion_row(texts: str, half: str, judged: Sequence[_Verdicts]) -> ConfusionRow:
    counts = Counter((verdict.gate, verdict.outcome) for verdicts in judged for verdict in verdicts)
    gates = {
        gate: GateCounts(counts[gate, records_pb2.OUTCOME_FAILED], counts[gate, records_pb2.OUTCOME_UNKNOWN])
        for gate in (*GATES, DUPLICATE_GATE)
    }
    return ConfusionRow(texts, half, len(judged), sum(bool(_failed(verdicts)) for verdicts in judged), gates)


def _corrupted(
    corruption: Corruption,
    keys: Sequence[EntityRef],
    material: Material,
    rules: Mapping[EntityKind, Rules],
    limit: int,
    judge_text: _Judge,
) -> CorruptionResult:
    """Put a fault into at most `limit` texts that pass without it."""
    chance = random.Random(f"{SEED} {corruption.name}")
    keys = [key for key in keys if key[0] in corruption.kinds]
    failures: list[dict[str, str]] = []
    for key in chance.sample(keys, len(keys)):
        if len(failures) == limit:
            break
        text = corruption.corrupt(chance, key, material)
        text_rules = rules[key[0]]
        if text is not None and not _failed(judge(material.texts[key], material.subjects[key], text_rules)):
            failures.append(_failed(judge_text(text, key, text_rules)))
    return CorruptionResult(
        corruption.name,
        corruption.gates,
        len(failures),
        sum(any(gate in failed for gate in corruption.gates) for failed in failures),
        sum(bool(failed) for failed in failures),
    )


def _copied(keys: Sequence[EntityRef], material: Material, limit: int) -> CorruptionResult:
    """Give at most `limit` items the text of another item, with the titles exchanged."""
    chance = random.Random(f"{SEED} copied")
    items = [key for key in keys if key[0] == ITEM]
    sources = chance.sample(items, min(limit, len(items) // 2))
    targets = chance.sample([key for key in items if key not in set(sources)], len(sources))
    texts = dict(material.texts)
    for source, target in zip(sources, targets, strict=True):
        title, other = material.titles[source[1]], material.titles[target[1]]
        text = material.texts[source]
        texts[target] = text.replace(title, other) if title in text else f"{other}: {text}"
    duplicates = near_duplicates(texts, material.subjects)
    found = sum(target in duplicates or source in duplicates for source, target in zip(sources, targets, strict=True))
    name = "another film's text, titles exchanged"
    return CorruptionResult(name, [DUPLICATE_GATE], len(sources), found, found)


def _match(dataset: Dataset, scenario: Scenario, facts: FactsTable) -> FactsMatch:
    titles = [str(item.facts.get(scenario.item.title) or "") for item in dataset.items]
    years = [item.features.get("year") or year_of(title) for item, title in zip(dataset.items, titles, strict=True)]
    matched = sum(facts.find(title, year) is not None for title, year in zip(titles, years, strict=True))
    return FactsMatch(facts.name, facts.size, len(titles), matched)


def _time_duplicates(count: int) -> DuplicateSearch:
    """Time the search for near-duplicates among many texts of a hundred words."""
    chance = random.Random(SEED)
    words = [f"{first}{second}" for first in "bcdfghklmnprst" for second in range(1000)]
    texts = {number: " ".join(chance.choices(words, k=100)) for number in range(count)}
    began = time.thread_time()
    near_duplicates(texts)
    return DuplicateSearch(count, time.thread_time() - began)
