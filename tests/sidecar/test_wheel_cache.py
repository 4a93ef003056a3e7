import shutil
import stat
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from kar_sidecar.content_hash import file_sha256
from kar_sidecar.errors import IntegrityError, NotFoundError, UnavailableError
from kar_sidecar.wheel_cache import WheelArchive, cache_folder, download_wheel, fetch

pytestmark = pytest.mark.unit

WHEEL = "demo-1.0-py3-none-any.whl"


def member(name: str, mode: int = 0o100644) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


def pack(folder: Path, *members: zipfile.ZipInfo) -> Path:
    wheel = folder / WHEEL
    with zipfile.ZipFile(wheel, "w") as file:
        for info in members:
            file.writestr(info, f"content of {info.filename}")
    return wheel


class Index:
    """Serves one wheel and counts the downloads."""

    def __init__(self, wheel: Path) -> None:
        self.wheel = wheel
        self.archive = WheelArchive("demo", "1.0", file_sha256(wheel))
        self.downloads = 0
        self.before_answer: Callable[[], object] = lambda: None

    def __call__(self, archive: WheelArchive, folder: Path) -> Path:
        assert archive == self.archive
        self.downloads += 1
        self.before_answer()
        return Path(shutil.copy(self.wheel, folder / WHEEL))


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return Index(
        pack(
            tmp_path,
            member("demo/bin/server", 0o100755),
            member("demo/data.txt"),
            member("other/readme.txt"),
        )
    )


def test_kept_members_lie_under_their_paths_with_their_executable_bits(index: Index, tmp_path: Path) -> None:
    folder = fetch(index.archive, keep=lambda name: name.startswith("demo/"), cache=tmp_path / "cache", download=index)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == ["demo/bin/server", "demo/data.txt"]
    assert (folder / "demo/data.txt").read_text() == "content of demo/data.txt"
    assert (folder / "demo/bin/server").stat().st_mode & stat.S_IXUSR
    assert not (folder / "demo/data.txt").stat().st_mode & stat.S_IXUSR


def test_a_second_call_downloads_nothing_unless_it_keeps_other_members(index: Index, tmp_path: Path) -> None:
    def get(prefix: str) -> Path:
        return fetch(index.archive, keep=lambda name: name.startswith(prefix), cache=tmp_path / "c", download=index)

    demo = get("demo/")
    assert get("demo/") == demo
    assert index.downloads == 1
    other = get("other/")
    assert index.downloads == 2
    assert (other / "other/readme.txt").is_file()
    assert not (other / "demo").exists()


def test_callers_at_the_same_time_get_the_same_whole_folder(index: Index, tmp_path: Path) -> None:
    both_downloading = threading.Barrier(2, timeout=30)
    index.before_answer = both_downloading.wait
    folders: list[Path] = []

    def call() -> None:
        folders.append(fetch(index.archive, keep=lambda _: True, cache=tmp_path / "cache", download=index))

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert index.downloads == 2
    assert len(folders) == 2
    assert folders[0] == folders[1]
    assert (folders[0] / "other/readme.txt").is_file()
    left = [path.name for path in (tmp_path / "cache" / "archives").iterdir() if path.name.startswith(".")]
    assert left == []


def test_a_changed_wheel_is_refused_by_name_and_leaves_nothing(index: Index, tmp_path: Path) -> None:
    index.wheel.write_bytes(index.wheel.read_bytes() + b"\0")
    with pytest.raises(IntegrityError, match=WHEEL):
        fetch(index.archive, keep=lambda _: True, cache=tmp_path / "cache", download=index)
    assert list((tmp_path / "cache" / "archives").iterdir()) == []


@pytest.mark.parametrize(
    "unsafe",
    [member("../escaped"), member("demo/../../escaped"), member("/escaped"), member("link", 0o120777)],
    ids=lambda info: info.filename,
)
def test_members_that_could_leave_the_folder_are_refused(unsafe: zipfile.ZipInfo, tmp_path: Path) -> None:
    index = Index(pack(tmp_path, unsafe))
    with pytest.raises(IntegrityError, match="unsafe member"):
        fetch(index.archive, keep=lambda _: True, cache=tmp_path / "cache", download=index)
    assert list(tmp_path.rglob("escaped")) == []


def test_keeping_nothing_is_an_error(index: Index, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"demo==1\.0"):
        fetch(index.archive, keep=lambda _: False, cache=tmp_path / "cache", download=index)


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KAR_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("KAR_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "kar"


@pytest.mark.service
def test_pip_downloads_a_wheel_for_an_older_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shelf, target = tmp_path / "shelf", tmp_path / "target"
    shelf.mkdir()
    target.mkdir()
    with zipfile.ZipFile(shelf / "demo-1.0-py3-none-any.whl", "w") as wheel:
        requires = "Requires-Python: >=3.11,<3.12\nRequires-Dist: does-not-exist\n"
        wheel.writestr("demo-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: demo\nVersion: 1.0\n{requires}")
        wheel.writestr("demo-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("demo-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    assert download_wheel(WheelArchive("demo", "1.0", ""), target).read_bytes() == next(shelf.iterdir()).read_bytes()
    with pytest.raises(UnavailableError, match=r"demo==2\.0 \(.*No matching distribution"):
        download_wheel(WheelArchive("demo", "2.0", ""), tmp_path / "empty")
