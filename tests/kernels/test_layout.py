import dataclasses

import pytest
import torch
from torch.nn import functional as F

from kar_kernels.layout import PackedWeights, Shape, pack

pytestmark = pytest.mark.unit

# The default adaptor: 12 experts, of which a tower sees 7.
DEFAULT = Shape(dim=768, experts=12, seen=7, hidden=128, out=32, gate_rows=16)


def tiny():
    """Three experts of one hidden unit on D = 2, K = 1; a tower sees two, the middle one is shared."""
    return (
        torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]], [[5.0, 6.0]]]),
        torch.tensor([[10.0], [20.0], [30.0]]),
        torch.tensor([[[7.0]], [[8.0]], [[9.0]]]),
        torch.tensor([[0.1], [0.2], [0.3]]),
        torch.tensor([[[-1.0, -2.0], [-3.0, -4.0]], [[-5.0, -6.0], [-7.0, -8.0]]]),
        torch.tensor([[-10.0, -20.0], [-30.0, -40.0]]),
    )


def test_pack_by_hand():
    weights = pack(*tiny())
    # Gates and hidden units are padded to 16 rows each, D to 64 columns: five blocks of 16 rows.
    first, bias1 = torch.zeros(80, 64), torch.zeros(80)
    first[0, :2], first[1, :2], bias1[0], bias1[1] = torch.tensor([-1.0, -2]), torch.tensor([-3.0, -4]), -10, -20
    first[16, :2], bias1[16] = torch.tensor([1.0, 2]), 10
    first[32, :2], bias1[32] = torch.tensor([3.0, 4]), 20
    first[48, :2], bias1[48] = torch.tensor([5.0, 6]), 30
    first[64, :2], first[65, :2], bias1[64], bias1[65] = torch.tensor([-5.0, -6]), torch.tensor([-7.0, -8]), -30, -40
    assert torch.equal(weights.first, first)
    assert torch.equal(weights.bias1, bias1)
    weight2, bias2 = torch.zeros(3, 16, 16), torch.zeros(3, 16)
    weight2[:, 0, 0], bias2[:, 0] = torch.tensor([7.0, 8, 9]), torch.tensor([0.1, 0.2, 0.3])
    assert torch.equal(weights.weight2, weight2)
    assert torch.equal(weights.bias2, bias2)
    assert (weights.seen, weights.dim, weights.out) == (2, 2, 1)
    assert Shape.of(weights.first, weights.weight2, 2) == Shape(64, 3, 2, 16, 16, 16)


def test_one_gate_is_both_towers():
    *experts, gate_weight, gate_bias = tiny()
    weights = pack(*experts, gate_weight[1:], gate_bias[1:])
    for rows in (slice(0, 2), slice(64, 66)):
        assert torch.equal(weights.first[rows, :2], gate_weight[1])
        assert torch.equal(weights.bias1[rows], gate_bias[1])


def test_towers_of_the_packed_matrix_by_hand():
    # 16 gate rows, 12 experts of 128, 16 gate rows: 1568. A tower is its gate and 7 experts: 912.
    assert (DEFAULT.rows, DEFAULT.width) == (1568, 912)
    assert [DEFAULT.tower(0), DEFAULT.tower(1)] == [slice(0, 912), slice(656, 1568)]
    assert [DEFAULT.gates(0), DEFAULT.gates(1)] == [slice(0, 7), slice(896, 903)]
    assert [DEFAULT.hiddens(0), DEFAULT.hiddens(1)] == [slice(16, 912), slice(0, 896)]
    assert [DEFAULT.expert(0), DEFAULT.expert(1)] == [slice(0, 7), slice(5, 12)]


@pytest.mark.parametrize(("seen", "gate_rows"), [(1, 16), (16, 16), (17, 32), (33, 64)])
def test_gates_are_padded_to_a_power_of_two(seen, gate_rows):
    weights = pack(
        torch.ones(seen, 16, 64),
        torch.ones(seen, 16),
        torch.ones(seen, 16, 16),
        torch.ones(seen, 16),
        torch.ones(2, seen, 64),
        torch.ones(2, seen),
    )
    assert Shape.of(weights.first, weights.weight2, seen).gate_rows == gate_rows
    assert weights.first.shape == (2 * gate_rows + 16 * seen, 64)
    # Between a gate and the experts, and after the last gate.
    assert not weights.first[seen:gate_rows].any()
    assert not weights.first[-(gate_rows - seen) :].any() or seen == gate_rows
    assert weights.bias1.sum() == 2 * seen + 16 * seen


