import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from kar_offline.encode.huggingface import HuggingFace
from kar_sidecar.errors import NotFoundError

pytestmark = pytest.mark.unit

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d", "e")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two layers whose tokens are letters between spaces."""
    folder = tmp_path_factory.mktemp("letters")
    torch.manual_seed(1)
    size = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, initializer_range=1.0, **size)
    BertModel(config).eval().save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


def token_vectors(folder: Path, words: str) -> np.ndarray:
    """Token vectors [T + 2, 8] of one text alone: no batch, no padding, no tokenizer of ours."""
    model = BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    ids = torch.tensor([[2, *(WORDS.index(word) for word in words.split()), 3]])
    with torch.no_grad():
        return model(input_ids=ids).last_hidden_state[0].numpy()


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def test_vectors_are_means_of_token_vectors_whatever_the_batch(folder: Path) -> None:
    encoder = HuggingFace(folder, threads=2)
    texts = ["a b c", "d", "e d c b a e d", "a b c"]
    vectors = encoder.encode(texts)
    assert vectors.dtype == np.float32
    assert vectors.shape == (4, encoder.dim) == (4, 8)
    for vector, text in zip(vectors, texts, strict=True):
        np.testing.assert_allclose(vector, unit(token_vectors(folder, text).mean(0)), atol=1e-5)


def test_a_long_text_is_cut_into_even_chunks_and_nothing_is_lost(folder: Path) -> None:
    (vector,) = HuggingFace(folder, threads=1, chunk_tokens=4).encode(["a b c d e a b"])
    # Seven tokens in two chunks of at most four: three and four, weighted so.
    chunks = token_vectors(folder, "a b c").mean(0) * 3 + token_vectors(folder, "d e a b").mean(0) * 4
    np.testing.assert_allclose(vector, unit(chunks), atol=1e-5)


def test_pooling_can_take_the_first_token(folder: Path) -> None:
    (vector,) = HuggingFace(folder, pooling="first", threads=1).encode(["a b"])
    np.testing.assert_allclose(vector, unit(token_vectors(folder, "a b")[0]), atol=1e-5)


def test_tokens_are_counted_without_the_special_ones(folder: Path) -> None:
    assert HuggingFace(folder).count_tokens(["a b c", "", "z"]) == [3, 0, 1]
    assert HuggingFace(folder).encode([]).shape == (0, 8)


def test_the_id_names_all_that_vectors_depend_on(folder: Path, tmp_path: Path) -> None:
    known = HuggingFace(folder, name="letters").encoder_id
    assert HuggingFace(folder, name="letters", threads=1).encoder_id == known
    assert HuggingFace(folder, name="letters", pooling="first").encoder_id != known
    assert HuggingFace(folder, name="letters", chunk_tokens=4).encoder_id != known
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    assert HuggingFace(tmp_path, name="letters").encoder_id != known


def test_the_thread_setting_is_restored(folder: Path) -> None:
    before = torch.get_num_threads()
    HuggingFace(folder, threads=2).encode(["a"])
    assert torch.get_num_threads() == before


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(NotFoundError, match=r"no model\.safetensors"):
        HuggingFace(tmp_path)
