"""Owns the supervision of child processes: started in order, restarted after crashes, stopped in reverse order."""

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
"""Time between two checks of a service that answered."""

# This program asks the kernel to kill it with its parent, then becomes the child by exec. A preexec_fn would run Python
# in a fork of this process instead, which is not safe: this process has gRPC threads.
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
        """Its last output or failure, and the path of its log."""
        ...

    def stop(self, grace_s: float) -> object:
        """End it and its own children, by force after `grace_s` seconds; returns when they are gone."""
        ...


class ChildProcess:
    """A process in a session of its own, so that a terminal's Ctrl-C does not reach it before `stop`."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        """Take over a process that was started with `start_new_session` and writes to `log`."""
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
        last_line = next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")
        return f"{last_line} (log: {self._log})"

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
    """When a crashed service starts again: after a delay that doubles with each crash, or never after too many."""

    first_delay_s: float = 0.25
    longest_delay_s: float = 8.0
    most_crashes: int = 5
    """Number of crashes within `window_s` after which the supervisor gives up."""
    window_s: float = 60.0

    def delay_s(self, crashes: Sequence[float], now: float) -> float | None:
        """Seconds until the next start; None: give up. `crashes` are the times of all crashes, the last one now."""
        recent = sum(now - crashed_s < self.window_s for crashed_s in crashes)
        if recent >= self.most_crashes:
            return None
        return min(self.first_delay_s * 2 ** (recent - 1), self.longest_delay_s)


@dataclass(frozen=True, slots=True)
class Service:
    """A service to keep running."""

    name: str
    start: Callable[[], Process]
    answers: Callable[[], bool]
    """Whether it is ready; called often, so it must be quick."""


class _Child:
    """The state of one supervised service. Times are seconds of the supervisor's clock."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.process: Process | None = None
        self.next_start_s = self.started_s = self.probed_s = float("-inf")
        self.ready = False
        self.was_ready = False  # since it was last started
        self.crashes: list[float] = []


class Supervisor:
    """Keeps services running. At first, a service starts when all services before it are ready."""

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
        """Whether every service answered the last check."""
        return all(child.ready for child in self._children)

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of the running services, by name."""
        return {child.service.name: child.process.pid for child in self._children if child.process}

    def run(self, stopping: Callable[[], bool], after_step: Callable[[], None]) -> None:
        """Step, and call `after_step` after each step, until `stopping()`; then stop all services.

        Raises:
            UnavailableError: a service was never ready, or crashed too often. All services are stopped then, too.
        """
        try:
            while not stopping():
                self.step()
                after_step()
                time.sleep(TICK_S)
        finally:
            self.stop()

    def step(self) -> None:
        """Start, restart or check each service once. A service is ready only while all services before it are ready.

        Raises:
            UnavailableError: a service ended before it was ever ready, or crashed too often; the text names its log.
        """
        before_ready = True
        for child in self._children:
            self._step(child, self._clock())
            # After a crash of an earlier service, this service's last answer is out of date: it is checked again.
            child.ready = before_ready = child.ready and before_ready
            if not (child.was_ready or child.crashes):
                break

    def _step(self, child: _Child, now: float) -> None:
        if child.process is None:
            if now >= child.next_start_s:
                child.process, child.started_s = child.service.start(), now
            return
        failure = _describe(child.process.poll())
        if not (failure or child.was_ready or now - child.started_s < self._start_timeout_s):
            failure = f"was not ready within {self._start_timeout_s:.0f} s"
        if failure:
            self._handle_crash(child, child.process, failure, now)
        elif not child.ready or now - child.probed_s >= PROBE_S:
            child.probed_s = now
            child.ready = child.service.answers()
            child.was_ready |= child.ready

    def _handle_crash(self, child: _Child, process: Process, failure: str, now: float) -> None:
        """Schedule the next start; raises UnavailableError if the service must not start again."""
        name, at_start = child.service.name, not (child.was_ready or child.crashes)
        process.stop(self._stop_grace_s)  # also ends the children of a process that is dead already
        child.process, child.ready, child.was_ready = None, False, False
        child.crashes.append(now)
        delay_s = self._policy.delay_s(child.crashes, now)
        if at_start:
            raise UnavailableError(f"{name} {failure} at start; it said: {process.reason()}")
        if delay_s is None:
            count = f"for the {self._policy.most_crashes}th time in {self._policy.window_s:.0f} s"
            raise UnavailableError(f"{name} {failure} {count}, giving up; it said: {process.reason()}")
        child.next_start_s = now + delay_s
        self._say(f"{name} {failure}; starting it again in {delay_s:.2g} s")

    def stop(self) -> None:
        """Stop all services, the last one first; each has the grace period to end."""
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
    """Inside the block SIGTERM and SIGINT do not interrupt; the yielded function tells whether one was received.

    Main thread only.
    """
    received = False

    def record(_number: int, _frame: object) -> None:
        nonlocal received
        received = True

    before = {number: signal.signal(number, record) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
