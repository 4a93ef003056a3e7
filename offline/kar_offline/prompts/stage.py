"""Owns the stage `prompts`: a dataset and a scenario in, rendered prompts out.

prompts.jsonl     one `Prompt` a line: items, then users with a history
scenario.json     the scenario
templates/        copies of the templates that were used
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar, Final

from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.prompts.prompt import Prompt
from kar_offline.prompts.rendering import Renderer
from kar_offline.prompts.scenario import Scenario, load_scenario, own_templates
from kar_offline.stage_runner import StageResult, run_stage
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import ITEM, USER, EntityKind
from kar_sidecar.errors import PreconditionError

__all__ = [
    "KindReport",
    "RenderedPrompts",
    "read_prompts",
    "read_renderer",
    "read_scenario",
    "render_again",
    "render_prompts",
]

FILE: Final = "prompts.jsonl"
SCENARIO: Final = "scenario.json"
TEMPLATES: Final = "templates"


@dataclass(frozen=True, slots=True)
class KindReport:
    """The prompts about one kind of entity."""

    template: str
    prompts: int
    mean_words: float
    facts: Mapping[str, Sequence[str]]
    """Names of facts: "shown", "withheld" (in the data, not allowed) and "absent" (allowed, not in the data)."""
    suspicious: Mapping[str, int]
    """Number of values that were left out or cut because they look like instructions, by fact."""


class RenderedPrompts:
    """The content of a finished stage's folder; each file is read when it is first needed."""

    FOLDER: ClassVar[str] = "prompts"

    def __init__(self, folder: Path, prompts: Sequence[Prompt] | None = None) -> None:
        """Take the folder, and the prompts if they are already in memory."""
        self._folder, self._prompts = folder, prompts
        self._scenario: Scenario | None = None

    @staticmethod
    def load(folder: Path) -> "RenderedPrompts":
        """The content of `folder`."""
        return RenderedPrompts(folder)

    @property
    def prompts(self) -> Sequence[Prompt]:
        """The prompts; errors as for `read_prompts`."""
        if self._prompts is None:
            self._prompts = read_prompts(self._folder)
        return self._prompts

    @property
    def scenario(self) -> Scenario:
        """The scenario; errors as for `read_scenario`."""
        if self._scenario is None:
            self._scenario = read_scenario(self._folder)
        return self._scenario

    def renderer(self, on: date | None = None) -> Renderer:
        """A renderer with the scenario and the templates of the folder; errors as for `read_renderer`."""
        return Renderer(self.scenario, on, self._folder / TEMPLATES)


def render_prompts(work: WorkFolder, scenario: str | Path | None = None, on: date | None = None) -> StageResult:
    """Run the stage `prompts`: render the questions about the entities of `work`/dataset into `work`/prompts.

    The folder keeps the scenario and the templates, for `read_scenario` and `read_renderer`.

    Args:
        work: The work folder.
        scenario: The name of a scenario or a scenario file; None: movies.
        on: Prompts mention the seasons of this day; None: they mention no season.

    Raises:
        PreconditionError: there is no dataset.
        NotFoundError: there is no such scenario.
        InputError: the scenario or one of its templates is not valid.
    """
    return _render(work, Renderer(load_scenario(scenario), on, own_templates(scenario)))


def render_again(work: WorkFolder, renderer: Renderer) -> StageResult:
    """Run the stage again with a renderer of the scenario and the templates that are kept in `work`/prompts."""
    return _render(work, renderer)


def _render(work: WorkFolder, renderer: Renderer) -> StageResult:
    scenario = renderer.scenario
    dataset = work.read(Dataset)
    prompts: list[Prompt] = []

    def build(folder: Path) -> dict[str, Any]:
        renderer.withheld.clear()  # the report counts the values withheld from these prompts
        prompts.extend(renderer.render(dataset))
        (folder / FILE).write_text("".join(json.dumps(asdict(prompt)) + "\n" for prompt in prompts))
        (folder / SCENARIO).write_text(scenario.model_dump_json(indent=2) + "\n")
        for name, source in renderer.sources.items():
            path = folder / TEMPLATES / f"{name}.j2"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source, encoding="utf-8")
        seasons = {season.name: day.isoformat() for season, day in renderer.seasons}
        return {
            "scenario": scenario.name,
            "seasons": seasons,
            "kinds": {
                kind: asdict(_kind_report(kind, renderer, entities, prompts))
                for kind, entities in ((ITEM, dataset.items), (USER, dataset.users))
            },
        }

    params = {
        "scenario": scenario.model_dump(mode="json"),
        "templates": {name: hashlib.sha256(source.encode()).hexdigest() for name, source in renderer.sources.items()},
        # Prompts are the same on all days of a season.
        "seasons": [[season.name, day.isoformat()] for season, day in renderer.seasons],
    }
    inputs = {"dataset": work.dataset}
    result = run_stage("prompts", work.prompts, build, inputs=inputs, params=params, version=2)
    if result.ran:
        work.keep(RenderedPrompts(work.prompts, prompts))
    return result


def _kind_report(
    kind: EntityKind, renderer: Renderer, entities: Sequence[Entity], prompts: Sequence[Prompt]
) -> KindReport:
    in_data = dict.fromkeys(name for entity in entities for name in entity.facts)  # in the dataset's order
    allowed = renderer.scenario.questions[kind].allowed
    words = [len(prompt.prompt.split()) for prompt in prompts if prompt.entity == kind]
    return KindReport(
        template=renderer.names[kind],
        prompts=len(words),
        mean_words=round(mean(words or [0]), 1),
        facts={
            "shown": [name for name in allowed if name in in_data],
            "withheld": [name for name in in_data if name not in allowed],
            "absent": [name for name in allowed if name not in in_data],
        },
        suspicious={name: count for (entity, name), count in renderer.withheld.items() if entity == kind and count},
    )


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
    """The renderer of a finished stage, with the scenario and the templates that the stage used.

    Raises:
        PreconditionError: the stage did not run, or an older version of it did.
    """
    return Renderer(read_scenario(folder), on, folder / TEMPLATES)
