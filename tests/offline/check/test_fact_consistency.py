import pytest

from kar.records.v1 import records_pb2
from kar_offline.check.fact_consistency import facts
from kar_offline.check.gate_context import Rules, Subject
from kar_offline.check.gate_result import Finding
from kar_offline.check.name_matching import Names, Words, person_forms, title_forms
from kar_offline.prompts.scenario import load_scenario

pytestmark = pytest.mark.unit

RULES = Rules.of(load_scenario("movies"), "item")
CAST = (
    *("Al Pacino", "Robert De Niro", "Val Kilmer", "Jon Voight", "Tom Sizemore", "Diane Venora"),
    *("Amy Brenneman", "Ashley Judd", "Mykelti Williamson", "Wes Studi"),
)


def item(
    title: str = "Heat (1995)",
    *,
    directors: tuple[str, ...] = ("Michael Mann",),
    cast: tuple[str, ...] = CAST,
    years: tuple[int, ...] = (1995,),
    genres: tuple[str, ...] = ("Crime", "Drama"),
) -> Subject:
    people = [form for name in (*directors, *cast) for form in person_forms(name)]
    return Subject(
        "item",
        "1",
        Names.of((*title_forms(title), *people)),
        frozenset(title_forms(title)),
        directors=directors,
        cast=cast,
        years=years,
        genres=frozenset(genres),
    )


def judged(text: str, subject: Subject) -> Finding:
    words = Words.of(text)
    return facts(words, subject, RULES, tuple(words.mentions(subject.names)))


def outcome(text: str, subject: Subject) -> str:
    return records_pb2.Outcome.Name(judged(text, subject).outcome).removeprefix("OUTCOME_").lower()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A crime epic directed by Michael Mann.", "passed"),
        ("A crime epic written and directed by Mann.", "unknown"),  # one name alone is not told from a place
        ("A crime epic directed by Christopher Nolan.", "failed"),
        ("A crime epic directed with verve by the young Christopher Nolan.", "failed"),
        ("Christopher Nolan directs this crime epic.", "failed"),
        ("The film's director, Christopher Nolan, is in form.", "failed"),
        ("A crime drama by Christopher Nolan.", "failed"),
        ("Michael Mann directs. A communications director, George Smith, is in it.", "passed"),
        ("Written by Christopher Nolan.", "unknown"),
        ("It won Oscars for Best Director, Best Actor and Best Sound.", "unknown"),
        ("A crime epic directed by Mikhael Mannn.", "passed"),
        ("A crime epic directed by Alan Smithee.", "unknown"),
        ("", "unknown"),
    ],
)
def test_directors(text: str, expected: str) -> None:
    assert outcome(text, item()) == expected


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("Nana Djordjadze", "Nana Jorjadze"),
        ("Fridrik Thor Fridriksson", "Friðrik Þór Friðriksson"),
        ("Wu Tian-Ming", "Wu Tianming"),
        ("Yimou Zhang", "Zhang Yimou"),
        ("Robert Downey Sr.", "Robert Downey"),
    ],
)
def test_names_in_another_spelling_are_no_contradiction(name: str, known: str) -> None:
    assert outcome(f"A drama directed by {name}.", item(directors=(known,))) == "passed"


@pytest.mark.parametrize("who", ["starring Otto Mann", "from a book by Otto Mann", "with Otto Mann"])
def test_others_of_the_director_s_name_are_not_the_director(who: str) -> None:
    assert outcome(f"A crime epic directed by Christopher Nolan, {who}.", item(cast=())) == "failed"


def test_one_of_several_directors_is_enough() -> None:
    two = item(directors=("Ethan Coen", "Joel Coen"))
    assert outcome("A comedy directed by the brothers Joel Coen and friends.", two) == "passed"


def test_nobody_known_contradicts_nothing() -> None:
    assert outcome("A comedy directed by Ann Berg, starring Max Roth.", item(directors=(), cast=())) == "unknown"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A crime epic starring Al Pacino and somebody else.", "passed"),
        ("A crime epic starring Leonardo DiCaprio and Kate Winslet.", "failed"),
        ("Leonardo DiCaprio plays a detective.", "failed"),
        ("A crime epic with Leonardo DiCaprio as a detective.", "failed"),
        ("Leonardo DiCaprio plays a detective, Al Pacino a thief.", "passed"),
        ("Bruce Willis stars as wisecracking New York cop John McClane, with Al Pacino.", "passed"),
        ("A crime epic without a star.", "unknown"),
    ],
)
def test_actors(text: str, expected: str) -> None:
    assert outcome(text, item()) == expected


