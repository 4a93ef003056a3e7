"""Owns what must be said with every result."""

from typing import Final

import numpy as np

from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.splits import TEST, TRAIN

__all__ = ["caveats_of"]

PACK: Final = "The writer of the knowledge pack knew the films' later reputation and may have seen MovieLens."
PACKED: Final = ("ml-100k", "ml-1m")
"""Datasets whose texts come from the pack."""
BY_USER: Final = "Users are split between training and test, time is not: test ratings may be older than training ones."
BY_TIME: Final = "One split by global time: users of the test period may also be in training."


def caveats_of(dataset: Dataset) -> list[str]:
    """Of the texts and of the split of `dataset`."""
    train, test = (dataset.event_user[dataset.event_split == split] for split in (TRAIN, TEST))
    return [*([PACK] if dataset.name in PACKED else []), BY_TIME if np.isin(train, test).any() else BY_USER]