@pytest.mark.parametrize(("hidden", "out", "dim"), [(15, 16, 64), (17, 9, 65), (32, 33, 128)])
def test_padding_adds_nothing(hidden, out, dim):
    torch.manual_seed(hidden)
    raw = [torch.randn(*of).double() for of in ((3, hidden, dim), (3, hidden), (3, out, hidden), (3, out))]
    gates = [torch.randn(2, 2, dim).double(), torch.randn(2, 2).double()]
    weights = pack(*raw, *gates)
    shape = Shape.of(weights.first, weights.weight2, 2)
    x = torch.randn(4, dim).double()
    padded = F.pad(x, (0, shape.dim - dim))
    for tower in (0, 1):
        block = shape.tower(tower)
        z = padded @ weights.first[block].T + weights.bias1[block]
        torch.testing.assert_close(z[:, shape.gates(tower)], x @ gates[0][tower].T + gates[1][tower])
        hiddens = z[:, shape.hiddens(tower)].unflatten(1, (2, shape.hidden)).relu()
        for k, e in enumerate(range(tower, tower + 2)):
            want = torch.relu(x @ raw[0][e].T + raw[1][e])
            torch.testing.assert_close(hiddens[:, k, :hidden], want)
            assert not hiddens[:, k, hidden:].any()
            second = hiddens[:, k] @ weights.weight2[shape.expert(tower)][k].T + weights.bias2[shape.expert(tower)][k]
            torch.testing.assert_close(second[:, :out], want @ raw[2][e].T + raw[3][e])
            assert not second[:, out:].any()


def test_what_needs_no_padding_is_not_copied():
    raw = torch.ones(3, 16, 64), torch.ones(3, 16), torch.ones(3, 16, 16), torch.ones(3, 16)
    weights = pack(*raw, torch.ones(2, 2, 64), torch.ones(2, 2))
    assert weights.weight2.data_ptr() == raw[2].data_ptr()
    assert weights.bias2.data_ptr() == raw[3].data_ptr()


def test_pack_is_differentiable():
    raw = [one.requires_grad_() for one in tiny()]
    weights = pack(*raw)
    (
        3 * weights.first.sum() + 5 * weights.bias1.sum() + 7 * weights.weight2.sum() + 11 * weights.bias2.sum()
    ).backward()
    for one, want in zip(raw, (3, 5, 7, 11, 3, 5), strict=True):
        assert torch.equal(one.grad, torch.full_like(one, want))


def test_another_dtype_is_outside_of_autograd():
    weights = pack(*(one.requires_grad_() for one in tiny()))
    half = weights.to(torch.bfloat16)
    tensors = (half.first, half.bias1, half.weight2, half.bias2)
    assert {one.dtype for one in tensors} == {torch.bfloat16}
    assert not any(one.requires_grad for one in tensors)
    assert (half.seen, half.dim, half.out) == (2, 2, 1)
    assert half.first[48, 1] == 6


def change(**tensors):
    return dataclasses.replace(pack(*tiny()), **tensors)


@pytest.mark.parametrize(
    "weights",
    [
        change(first=torch.zeros(79, 64)),
        change(first=torch.zeros(80, 63)),
        change(weight2=torch.zeros(3, 16, 15)),
        change(weight2=torch.zeros(3, 15, 16)),
        change(weight2=torch.zeros(3, 8, 16)),
        # Of three experts, towers of one leave one that nobody sees; towers of four cannot be.
        change(seen=1),
        change(seen=4),
        change(seen=17),
    ],
    ids=["rows", "D", "hidden", "out", "small out", "too few gates", "too many gates", "other padding"],
)
def test_unpacked_weights_are_refused(weights: PackedWeights):
    with pytest.raises(ValueError, match="are not packed: use `pack`"):
        Shape.of(weights.first, weights.weight2, weights.seen)
