"""Encoding through Ray Data: the same vectors, each text once."""

import os
from collections.abc import Iterator

import numpy as np
import pytest

from kar_offline.encoders.hashing import HashingEncoder
from kar_offline.encoders.text_encoder import EncodedTexts
from kar_sidecar.errors import UnavailableError

ray = pytest.importorskip("ray", reason="ray is missing: install the extra ray")
from kar_offline.encoders.ray import RayEncoder  # noqa: E402

# Ray warns of settings of its own.
pytestmark = [pytest.mark.service, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A cluster that the tests share: each start takes seconds."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def test_actors_encode_as_the_encoder_does_each_text_once() -> None:
    texts = [f"word {n} and {'more ' * (n % 7)}" for n in range(600)] + [""]
    inner = HashingEncoder(32)
    on_ray = RayEncoder(inner, workers=2)
    assert (on_ray.encoder_id, on_ray.dim) == (inner.encoder_id, 32)
    parts = list(on_ray.stream(texts))
    assert sorted(row for part in parts for row in part.rows) == list(range(601))
    assert sum(part.tokens for part in parts) == sum(part.tokens for part in inner.stream(texts))
    np.testing.assert_array_equal(on_ray.encode(texts), inner.encode(texts))


def test_no_texts_need_no_cluster() -> None:
    assert RayEncoder(HashingEncoder(4), 2).encode([]).shape == (0, 4)


def test_a_broken_encoder_ends_in_one_line() -> None:
    class Broken(HashingEncoder):
        def stream(self, texts: object) -> Iterator[EncodedTexts]:  # type: ignore[override]
            raise RuntimeError("no weights")

    with pytest.raises(UnavailableError, match="Ray did not encode"):
        RayEncoder(Broken(4), 1).encode(["a"])
