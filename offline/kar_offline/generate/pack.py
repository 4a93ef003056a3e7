"""Owns packs: folders of released knowledge, which take the place of a language model.

<pack>/pack.toml                 llm, created_at and the template of each kind
<pack>/{item,user}.jsonl         one {"id", "text"} a line; users with the "cutoff" that the text was written from
"""

import hashlib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Final

from google.protobuf import timestamp_pb2
from pydantic import BaseModel, ConfigDict

from kar.records.v1 import records_pb2
from kar_offline.generate.records import ENTITY, KINDS
from kar_offline.prompts import Prompt
from kar_sidecar.errors import IntegrityError, NotFoundError

__all__ = ["Pack"]

UNKNOWN: Final = "unknown"


class _Header(BaseModel):
    """The content of `pack.toml`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    llm: str
    created_at: datetime
    templates: Mapping[str, str]


class _Line(BaseModel):
    """One line of a pack; members that are not named here describe the text and are not used."""

    model_config = ConfigDict(frozen=True)

    id: str
    text: str
    cutoff: int = 0


@dataclass(frozen=True, slots=True)
class Pack:
    """Released knowledge. Construct with `Pack.load`."""

    name: str
    header: _Header
    lines: Mapping[tuple[str, str], _Line]
    """By kind and entity id."""
    sha256: str
    """Content hash."""

    @staticmethod
    def load(name: str) -> "Pack":
        """Read a pack that comes with the product, by its name, or any other, by its folder.

        Raises:
            NotFoundError: no such pack.
            IntegrityError: a file of it is missing or broken; the text names it.
        """
        own = resources.files("kar_offline.packs")
        known = sorted(entry.name for entry in own.iterdir() if entry.joinpath("pack.toml").is_file())
        folder: Traversable = own / name if name in known else Path(name)
        if not folder.is_dir():
            raise NotFoundError(f"no pack {name!r} (known: {', '.join(known)}): name one of them, or a pack's folder")
        files = {file: _text(folder / file) for file in ("pack.toml", *(f"{kind}.jsonl" for kind in KINDS))}
        try:
            header = _Header.model_validate(tomllib.loads(files["pack.toml"]))
        except ValueError as error:
            raise IntegrityError(f"{folder / 'pack.toml'} does not describe a pack: {error}") from error
        lines: dict[tuple[str, str], _Line] = {}
        for kind in KINDS:
            for number, text in enumerate(files[f"{kind}.jsonl"].split("\n"), 1):  # `splitlines` also cuts at U+2028
                if not text.strip():
                    continue
                place = f"{folder / f'{kind}.jsonl'}:{number}"
                try:
                    line = _Line.model_validate_json(text)
                except ValueError as error:
                    raise IntegrityError(f"{place} is not a line of a pack: {error}") from error
                if (kind, line.id) in lines:
                    raise IntegrityError(f"{place} is about {kind} {line.id!r} for the second time: keep one")
                lines[kind, line.id] = line
        return Pack(folder.name, header, lines, hashlib.sha256("\0".join(files.values()).encode()).hexdigest())

    def records(self, prompts: Iterable[Prompt]) -> list[records_pb2.KnowledgeRecord]:
        """The records that answer the prompts, in their order; entities that the pack does not know are left out.

        Raises:
            IntegrityError: a text was written from other interactions than the prompt shows. Such a text may
                describe samples (leakage), or know less than it could.
        """
        found = []
        created_at = timestamp_pb2.Timestamp()
        created_at.FromDatetime(self.header.created_at)
        for prompt in prompts:
            line = self.lines.get((prompt.entity, prompt.id))
            if line is None or not line.text.strip():
                continue
            if line.cutoff != prompt.history_cutoff:
                raise IntegrityError(
                    f"pack {self.name!r} wrote about {prompt.entity} {prompt.id!r} from the first {line.cutoff} "
                    f"interactions but the prompt shows {prompt.history_cutoff} (leakage): use the dataset of the pack"
                )
            found.append(
                records_pb2.KnowledgeRecord(
                    id=prompt.id,
                    entity=ENTITY[prompt.entity],
                    text=line.text.strip(),
                    template=self.header.templates.get(prompt.entity, UNKNOWN),
                    prompt_sha256=UNKNOWN,
                    llm=self.header.llm,
                    history_cutoff=line.cutoff,
                    created_at=created_at,
                )
            )
        return found


def _text(path: Traversable) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{path} cannot be read ({error}): restore the pack") from error
