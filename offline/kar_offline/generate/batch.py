"""Owns batch files of OpenAI-compatible endpoints: questions travel as files and are answered within a day, for less.

A batch carries a handle of ours in its metadata, and the log knows the handle before the batch is made. So after a
kill at any moment the next run finds the batch and waits for it, or finds none and makes one: none is paid for twice.
"""

import secrets
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple
from urllib.parse import quote

from kar_offline.generate.batch_file import (
    LABEL,
    PATH,
    Batch,
    File,
    Limits,
    Page,
    Result,
    question_line,
    reader,
    result_of,
)
from kar_offline.generate.openai_chat import CHARS_PER_TOKEN, FIRST, ChatModel
from kar_offline.generate.provider import Answer, Failure, Log, Question, Reply
from kar_offline.openai_http.endpoint import RefusedError
from kar_sidecar.errors import BudgetError, InputError, KarError, UnavailableError

__all__ = ["OpenAIBatch"]

ROUNDS: Final = 3
"""The most batches that a question travels in."""
SILENCE: Final = 20
"""So many polls in a row without an answer, each with all its attempts, end a run."""
LARGEST_FILE_BYTES: Final = 1 << 30
FILE_PATIENCE: Final = 10.0
"""Moving a file may take so many times as long as asking one question."""
GONE: Final = (404, 410)
FETCHES: Final = 3
"""So often a file of results is fetched before broken lines in it count as missing."""


class _Job(NamedTuple):
    """A batch under way, and the hashes of the prompts that it is to answer."""

    batch_id: str
    keys: list[str]
    adopted: bool
    """An earlier run made it."""


