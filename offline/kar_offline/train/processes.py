"""Owns tasks in worker processes of one thread each, which report progress and end when their parent ends."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from signal import SIG_IGN, SIGINT, signal
from threading import Thread
from typing import Any, TypeVar

import torch

from kar_sidecar.errors import UnavailableError

__all__ = ["in_processes"]

Task = TypeVar("Task")
Result = TypeVar("Result")
Notify = Callable[[Any], None]

_notices: Any = None


def _end_with_parent() -> None:
    """End this process when its parent is gone: an orphan would write to the same files as the next run."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _start(notices: Any) -> None:
    """Prepare a worker process: one thread, interrupts left to the parent, end with the parent."""
    global _notices
    _notices = notices
    Thread(target=_end_with_parent, daemon=True).start()
    signal(SIGINT, SIG_IGN)
    torch.set_num_threads(1)


def _notify(notice: Any) -> None:
    _notices.put(notice)


def _call(work: Callable[[Task, Notify], Result], task: Task) -> Result:
    return work(task, _notify)


def in_processes(
    work: Callable[[Task, Notify], Result], tasks: Sequence[Task], workers: int, on_notice: Notify
) -> list[Result]:
    """Call `work(task, notify)` for every task and return the results in the order of the tasks.

    Args:
        work: A function that pickles. Its argument `notify` passes any value that pickles to `on_notice`.
        tasks: Values that pickle; they start in this order.
        workers: Number of worker processes; 0 calls `work` in this process.
        on_notice: Called in this thread with each notice.

    Raises:
        UnavailableError: a worker process was killed.
        Exception: the first exception that `work` raised. Waiting tasks are then cancelled and running tasks ended.
    """
    if not workers:
        return [work(task, on_notice) for task in tasks]
    context = multiprocessing.get_context("spawn")
    notices = context.SimpleQueue()
    children_before = set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, context, _start, (notices,)) as pool:
        futures = [pool.submit(_call, work, task) for task in tasks]
        try:
            running = set(futures)
            while running:
                done, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                while not notices.empty():
                    on_notice(notices.get())
                for future in done:
                    future.result()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in set(multiprocessing.active_children()) - children_before:
                child.terminate()
            if isinstance(error, BrokenProcessPool):
                raise UnavailableError(
                    "a worker process was killed (out of memory?): run the same command to go on"
                ) from error
            raise
        return [future.result() for future in futures]
