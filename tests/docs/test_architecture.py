"""docs/architecture.md lists the rooms that exist, each on its floor by import-linter; its picture shows them all."""

import importlib
import re
import tomllib
from itertools import groupby

import pytest
from tests.support.paths import DOCS, ROOT

pytestmark = pytest.mark.unit

PAGE = (DOCS / "architecture.md").read_text()
PACKAGES = (
    "sidecar/kar_sidecar",
    "offline/kar_offline",
    "offline/kar_bench",
    "kernels/kar_kernels",
    "kernels/kar_kernels_bench",
    "model_repository/kar_model_repository",
    "protos/kar",
)
TRIPS = (
    "A RankRequest and its response",
    "One rating to a training batch",
    "One text to the store",
    "One fresh event through refresh",
)
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]


def section(heading: str) -> str:
    """The text between a heading of the third level and the next heading."""
    return re.split(r"^##+ ", PAGE.partition(f"\n### {heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def table(package: str) -> list[tuple[int, str, str]]:
    """Floor, room and sentence of each row of a package's table."""
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| (.+) \|$", section(f"`{package}`"), flags=re.MULTILINE)
    return [(int(floor), room, sentence) for floor, room, sentence in rows]


def rooms_on_disk(package: str) -> set[str]:
    """Folders and modules directly inside a package."""
    files = [path.relative_to(ROOT / package) for path in (ROOT / package).rglob("*") if path.is_file()]
    rooms = {file.parts[0] if len(file.parts) > 1 else file.stem for file in files if "__pycache__" not in file.parts}
    return rooms - {"__init__"}


def floors_of_contract(package: str) -> dict[str, int]:
    """The floor of each room by the package's layers contract."""
    [layers] = [contract["layers"] for contract in CONTRACTS if contract.get("containers") == [package.split("/")[1]]]
    return {room: floor for floor, layer in enumerate(reversed(layers), 1) for room in layer.split(" | ")}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_table_lists_every_room_once_with_one_sentence(package):
    rows = table(package)
    assert sorted(room for _, room, _ in rows) == sorted(rooms_on_disk(package))
    assert [sentence for _, _, sentence in rows if not re.fullmatch(r"[^.]+(\.\w[^.]*)*\.", sentence)] == []
    assert [floor for floor, _, _ in rows] == sorted((floor for floor, _, _ in rows), reverse=True)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_floors_are_those_of_the_contracts(package):
    floors = {room: floor for floor, room, _ in table(package)}
    if (
        package == "model_repository/kar_model_repository"
    ):  # Triton loads its folders; they are not modules of a package
        assert set(floors.values()) == {1}
    else:
        assert floors == floors_of_contract(package)


@pytest.mark.parametrize("package", ["sidecar/kar_sidecar", "offline/kar_offline"])
def test_the_picture_shows_every_room(package):
    shown = re.findall(r">(\w+)</text>", (DOCS / "architecture.svg").read_text())
    assert rooms_on_disk(package) - set(shown) == set()


@pytest.mark.parametrize("trip", TRIPS)
def test_a_trip_names_functions_that_exist_and_enters_no_module_twice(trip):
    stops = re.findall(r"`(kar_\w+(?:\.\w+)*):(\w+(?:\.\w+)*)`", section(trip))
    assert len(stops) >= 3
    for module, function in stops:
        value = importlib.import_module(module)
        for name in function.split("."):
            value = getattr(value, name)
        assert callable(value) or isinstance(value, property), f"{module}:{function}"
    entered = [module for module, _ in groupby(module for module, _ in stops)]
    assert len(entered) == len(set(entered)), entered
