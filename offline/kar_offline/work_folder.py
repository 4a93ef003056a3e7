"""Owns the layout of a work folder: a path for each stage's output, and a cache of the outputs that were loaded."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, Protocol, Self, TypeVar, cast

from kar_offline.stage_runner import folder_hash

__all__ = ["DEFAULT_WORK", "StageContent", "WorkFolder"]


class StageContent(Protocol):
    """The output of a stage, as an object that can be loaded from its folder."""

    FOLDER: ClassVar[str]
    """Name of the stage's folder in a work folder."""

    @staticmethod
    def load(folder: Path) -> Any:
        """Read the content of `folder`."""
        ...


T = TypeVar("T", bound=StageContent)


@dataclass(frozen=True)
class WorkFolder:
    """A folder that holds the outputs of all stages, each in a folder of its own.

    Example:
        >>> WorkFolder.at("var/demo").encoding.as_posix()
        'var/demo/encoding'
    """

    root: Path
    _contents: dict[type, tuple[str, Any]] = field(default_factory=dict, compare=False, repr=False)
    """By type: the content hash of the folder at the time of loading, and the loaded object."""

    @classmethod
    def at(cls, root: "str | Path | WorkFolder") -> Self:
        """The work folder at a path."""
        return cls(root.root if isinstance(root, WorkFolder) else Path(root))

    def __str__(self) -> str:
        return str(self.root)

    def __getstate__(self) -> dict[str, Any]:
        # The cache is not copied to other processes.
        return {"root": self.root, "_contents": {}}

    def read(self, content: type[T]) -> T:
        """The content of a stage's folder; it is loaded once, and again after the folder has changed.

        Raises:
            KarError: as `content.load` does.
        """
        folder = self.root / content.FOLDER
        version = folder_hash(folder)
        cached = self._contents.get(content)
        if cached is None or cached[0] != version:
            cached = (version, content.load(folder))
            self._contents[content] = cached
        return cast(T, cached[1])

    def keep(self, content: StageContent) -> None:
        """Remember content that was just written to its stage's folder, so that `read` does not read it again."""
        self._contents[type(content)] = (folder_hash(self.root / content.FOLDER), content)

    def folder(self, name: str) -> Path:
        """A folder whose name comes from an option, such as a second encoding."""
        return self.root / name

    @property
    def dataset(self) -> Path:
        """Samples, users and items (`kar dataset`)."""
        return self.root / "dataset"

    @property
    def prompts(self) -> Path:
        """Rendered prompts and their scenario (`kar prompts`)."""
        return self.root / "prompts"

    @property
    def knowledge(self) -> Path:
        """Checked knowledge records (`kar generate`)."""
        return self.root / "knowledge"

    @property
    def ledger(self) -> Path:
        """The ledger: every question to a language model, its answer and cost (`kar generate`)."""
        return self.root / "ledger.sqlite"

    @property
    def content(self) -> Path:
        """Vectors of the entities' facts, from which clusters are made (`kar generate --share`)."""
        return self.root / "content"

    @property
    def encoding(self) -> Path:
        """Text vectors (`kar encode`)."""
        return self.root / "encoding"

    @property
    def training(self) -> Path:
        """Trained models, one folder a run (`kar train`)."""
        return self.root / "training"

    @property
    def evaluation(self) -> Path:
        """Metrics of the trained models (`kar evaluate`)."""
        return self.root / "evaluation"

    @property
    def releases(self) -> Path:
        """Exported releases, one folder each (`kar export`)."""
        return self.root / "releases"

    @property
    def index(self) -> Path:
        """Index snapshots, by release and kind of entity (`kar publish`)."""
        return self.root / "index"

    @property
    def store(self) -> Path:
        """The LMDB store that serving reads by default (`kar publish`)."""
        return self.root / "store"

    @property
    def serving(self) -> Path:
        """Files of a running `kar serve`."""
        return self.root / "serving"


DEFAULT_WORK: Final = WorkFolder(Path("var/demo"))
