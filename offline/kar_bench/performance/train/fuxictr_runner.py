"""Owns FuxiCTR's side of the training benchmark; it runs in an environment with FuxiCTR and without this project.

    python fuxictr_runner.py FOLDER

`fuxictr_process` writes `FOLDER`/task.json and the splits `train`, `validation` and `test`.npz. Each line of standard
input is a command as a JSON list, and each line of standard output the answer as JSON:

    ["train", MODEL, LOADER, ROWS]     seconds to train on the first rows
    ["score", MODEL, LOADER, ROWS]     seconds to score them
    ["fit", MODEL, LOADER, EPOCHS]     test AUC of the epoch with the best validation loss, and the epochs it took

The loader "npz" is FuxiCTR's own. "memory" slices batches out of tensors, so that only the model is timed. Both give
FuxiCTR's published DCNv2 and DIN the inputs of our models: an event of the history is item, categories and rating.
"""

import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuxictr.features import FeatureMap  # type: ignore[import-not-found]
from fuxictr.pytorch.dataloaders.npz_dataloader import NpzDataLoader  # type: ignore[import-not-found]
from fuxictr.pytorch.torch_utils import seed_everything  # type: ignore[import-not-found]
from model_zoo.LongCTR import DIN, DCNv2  # type: ignore[import-not-found]
from sklearn.metrics import roc_auc_score  # type: ignore[import-not-found]
from torch import Tensor

SEQUENCES = ("history_item", "history_rating", "user_categorical", "user_numeric", "item_categorical", "item_numeric")
EVALUATION_BATCH = 2048


def feature_map(task: dict[str, Any], folder: Path, name: str, features: dict[str, dict]) -> FeatureMap:
    """A feature map with one label."""
    columns = FeatureMap(name, str(folder))
    columns.features.update(features)
    columns.labels = ["label"]
    columns.default_emb_dim = task["embedding"]
    columns.num_fields = columns.get_num_fields()
    columns.set_column_index()
    return columns


def model_features(task: dict[str, Any]) -> dict[str, dict]:
    """The features that the models embed; index 0 is padding everywhere."""

    def field(size: int, width: int, source: str) -> dict[str, Any]:
        spec = {"source": source, "type": "categorical", "vocab_size": size, "padding_idx": 0}
        if width > 1:
            spec |= {"type": "sequence", "max_len": width, "feature_encoder": "layers.MaskedAveragePooling()"}
        return spec

    features = {f"user_{i}": field(size, width, "user") for i, (size, width) in enumerate(task["user_fields"])}
    features |= {f"user_number_{i}": {"source": "user", "type": "numeric"} for i in range(task["user_numbers"])}
    features |= {f"number_{i}": {"source": "context", "type": "numeric"} for i in range(task["item_numbers"])}
    features |= {"id": field(task["items"], 1, "item"), "rating": field(task["ratings"], 1, "item")}
    return features | {f"item_{i}": field(size, width, "item") for i, (size, width) in enumerate(task["item_fields"])}


