"""Owns the measurement of quality gates: released texts, generated texts, and released texts with one thing wrong.

Verdicts on the released pack are false alarms until somebody shows the text to be wrong. Corruptions tell what each
gate finds: each puts one known fault into texts of the pack.
"""

import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from kar.records.v1 import records_pb2
from kar_kernels.benchmark.machine import machine
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
from kar_offline.check.fact_consistency import GENRE_WORDS
from kar_offline.check.name_matching import title_forms, year_of
from kar_offline.dataset.dataset import Dataset
from kar_offline.generate.pack import Pack
from kar_offline.knowledge.records import read_knowledge, read_quarantine
from kar_offline.prompts.scenario import Scenario, load_scenario
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import ITEM, USER, EntityKind

__all__ = ["CORRUPTIONS", "Corruption", "Material", "gates_table", "measure_gates"]

Key = tuple[EntityKind, str]
SEED: Final = 0
SCALE: Final = 10_000
"""Texts among which near-duplicates are looked for, for the time that it takes."""
DEVELOPED, HELD_OUT = "developed on", "held out"
"""Gates were written looking at every other text of the pack, and at the first 100 generated ones."""
DEVELOPED_GENERATED: Final = 100

REFUSALS: Final = (
    "I'm sorry, but I cannot help with that request.",
    "As an AI language model, I do not have personal opinions about it.",
    "I don't have enough information about this title to describe it.",
    "Unfortunately, I am unable to provide details.",
    "I cannot verify any of this.",
    "I apologize, but no information is available.",
    "I do not know this one, and would only be guessing.",
    "It goes against my guidelines to say more.",
)
FOREIGN: Final = (
    "Der Film erzählt die Geschichte einer jungen Frau, die nach dem Tod ihres Vaters in ihr Heimatdorf zurückkehrt "
    "und dort auf eine alte Liebe trifft. Die Kritik lobte vor allem die ruhige Kamera und die Hauptdarsteller.",
    "Ce film raconte l'histoire d'un homme qui quitte sa famille pour chercher fortune dans la capitale, et qui finit "
    "par tout perdre. La critique a salué la mise en scène, mais le public ne l'a guère suivi à sa sortie en salles.",
    "La película cuenta la vida de dos hermanos que crecen en un barrio pobre y eligen caminos muy distintos. Fue bien "
    "recibida por la crítica, que destacó la fotografía, la música y el trabajo de sus jóvenes protagonistas.",
)
CONTACTS: Final = (
    "Write to anna.berg@example.org for a copy.",
    "Call (555) 010-4477 for tickets.",
    "Reach the fan club at +44 20 7946 0958.",
    "Follow @late_night_cinema for more.",
    "The card on file is 4111 1111 1111 1111.",
    "Letters go to 12 Harbour View Road, Springfield 62704.",
)
VAGUE: Final = (
    "{title} is a must-see for anyone who loves great storytelling. The director brings a unique vision to the screen, "
    "and the cast delivers powerful performances throughout. Critics have praised its production quality, its score "
    "and its emotional depth, and it continues to resonate with audiences of all ages around the world.",
    "This film, {title}, explores themes of identity, family and redemption through a complex narrative. Its mood is "
    "both dark and hopeful, its characters are well developed, and its soundtrack adds to the atmosphere. It was "
    "praised by critics and audiences alike and will appeal to viewers who enjoy thoughtful cinema.",
)
YEARS: Final = ("It is a {year} film.", "It was released in {year}.", "This {year} movie divided its audience.")
STATED: Final = ("'{title}' got five stars as well.", "Five stars also went to '{title}'.", "'{title}' was rated low.")
LISTED: Final = (
    "Five stars also went to {title} and {other}.",
    "Low marks were given to {other}, {title} and the like.",
)
GUESSED: Final = ("They should enjoy '{title}'.", "'{title}' would probably please them.")
ABOUT: Final = {
    "age": ("This {age}-year-old knows what pleases.", "A viewer in their thirties, it seems.", "A teenager's choice."),
    "gender": ("He knows what he likes.", "She is hard to please.", "This woman has seen a lot."),
    "occupation": ("This {job} rates strictly.", "A {job} who watches a lot.", "Here is an {job} with taste."),
}
JOBS: Final = ("engineer", "librarian", "programmer", "student", "lawyer", "educator")


