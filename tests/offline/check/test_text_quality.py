import pytest

from kar.records.v1 import records_pb2
from kar_offline.check.gate_context import Rules
from kar_offline.check.gate_result import Finding
from kar_offline.check.name_matching import Words
from kar_offline.check.text_quality import complete, language, length, refusal, repetition, shape
from kar_offline.prompts.scenario import load_scenario

pytestmark = pytest.mark.unit

RULES = Rules.of(load_scenario("movies"), "item")
TEXT = (
    "Heat is Michael Mann's American crime epic. A weary detective, Al Pacino, hunts a disciplined thief, Robert De "
    "Niro, through a cold blue Los Angeles. Both men pay for their work with their private lives. The bank robbery and "
    "the quiet talk over coffee are famous. Critics admired its sweep, though some found it long. For patient viewers."
)


def outcome(finding: Finding) -> str:
    assert bool(finding.reason) == (finding.outcome != records_pb2.OUTCOME_PASSED)
    return records_pb2.Outcome.Name(finding.outcome).removeprefix("OUTCOME_").lower()


def test_a_good_text_passes_every_gate() -> None:
    words = Words.of(TEXT)
    findings = (
        *(refusal(words), language(words, RULES), length(words, RULES), complete(words, "stop")),
        *(repetition(words), shape(words, RULES)),
    )
    assert [outcome(finding) for finding in findings] == ["passed"] * 6


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I'm sorry, but I can't help with that.", "failed"),
        ("I’m unable to describe this film.", "failed"),
        ("As an AI language model, I have no opinions.", "failed"),
        ("I cannot provide details about it.", "failed"),
        ("I don't have enough information on this title.", "failed"),
        ("It would go against my guidelines to say so.", "failed"),
        ("There is no information available on this film.", "failed"),
        ("Sorry, Wrong Number is a thriller.", "passed"),
        ("A gambler who cannot provide for his son robs a bank.", "passed"),
        ("In 'I Can't Sleep' a killer haunts Paris.", "passed"),
        ("World War I cannot find its end in these trenches.", "failed"),  # a price of looking at folded words
        ("", "passed"),
    ],
)
def test_refusals_are_told_from_texts_about_refusing(text: str, expected: str) -> None:
    assert outcome(refusal(Words.of(text))) == expected


GERMAN = (
    "Der Film erzählt von einem müden Polizisten, der einen Dieb durch ein kaltes, blaues Los Angeles jagt. Beide "
    "Männer bezahlen ihre Arbeit mit ihrem Privatleben, und am Ende stehen sie sich gegenüber."
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TEXT, "passed"),
        (GERMAN, "failed"),
        (f"{TEXT} {GERMAN}", "failed"),
        (f"{GERMAN} {TEXT}", "failed"),
        (
            "これは疲れた刑事が冷静な泥棒を追う、ロサンゼルスを舞台にした犯罪映画です。二人の男は仕事のために私生活を犠牲にします。",
            "failed",
        ),
        (
            "Swept Away (Travolti da un insolito destino nell'azzurro mare d'Agosto) is an Italian comedy on an isle.",
            "passed",
        ),
        ("Heat.", "unknown"),
        ("", "unknown"),
    ],
)
def test_another_language_at_either_end_is_found(text: str, expected: str) -> None:
    assert outcome(language(Words.of(text), RULES)) == expected


def test_the_scenario_says_which_language_it_is() -> None:
    german = Rules.of(load_scenario("movies").model_copy(update={"language": "de"}), "item")
    assert outcome(language(Words.of(GERMAN), german)) == "passed"
    assert outcome(language(Words.of(TEXT), german)) == "failed"


def test_a_language_that_nobody_knows_is_unknown() -> None:
    klingon = Rules.of(load_scenario("movies").model_copy(update={"language": "xx"}), "item")
    assert outcome(language(Words.of(TEXT), klingon)) == "unknown"


