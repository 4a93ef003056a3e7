"""Owns rendered prompts: what an entity's prompt shows, and the same facts as plain text for the raw-text baseline.

Facts are data: they are cleaned of control characters and stand between double quotes, which they cannot close.
"""

import hashlib
import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Final, Literal

from jinja2 import PackageLoader, StrictUndefined, TemplateNotFound
from jinja2.sandbox import SandboxedEnvironment

from kar_offline.dataset.samples import Dataset, Entity
from kar_offline.prompts.scenario import Question, Scenario, load_scenario
from kar_offline.stage import StageResult, run_stage
from kar_sidecar.errors import InputError, PreconditionError

__all__ = ["Prompt", "Renderer", "clean", "quoted", "read_prompts", "render_prompts"]

Kind = Literal["factual", "reasoning"]
FILE: Final = "prompts.jsonl"
NOT_TEXT: Final = ("Cc", "Cf", "Cs")
"""Unicode categories that no name needs: controls, invisible format characters, lone surrogates."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question about one entity; the fields are those of a line of `prompts.jsonl`."""

    id: str
    kind: Kind
    entity: Literal["item", "user"]
    template: str
    prompt: str
    prompt_sha256: str
    history_cutoff: int
    """The number of first events that the prompt shows; 0 for items."""
    raw_text: str
    """The facts that the prompt shows, without the instruction."""


def clean(text: str) -> str:
    """Text on one line without control characters."""
    return " ".join("".join(" " if unicodedata.category(c) in NOT_TEXT else c for c in text).split())


def plain(value: object, quote: str = "") -> str:
    """A fact as text: strings cleaned and between quotes, whole numbers without a point, lists with commas."""
    if isinstance(value, str):
        return quote + clean(value.replace(quote, "'") if quote else value) + quote
    if isinstance(value, Sequence):
        return ", ".join(plain(part, quote) for part in value)
    return format(value, "g") if isinstance(value, float) else str(value)


def quoted(value: object) -> str:
    """A fact for a prompt: `plain`, with text between double quotes that it cannot close."""
    return plain(value, '"')


class Renderer:
    """Renders the prompts of one scenario."""

    def __init__(self, scenario: Scenario) -> None:
        """Load the scenario's templates.

        Raises:
            InputError: the scenario names a template version that does not exist.
        """
        self.scenario = scenario
        loader = PackageLoader("kar_offline.prompts")
        environment = SandboxedEnvironment(
            loader=loader,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters["quoted"] = quoted
        self.questions: Mapping[Kind, Question] = {"factual": scenario.factual, "reasoning": scenario.reasoning}
        self.names = {kind: f"{kind}/{question.template}" for kind, question in self.questions.items()}
        try:
            self._templates = {kind: environment.get_template(f"{name}.j2") for kind, name in self.names.items()}
        except TemplateNotFound as error:
            known = ", ".join(sorted(name.removesuffix(".j2") for name in environment.list_templates(["j2"])))
            raise InputError(
                f"scenario {scenario.name!r} asks for template {str(error).removesuffix('.j2')!r} (known: {known}): "
                "name one of them"
            ) from error
        sources = (loader.get_source(environment, f"{name}.j2")[0] for name in self.names.values())
        self.template_sha256 = [hashlib.sha256(source.encode()).hexdigest() for source in sources]

    def _prompt(self, kind: Kind, entity_id: str, raw_text: str, cutoff: int, **variables: object) -> Prompt:
        text = (
            self._templates[kind]
            .render(scenario=self.scenario, factors=self.questions[kind].factors, **variables)
            .strip()
        )
        digest = hashlib.sha256(text.encode()).hexdigest()
        entity: Literal["item", "user"] = "item" if kind == "factual" else "user"
        return Prompt(entity_id, kind, entity, self.names[kind], text, digest, cutoff, raw_text)

    def title(self, item: Entity) -> str:
        """The fact that names an item.

        Raises:
            InputError: the item lacks that fact.
        """
        title = item.facts.get(self.scenario.title)
        if not title:
            raise InputError(f"item {item.id!r} has no fact {self.scenario.title!r}: correct `title` in the scenario")
        return str(title)

    def factual(self, item: Entity) -> Prompt:
        """The question about one item."""
        title = self.title(item)
        facts = _known(item)
        others = [f"{name}: {plain(value)}" for name, value in facts.items() if name != self.scenario.title]
        return self._prompt("factual", item.id, ". ".join([plain(title), *others]) + ".", 0, facts=facts)

    def reasoning(self, user: Entity, items: Sequence[Entity], ratings: Sequence[float]) -> Prompt:
        """The question about one user, who rated these items (oldest first) so."""
        facts = _known(user)
        history = [(self.title(item), rating) for item, rating in zip(items, ratings, strict=True)]
        profile = [f"{name}: {plain(value)}. " for name, value in facts.items()]
        rated = "; ".join(f"{plain(title)} {plain(rating)}" for title, rating in history)
        raw_text = f"{''.join(profile)}Ratings in {self.scenario.ratings}: {rated}."
        return self._prompt("reasoning", user.id, raw_text, len(history), facts=facts, history=history)

    def render(self, dataset: Dataset) -> Iterator[Prompt]:
        """The prompts of all items, then of all users with a history, each in dataset order."""
        for item in dataset.items:
            yield self.factual(item)
        for row, user in enumerate(dataset.users):
            events = dataset.prompt_events(row)
            items = [dataset.items[i] for i in dataset.event_item[events]]
            if items:
                yield self.reasoning(user, items, dataset.event_rating[events].tolist())


def _known(entity: Entity) -> dict[str, Any]:
    return {name: value for name, value in entity.facts.items() if value not in (None, "", [])}


def render_prompts(work: Path, scenario: Path | None = None) -> StageResult:
    """Run the stage `prompts`: render the questions about `work`/dataset into `work`/prompts.

    Args:
        work: The work folder.
        scenario: A scenario file; None takes the one of films.

    Raises:
        PreconditionError: there is no dataset.
        NotFoundError: the scenario file does not exist.
        InputError: the scenario is not valid.
    """
    chosen = load_scenario(scenario)
    renderer = Renderer(chosen)
    dataset = Dataset.load(work / "dataset")

    def build(folder: Path) -> dict[str, Any]:
        prompts = list(renderer.render(dataset))
        (folder / FILE).write_text("".join(json.dumps(asdict(prompt)) + "\n" for prompt in prompts))
        words = {kind: [len(p.prompt.split()) for p in prompts if p.kind == kind] for kind in renderer.names}
        return {
            "scenario": chosen.name,
            "kinds": {
                kind: {"template": name, "prompts": len(words[kind]), "mean_words": round(mean(words[kind] or [0]), 1)}
                for kind, name in renderer.names.items()
            },
        }

    params = {"scenario": chosen.model_dump(mode="json"), "templates": renderer.template_sha256}
    return run_stage("prompts", work / "prompts", build, inputs={"dataset": work / "dataset"}, params=params, version=1)


def read_prompts(folder: Path) -> list[Prompt]:
    """The prompts of a finished stage.

    Raises:
        PreconditionError: the stage did not run.
    """
    if not (folder / FILE).is_file():
        raise PreconditionError(f"no prompts in {folder}: run `kar prompts` first")
    return [Prompt(**json.loads(line)) for line in (folder / FILE).read_text().splitlines()]
