import asyncio
import json
import logging
import random
from collections.abc import Iterator
from typing import Any

import pytest
from tests.support import asking
from tests.support.asking import Clock, Notes, questions, sha256
from tests.support.hostile import Hostile
from tests.support.hostile_acts import PASSING, body, drip, hang, reply, seeded
from tests.support.hostile_exchange import Act

from kar_offline.generate.openai_chat import OpenAIChat, Price
from kar_offline.generate.provider import Answer, Failure, Question, Reply
from kar_offline.openai_http.endpoint import Retry
from kar_sidecar.errors import BudgetError, InputError, UnavailableError

pytestmark = pytest.mark.service

KEY = "sk-very-secret"
REFUSED = reply(400, '{"error": {"message": "too long"}}')


@pytest.fixture
def endpoint() -> Iterator[Hostile]:
    with Hostile(lambda prompt: f" About {prompt} ") as server:
        yield server


def ask(chat: OpenAIChat, *prompts: str, notes: Notes | None = None) -> list[Answer]:
    return asking.ask(chat, questions(*prompts), notes)


def ask_one(chat: OpenAIChat, prompt: str = "Heat?") -> Reply | Failure:
    return ask(chat, prompt)[0].outcome


def content(text: Any, **choice: Any) -> Act:
    return body({"choices": [{"message": {"content": text}, **choice}]})


def test_a_prompt_is_one_user_message_with_model_key_and_parameters(endpoint: Hostile) -> None:
    chat = OpenAIChat(endpoint.url + "/", "tiny", KEY + "\n", parameters={"temperature": 0.5, "max_tokens": 9})
    notes = Notes()
    ((question, reply),) = ask(chat, "Which film?", notes=notes)
    assert question == Question("item", "0", "Which film?", sha256("Which film?"))
    assert isinstance(reply, Reply)
    assert reply._replace(latency_ms=0) == Reply("About Which film?", 2, 3, "stop", 0, 1)
    assert reply.latency_ms > 0
    (request,) = endpoint.requests
    assert request.path == "/v1/chat/completions"
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.json == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Which film?"}],
        "temperature": 0.5,
        "max_tokens": 9,
    }
    assert notes.sent == [([sha256("Which film?")], "")]
    assert chat.provenance == 'tiny {"max_tokens": 9, "temperature": 0.5}'


def test_without_a_key_no_authorization_is_sent(endpoint: Hostile) -> None:
    ask(OpenAIChat(endpoint.url, "tiny"), "Which film?")
    assert "authorization" not in endpoint.requests[0].headers


@pytest.mark.parametrize("name", sorted(PASSING))
def test_what_may_pass_is_asked_again(endpoint: Hostile, name: str) -> None:
    endpoint.scripts["chat"] = [PASSING[name]] * 2
    clock, silent = Clock(), name in ("hang", "hang in body", "drip")
    chat = OpenAIChat(
        endpoint.url,
        "tiny",
        timeout_s=0.4 if silent else 20.0,
        retry=Retry(3, base_s=2.0),
        rng=random.Random(1),
        sleep=clock.sleep,
        clock=clock,
    )
    reply = ask_one(chat)
    assert isinstance(reply, Reply)
    assert (reply.text, reply.requests) == ("About Heat?", 3)
    assert reply.maybe_charged == (0 if name[:3] in ("429", "500", "503") else 2)
    assert 0 <= clock.slept[0] <= 2.05
    assert 0 <= clock.slept[1] <= 4.05


@pytest.mark.parametrize(
    ("status", "maybe_charged"), [(408, 1), (409, 0), (425, 0), (500, 0), (502, 1), (504, 1), (529, 0)]
)
def test_only_what_a_proxy_cut_short_may_have_been_charged_for(
    endpoint: Hostile, status: int, maybe_charged: int
) -> None:
    endpoint.scripts["chat"] = [reply(status)]
    reply_ = ask_one(OpenAIChat(endpoint.url, "tiny", retry=Retry(2, 0.0)))
    assert (reply_.requests, reply_.maybe_charged) == (2, maybe_charged)