@dataclass(frozen=True, slots=True)
class Material:
    """What corruptions are made of."""

    dataset: Dataset
    texts: Mapping[Key, str]
    """Released texts."""
    subjects: Mapping[Key, Subject]
    titles: Mapping[str, str]
    """By item id: as texts would write them."""
    factors: Sequence[str]
    """What the prompt asks about."""

    @staticmethod
    def of(dataset: Dataset, texts: Mapping[Key, str], known: Mapping[Key, Subject], scenario: Scenario) -> "Material":
        """Put the material together."""
        titles = {item.id: _plain(str(item.facts.get(scenario.item.title) or "")) for item in dataset.items}
        return Material(dataset, texts, known, titles, scenario.item.factors)

    def other(self, chance: random.Random, key: Key) -> Key:
        """Another entity of the same kind."""
        return chance.choice([other for other in self.texts if other[0] == key[0] and other != key])


Spoil = Callable[[random.Random, Key, Material], str | None]


class Corruption(NamedTuple):
    """One fault: how it is put into a text (None: not into this one), and the gates that ought to find it."""

    name: str
    kinds: tuple[EntityKind, ...]
    gates: tuple[str, ...]
    spoil: Spoil
    withholds: str = ""
    """A fact that the scenario then does not allow."""


def _plain(title: str) -> str:
    """A title without its year and other names."""
    return re.sub(r"\s*\(.*", "", title)


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=[a-z\d)'][.!?])\s+(?=[A-Z'])", text)


def _with(chance: random.Random, text: str, sentence: str) -> str:
    """A text with one more sentence somewhere after its first."""
    sentences = _sentences(text)
    sentences.insert(chance.randint(1, len(sentences)), sentence)
    return " ".join(sentences)


def _said(phrases: Sequence[str]) -> Spoil:
    return lambda chance, key, material: _with(chance, material.texts[key], chance.choice(phrases))


def _another_text(chance: random.Random, key: Key, material: Material) -> str:
    return material.texts[material.other(chance, key)]


def _another_year(chance: random.Random, key: Key, material: Material) -> str | None:
    years = material.subjects[key].years
    if not years:
        return None
    year = min(years[0] + chance.choice((-1, 1)) * chance.randint(5, 30), 2025)
    return _with(chance, material.texts[key], chance.choice(YEARS).format(year=year))


def _another_genre(chance: random.Random, key: Key, material: Material) -> str | None:
    known = {genre.lower() for genre in material.subjects[key].genres}
    others = [word for word, genre in GENRE_WORDS.items() if not known.intersection((word, genre))]
    return _with(chance, material.texts[key], f"It is a {chance.choice(others)} film.") if known and others else None


def _renamed(
    chance: random.Random, key: Key, material: Material, people: Callable[[Subject], Sequence[str]]
) -> str | None:
    """A text in which people of the item have the names of another item's."""
    text, own = material.texts[key], people(material.subjects[key])
    others = [name for name in people(material.subjects[material.other(chance, key)]) if name not in own]
    found = [name for name in own if name in text]
    if not found or len(others) < len(found):
        return None
    for name, other in zip(found, chance.sample(others, len(found)), strict=True):
        text = text.replace(name, other)
        if " " in name and " " in other:
            text = re.sub(rf"\b{re.escape(name.split()[-1])}\b", other.split()[-1], text)
    return text


def _another_director(chance: random.Random, key: Key, material: Material) -> str | None:
    return _renamed(chance, key, material, lambda about: about.directors)


def _another_cast(chance: random.Random, key: Key, material: Material) -> str | None:
    return _renamed(chance, key, material, lambda about: [name for name in about.cast if name not in about.directors])


