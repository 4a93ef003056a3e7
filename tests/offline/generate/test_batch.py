import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.support.asking import Clock, Notes, questions, sha256
from tests.support.hostile import LIFE, Hostile, Plan
from tests.support.hostile_acts import answer, body, do_then_reset, reply, reset, truncate
from tests.support.hostile_exchange import Act, Exchange

from kar_offline.generate.batch import OpenAIBatch
from kar_offline.generate.batch_file import Limits
from kar_offline.generate.openai_chat import Price
from kar_offline.generate.provider import Answer, Failure, PendingBatch, Question, Reply
from kar_offline.openai_http.endpoint import Retry
from kar_sidecar.errors import BudgetError, InputError, UnavailableError

pytestmark = pytest.mark.service

KEY = "sk-very-secret"
FILMS = [f"Film {number}?" for number in range(6)]
Lines = list[str]


@pytest.fixture
def endpoint() -> Iterator[Hostile]:
    with Hostile() as server:
        yield server


class Asked:
    """What came of a run, up to its end or its error."""

    def __init__(self, endpoint: Hostile, prompts: list[str], notes: Notes | None = None, **options: Any) -> None:
        self.clock, self.notes, self.answers = Clock(), notes or Notes(), list[Answer]()
        settings = {"retry": Retry(3, 0.0), "sleep": self.clock.sleep, "clock": self.clock, "timeout_s": 20.0}
        self.batch = OpenAIBatch(endpoint.url, "tiny", KEY, **settings | options)
        self.prompts, self.error = prompts, None
        asyncio.run(self._ask())

    async def _ask(self) -> None:
        async with self.batch:
            try:
                async for answer in self.batch.ask(questions(*self.prompts), self.notes):
                    self.answers.append(answer)
            except (BudgetError, InputError, UnavailableError) as error:
                self.error = error

    @property
    def texts(self) -> dict[str, str]:
        """By prompt; every answer has to be the prompt's own."""
        for question, outcome in self.answers:
            assert isinstance(outcome, Reply)
            assert sha256(question.prompt) in outcome.text
        return {answer.question.prompt: answer.outcome.text for answer in self.answers}

    def killed(self) -> Notes:
        """The log of a run that got no answer, as the next run finds it."""
        by_sha = {sha256(prompt): prompt for prompt in self.prompts}
        opened = [
            PendingBatch(handle, [Question("item", "x", "", sha) for sha in shas]) for shas, handle in self.notes.sent
        ]
        assert all(sha in by_sha for open_ in opened for *_, sha, _ in open_.questions)
        return Notes(open=opened)


def changed(change: Callable[[Lines], Lines]) -> Plan:
    return Plan(results=lambda lines: (change(lines), []))


def refused(line: str, status: int, message: str = "too long") -> str:
    response = {"status_code": status, "request_id": "r", "body": {"error": {"message": message}}}
    return json.dumps({"id": "x", "custom_id": json.loads(line)["custom_id"], "response": response, "error": None})


def expired(line: str) -> str:
    error = {"code": "batch_expired", "message": "This request could not be executed before the batch expired."}
    return json.dumps({"id": "x", "custom_id": json.loads(line)["custom_id"], "response": None, "error": error})


def test_questions_travel_as_a_file_and_answers_come_back(endpoint: Hostile) -> None:
    seen: list[tuple[int, int]] = []
    run = Asked(endpoint, FILMS, parameters={"max_tokens": 9}, on_poll=lambda done, of: seen.append((done, of)))
    assert set(run.texts) == set(FILMS)
    assert run.error is None
    assert {a.outcome._replace(text="") for a in run.answers} == {Reply("", 2, 6, "stop", 60_000.0, 1)}
    ((shas, handle),) = run.notes.sent
    assert shas == [sha256(film) for film in FILMS]
    (batch,) = endpoint.batches.values()
    assert batch["metadata"] == {"kar": handle}
    lines = [json.loads(line) for line in endpoint.files["file-0"].splitlines()]
    assert lines[1] == {
        "custom_id": sha256("Film 1?"),
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "tiny", "messages": [{"role": "user", "content": "Film 1?"}], "max_tokens": 9},
    }
    assert endpoint.routes() == ["upload", "create", "poll", "poll", "poll", "content"]
    assert seen == [(0, 6)] * 3
    assert all(request.headers["authorization"] == f"Bearer {KEY}" for request in endpoint.requests)


def test_looks_become_rarer(endpoint: Hostile) -> None:
    endpoint.plans = [Plan(("validating", *["in_progress"] * 7, "completed"))]
    run = Asked(endpoint, FILMS, poll_s=9.0)
    assert run.clock.slept == [1.0, 2.0, 4.0, 8.0, 9.0, 9.0, 9.0]


