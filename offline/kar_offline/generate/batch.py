"""Owns batch files of OpenAI-compatible endpoints: questions are sent as files and answered within a day, at less cost.

A batch has our handle in its metadata, and the log has the handle before the batch is created. So after a kill at any
moment the next run finds the batch and waits for it, or finds none and creates one: no batch is paid for twice.
"""

import secrets
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Final
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
from kar_offline.generate.batch_state import Job, Outcome, Sending
from kar_offline.generate.openai_chat import CHARS_PER_TOKEN, FIRST_REFUSALS, ChatModel
from kar_offline.generate.provider import Answer, Failure, Log, Question, Reply
from kar_offline.openai_http.endpoint import RefusedError
from kar_sidecar.errors import BudgetError, InputError, KarError, UnavailableError

__all__ = ["OpenAIBatch"]

ROUNDS: Final = 3
"""Largest number of batches in which one question is sent."""
SILENT_POLLS: Final = 20
"""Number of polls in a row without an answer, each with all its attempts, after which a run ends."""
LARGEST_FILE_BYTES: Final = 1 << 30
FILE_PATIENCE: Final = 10.0
"""Longest time to send or fetch a file, as a multiple of the longest time for one question."""
GONE: Final = (404, 410)
"""Statuses of a file that the endpoint no longer keeps."""
FETCHES: Final = 3
"""A file of results is fetched up to this number of times before its broken lines count as missing."""


