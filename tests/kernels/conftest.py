"""Owns the problems that kernels are tested on, their answers by the reference loop, and the interpreter's switch."""

import importlib
import importlib.util
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from kar_kernels.layout import PackedWeights, Shape, pack
from kar_kernels.operator import hybrid_expert_adaptor
from kar_kernels.reference import Expert, hybrid_expert_reference

INTERPRET = "TRITON_INTERPRET"
# Where there is a GPU, the same session runs kernels on it: they cannot be interpreted as well.
INTERPRETS = importlib.util.find_spec("triton") is not None and not torch.cuda.is_available()
if INTERPRETS:
    # Triton decides when a kernel is defined whether it is interpreted. The variable does not stay set, because other
    # tests of this session start processes that inherit it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(INTERPRET, "1")
        from kar_kernels import tiles

        if not tiles.INTERPRETED:
            raise RuntimeError("kernels were imported before tests/kernels/conftest.py: they would need a GPU")
        for name in ("pair", "split", "tail"):
            importlib.import_module(f"kar_kernels.{name}")

Result = dict[str, Tensor]
PARAMETERS = ("weight1", "bias1", "weight2", "bias2", "gate_weight", "gate_bias")
INPUTS = ("user", "item", *PARAMETERS)


@dataclass(frozen=True)
class Sizes:
    """An adaptor: D, H, K, S, P, how many towers it has, and whether they share a gate."""

    dim: int = 50
    hidden: int = 32
    out: int = 7
    shared: int = 2
    dedicated: int = 5
    towers: int = 2
    one_gate: bool = False

    @property
    def seen(self) -> int:
        return self.shared + self.dedicated

    @property
    def experts(self) -> int:
        return self.shared + self.towers * self.dedicated

    def of(self, tower: int) -> range:
        """The experts that a tower sees. An adaptor of one tower has the same for both."""
        start = self.dedicated if tower == 1 and self.towers == 2 else 0
        return range(start, start + self.seen)


