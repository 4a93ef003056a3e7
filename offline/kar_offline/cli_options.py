"""Owns the options that subcommands share: the work folder, the settings file, settings as options, the JSON report."""

import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, get_args, get_origin

import typer
from annotated_types import Ge
from pydantic.fields import FieldInfo

from kar_offline.settings import CommandLine, EncoderOptions, OptionTable, ProviderOptions
from kar_offline.work_folder import DEFAULT_WORK, WorkFolder
from kar_sidecar.errors import InputError
from kar_sidecar.settings import Settings

__all__ = [
    "DEFAULT_WORK",
    "ConfigFile",
    "JsonFile",
    "Offered",
    "OptionalWork",
    "Work",
    "command_line",
    "once",
    "refuse_unknown",
    "settings_as_options",
    "work_of",
    "write_json",
]

Work = Annotated[WorkFolder, typer.Option(parser=WorkFolder.at, metavar="PATH", help="Work folder.")]
OptionalWork = Annotated[
    WorkFolder | None,
    typer.Option("--work", parser=WorkFolder.at, metavar="PATH", help="Work folder.", show_default="var/demo"),
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the report to this file.")]
ConfigFile = Annotated[
    Path | None, typer.Option(help="TOML file of settings: tables llm and encoder, and those of `kar sidecar`.")
]
T = TypeVar("T")


class Offered(NamedTuple):
    """Marks a command's parameter: only these settings are options (no aliases); the others are set in the file."""

    settings: tuple[str, ...]


def settings_as_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each parameter of a command that is an `OptionTable` by one option for each of its settings.

    The command also has a parameter `config: ConfigFile`. Settings that are not given as options come from its file.

    Example:
        @settings_as_options
        def encode(encoder: EncoderOptions, config: ConfigFile = None) -> None: ...
    """
    tables: dict[str, tuple[type[OptionTable], Sequence[str]]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        table, offered = _table_of(parameter.annotation)
        if table is None:
            parameters.append(parameter)
            continue
        settings = offered.settings if offered else tuple(table.model_fields)
        tables[parameter.name] = table, settings
        for setting in settings:
            field = table.model_fields[setting]
            name, option = f"{parameter.name}_{setting}", _option(setting, field, aliases=offered is None)
            parameters.append(
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=None,
                    annotation=Annotated[_typed(field) | None, option],
                )
            )

    @wraps(command)
    def with_tables(**arguments: Any) -> None:
        for name, (table, settings) in tables.items():
            given = {setting: arguments.pop(f"{name}_{setting}") for setting in settings}
            arguments[name] = table.read(arguments["config"], **given)
        command(**arguments)

    keyword_only = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    with_tables.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
    with_tables.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_tables


def _table_of(annotation: Any) -> tuple[type[OptionTable] | None, Offered | None]:
    """The option table and the `Offered` mark in a parameter's annotation; None for each that it lacks."""
    table, *marks = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
    if not (isinstance(table, type) and issubclass(table, OptionTable)):
        return None, None
    return table, next((mark for mark in marks if isinstance(mark, Offered)), None)


def command_line(setting: str, field: FieldInfo) -> CommandLine:
    """The option names and the variable of a setting."""
    spelled = next((mark for mark in field.metadata if isinstance(mark, CommandLine)), CommandLine())
    return spelled if spelled.flags else spelled._replace(flags=(f"--{setting.replace('_', '-')}",))


def _option(setting: str, field: FieldInfo, *, aliases: bool) -> Any:
    flags, variable = command_line(setting, field)
    minimum = next((mark.ge for mark in field.metadata if isinstance(mark, Ge)), None)
    return typer.Option(
        *(flags if aliases else flags[:1]),
        help=field.description,
        envvar=variable,
        min=minimum,  # type: ignore[arg-type]  # a number, as numeric settings declare it
        show_default=False if field.default in (None, False) else str(field.default),
    )


def _typed(field: FieldInfo) -> Any:
    """The type that the command line reads; settings that are objects come as text."""
    kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not type(None)]
    if get_origin(kinds[0]) is dict:
        return str
    return field.annotation


def work_of(work: WorkFolder | None, config: Path | None) -> WorkFolder:
    """The work folder: as given, else as the environment or a settings file says, else the demo's.

    Raises:
        InputError: the file has an error, even in a table that the command does not read.
    """
    if config is None:
        return work or DEFAULT_WORK
    for table in (ProviderOptions, EncoderOptions):
        table.read(config)
    return WorkFolder(Settings.read(config, work=work and work.root).work)


def once(values: Sequence[T] | None) -> list[T]:
    """The values of a repeatable option in the order given, without repetitions."""
    return list(dict.fromkeys(values or ()))


def refuse_unknown(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Check that the values of an option are known.

    Raises:
        InputError: a value is not known; the text lists the known ones.
    """
    known = tuple(known)
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"{kind} {unknown[0]!r} is not known: choose from {', '.join(known)}")


def write_json(file: Path | None, report: object) -> None:
    """Write a report to `file`, if a file was named.

    Mappings and dataclasses become objects; numbers that are not finite become null.
    """
    if file is not None:
        file.write_text(json.dumps(_strict_json(report), indent=2, allow_nan=False) + "\n")


def _strict_json(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _strict_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: _strict_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_strict_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