class OpenAIBatch(ChatModel):
    """Answers through batch files: `<base_url>/files` and `<base_url>/batches`.

    Args:
        base_url: As for `ChatModel`.
        model: As for `ChatModel`.
        key: As for `ChatModel`.
        limits: Largest size of one file.
        at_once: Largest number of batches under way at once.
        poll_s: The longest time between two polls of a batch, in seconds.
        on_poll: Called after each poll, with the numbers of questions answered and under way.
        **options: As for `ChatModel`.
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
        """Check the request; nothing is opened yet. Errors as for `ChatModel`."""
        super().__init__(base_url, model, key, concurrency=limits.lines * at_once, **options)
        self._limits, self._at_once, self._poll_s = limits, at_once, poll_s
        self.on_poll = on_poll

    async def ask(self, questions: Sequence[Question], log: Log) -> AsyncGenerator[Answer, None]:
        """See `Provider`. Questions with the same prompt are sent once; only the first answer counts the tokens.

        Questions that a batch left unanswered are sent again, in at most `ROUNDS` batches. A batch that the endpoint
        did not accept, or that was cancelled, ends the run; the next run sends the questions without an answer.
        """
        by_prompt: dict[str, list[Question]] = {}
        for question in questions:
            by_prompt.setdefault(question.prompt_sha256, []).append(question)
        jobs = await self._adopt(log, by_prompt)
        sent = {key for job in jobs for key in job.keys}
        state = Sending(jobs, deque(key for key in by_prompt if key not in sent), self._at_once)
        pause_s = 1.0
        while True:
            await self._submit_waiting(state, by_prompt, log)
            if not state.jobs:
                break
            answered, under_way, jobs_before = 0, sum(len(job.keys) for job in state.jobs), len(state.jobs)
            for job in tuple(state.jobs):
                polled = await self._poll(state, job, by_prompt)
                if polled is None:
                    continue
                batch, outcomes = polled
                answered += batch.answered
                if batch.ended:
                    state.jobs.remove(job)
                    for key, outcome in outcomes.items():
                        if not isinstance(outcome, str):
                            for answer in _answers(outcome, by_prompt[key]):
                                yield answer
                    self._send_again(state, batch, job, outcomes)
            self.on_poll(answered, under_way)
            if len(state.jobs) == jobs_before:
                await self._sleep(pause_s)
                pause_s = min(2 * pause_s, self._poll_s)
        if state.stopped is not None:
            raise state.stopped

    async def _submit_waiting(self, state: Sending, by_prompt: Mapping[str, list[Question]], log: Log) -> None:
        """Create batches of waiting questions while there is room."""
        while state.waiting and state.stopped is None and len(state.jobs) < state.room:
            try:
                state.jobs.append(await self._submit(state.waiting, by_prompt, log))
            except BudgetError as error:  # batches that end release what was reserved for them
                state.room, state.stopped = len(state.jobs), None if state.jobs else error
            except KarError as error:
                state.stopped = error

    async def _poll(
        self, state: Sending, job: Job, by_prompt: Mapping[str, list[Question]]
    ) -> tuple[Batch, Mapping[str, Outcome]] | None:
        """The state of a batch and, once it has ended, the outcomes of its questions; None: it could not be read.

        Raises:
            UnavailableError: the endpoint was silent `SILENT_POLLS` times in a row.
        """
        try:
            batch = await self._read_batch(job)
            outcomes = await self._collect(batch, job, by_prompt) if batch.ended else {}
            state.silent_polls = 0
        except UnavailableError as error:
            state.silent_polls += 1
            if state.silent_polls == SILENT_POLLS:
                raise state.stopped or error from error
            return None
        except InputError as error:
            state.jobs.remove(job)
            state.stopped = state.stopped or error
            return None
        return batch, outcomes

    def _send_again(self, state: Sending, batch: Batch, job: Job, outcomes: Mapping[str, Outcome]) -> None:
        """Put the questions that an ended batch left unanswered back into the queue, or stop the run."""
        unanswered = {key: reason for key, reason in outcomes.items() if isinstance(reason, str)}
        if batch.status == "failed" and state.jobs:  # perhaps more is under way than the endpoint allows
            state.room = len(state.jobs)
            state.waiting.extendleft(reversed(unanswered))
            return
        state.rounds.update(list(unanswered))
        state.waiting.extend(unanswered)
        if unanswered and state.stopped is None:
            rounds = max(state.rounds[key] for key in unanswered)
            state.stopped = self._given_up(batch, job, unanswered, rounds)

    async def _adopt(self, log: Log, prompts: Collection[str]) -> list[Job]:
        """The batches of earlier runs with questions of this run; `prompts` are hashes."""
        pending = {
            handle: keys
            for handle, questions in log.pending_batches()
            if (keys := [question.prompt_sha256 for question in questions if question.prompt_sha256 in prompts])
        }
        ids = await self._find(pending) if pending else {}
        if len(ids) < len(pending):  # the list may lag; a batch that is missing twice was never created
            await self._sleep(self._poll_s)
            ids |= await self._find(pending)
        latest = {key: ids[handle] for handle, keys in pending.items() if handle in ids for key in keys}
        return [Job(batch, [key for key in latest if latest[key] == batch], True) for batch in set(latest.values())]

    async def _find(self, handles: Collection[str]) -> dict[str, str]:
        """The ids of the batches with our handles, by handle."""
        ids: dict[str, str] = {}
        after: dict[str, str] = {}
        while len(ids) < len(handles):
            page = (await self.call("GET", "/batches", reader(Page), params={"limit": "100"} | after)).value
            ids |= {listed.handle: listed.id for listed in page.data if listed.handle in handles}
            if not (page.data and page.has_more):
                break
            before, after = after, {"after": page.data[-1].id}
            if after == before:
                raise UnavailableError(f"{self.base_url} lists the same batches without end: ask who runs it")
        return ids

    async def _submit(self, waiting: deque[str], by_prompt: Mapping[str, list[Question]], log: Log) -> Job:
        """Create a batch of waiting questions, as many as the budget allows."""
        part = self._part(waiting, by_prompt)
        handle = f"{LABEL}-{secrets.token_hex(16)}"
        while True:
            try:
                log.sending([by_prompt[key][0] for key in part], handle)
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
        batch_request = {
            "input_file_id": uploaded.value.id,
            "endpoint": PATH,
            "completion_window": "24h",
            "metadata": {LABEL: handle},
        }

        async def find_created() -> File | None:
            batch_id = (await self._find([handle])).get(handle)
            return File(id=batch_id) if batch_id else None

        # A request whose answer was lost may have created the batch: look for it before sending the request again.
        created = await self.call("POST", "/batches", reader(File), recover=find_created, json=batch_request)
        return Job(created.value.id, list(part), False)

    def _part(self, waiting: deque[str], by_prompt: Mapping[str, list[Question]]) -> dict[str, bytes]:
        """The lines of the next file, by prompt hash; they are removed from `waiting`."""
        part: dict[str, bytes] = {}
        size_bytes = tokens = 0
        while waiting and len(part) < self._limits.lines:
            prompt = by_prompt[waiting[0]][0].prompt
            line = question_line(waiting[0], self.body(prompt))
            size_bytes, tokens = size_bytes + len(line), tokens + len(prompt) // CHARS_PER_TOKEN
            if part and (size_bytes > self._limits.bytes or tokens > self._limits.input_tokens):
                break
            part[waiting.popleft()] = line
        return part

    async def _read_batch(self, job: Job) -> Batch:
        return (await self.call("GET", f"/batches/{quote(job.batch_id, safe='')}", reader(Batch))).value

    async def _collect(self, batch: Batch, job: Job, by_prompt: Mapping[str, list[Question]]) -> dict[str, Outcome]:
        """The outcomes of a batch's questions, by prompt hash.

        Raises:
            UnavailableError: the results cannot be fetched.
            InputError: the endpoint refused all questions of a batch of this run.
        """
        outcomes: dict[str, Outcome] = dict.fromkeys(job.keys, f"its batch is {batch.status}")
        files = [file_id for file_id in (batch.output_file_id, batch.error_file_id) if file_id]
        if batch.status == "completed" and not files:
            raise UnavailableError(f"batch {batch.id} is complete but has no results: run this again later")
        try:
            results = [result for file_id in files for result in await self._results(file_id, by_prompt)]
        except RefusedError as error:
            if error.http_status not in GONE or not job.adopted:
                raise
            results = []  # endpoints delete results after some time; this batch is from an earlier run
        refusals = []
        for key, outcome in results:
            if isinstance(outcomes.get(key), str):  # of duplicates the first one counts
                if isinstance(outcome, Failure):
                    outcome = outcome._replace(reason=self._hide(outcome.reason))
                    refusals.append(outcome.reason)
                elif isinstance(outcome, Reply):
                    outcome = outcome._replace(latency_ms=batch.took_ms)
                outcomes[key] = outcome
        if (
            len(refusals) >= FIRST_REFUSALS
            and not job.adopted
            and not any(isinstance(outcome, Reply) for _, outcome in results)
        ):
            raise InputError(
                f"{self.base_url} refused all {len(refusals)} questions of a batch (last: {refusals[-1]}): "
                "correct the model or the parameters, then run this again"
            )
        return outcomes

    async def _results(self, file_id: str, by_prompt: Mapping[str, list[Question]]) -> list[Result]:
        """The lines of a file of results.

        A broken line may be a fault of the transfer, and asking its question again would cost money. So the file is
        fetched up to `FETCHES` times; lines that are broken each time are dropped.
        """
        fetches, prompts = 0, {key: questions[0].prompt for key, questions in by_prompt.items()}

        def read(content: bytes) -> list[Result]:
            nonlocal fetches
            fetches += 1
            lines = [line for line in content.split(b"\n") if line.strip()]  # texts may contain other line ends
            results = [result for line in lines if (result := result_of(line, prompts))]
            if len(results) < len(lines) and (not results or fetches < min(FETCHES, self._retry.attempts)):
                raise ValueError(f"{len(lines) - len(results)} lines of results are broken")
            return results

        path = f"/files/{quote(file_id, safe='')}/content"
        return (await self.call("GET", path, read, largest_bytes=LARGEST_FILE_BYTES, patience=FILE_PATIENCE)).value

    def _given_up(self, batch: Batch, job: Job, unanswered: Mapping[str, str], rounds: int) -> KarError | None:
        """The error that keeps the unanswered questions of a batch from being sent again in this run; None: none."""
        if batch.status == "failed" and not job.adopted:
            return InputError(
                f"{self.base_url} did not accept batch {batch.id}: {self._hide(batch.complaint)}; "
                "correct the model, the parameters or the size of a batch, then run this again"
            )
        if batch.status == "cancelled" and not job.adopted:
            return UnavailableError(
                f"batch {batch.id} was cancelled with {len(unanswered)} questions unanswered: run this again to ask for"
                " them"
            )
        if rounds >= ROUNDS:
            return UnavailableError(
                f"{self.base_url} left {len(unanswered)} questions unanswered in {rounds} batches "
                f"(last: {self._hide(list(unanswered.values())[-1])}): run the same command to go on"
            )
        return None


def _answers(outcome: Reply | Failure, questions: Sequence[Question]) -> Iterator[Answer]:
    """The outcome for questions with the same prompt; only the first one counts tokens and requests."""
    first, *same_prompt = questions
    yield Answer(first, outcome)
    free = outcome._replace(requests=0, maybe_charged=0)
    if isinstance(free, Reply):
        free = free._replace(input_tokens=0, output_tokens=0)
    for question in same_prompt:
        yield Answer(question, free)
