"""Owns the folder of an encoder in sentence-transformers format: the files that vectors depend on, and its settings.

modules.json                        the modules in order, with their folders; without it, the folder itself is the model
<module>/config.json                settings of a module; the module Pooling has its mode here
<model>/sentence_bert_config.json   the number of tokens that the model was trained with
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from kar_offline.encoders.pooling import Pooling
from kar_sidecar.errors import NotFoundError, UnsupportedError

__all__ = ["FILES", "EncoderFolder", "read_encoder_folder"]

FILES: Final = ("config.json", "model.safetensors", "tokenizer.json")
"""Files that vectors depend on. Tokenizers without `tokenizer.json` and sharded weights are not supported."""
POOLING_OF_MODE: Final[Mapping[str, Pooling]] = MappingProxyType(
    # Dividing by the square root of the number of tokens changes only the length of a vector, which becomes 1 anyway.
    {"cls": "cls", "mean": "mean", "mean_sqrt_len_tokens": "mean", "weightedmean": "weighted", "lasttoken": "last"}
)
MODE_OF_FLAG: Final[Mapping[str, str]] = MappingProxyType(
    {
        "pooling_mode_cls_token": "cls",
        "pooling_mode_max_tokens": "max",
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
        "pooling_mode_weightedmean_tokens": "weightedmean",
        "pooling_mode_lasttoken": "lasttoken",
    }
)
"""Older folders have one flag per pooling mode."""
DEFAULT_MAX_TOKENS: Final = 256
"""Tokens of a chunk if the folder does not say how many tokens the model was trained with."""


class EncoderFolder(NamedTuple):
    """The settings of an encoder, from its folder."""

    model: Path
    """The folder that holds `FILES`."""
    dim: int
    """Number of components of a vector."""
    pad_id: int
    """Token id of padding."""
    pooling_mode: str
    """The name that sentence-transformers uses."""
    max_tokens: int
    """Maximal number of tokens in one call of the model, special tokens included."""

    def own_pooling(self) -> Pooling:
        """The pooling that the encoder was trained with.

        Raises:
            UnsupportedError: its pooling mode is not supported.
        """
        if self.pooling_mode not in POOLING_OF_MODE:
            raise UnsupportedError(
                f"{self.model} pools by {self.pooling_mode!r}, which is not supported: name another encoder, or a "
                "--pooling"
            )
        return POOLING_OF_MODE[self.pooling_mode]


def read_encoder_folder(folder: Path) -> EncoderFolder:
    """Read the settings of an encoder.

    Raises:
        NotFoundError: a needed file is missing.
        UnsupportedError: the encoder has a layer after pooling, such as Dense.
    """
    model, pooling_mode = folder, "mean"
    for module in _read_json(folder / "modules.json") or ():
        kind = str(module["type"]).rpartition(".")[2]
        if kind == "Transformer":
            model = folder / module["path"]
        elif kind == "Pooling":
            pooling_mode = _pooling_mode(_read_json(folder / module["path"] / "config.json") or {})
        elif kind != "Normalize":  # all encoders here give vectors of unit length
            raise UnsupportedError(
                f"{folder} has a layer {kind!r}, which is not supported: name another encoder, or serve this one and "
                "use --encoder openai"
            )
    for file in FILES:
        if not (model / file).is_file():
            raise NotFoundError(f"{model} holds no {file}: name an encoder in safetensors format")
    config = _read_json(model / "config.json")
    dim = config.get("hidden_size") or config.get("dim")
    if not dim:
        raise UnsupportedError(f"{model}/config.json has no hidden_size: name a BERT-like encoder")
    trained_tokens = (_read_json(model / "sentence_bert_config.json") or {}).get("max_seq_length")
    max_tokens = trained_tokens or DEFAULT_MAX_TOKENS
    positions = config.get("max_position_embeddings") or max_tokens
    return EncoderFolder(model, dim, config.get("pad_token_id") or 0, pooling_mode, min(max_tokens, positions))


def _pooling_mode(config: Mapping[str, Any]) -> str:
    modes = config.get("pooling_mode") or [mode for flag, mode in MODE_OF_FLAG.items() if config.get(flag)] or "mean"
    return modes if isinstance(modes, str) else "+".join(modes)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None
