"""Asking through Ray actors: the same answers, the same bounds, the ledger in the driver's hands."""

import os
import signal
from collections.abc import Iterator

import pytest
from tests.support.asking import Notes, ask
from tests.support.hostile import Hostile, echo
from tests.support.hostile_acts import reply, seeded

from kar_offline.generate.openai_chat import OpenAIChat
from kar_offline.generate.provider import Failure, Question, Reply, ScriptedModel
from kar_sidecar.errors import UnavailableError

ray = pytest.importorskip("ray", reason="ray is missing: install the extra ray")
from kar_offline.generate.ray import OnRay  # noqa: E402

pytestmark = pytest.mark.service


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster that several tests use: each start takes seconds."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def questions(count: int) -> list[Question]:
    return [Question("item", str(n), f"Which film is number {n}?", f"sha{n}") for n in range(count)]


def test_actors_answer_as_the_provider_does_and_share_its_concurrency() -> None:
    log = Notes()
    with Hostile(hold_s=0.02) as server:
        inner = OpenAIChat(server.url, "m", concurrency=6)
        on_ray = OnRay(inner, workers=2)
        assert (on_ray.provenance, on_ray.provider, on_ray.concurrency) == (inner.provenance, "openai", 6)
        answers = ask(on_ray, questions(60), log)
        assert server.most <= 6
        assert sum(server.prompts.values()) == 60
    assert {question.id for question, _ in answers} == {str(n) for n in range(60)}
    for question, outcome in answers:
        assert isinstance(outcome, Reply)
        assert outcome.text == echo(question.prompt)
    assert not ray.is_initialized()


@pytest.mark.usefixtures("cluster")
def test_what_actors_meet_comes_back_as_itself() -> None:
    class Partly(ScriptedModel):
        async def complete(self, question: Question) -> Reply | Failure:  # type: ignore[override]
            if question.id == "1":
                return Failure("too long")
            if question.id == "2":
                raise UnavailableError("the endpoint went away")
            return await super().complete(question)

    log = Notes()
    with pytest.raises(UnavailableError, match=r"^the endpoint went away$"):
        ask(OnRay(Partly(str.upper, concurrency=1), workers=1), questions(5), log)
    assert len(log.sent) == 3
    assert ray.is_initialized()


@pytest.mark.usefixtures("cluster")
def test_a_dead_actor_ends_the_run_and_nothing_is_sent_twice() -> None:
    class Dying(ScriptedModel):
        async def complete(self, question: Question) -> Reply:
            if question.id == "3":
                os.kill(os.getpid(), signal.SIGKILL)
            return await super().complete(question)

    log = Notes()
    with pytest.raises(UnavailableError, match="a Ray worker ended"):
        ask(OnRay(Dying(str.upper, concurrency=2), workers=2), questions(8), log)
    sent = [prompt_sha256 for told, _ in log.sent for prompt_sha256 in told]
    assert len(sent) == len(set(sent)) < 8


@pytest.mark.usefixtures("cluster")
def test_misbehaviour_is_borne_in_the_actors() -> None:
    log = Notes()
    with Hostile(mischief=seeded(3, {"busy": reply(429), "broken": reply(200, "<html>")}, share=0.3)) as server:
        answers = ask(OnRay(OpenAIChat(server.url, "m", concurrency=4), workers=2), questions(30), log)
    assert sorted(outcome.text for _, outcome in answers) == sorted(echo(q.prompt) for q in questions(30))
