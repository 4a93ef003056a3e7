import numpy as np
import pytest

from kar_offline.encoders.chunks import Chunk, batches, even_spans, join_chunks

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("length", "most", "cuts"),
    [
        (0, 4, [(0, 0)]),
        (4, 4, [(0, 4)]),
        (5, 4, [(0, 2), (2, 5)]),
        (9, 4, [(0, 3), (3, 6), (6, 9)]),
    ],
)
def test_cuts_are_even_and_leave_nothing_out(length: int, most: int, cuts: list[tuple[int, int]]) -> None:
    assert even_spans(length, most) == cuts


def chunks(*lengths: int) -> list[Chunk[None]]:
    return [Chunk(row, 1, length, None) for row, length in enumerate(lengths)]


def test_batches_hold_what_fits_when_padded_to_the_longest() -> None:
    cut = [[chunk.length for chunk in batch] for batch in batches(chunks(2, 9, 3, 5, 1, 0), 8)]
    # 9 alone is too long; 5 + 5 padded would be 10; 3 + 3 are 6; 1 + 1 are 2.
    assert cut == [[9], [5], [3, 2], [1, 0]]
    assert [len(batch) for batch in batches(chunks(2, 2, 2), 8, overhead=2)] == [2, 1]
    assert [len(batch) for batch in batches(chunks(1, 1, 1), 8, max_chunks=2)] == [2, 1]


def test_a_text_is_whole_with_its_last_chunk_and_weighs_them_by_length() -> None:
    def vectors(*rows: list[float]) -> np.ndarray:
        return np.array(rows, dtype=np.float32)

    long = [Chunk(0, 2, 3, "first"), Chunk(0, 2, 1, "second")]
    short = Chunk(1, 1, 2, "all")
    first, second = join_chunks(
        [([long[1]], vectors([0.0, 4.0]), 5), ([long[0], short], vectors([1.0, 0.0], [3.0, 4.0]), 7)]
    )
    assert (list(first.rows), first.vectors.shape, first.tokens) == ([], (0, 2), 5)
    assert (list(second.rows), second.tokens) == ([0, 1], 7)
    # 1 x [0, 4] + 3 x [1, 0] = [3, 4]
    np.testing.assert_allclose(second.vectors, [[0.6, 0.8], [0.6, 0.8]], rtol=1e-6)
