import pytest
import torch
from tests.support.adaptor_problems import adaptor_excesses

from kar_kernels import HybridExpertAdaptor, adaptor
from kar_kernels.dispatch import Choice

pytestmark = pytest.mark.unit


def make(precision="float32", **of):
    torch.manual_seed(0)
    made = HybridExpertAdaptor(64, **{"hidden": 16, "out": 16} | of)
    made.precision = precision
    with torch.no_grad():
        for tower in made.towers:
            made.neutral(tower).normal_()
    return made


def encodings(rows=5):
    generator = torch.Generator().manual_seed(1)
    x = {tower: torch.randn(rows, 64, generator=generator) for tower in ("user", "item")}
    present = {"user": torch.arange(rows) % 2 == 0, "item": torch.arange(rows) != 1}
    for tower in x:
        x[tower][~present[tower]] = torch.nan
    return {tower: (x[tower], present[tower]) for tower in x}


@pytest.mark.parametrize("out", [16, 7])
def test_equals_the_module(out):
    module, given = make(out=out), encodings()
    found, want = module.freeze().adapt(given), module.adapt(given)
    assert found.keys() == want.keys() == {"user", "item"}
    for tower in want:
        x, present = given[tower]
        for vectors in (found[tower], want[tower]):
            assert adaptor_excesses(module, {tower: x[present]}, {tower: vectors[present]}) == []
        assert not found[tower].requires_grad
        absent = ~given[tower][1]
        assert torch.equal(found[tower][absent], module.neutral(tower).detach().expand(int(absent.sum()), -1))


@pytest.mark.parametrize("tower", ["user", "item"])
def test_one_tower_alone(tower):
    for module in (make(), make(towers=[tower])):
        given = {tower: encodings()[tower]}
        assert module.freeze().adapt({}) == {}
        found = module.freeze().adapt(given)
        assert found.keys() == {tower}
        x, present = given[tower]
        assert adaptor_excesses(module, {tower: x[present]}, {tower: found[tower][present]}) == []


@pytest.mark.parametrize(("tower", "other"), [("user", "item"), ("item", "user")])
def test_a_tower_that_does_not_exist_is_refused(tower, other):
    module, given = make(towers=[tower]), encodings()
    for call in (
        lambda: module.adapt({other: given[other]}),
        lambda: module.tower(given[other][0], other),
        lambda: module(given["user"][0], given["item"][0]),
        lambda: module.freeze().adapt({other: given[other]}),
    ):
        with pytest.raises(ValueError, match=f"no {other} tower"):
            call()


def test_does_not_change_when_the_module_trains_on():
    module, given = make(), encodings()
    frozen = module.freeze()
    before = frozen.adapt(given)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    for tower, after in frozen.adapt(given).items():
        assert torch.equal(after, before[tower])


@pytest.mark.parametrize(
    ("precision", "processor", "dtype"),
    [
        ("float32", True, torch.float32),
        ("bfloat16", True, torch.bfloat16),
        ("bfloat16", False, torch.float32),
    ],
)
def test_bfloat16_where_allowed_and_fast(monkeypatch, precision, processor, dtype):
    monkeypatch.setattr(adaptor, "has_bfloat16", lambda: processor)
    frozen = make(precision).freeze()
    weights = frozen.weights
    assert {one.dtype for one in (weights.first, weights.bias1, weights.weight2, weights.bias2)} == {dtype}
    given = encodings()
    for tower, vectors in frozen.adapt(given).items():
        # Vectors have the encodings' dtype.
        assert vectors.dtype == torch.float32
        x, present = given[tower]
        known = {tower: x[present].to(dtype)}, {tower: vectors[present]}
        module = make()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(parameter.to(dtype))
        assert adaptor_excesses(module, *known, dtype) == []
        # Float32 would be nearer.
        assert (adaptor_excesses(module, *known, torch.float32) != []) == (dtype == torch.bfloat16)


def test_choice():
    assert make().freeze().choice(10**6) == Choice("cpu", "tensors are on the processor")


def test_choice_follows_the_environment(monkeypatch):
    monkeypatch.setenv("KAR_ADAPTOR", "eager")
    assert make().freeze().choice(1) == Choice("eager", "KAR_ADAPTOR says so")
