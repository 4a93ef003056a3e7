import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.adaptor_problems import PARAMETERS, adaptor_excesses

from kar_kernels.adaptor import TOWERS, HybridExpertAdaptor
from kar_kernels.reference import Expert, hybrid_expert_reference
from kar_kernels_bench.rounding import INPUTS, Units, excesses, rounding_limits

pytestmark = pytest.mark.unit

SHAPES = [(58, 50, 32, 7, 2, 5), (1, 3, 5, 2, 1, 0), (7, 384, 128, 32, 2, 5), (5, 6, 4, 3, 0, 2)]


def make(dim, hidden, out, shared, dedicated, seed=0):
    torch.manual_seed(seed)
    adaptor = HybridExpertAdaptor(dim, hidden=hidden, out=out, shared=shared, dedicated=dedicated).double()
    with torch.no_grad():
        for parameter in adaptor.parameters():
            parameter.normal_()
    return adaptor


def reference(adaptor, x, tower):
    number = TOWERS.index(tower)
    return hybrid_expert_reference(x, adaptor.experts(tower), adaptor.gate_weight[number], adaptor.gate_bias[number])


def test_reference_by_hand():
    # Two experts on x = [2]: f_0 = relu(3 * relu(2) - 1) = 5; f_1 = relu(1 * relu(-2 + 1) + 4) = 4.
    one = [torch.tensor(v) for v in ([[1.0]], [0.0], [[3.0]], [-1.0])]
    two = [torch.tensor(v) for v in ([[-1.0]], [1.0], [[1.0]], [4.0])]
    # Gate logits ln 3 and 0 on any x: weights 3/4 and 1/4.
    out = hybrid_expert_reference(
        torch.tensor([[2.0]]), [Expert(*one), Expert(*two)], torch.zeros(2, 1), torch.tensor([3.0, 1.0]).log()
    )
    torch.testing.assert_close(out, torch.tensor([[0.75 * 5 + 0.25 * 4]]))


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference_with_gradients(shape):
    rows, *sizes = shape
    adaptor = make(*sizes)
    user = torch.randn(sizes[0], rows, dtype=torch.float64).T.requires_grad_()  # not contiguous
    item = torch.randn(rows + 3, sizes[0], dtype=torch.float64, requires_grad=True)
    parameters = [adaptor.get_parameter(name) for name in PARAMETERS]
    inputs = dict(zip(INPUTS, (user, item, *parameters), strict=True))
    upstream = (torch.randn(rows, sizes[2]).double(), torch.randn(rows + 3, sizes[2]).double())

    def results(vectors):
        gradients = torch.autograd.grad(vectors, list(inputs.values()), upstream)
        named = {f"gradient of {name}": gradient for name, gradient in zip(INPUTS, gradients, strict=True)}
        return named | {name: out.detach() for name, out in zip(INPUTS[:2], vectors, strict=True)}

    slow = reference(adaptor, user, "user"), reference(adaptor, item, "item")
    limits = rounding_limits(inputs, upstream, Units.of(torch.float64))
    assert excesses(results(adaptor(user, item)), results(slow), limits) == []
    neutral = torch.autograd.grad(adaptor(user, item), adaptor.user_neutral, upstream, allow_unused=True)
    assert neutral == (None,)


def test_empty_batch():
    adaptor = make(6, 4, 3, 2, 1)
    user, item = adaptor(torch.zeros(0, 6).double(), torch.ones(2, 6).double())
    assert user.shape == (0, 3)
    assert item.shape == (2, 3)
    assert adaptor.adapt({"user": (torch.zeros(0, 6).double(), torch.zeros(0, dtype=torch.bool))})["user"].shape == (
        0,
        3,
    )


def test_towers_share_exactly_the_shared_experts():
    adaptor = make(6, 4, 3, 2, 1)
    pairs = [
        (i, j)
        for i, a in enumerate(adaptor.experts("user"))
        for j, b in enumerate(adaptor.experts("item"))
        if torch.equal(a.weight1, b.weight1)
    ]
    assert pairs == [(1, 0), (2, 1)]


def test_parameter_count_of_the_paper():
    adaptor = HybridExpertAdaptor(768)
    neutral = adaptor.user_neutral.numel() + adaptor.item_neutral.numel()
    assert sum(p.numel() for p in adaptor.parameters()) - neutral == 1_241_486