@pytest.mark.parametrize(
    ("limits", "sizes"),
    [
        (Limits(lines=4), [4, 2]),
        (Limits(bytes=510), [2, 2, 2]),  # a line has 251 bytes
        (Limits(bytes=1), [1] * 6),
        (Limits(input_tokens=3), [3, 3]),  # seven characters are one token
    ],
)
def test_files_stay_within_limits(endpoint: Hostile, limits: Limits, sizes: list[int]) -> None:
    run = Asked(endpoint, FILMS, limits=limits)
    assert set(run.texts) == set(FILMS)
    assert [len(shas) for shas, _ in run.notes.sent] == sizes
    assert len({handle for _, handle in run.notes.sent}) == len(sizes)


def test_only_so_many_batches_are_under_way(endpoint: Hostile) -> None:
    Asked(endpoint, FILMS, limits=Limits(lines=2), at_once=2)
    ends = [at for at, route in enumerate(endpoint.routes()) if route == "content"]
    made = [at for at, route in enumerate(endpoint.routes()) if route == "create"]
    assert made[1] < ends[0] < made[2]


def test_the_same_prompt_is_paid_for_once(endpoint: Hostile) -> None:
    run = Asked(endpoint, ["Heat?", "Ran?", "Heat?"])
    assert [len(shas) for shas, _ in run.notes.sent] == [2]
    heat = {answer.question.id: answer.outcome for answer in run.answers if answer.question.prompt == "Heat?"}
    assert heat["0"].text == heat["2"].text
    assert [(o.input_tokens, o.output_tokens, o.requests) for o in heat.values()] == [(1, 6, 1), (0, 0, 0)]
    assert endpoint.prompts == {"Heat?": 1, "Ran?": 1}


@pytest.mark.parametrize("act", [do_then_reset, truncate])
def test_an_order_whose_answer_was_lost_is_not_sent_again(endpoint: Hostile, act: Act) -> None:
    endpoint.scripts["create"] = [act]
    run = Asked(endpoint, FILMS)
    assert set(run.texts) == set(FILMS)
    assert len(endpoint.batches) == 1
    assert endpoint.routes().count("create") == 1


def test_an_order_that_never_came_is_sent_again(endpoint: Hostile) -> None:
    endpoint.scripts["create"] = [reset, reply(503), answer]
    assert set(Asked(endpoint, FILMS).texts) == set(FILMS)
    assert endpoint.routes().count("create") == 3
    assert len(endpoint.batches) == 1


def test_a_run_that_lost_sight_of_its_batch_is_followed_by_one_that_finds_it(endpoint: Hostile) -> None:
    endpoint.scripts["create"] = [do_then_reset]
    endpoint.scripts["list"] = [reset] * 3
    first = Asked(endpoint, FILMS)
    assert isinstance(first.error, UnavailableError)
    assert first.answers == []
    second = Asked(endpoint, FILMS, first.killed())
    assert set(second.texts) == set(FILMS)
    assert second.notes.sent == []
    assert set(endpoint.prompts.values()) == {1}


@pytest.mark.parametrize("kill", [0, 1, 2, 3, 4, 5])
def test_a_run_killed_anywhere_is_followed_by_one_that_pays_for_the_rest_alone(endpoint: Hostile, kill: int) -> None:
    # The wire goes dead for good at the nth request of a run with two batches, as if the process had been killed.
    class Killed(Exception):
        pass

    async def die(_: object) -> None:
        raise Killed

    routes = ["upload", "create", "upload", "create", "poll", "poll"]
    nth = routes[:kill].count(routes[kill])
    endpoint.scripts[routes[kill]] = [*[answer] * nth, do_then_reset]
    notes = Notes()
    with pytest.raises(Killed):
        Asked(endpoint, FILMS, notes, limits=Limits(lines=3), sleep=die, retry=Retry(2, 1.0))
    known = {batch["metadata"]["kar"] for batch in endpoint.batches.values()}
    opened = [PendingBatch(handle, [Question("item", "x", "", sha) for sha in shas]) for shas, handle in notes.sent]
    before = len(endpoint.requests)
    second = Asked(endpoint, FILMS, Notes(open=opened), limits=Limits(lines=3))
    assert set(second.texts) == set(FILMS)
    assert set(endpoint.prompts.values()) == {1}
    lost = [sha for shas, handle in notes.sent if handle not in known for sha in shas]
    told = [sha for shas, _ in notes.sent for sha in shas]
    fresh = [sha256(film) for film in FILMS if sha256(film) not in told]
    assert sorted(sha for shas, _ in second.notes.sent for sha in shas) == sorted(lost + fresh)
    assert [exchange.route for exchange in endpoint.requests[before:]].count("create") == 2 - len(known)