@pytest.mark.parametrize(
    ("headers", "slept"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": "3600"}, 30.0),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:09 GMT", "date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 9.0),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT", "date": "Wed, 21 Oct 2026 07:28:09 GMT"}, 0.0),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:09 GMT"}, 0.0),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "nan"}, 0.0),
        ({"retry-after": "inf"}, 30.0),
        ({"retry-after": "soon"}, 0.0),
        ({"retry-after": ""}, 0.0),
    ],
)
def test_retry_after_is_obeyed_up_to_the_longest_wait(endpoint: Hostile, headers: dict[str, str], slept: float) -> None:
    endpoint.scripts["chat"] = [reply(429, headers=headers)]
    clock = Clock()
    ask(OpenAIChat(endpoint.url, "tiny", retry=Retry(2, 0.0), sleep=clock.sleep, clock=clock), "Heat?")
    assert clock.slept == [slept]


def test_when_one_request_is_told_to_wait_all_do(endpoint: Hostile) -> None:
    # Two leave at once; the first answer says to wait. The second one's next question waits as well.
    endpoint.scripts["chat"] = [reply(429, headers={"retry-after": "20"})]
    clock = Clock()
    chat = OpenAIChat(endpoint.url, "tiny", concurrency=1, retry=Retry(1, 0.0), sleep=clock.sleep, clock=clock)

    async def main() -> None:
        async with chat:
            first, second = questions("Heat?", "Ran?")
            with pytest.raises(UnavailableError, match="status 429"):
                await chat.complete(first)
            assert clock.slept == []
            await chat.complete(second)
            assert clock.slept == [20.0]
            await chat.complete(first)
            assert clock.slept == [20.0]

    asyncio.run(main())


def test_attempts_end(endpoint: Hostile) -> None:
    endpoint.scripts["chat"] = [reply(500, f"no luck {KEY}")] * 9
    clock = Clock()
    chat = OpenAIChat(endpoint.url, "tiny", KEY, retry=Retry(4), sleep=clock.sleep, clock=clock)
    with pytest.raises(UnavailableError, match=r"no answer in 4 attempts \(last: status 500: no luck \*\*\*\)"):
        ask(chat, "Which film?")
    assert len(endpoint.requests) == 4


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (hang, r"no answer within 0\.2 s"),
        (drip, r"no answer within 0\.2 s"),
        (PASSING["hang in body"], r"no answer within 0\.2 s"),
        (PASSING["flood"], r"an answer of more than 4,194,304 bytes"),
        (PASSING["truncate"], r"RemoteProtocolError: peer closed connection without sending complete"),
        (PASSING["reset"], r"ReadError"),
        (PASSING["garbage"], r"not JSON: '\\x00�<html>'"),
        (PASSING["too deep"], r"not JSON: '\[\[\["),
        (PASSING["a list"], r"not a chat completion: '\[1\]'"),
        (body({"error": {"message": "no model is free"}}), r"not a chat completion: .*no model is free"),
        (reply(429, '{"error": {"message": "You exceeded your quota"}}'), r"status 429: You exceeded your quota\)"),
    ],
)
def test_the_reason_of_giving_up_is_clear(endpoint: Hostile, act: Act, words: str) -> None:
    endpoint.scripts["chat"] = [act]
    chat = OpenAIChat(endpoint.url, "tiny", timeout_s=0.2 if "within" in words else 20, retry=Retry(1))
    with pytest.raises(UnavailableError, match=words):
        ask(chat, "Which film?")


