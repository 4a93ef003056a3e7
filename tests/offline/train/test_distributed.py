import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kar_offline.train import TrainSettings, load_trained, train
from kar_offline.train.distributed import ProcessGroup
from kar_offline.work_folder import WorkFolder

pytestmark = pytest.mark.service

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
SCRIPT = """
import sys
import torch
from torch import nn
from kar_offline.train.distributed import ProcessGroup

membership = ProcessGroup.joined()
group = membership.__enter__()
torch.manual_seed(0)
model, rows, labels = nn.Linear(3, 1), torch.randn(10, 3), torch.rand(10)
def loss(at):
    return nn.functional.binary_cross_entropy_with_logits(model(rows[at]).squeeze(1), labels[at])
whole = torch.autograd.grad(loss(torch.arange(10)), list(model.parameters()))
at = group.share(torch.arange(10), 2)
assert len(at) in (4, 6), at
own = loss(at)
own.backward()
total = group.average_gradients(list(model.parameters()), own.item() * len(at), len(at) / 10)
for parameter, expected in zip(model.parameters(), whole):
    torch.testing.assert_close(parameter.grad, expected)
assert abs(total / 10 - loss(torch.arange(10)).item()) < 1e-6
# A batch of one list leaves the second process without rows.
model.zero_grad()
at = group.share(torch.arange(2), 2)
if len(at):
    loss(at).backward()
group.average_gradients(list(model.parameters()), 0.0, len(at) / 2)
few = torch.autograd.grad(loss(torch.arange(2)), list(model.parameters()))
for parameter, expected in zip(model.parameters(), few):
    torch.testing.assert_close(parameter.grad, expected)
assert group.broadcast(group.is_first)
model.register_buffer("mean", torch.full((2,), float(group.rank)))
model.register_buffer("fixed", torch.full((2,), float(group.rank)))
group.average_statistics(model)
assert model.mean.tolist() == [0.5, 0.5] and model.fixed.tolist() == [float(group.rank)] * 2
open(f"{sys.argv[1]}/rank{group.rank}", "w").close()
membership.__exit__(None, None, None)
assert not torch.distributed.is_initialized()
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_average_to_the_gradients_of_one(tmp_path):
    # The environment that torchrun gives its processes, without torchrun's own start.
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            (sys.executable, "-c", SCRIPT, tmp_path),
            env=ENVIRONMENT | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=180)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    assert {path.name for path in tmp_path.glob("rank*")} == {"rank0", "rank1"}


def test_two_processes_train_what_one_trains(work):
    kar = Path(sys.executable).with_name("kar")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python")
    options = ("train", "--backbone", "dcn", "--arm", "knowledge", "--epochs", "3", "--workers", "0", "--work")
    alone, together = (WorkFolder(work.root / name) for name in ("alone", "together"))
    for folder in (alone, together):
        shutil.copytree(work.dataset, folder.dataset)
        shutil.copytree(work.encoding, folder.encoding)
    finished = subprocess.run(
        (*torchrun, kar, *options, together.root), env=ENVIRONMENT, capture_output=True, text=True, timeout=180
    )
    assert finished.returncode == 0, finished.stderr
    train(alone, ["dcn"], ["knowledge"], TrainSettings(epochs=3), workers=0)
    losses = {
        folder: [epoch["validation_loss"] for epoch in load_trained(folder, "dcn", "knowledge").metrics["epochs"]]
        for folder in (alone, together)
    }
    # Dropout differs; the data, the batches and the initial weights do not.
    assert len(losses[alone]) == len(losses[together]) == 3
    for one, two in zip(losses[alone], losses[together], strict=True):
        assert abs(one - two) < 5e-5


def test_one_process_alone_changes_nothing():
    group = ProcessGroup.current()
    weight = torch.ones(3, requires_grad=True)
    weight.sum().backward()
    assert group.average_gradients([weight], 2.5, 1.0) == 2.5
    assert weight.grad.tolist() == [1, 1, 1]
    assert group.share(torch.arange(4), 2).tolist() == [0, 1, 2, 3]
    assert group.broadcast(True)
    assert not group.broadcast(False)
