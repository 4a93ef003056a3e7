"""Owns the rendering of one release's Triton repository: model folders, their files and their bounded resources.

Model names contain the release id, and the Triton version is always 1. The id is the hash of the manifest, so the
manifest cannot list rendered files: export renders them afterwards from files that the manifest lists, and lists the
rendered files in a `files.json` beside them.
"""

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template
from typing import Final, Literal, get_args

from kar_kernels import Precision

__all__ = ["TARGETS", "Backbone", "Resources", "Sizes", "Target", "is_current", "render"]

Target = Literal["cpu", "gpu"]
TARGETS: Final[tuple[Target, ...]] = get_args(Target)

MAX_BATCH: Final = 64
MAX_INSTANCES: Final = 4
CANDIDATES: Final = -1
HERE: Final = Path(__file__).parent

# The names of `kar_sidecar.scoring`, which model code may not import; a test compares them.
BASE: Final = (
    "history_item",
    "history_rating",
    "user_categorical",
    "user_numeric",
    "item_index",
    "item_categorical",
    "item_numeric",
)
TOWERS: Final = ("user", "item")
OPTIONAL: Final = ("user_knowledge", "item_knowledge", "affinity", "item_vector", "history_vector", "history_weight")
"""Inputs of a backbone with knowledge; an input of size 0 is left out."""
SCORE: Final = ("score",)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a release's tensors; 0 for inputs that the knowledge model does not read."""

    history: int
    user_categorical: int
    user_numeric: int
    item_categorical: int
    item_numeric: int
    encoding: int
    user_knowledge: int = 0
    item_knowledge: int = 0
    affinity: int = 0
    vector: int = 0
    vector_events: int = 0

    @property
    def towers(self) -> tuple[str, ...]:
        """The adaptor's towers: kinds of entities with knowledge vectors."""
        return tuple(name for name in TOWERS if getattr(self, f"{name}_knowledge"))


@dataclass(frozen=True, slots=True)
class Backbone:
    """A backbone's Triton model name and ONNX file; with `ensemble`, the name of the adaptor -> backbone ensemble.

    A backbone with an ensemble reads knowledge vectors.
    """

    name: str
    onnx: Path
    ensemble: str = ""


