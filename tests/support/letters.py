"""Owns a tiny encoder for tests: a random BERT of two layers whose tokens are letters between spaces."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d", "e")


def write_encoder(folder: Path) -> Path:
    """Write the encoder to `folder`, which is returned. It takes 16 tokens."""
    torch.manual_seed(1)
    size = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, initializer_range=1.0, **size)
    BertModel(config).eval().save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    # A tokenizer of the hub may come with these settings, which would cut texts.
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=5)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def token_vectors(folder: Path, words: str) -> np.ndarray:
    """Token vectors [T + 2, 8] of one text, computed without our code: no batch, no padding, no tokenizer."""
    model = BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    ids = torch.tensor([[2, *(WORDS.index(word) for word in words.split()), 3]])
    with torch.no_grad():
        return model(input_ids=ids).last_hidden_state[0].numpy()


def unit(vector: np.ndarray) -> np.ndarray:
    """The vector at unit length."""
    return vector / np.linalg.norm(vector)
