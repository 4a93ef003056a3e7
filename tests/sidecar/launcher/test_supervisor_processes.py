"""Supervision of real processes: tiny servers, signals, and parents that are killed."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest

from kar_sidecar.launcher.supervisor import RestartPolicy, Service, Supervisor, spawn, termination

pytestmark = pytest.mark.service

ANSWER = """
import http.server, sys
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
"""


def await_true(condition, what, limit_s=30.0):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"not within {limit_s} s: {what}"
        time.sleep(0.02)


def running(pid):
    """Whether a process lives; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_output_goes_to_the_log_and_the_exit_code_is_reported(tmp_path):
    log = tmp_path / "child.log"
    log.write_text("before\n")
    child = spawn(
        [sys.executable, "-c", "import os; print(os.environ['WORD']); raise SystemExit(3)"], log, {"WORD": "x"}
    )
    await_true(lambda: child.poll() is not None, "the child ends")
    assert child.poll() == 3
    assert log.read_text() == "before\nx\n"
    assert child.reason() == f"x (log: {log})"


# These children write each line with one call; `print` under PYTHONUNBUFFERED would need two.


def test_stop_first_lets_the_child_end_by_itself(tmp_path):
    log = tmp_path / "child.log"
    program = """
import os, signal, sys
def leave(*_):
    os.write(1, b"leaving\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
os.write(1, b"up\\n")
signal.pause()
"""
    child = spawn([sys.executable, "-c", program], log, os.environ)
    await_true(lambda: "up" in log.read_text(), "the child is up")
    child.stop(grace_s=30.0)
    assert child.poll() == 0
    assert log.read_text().split() == ["up", "leaving"]


def test_stop_kills_a_child_that_ignores_signals_and_its_children(tmp_path):
    log = tmp_path / "child.log"
    program = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.fork()
os.write(1, b"%d\\n" % os.getpid())
while True:
    time.sleep(60)
"""
    child = spawn([sys.executable, "-c", program], log, os.environ)
    await_true(lambda: len(log.read_text().split()) == 2, "both are up")
    pids = [int(word) for word in log.read_text().split()]
    child.stop(grace_s=0.1)
    assert child.poll() == -signal.SIGKILL
    await_true(lambda: not any(map(running, pids)), "both are gone")


def test_a_killed_parent_leaves_no_child(tmp_path):
    log = tmp_path / "child.log"
    program = f"""
import sys, time
from pathlib import Path
from kar_sidecar.launcher.supervisor import spawn
print(spawn([sys.executable, "-c", "import time; time.sleep(600)"], Path({str(log)!r}), {{}}).pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        assert running(pid)
        parent.kill()
    await_true(lambda: not running(pid), "the child is gone")


def test_a_termination_signal_sets_a_flag():
    before = signal.getsignal(signal.SIGTERM)
    with termination() as came:
        assert not came()
        os.kill(os.getpid(), signal.SIGTERM)
        await_true(came, "the signal came")
    assert signal.getsignal(signal.SIGTERM) == before


def test_killed_servers_are_restarted_and_stop_ends_them(tmp_path):
    def service(name):
        port = free_port()

        def answers():
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=2) as answer:
                return answer.status == 200
            return False

        log = tmp_path / f"{name}.log"
        return Service(name, lambda: spawn([sys.executable, "-c", ANSWER, str(port)], log, os.environ), answers)

    heard, messages, leave = [], [], threading.Event()
    supervisor = Supervisor(
        [service("back"), service("front")], policy=RestartPolicy(first_delay_s=0.05), say=messages.append
    )

    def kill_each():
        try:
            for round_, name in enumerate(("back", "front"), start=1):
                await_true(lambda count=2 * round_: len(heard) >= count, f"ready before {name} is killed")
                os.kill(supervisor.pids[name], signal.SIGKILL)
            await_true(lambda: len(heard) >= 6, "ready again")
            last_pids.update(supervisor.pids)
        finally:
            leave.set()

    last_pids = {}
    killer = threading.Thread(target=kill_each)
    killer.start()

    def look():
        if heard[-1:] != [supervisor.ready]:
            heard.append(supervisor.ready)

    supervisor.run(leave.is_set, look)
    killer.join()
    assert heard == [False, True, False, True, False, True]
    assert [line.split(";")[0] for line in messages] == ["back was killed by SIGKILL", "front was killed by SIGKILL"]
    assert len(last_pids) == 2
    assert not any(map(running, last_pids.values()))
