import re

import numpy as np
import onnxruntime
import pytest
import torch
from tests.support.paths import DOCS
from tests.support.rounding import SCORE_LIMIT

from kar_kernels import HybridExpertAdaptor
from kar_offline.models import BACKBONES, RERANKERS, CTRModel, Encodings, Field, InputSpec
from kar_offline.models.onnx import export_onnx

pytestmark = pytest.mark.unit

DOC = (DOCS / "backbones.md").read_text(encoding="utf-8")
CODE, LINE = re.findall(r"^```python\n(.*?)^```$", DOC, re.DOTALL | re.MULTILINE)
SPEC = InputSpec(30, (Field(4, 1),), (Field(6, 2),), 1, 0, item_knowledge=5, affinity=3)
BARE = InputSpec(30, (), (), 0, 0)


def own(spec):
    names = {}
    exec(CODE, names)
    torch.manual_seed(0)
    return names["ProductNetwork"](spec, torch.randint(0, 6, (spec.items, spec.item_columns)))


def inputs(spec, candidates=7, requests=2):
    torch.manual_seed(1)
    values = {
        "history_item": torch.randint(0, spec.items, (requests, 4)),
        "history_rating": torch.randint(1, 11, (requests, 4)),
        "user_categorical": torch.randint(0, 4 if spec.user_fields else 1, (requests, spec.user_columns)),
        "user_numeric": torch.randn(requests, 1),
        "item_index": torch.randint(0, spec.items, (candidates,)),
        "item_categorical": torch.randint(0, 6 if spec.item_fields else 1, (candidates, spec.item_columns)),
        "item_numeric": torch.zeros(candidates, 1),
        "request_of_row": torch.arange(candidates) % requests,
        "item_knowledge": torch.randn(candidates, spec.item_knowledge),
        "affinity": torch.randn(candidates, spec.affinity),
    }
    return {name: values[name] for name in spec.names}


def test_the_page_names_every_model_and_its_own_is_twenty_lines():
    table = re.findall(r"^\| `(\w+)` \| .* \| .* \|$", DOC.split("## Sizes")[0], re.MULTILINE)
    assert table == [*BACKBONES, *RERANKERS]
    assert len([line for line in CODE.splitlines() if line.strip()]) <= 20
    assert re.fullmatch(r'\s+"product": ProductNetwork,\n', LINE)


def test_every_member_of_the_page_is_there():
    backbone = own(SPEC)
    for name in re.findall(r"^\| `(\w+)", DOC.split("A subclass can use:")[1], re.MULTILINE):
        assert hasattr(backbone, name), name
    assert "`ratings`" in DOC


@pytest.mark.parametrize("spec", [SPEC, BARE], ids=["knowledge", "control"])
def test_its_scores_stand_alone_and_survive_export(spec, tmp_path):
    backbone, values = own(spec).eval(), inputs(spec)
    together = backbone(values)
    for at in range(7):
        one = {name: v if name.startswith(("user", "history")) else v[[at]] for name, v in values.items()}
        torch.testing.assert_close(backbone(one), together[[at]], rtol=0, atol=SCORE_LIMIT)
    export_onnx(backbone, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (score,) = session.run(None, {name: value.numpy() for name, value in values.items()})
    np.testing.assert_allclose(score, together.detach().numpy(), atol=SCORE_LIMIT)


def test_its_gradients_reach_the_adaptor():
    adaptor = HybridExpertAdaptor(dim=6, hidden=4, out=5, shared=1, dedicated=1, towers=("item",))
    model = CTRModel(own(SPEC), adaptor)
    values = inputs(SPEC)
    knowledge = Encodings(torch.randn(3, 6), torch.tensor([True, True, False]), values["item_index"] % 3)
    del values["item_knowledge"]
    model(values, {"item": knowledge}).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in adaptor.parameters())
