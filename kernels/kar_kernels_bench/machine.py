"""Owns a benchmark's facts about its machine: cores, processor, and how busy other processes keep it."""

import os
import platform
import time
from pathlib import Path
from typing import Final

__all__ = ["machine", "others_busy"]

IDLE_S: Final = 1.0


def machine() -> str:
    """Usable cores, processor and Python, in words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.machine()
    return f"{len(os.sched_getaffinity(0))} cores, {processor}, Python {platform.python_version()}"


def others_busy() -> float:
    """Cores that other processes keep busy while this one sleeps for a second."""
    before = _jiffies()
    time.sleep(IDLE_S)
    return (_jiffies() - before) / os.sysconf("SC_CLK_TCK") / IDLE_S


def _jiffies() -> int:
    """Time that all cores have worked."""
    user, nice, system = Path("/proc/stat").read_text().splitlines()[0].split()[1:4]
    return int(user) + int(nice) + int(system)
