"""Owns packs: folders of released texts, which answer prompts in place of a language model.

<pack>/pack.toml                 optional: llm, created_at and the template of each kind
<pack>/{item,user}.jsonl         one {"id", "text"} a line; for users also "cutoff", the number of events used

A pack may be about one kind only. `item_knowledge.jsonl` is read like `item.jsonl`, and each file may end in `.xz`.
"""

import hashlib
import lzma
import tomllib
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, ClassVar, Final, Self

from pydantic import BaseModel, ConfigDict, Field

from kar_offline.generate.provider import Answer, Failure, Log, Origin, Question, Reply
from kar_sidecar.entities import EntityKind
from kar_sidecar.errors import IntegrityError, NotFoundError

__all__ = ["Pack"]

UNKNOWN: Final = "unknown"


class _Header(BaseModel):
    """The content of `pack.toml`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    llm: str = UNKNOWN
    created_at: datetime | None = None
    templates: Mapping[str, str] = Field(default_factory=dict)


class _Line(BaseModel):
    """One line of a pack; other members are ignored."""

    model_config = ConfigDict(frozen=True)

    id: str
    text: str
    cutoff: int = 0
    confidence: str = ""


@dataclass(frozen=True, slots=True)
class Pack:
    """Released texts as a provider. Construct with `Pack.load`."""

    provider: ClassVar[str] = "pack"
    attempts: ClassVar[int] = 0
    parameters: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    name: str
    header: _Header
    lines: Mapping[tuple[str, str], _Line]
    """Lines by kind and entity id."""
    sha256: str
    """Content hash."""

    @staticmethod
    def load(name: str) -> "Pack":
        """Read a pack by its name, if it comes with the product, or by its folder.

        Raises:
            NotFoundError: no such pack.
            IntegrityError: a file of the pack is missing or broken; the text names it.
        """
        shipped = resources.files("kar_offline.packs")
        shipped_names = sorted(entry.name for entry in shipped.iterdir() if entry.joinpath("pack.toml").is_file())
        folder: Traversable = shipped / name if name in shipped_names else Path(name)
        if not folder.is_dir():
            raise NotFoundError(
                f"no pack {name!r} (known: {', '.join(shipped_names)}): name one of them, or a pack's folder"
            )
        header_text = _text(folder / "pack.toml") if (folder / "pack.toml").is_file() else ""
        try:
            header = _Header.model_validate(tomllib.loads(header_text))
        except ValueError as error:
            raise IntegrityError(f"{folder / 'pack.toml'} does not describe a pack: {error}") from error
        paths = {kind: path for kind in EntityKind if (path := _file(folder, kind, header))}
        if not paths:
            raise NotFoundError(f"{folder} holds no pack: name a folder with item.jsonl, user.jsonl or both")
        texts = {kind: _text(path) for kind, path in paths.items()}
        lines: dict[tuple[str, str], _Line] = {}
        for kind, content in texts.items():
            for number, text in enumerate(content.split("\n"), 1):  # `splitlines` also cuts at U+2028
                if not text.strip():
                    continue
                place = f"{paths[kind]}:{number}"
                try:
                    line = _Line.model_validate_json(text)
                except ValueError as error:
                    raise IntegrityError(f"{place} is not a line of a pack: {error}") from error
                if (kind, line.id) in lines:
                    raise IntegrityError(f"{place} is about {kind} {line.id!r} for the second time: keep one")
                lines[kind, line.id] = line
        digest = hashlib.sha256("\0".join((header_text, *(texts.get(kind, "") for kind in EntityKind))).encode())
        return Pack(folder.name, header, lines, digest.hexdigest())

    @property
    def model(self) -> str:
        """The pack's name."""
        return self.name

    @property
    def provenance(self) -> str:
        """The model that wrote the pack, and the pack's content hash."""
        return f"{self.header.llm} sha256:{self.sha256[:12]}"

    @property
    def concurrency(self) -> int:
        """One: no answer has to be waited for."""
        return 1

    def cost_usd(self, input_tokens: int, output_tokens: int) -> float:
        """Zero: the texts exist already."""
        return 0.0

    def worst_usd(self, question: Question) -> float:
        """Zero, as `cost_usd`."""
        return 0.0

    async def __aenter__(self) -> Self:
        """Do nothing."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Do nothing."""

    async def ask(self, questions: Sequence[Question], log: Log) -> AsyncGenerator[Answer, None]:
        """See `Provider`; nothing is sent, so nothing is logged.

        Raises:
            IntegrityError: a text was written from other interactions than the prompt shows. Such a text may
                describe samples (leakage), or miss interactions.
        """
        lines = [(question, self._line(question)) for question in questions]
        for question, line in lines:
            if line is not None and line.cutoff != question.history_cutoff:
                raise IntegrityError(
                    f"pack {self.name!r} wrote about {question.entity} {question.id!r} from the first {line.cutoff} "
                    f"interactions but the prompt shows {question.history_cutoff} (leakage): "
                    "use the dataset of the pack"
                )
        for question, line in lines:
            if line is None:
                yield Answer(question, Failure("the pack does not know it", requests=0))
                continue
            template = self.header.templates.get(question.entity, UNKNOWN)
            origin = Origin(self.header.llm, template, self.header.created_at, line.confidence)
            yield Answer(question, Reply(line.text.strip(), 0, 0, requests=0, origin=origin))

    def text(self, kind: str, entity_id: str, cutoff: int) -> str:
        """The pack's text about an entity, if it was written from the first `cutoff` events; empty: there is none."""
        line = self.lines.get((kind, entity_id))
        return line.text.strip() if line and line.cutoff == cutoff else ""

    def _line(self, question: Question) -> _Line | None:
        line = self.lines.get((question.entity, question.id))
        return line if line and line.text.strip() else None


def _file(folder: Traversable, kind: str, header: _Header) -> Traversable | None:
    """The file about a kind; None where there is none and `pack.toml` names no template for it."""
    names = (f"{stem}.jsonl{suffix}" for stem in (kind, f"{kind}_knowledge") for suffix in ("", ".xz"))
    file = next((path for name in names if (path := folder / name).is_file()), None)
    return folder / f"{kind}.jsonl" if file is None and kind in header.templates else file


def _text(path: Traversable) -> str:
    try:
        content = path.read_bytes()
        return (lzma.decompress(content) if path.name.endswith(".xz") else content).decode()
    except (OSError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise IntegrityError(f"{path} cannot be read ({error}): restore the pack") from error
