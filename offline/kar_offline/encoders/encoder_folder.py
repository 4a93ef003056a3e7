"""Owns what an encoder's folder holds: the files that vectors depend on, and what sentence-transformers says of them.

modules.json                        which modules follow each other, in which folders; without it all is one model
<module>/config.json                of the module Pooling: how it pools
<model>/sentence_bert_config.json   how many tokens the model was trained with
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from kar_offline.encoders.pooling import Pooling
from kar_sidecar.errors import NotFoundError, UnsupportedError

__all__ = ["FILES", "EncoderFolder", "read_folder"]

FILES: Final = ("config.json", "model.safetensors", "tokenizer.json")
"""What the vectors depend on; tokenizers without `tokenizer.json` and sharded weights are not read."""
MODES: Final[Mapping[str, Pooling]] = MappingProxyType(
    # The square root of the number of tokens changes a vector's length alone.
    {"cls": "cls", "mean": "mean", "mean_sqrt_len_tokens": "mean", "weightedmean": "weighted", "lasttoken": "last"}
)
FLAGS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "pooling_mode_cls_token": "cls",
        "pooling_mode_max_tokens": "max",
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
        "pooling_mode_weightedmean_tokens": "weightedmean",
        "pooling_mode_lasttoken": "lasttoken",
    }
)
"""How older folders say what they pool by."""
LONGEST: Final = 256
"""Tokens of a chunk where the folder does not say what the model was trained with."""


class EncoderFolder(NamedTuple):
    """What a folder says of its encoder."""

    model: Path
    """The folder of FILES."""
    dim: int
    pad_id: int
    pooling: str
    """As sentence-transformers calls it."""
    longest: int
    """Tokens that the model takes at once, the special ones included."""

    def own_pooling(self) -> Pooling:
        """The pooling that the encoder was trained with.

        Raises:
            UnsupportedError: it is none of ours.
        """
        if self.pooling not in MODES:
            raise UnsupportedError(
                f"{self.model} pools by {self.pooling!r}, which is not built: name another encoder, or a --pooling"
            )
        return MODES[self.pooling]


def read_folder(folder: Path) -> EncoderFolder:
    """Read an encoder's folder.

    Raises:
        NotFoundError: a needed file is missing.
        UnsupportedError: it has a layer after pooling, such as Dense.
    """
    model, pooling = folder, "mean"
    for module in _json(folder / "modules.json") or ():
        kind = str(module["type"]).rpartition(".")[2]
        if kind == "Transformer":
            model = folder / module["path"]
        elif kind == "Pooling":
            pooling = _mode(_json(folder / module["path"] / "config.json") or {})
        elif kind != "Normalize":  # vectors have unit length anyway
            raise UnsupportedError(
                f"{folder} has a layer {kind!r}, which is not built: name another encoder, or serve this one and use "
                "--encoder openai"
            )
    for file in FILES:
        if not (model / file).is_file():
            raise NotFoundError(f"{model} holds no {file}: name an encoder in safetensors format")
    config = _json(model / "config.json")
    dim = config.get("hidden_size") or config.get("dim")
    if not dim:
        raise UnsupportedError(f"{model}/config.json names no hidden_size: name an encoder like BERT")
    longest = (_json(model / "sentence_bert_config.json") or {}).get("max_seq_length") or LONGEST
    positions = config.get("max_position_embeddings") or longest
    return EncoderFolder(model, dim, config.get("pad_token_id") or 0, pooling, min(longest, positions))


def _mode(config: Mapping[str, Any]) -> str:
    found = config.get("pooling_mode") or [mode for flag, mode in FLAGS.items() if config.get(flag)] or "mean"
    return found if isinstance(found, str) else "+".join(found)


def _json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None
