"""Owns the supervision of child processes: started in order, restarted when they crash, stopped in reverse order."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from kar_sidecar.errors import UnavailableError

__all__ = ["ChildProcess", "Process", "RestartPolicy", "Service", "Supervisor", "spawn", "termination"]

TICK_S: Final = 0.1
PROBE_S: Final = 1.0
"""How often a service that answered before is asked again."""

# Runs between this process and a child: asks the kernel to kill the child with its parent, then becomes it.
# A preexec_fn would run Python after a fork of a process that holds gRPC threads.
LAUNCH: Final = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class Process(Protocol):
    """A running process."""

    @property
    def pid(self) -> int:
        """Process id."""
        ...

    def poll(self) -> int | None:
        """Exit code, negative for the signal that ended it, or None while it runs."""
        ...

    def reason(self) -> str:
        """What it said last, and where its log is."""
        ...

    def stop(self, grace_s: float) -> object:
        """End it, after `grace_s` seconds by force, and what it left running; returns when it is gone."""
        ...


class ChildProcess:
    """A process in a session of its own: a terminal's Ctrl-C does not reach it before its turn to stop."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        """Take over a process started with `start_new_session`, which writes to `log`."""
        self._process = process
        self._log = log

    @property
    def pid(self) -> int:
        """See `Process`."""
        return self._process.pid

    def poll(self) -> int | None:
        """See `Process`."""
        return self._process.poll()

    def reason(self) -> str:
        """See `Process`."""
        lines = self._log.read_text(errors="replace").splitlines()
        said = next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")
        return f"{said} (log: {self._log})"

    def stop(self, grace_s: float) -> None:
        """See `Process`."""
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_s)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


def spawn(command: Sequence[str | Path], log: Path, environment: Mapping[str, str]) -> ChildProcess:
    """Start a command that dies with the calling thread; its output is appended to `log`."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-ISc", LAUNCH, str(os.getpid()), *map(str, command)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        )
    return ChildProcess(process, log)


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """How long a crashed service waits before it starts again: each time twice as long, and not for ever."""

    first_delay_s: float = 0.25
    longest_delay_s: float = 8.0
    most_crashes: int = 5
    window_s: float = 60.0

    def delay_s(self, crashes: Sequence[float], now: float) -> float | None:
        """Seconds until the next start after `crashes` at these times, the last of them now; None: give up."""
        recent = sum(now - at < self.window_s for at in crashes)
        if recent >= self.most_crashes:
            return None
        return min(self.first_delay_s * 2 ** (recent - 1), self.longest_delay_s)


@dataclass(frozen=True, slots=True)
class Service:
    """What to keep running: how it starts, and whether it answers (asked often: must be quick)."""

    name: str
    start: Callable[[], Process]
    answers: Callable[[], bool]


class _Child:
    """The state of one service."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.process: Process | None = None
        self.start_at = self.started_at = self.probed_at = float("-inf")
        self.ready = False
        self.proven = False  # was ready since it was last started
        self.crashes: list[float] = []


class Supervisor:
    """Keeps services running. A service starts for the first time when the ones before it are ready."""

    def __init__(
        self,
        services: Sequence[Service],
        *,
        policy: RestartPolicy,
        say: Callable[[str], None],
        start_timeout_s: float = 60.0,
        stop_grace_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare; nothing starts before the first `step`."""
        self._children = [_Child(service) for service in services]
        self._policy = policy
        self._say = say
        self._start_timeout_s = start_timeout_s
        self._stop_grace_s = stop_grace_s
        self._clock = clock

    @property
    def ready(self) -> bool:
        """Whether every service answered when last asked."""
        return all(child.ready for child in self._children)

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of what runs now, by service name."""
        return {child.service.name: child.process.pid for child in self._children if child.process}

    def run(self, stopping: Callable[[], bool], look: Callable[[], None]) -> None:
        """Step, and `look` after each step, until `stopping`; then stop all.

        Raises:
            UnavailableError: a service never got ready, or crashed too often. Everything is stopped then, too.
        """
        try:
            while not stopping():
                self.step()
                look()
                time.sleep(TICK_S)
        finally:
            self.stop()

    def step(self) -> None:
        """Look at every service once; start, restart or ask it. None is ready before those that it comes after.

        Raises:
            UnavailableError: a service ended before it was ever ready, or crashed too often; the text names its log.
        """
        before_ready = True
        for child in self._children:
            self._step(child, self._clock())
            # What an answer said before a service that it depends on crashed is stale: ask again when that is back.
            child.ready = before_ready = child.ready and before_ready
            if not (child.proven or child.crashes):
                break

    def _step(self, child: _Child, now: float) -> None:
        if child.process is None:
            if now >= child.start_at:
                child.process, child.started_at = child.service.start(), now
            return
        ended = _describe(child.process.poll())
        if not (ended or child.proven or now - child.started_at < self._start_timeout_s):
            ended = f"was not ready within {self._start_timeout_s:.0f} s"
        if ended:
            self._bury(child, child.process, ended, now)
        elif not child.ready or now - child.probed_at >= PROBE_S:
            child.probed_at = now
            child.ready = child.service.answers()
            child.proven |= child.ready

    def _bury(self, child: _Child, process: Process, ended: str, now: float) -> None:
        name, at_start = child.service.name, not (child.proven or child.crashes)
        process.stop(self._stop_grace_s)  # dead or not: what it left running goes too
        child.process, child.ready, child.proven = None, False, False
        child.crashes.append(now)
        delay_s = self._policy.delay_s(child.crashes, now)
        if at_start:
            raise UnavailableError(f"{name} {ended} at start; it said: {process.reason()}")
        if delay_s is None:
            often = f"for the {self._policy.most_crashes}th time in {self._policy.window_s:.0f} s"
            raise UnavailableError(f"{name} {ended} {often}, giving up; it said: {process.reason()}")
        child.start_at = now + delay_s
        self._say(f"{name} {ended}; starting it again in {delay_s:.2g} s")

    def stop(self) -> None:
        """Stop what runs, last service first; bounded by the grace of each."""
        for child in reversed(self._children):
            if child.process is not None:
                child.process.stop(self._stop_grace_s)
                child.process, child.ready = None, False


def _describe(code: int | None) -> str:
    if code is None:
        return ""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


@contextmanager
def termination() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM and SIGINT do not interrupt; the function given says whether one came. Main thread only."""
    came = False

    def note(_number: int, _frame: object) -> None:
        nonlocal came
        came = True

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