class Loader:
    """Batches of one split for FuxiCTR's long-sequence models: context, flattened items, mask of the history."""

    def __init__(self, task: dict[str, Any], columns: dict[str, Tensor], batch: int, shuffle: bool) -> None:
        self.task, self.columns, self.batch, self.shuffle = task, columns, batch, shuffle
        self.categories = torch.tensor(task["categories"])

    def __len__(self) -> int:
        """Number of batches."""
        return math.ceil(len(self.columns["label"]) / self.batch)

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Columns of one batch after another."""
        rows = len(self.columns["label"])
        order = torch.randperm(rows) if self.shuffle else torch.arange(rows)
        for batch_rows in order.split(self.batch):
            yield {name: column[batch_rows] for name, column in self.columns.items()}

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor], Tensor]]:
        """The batches of one pass."""
        for columns in self.batches():
            history = columns["history_item"].long()
            items = torch.cat([history, columns["item_index"].long().unsqueeze(1)], 1)  # [B, L + 1], the target last
            ratings = torch.nn.functional.pad(columns["history_rating"].long(), (0, 1))
            own = columns["item_categorical"].long().unsqueeze(1)
            categories = torch.cat([self.categories[history], own], 1).flatten(0, 1)  # [B (L + 1), Ic]
            item = {"id": items.flatten(), "rating": ratings.flatten()}
            item |= self.split(categories, self.task["item_fields"], "item")
            context = self.split(columns["user_categorical"].long(), self.task["user_fields"], "user")
            context |= {f"user_number_{i}": columns["user_numeric"][:, i] for i in range(self.task["user_numbers"])}
            context |= {f"number_{i}": columns["item_numeric"][:, i] for i in range(self.task["item_numbers"])}
            yield {**context, "label": columns["label"]}, item, (history != 0).float()

    @staticmethod
    def split(values: Tensor, fields: list[list[int]], name: str) -> dict[str, Tensor]:
        """Fields that lie side by side in `values`, one by one."""
        parts = values.split([width for _, width in fields], 1) if fields else ()
        return {f"{name}_{i}": part if part.shape[1] > 1 else part[:, 0] for i, part in enumerate(parts)}


class NpzLoader(Loader):
    """The same batches through FuxiCTR's own loader."""

    def __init__(
        self, task: dict[str, Any], columns: dict[str, Tensor], batch: int, shuffle: bool, folder: Path
    ) -> None:
        super().__init__(task, columns, batch, shuffle)
        features = {
            name: {"type": "sequence", "max_len": column.shape[1]} if name in SEQUENCES else {"type": "categorical"}
            for name, column in columns.items()
            if name != "label"
        }
        path = folder / f"rows_{len(columns['label'])}.npz"
        arrays: dict[str, Any] = {name: column.numpy() for name, column in columns.items()}
        np.savez(path, **arrays)
        plan = feature_map(task, folder, "columns", features)
        self.loader = NpzDataLoader(plan, str(path), batch_size=batch, shuffle=shuffle, num_workers=0)

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Columns of one batch after another."""
        return iter(self.loader)


class Runner:
    """The models and the data of one benchmark."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.task = folder, json.loads((folder / "task.json").read_text())
        (folder / "model" / "kar").mkdir(parents=True, exist_ok=True)

    def model(self, name: str) -> Any:
        """A new model with the sizes of ours."""
        task = self.task
        seed_everything(task["seed"])
        plan = feature_map(task, self.folder, "kar", model_features(task))
        common = {
            "model_root": str(self.folder / "model"),
            "metrics": ["AUC", "logloss"],
            "monitor": "logloss",
            "monitor_mode": "min",
            "early_stop_patience": task["patience"],
            "reduce_lr_on_plateau": False,
            "verbose": 0,
            "optimizer": "AdamW",
            "loss": "binary_crossentropy",
            "learning_rate": task["learning_rate"],
            "embedding_dim": task["embedding"],
            "net_dropout": task["dropout"],
        }
        if name == "dcnv2":
            return DCNv2(plan, parallel_dnn_hidden_units=task["hidden"], num_cross_layers=task["crosses"], **common)
        attention = [task["attention"]]
        return DIN(
            plan, dnn_hidden_units=task["hidden"], dnn_activations="Dice", attention_hidden_units=attention, **common
        )

    def loader(self, kind: str, split: str, rows: int | None, batch: int, shuffle: bool) -> Loader:
        """Batches of the first `rows` of a split."""
        with np.load(self.folder / f"{split}.npz") as arrays:
            columns = {name: torch.from_numpy(arrays[name][:rows]) for name in arrays.files}
        if kind == "npz":
            return NpzLoader(self.task, columns, batch, shuffle, self.folder)
        return Loader(self.task, columns, batch, shuffle)

    def train(self, name: str, kind: str, rows: int) -> dict[str, float]:
        """Seconds of one pass over the first rows of the training split."""
        model, loader = self.model(name), self.loader(kind, "train", rows, self.task["batch"], True)
        model.train()
        model._max_gradient_norm, model._batch_index = self.task["clip_norm"], 0
        began = time.perf_counter()
        for batch in loader:
            model.train_step(batch).item()
        return {"seconds": time.perf_counter() - began}

    def score(self, name: str, kind: str, rows: int) -> dict[str, float]:
        """Seconds to score the first rows of the training split."""
        model, loader = self.model(name), self.loader(kind, "train", rows, EVALUATION_BATCH, False)
        began = time.perf_counter()
        self.scores(model, loader)
        return {"seconds": time.perf_counter() - began}

    @staticmethod
    @torch.no_grad()
    def scores(model: Any, loader: Loader) -> Tensor:
        """Probabilities of all rows of a loader."""
        model.eval()
        return torch.cat([model(batch)["y_pred"].flatten() for batch in loader])

    def fit(self, name: str, kind: str, epochs: int) -> dict[str, float]:
        """Test AUC after training with early stopping on the validation split."""
        model, batch = self.model(name), self.task["batch"]
        train, validation = (
            self.loader(kind, "train", None, batch, True),
            self.loader(kind, "validation", None, batch, False),
        )
        model.fit(train, epochs=epochs, validation_data=validation, max_gradient_norm=self.task["clip_norm"])
        test = self.loader("memory", "test", None, EVALUATION_BATCH, False)
        auc = roc_auc_score(test.columns["label"].numpy(), self.scores(model, test).numpy())
        return {"auc": float(auc), "epochs": model._epoch_index + 1}


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    runner = Runner(Path(sys.argv[1]))
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        print(json.dumps(getattr(runner, command)(*arguments)), file=answers, flush=True)
