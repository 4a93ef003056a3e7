"""Owns rendered prompts: what a prompt shows, and the same facts as plain text for the raw-text baseline.

A prompt shows the facts that its scenario allows and no others, as `untrusted` lets them pass.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Any, Final, Literal

import numpy as np
from jinja2 import (
    ChoiceLoader,
    FileSystemLoader,
    PackageLoader,
    StrictUndefined,
    TemplateError,
    meta,
)
from jinja2.sandbox import SandboxedEnvironment

from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.prompts.scenario import Scenario, Season, load_scenario, own_templates
from kar_offline.prompts.untrusted import (
    WITHHELD,
    Part,
    own_fact,
    own_title,
    plain,
    quoted,
    suspicious,
    title_elsewhere,
)
from kar_offline.stage_runner import StageResult, run_stage
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import ITEM, USER, EntityKind
from kar_sidecar.errors import InputError, PreconditionError

__all__ = [
    "History",
    "Prompt",
    "Renderer",
    "read_prompts",
    "read_renderer",
    "read_scenario",
    "render_again",
    "render_prompts",
]

Kind = Literal["factual", "reasoning"]
KINDS: Final[Mapping[EntityKind, Kind]] = {ITEM: "factual", USER: "reasoning"}
CLUSTERS: Final[Mapping[EntityKind, str]] = {ITEM: "cluster_item/1", USER: "cluster_user/1"}
FILE: Final = "prompts.jsonl"
SCENARIO: Final = "scenario.json"
TEMPLATES: Final = "templates"
CLUSTER_TITLES: Final = 20
"""The most titles that a prompt about a cluster shows, of each kind."""
CLUSTER_VALUES: Final = 5
"""The most values of one fact that it shows."""
LANGUAGES: Final = {
    "ar": "Arabic",
    "cs": "Czech",
    "da": "Danish",
    "de": "German",
    "el": "Greek",
    "en": "English",
    "es": "Spanish",
    "fi": "Finnish",
    "fr": "French",
    "he": "Hebrew",
    "hi": "Hindi",
    "hu": "Hungarian",
    "id": "Indonesian",
    "it": "Italian",
    "ja": "Japanese",
    "ko": "Korean",
    "nl": "Dutch",
    "no": "Norwegian",
    "pl": "Polish",
    "pt": "Portuguese",
    "ro": "Romanian",
    "ru": "Russian",
    "sv": "Swedish",
    "th": "Thai",
    "tr": "Turkish",
    "uk": "Ukrainian",
    "vi": "Vietnamese",
    "zh": "Chinese",
}

History = Sequence[tuple[Entity, float]]
"""Items with the ratings that one user gave them, oldest first."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question about one entity, or one cluster; the fields are those of a line of `prompts.jsonl`."""

    id: str
    kind: Kind
    entity: EntityKind
    template: str
    prompt: str
    prompt_sha256: str
    history_cutoff: int
    """The number of first events that it was written from, of which it shows the last; 0 for items and clusters."""
    raw_text: str
    """The facts that the prompt shows, without the instruction."""
    title: str
    """An item's name as shown; empty for users and clusters, and where it is withheld."""
    context: dict[str, str]
    """What of a season entered the prompt: its "season", "about" and "events"; empty outside of seasons."""
    expires_after_days: int | None
    """Age at which an answer is stale; None: never."""
    expires_on: str | None
    """ISO date: the day after which the season that entered is over; None: none did."""


