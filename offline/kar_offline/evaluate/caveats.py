"""Owns the caveats that accompany every result on a dataset."""

from typing import Final

import numpy as np

from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.splits import TEST, TRAIN

__all__ = ["caveats_of"]

PACK: Final = "The writer of the knowledge pack knew the films' later reputation and may have seen MovieLens."
PACK_DATASETS: Final = ("ml-100k", "ml-1m")
"""Datasets with texts from the released knowledge pack."""
BY_USER: Final = "Users are split between training and test, time is not: test ratings may be older than training ones."
BY_TIME: Final = "One split by global time: users of the test period may also be in training."


def caveats_of(dataset: Dataset) -> list[str]:
    """Caveats of the texts and of the split of a dataset, one sentence each."""
    train_users, test_users = (dataset.event_user[dataset.event_split == split] for split in (TRAIN, TEST))
    split = BY_TIME if np.isin(train_users, test_users).any() else BY_USER
    return [*([PACK] if dataset.name in PACK_DATASETS else []), split]
