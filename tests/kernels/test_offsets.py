"""Offsets of more than 31 bits: where kernels read and write for row 2 ** 30, without the memory that it takes."""

import importlib
import importlib.util

import numpy as np
import pytest
import torch
from tests.support.triton_interpreter import INTERPRETS, interpreted

pytestmark = [
    pytest.mark.unit,
    interpreted,
]
if INTERPRETS:
    from kar_kernels import pair, split, tail
    from kar_kernels.layout import Shape
    from kar_kernels.tiles import constants

TILE = 16
FIRST = 2**30
ROWS = FIRST + TILE
"""The last tile of so many rows is what is looked at."""
EXPERTS, SEEN, SIZE, DIM = 3, 2, 16, 64
WIDTH = SIZE + SEEN * SIZE


@pytest.fixture
def accesses():
    """Runs the program of the tile of row `FIRST`, without memory, and gives the addresses it reads and writes."""
    interpreter = importlib.import_module("triton.runtime.interpreter")

    def run(kernel, tensors, grid, sizes, **more):
        read, written = set(), set()

        def load(self, ptrs, mask, other, *_):
            read.update(ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)].tolist())
            kind = interpreter._get_np_dtype(ptrs.get_element_ty())
            return interpreter.TensorHandle(np.zeros(ptrs.data.shape, kind), ptrs.get_element_ty())

        def store(self, ptrs, value, mask, *_):
            written.update(ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)].tolist())

        builder = interpreter.InterpreterBuilder
        index, size = builder.set_grid_idx, builder.set_grid_dim
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(builder, "create_masked_load", load)
            patch.setattr(builder, "create_masked_store", store)
            patch.setattr(builder, "set_grid_idx", lambda self, x, *yz: index(self, x + FIRST // TILE, *yz))
            patch.setattr(builder, "set_grid_dim", lambda self, x, *yz: size(self, x + FIRST // TILE, *yz))
            shape = Shape(DIM, EXPERTS, SEEN, SIZE, SIZE, SIZE)
            names = kernel.arg_names
            fixed = {name: value for name, value in constants(torch.float64, shape).items() if name in names}
            kernel[grid](**tensors, **sizes, **fixed, **more, ROWS=TILE)
        return read, written

    return run


def tensors(*names):
    """Tensors of one number each: what kernels get is where they begin."""
    return {name: torch.zeros(1, dtype=torch.float64) for name in names}


def places(tensor, rows, columns):
    """Addresses of float64 numbers at each of `rows` + each of `columns`."""
    return {tensor.data_ptr() + 8 * (row + column) for row in rows for column in columns}


def last_rows(of):
    """Where the rows of the last tile begin, of so many numbers each."""
    return [row * of for row in range(FIRST, ROWS)]


WEIGHTS = ("first", "bias1", "weight2", "bias2")


def of_rows(found, given):
    """What is accessed, without what lies in weights, which are small."""
    weights = [given[name].data_ptr() for name in WEIGHTS if name in given]
    most = 8 * (2 * SIZE + EXPERTS * SIZE) * DIM
    return {at for at in found if not any(start <= at < start + most for start in weights)}


USERS = {"users": ROWS, "items": 0, "user_stride": DIM, "item_stride": DIM, "dim": DIM}
AT = {"first_expert": 0, "logit_at": 0, "hidden_at": SIZE}


def test_pair(accesses):
    given = tensors("user", "item", *WEIGHTS, "result")
    read, written = accesses(pair.pair_forward_kernel, given, (1,), USERS, COLUMNS=32)
    assert of_rows(read, given) == places(given["user"], last_rows(DIM), range(DIM))
    assert written == places(given["result"], last_rows(SIZE), range(SIZE))


def test_split_forward(accesses):
    given = tensors("user", "item", *WEIGHTS, "partial", "layer", "value")
    read, written = accesses(split.split_forward_kernel, given, (1, SEEN), USERS, COLUMNS=32, SAVE=True)
    assert of_rows(read, given) == places(given["user"], last_rows(DIM), range(DIM))
    partial = [k * ROWS * SIZE + at for k in range(SEEN) for at in last_rows(SIZE)]
    assert written == (
        places(given["partial"], partial, range(SIZE))
        | places(given["layer"], last_rows(WIDTH), range(WIDTH))
        | places(given["value"], last_rows(SEEN * SIZE), range(SEEN * SIZE))
    )


def test_split_reduce(accesses):
    given = tensors("partial", "result")
    read, written = accesses(split.split_reduce_kernel, given, (1,), {"total": ROWS})
    partial = [k * ROWS * SIZE + at for k in range(SEEN) for at in last_rows(SIZE)]
    assert read == places(given["partial"], partial, range(SIZE))
    assert written == places(given["result"], last_rows(SIZE), range(SIZE))


def test_tail_forward(accesses):
    given = tensors("z", "weight2", "bias2", "result", "value")
    read, written = accesses(tail.tail_forward_kernel, given, (1,), {"rows": ROWS} | AT, SAVE=True)
    assert of_rows(read, given) == places(given["z"], last_rows(WIDTH), range(WIDTH))
    assert written == (
        places(given["result"], last_rows(SIZE), range(SIZE))
        | places(given["value"], last_rows(SEEN * SIZE), range(SEEN * SIZE))
    )


def test_tail_backward(accesses):
    given = tensors("z", "value", "grad", "weight2", "z_grad", "part")
    sizes = {"rows": ROWS, "chunk_rows": TILE} | AT
    read, written = accesses(tail.tail_backward_kernel, given, (1, SEEN + 1), sizes)
    assert of_rows(read, given) == (
        places(given["z"], last_rows(WIDTH), range(WIDTH))
        | places(given["value"], last_rows(SEEN * SIZE), range(SEEN * SIZE))
        | places(given["grad"], last_rows(SIZE), range(SIZE))
    )
    part = WIDTH + SEEN * SIZE + SEEN * SIZE * SIZE
    assert written == (
        places(given["z_grad"], last_rows(WIDTH), range(WIDTH))
        | places(given["part"], [FIRST // TILE * part], range(part))
    )
