"""Owns data-parallel training: how the processes that torchrun started share batches and gradients."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, distributed, nn

__all__ = ["Ranks"]

STATISTICS: Final = ("mean", "variance")
"""Names of the buffers that training changes (`kar_offline.models.layers.Dice`)."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among `count`; one process alone is rank 0 of 1."""

    rank: int = 0
    count: int = 1

    @staticmethod
    def current() -> "Ranks":
        """The initialised process group, or this process alone."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return Ranks()
        return Ranks(distributed.get_rank(), distributed.get_world_size())

    @staticmethod
    @contextmanager
    def joined() -> Iterator["Ranks"]:
        """Join the processes that torchrun started, over nccl on GPUs and gloo elsewhere; alone without torchrun."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
            yield Ranks.current()
            return
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        try:
            yield Ranks.current()
        finally:
            # Its threads must end before the interpreter does: those that outlive it may abort the process.
            distributed.destroy_process_group()

    @property
    def device(self) -> torch.device:
        """Where this process trains: its GPU if there is one, else the CPU."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def share(self, at: Tensor, list_length: int) -> Tensor:
        """This process' part of a batch of row numbers [B], whole lists; the last batch may leave some without any."""
        if self.count == 1:
            return at
        return at.view(-1, list_length).tensor_split(self.count)[self.rank].flatten()

    def average(self, parameters: Sequence[Tensor], loss_sum: float, weight: float) -> float:
        """Replace each gradient by the mean over the whole batch and return the loss summed over it.

        `weight` is this process' share of the batch's rows, `loss_sum` its loss times its rows.
        """
        if self.count == 1:
            return loss_sum
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([parameter.grad.flatten() * weight for parameter in parameters if parameter.grad is not None])
        flat = torch.cat([flat, flat.new_tensor([loss_sum])])
        distributed.all_reduce(flat)
        start = 0
        for parameter in parameters:
            end = start + parameter.numel()
            parameter.grad = flat[start:end].view_as(parameter)
            start = end
        return float(flat[-1])

    def agree(self, said: bool = False) -> bool:
        """What the first process says."""
        if self.count == 1:
            return said
        flag = torch.tensor([said], dtype=torch.uint8, device=self.device)
        distributed.broadcast(flag, 0)
        return bool(flag.item())

    def level(self, model: nn.Module) -> None:
        """Average running statistics, which each process learned from its own part of the batches."""
        if self.count == 1:
            return
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point() and name.rsplit(".", 1)[-1] in STATISTICS:
                distributed.all_reduce(buffer)
                buffer /= self.count
