"""Owns what holds for all tests: one thread a process, no limits on a slow machine, and a marker for each test."""

import os

import pytest
from hypothesis import HealthCheck, settings

# Tests run beside each other, one process a core. Read by OpenMP when torch is imported, and by processes of tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes tells nothing where other tests run on the same cores.
settings.register_profile("beside others", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("beside others")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that are not service tests as unit tests, and let them run last.

    Service tests take longest. Started first, they are beside each other, and short tests even out the end.
    """
    for item in items:
        if item.get_closest_marker("service") is None:
            item.add_marker(pytest.mark.unit)
    items.sort(key=lambda item: item.get_closest_marker("service") is None)