def _half_foreign(chance: random.Random, key: Key, material: Material) -> str:
    sentences = _sentences(material.texts[key])
    return " ".join((*sentences[: len(sentences) // 2 + 1], chance.choice(FOREIGN)))


def _again(times: int) -> Spoil:
    def spoil(chance: random.Random, key: Key, material: Material) -> str | None:
        long = [sentence for sentence in _sentences(material.texts[key]) if len(sentence.split()) >= 8]
        return " ".join((material.texts[key], *[chance.choice(long)] * times)) if long else None

    return spoil


def _cut(chance: random.Random, key: Key, material: Material) -> str | None:
    words = material.texts[key].split()
    kept = words[: chance.randint(len(words) // 2, len(words) - 2)]
    return None if kept[-1].rstrip("'\")").endswith((".", "!", "?")) else " ".join(kept)


def _short(chance: random.Random, key: Key, material: Material) -> str:
    return " ".join(material.texts[key].split()[: chance.randint(3, 20)]).rstrip(",;:.") + "."


def _long(chance: random.Random, key: Key, material: Material) -> str:
    others = (material.texts[material.other(chance, key)] for _ in range(2))
    return " ".join((material.texts[key], *others))


def _list(chance: random.Random, key: Key, material: Material) -> str:
    return "\n".join(f"- {sentence}" for sentence in _sentences(material.texts[key]))


def _headings(chance: random.Random, key: Key, material: Material) -> str:
    first, *more = _sentences(material.texts[key])
    return f"**Overview**\n{first}\n\n**Details**\n{' '.join(more)}"


def _labels(chance: random.Random, key: Key, material: Material) -> str:
    first, *more = _sentences(material.texts[key])
    return f"Title: {first} Genre: drama. Plot: {' '.join(more)}"


def _json(chance: random.Random, key: Key, material: Material) -> str:
    return json.dumps({"text": material.texts[key]}, ensure_ascii=False)


def _chat(chance: random.Random, key: Key, material: Material) -> str:
    opening = chance.choice(("Sure! ", "Here is a paragraph about it:\n\n", "<|im_start|>assistant\n", "Certainly, "))
    return opening + material.texts[key]


def _echo(chance: random.Random, key: Key, material: Material) -> str:
    start = chance.randrange(len(material.factors) - 3)
    return f"Describe these factors: {', '.join(material.factors[start : start + 4])}. {material.texts[key]}"


def _vague(chance: random.Random, key: Key, material: Material) -> str | None:
    title = material.titles[key[1]]
    return chance.choice(VAGUE).format(title=title) if title else None


def _later(chance: random.Random, key: Key, material: Material) -> tuple[str, str] | None:
    """The title of an item that a user met after the cut-off, and one that the prompt shows."""
    dataset, about = material.dataset, material.subjects[key]
    row = next(number for number, user in enumerate(dataset.users) if user.id == key[1])
    events, end = dataset.prompt_events(row), int(dataset.offsets[row + 1])
    later = [material.titles[dataset.items[item].id] for item in dataset.event_item[events.stop : end]]
    later = [title for title in later if title and title_forms(title)[0] in about.later]
    shown = [material.titles[dataset.items[item].id] for item in dataset.event_item[events]]
    return (chance.choice(later), chance.choice(shown)) if later and shown else None


def _tells(phrases: Sequence[str]) -> Spoil:
    def spoil(chance: random.Random, key: Key, material: Material) -> str | None:
        titles = _later(chance, key, material)
        if titles is None:
            return None
        return _with(chance, material.texts[key], chance.choice(phrases).format(title=titles[0], other=titles[1]))

    return spoil


def _describes(fact: str) -> Spoil:
    def spoil(chance: random.Random, key: Key, material: Material) -> str:
        phrase = chance.choice(ABOUT[fact]).format(age=chance.randint(15, 75), job=chance.choice(JOBS))
        return _with(chance, material.texts[key], phrase)

    return spoil


BOTH: Final = tuple(EntityKind)
CORRUPTIONS: Final = (
    Corruption("a refusal added", BOTH, ("refusal",), _said(REFUSALS)),
    Corruption("the second half in another language", BOTH, ("language",), _half_foreign),
    Corruption("3 to 20 words of it", BOTH, ("length",), _short),
    Corruption("three texts in one", BOTH, ("length",), _long),
    Corruption("cut off in a sentence", BOTH, ("complete",), _cut),
    Corruption("a sentence repeated once", BOTH, ("repetition",), _again(1)),
    Corruption("a sentence repeated three times", BOTH, ("repetition",), _again(3)),
    Corruption("as a list", BOTH, ("shape",), _list),
    Corruption("with headings", BOTH, ("shape",), _headings),
    Corruption("with labels", BOTH, ("shape",), _labels),
    Corruption("as JSON", BOTH, ("shape",), _json),
    Corruption("opened as in a chat", BOTH, ("shape",), _chat),
    Corruption("the prompt's factors repeated", BOTH, ("shape",), _echo),
    Corruption("another film's text", (ITEM,), ("subject", "facts"), _another_text),
    Corruption("nothing but praise and the title", (ITEM,), ("subject",), _vague),
    Corruption("another director", (ITEM,), ("facts",), _another_director),
    Corruption("another cast", (ITEM,), ("facts", "subject"), _another_cast),
    Corruption("another year", (ITEM,), ("facts",), _another_year),
    Corruption("another genre", (ITEM,), ("facts",), _another_genre),
    Corruption("another user's text", (USER,), ("subject", "leak"), _another_text),
    Corruption("a later film, in quotes", (USER,), ("leak",), _tells(STATED)),
    Corruption("a later film, in a list", (USER,), ("leak",), _tells(LISTED)),
    Corruption("a later film, as a guess", (USER,), ("leak",), _tells(GUESSED)),
    Corruption("contact details", BOTH, ("personal",), _said(CONTACTS)),
    *(Corruption(f"{fact}, where withheld", (USER,), ("personal",), _describes(fact), fact) for fact in ABOUT),
)


def _failed(verdicts: Iterable[records_pb2.Verdict]) -> dict[str, str]:
    return {v.gate: v.reason for v in verdicts if v.outcome == records_pb2.OUTCOME_FAILED}


def _row(name: str, half: str, verdicts: Sequence[Sequence[records_pb2.Verdict]]) -> dict[str, Any]:
    """One line of the confusion table; `gates` has [failed, unknown] of each."""
    counts = Counter((verdict.gate, verdict.outcome) for one in verdicts for verdict in one)
    failed, unknown = records_pb2.OUTCOME_FAILED, records_pb2.OUTCOME_UNKNOWN
    return {
        "texts": name,
        "half": half,
        "judged": len(verdicts),
        "failed": sum(bool(_failed(one)) for one in verdicts),
        "gates": {gate: [counts[gate, failed], counts[gate, unknown]] for gate in (*GATES, DUPLICATE_GATE)},
    }


def measure_gates(
    work: WorkFolder,
    *,
    records: Path | None = None,
    pack: str = "ml-100k",
    scenario: Scenario | None = None,
    facts: FactsTable | None = None,
    most: int = 500,
    on_text: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Judge the texts of a pack, those of a knowledge folder, and corrupted texts of the pack's held-out half.

    Args:
        work: A work folder with the pack's dataset.
        records: A knowledge folder with generated texts about items of the dataset.
        pack: The pack.
        scenario: What was asked; None: films.
        facts: The facts table.
        most: Texts of each corruption, at most.
        on_text: Told of texts judged so far, and of all; these are an estimate.

    Returns:
        `rows`, one for each half of each set of texts; `failures` of the pack; `accepted` generated texts; and
        `corruptions`, how many of each were found.

    Raises:
        PreconditionError: there is no dataset, or no knowledge in `records`.
    """
    scenario = scenario or load_scenario()
    dataset = work.read(Dataset)
    known = subjects(dataset, scenario, facts)
    released = Pack.load(pack)
    texts = {
        key: line.text for kind in EntityKind for key, line in released.lines.items() if key[0] == kind and key in known
    }
    rules = {kind: _rules(scenario, kind, released.header.templates.get(kind, "")) for kind in BOTH}
    generated = _generated(records, dataset) if records else {}
    judge("Load what is loaded once, such as the model of languages.", Subject(ITEM, ""), rules[ITEM])
    began = time.thread_time()
    verdicts = {key: list(judge(text, known[key], rules[key[0]])) for key, text in texts.items()}
    cpu_ms_per_text = (time.thread_time() - began) * 1e3 / max(len(texts), 1)
    done, total = len(texts), len(texts) + len(generated) + most * len(CORRUPTIONS)

    def judged(text: str, key: Key, by: Rules) -> list[records_pb2.Verdict]:
        nonlocal done
        done += 1
        on_text(done, total)
        return list(judge(text, known[key], by))

    written = {
        key: judged(record.text, key, _rules(scenario, key[0], record.template)) for key, record in generated.items()
    }
    for found, among in ((verdicts, texts), (written, {key: record.text for key, record in generated.items()})):
        for key, (other, likeness) in near_duplicates(among, known).items():
            reason = f"{likeness:.0%} of it stands in the text of {other[0]} {other[1]}"
            verdict = records_pb2.Verdict(gate=DUPLICATE_GATE, outcome=records_pb2.OUTCOME_FAILED, reason=reason)
            found[key].append(verdict)
    rows = []
    for kind in EntityKind:
        keys = [key for key in texts if key[0] == kind]
        for half, some in ((DEVELOPED, keys[::2]), (HELD_OUT, keys[1::2])):
            rows.append(_row(f"released, {kind}s", half, [verdicts[key] for key in some]))
    order = list(generated)
    if records:
        for half, some in ((DEVELOPED, order[:DEVELOPED_GENERATED]), (HELD_OUT, order[DEVELOPED_GENERATED:])):
            rows.append(_row("generated, items", half, [written[key] for key in some]))
    material = Material.of(dataset, texts, known, scenario)
    held_out = [key for kind in EntityKind for key in [key for key in texts if key[0] == kind][1::2]]
    corruptions = []
    for corruption in CORRUPTIONS:
        by: dict[EntityKind, Rules] = {kind: _without(rules[kind], corruption.withholds) for kind in BOTH}
        corruptions.append(_corrupted(corruption, held_out, material, by, most, judged))
    corruptions.append(_copied(held_out, material, most))
    return {
        "dataset": dataset.name,
        "pack": released.name,
        "gates_version": GATES_VERSION,
        "facts": _matched(dataset, scenario, facts),
        "rows": rows,
        "failures": [
            {"entity": kind, "id": entity, **_failed(verdicts[kind, entity])}
            for kind, entity in texts
            if _failed(verdicts[kind, entity])
        ],
        "accepted": [entity for kind, entity in order if not _failed(written[kind, entity])],
        "corruptions": corruptions,
        "cpu_ms_per_text": cpu_ms_per_text,
        "near_duplicates": _time_duplicates(),
        "machine": machine(),
    }


def _generated(folder: Path, dataset: Dataset) -> dict[Key, records_pb2.KnowledgeRecord]:
    """Texts about items, those that are quarantined included, in the order of the dataset."""
    entity = ITEM.number
    every = (*read_knowledge(folder, ITEM), *read_quarantine(folder))
    by_id = {record.id: record for record in every if record.entity == entity and record.text}
    return {(ITEM, item.id): by_id[item.id] for item in dataset.items if item.id in by_id}


def _rules(scenario: Scenario, entity: EntityKind, template: str) -> Rules:
    """The rules for texts that may answer another version of the template than the scenario's."""
    question = scenario.questions[entity]
    asked = question.model_copy(update={"template": template or question.template})
    return Rules.of(scenario.model_copy(update={entity: asked}), entity)


def _without(rules: Rules, fact: str) -> Rules:
    return replace(rules, allowed=rules.allowed - {fact})


def _corrupted(
    corruption: Corruption,
    keys: Sequence[Key],
    material: Material,
    rules: Mapping[EntityKind, Rules],
    most: int,
    judged: Callable[[str, Key, Rules], list[records_pb2.Verdict]],
) -> dict[str, Any]:
    """Corrupt texts that pass as they are; `found` by any of the gates that ought to, `failed` by any at all."""
    chance = random.Random(f"{SEED} {corruption.name}")
    keys = [key for key in keys if key[0] in corruption.kinds]
    tried: list[dict[str, str]] = []
    for key in chance.sample(keys, len(keys)):
        if len(tried) == most:
            break
        spoilt = corruption.spoil(chance, key, material)
        by = rules[key[0]]
        if spoilt is not None and not _failed(judge(material.texts[key], material.subjects[key], by)):
            tried.append(_failed(judged(spoilt, key, by)))
    return {
        "corruption": corruption.name,
        "gates": list(corruption.gates),
        "texts": len(tried),
        "found": sum(any(gate in found for gate in corruption.gates) for found in tried),
        "failed": sum(bool(found) for found in tried),
    }


def _copied(keys: Sequence[Key], material: Material, most: int) -> dict[str, Any]:
    """Give items the text of another one with the titles exchanged."""
    chance = random.Random(f"{SEED} copied")
    items = [key for key in keys if key[0] == ITEM]
    sources = chance.sample(items, min(most, len(items) // 2))
    targets = chance.sample([key for key in items if key not in set(sources)], len(sources))
    texts = dict(material.texts)
    for source, target in zip(sources, targets, strict=True):
        title, other = material.titles[source[1]], material.titles[target[1]]
        text = material.texts[source]
        texts[target] = text.replace(title, other) if title in text else f"{other}: {text}"
    found = near_duplicates(texts, material.subjects)
    hits = sum(target in found or source in found for source, target in zip(sources, targets, strict=True))
    name = "another film's text, titles exchanged"
    return {"corruption": name, "gates": [DUPLICATE_GATE], "texts": len(sources), "found": hits, "failed": hits}


def _matched(dataset: Dataset, scenario: Scenario, facts: FactsTable | None) -> dict[str, Any] | None:
    """How many items the facts table knows."""
    if facts is None:
        return None
    titles = [str(item.facts.get(scenario.item.title) or "") for item in dataset.items]
    years = [item.features.get("year") or year_of(title) for item, title in zip(dataset.items, titles, strict=True)]
    found = sum(facts.find(title, year) is not None for title, year in zip(titles, years, strict=True))
    return {"name": facts.name, "films": facts.size, "items": len(titles), "matched": found}


def _time_duplicates() -> dict[str, Any]:
    """How long near-duplicates are looked for among many texts of a hundred words."""
    chance = random.Random(SEED)
    words = [f"{first}{second}" for first in "bcdfghklmnprst" for second in range(1000)]
    texts = {number: " ".join(chance.choices(words, k=100)) for number in range(SCALE)}
    began = time.thread_time()
    near_duplicates(texts)
    return {"texts": SCALE, "cpu_s": time.thread_time() - began}


def gates_table(report: Mapping[str, Any]) -> Group:
    """What the gates said of which texts, and what they find, ready to print."""
    confusion = Table(title="texts that failed, and the gates that failed them", box=box.SIMPLE, padding=0)
    for column in ("texts", "half"):
        confusion.add_column(column, no_wrap=True)
    for column in ("judged", "failed"):
        confusion.add_column(column, justify="right", no_wrap=True)
    confusion.add_column("gates")
    for row in report["rows"]:
        gates = ", ".join(f"{gate} {failed}" for gate, (failed, _) in row["gates"].items() if failed)
        confusion.add_row(row["texts"], row["half"], f"{row['judged']:,}", f"{row['failed']:,}", gates)
    found = Table(title="released texts with one fault", box=box.SIMPLE, padding=0)
    for column in ("fault", "gates"):
        found.add_column(column)
    for column in ("texts", "found", "failed"):
        found.add_column(column, justify="right", no_wrap=True)
    for one in report["corruptions"]:
        rates = (f"{one[name] / one['texts']:.1%}" if one["texts"] else "" for name in ("found", "failed"))
        found.add_row(one["corruption"], ", ".join(one["gates"]), f"{one['texts']:,}", *rates)
    near = report["near_duplicates"]
    lines = [
        f"{report['cpu_ms_per_text']:.2f} ms of processor time a text; near-duplicates among {near['texts']:,} texts: "
        f"{near['cpu_s']:.1f} s"
    ]
    if report["facts"]:
        lines.append(
            "facts table {name}: {matched:,} of {items:,} items are among its {films:,}".format(**report["facts"])
        )
    return Group(confusion, found, *map(Text, lines))