def test_a_short_list_of_actors_contradicts_nobody() -> None:
    assert outcome("A crime epic starring Leonardo DiCaprio.", item(cast=CAST[:9])) == "unknown"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Heat (1995) is long.", "passed"),
        ("Heat (1996) is long.", "passed"),
        ("Heat (2015) is long.", "failed"),
        ('"Heat" (2015) is long.', "failed"),
        ("In 2015's Heat a thief is hunted.", "failed"),
        ("Heat (1995), unlike Heat (1986), is long.", "passed"),
        ("It is a remake of Heat (1986).", "unknown"),
        ('Beside "White Heat" (1949) it seems long.', "unknown"),
        ('Beside "The Price of Heat" (1949) it seems long.', "unknown"),
        ("It is a 1972 film.", "failed"),
        ("This 1995 American crime epic movie is long.", "passed"),
        ("A remake of a 1942 Italian film.", "unknown"),
        ("Based on a 1989 television movie.", "unknown"),
        ("It was released in 1972.", "failed"),
        ("It was released in December 1995.", "passed"),
        ("Shelved, it was finally released in 1998.", "passed"),
        ("It was re-released in 2015.", "unknown"),
        ("It was released on DVD in 2004.", "unknown"),
        ("It is a 1970s film.", "failed"),
        ("It is a 1990s crime drama.", "passed"),
        ("It is set in 1972.", "unknown"),
        ("It was nominated for three Academy Awards in 2016.", "failed"),
        ("It won the Golden Lion in 1995.", "passed"),
        ("It took a 1984 Golden Globe.", "failed"),
        ("In 2019, it was nominated for an Emmy.", "failed"),
        ("Its star, who won an Oscar in 1993, is tired.", "unknown"),
        ("A man who worships Oscar Wilde in 1963.", "unknown"),
    ],
)
def test_years(text: str, expected: str) -> None:
    assert outcome(text, item(directors=(), cast=())) == expected


@pytest.mark.parametrize(
    ("title", "year", "text", "expected"),
    [
        ("1984 (1984)", 1984, "1984 is a bleak vision of a state that watches all.", "unknown"),
        ("1984 (1984)", 1984, "1984 (1984) is bleak.", "passed"),
        ("1984 (1984)", 1984, "1984 (1956) is bleak.", "failed"),
        ("2010 (1984)", 1984, "2010 is a sequel in which ships meet at Jupiter.", "unknown"),
        ("2010 (1984)", 1984, "This 2010 film is a sequel.", "failed"),  # as an article, it is a year
        ("M (1931)", 1931, "M (1951) is about a killer.", "failed"),
        ("M (1931)", 1931, "Peter Lorre is M, in 1931.", "unknown"),
        ("What? (C++ [a]* (2000)", 2000, "What C A (1990) is odd.", "failed"),
    ],
)
def test_titles_that_are_numbers_letters_or_patterns(title: str, year: int, text: str, expected: str) -> None:
    assert outcome(text, item(title, directors=(), cast=(), years=(year,))) == expected


@pytest.mark.parametrize(
    ("text", "genres", "expected"),
    [
        ("It is a horror film.", ("Comedy", "Romance"), "failed"),
        ("It is a horror film.", ("Sci-Fi", "Thriller"), "passed"),
        ("It is a documentary.", ("Crime", "Drama"), "failed"),
        ("It is a mock documentary.", ("Comedy", "Music"), "unknown"),
        ("This documentary about the city is warm.", ("Crime", "Drama"), "failed"),
        ("It is a western romance film.", ("Action", "Western"), "passed"),
        ("It is a slow, sad war drama.", ("Children's", "Comedy"), "unknown"),  # its head is a drama
        ("It is a romantic comedy about a baker.", ("Comedy", "Drama"), "passed"),
        ("It is a romantic comedy about a baker.", ("Horror", "Thriller"), "failed"),
        ("It is a family-oriented film that blends action and tears.", ("Children's", "Comedy"), "unknown"),
        ("She is a graduate filming a documentary about friends.", ("Comedy", "Romance"), "unknown"),
        ("It is a horror film.", ("Comedy",), "unknown"),  # one genre is what a catalogue made do with
        ("It is a horror film.", (), "unknown"),
        ("It is a horror film.", ("Comedy", "Fiction"), "unknown"),  # another catalogue's words
    ],
)
def test_genres(text: str, genres: tuple[str, ...], expected: str) -> None:
    assert outcome(text, item(directors=(), cast=(), genres=genres)) == expected


def test_the_reason_names_the_claim_and_what_is_known() -> None:
    finding = judged("Heat (2015) is a film directed by Christopher Nolan.", item())
    assert finding.reason == (
        "contradicts what is known: directed by Christopher Nolan (directed by Michael Mann); "
        "Heat (2015) (it is of 1995)"
    )


def test_texts_about_users_claim_nothing() -> None:
    assert outcome("He likes films directed by Christopher Nolan.", Subject("user", "1")) == "passed"
