"""Owns docs/settings.md: every setting of the sidecar and the offline commands, in tables made from their fields.

python -m kar_offline.settings_page > docs/settings.md
"""

import re
from collections.abc import Iterator
from typing import Any, Final

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from kar_offline.cli_options import command_line
from kar_offline.settings import EncoderOptions, OptionTable, ProviderOptions
from kar_sidecar.settings import PREFIX, Settings

__all__ = ["settings_page"]

HEADER: Final = """# Settings

Every setting, with its default. All of them can be in one TOML file, which `--config FILE` names: the sidecar's at the
top level and in the tables `[experiment]` and `[aerospike]`, those of language models in `[llm]`, those of text
encoders in `[encoder]`. Strongest first: command line, environment, file, default. Unknown keys are refused. The key
of an endpoint is never in a file: set `$KAR_LLM_API_KEY`.

```toml
work = "var/mine"                 # sidecar and offline commands

[llm]                             # kar generate, kar refresh
provider = "openai"
base_url = "http://127.0.0.1:8000/v1"
model = "my-model"
price = [1.0, 4.0]
parameters = { temperature = 0, max_tokens = 300 }

[encoder]                         # kar encode, kar refresh
name = "minilm"
threads = 4
```

Units are part of the names: `_ms` milliseconds, `_s` seconds, `_usd` US dollars, `_chars` characters. This page is made
from the code: `python -m kar_offline.settings_page > docs/settings.md`.
"""
ABOUT_SIDECAR: Final = (
    "`kar sidecar` and `kar serve` read these; offline commands that use a store read `work`, `store` and `aerospike`."
)


def settings_page() -> str:
    """The page in Markdown."""
    parts = [
        HEADER,
        _section("Sidecar", ABOUT_SIDECAR, "environment", _sidecar_rows(Settings, "")),
        _section("Language models: `[llm]`", _sentence(ProviderOptions), "command line", _rows(ProviderOptions)),
        _section("Text encoders: `[encoder]`", _sentence(EncoderOptions), "command line", _rows(EncoderOptions)),
    ]
    return "\n".join(parts)


def _section(title: str, about: str, spelling: str, rows: Iterator[tuple[str, ...]]) -> str:
    lines = [f"## {title}", "", about, "", f"| setting | default | {spelling} | meaning |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows), ""])


def _sentence(table: type[BaseModel]) -> str:
    return (table.__doc__ or "").split("\n")[0]


def _sidecar_rows(table: type[BaseModel], prefix: str) -> Iterator[tuple[str, ...]]:
    """The rows of a table; a nested table is replaced by its rows."""
    for name, field in table.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _sidecar_rows(field.annotation, f"{prefix}{name}.")
        else:
            variable = f"{PREFIX}{prefix}{name}".replace(".", "__").upper()
            yield f"`{prefix}{name}`", _default(name, field), f"`{variable}`", _cell(field.description or "")


def _rows(table: type[OptionTable]) -> Iterator[tuple[str, ...]]:
    for name, field in table.model_fields.items():
        flags, variable = command_line(name, field)
        spellings = [*flags, *([f"${variable}"] if variable else [])]
        yield f"`{name}`", _default(name, field), ", ".join(f"`{s}`" for s in spellings), _cell(field.description or "")


def _default(name: str, field: FieldInfo) -> str:
    if field.default_factory is not None:  # each such setting lies in the work folder
        return f"{name} in `work`"
    default: Any = field.default
    if default is None or default == "":
        return "unset" if default is None else "empty"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, tuple):
        return f"`{list(default)}`"
    return f"`{default}`"


def _cell(text: str) -> str:
    return re.sub(r"\|", r"\\|", text)


if __name__ == "__main__":
    print(settings_page(), end="")
