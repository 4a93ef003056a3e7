"""Owns the learning curves of a training: `curves.png`, and the same figures as TensorBoard events."""

from collections.abc import Sequence
from pathlib import Path

from kar_offline.train.fit import Epoch

__all__ = ["write_curves"]


def write_curves(folder: Path, epochs: Sequence[Epoch]) -> None:
    """Plot losses and clipping by epoch, and write TensorBoard events if `tensorboard` is installed.

    Args:
        folder: The folder to write to.
        epochs: The figures, at least one epoch.
    """
    # Imported here: loading matplotlib takes longer than a small training.
    from matplotlib.figure import Figure

    numbers = [epoch.number for epoch in epochs]
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    losses = figure.add_subplot()
    losses.plot(numbers, [epoch.train_loss for epoch in epochs], "o-", label="training")
    losses.plot(numbers, [epoch.validation_loss for epoch in epochs], "o-", label="validation")
    best = min(epochs, key=lambda epoch: epoch.validation_loss)
    losses.axvline(best.number, color="grey", linestyle=":", label="kept")
    losses.set(xlabel="epoch", ylabel="loss", xticks=numbers)
    clipping = losses.twinx()
    clipping.bar(numbers, [epoch.clipped_ratio for epoch in epochs], width=0.3, alpha=0.2, color="tab:red")
    clipping.set(ylabel="share of clipped steps", ylim=(0, 1))
    losses.legend(loc="upper right")
    figure.savefig(folder / "curves.png", dpi=120)
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        return
    with SummaryWriter(folder / "tensorboard") as writer:
        for epoch in epochs:
            for name, value in epoch.to_json().items():
                if name != "number":
                    writer.add_scalar(name, value, epoch.number)
