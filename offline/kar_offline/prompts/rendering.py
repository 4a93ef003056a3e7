"""Owns the rendering of prompts, and of the same facts as plain text for the raw-text baseline.

A prompt shows only the facts that its scenario allows, in the form that `untrusted` gives them.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, Final

import numpy as np

from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.prompts.common_facts import MOST_TITLES, common_facts, counted, opinions
from kar_offline.prompts.prompt import Prompt, PromptKind
from kar_offline.prompts.scenario import Scenario, Season
from kar_offline.prompts.template_set import TemplateSet
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
from kar_sidecar.entities import ITEM, USER, EntityKind
from kar_sidecar.errors import InputError

__all__ = ["History", "Renderer"]

PROMPT_KINDS: Final[Mapping[EntityKind, PromptKind]] = {ITEM: "factual", USER: "reasoning"}
CLUSTER_TEMPLATES: Final[Mapping[EntityKind, str]] = {ITEM: "cluster_item/1", USER: "cluster_user/1"}

History = Sequence[tuple[Entity, float]]
"""Items with the ratings that one user gave them, oldest first."""


class Renderer:
    """Renders the prompts of one scenario.

    The variables of templates are `words`, `factors`, `language`, `wanted`, `least` and `most` (numbers of words),
    `season` (None, or a mapping with `about` and `events`; a template must use it in its own text, not only through an
    include) and `facts` by name. Templates about users also have `history`, pairs of title and rating. Templates about
    clusters have `size`, and `titles` or `liked` and `disliked`, pairs of title and number. Text from the dataset is
    already quoted.

    Attributes:
        scenario: The scenario.
        seasons: The seasons of the day, with their last days.
        names: The names of the templates by entity kind.
        withheld: Number of values that were left out or cut because they look like instructions, by entity kind and
            fact; "title elsewhere" counts titles in the prompts of other entities.
    """

    def __init__(self, scenario: Scenario, on: date | None = None, templates: Path | None = None) -> None:
        """Load the scenario's templates.

        Args:
            scenario: The scenario.
            on: Prompts mention the seasons of this day; None: they mention no season.
            templates: Folder with templates that replace the product's templates of the same name.

        Raises:
            InputError: a template does not exist, or is not valid.
        """
        self.scenario = scenario
        last_days = [(season, season.last_day(on)) for season in scenario.seasons] if on else []
        self.seasons: list[tuple[Season, date]] = [(season, day) for season, day in last_days if day]
        self.withheld: Counter[tuple[EntityKind, str]] = Counter()
        self.names = {kind: question.template for kind, question in scenario.questions.items()}
        self._templates = TemplateSet(scenario, templates)

    @property
    def sources(self) -> Mapping[str, str]:
        """The text of every known template by name."""
        return self._templates.sources

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
        seasons = self._seasons(kind, template)
        context = {
            "season": "; ".join(season.name for season, _ in seasons),
            "about": " and ".join(season.about for season, _ in seasons),
            "events": "; ".join(event for season, _ in seasons for event in season.events),
        }
        text = self._templates.fill(template, kind, context if seasons else None, **variables)
        return Prompt(
            id=entity_id,
            kind=PROMPT_KINDS[kind],
            entity=kind,
            template=template,
            prompt=text,
            prompt_sha256=hashlib.sha256(text.encode()).hexdigest(),
            history_cutoff=cutoff,
            raw_text=raw_text,
            title=title,
            context=context if seasons else {},
            expires_after_days=self.scenario.questions[kind].expires_after_days,
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
        """The item's title as the prompts of other entities show it.

        Raises:
            InputError: the item has no title.
        """
        shown = title_elsewhere(self._title(item), self.scenario.limits.title_chars)
        self.withheld[ITEM, "title elsewhere"] += shown == WITHHELD
        return shown

    def _facts(self, kind: EntityKind, entity: Entity) -> dict[str, list[Part]]:
        """The allowed facts of an entity as lists of parts that may be shown; an item's title is left out."""
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
            InputError: the item has no title, or the template cannot ask about an item.
        """
        title_fact, full_title = self.scenario.item.title, self._title(item)
        title = own_title(full_title, self.scenario.limits.title_chars)
        self.withheld[ITEM, title_fact] += suspicious(full_title) is not None
        others = self._facts(ITEM, item)
        sentences = [f"{fact}: {plain(parts)}" for fact, parts in others.items()]
        facts: dict[str, list[Part]] = {title_fact: [title or WITHHELD], **others}
        return self._prompt(
            ITEM,
            item.id,
            ". ".join([title or WITHHELD, *sentences]) + ".",
            template=self.names[ITEM],
            title=title,
            facts=_quoted(facts),
        )

    def reasoning(
        self, user: Entity, items: Sequence[Entity], ratings: Sequence[float], cutoff: int | None = None
    ) -> Prompt:
        """The question about one user.

        Args:
            user: The user.
            items: The items that the user rated, oldest first.
            ratings: The ratings of these items.
            cutoff: Number of all events of the user so far; default: the number of `items`.

        Raises:
            InputError: an item has no title, or the template cannot ask about a user.
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
        """The question about a cluster of similar items, or of similar users: what they have in common.

        The prompt shows the facts of `common_facts`, and for items the titles of the first members, for users the
        titles of `opinions`.

        Args:
            kind: The members' kind.
            cluster_id: The id of the prompt.
            members: The members; the first ones' titles are shown.
            histories: For each user, the history that prompts may show; empty for items.

        Raises:
            InputError: an item has no title, or the template cannot ask about a cluster.
        """
        common = common_facts([self._facts(kind, member) for member in members], self.scenario.questions[kind].allowed)
        shown: dict[str, Any]
        if kind == ITEM:
            titles = [self.title(item) for item in members[:MOST_TITLES]]
            shown, text = {"titles": list(map(quoted, titles))}, "; ".join(titles)
        else:
            liked, disliked = opinions([[(self.title(item), rating) for item, rating in h] for h in histories])
            shown = {"liked": [(quoted(t), n) for t, n in liked], "disliked": [(quoted(t), n) for t, n in disliked]}
            text = f"Liked: {counted(liked, '; ')}. Disliked: {counted(disliked, '; ')}"
        facts = "".join(f"{name}: {value}. " for name, value in common.items()).replace('"', "")
        return self._prompt(
            kind,
            cluster_id,
            f"{facts}{text}.",
            template=CLUSTER_TEMPLATES[kind],
            size=len(members),
            facts=common,
            **shown,
        )

    def render(self, dataset: Dataset) -> Iterator[Prompt]:
        """The prompts of all items, then of all users with a history, each in dataset order."""
        for item in dataset.items:
            yield self.factual(item)
        for row in np.flatnonzero(dataset.cutoff):
            yield self.about_user(dataset, int(row))

    def about_user(self, dataset: Dataset, row: int) -> Prompt:
        """The question about one user row, from the events before its cut-off; errors as for `reasoning`."""
        events = dataset.prompt_events(row)
        items = [dataset.items[i] for i in dataset.event_item[events]]
        ratings = dataset.event_rating[events].tolist()
        return self.reasoning(dataset.users[row], items, ratings, int(dataset.cutoff[row]))

    def season(self, kind: EntityKind) -> str:
        """Names of the seasons that prompts about one kind mention, as in `Prompt.context`; empty: none."""
        return "; ".join(season.name for season, _ in self._seasons(kind, self.names[kind]))

    def _seasons(self, kind: EntityKind, template: str) -> list[tuple[Season, date]]:
        if not self._templates.shows_seasons(template):
            return []
        return [(season, day) for season, day in self.seasons if kind in season.kinds]


def _quoted(facts: Mapping[str, Sequence[Part]]) -> dict[str, str]:
    return {name: quoted(value) for name, value in facts.items()}