def test_a_list_that_lags_behind_is_looked_at_again(endpoint: Hostile) -> None:
    endpoint.scripts["poll"] = [reply(404)]
    first = Asked(endpoint, FILMS)
    assert isinstance(first.error, InputError)
    endpoint.blind = 1
    second = Asked(endpoint, FILMS, first.killed(), poll_s=45.0)
    assert set(second.texts) == set(FILMS)
    assert second.clock.slept[0] == 45.0
    assert len(endpoint.batches) == 1


def test_a_batch_is_found_on_a_later_page(endpoint: Hostile) -> None:
    endpoint.scripts["poll"] = [reply(404)]
    first = Asked(endpoint, FILMS)
    Asked(endpoint, [f"Other {number}?" for number in range(5)], limits=Limits(lines=1))
    endpoint.page = 2
    assert set(Asked(endpoint, FILMS, first.killed()).texts) == set(FILMS)
    assert len(endpoint.batches) == 6
    assert [r.query["after"] for r in endpoint.requests if r.route == "list" and "after" in r.query] == [
        "batch-4",
        "batch-2",
    ]


def test_a_list_without_end_pays_for_nothing(endpoint: Hostile) -> None:
    endpoint.scripts["list"] = [body({"data": [{"id": "a"}], "has_more": True})] * 9
    run = Asked(endpoint, FILMS, Notes(open=[PendingBatch("kar-lost", questions(*FILMS))]))
    assert isinstance(run.error, UnavailableError)
    assert "lists the same batches without end" in str(run.error)
    assert endpoint.batches == {}


def test_what_earlier_runs_left_open_about_other_questions_is_left_alone(endpoint: Hostile) -> None:
    run = Asked(endpoint, FILMS, Notes(open=[PendingBatch("kar-lost", questions("Another?"))]))
    assert set(run.texts) == set(FILMS)
    assert "list" not in endpoint.routes()


def test_an_open_question_that_was_sent_twice_belongs_to_the_later_batch(endpoint: Hostile) -> None:
    endpoint.scripts["poll"] = [reply(404), reply(404)]
    first, second = Asked(endpoint, FILMS), Asked(endpoint, FILMS)
    third = Asked(endpoint, FILMS, Notes(open=first.killed().open + second.killed().open))
    assert set(third.texts) == set(FILMS)
    assert len(third.answers) == 6
    assert [r.path for r in endpoint.requests if r.route == "content"] == ["/v1/files/batch-1-output/content"]


def test_a_question_at_fault_fails_alone(endpoint: Hostile) -> None:
    endpoint.plans = [Plan(results=lambda lines: (lines[1:], [refused(lines[0], 400, f"too long {KEY}\x00\ud800")]))]
    run = Asked(endpoint, FILMS)
    failures = [answer for answer in run.answers if isinstance(answer.outcome, Failure)]
    assert [(a.question.prompt, a.outcome) for a in failures] == [
        ("Film 0?", Failure("refused with status 400: too long ***\ufffd"))
    ]
    assert len(run.answers) == 6
    assert run.error is None


def test_a_batch_of_refusals_alone_means_that_the_request_is_wrong(endpoint: Hostile) -> None:
    plan = Plan(results=lambda lines: ([], [refused(line, 400) for line in lines]))
    endpoint.plans = [plan]
    first = Asked(endpoint, FILMS)
    assert isinstance(first.error, InputError)
    assert "refused all 6 questions of a batch (last: refused with status 400: too long)" in str(first.error)
    assert first.answers == []
    # The same command again, without a change: then the refusals are believed.
    second = Asked(endpoint, FILMS, first.killed())
    assert {a.outcome for a in second.answers} == {Failure("refused with status 400: too long")}
    assert second.error is None
    assert len(endpoint.batches) == 1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda lines: lines[2:],
        lambda lines: [*lines[2:], lines[0][:50], "{}"],
        lambda lines: [*lines[2:], "", "null", "[]", "7", '{"custom_id": ["a"], "response": null}', "[" * 10_000],
        lambda lines: [*lines[2:], refused(lines[0], 500), refused(lines[1], 429)],
        lambda lines: [*lines[2:], lines[0].replace('"choices"', '"choice"'), lines[1].replace("200", "1e999")],
        lambda lines: [*lines[2:], lines[0].replace('"response"', '"answer"'), expired(lines[1])],
        lambda lines: [*lines[2:], lines[0].replace('"custom_id": "', '"custom_id": "x')],
    ],
)
def test_what_a_file_of_results_lacks_is_asked_again(endpoint: Hostile, spoil: Callable[[Lines], Lines]) -> None:
    endpoint.plans = [changed(spoil)]
    run = Asked(endpoint, FILMS)
    assert set(run.texts) == set(FILMS)
    assert len(run.answers) == 6
    assert [shas for shas, _ in run.notes.sent[1:]] == [[sha256("Film 0?"), sha256("Film 1?")]]