def test_an_endpoint_that_is_not_there_is_named() -> None:
    chat = OpenAIChat("http://127.0.0.1:1/v1", "tiny", retry=Retry(2, 0.0))
    with pytest.raises(UnavailableError, match=r"http://127\.0\.0\.1:1/v1 gave no answer .*ConnectError"):
        ask(chat, "Which film?")


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_of_all_ends_it_at_once_and_hides_the_key(
    endpoint: Hostile, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    caplog.set_level(logging.DEBUG)
    endpoint.scripts["chat"] = [reply(status, json.dumps({"error": {"message": f"Incorrect API key: {KEY}"}}))]
    with pytest.raises(InputError, match=rf"refused with status {status}: Incorrect API key: \*\*\*;"):
        ask(OpenAIChat(endpoint.url, "tiny", KEY, concurrency=1), "Which film?", "Another?")
    assert len(endpoint.requests) == 1
    assert KEY not in caplog.text


def test_a_redirect_says_where_to(endpoint: Hostile) -> None:
    endpoint.scripts["chat"] = [reply(307, headers={"location": "https://example.com/v1"})]
    with pytest.raises(InputError, match=r"status 307: it redirects to https://example\.com/v1; correct the address"):
        ask(OpenAIChat(endpoint.url, "tiny"), "Which film?")


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_question_at_fault_by_itself_fails_alone(endpoint: Hostile, status: int) -> None:
    endpoint.scripts["chat"] = [reply(status, json.dumps({"error": {"message": f"too long {KEY}"}}))]
    answers = ask(OpenAIChat(endpoint.url, "tiny", KEY, concurrency=1), "long", "short")
    assert answers[0].outcome == Failure(f"refused with status {status}: too long ***")
    assert isinstance(answers[1].outcome, Reply)


def test_a_failure_counts_what_it_took(endpoint: Hostile) -> None:
    endpoint.scripts["chat"] = [reply(500), reply(502), REFUSED]
    assert ask_one(OpenAIChat(endpoint.url, "tiny", retry=Retry(3, 0.0))) == Failure(
        "refused with status 400: too long", requests=3, maybe_charged=1
    )


def test_a_filtered_answer_fails_alone(endpoint: Hostile) -> None:
    endpoint.scripts["chat"] = [content("He", finish_reason="content_filter")]
    assert ask_one(OpenAIChat(endpoint.url, "tiny")) == Failure("blocked by a content filter", maybe_charged=1)


def test_refusals_from_the_first_question_on_mean_that_the_request_is_wrong(endpoint: Hostile) -> None:
    endpoint.scripts["chat"] = [REFUSED] * 5
    with pytest.raises(InputError, match=r"refused each of the first 5 questions \(last: status 400: too long\)"):
        ask(OpenAIChat(endpoint.url, "tiny", concurrency=1), *"abcdefgh")
    assert len(endpoint.requests) == 5


def test_refusals_after_an_answer_do_not(endpoint: Hostile) -> None:
    endpoint.scripts["chat"] = [REFUSED] * 4 + [content("fine")] + [REFUSED] * 6
    answers = ask(OpenAIChat(endpoint.url, "tiny", concurrency=1), *"abcdefghijkl")
    assert [isinstance(answer.outcome, Failure) for answer in answers] == [True] * 4 + [False] + [True] * 6 + [False]


@pytest.mark.parametrize(
    ("sent", "stored"),
    [
        (None, ""),
        (" \n ", ""),
        ("One.\r\nTwo.\rThree.\n\nFour.", "One.\nTwo.\nThree.\n\nFour."),
        ("a\tb\x00c\x1bd\x7fe\x9ff", "a bcdef"),
        ("a\u2028b\u2029c\u0085d", "a\nb\nc\nd"),
        ("half \ud83d of a pair", "half \ufffd of a pair"),
        ("\ud83c\udfac Amélie", "\U0001f3ac Amélie"),
    ],
)
def test_a_text_can_be_stored(endpoint: Hostile, sent: str | None, stored: str) -> None:
    endpoint.scripts["chat"] = [content(sent)]
    reply = ask_one(OpenAIChat(endpoint.url, "tiny"))
    assert isinstance(reply, Reply)
    assert reply.text == stored
    assert reply.text.encode("utf-8").decode() == stored
    assert reply.requests == 1


def test_bytes_that_are_no_utf8_are_replaced(endpoint: Hostile) -> None:
    endpoint.scripts["chat"] = [reply(200, b'\xef\xbb\xbf{"choices": [{"message": {"content": "Am\xe9lie"}}]}')]
    reply_ = ask_one(OpenAIChat(endpoint.url, "tiny"))
    assert isinstance(reply_, Reply)
    assert reply_.text == "Am\ufffdlie"


@pytest.mark.parametrize(
    "usage",
    [
        None,
        [],
        "7",
        {},
        {"prompt_tokens": -1, "completion_tokens": "4"},
        {"prompt_tokens": 1.5, "completion_tokens": float("nan")},
        {"prompt_tokens": True, "completion_tokens": 10**30},
        {"prompt_tokens": None, "completion_tokens": float("inf")},
    ],
)
def test_without_sensible_counts_tokens_are_estimated(endpoint: Hostile, usage: Any) -> None:
    endpoint.scripts["chat"] = [body({"choices": [{"message": {"content": "ninechars"}}], "usage": usage})]
    reply = ask_one(OpenAIChat(endpoint.url, "tiny"), "a prompt of 21 chars.")
    assert isinstance(reply, Reply)
    assert (reply.input_tokens, reply.output_tokens) == (6, 3)


@pytest.mark.parametrize(
    ("sent", "finish"), [("length", "length"), (None, "stop"), (7, "stop"), ("\x00a" * 99, "a" * 40)]
)
def test_why_an_answer_ended_is_kept(endpoint: Hostile, sent: Any, finish: str) -> None:
    endpoint.scripts["chat"] = [content("text", finish_reason=sent)]
    reply = ask_one(OpenAIChat(endpoint.url, "tiny"))
    assert isinstance(reply, Reply)
    assert reply.finish == finish


def test_a_spent_budget_ends_it_after_what_is_under_way() -> None:
    def refuse(_: int) -> None:
        if len(notes.sent) == 2:
            raise BudgetError("nothing left")

    notes = Notes(refuse=refuse)
    with Hostile(together=2) as endpoint:
        chat = OpenAIChat(endpoint.url, "tiny", concurrency=4)
        found: list[Answer] = []

        async def main() -> None:
            async with chat:
                async for answer in chat.ask(questions("a", "b", "c"), notes):
                    found.append(answer)

        with pytest.raises(BudgetError, match="nothing left"):
            asyncio.run(main())
        assert {answer.question.prompt for answer in found} == {"a", "b"}
        assert len(endpoint.requests) == 2


def test_two_hundred_questions_survive_every_misbehaviour() -> None:
    mischief, prompts = seeded(7), [f"Film {number}?" for number in range(200)]
    planned = {prompt: next(n for n in range(9) if mischief(prompt, n) is None) for prompt in prompts}
    assert sum(planned.values()) > 150
    with Hostile(mischief=mischief) as endpoint:
        chat = OpenAIChat(endpoint.url, "tiny", concurrency=8, timeout_s=0.5, retry=Retry(8, base_s=0.01))
        notes = Notes()
        answers = ask(chat, *prompts, notes=notes)
        assert sorted(answer.question.prompt for answer in answers) == sorted(prompts)
        for question, outcome in answers:
            assert isinstance(outcome, Reply)
            assert outcome.text == f"About {question.prompt_sha256}: it is told well."
            # On a busy machine an attempt may time out that was to be answered, or before it is seen.
            assert planned[question.prompt] < endpoint.prompts[question.prompt] <= outcome.requests <= 8
        assert endpoint.most <= 8
        assert endpoint.running == 0
        assert len(notes.sent) == 200


def test_all_of_the_agreed_requests_are_in_flight() -> None:
    # No request is answered before two are there.
    with Hostile(together=2) as endpoint:
        ask(OpenAIChat(endpoint.url, "tiny", concurrency=2), *(f"Film {i}?" for i in range(6)))
        assert endpoint.most == 2
        assert set(endpoint.prompts.values()) == {1}


def test_cost_is_known_only_with_prices() -> None:
    question = Question("item", "1", "Amélie", "")  # 7 bytes, and at most 64 tokens of a chat template
    assert OpenAIChat("http://x", "tiny").cost_usd(10, 10) is None
    assert OpenAIChat("http://x", "tiny").worst_usd(question) is None
    chat = OpenAIChat("http://x", "tiny", price=Price(2.0, 10.0), parameters={"max_tokens": 100})
    assert chat.cost_usd(500_000, 100_000) == 2.0
    assert chat.worst_usd(question) == pytest.approx((71 * 2 + 100 * 10) / 1e6)


def test_the_length_of_an_answer_is_always_bounded() -> None:
    assert OpenAIChat("http://x", "tiny", parameters={}).parameters == {"max_tokens": 400}
    newer = OpenAIChat("http://x", "tiny", parameters={"max_completion_tokens": 9}, price=Price(0.0, 1e6))
    assert newer.parameters == {"max_completion_tokens": 9}
    assert newer.worst_usd(questions("a")[0]) == 9.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"base_url": "localhost:8000"}, "not an HTTP address"),
        ({"base_url": "http://"}, "not an HTTP address"),
        ({"base_url": "http://[::1"}, "not an HTTP address"),
        ({"key": "sk\nx"}, "the key has characters that no key has"),
        ({"key": "clé"}, "the key has characters that no key has"),
        ({"parameters": {"messages": []}}, "'messages' belongs to the request"),
        ({"parameters": {"n": 2}}, "'n' belongs to the request"),
        ({"parameters": {"max_tokens": -1}}, "'max_tokens' is -1: give a whole number above 0"),
        ({"parameters": {"max_tokens": "9"}}, "'max_tokens' is '9'"),
        ({"parameters": {"temperature": float("nan")}}, "cannot be sent as JSON"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        OpenAIChat(**{"base_url": "http://x", "model": "tiny"} | options)