@dataclass(frozen=True)
class Problem:
    """Raw weights, encodings and gradients of the vectors, all float64, with values that `dtype` has exactly."""

    sizes: Sizes
    dtype: torch.dtype
    x_dtype: torch.dtype
    inputs: tuple[Tensor, ...]
    upstream: tuple[Tensor, Tensor]

    @property
    def rows(self) -> tuple[int, int]:
        return len(self.inputs[0]), len(self.inputs[1])

    def leaves(self, x_dtype: torch.dtype, dtype: torch.dtype) -> list[Tensor]:
        return [
            one.to(x_dtype if at < 2 else dtype).detach().clone().requires_grad_() for at, one in enumerate(self.inputs)
        ]

    def solve(self, adaptor: Callable[..., tuple[Tensor, Tensor]], x_dtype: torch.dtype, dtype: torch.dtype) -> Result:
        """What `adaptor(user, item, *parameters)` gives: vectors and all gradients, as float64."""
        leaves = self.leaves(x_dtype, dtype)
        outs = adaptor(*leaves)
        assert [out.dtype for out in outs] == [x_dtype, x_dtype]
        grads = torch.autograd.grad(
            outs,
            leaves,
            [dy.to(out.dtype) for dy, out in zip(self.upstream, outs, strict=True)],
            materialize_grads=True,
            allow_unused=True,
        )
        for grad, leaf in zip(grads, leaves, strict=True):
            assert grad.dtype == leaf.dtype
        found = dict(zip(("user", "item"), outs, strict=True)) | {
            f"gradient of {name}": grad for name, grad in zip(INPUTS, grads, strict=True)
        }
        return {name: one.detach().double() for name, one in found.items()}

    def loop(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """The reference loop on the raw weights, which were never packed."""
        user, item, weight1, bias1, weight2, bias2, gate_weight, gate_bias = tensors
        outs = []
        for tower, x in enumerate((user, item)):
            experts = [Expert(weight1[e], bias1[e], weight2[e], bias2[e]) for e in self.sizes.of(tower)]
            gate = 0 if len(gate_weight) == 1 else tower
            x = x.to(weight1.dtype)
            out = hybrid_expert_reference(x, experts, gate_weight[gate], gate_bias[gate])
            outs.append(out.to(user.dtype))
        return outs[0], outs[1]

    @cached_property
    def expected(self) -> Result:
        """The answer, in float64."""
        return self.solve(self.loop, torch.float64, torch.float64)

    @cached_property
    def eager(self) -> Result:
        """What the loop makes of it in its own dtypes."""
        return self.solve(self.loop, self.x_dtype, self.dtype)

    def by(self, path: str) -> Result:
        """What the operator makes of it."""
        return self.solve(
            lambda user, item, *raw: hybrid_expert_adaptor(user, item, pack(*raw), path=path), self.x_dtype, self.dtype
        )

    def packed(self) -> tuple[Tensor, Tensor, PackedWeights, Shape]:
        """Encodings and weights as an implementation takes them."""
        user, item, *raw = (one.detach() for one in self.leaves(self.x_dtype, self.dtype))
        weights = pack(*raw)
        shape = Shape.of(weights.first, weights.weight2, weights.seen)
        more = shape.dim - self.sizes.dim
        return F.pad(user, (0, more)), F.pad(item, (0, more)), weights, shape

    def served_by(self, path: str) -> Result:
        """The operator's vectors where nothing needs a gradient."""
        user, item, *raw = (one.detach() for one in self.leaves(self.x_dtype, self.dtype))
        outs = hybrid_expert_adaptor(user, item, pack(*raw), path=path)
        return {name: one.double() for name, one in zip(("user", "item"), outs, strict=True)}

    @property
    def grad(self) -> Tensor:
        """The gradient of the vectors of both towers."""
        return torch.cat(self.upstream).to(self.x_dtype)

    def of(self, out: Tensor) -> Result:
        """Both towers' vectors in what an implementation returns."""
        assert out.dtype == self.x_dtype
        users, items = out[:, : self.sizes.out].detach().double().split(self.rows)
        return {"user": users, "item": items}

    def unpack(self, grads: Sequence[Tensor]) -> Result:
        """Gradients of the raw weights for those of the packed ones."""
        raw = self.leaves(self.x_dtype, self.dtype)[2:]
        weights = pack(*raw)
        back = torch.autograd.grad((weights.first, weights.bias1, weights.weight2, weights.bias2), raw, grads)
        return {f"gradient of {name}": one.double() for name, one in zip(PARAMETERS, back, strict=True)}

    def exact(self, found: Result) -> None:
        """Fail unless it is the answer to float64's precision."""
        for name, one in found.items():
            torch.testing.assert_close(
                one, self.expected[name], rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
            )

    def as_good_as_eager(self, found: Result) -> None:
        """Fail if an error is more than twice the loop's in the same dtypes, and the last rounding, which is luck."""
        for name, one in found.items():
            want = self.expected[name]
            if want.numel():
                error, loop = ((each - want).abs().max() for each in (one, self.eager[name]))
                allowed = 2 * loop + torch.finfo(self.dtype).eps / 2 * want.abs().max() + 1e-6
                assert error <= allowed, f"{name}: {error:.3g}, of the loop {loop:.3g}"


def far_from_zero(x: Tensor, raw: Sequence[Tensor], experts: range, margin: float) -> Tensor:
    """Which rows have no sum before a ReLU within `margin` of 0."""
    weight1, bias1, weight2, bias2, *_ = raw
    far = torch.ones(len(x), dtype=torch.bool)
    for e in experts:
        hidden = x @ weight1[e].T + bias1[e]
        value = hidden.relu() @ weight2[e].T + bias2[e]
        far &= (hidden.abs() >= margin).all(1) & (value.abs() >= margin).all(1)
    return far


Make = Callable[..., Problem]


@pytest.fixture
def make(request: pytest.FixtureRequest) -> Make:
    """Problems with random numbers of the test's own: make(users, items, dim=64) and other `Sizes`."""
    generator = torch.Generator().manual_seed(zlib.crc32(request.node.nodeid.encode()))

    def problem(
        users: int = 5,
        items: int = 19,
        dtype: torch.dtype = torch.float64,
        x_dtype: torch.dtype | None = None,
        gate_scale: float = 1.0,
        margin: float = 0.0,
        **of: int,
    ) -> Problem:
        sizes = Sizes(**of)
        x_dtype = x_dtype or dtype

        def normal(*shape: int, scale: float, of: torch.dtype = dtype) -> Tensor:
            return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(of).double()

        gates = 1 if sizes.one_gate or sizes.towers == 1 else 2
        experts, dim, hidden, out = sizes.experts, sizes.dim, sizes.hidden, sizes.out
        # Scaled so that no gate is near 0: with one expert of all weight, errors of the others would not be seen.
        raw = (
            normal(experts, hidden, dim, scale=dim**-0.5),
            normal(experts, hidden, scale=0.5),
            normal(experts, out, hidden, scale=(hidden / 2) ** -0.5),
            normal(experts, out, scale=0.5),
            normal(gates, sizes.seen, dim, scale=dim**-0.5),
            normal(gates, sizes.seen, scale=0.5 * gate_scale),
        )
        encodings = []
        for tower, rows in enumerate((users, items)):
            x = normal(rows * (100 if margin else 1), dim, scale=1, of=x_dtype)
            encodings.append(x[far_from_zero(x, raw, sizes.of(tower), margin)][:rows])
            assert len(encodings[-1]) == rows
        upstream = normal(users, out, scale=1, of=x_dtype), normal(items, out, scale=1, of=x_dtype)
        return Problem(sizes, dtype, x_dtype, (*encodings, *raw), upstream)

    return problem


@pytest.fixture(autouse=True)
def interpreted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests in this process have interpreted kernels; those that start another get it as a user would."""
    monkeypatch.delenv("KAR_ADAPTOR", raising=False)
    if INTERPRETS and not request.node.get_closest_marker("service"):
        monkeypatch.setenv(INTERPRET, "1")
    else:
        monkeypatch.delenv(INTERPRET, raising=False)


@pytest.fixture(autouse=True)
def poisoned(request: pytest.FixtureRequest) -> Iterator[None]:
    """New memory holds NaN, so that what a kernel leaves unwritten is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    # On a GPU, torch would also refuse what it cannot repeat bit for bit.
    torch.use_deterministic_algorithms(not request.node.get_closest_marker("gpu"))
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True, scope="package")
def threads() -> Iterator[None]:
    """One thread: matrices are small, and the interpreter's own loop is what takes time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class OutOfBounds(AssertionError):
    """A kernel read or wrote what it must not."""


class Launch:
    """What one launch reads and writes, of the tensors it was given."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        spans = sorted(
            (one.data_ptr(), one.data_ptr() + one.element_size() * (1 + last))
            for one in tensors
            if one.numel()
            for last in [sum((size - 1) * stride for size, stride in zip(one.shape, one.stride(), strict=True))]
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

    def spans(self, pointers: np.ndarray, mask: np.ndarray, size: int) -> tuple[np.ndarray, set[int]]:
        """Addresses, and the numbers of the tensors that they lie in."""
        at = pointers[np.broadcast_to(mask, pointers.shape)].astype(np.int64)
        span = np.searchsorted(self.starts, at, side="right") - 1
        if (span < 0).any() or (at + size > self.ends[span]).any():
            raise OutOfBounds("outside of the tensors that it was given")
        return at, set(np.unique(span).tolist())

    def load(self, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        self.read |= self.spans(pointers, mask, size)[1]

    def store(self, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        at, spans = self.spans(pointers, mask, size)
        self.written.append(at)
        if spans & self.read:
            raise OutOfBounds("a tensor is read and written: another program may do so at the same time")

    def end(self) -> None:
        written = np.concatenate([np.empty(0, np.int64), *self.written])
        if len(np.unique(written)) < len(written):
            raise OutOfBounds("two programs write the same place: which is last is not defined")


@contextmanager
def sanitizer() -> Iterator[list[str]]:
    """Checks each access of interpreted kernels to memory; gives the names of the kernels launched, in order."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    builder, function = interpreter.InterpreterBuilder, interpreter.InterpretedFunction
    load, store, run = builder.create_masked_load, builder.create_masked_store, function.run
    names: list[str] = []
    running: list[Launch] = []

    def checked_load(self, ptrs, mask, other, *rest):
        kind = interpreter._get_np_dtype(ptrs.get_element_ty())
        running[-1].load(ptrs.data, mask.data, np.dtype(kind).itemsize)
        if other is None:
            # The interpreter gives 0 where nothing is loaded, a GPU whatever the register held.
            other = interpreter.TensorHandle(np.full(ptrs.data.shape, np.nan, kind), ptrs.get_element_ty())
        return load(self, ptrs, mask, other, *rest)

    def checked_store(self, ptrs, value, mask, *rest):
        running[-1].store(ptrs.data, mask.data, value.data.dtype.itemsize)
        return store(self, ptrs, value, mask, *rest)

    def checked_run(self, *args, **kwargs):
        names.append(self.__name__)
        running.append(Launch([one for one in args if isinstance(one, Tensor)]))
        try:
            # What the interpreter does with torch is not the kernel's.
            with _disable_current_modes():
                run(self, *args, **kwargs)
            running[-1].end()
        except interpreter.InterpreterError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OutOfBounds):
                cause = cause.__cause__
            raise cause or error from None
        finally:
            running.pop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", checked_load)
        patch.setattr(builder, "create_masked_store", checked_store)
        patch.setattr(function, "run", checked_run)
        yield names


@pytest.fixture(autouse=True)
def launches() -> Iterator[list[str]]:
    """Names of the Triton kernels launched, in order. Every launch of every test is checked."""
    if INTERPRETS:
        with sanitizer() as names:
            yield names
    else:
        yield []
