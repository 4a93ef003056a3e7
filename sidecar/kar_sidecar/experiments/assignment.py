"""Owns the assignment of users to arms by GrowthBook's hashing, version 2, as in its SDKs for ASCII user ids.

A user's position n in [0, 1) is fnv(str(fnv(seed + user))) mod 10000 / 10000 with fnv = 32-bit FNV-1a over UTF-8.
Arm i owns the range [start_i, start_i + coverage * w_i), where start_i is the sum of the weights before it. A larger
coverage only lengthens ranges, so a user who has an arm keeps it. Hash version 1 is left out on purpose: its
assignments are strongly correlated between experiments. Reference: https://docs.growthbook.io/lib/build-your-own.
For other ids the SDKs differ from each other (some hash UTF-16 code units).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from kar_sidecar.errors import InputError

__all__ = ["ARMS", "CONTROL", "KNOWLEDGE", "Assignment", "Experiment", "bucket_ranges", "choose", "fnv1a32", "position"]

CONTROL: Final = "control"
KNOWLEDGE: Final = "knowledge"
ARMS: Final = (CONTROL, KNOWLEDGE)

Range = tuple[float, float]


def fnv1a32(text: str) -> int:
    """32-bit FNV-1a hash of the UTF-8 bytes of `text`."""
    value = 0x811C9DC5
    for byte in text.encode():
        value = ((value ^ byte) * 0x01000193) & 0xFFFFFFFF
    return value


def position(seed: str, value: str) -> float:
    """Position of `value` in [0, 1), in steps of 1/10000."""
    return fnv1a32(str(fnv1a32(seed + value))) % 10_000 / 10_000


def bucket_ranges(count: int, coverage: float = 1.0, weights: Sequence[float] | None = None) -> tuple[Range, ...]:
    """Half-open ranges of `count` arms; `coverage` is clamped to [0, 1].

    Weights are equal when they are missing, are not one per arm, or do not sum to a value from 0.99 to 1.01.
    """
    coverage = min(max(coverage, 0.0), 1.0)
    if weights is None or len(weights) != count or not 0.99 <= sum(weights) <= 1.01:
        weights = [1 / count] * count
    starts = [sum(weights[:i]) for i in range(count)]
    return tuple((start, start + coverage * weight) for start, weight in zip(starts, weights, strict=True))


def choose(user_position: float, ranges: Sequence[Range]) -> int | None:
    """Index of the first range that contains a position; None where no range does."""
    return next((i for i, (low, high) in enumerate(ranges) if low <= user_position < high), None)


@dataclass(frozen=True, slots=True)
class Assignment:
    """The arm that serves a user."""

    arm: str
    experiment: str
    """Key of the experiment; empty when the request forced the arm or the user is outside of the experiment."""


@dataclass(frozen=True, slots=True)
class Experiment:
    """An experiment between arms; users outside of its coverage are served by the first arm."""

    key: str = "knowledge"
    seed: str = "knowledge"
    coverage: float = 1.0
    """Share of users in the experiment, 0 to 1."""
    weights: tuple[float, ...] | None = None
    """Share of each arm within the experiment, summing to 1; None: equal shares."""
    arms: tuple[str, ...] = ARMS

    def assign(self, user_id: str, overrides: Mapping[str, str] | None = None) -> Assignment:
        """The arm of a user: by hash, or the one that `overrides` (arm by experiment key) forces.

        Raises:
            InputError: an unknown experiment or arm in `overrides`.
        """
        if overrides:
            return Assignment(self._forced_arm(overrides), "")
        ranges = bucket_ranges(len(self.arms), self.coverage, self.weights)
        arm = choose(position(self.seed, user_id), ranges)
        return Assignment(self.arms[0], "") if arm is None else Assignment(self.arms[arm], self.key)

    def _forced_arm(self, overrides: Mapping[str, str]) -> str:
        for key, arm in overrides.items():
            if key != self.key:
                raise InputError(f"experiment {key!r} in experiment_overrides is unknown: the only one is {self.key!r}")
            if arm not in self.arms:
                raise InputError(f"arm {arm!r} in experiment_overrides is unknown: send one of {', '.join(self.arms)}")
        return overrides[self.key]