def test_rows_do_not_depend_on_each_other():
    adaptor = make(6, 4, 3, 2, 1)
    x = torch.randn(9, 6).double()
    assert adaptor_excesses(adaptor, {"item": x}, {"item": adaptor.tower(x, "item")}) == []
    assert adaptor_excesses(adaptor, {"item": x[4:5]}, {"item": adaptor.tower(x[4:5], "item")}) == []


def test_adapt_gives_the_neutral_vector_whatever_the_encoding():
    adaptor = make(6, 4, 3, 2, 1)
    x = torch.randn(3, 6).double()
    x[1] = float("nan")
    out = adaptor.adapt({"user": (x, torch.tensor([True, False, True]))})["user"]
    assert adaptor_excesses(adaptor, {"user": x[[0, 2]]}, {"user": out[[0, 2]]}) == []
    assert torch.equal(out[1], adaptor.user_neutral)
    out.sum().backward()
    assert torch.isfinite(adaptor.weight1.grad).all()
    torch.testing.assert_close(adaptor.user_neutral.grad, torch.ones(3).double())


def test_save_and_load(tmp_path):
    adaptor = make(6, 4, 3, 2, 1).float()
    adaptor.save(tmp_path / "adaptor.safetensors")
    assert {"user_neutral", "item_neutral"} <= load_file(tmp_path / "adaptor.safetensors").keys()
    loaded = HybridExpertAdaptor.load(tmp_path / "adaptor.safetensors")
    assert (loaded.dim, loaded.hidden, loaded.out, loaded.shared, loaded.dedicated) == (6, 4, 3, 2, 1)
    x = torch.randn(5, 6)
    assert torch.equal(loaded.tower(x, "item"), adaptor.tower(x, "item"))


def test_load_names_a_file_of_another_kind(tmp_path):
    save_file({"weight1": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors"):
        HybridExpertAdaptor.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("sizes", [{"dim": 0}, {"dim": 4, "shared": 0, "dedicated": 0}, {"dim": 4, "shared": -1}])
def test_refuses_impossible_sizes(sizes):
    with pytest.raises(ValueError, match="at least one expert"):
        HybridExpertAdaptor(**sizes)


@pytest.mark.parametrize("tower", ["user", "item"])
def test_an_adaptor_of_one_tower_equals_that_tower_of_two(tmp_path, tower):
    both = HybridExpertAdaptor(6, hidden=4, out=3, shared=2, dedicated=3)
    one = HybridExpertAdaptor(6, hidden=4, out=3, shared=2, dedicated=3, towers=[tower])
    at = both._slice(tower)
    number = both.towers.index(tower)
    with torch.no_grad():
        for name in ("weight1", "bias1", "weight2", "bias2"):
            one.get_parameter(name).copy_(both.get_parameter(name)[at])
        one.gate_weight[0], one.gate_bias[0] = both.gate_weight[number], both.gate_bias[number]
    x = torch.randn(7, 6)
    for adaptor in (one, both):
        assert adaptor_excesses(adaptor, {tower: x}, {tower: one.tower(x, tower)}) == []
    one.save(tmp_path / "a.safetensors")
    loaded = HybridExpertAdaptor.load(tmp_path / "a.safetensors")
    assert loaded.towers == (tower,)
    assert torch.equal(loaded.tower(x, tower), one.tower(x, tower))
    other = "item" if tower == "user" else "user"
    with pytest.raises(ValueError, match=f"no {other} tower"):
        one.tower(x, other)
    with pytest.raises(ValueError, match=f"no {other} tower"):
        one.neutral(other)


def test_one_mixture_for_both_towers(tmp_path):
    adaptor = HybridExpertAdaptor(6, hidden=4, out=3, shared=4, dedicated=0, one_gate=True)
    x = torch.randn(5, 6)
    for vectors in adaptor(x, x):
        assert adaptor_excesses(adaptor, {"user": x}, {"user": vectors}) == []
    adaptor.save(tmp_path / "a.safetensors")
    loaded = HybridExpertAdaptor.load(tmp_path / "a.safetensors")
    assert (loaded.shared, loaded.dedicated, loaded.one_gate) == (4, 0, True)
    assert torch.equal(loaded.tower(x, "user"), adaptor.tower(x, "user"))