def test_results_that_were_broken_on_the_way_are_fetched_again_and_not_paid_again(endpoint: Hostile) -> None:
    async def cut(exchange: Exchange) -> None:
        exchange.send(200, exchange.right()[:-20])  # a whole answer, for all that its length says

    endpoint.scripts["content"] = [cut, cut]
    assert set(Asked(endpoint, FILMS).texts) == set(FILMS)
    assert len(endpoint.batches) == 1


@pytest.mark.parametrize("content", ["<html>busy</html>", "[]", "{}\n{}"])
def test_what_is_no_file_of_results_at_all_is_never_believed(endpoint: Hostile, content: str) -> None:
    endpoint.scripts["content"] = [reply(200, content)] * 12
    assert set(Asked(endpoint, FILMS).texts) == set(FILMS)
    assert len(endpoint.batches) == 1


def test_a_complete_batch_without_results_is_waited_for(endpoint: Hostile) -> None:
    endpoint.plans = [Plan(results=lambda lines: ([], []))]
    run = Asked(endpoint, FILMS)
    assert isinstance(run.error, UnavailableError)
    assert "batch batch-0 is complete but has no results" in str(run.error)
    assert len(endpoint.batches) == 1


def test_results_that_are_no_longer_kept_are_asked_for_again_by_the_next_run(endpoint: Hostile) -> None:
    endpoint.scripts["content"] = [reply(404), reply(404)]
    first = Asked(endpoint, FILMS)
    assert isinstance(first.error, InputError)
    assert len(endpoint.batches) == 1
    second = Asked(endpoint, FILMS, first.killed())
    assert set(second.texts) == set(FILMS)
    assert len(endpoint.batches) == 2


def test_of_duplicate_results_the_first_answer_counts(endpoint: Hostile) -> None:
    def repeat(lines: Lines) -> Lines:
        return [refused(lines[0], 500), *lines, lines[1].replace("it is told", "another is told"), expired(lines[2])]

    endpoint.plans = [changed(repeat)]
    run = Asked(endpoint, FILMS)
    assert len(run.answers) == 6
    assert set(run.texts) == set(FILMS)
    assert not any("another" in text for text in run.texts.values())
    assert len(endpoint.batches) == 1


def test_an_expired_batch_gives_what_it_has_and_the_rest_travels_again(endpoint: Hostile) -> None:
    half = Plan((*LIFE[:2], "expired"), lambda lines: (lines[:4], [expired(line) for line in lines[4:]]))
    endpoint.plans = [half]
    run = Asked(endpoint, FILMS)
    assert set(run.texts) == set(FILMS)
    assert [len(shas) for shas, _ in run.notes.sent] == [6, 2]
    assert endpoint.prompts["Film 0?"] == 1


def test_what_no_batch_answers_ends_the_run(endpoint: Hostile) -> None:
    endpoint.plans = [Plan((*LIFE[:2], "expired"), lambda lines: ([], [expired(line) for line in lines]))] * 5
    run = Asked(endpoint, FILMS)
    assert isinstance(run.error, UnavailableError)
    assert "left 6 questions unanswered in 3 batches (last: This request could not be executed" in str(run.error)
    assert run.answers == []
    assert len(endpoint.batches) == 3


def test_a_cancelled_batch_ends_the_run_and_the_next_one_asks_for_the_rest(endpoint: Hostile) -> None:
    endpoint.plans = [Plan((*LIFE[:2], "cancelling", "cancelled"), lambda lines: (lines[:4], []))]
    first = Asked(endpoint, FILMS)
    assert "batch batch-0 was cancelled with 2 questions unanswered: run this again" in str(first.error)
    assert set(first.texts) == set(FILMS[:4])
    opened = [PendingBatch(handle, questions(*FILMS[4:])) for _, handle in first.notes.sent]
    second = Asked(endpoint, FILMS[4:], Notes(open=opened))
    assert set(second.texts) == set(FILMS[4:])
    assert {endpoint.prompts[film] for film in FILMS[:4]} == {1}


