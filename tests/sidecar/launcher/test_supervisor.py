"""Restart policy and supervisor, with a clock and processes that the test controls."""

import pytest

from kar_sidecar.errors import UnavailableError
from kar_sidecar.launcher.supervisor import RestartPolicy, Service, Supervisor

pytestmark = pytest.mark.unit

POLICY = RestartPolicy(first_delay_s=1.0, longest_delay_s=3.0, most_crashes=4, window_s=60.0)


@pytest.mark.parametrize(
    ("crashes", "delay_s"),
    [
        ([100.0], 1.0),
        ([99.0, 100.0], 2.0),
        ([98.0, 99.0, 100.0], 3.0),  # 4, cut to the longest delay
        ([97.0, 98.0, 99.0, 100.0], None),
        ([39.0, 40.0, 41.0, 100.0], 2.0),  # two are older than the window: 61 s, and 60 s exactly
    ],
)
def test_the_delay_doubles_up_to_a_limit_until_the_supervisor_gives_up(crashes, delay_s):
    assert POLICY.delay_s(crashes, now=100.0) == delay_s


class FakeProcess:
    def __init__(self, name, pid, history):
        self.name, self.pid, self.history, self.code = name, pid, history, None

    def poll(self):
        return self.code

    def reason(self):
        return f"the last words of {self.name} (log: {self.name}.log)"

    def stop(self, grace_s):
        self.history.append(f"stop {self.name} {self.pid} within {grace_s:.0f} s")
        self.code = 0


class World:
    """Two services, `back` and `front`, their processes, and the time."""

    def __init__(self):
        self.now = 0.0
        self.history, self.messages = [], []
        self.processes, self.answering = {}, {"back": False, "front": False}
        services = [
            Service(name, lambda name=name: self.start(name), lambda name=name: self.answering[name])
            for name in ("back", "front")
        ]
        self.supervisor = Supervisor(
            services,
            policy=POLICY,
            say=self.messages.append,
            start_timeout_s=30.0,
            stop_grace_s=7.0,
            clock=lambda: self.now,
        )

    def start(self, name):
        process = FakeProcess(name, len(self.history) + 1, self.history)
        self.history.append(f"start {name}")
        self.processes[name] = process
        return process

    def step(self, now):
        self.now = now
        self.supervisor.step()

    def both_ready(self):
        self.answering.update(back=True, front=True)
        for now in (0.0, 0.1, 0.2):
            self.step(now)
        assert self.supervisor.ready


@pytest.fixture
def world():
    return World()


def test_a_service_starts_when_the_one_before_is_ready(world):
    for now in (0.0, 0.1, 0.2):
        world.step(now)
    assert world.history == ["start back"]
    world.answering["back"] = True
    world.step(0.3)
    assert world.history == ["start back", "start front"]
    assert not world.supervisor.ready
    world.answering["front"] = True
    world.step(0.4)
    assert world.supervisor.ready
    assert world.supervisor.pids == {"back": 1, "front": 2}


def test_a_crashed_service_is_started_again_after_its_delay(world):
    world.both_ready()
    world.processes["back"].code = -9
    world.answering["back"] = False
    world.step(10.0)
    assert not world.supervisor.ready
    assert world.messages == ["back was killed by SIGKILL; starting it again in 1 s"]
    world.step(10.9)
    assert world.history == ["start back", "start front", "stop back 1 within 7 s"]
    world.step(11.0)
    assert world.history[3:] == ["start back"]
    world.step(11.1)
    assert not world.supervisor.ready
    world.answering["back"] = True
    world.step(11.2)
    assert world.supervisor.ready
    assert world.supervisor.pids == {"back": 4, "front": 2}


def test_an_answer_from_before_a_crash_does_not_count(world):
    world.both_ready()
    world.processes["back"].code = -9
    world.answering["back"] = False
    world.step(10.0)
    world.step(11.0)
    world.answering["front"] = False  # noticed the crash late
    world.step(11.1)
    world.answering["back"] = True
    world.step(11.2)
    assert not world.supervisor.ready
    world.answering["front"] = True
    world.step(11.3)
    assert world.supervisor.ready


def test_a_service_that_stops_answering_is_noticed_and_left_running(world):
    world.both_ready()
    world.answering["front"] = False
    world.step(0.9)  # asked at most once a second
    assert world.supervisor.ready
    world.step(1.2)
    assert not world.supervisor.ready
    world.step(500.0)
    assert world.history == ["start back", "start front"]
    world.answering["front"] = True
    world.step(500.1)
    assert world.supervisor.ready


def test_the_first_start_must_succeed(world):
    world.step(0.0)
    world.processes["back"].code = 1
    with pytest.raises(UnavailableError, match="back ended with exit code 1 at start; it said: the last words of back"):
        world.step(0.1)


def test_a_service_that_never_answers_is_stopped(world):
    world.step(0.0)
    world.step(29.9)
    with pytest.raises(UnavailableError, match="back was not ready within 30 s at start; it said: the last"):
        world.step(30.0)
    assert world.history == ["start back", "stop back 1 within 7 s"]


def test_a_restarted_service_that_never_answers_counts_as_a_crash(world):
    world.both_ready()
    world.processes["front"].code = 3
    world.answering["front"] = False
    world.step(10.0)
    world.step(11.0)
    world.step(41.0)
    assert [line.split(";")[0] for line in world.messages] == [
        "front ended with exit code 3",
        "front was not ready within 30 s",
    ]
    assert world.history[2:] == ["stop front 2 within 7 s", "start front", "stop front 4 within 7 s"]


def test_too_many_crashes_end_the_supervision(world):
    world.both_ready()
    now = 10.0
    for _ in range(3):
        world.processes["front"].code = -11
        world.step(now)
        world.step(now + 5.0)
        now += 10.0
    world.processes["front"].code = -11
    with pytest.raises(UnavailableError, match="front was killed by SIGSEGV for the 4th time in 60 s, giving up; it"):
        world.step(now)


def test_run_stops_the_last_service_first(world):
    world.answering.update(back=True, front=True)
    looks = []
    world.supervisor.run(stopping=lambda: True in looks, after_step=lambda: looks.append(world.supervisor.ready))
    assert looks == [False, False, True]
    assert world.history == ["start back", "start front", "stop front 2 within 7 s", "stop back 1 within 7 s"]
    assert world.supervisor.pids == {}
    assert not world.supervisor.ready


def test_run_stops_everything_when_it_gives_up(world):
    world.answering["back"] = True
    failing = world.start

    def start(name):
        process = failing(name)
        if name == "front":
            process.code = 1
        return process

    world.start = start
    with pytest.raises(UnavailableError, match="front ended with exit code 1 at start"):
        world.supervisor.run(stopping=lambda: False, after_step=lambda: None)
    assert world.history[-1] == "stop back 1 within 7 s"
