"""A file with one JSON object a line is read line by line, and a wrong line is named."""

import pytest
from pydantic import BaseModel

from kar_offline.jsonl import each_line
from kar_sidecar.errors import InputError

pytestmark = pytest.mark.unit


class Rating(BaseModel):
    item: str
    stars: int


def stars_of(rating: Rating) -> int:
    if rating.stars > 5:
        raise InputError(f"{rating.stars} stars are too many")
    return rating.stars


def read(path):
    return list(each_line(path, Rating, stars_of, "nothing was changed"))


def test_empty_lines_and_a_byte_order_mark_are_skipped(tmp_path):
    path = tmp_path / "ratings.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"item": "a", "stars": 3}\n\n{"item": "b", "stars": 4}\n')
    assert read(path) == [3, 4]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"item": "a", "stars": "many"}', "stars: "),
        (b'{"item": "a"}', "stars: Field required"),
        (b"not JSON", "Invalid JSON"),
        (b'{"item": "a", "stars": 6}', "6 stars are too many"),
        (b'{"item": "\xff", "stars": 1}', "line 3: "),
    ],
    ids=["type", "missing", "no JSON", "refused", "no UTF-8"],
)
def test_a_wrong_line_is_named_by_its_number(line, complaint, tmp_path):
    path = tmp_path / "ratings.jsonl"
    path.write_bytes(b'{"item": "a", "stars": 3}\n\n' + line + b"\n")
    with pytest.raises(InputError, match=r"ratings\.jsonl line 3: .*; nothing was changed") as raised:
        read(path)
    assert complaint in str(raised.value)