@dataclass(frozen=True, slots=True)
class Resources:
    """Resources of one model: server instances, threads per instance, and microseconds to wait for a fuller batch."""

    instances: int
    threads: int
    queue_delay_us: int

    @staticmethod
    def of(target: Target, cores: int) -> "Resources":
        """On a CPU half of the cores, since sidecar and server need the other half; on a GPU one instance."""
        if target == "gpu":
            return Resources(instances=1, threads=1, queue_delay_us=200)
        share = max(1, cores // 2)
        instances = min(MAX_INSTANCES, share)
        return Resources(instances, threads=share // instances, queue_delay_us=0)


def render(
    target: Target,
    folder: Path,
    *,
    adaptor: str,
    adaptor_weights: Path,
    backbones: Sequence[Backbone],
    sizes: Sizes,
    precision: Precision = "float32",
    cores: int | None = None,
) -> list[Path]:
    """Write the repository `folder` for one target and return its files, sorted.

    Model files are hard links to the release's files or, where the file system has none, copies; either way the folder
    is complete when it is copied to a server. `precision` must be that of the adaptor's file. `cores` defaults to the
    number of cores that this process may use.
    """
    resources = Resources.of(target, cores or len(os.sched_getaffinity(0)))
    tensors = _tensors(sizes)
    common = asdict(resources) | {
        "max_batch": MAX_BATCH,
        "kind": "KIND_GPU" if target == "gpu" else "KIND_CPU",
    }

    def write(model: str, kind: str, inputs: Iterable[str], outputs: Iterable[str], **values: str) -> Path:
        version = folder / model / "1"
        version.mkdir(parents=True)
        ragged = kind != "ensemble"
        blocks = [_block("input", name, *tensors[name], ragged=ragged) for name in inputs]
        blocks += [_block("output", name, *tensors[name], ragged=False) for name in outputs]
        template = Template((HERE / kind / "config.pbtxt").read_text())
        config = template.substitute(common, name=model, tensors="\n".join(blocks), **values)
        (folder / model / "config.pbtxt").write_text(config)
        return version

    encoding = tuple(f"{name}_{part}" for name in sizes.towers for part in ("encoding", "present"))
    adapted = tuple(f"{name}_knowledge" for name in sizes.towers)
    optional = tuple(name for name in OPTIONAL if 0 not in tensors[name][1])
    version = write(adaptor, "adaptor", encoding, adapted, precision=precision)
    shutil.copyfile(HERE / "adaptor" / "model.py", version / "model.py")
    _link(adaptor_weights, version / "adaptor.safetensors")
    for backbone in backbones:
        inputs = BASE + optional if backbone.ensemble else BASE
        version = write(backbone.name, "backbone", inputs, SCORE)
        shutil.copyfile(HERE / "backbone" / "model.py", version / "model.py")
        _link(backbone.onnx, version / "model.onnx")
        if backbone.ensemble:
            write(
                backbone.ensemble,
                "ensemble",
                (*(name for name in inputs if name not in adapted), *encoding),
                SCORE,
                adaptor=adaptor,
                backbone=backbone.name,
                adaptor_maps=_maps(encoding, adapted),
                backbone_maps=_maps(inputs, SCORE),
            )
    return sorted(path for path in folder.rglob("*") if path.is_file())


def is_current(folder: Path) -> bool:
    """Whether the model code below `folder` is this package's, which fits the other packages that are installed."""
    package_code = {(HERE / kind / "model.py").read_bytes() for kind in ("adaptor", "backbone")}
    return all(path.read_bytes() in package_code for path in folder.rglob("model.py"))


def _tensors(sizes: Sizes) -> Mapping[str, tuple[str, tuple[int, ...]]]:
    """Triton data type and dims of every tensor, without the batch axis."""
    return {
        "history_item": ("INT64", (sizes.history,)),
        "history_rating": ("INT64", (sizes.history,)),
        "user_categorical": ("INT64", (sizes.user_categorical,)),
        "user_numeric": ("FP32", (sizes.user_numeric,)),
        "item_index": ("INT64", (CANDIDATES,)),
        "item_categorical": ("INT64", (CANDIDATES, sizes.item_categorical)),
        "item_numeric": ("FP32", (CANDIDATES, sizes.item_numeric)),
        "user_knowledge": ("FP32", (sizes.user_knowledge,)),
        "item_knowledge": ("FP32", (CANDIDATES, sizes.item_knowledge)),
        "affinity": ("FP32", (CANDIDATES, sizes.affinity)),
        "item_vector": ("FP32", (CANDIDATES, sizes.vector)),
        "history_vector": ("FP32", (sizes.vector_events, sizes.vector)),
        "history_weight": ("FP32", (sizes.vector_events,)),
        "user_encoding": ("FP32", (sizes.encoding,)),
        "user_present": ("BOOL", (1,)),
        "item_encoding": ("FP32", (CANDIDATES, sizes.encoding)),
        "item_present": ("BOOL", (CANDIDATES,)),
        "score": ("FP32", (CANDIDATES,)),
    }


def _block(kind: str, name: str, data_type: str, dims: tuple[int, ...], *, ragged: bool) -> str:
    flag = " allow_ragged_batch: true" if ragged and CANDIDATES in dims else ""
    return f'{kind} [ {{ name: "{name}" data_type: TYPE_{data_type} dims: {list(dims)}{flag} }} ]'


def _maps(inputs: Iterable[str], outputs: Iterable[str]) -> str:
    pairs = [("input_map", name) for name in inputs] + [("output_map", name) for name in outputs]
    return "\n".join(f'      {kind} {{ key: "{name}" value: "{name}" }}' for kind, name in pairs)


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
