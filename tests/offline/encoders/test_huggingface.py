import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.letters import token_vectors, unit, write_encoder
from transformers import BertModel

from kar_offline.encoders.huggingface import HuggingFaceEncoder
from kar_offline.encoders.pooling import Pooling
from kar_offline.encoders.text_encoder import EncodedTexts
from kar_sidecar.errors import NotFoundError, UnsupportedError

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("letters"))


def encoder(folder: Path, **options: Any) -> HuggingFaceEncoder:
    return HuggingFaceEncoder(folder, runtime="torch", **options)


def pooled(vectors: np.ndarray, pooling: Pooling) -> np.ndarray:
    """One text's vector, by hand."""
    weights = np.arange(1, len(vectors) + 1)[:, None]
    return {
        "mean": vectors.mean(0),
        "cls": vectors[0],
        "last": vectors[-1],
        "weighted": (vectors * weights).sum(0) / weights.sum(),
    }[pooling]


def test_vectors_are_means_of_token_vectors_whatever_the_batch(folder: Path) -> None:
    texts = ["a b c", "d", "e d c b a e d", "a b c"]
    vectors = encoder(folder, threads=2).encode(texts)
    assert vectors.dtype == np.float32
    assert vectors.shape == (4, 8)
    for vector, text in zip(vectors, texts, strict=True):
        np.testing.assert_allclose(vector, unit(token_vectors(folder, text).mean(0)), atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "weighted"])
def test_each_pooling_takes_the_tokens_and_not_the_padding(folder: Path, pooling: Pooling) -> None:
    texts = ["a b", "e d c b a e d"]
    vectors = encoder(folder, pooling=pooling).encode(texts)
    for vector, text in zip(vectors, texts, strict=True):
        np.testing.assert_allclose(vector, unit(pooled(token_vectors(folder, text), pooling)), atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "weighted"])
def test_a_long_text_is_cut_into_even_chunks_and_nothing_is_lost(folder: Path, pooling: Pooling) -> None:
    (vector,) = encoder(folder, chunk_tokens=4, pooling=pooling).encode(["a b c d e a b"])
    # Seven tokens in two chunks of at most four: three and four, weighted so.
    three, four = (pooled(token_vectors(folder, text), pooling) for text in ("a b c", "d e a b"))
    np.testing.assert_allclose(vector, unit(three * 3 + four * 4), atol=1e-5)


def test_an_encoder_may_have_no_special_tokens(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    empty, known = encoder(tmp_path).encode(["", "a b"])
    model = BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[4, 5]])).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(known, unit(expected.numpy()), atol=1e-5)
    assert np.linalg.norm(empty) == pytest.approx(1)


def test_no_chunk_is_longer_than_the_model_takes(folder: Path) -> None:
    # Sixteen positions, two of them for special tokens.
    assert encoder(folder).chunk_tokens == 14
    assert np.isfinite(encoder(folder).encode(["a b c d e " * 20])).all()


def test_the_longest_texts_come_first_and_tokens_are_counted_without_the_special_ones(folder: Path) -> None:
    found = list(encoder(folder).stream(["a b", "", "z a z", *["a b c d e a b c d e a b c d"] * 80]))
    assert sorted(row for encoded in found for row in encoded.rows) == list(range(83))
    assert min(found[0].rows) > 2
    assert sum(encoded.tokens for encoded in found) == 2 + 0 + 3 + 14 * 80
    assert list(encoder(folder).stream([])) == []
    assert encoder(folder).encode([]).shape == (0, 8)


def test_a_stream_may_be_left(folder: Path) -> None:
    made = encoder(folder, threads=2)
    before = torch.get_num_threads()
    stream = made.stream(["a b c d e a b c d e"] * 5000)
    assert isinstance(next(stream), EncodedTexts)
    stream.close()
    assert torch.get_num_threads() == before


def test_the_thread_setting_is_restored(folder: Path) -> None:
    before = torch.get_num_threads()
    encoder(folder, threads=2).encode(["a"])
    assert torch.get_num_threads() == before


def test_the_id_names_all_that_vectors_depend_on(folder: Path, tmp_path: Path) -> None:
    known = encoder(folder, name="letters").encoder_id
    assert known.startswith("letters@")
    assert known.endswith("/mean/14")
    assert encoder(folder, name="letters", threads=1).encoder_id == known
    assert HuggingFaceEncoder(folder, name="letters", runtime="onnx").encoder_id == known
    assert encoder(folder, name="letters", pooling="cls").encoder_id != known
    assert encoder(folder, name="letters", chunk_tokens=4).encoder_id != known
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    assert encoder(tmp_path, name="letters").encoder_id != known


def test_an_encoder_travels_before_it_has_loaded_anything(folder: Path) -> None:
    made = encoder(folder)
    travelled = pickle.loads(pickle.dumps(made))
    np.testing.assert_array_equal(travelled.encode(["a b"]), made.encode(["a b"]))


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(NotFoundError, match=r"no model\.safetensors"):
        HuggingFaceEncoder(tmp_path)


def sentence_transformer(
    folder: Path, root: Path, pooling: dict[str, Any], *more: str, longest: int | None = None
) -> Path:
    """A folder as sentence-transformers writes it, with its model in a folder of its own."""
    shutil.copytree(folder, root / "0_Transformer")
    (root / "1_Pooling").mkdir()
    (root / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 8} | pooling))
    names = ["Transformer", "Pooling", *more]
    modules = [
        {"idx": at, "name": str(at), "path": f"{at}_{name}", "type": f"sentence_transformers.models.{name}"}
        for at, name in enumerate(names)
    ]
    (root / "modules.json").write_text(json.dumps(modules))
    if longest:
        (root / "0_Transformer" / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": longest}))
    return root


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode_weightedmean_tokens": True}, "weighted"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({}, "mean"),
    ],
)
def test_a_folder_of_sentence_transformers_says_how_it_pools(
    folder: Path, tmp_path: Path, config: dict[str, Any], pooling: Pooling
) -> None:
    root = sentence_transformer(folder, tmp_path, config, "Normalize", longest=6)
    made = encoder(root)
    assert made.encoder_id.endswith(f"/{pooling}/4")
    np.testing.assert_allclose(made.encode(["a b"])[0], unit(pooled(token_vectors(folder, "a b"), pooling)), atol=1e-5)
    assert encoder(root, pooling="cls").pooling == "cls"


def test_what_is_not_built_is_refused_unless_it_is_overruled(folder: Path, tmp_path: Path) -> None:
    root = sentence_transformer(folder, tmp_path, {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True})
    with pytest.raises(UnsupportedError, match=r"pools by 'max\+mean'"):
        encoder(root)
    assert encoder(root, pooling="mean").pooling == "mean"


def test_a_layer_after_pooling_is_refused(folder: Path, tmp_path: Path) -> None:
    root = sentence_transformer(folder, tmp_path, {}, "Dense", "Normalize")
    with pytest.raises(UnsupportedError, match="a layer 'Dense'"):
        encoder(root, pooling="mean")
