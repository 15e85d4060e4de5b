"""Runs of several ranks on this machine, forked from a server that has imported everything: torchrun without torchrun.

A test gives each rank a function of a module to run; what differs from rank to rank it reads from the environment.
"""

import functools
import math
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import model
import small_runs
import train
from attention import LocalAttention2d
from sasa.data import batches, splits
from sasa.training import distributed, step
from sasa.training.sync_batchnorm import sync_batch_norms

SECONDS = 60.0  # of a run, whatever becomes of it: the limit for a run that a rank has left


# What a run imports while it runs: imported once, before the ranks are forked.
IMPORTED_LATER = ["torch._dynamo", "torch.utils.tensorboard", "torchvision.utils"]
IMPORTED_LATER += ["matplotlib.backends.backend_agg", "matplotlib.figure"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _rank(function: Callable, arguments: tuple, environment: dict[str, str], output: Path) -> None:
    """A rank's process: its own environment, and its output in a file."""
    os.environ.update(environment)
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    torch.set_num_threads(1)
    raise SystemExit(function(*arguments))


def launch(folder: Path, ranks: int, function: Callable, *arguments) -> tuple[list[int], list[str]]:
    """function(*arguments) on so many ranks: each one's exit code and output. None is left behind.

    Raises:
        AssertionError: a rank has not ended after SECONDS.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ranks", *IMPORTED_LATER])
    folder.mkdir(parents=True, exist_ok=True)
    port = str(free_port())
    processes, outputs = [], [folder / f"rank{rank}.txt" for rank in range(ranks)]
    for rank, output in enumerate(outputs):
        output.unlink(missing_ok=True)
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        process = context.Process(target=_rank, args=(function, arguments, environment, output))
        process.start()
        processes.append(process)
    until = time.monotonic() + SECONDS
    try:
        for process in processes:
            process.join(max(until - time.monotonic(), 0))
        alive = [rank for rank, process in enumerate(processes) if process.is_alive()]
        assert not alive, f"ranks {alive} hang; {[output.read_text() for output in outputs]}"
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [process.exitcode for process in processes], [output.read_text() for output in outputs]


# ---- what the ranks run ---------------------------------------------------------------------------------------------


IMAGES = (250, 37)  # of training and test: 2 and 3 ranks divide neither


class Small(nn.Sequential):
    """A convolution, local attention, perhaps batch norms; `spoil(logits, call)` changes the logits of a step.

    blocks: residual ones at the end, which stochastic depth can leave out.
    """

    def __init__(self, num_classes: int, spoil: Callable | None, norm: bool, blocks: int = 0) -> None:
        super().__init__()
        attention = LocalAttention2d(16, 16, kernel_size=3, num_heads=4, stride=2)
        norms = (nn.BatchNorm2d(16) if norm else nn.Identity() for _ in range(2))
        stem = (nn.Conv2d(3, 16, 3, 2, 1, bias=False), next(norms), nn.ReLU())
        self.body = nn.Sequential(*stem, attention, next(norms), nn.ReLU())  # (B, 3, 8, 8) -> (B, 16, 2, 2)
        self.body.extend(model.BasicBlock(16, 16) for _ in range(blocks))
        self.fc = nn.Linear(64, num_classes)
        self.spoil, self.calls = spoil, 0

    def forward(self, x):
        logits = self.fc(self.body(x).flatten(1))
        if self.training and self.spoil is not None:
            self.calls += 1
            logits = self.spoil(logits, self.calls)
        return logits


def train_small(
    output: str, flags: str, spoil: Callable | None = None, norm: bool | None = True, blocks: int = 0
) -> int:
    """A run of `Small` on the first digits; each rank leaves what it holds at the end, and the losses of its steps.

    norm=None: of the network that the flags name.
    """
    patch = pytest.MonkeyPatch()
    small_runs.few_digits(patch, *IMAGES)
    if norm is not None:
        patch.setattr(
            model, "build", lambda name, num_classes, stem, **options: Small(num_classes, spoil, norm, blocks)
        )
    losses, held, one_step, whole = [], {"no_sync": 0}, train.train_step, train.train
    no_sync = DistributedDataParallel.no_sync

    def counted(network):
        held["no_sync"] += 1
        return no_sync(network)

    patch.setattr(DistributedDataParallel, "no_sync", counted)

    def train_step(*arguments):
        done = one_step(*arguments)
        loss = done.read().loss
        if math.isfinite(loss):
            losses.append(loss)
        return done

    def train_run(run, *more):
        code = whole(run, *more)
        held.update(model=run.model.state_dict(), scored=run.eval_model.state_dict(), step=run.progress.step)
        return code

    patch.setattr(train, "train_step", train_step)
    patch.setattr(train, "train", train_run)
    code = small_runs.run(Path(output), *f"--dataset DIGITS --name run --no-progress --device cpu {flags}".split())
    Path(output).mkdir(exist_ok=True)
    torch.save(held | {"losses": losses}, Path(output) / f"held{os.environ['RANK']}.pt")
    return code


def train_small_late(output: str, flags: str, spoil: Callable) -> int:
    """As `train_small`, with steps as on CUDA: their figures are read after their update is queued."""
    pytest.MonkeyPatch().setattr(step, "reads_late", lambda run: True)
    return train_small(output, flags, spoil)


def train_real(output: str, flags: str) -> int:
    """As `train_small`, with the networks themselves, in fp64."""
    patch, build, normalise = pytest.MonkeyPatch(), model.build, splits.normalise
    patch.setattr(model, "build", lambda *arguments, **options: build(*arguments, **options).double())
    for module in (batches, splits):
        patch.setattr(module, "normalise", lambda *arguments: normalise(*arguments).double())
    return train_small(output, flags, norm=None)


def on_rank(rank: int, call: int, what: Callable) -> Callable:
    """A `spoil` for one rank's step number `call`."""
    return functools.partial(_spoil, rank, call, what)


def _spoil(rank: int, at: int, what: Callable, logits, call: int):
    return what(logits) if (distributed.rank(), call) == (rank, at) else logits


def not_finite(logits):
    return logits * float("nan")


def terminate(logits):
    os.kill(os.getpid(), signal.SIGTERM)
    return logits


def fail(_, why: str = "this rank alone fails"):
    raise RuntimeError(why)


def kill_once(logits):
    """The process's own end by SIGKILL, unless its command's first argument, a folder, says that it has been killed."""
    mark = Path(sys.argv[1]) / "killed"
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return logits


def normalise(output: str) -> int:
    """Batch norm over ranks with 3, 4, 5, .. images each, in fp64: what it gives, its gradients and its buffers."""
    distributed.start()
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    nn.init.normal_(norm.weight)
    network = sync_batch_norms(nn.Sequential(norm), torch.device("cpu")).double()
    x, direction = (torch.randn(BATCH, 4, 3, 2, dtype=torch.float64) + 1000 for _ in range(2))
    first = sum(range(3, 3 + distributed.rank()))
    own = slice(first, BATCH if distributed.rank() == distributed.world_size() - 1 else first + 3 + distributed.rank())
    x = x[own].requires_grad_()
    out = network(x)
    gradients = torch.autograd.grad(out, (x, *network.parameters()), direction[own])
    left = {"names": list(network.state_dict()), "out": out.detach(), "x": gradients[0], "parameters": gradients[1:]}
    left |= {"buffers": list(network.buffers()), "eval": network.eval()(x).detach(), "kind": type(network[0]).__name__}
    torch.save(left, f"{output}/norm{distributed.rank()}.pt")
    distributed.stop()
    return 0


BATCH = 12


def act_together(output: str) -> int:
    """What `distributed` promises of values, actions and errors; the main rank alone leaves files."""
    distributed.start()
    rank, size = distributed.rank(), distributed.world_size()
    assert distributed.all_gather_object(rank) == list(range(size))
    assert distributed.on_main_rank(lambda: Path(output, f"main{rank}").touch() or rank) == 0
    order = []
    distributed.main_rank_first(lambda: order.append(Path(output, "first").exists()) or Path(output, "first").touch())
    assert order == [rank > 0]
    assert distributed.on_all_ranks(lambda: rank) == rank
    for wrong in range(size):
        with pytest.raises(distributed.SharedError) as shared:
            distributed.on_all_ranks(lambda wrong=wrong: [0][rank == wrong])
        assert isinstance(shared.value.error, IndexError)
    for act in (distributed.on_main_rank, distributed.main_rank_first):
        with pytest.raises(distributed.SharedError, match="of the main rank"):
            act(lambda: fail(None, "of the main rank") if rank == 0 else None)
    tensors = [torch.full((2,), float(rank)), torch.tensor(rank)]
    distributed.broadcast(tensors)
    assert tensors[0].tolist() == [0, 0] and tensors[1] == 0
    assert distributed.all_reduce_sum(torch.tensor(rank)) == size * (size - 1) // 2
    distributed.stop()
    return 0
