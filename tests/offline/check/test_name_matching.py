import pytest

from kar_offline.check.name_matching import (
    Mention,
    Names,
    Words,
    fold,
    person_forms,
    title_forms,
    title_parts,
    whole_titles,
    year_of,
)

pytestmark = pytest.mark.unit


def found(text: str, *names: str) -> list[str]:
    words = Words.of(text)
    return [words.written(mention) for mention in words.mentions(Names.of(map(fold, names)))]


@pytest.mark.parametrize(
    ("title", "forms"),
    [
        ("Usual Suspects, The (1995)", ("the usual suspects", "usual suspects")),
        ("The Usual Suspects (1995)", ("the usual suspects", "usual suspects")),
        ("Postino, Il (1994)", ("il postino", "postino")),
        ("Seven (Se7en) (1995)", ("seven", "se7en")),
        ("Hate (Haine, La) (1995)", ("hate", "la haine", "haine")),
        (
            "Land Before Time III: The Time of the Great Giving (1995) (V)",
            ("land before time iii the time of the great giving",),
        ),
        ("1984 (1984)", ("1984",)),
        ("M (1931)", ("m",)),
        ("A (1998)", ("a",)),
        ("(1995)", ()),
        ("", ()),
        ("What's Up, Doc? (1972)", ("what s up doc",)),
        ("Angels & Insects (1995)", ("angels and insects",)),
        ("Áqua (C++ [x]* (2000)", ("aqua c x",)),
    ],
)
def test_titles_are_folded_as_catalogues_write_them(title: str, forms: tuple[str, ...]) -> None:
    assert title_forms(title) == forms


def test_whole_titles_keep_their_articles() -> None:
    assert whole_titles("Fear, The (1995)") == ("the fear",)
    assert whole_titles("Fear (1996)") == ("fear",)


@pytest.mark.parametrize(
    ("title", "parts"),
    [
        ("Star Trek: The Wrath of Khan (1982)", ("star trek", "the wrath of khan")),
        ("Three Colors: Blue (1993)", ("three colors",)),
        ("Heat (1995)", ()),
        ("Face/Off (1997)", ()),
    ],
)
def test_parts_of_two_words_stand_for_a_title(title: str, parts: tuple[str, ...]) -> None:
    assert title_parts(title) == parts


@pytest.mark.parametrize(
    ("title", "year"),
    [("Heat (1995)", 1995), ("2001: A Space Odyssey (1968)", 1968), ("1984", None), ("unknown", None)],
)
def test_the_year_of_a_title_stands_in_brackets(title: str, year: int | None) -> None:
    assert year_of(title) == year


def test_people_are_found_without_initials_too() -> None:
    assert person_forms("Samuel L. Jackson") == ("samuel l jackson", "samuel jackson")
    assert person_forms("Friðrik Þór Friðriksson") == ("fridrik thor fridriksson",)
    assert person_forms("...") == ()


@pytest.mark.parametrize(
    ("text", "names", "mentions"),
    [
        ("He loved Heat and Casino.", ("Heat", "Casino"), ["Heat", "Casino"]),
        ("The heat of the casino.", ("Heat", "Casino"), []),
        ("He gave 'sex, lies and videotape' a five.", ("sex, lies and videotape",), ["sex, lies and videotape"]),
        ("Batman Forever beats Batman.", ("Batman", "Batman Forever", "Forever"), ["Batman Forever", "Batman"]),
        ("AMÉLIE and amélie", ("Amélie",), ["AMÉLIE"]),
        ("Caf\u0065\u0301 Society", ("Café Society",), ["Café Society"]),
        ("Wallace & Gromit: A Close Shave", ("Wallace and Gromit",), ["Wallace & Gromit"]),
        ("M is a film. m is none.", ("M",), ["M"]),
        ("", ("Heat",), []),
    ],
)
def test_names_are_found_as_names_are_written(text: str, names: tuple[str, ...], mentions: list[str]) -> None:
    assert found(text, *names) == mentions


def test_a_mention_knows_its_quotation_marks() -> None:
    words = Words.of("Like 'Heat', not \"Frankenstein Meets the Wolf Man\" or Casino.")
    heat, man, casino = words.mentions(Names.of(("heat", "wolf man", "casino")))
    assert heat == Mention("heat", 1, 2)
    assert [words.quoted(mention) for mention in (heat, man, casino)] == [True, False, False]
    assert [words.ends_quote(mention) for mention in (heat, man, casino)] == [False, True, False]


def test_half_a_character_does_no_harm() -> None:
    assert Words.of("a \ud800 b").text == "a ? b"
