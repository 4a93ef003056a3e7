import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.letters import token_vectors, unit, write_encoder
from transformers import BertConfig, BertModel

from kar_offline.encoders.huggingface import HuggingFaceEncoder
from kar_offline.encoders.onnx import OnnxModel, graph_file
from kar_sidecar.errors import UnsupportedError

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("letters"))


@pytest.fixture(scope="module")
def encoder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceEncoder:
    return HuggingFaceEncoder(folder, threads=2, cache=tmp_path_factory.mktemp("cache"))


def test_vectors_are_those_of_torch_whatever_the_batch(folder: Path, encoder: HuggingFaceEncoder) -> None:
    texts = ["a b c", "d", "e d c b a e d", "", "a b c d e " * 20]
    vectors = encoder.encode(texts)
    for vector, text in zip(vectors[:4], texts[:4], strict=True):
        np.testing.assert_allclose(vector, unit(token_vectors(folder, text).mean(0)), atol=1e-5)
    np.testing.assert_allclose(vectors, HuggingFaceEncoder(folder, runtime="torch").encode(texts), atol=1e-5)


def test_hidden_states_are_those_of_torch_at_other_shapes_and_with_padding_on_the_left(
    folder: Path, encoder: HuggingFaceEncoder
) -> None:
    ids = np.array([[0, 0, 2, 4, 3, 1], [2, 5, 6, 7, 4, 3], [2, 3, 0, 0, 0, 0]])
    mask = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    hidden = OnnxModel(encoder.graph)(ids, mask)
    model = BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).last_hidden_state
    np.testing.assert_allclose(hidden[mask == 1], expected.numpy()[mask == 1], atol=1e-5)


def test_the_graph_is_made_once_for_all_files_of_the_same_content(encoder: HuggingFaceEncoder, tmp_path: Path) -> None:
    graph = encoder.graph
    made = graph.stat().st_mtime_ns
    shutil.copytree(encoder.folder, tmp_path / "copy")
    again = HuggingFaceEncoder(tmp_path / "copy", pooling="cls", cache=graph.parents[2]).graph
    assert (again, again.stat().st_mtime_ns) == (graph, made)
    assert list((graph.parents[1]).iterdir()) == [graph.parent]


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    # Three positions: too few for the example that an export runs.
    BertModel(BertConfig(vocab_size=9, max_position_embeddings=3, **size)).save_pretrained(tmp_path / "short")
    with pytest.raises(UnsupportedError, match=r"cannot be exported to ONNX .*: use --runtime torch"):
        graph_file(tmp_path / "short", "cafe", tmp_path / "cache")
    assert list((tmp_path / "cache" / "onnx").iterdir()) == []
