"""Owns a scenario's prompt templates: it finds them, checks them and fills them in."""

from pathlib import Path
from typing import Final

from jinja2 import ChoiceLoader, DictLoader, FileSystemLoader, PackageLoader, StrictUndefined, TemplateError, meta
from jinja2.sandbox import SandboxedEnvironment

from kar_offline.prompts.scenario import Scenario
from kar_sidecar.entities import EntityKind
from kar_sidecar.errors import InputError

__all__ = ["TemplateSet"]

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


class TemplateSet:
    """The templates that a scenario can use, by name such as "factual/2".

    Attributes:
        sources: The text of every template by name.
    """

    def __init__(self, scenario: Scenario, folder: Path | None = None) -> None:
        """Load the templates.

        Args:
            scenario: Names a template for each kind of entity.
            folder: Folder with templates that replace the product's templates of the same name.

        Raises:
            InputError: a template does not exist, or is not valid.
        """
        self._scenario = scenario
        loader = ChoiceLoader([*([FileSystemLoader(folder)] if folder else []), PackageLoader("kar_offline.prompts")])
        environment = SandboxedEnvironment(
            loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        available = [name.removesuffix(".j2") for name in environment.list_templates(["j2"])]
        named = [question.template for question in scenario.questions.values()]
        if missing := [name for name in named if name not in available]:
            raise InputError(
                f"scenario {scenario.name!r} asks for template {missing[0]!r} (known: {', '.join(available)}): name "
                "one of them"
            )
        try:
            self.sources = {name: loader.get_source(environment, f"{name}.j2")[0] for name in available}
            # Templates are compiled from the sources in memory, so that each file is read once.
            in_memory = DictLoader({f"{name}.j2": source for name, source in self.sources.items()})
            environment.loader = ChoiceLoader([in_memory, loader])
            self._templates = {name: environment.get_template(f"{name}.j2") for name in available}
            self._seasonal = {
                name
                for name, source in self.sources.items()
                if "season" in meta.find_undeclared_variables(environment.parse(source))
            }
        except (TemplateError, UnicodeDecodeError) as error:
            raise InputError(f"a template of scenario {scenario.name!r} is not valid ({error}): correct it") from error

    def shows_seasons(self, name: str) -> bool:
        """Whether a template has a place for the season."""
        return name in self._seasonal

    def fill(self, name: str, kind: EntityKind, context: dict[str, str] | None, **variables: object) -> str:
        """Fill in a template and return the prompt.

        Args:
            name: The template's name.
            kind: The kind of entity that is asked about.
            context: The seasons to mention, as in `Prompt.context`; None: none.
            **variables: Further variables of the template.

        Raises:
            InputError: the template does not fit the values.
        """
        scenario, question = self._scenario, self._scenario.questions[kind]
        least, most = question.words
        try:
            text = self._templates[name].render(
                words=scenario.words,
                factors=question.factors,
                language=LANGUAGES.get(scenario.language, f"the language with the code {scenario.language}"),
                wanted=min(max(round((least + most) // 2, -1), least), most),
                least=least,
                most=most,
                season=context,
                **variables,
            )
        except TemplateError as error:
            raise InputError(
                f"template {name!r} cannot ask about {kind}s ({error}): correct it, or name another in scenario "
                f"{scenario.name!r}"
            ) from error
        return text.strip()