def test_a_batch_that_was_not_accepted_ends_the_run_with_the_reason(endpoint: Hostile) -> None:
    errors = {"object": "list", "data": [{"code": "model_not_found", "line": 1, "message": f"no model of {KEY}"}]}
    endpoint.plans = [Plan(("validating", "failed"), lambda lines: ([], []), errors)]
    first = Asked(endpoint, FILMS)
    assert isinstance(first.error, InputError)
    assert "did not accept batch batch-0: no model of ***; correct the model" in str(first.error)
    assert set(Asked(endpoint, FILMS, first.killed()).texts) == set(FILMS)


def test_what_is_too_much_at_once_waits_for_the_others(endpoint: Hostile) -> None:
    errors = {"object": "list", "data": [{"code": "token_limit_exceeded", "message": "Enqueued token limit reached"}]}
    endpoint.plans = [Plan(), Plan(("validating", "failed"), lambda lines: ([], []), errors)]
    run = Asked(endpoint, FILMS, limits=Limits(lines=3))
    assert run.error is None
    assert set(run.texts) == set(FILMS)
    assert [shas for shas, _ in run.notes.sent] == [
        [sha256(film) for film in FILMS[:3]],
        [sha256(film) for film in FILMS[3:]],
        [sha256(film) for film in FILMS[3:]],
    ]


@pytest.mark.parametrize("route", ["upload", "create", "poll", "content"])
@pytest.mark.parametrize(
    "act", [reply(500), reply(429, headers={"retry-after": "2"}), reply(200, "<html>"), body([]), reset, truncate]
)
def test_trouble_on_the_way_passes(endpoint: Hostile, route: str, act: Act) -> None:
    endpoint.scripts[route] = [act] * 2
    run = Asked(endpoint, FILMS)
    assert run.error is None
    assert set(run.texts) == set(FILMS)


def test_a_batch_outlasts_an_endpoint_that_is_away(endpoint: Hostile) -> None:
    endpoint.scripts["poll"] = [*[reply(503)] * 3 * 19, answer] * 2
    assert set(Asked(endpoint, FILMS).texts) == set(FILMS)
    endpoint.scripts["poll"] = [reply(503)] * 3 * 20
    run = Asked(endpoint, FILMS)
    assert isinstance(run.error, UnavailableError)
    assert run.answers == []


@pytest.mark.parametrize(("route", "status"), [("upload", 401), ("upload", 413), ("create", 404), ("create", 400)])
def test_a_refused_order_ends_the_run(endpoint: Hostile, route: str, status: int) -> None:
    endpoint.scripts[route] = [reply(status)]
    run = Asked(endpoint, FILMS)
    assert isinstance(run.error, InputError)
    assert f"refused with status {status}" in str(run.error)
    assert endpoint.batches == {}


def test_a_budget_sends_what_it_can_and_answers_come_first(endpoint: Hostile) -> None:
    left = 4

    def refuse(number: int) -> None:
        nonlocal left
        if number > left:
            raise BudgetError("nothing left")
        left -= number

    run = Asked(endpoint, FILMS, Notes(refuse=refuse))
    assert isinstance(run.error, BudgetError)
    assert [len(shas) for shas, _ in run.notes.sent] == [3, 1]
    assert set(run.texts) == set(FILMS[:4])
    assert set(endpoint.prompts) == set(FILMS[:4])


def test_money_that_a_batch_leaves_over_sends_the_rest(endpoint: Hostile) -> None:
    def refuse(number: int) -> None:
        # Four questions can be paid for at once; a batch that was answered holds no money any more.
        under_way = len(notes.sent) - endpoint.routes().count("content")
        if under_way or number > 4:
            raise BudgetError("nothing left")

    notes = Notes(refuse=refuse)
    run = Asked(endpoint, FILMS, notes)
    assert run.error is None
    assert set(run.texts) == set(FILMS)
    assert [len(shas) for shas, _ in notes.sent] == [3, 3]
    assert list(endpoint.batches) == ["batch-0", "batch-1"]


def test_what_it_says_of_itself() -> None:
    batch = OpenAIBatch("http://x", "tiny", parameters={"max_tokens": 2}, price=Price(1.0, 2.0), limits=Limits(10))
    assert (batch.provider, batch.model, batch.concurrency, batch.attempts) == ("openai-batch", "tiny", 80, 1)
    assert batch.provenance == 'tiny {"max_tokens": 2}'
    assert batch.cost_usd(1_000_000, 1_000_000) == 3.0