class Renderer:
    """Renders the prompts of one scenario.

    Templates see `words`, `factors`, `language`, `wanted`, `least` and `most` (numbers of words), `season` (None, or
    its `about` and `events`; a template must name it itself, not include another that does) and `facts` by name. Those
    about users see `history`, pairs of title and rating, those about clusters `size`, and `titles` or `liked` and
    `disliked`, pairs of title and number. Text from outside is quoted already.

    Attributes:
        scenario: What is asked.
        seasons: The seasons of the day, with their last days.
        names: The names of the templates by entity kind.
        sources: The text of every known template by name.
        withheld: How many values were not shown, or not whole, for what they say: by entity kind and fact, and as
            "title elsewhere" for titles in the prompts of other entities.
    """

    def __init__(self, scenario: Scenario, on: date | None = None, templates: Path | None = None) -> None:
        """Load the scenario's templates.

        Args:
            scenario: What is asked.
            on: The day whose seasons enter prompts; None: no season does.
            templates: A folder with templates that come before ours.

        Raises:
            InputError: a template does not exist, or is no template.
        """
        self.scenario = scenario
        days = [(season, season.last_day(on)) for season in scenario.seasons] if on else []
        self.seasons: list[tuple[Season, date]] = [(season, day) for season, day in days if day]
        self.withheld: Counter[tuple[EntityKind, str]] = Counter()
        self.names = {kind: question.template for kind, question in scenario.questions.items()}
        loader = ChoiceLoader(
            [*([FileSystemLoader(templates)] if templates else []), PackageLoader("kar_offline.prompts")]
        )
        environment = SandboxedEnvironment(
            loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        known = [name.removesuffix(".j2") for name in environment.list_templates(["j2"])]
        if missing := [name for name in self.names.values() if name not in known]:
            raise InputError(
                f"scenario {scenario.name!r} asks for template {missing[0]!r} (known: {', '.join(known)}): name one of "
                "them"
            )
        try:
            self.sources = {name: loader.get_source(environment, f"{name}.j2")[0] for name in known}
            self._templates = {name: environment.get_template(f"{name}.j2") for name in known}
            # A template without a place for the season has none in its prompts.
            self._seasonal = {
                name
                for name, source in self.sources.items()
                if "season" in meta.find_undeclared_variables(environment.parse(source))
            }
        except (TemplateError, UnicodeDecodeError) as error:
            raise InputError(f"a template of scenario {scenario.name!r} is not valid ({error}): correct it") from error

    def _prompt(
        self,
        kind: EntityKind,
        entity_id: str,
        raw_text: str,
        *,
        template: str,
        title: str = "",
        cutoff: int = 0,
        **variables: object,
    ) -> Prompt:
        question = self.scenario.questions[kind]
        seasons = self._seasons(kind, template)
        context = {
            "season": "; ".join(season.name for season, _ in seasons),
            "about": " and ".join(season.about for season, _ in seasons),
            "events": "; ".join(event for season, _ in seasons for event in season.events),
        }
        least, most = question.words
        try:
            text = self._templates[template].render(
                words=self.scenario.words,
                factors=question.factors,
                language=LANGUAGES.get(self.scenario.language, f"the language with the code {self.scenario.language}"),
                wanted=min(max(round((least + most) // 2, -1), least), most),
                least=least,
                most=most,
                season=context if seasons else None,
                **variables,
            )
        except TemplateError as error:
            raise InputError(
                f"template {template!r} cannot ask about {kind}s ({error}): correct it, or name another in scenario "
                f"{self.scenario.name!r}"
            ) from error
        text = text.strip()
        return Prompt(
            id=entity_id,
            kind=KINDS[kind],
            entity=kind,
            template=template,
            prompt=text,
            prompt_sha256=hashlib.sha256(text.encode()).hexdigest(),
            history_cutoff=cutoff,
            raw_text=raw_text,
            title=title,
            context=context if seasons else {},
            expires_after_days=question.expires_after_days,
            expires_on=min(day for _, day in seasons).isoformat() if seasons else None,
        )

    def _title(self, item: Entity) -> str:
        title = item.facts.get(self.scenario.item.title)
        if not title:
            raise InputError(
                f"item {item.id!r} has no fact {self.scenario.item.title!r}: correct `title` in the scenario"
            )
        return str(title)

    def title(self, item: Entity) -> str:
        """What names an item in the prompts of other entities.

        Raises:
            InputError: the item lacks that fact.
        """
        shown = title_elsewhere(self._title(item), self.scenario.limits.title_chars)
        self.withheld[ITEM, "title elsewhere"] += shown == WITHHELD
        return shown

    def _facts(self, kind: EntityKind, entity: Entity) -> dict[str, list[Part]]:
        """The parts of the allowed facts of an entity, as they may be shown; not of an item's title."""
        facts = {}
        for name in self.scenario.questions[kind].allowed:
            value = entity.facts.get(name)
            if value in (None, "", []) or (kind == ITEM and name == self.scenario.item.title):
                continue
            shown = own_fact(value, self.scenario.limits.value_chars)
            self.withheld[kind, name] += shown.withheld
            if shown.parts:
                facts[name] = shown.parts
        return facts

    def factual(self, item: Entity) -> Prompt:
        """The question about one item.

        Raises:
            InputError: the item lacks the fact that names it, or the template cannot ask about an item.
        """
        name, whole = self.scenario.item.title, self._title(item)
        title = own_title(whole, self.scenario.limits.title_chars)
        self.withheld[ITEM, name] += suspicious(whole) is not None
        others = self._facts(ITEM, item)
        said = [f"{fact}: {plain(parts)}" for fact, parts in others.items()]
        facts: dict[str, list[Part]] = {name: [title or WITHHELD], **others}
        return self._prompt(
            ITEM,
            item.id,
            ". ".join([title or WITHHELD, *said]) + ".",
            template=self.names[ITEM],
            title=title,
            facts=_quoted(facts),
        )

    def reasoning(
        self, user: Entity, items: Sequence[Entity], ratings: Sequence[float], cutoff: int | None = None
    ) -> Prompt:
        """The question about one user, who rated these items (oldest first) so.

        `cutoff` is the number of all the user's events until now; default: these are all.

        Raises:
            InputError: an item lacks the fact that names it, or the template cannot ask about a user.
        """
        facts = self._facts(USER, user)
        history = [(self.title(item), plain(rating)) for item, rating in zip(items, ratings, strict=True)]
        profile = "".join(f"{name}: {plain(value)}. " for name, value in facts.items())
        rated = "; ".join(f"{title} {rating}" for title, rating in history)
        return self._prompt(
            USER,
            user.id,
            f"{profile}Ratings in {self.scenario.words.ratings}: {rated}.",
            template=self.names[USER],
            cutoff=len(history) if cutoff is None else cutoff,
            facts=_quoted(facts),
            history=[(quoted(title), rating) for title, rating in history],
        )

    def cluster(
        self, kind: EntityKind, cluster_id: str, members: Sequence[Entity], histories: Sequence[History] = ()
    ) -> Prompt:
        """The question about a cluster of similar items, or of similar users: what they share.

        It shows the titles of the first members and the values that at least two and a quarter of all have in common,
        of users the titles that most of them rated at or above the mean of all their ratings, and below it.

        Args:
            kind: What the members are.
            cluster_id: The id of the prompt.
            members: The members, those to be shown first.
            histories: Of users what prompts may show, one each.

        Raises:
            InputError: an item lacks the fact that names it, or the template cannot ask about a cluster.
        """
        common = self._common(kind, members)
        shown: dict[str, Any]
        if kind == ITEM:
            titles = [self.title(item) for item in members[:CLUSTER_TITLES]]
            shown, said = {"titles": list(map(quoted, titles))}, "; ".join(titles)
        else:
            liked, disliked = self._opinions(histories)
            shown = {"liked": [(quoted(t), n) for t, n in liked], "disliked": [(quoted(t), n) for t, n in disliked]}
            said = f"Liked: {_counted(liked, '; ')}. Disliked: {_counted(disliked, '; ')}"
        facts = "".join(f"{name}: {value}. " for name, value in common.items()).replace('"', "")
        return self._prompt(
            kind, cluster_id, f"{facts}{said}.", template=CLUSTERS[kind], size=len(members), facts=common, **shown
        )

    def _common(self, kind: EntityKind, members: Sequence[Entity]) -> dict[str, str]:
        """What many members have in common, by fact: values with the number of members, numbers as a range."""
        common = {}
        known = [self._facts(kind, member) for member in members]
        enough = max(2, len(members) / 4)
        for name in self.scenario.questions[kind].allowed:
            # `fromkeys`: a value counts once for a member, and values of equal counts keep their order.
            values = Counter(part for facts in known for part in dict.fromkeys(facts.get(name, ())))
            numbers = [value for value in values if isinstance(value, int | float)]
            often = [(quoted(value), n) for value, n in values.most_common(CLUSTER_VALUES) if n >= enough]
            if numbers:
                common[name] = f"{plain(min(numbers))} to {plain(max(numbers))}"
            elif often:
                common[name] = _counted(often, ", ")
        return common

    def _opinions(self, histories: Sequence[History]) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
        """Titles that most raters liked and disliked, each with how many did, most first."""
        ratings = [rating for history in histories for _, rating in history]
        middle = mean(ratings) if ratings else 0.0
        likes: Counter[str] = Counter()
        dislikes: Counter[str] = Counter()
        for history in histories:
            for item, rating in history:
                (likes if rating >= middle else dislikes)[self.title(item)] += 1
        sides = ((likes, dislikes), (dislikes, likes))
        liked, disliked = (
            [(title, n) for title, n in own.most_common() if n > other[title] and title != WITHHELD][:CLUSTER_TITLES]
            for own, other in sides
        )
        return liked, disliked

    def render(self, dataset: Dataset) -> Iterator[Prompt]:
        """The prompts of all items, then of all users with a history, each in dataset order."""
        for item in dataset.items:
            yield self.factual(item)
        for row in np.flatnonzero(dataset.cutoff):
            yield self.about_user(dataset, int(row))

    def about_user(self, dataset: Dataset, row: int) -> Prompt:
        """The question about one user row, from the events before its cut-off; errors as of `reasoning`."""
        events = dataset.prompt_events(row)
        items = [dataset.items[i] for i in dataset.event_item[events]]
        ratings = dataset.event_rating[events].tolist()
        return self.reasoning(dataset.users[row], items, ratings, int(dataset.cutoff[row]))

    def season(self, kind: EntityKind) -> str:
        """The seasons that enter prompts about one kind, as `Prompt.context` names them; empty: none does."""
        return "; ".join(season.name for season, _ in self._seasons(kind, self.names[kind]))

    def _seasons(self, kind: EntityKind, template: str) -> list[tuple[Season, date]]:
        return [(s, day) for s, day in self.seasons if kind in s.kinds and template in self._seasonal]


def _quoted(facts: Mapping[str, Sequence[Part]]) -> dict[str, str]:
    return {name: quoted(value) for name, value in facts.items()}


def _counted(values: Sequence[tuple[str, int]], between: str) -> str:
    return between.join(f"{value} ({number})" for value, number in values)


def render_prompts(work: WorkFolder, scenario: str | Path | None = None, on: date | None = None) -> StageResult:
    """Run the stage `prompts`: render the questions about `work`/dataset into `work`/prompts.

    The folder keeps the scenario and the templates, for `read_scenario` and `read_renderer`.

    Args:
        work: The work folder.
        scenario: The name of a scenario or a scenario file; None takes the one of films.
        on: The day whose seasons enter prompts; None: no season does.

    Raises:
        PreconditionError: there is no dataset.
        NotFoundError: there is no such scenario.
        InputError: the scenario or one of its templates is not valid.
    """
    return _render(work, Renderer(load_scenario(scenario), on, own_templates(scenario)))


def render_again(work: WorkFolder, on: date | None = None) -> StageResult:
    """`render_prompts` with the scenario and the templates that `work`/prompts was made with."""
    return _render(work, read_renderer(work.prompts, on))


def _render(work: WorkFolder, renderer: Renderer) -> StageResult:
    chosen = renderer.scenario
    dataset = work.read(Dataset)

    def build(folder: Path) -> dict[str, Any]:
        prompts = list(renderer.render(dataset))
        (folder / FILE).write_text("".join(json.dumps(asdict(prompt)) + "\n" for prompt in prompts))
        (folder / SCENARIO).write_text(chosen.model_dump_json(indent=2) + "\n")
        for name, source in renderer.sources.items():
            path = folder / TEMPLATES / f"{name}.j2"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source, encoding="utf-8")
        seasons = {season.name: day.isoformat() for season, day in renderer.seasons}
        return {
            "scenario": chosen.name,
            "seasons": seasons,
            "kinds": {
                ITEM: _about(ITEM, renderer, dataset.items, prompts),
                USER: _about(USER, renderer, dataset.users, prompts),
            },
        }

    params = {
        "scenario": chosen.model_dump(mode="json"),
        "templates": {name: hashlib.sha256(source.encode()).hexdigest() for name, source in renderer.sources.items()},
        # The days of a season make the same prompts.
        "seasons": [[season.name, day.isoformat()] for season, day in renderer.seasons],
    }
    return run_stage("prompts", work.prompts, build, inputs={"dataset": work.dataset}, params=params, version=2)


def _about(
    kind: EntityKind, renderer: Renderer, entities: Sequence[Entity], prompts: Sequence[Prompt]
) -> dict[str, Any]:
    held = dict.fromkeys(name for entity in entities for name in entity.facts)  # in the dataset's order
    allowed = renderer.scenario.questions[kind].allowed
    words = [len(prompt.prompt.split()) for prompt in prompts if prompt.entity == kind]
    return {
        "template": renderer.names[kind],
        "prompts": len(words),
        "mean_words": round(mean(words or [0]), 1),
        "facts": {
            "shown": [name for name in allowed if name in held],
            "withheld": [name for name in held if name not in allowed],
            "absent": [name for name in allowed if name not in held],
        },
        "suspicious": {name: number for (about, name), number in renderer.withheld.items() if about == kind and number},
    }


def read_prompts(folder: Path) -> list[Prompt]:
    """The prompts of a finished stage.

    Raises:
        PreconditionError: the stage did not run, or an older version of it did.
    """
    if not (folder / FILE).is_file():
        raise PreconditionError(f"no prompts in {folder}: run `kar prompts` first")
    try:
        lines = map(json.loads, (folder / FILE).read_text().splitlines())
        return [Prompt(**{**line, "entity": EntityKind(line["entity"])}) for line in lines]
    except (TypeError, ValueError) as error:
        raise PreconditionError(f"the prompts in {folder} are of another version: run `kar prompts` again") from error


def read_scenario(folder: Path) -> Scenario:
    """The scenario that the prompts of a finished stage were made with.

    Raises:
        PreconditionError: the stage did not run, or an older version of it did.
    """
    if not (folder / FILE).is_file():
        raise PreconditionError(f"no prompts in {folder}: run `kar prompts` first")
    try:
        return Scenario.model_validate_json((folder / SCENARIO).read_text())
    except (OSError, ValueError) as error:
        raise PreconditionError(f"the prompts in {folder} are of another version: run `kar prompts` again") from error


def read_renderer(folder: Path, on: date | None = None) -> Renderer:
    """The renderer of a finished stage, with the templates that it used then; for prompts about clusters.

    Raises:
        PreconditionError: the stage did not run, or an older version of it did.
    """
    return Renderer(read_scenario(folder), on, folder / TEMPLATES)
