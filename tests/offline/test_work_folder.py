"""A work folder reads a stage's output once, again after it changed, and not at all after it was kept."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from kar_offline.work_folder import WorkFolder

pytestmark = pytest.mark.unit


@dataclass(frozen=True)
class Note:
    FOLDER: ClassVar[str] = "note"
    loads: ClassVar[list[str]] = []

    text: str

    @staticmethod
    def load(folder: Path) -> "Note":
        text = (folder / "note.txt").read_text()
        Note.loads.append(text)
        return Note(text)


@pytest.fixture
def work(tmp_path: Path) -> WorkFolder:
    Note.loads.clear()
    (tmp_path / "note").mkdir()
    (tmp_path / "note" / "note.txt").write_text("first")
    return WorkFolder(tmp_path)


def test_content_is_read_once_and_again_after_it_changed(work: WorkFolder) -> None:
    assert work.read(Note) is work.read(Note)
    (work.folder("note") / "note.txt").write_text("second")
    assert work.read(Note).text == "second"
    assert Note.loads == ["first", "second"]


def test_kept_content_is_not_read_until_the_folder_changes(work: WorkFolder) -> None:
    note = Note("first")
    work.keep(note)
    assert work.read(Note) is note
    assert Note.loads == []
    (work.folder("note") / "note.txt").write_text("second")
    assert work.read(Note).text == "second"
