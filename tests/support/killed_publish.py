"""Owns publishes that are killed at a chosen step, each in a child of one process, which imports the code once."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

__all__ = ["KilledPublish", "PublishKiller", "publish_killer"]

SCRIPT = '''
import json, os, signal, sys
from pathlib import Path
from kar_offline.dataset.dataset import Dataset
from kar_offline.publish.stage import publish_release
from kar_sidecar.releases.manifest import Release
from kar_sidecar.store.open import open_store

class DyingStore:
    """Each record, each batch and each meta value is a step; the process kills itself at one of them."""

    def __init__(self, store, steps):
        self.store, self.steps = store, steps

    def __getattr__(self, name):
        return getattr(self.store, name)

    def step(self):
        self.steps -= 1
        if not self.steps:
            os.kill(os.getpid(), signal.SIGKILL)

    def write(self, part, records, *, newer_only=False):
        def stream():
            for record in records:
                self.step()
                yield record
        written = self.store.write(part, stream(), newer_only=newer_only)
        self.step()
        return written

    def write_meta(self, name, value):
        self.step()
        self.store.write_meta(name, value)

for line in sys.stdin:
    request = json.loads(line)
    work = Path(request["work"])
    if (child := os.fork()) == 0:
        publish_release(
            Release.load(work / "releases", request["release_id"]),
            Dataset.load(work / "dataset"),
            DyingStore(open_store(request["store"]), request["dies_at"]),
            work / request["index"],
            dataset_hash=request["dataset_hash"],
            force=request["force"],
            checkpoint_every=request["checkpoint_every"],
        )
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
'''


@dataclass(frozen=True)
class KilledPublish:
    """One publish, and the step at which it is killed."""

    work: str
    release_id: str
    store: str
    index: str
    """Folder of index snapshots, relative to the work folder."""
    dies_at: int
    dataset_hash: str = ""
    force: bool = False
    checkpoint_every: int = 20_000


@dataclass(frozen=True)
class PublishKiller:
    """The process that runs and kills publishes."""

    process: subprocess.Popen[str]

    def run(self, publish: KilledPublish) -> int:
        """Exit code of a publish: -9 if it reached the step at which it dies, 0 if it ended before."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(asdict(publish)) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@contextmanager
def publish_killer() -> Iterator[PublishKiller]:
    """A process for as long as the block runs."""
    command = [sys.executable, "-c", SCRIPT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield PublishKiller(process)
