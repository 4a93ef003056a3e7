import asyncio

import numpy as np
import pytest

from kar_sidecar.errors import DeadlineError, UnavailableError
from kar_sidecar.scoring import Scorer
from kar_sidecar.scoring.memory import MemoryScorer

pytestmark = pytest.mark.unit

ROWS = {"item_index": np.array([2, 3])}


def twice(tensors):
    return (tensors["item_index"] * 2).astype(np.float32)


def test_a_loaded_model_scores_and_is_on_record():
    async def check():
        scorer: Scorer = MemoryScorer({"m": twice})
        assert not await scorer.ready("m")
        await scorer.load("m")
        await scorer.load("m")
        assert await scorer.ready("m")
        np.testing.assert_array_equal(await scorer.score("m", ROWS), [4, 6])
        await scorer.close()
        return scorer

    scorer = asyncio.run(check())
    assert [model for model, _ in scorer.calls] == scorer.loaded == ["m"]


def test_a_model_that_is_not_loaded_unknown_or_down_fails():
    async def check():
        scorer = MemoryScorer({"m": twice})
        with pytest.raises(UnavailableError):
            await scorer.score("m", ROWS)
        with pytest.raises(UnavailableError):
            await scorer.load("other")
        await scorer.load("m")
        scorer.down.add("m")
        assert not await scorer.ready("m")
        with pytest.raises(UnavailableError):
            await scorer.load("m")
        with pytest.raises(UnavailableError):
            await scorer.score("m", ROWS)

    asyncio.run(check())


def test_a_hanging_model_answers_with_a_deadline_error():
    async def check():
        scorer = MemoryScorer({"m": twice})
        await scorer.load("m")
        scorer.hanging.add("m")
        with pytest.raises(DeadlineError):
            await scorer.score("m", ROWS, timeout_s=0.001)

    asyncio.run(check())