class OpenAIBatch(ChatModel):
    """Answers through batch files: `<base_url>/files` and `<base_url>/batches`.

    Args:
        base_url: As of `ChatModel`, like whatever is not named here.
        model: As of `ChatModel`.
        key: As of `ChatModel`.
        limits: The most that one file holds.
        at_once: Batches under way at once.
        poll_s: The longest time between two looks at a batch.
        on_poll: Called after each look, with the questions that are answered so far and all that are under way.
        **options: As of `ChatModel`.
    """

    provider = "openai-batch"
    attempts = 1

    def __init__(
        self,
        base_url: str,
        model: str,
        key: str | None = None,
        *,
        limits: Limits = Limits(),  # noqa: B008  an immutable value
        at_once: int = 8,
        poll_s: float = 30.0,
        on_poll: Callable[[int, int], None] = lambda answered, under_way: None,
        **options: Any,
    ) -> None:
        """Check the request; nothing is opened yet. Errors as of `ChatModel`."""
        super().__init__(base_url, model, key, concurrency=limits.lines * at_once, **options)
        self._limits, self._at_once, self._poll_s = limits, at_once, poll_s
        self.on_poll = on_poll

    async def ask(self, questions: Sequence[Question], log: Log) -> AsyncGenerator[Answer, None]:
        """See `Provider`. Questions with the same prompt travel once; the first one's answer has the tokens.

        What a batch left unanswered travels again, in at most `ROUNDS` batches. A batch that the endpoint did not
        accept, or that somebody cancelled, ends the run; the next run finds it so and asks for what it lacks.
        """
        asked: dict[str, list[Question]] = {}
        for question in questions:
            asked.setdefault(question.prompt_sha256, []).append(question)
        jobs = await self._adopt(log, asked)
        known = {key for job in jobs for key in job.keys}
        waiting = deque(key for key in asked if key not in known)
        rounds = Counter[str]()
        room, silent, pause_s = self._at_once, 0, 1.0
        stopped: KarError | None = None
        while True:
            while waiting and stopped is None and len(jobs) < room:
                try:
                    jobs.append(await self._submit(waiting, asked, log))
                except BudgetError as error:  # batches that end free what is held for them
                    room, stopped = len(jobs), None if jobs else error
                except KarError as error:
                    stopped = error
            if not jobs:
                break
            answered, under_way, looked_at = 0, sum(len(job.keys) for job in jobs), len(jobs)
            for job in tuple(jobs):
                try:
                    batch = await self._look(job)
                    found = await self._collect(batch, job, asked) if batch.ended else {}
                    silent = 0
                except UnavailableError as error:
                    silent += 1
                    if silent == SILENCE:
                        raise stopped or error from error
                    continue
                except InputError as error:
                    jobs.remove(job)
                    stopped = stopped or error
                    continue
                answered += batch.answered
                if not batch.ended:
                    continue
                jobs.remove(job)
                for key, outcome in found.items():
                    if not isinstance(outcome, str):
                        for answer in _answers(outcome, asked[key]):
                            yield answer
                left = {key: why for key, why in found.items() if isinstance(why, str)}
                if batch.status == "failed" and jobs:  # perhaps more is under way than the endpoint allows
                    room = len(jobs)
                    waiting.extendleft(reversed(left))
                    continue
                rounds.update(list(left))
                waiting.extend(left)
                if left and stopped is None:
                    stopped = self._given_up(batch, job, left, max(rounds[key] for key in left))
            self.on_poll(answered, under_way)
            if len(jobs) == looked_at:
                await self._sleep(pause_s)
                pause_s = min(2 * pause_s, self._poll_s)
        if stopped is not None:
            raise stopped

    async def _adopt(self, log: Log, asked: Collection[str]) -> list[_Job]:
        """The batches of earlier runs that hold questions of this one."""
        opened = {
            handle: keys
            for handle, questions in log.pending_batches()
            if (keys := [question.prompt_sha256 for question in questions if question.prompt_sha256 in asked])
        }
        ids = await self._find(opened) if opened else {}
        if len(ids) < len(opened):  # a list may lag behind; only what is missing twice was never made
            await self._sleep(self._poll_s)
            ids |= await self._find(opened)
        latest = {key: ids[handle] for handle, keys in opened.items() if handle in ids for key in keys}
        return [_Job(made, [key for key in latest if latest[key] == made], True) for made in set(latest.values())]

    async def _find(self, handles: Collection[str]) -> dict[str, str]:
        """The ids of the batches with our handles, by handle."""
        found: dict[str, str] = {}
        after: dict[str, str] = {}
        while len(found) < len(handles):
            page = (await self.call("GET", "/batches", reader(Page), params={"limit": "100"} | after)).value
            found |= {listed.handle: listed.id for listed in page.data if listed.handle in handles}
            if not (page.data and page.has_more):
                break
            before, after = after, {"after": page.data[-1].id}
            if after == before:
                raise UnavailableError(f"{self.base_url} lists the same batches without end: ask who runs it")
        return found

    async def _submit(self, waiting: deque[str], asked: Mapping[str, list[Question]], log: Log) -> _Job:
        """Send a file of what is waiting, or as much of it as the log lets leave."""
        part = self._part(waiting, asked)
        handle = f"{LABEL}-{secrets.token_hex(16)}"
        while True:
            try:
                log.sending([asked[key][0] for key in part], handle)
                break
            except BudgetError:
                keys = list(part)
                half = len(keys) // 2
                waiting.extendleft(reversed(keys[half:]))
                if half == 0:
                    raise
                part = {key: part[key] for key in keys[:half]}
        name, content = f"{handle}.jsonl", b"".join(part.values())
        uploaded = await self.call(
            "POST",
            "/files",
            reader(File),
            patience=FILE_PATIENCE,
            data={"purpose": "batch"},
            files={"file": (name, content, "application/jsonl")},
        )
        order = {
            "input_file_id": uploaded.value.id,
            "endpoint": PATH,
            "completion_window": "24h",
            "metadata": {LABEL: handle},
        }

        async def already_made() -> File | None:
            made = (await self._find([handle])).get(handle)
            return File(id=made) if made else None

        # An order whose answer was lost may have been taken: before it is sent again, the batch is looked for.
        made = await self.call("POST", "/batches", reader(File), recover=already_made, json=order)
        return _Job(made.value.id, list(part), False)

    def _part(self, waiting: deque[str], asked: Mapping[str, list[Question]]) -> dict[str, bytes]:
        """The lines of the next file, by prompt hash; they are taken off `waiting`."""
        part: dict[str, bytes] = {}
        size_bytes = tokens = 0
        while waiting and len(part) < self._limits.lines:
            prompt = asked[waiting[0]][0].prompt
            line = question_line(waiting[0], self.body(prompt))
            size_bytes, tokens = size_bytes + len(line), tokens + len(prompt) // CHARS_PER_TOKEN
            if part and (size_bytes > self._limits.bytes or tokens > self._limits.input_tokens):
                break
            part[waiting.popleft()] = line
        return part

    async def _look(self, job: _Job) -> Batch:
        return (await self.call("GET", f"/batches/{quote(job.batch_id, safe='')}", reader(Batch))).value

    async def _collect(
        self, batch: Batch, job: _Job, asked: Mapping[str, list[Question]]
    ) -> dict[str, Reply | Failure | str]:
        """What became of a batch's questions, by prompt hash; a text says why there is no answer.

        Raises:
            UnavailableError: the results are not to be had.
            InputError: the endpoint refused them all. Of an adopted batch, which was asked for again as it was, the
                refusals are believed.
        """
        found: dict[str, Reply | Failure | str] = dict.fromkeys(job.keys, f"its batch is {batch.status}")
        files = [file_id for file_id in (batch.output_file_id, batch.error_file_id) if file_id]
        if batch.status == "completed" and not files:
            raise UnavailableError(f"batch {batch.id} is complete but has no results: run this again later")
        try:
            results = [result for file_id in files for result in await self._results(file_id, asked)]
        except RefusedError as error:
            if error.http_status not in GONE or not job.adopted:
                raise
            results = []  # endpoints keep results for some time only; this batch is from an earlier run
        refusals = []
        for key, outcome in results:
            if isinstance(found.get(key), str):  # of duplicates the first one counts
                if isinstance(outcome, Failure):
                    outcome = outcome._replace(reason=self._hide(outcome.reason))
                    refusals.append(outcome.reason)
                elif isinstance(outcome, Reply):
                    outcome = outcome._replace(latency_ms=batch.took_ms)
                found[key] = outcome
        if len(refusals) >= FIRST and not job.adopted and not any(isinstance(outcome, Reply) for _, outcome in results):
            raise InputError(
                f"{self.base_url} refused all {len(refusals)} questions of a batch (last: {refusals[-1]}): "
                "correct the model or the parameters, then run this again"
            )
        return found

    async def _results(self, file_id: str, asked: Mapping[str, list[Question]]) -> list[Result]:
        """The lines of a file of results.

        A broken line may be the transfer's fault, and to take it for a missing answer would be to pay for it again. So
        the file is fetched once more and again; what is broken each time is broken for good.
        """
        fetches, prompts = 0, {key: questions[0].prompt for key, questions in asked.items()}

        def read(content: bytes) -> list[Result]:
            nonlocal fetches
            fetches += 1
            lines = [line for line in content.split(b"\n") if line.strip()]  # texts may hold other line ends
            results = [result for line in lines if (result := result_of(line, prompts))]
            if len(results) < len(lines) and (not results or fetches < min(FETCHES, self._retry.attempts)):
                raise ValueError(f"{len(lines) - len(results)} lines of results are broken")
            return results

        path = f"/files/{quote(file_id, safe='')}/content"
        return (await self.call("GET", path, read, largest_bytes=LARGEST_FILE_BYTES, patience=FILE_PATIENCE)).value

    def _given_up(self, batch: Batch, job: _Job, left: Mapping[str, str], rounds: int) -> KarError | None:
        """Why what a batch left unanswered cannot be asked for again in this run; None: it can."""
        if batch.status == "failed" and not job.adopted:
            return InputError(
                f"{self.base_url} did not accept batch {batch.id}: {self._hide(batch.complaint)}; "
                "correct the model, the parameters or the size of a batch, then run this again"
            )
        if batch.status == "cancelled" and not job.adopted:
            return UnavailableError(
                f"batch {batch.id} was cancelled with {len(left)} questions unanswered: run this again to ask for them"
            )
        if rounds >= ROUNDS:
            return UnavailableError(
                f"{self.base_url} left {len(left)} questions unanswered in {rounds} batches "
                f"(last: {self._hide(list(left.values())[-1])}): run the same command to go on"
            )
        return None


def _answers(outcome: Reply | Failure, questions: Sequence[Question]) -> Iterator[Answer]:
    first, *twins = questions
    yield Answer(first, outcome)
    free = outcome._replace(requests=0, maybe_charged=0)
    if isinstance(free, Reply):
        free = free._replace(input_tokens=0, output_tokens=0)
    for twin in twins:
        yield Answer(twin, free)
