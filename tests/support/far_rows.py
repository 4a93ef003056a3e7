"""Owns runs of kernels at row 2 ** 30 without that much memory: it records the addresses that they read and write."""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tests.support.triton_interpreter import INTERPRETS

from kar_kernels.layout import Shape

BLOCK = 16
FIRST = 2**30
ROWS = FIRST + BLOCK
"""Only the last block of the rows is run."""
EXPERTS, SEEN, SIZE, DIM = 3, 2, 16, 64
WIDTH = SIZE + SEEN * SIZE
WEIGHTS = ("first_ptr", "bias1_ptr", "weight2_ptr", "bias2_ptr")
USERS = {"users": ROWS, "items": 0, "user_stride": DIM, "item_stride": DIM, "dim": DIM}
COLUMNS = {"first_expert": 0, "logit_column": 0, "hidden_column": SIZE}


class Accesses(NamedTuple):
    """Addresses that a launch reads (without those of the small weights) and writes."""

    read: set[int]
    written: set[int]


def accesses(
    kernel: Any, tensors: Mapping[str, torch.Tensor], grid: tuple[int, ...], sizes: Mapping[str, int], **more: Any
) -> Accesses:
    """Run the program of the block at row `FIRST`, without memory behind the addresses."""
    assert INTERPRETS
    interpreter = importlib.import_module("triton.runtime.interpreter")
    tiles = importlib.import_module("kar_kernels.tiles")
    read: set[int] = set()
    written: set[int] = set()

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
        patch.setattr(builder, "set_grid_idx", lambda self, x, *yz: index(self, x + FIRST // BLOCK, *yz))
        patch.setattr(builder, "set_grid_dim", lambda self, x, *yz: size(self, x + FIRST // BLOCK, *yz))
        shape = Shape(DIM, EXPERTS, SEEN, SIZE, SIZE, SIZE)
        constants = tiles.constants(torch.float64, shape)
        fixed = {name: value for name, value in constants.items() if name in kernel.arg_names}
        kernel[grid](**tensors, **sizes, **fixed, **more, BLOCK_ROWS=BLOCK)
    weights = [tensors[name].data_ptr() for name in WEIGHTS if name in tensors]
    weight_bytes = 8 * (2 * SIZE + EXPERTS * SIZE) * DIM
    read = {address for address in read if not any(start <= address < start + weight_bytes for start in weights)}
    return Accesses(read, written)


def stand_ins(*names: str) -> dict[str, torch.Tensor]:
    """Tensors of one number, whose addresses stand for tensors of any size."""
    return {name: torch.zeros(1, dtype=torch.float64) for name in names}


def places(tensor: torch.Tensor, rows: Sequence[int], columns: range) -> set[int]:
    """Addresses of float64 numbers at each of `rows` + each of `columns`."""
    return {tensor.data_ptr() + 8 * (row + column) for row in rows for column in columns}


def last_rows(numbers: int) -> list[int]:
    """Offsets at which the rows of the last block begin, if a row has `numbers` numbers."""
    return [row * numbers for row in range(FIRST, ROWS)]