@pytest.mark.parametrize(
    ("count", "expected"), [(0, "failed"), (24, "failed"), (25, "passed"), (180, "passed"), (181, "failed")]
)
def test_length_is_counted_in_words(count: int, expected: str) -> None:
    assert RULES.words == (25, 180)
    assert outcome(length(Words.of("word " * count), RULES)) == expected


@pytest.mark.parametrize(
    ("text", "finish", "expected"),
    [
        ("It ends.", "stop", "passed"),
        ("It ends.", "length", "failed"),
        ("He asks 'why?'", "stop", "passed"),
        ("(It ends.)", "stop", "passed"),
        ("It ends!\n", "stop", "passed"),
        ("終わり。", "stop", "passed"),
        ("It was also praised", "stop", "failed"),
        ("It was also praised,", "stop", "failed"),
        ("", "stop", "failed"),
    ],
)
def test_a_text_ends_with_a_sentence(text: str, finish: str, expected: str) -> None:
    assert outcome(complete(Words.of(text), finish)) == expected


CAST = "Don Sullivan, Fred Graham, Lisa Simone, Ann Bell, Max Roth and Shug Fisher"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{TEXT} Both men pay for their work with their private lives.", "failed"),
        ("the film was praised by critics and " * 4, "failed"),
        (
            "The plot was widely praised by all critics. The cast was widely praised by all critics. "
            "The score was widely praised by all critics. The look was widely praised by all critics.",
            "failed",
        ),
        ("very very very very very very very very very very", "failed"),
        (f"{TEXT} A fine cast has {CAST}. The warm work of {CAST} lifts a thin script about a lizard.", "passed"),
        ("one two three", "passed"),
        ("", "passed"),
    ],
)
def test_loops_are_told_from_names_that_come_twice(text: str, expected: str) -> None:
    assert outcome(repetition(Words.of(text))) == expected


@pytest.mark.parametrize(
    "text",
    [
        f"# Heat\n{TEXT}",
        f"Plot:\n{TEXT}",
        "- A crime epic.\n- A long one.",
        "1. A crime epic.\n2. A long one.",
        '{"text": "A crime epic."}',
        '[{"genre": "crime"}]',
        "```\nA crime epic.\n```",
        "A **crime** epic.",
        "| genre | crime |",
        "<p>A crime epic.</p>",
        "Sure! Heat is a crime epic.",
        "Certainly, here it is. Heat is a crime epic.",
        "Here is a paragraph about Heat: it is long.",
        "Assistant: Heat is a crime epic.",
        "<|im_start|>assistant Heat is a crime epic.",
        "[INST] Heat [/INST] is a crime epic.",
        "A crime epic. Let me know if you want more.",
        "See https://example.org for this crime epic.",
        "It has its genre, its director and leading actors, and more.",
        "Its plot and theme, mood and tone and production quality are good.",
        "Title: 'Heat' - genre: crime - director: Michael Mann.",
        "State only facts that you are sure of; leave a factor out rather than guess.",
        "The prompt asks for a crime epic.",
        "In this example, a crime epic is described.",
        "I have identified a crime epic.",
        "It seems that I'm fond of this crime epic.",
    ],
)
def test_what_is_no_prose_about_the_subject_fails(text: str) -> None:
    assert outcome(shape(Words.of(text), RULES)) == "failed"


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        "But I'm a Cheerleader is a satire of camps that mend girls.",
        "In 'I Have Dreamed' a singer says: enough.",
        "World War I had begun. Henry V and Elizabeth I have seen worse.",
        "Mission: Impossible, with one five: The Fugitive.",
        "He gives only four: nothing below. Two films matter: Heat and Casino.",
        "A satire of Startup.com culture, with good production quality and a sly plot.",
        "",
    ],
)
def test_prose_passes(text: str) -> None:
    assert outcome(shape(Words.of(text), RULES)) == "passed"
