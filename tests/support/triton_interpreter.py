"""Owns Triton's interpreter in tests: it turns the interpreter on and checks every memory access of kernels.

Triton decides when a kernel is defined whether the interpreter will run it. So this module sets TRITON_INTERPRET and
imports the kernels, before anything else does. The variable does not stay set: other tests start processes, which
would inherit it.
"""

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

VARIABLE: Final = "TRITON_INTERPRET"
INTERPRETS: Final = importlib.util.find_spec("triton") is not None and not torch.cuda.is_available()
"""With a GPU, the session runs kernels there, and the interpreter cannot run in the same session."""
interpreted: Final = pytest.mark.skipif(not INTERPRETS, reason="only where triton is installed and there is no GPU")

if INTERPRETS:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "1")
        from kar_kernels import tiles

        if not tiles.INTERPRETED:
            raise RuntimeError("kernels were imported before tests.support.triton_interpreter: they would need a GPU")
        for name in ("fused_expert_pairs", "fused_per_expert", "gemm_then_fused"):
            importlib.import_module(f"kar_kernels.{name}")


class MemoryFault(AssertionError):
    """A kernel read or wrote memory that it must not."""


class Launch:
    """The memory that one launch may access, and its reads and writes of it."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        spans = sorted(
            (tensor.data_ptr(), tensor.data_ptr() + tensor.element_size() * (1 + last))
            for tensor in tensors
            if tensor.numel()
            for last in [sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))]
        )
        merged: list[tuple[int, int]] = []
        for start, end in spans:
            if merged and start < merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((start, end))
        self.starts, self.ends = np.array(merged, dtype=np.int64).reshape(-1, 2).T
        self.read: set[int] = set()
        self.written: list[np.ndarray] = []

    def accessed(self, pointers: np.ndarray, mask: np.ndarray, item_bytes: int) -> tuple[np.ndarray, set[int]]:
        """Addresses, and the numbers of the tensors that they lie in."""
        addresses = pointers[np.broadcast_to(mask, pointers.shape)].astype(np.int64)
        tensors = np.searchsorted(self.starts, addresses, side="right") - 1
        if (tensors < 0).any() or (addresses + item_bytes > self.ends[tensors]).any():
            raise MemoryFault("a kernel accesses memory outside of its tensors")
        return addresses, set(np.unique(tensors).tolist())

    def load(self, pointers: np.ndarray, mask: np.ndarray, item_bytes: int) -> None:
        """Note a read."""
        self.read |= self.accessed(pointers, mask, item_bytes)[1]

    def store(self, pointers: np.ndarray, mask: np.ndarray, item_bytes: int) -> None:
        """Note a write."""
        addresses, tensors = self.accessed(pointers, mask, item_bytes)
        self.written.append(addresses)
        if tensors & self.read:
            raise MemoryFault("a tensor is read and written: another program may do so at the same time")

    def end(self) -> None:
        """Check that no two programs wrote the same place."""
        written = np.concatenate([np.empty(0, np.int64), *self.written])
        if len(np.unique(written)) < len(written):
            raise MemoryFault("two programs write the same place: which is last is not defined")


@contextmanager
def checked_launches() -> Iterator[list[str]]:
    """Checks each access of interpreted kernels to memory; gives the names of the kernels launched, in order."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    builder, function = interpreter.InterpreterBuilder, interpreter.InterpretedFunction
    load, store, run = builder.create_masked_load, builder.create_masked_store, function.run
    patch_language = interpreter._patch_lang
    patched: set[int] = set()
    """Modules in which the running launch has replaced Triton's language."""
    names: list[str] = []
    running: list[Launch] = []

    def checked_load(self, ptrs, mask, other, *rest):
        kind = np.dtype(interpreter._get_np_dtype(ptrs.get_element_ty()))
        running[-1].load(ptrs.data, mask.data, kind.itemsize)
        if other is None:
            # Where nothing is loaded, the interpreter gives 0 and a GPU the old contents of a register.
            other = interpreter.TensorHandle(np.full(ptrs.data.shape, np.nan, kind), ptrs.get_element_ty())
        return load(self, ptrs, mask, other, *rest)

    def checked_store(self, ptrs, value, mask, *rest):
        running[-1].store(ptrs.data, mask.data, value.data.dtype.itemsize)
        return store(self, ptrs, value, mask, *rest)

    def patch_language_once(function):
        # The interpreter does so at every call of a device function, which takes a third of its time.
        if id(function.__globals__) in patched:
            return interpreter._LangPatchScope()
        patched.add(id(function.__globals__))
        return patch_language(function)

    def checked_run(self, *args, **kwargs):
        names.append(self.__name__)
        patched.clear()
        running.append(Launch([argument for argument in args if isinstance(argument, Tensor)]))
        try:
            # The interpreter's own calls of torch do not belong to the kernel.
            with _disable_current_modes():
                run(self, *args, **kwargs)
            running[-1].end()
        except interpreter.InterpreterError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, MemoryFault):
                cause = cause.__cause__
            raise cause or error from None
        finally:
            running.pop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", checked_load)
        patch.setattr(builder, "create_masked_store", checked_store)
        patch.setattr(function, "run", checked_run)
        patch.setattr(interpreter, "_patch_lang", patch_language_once)
        yield names
