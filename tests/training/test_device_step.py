"""What a batch and a training step queue on a device, copy to it and wait for: counted without one.

tests/device_log.py has the device. The step is ResNet50's at 224 pixels, bf16, with a moving average, after the first.
"""

import importlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from attention import AttentionStem, LocalAttention2d
from config import resolve
from device_log import META, Autocast, DeviceLog
from model import build
from preprocess import info_without_files
from sasa.analysis.flops import count_flops
from sasa.data import erasing
from sasa.data.augment import AugmentConfig, draw, draw_mix
from sasa.data.batches import Piece, transform
from sasa.data.transfer import to_device
from sasa.kernels import functional, plain, stem_operator
from sasa.kernels.triton_tiles import STAGES
from sasa.training.classification import loss_and_right
from sasa.training.evaluation import evaluate
from sasa.training.guard import Guard
from sasa.training.optim import build_ema, build_optimizer
from sasa.training.run import Run
from sasa.training.step import Requests, train_step
from tools.gpu.kernels import Form, counted
from tools.gpu.predictions import COUNTED_WITH, STEM_INSTRUCTIONS, WORK, Work
from tools.gpu.training import BATCH, KINDS

IMAGES, SIDE = 4, 224
PRODUCTS = ("aten::convolution", "aten::convolution_backward", "aten::mm", "aten::addmm")
DOCS = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"


class Event:
    """In place of a CUDA event."""

    waits = 0

    def record(self):
        pass

    def synchronize(self):
        Event.waits += 1


@pytest.fixture
def as_cuda(monkeypatch):
    """Optimizers, clipping and attention do with the device what they do with CUDA."""
    for name in ("optim.sgd", "optim.adamw", "optim.adam", "nn.utils.clip_grad", "utils._foreach_utils"):
        module = importlib.import_module(f"torch.{name}")
        for part in ("fused", "foreach"):
            if hasattr(module, f"_get_{part}_kernels_supported_devices"):
                monkeypatch.setattr(module, f"_get_{part}_kernels_supported_devices", lambda: ["meta"])
        if hasattr(module, "_device_dtype_check_for_fused"):
            monkeypatch.setattr(module, "_device_dtype_check_for_fused", lambda *args, **kwargs: None)
        if hasattr(module, "_device_has_foreach_support"):
            monkeypatch.setattr(module, "_device_has_foreach_support", lambda device: device == META)
        if hasattr(module, "_has_foreach_support"):
            monkeypatch.setattr(module, "_has_foreach_support", lambda tensors, device: device == META)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for module in (functional, plain):
        monkeypatch.setattr(module, "autocast_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(Event, "waits", 0)


class Images:
    """A training set of which only the number counts."""

    def __len__(self):
        return 100 * IMAGES

    def steps_per_epoch(self, batch):
        return 100


def make_run(optimizer: str, name: str = "ResNet50", **options) -> Run:
    with META:
        model = build(name, 1000, **{"stem": False, **options}).to(memory_format=torch.channels_last).train()
    config = resolve({"model_name": name, "optimizer": optimizer, "batch_size": IMAGES}, "IMAGENET")
    ema = build_ema(model, 0.999)
    ema._has_begun = True  # which only its first update reads of the device
    return Run(
        replace(config, ema=0.999), None, {}, None, META, SimpleNamespace(train=Images()), model, model,
        build_optimizer(model, config, torch.device("cuda")), None, ema, Guard(model, META), Autocast,
        SimpleNamespace(global_batch=IMAGES, batch=0, step=0, epoch=0, skipped=0),
    )  # fmt: skip


def batch_of(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels."""
    images = torch.empty(count, 3, SIDE, SIDE, device=META).to(memory_format=torch.channels_last)
    return images, torch.empty(count, dtype=torch.int64, device=META)


def logged_step(run: Run) -> DeviceLog:
    """A step after the first, which makes the optimizer's state; its figures are read at the end."""
    pair = batch_of(IMAGES)
    with DeviceLog():
        train_step(run, iter([pair]), 0, Requests, loss_and_right)
    with DeviceLog() as log:
        queued = train_step(run, iter([pair]), 1, Requests, loss_and_right)
        assert queued.is_guarded and Event.waits == 0
        queued.read()
    return log


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lamb"])
def test_a_step_waits_once_and_copies_its_figures_alone(as_cuda, optimizer):
    log = logged_step(make_run(optimizer))
    assert log.waits == [] and Event.waits == 1  # for the figures, when all else is queued
    assert log.copies == {("device", "host", "no wait"): 1}
    wanted = {"aten::convolution": 53, "aten::native_batch_norm": 53, "sasa::local_attention_packed": 16,
              "sasa::local_attention_packed_backward": 16}  # fmt: skip
    assert wanted.items() <= log.kernels.items()
    lines = [f"{count} {name}" for name, count in log.kernels.most_common()]
    print(f"{optimizer}: {sum(log.kernels.values())} operators: {', '.join(lines)}")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lamb"])
def test_fp16s_scaler_adds_no_wait_and_no_copy(as_cuda, optimizer):
    run = make_run(optimizer, "ResNet26")
    run.scaler = torch.amp.GradScaler("meta")
    log = logged_step(run)
    assert log.waits == [] and Event.waits == 1 and log.copies == {("device", "host", "no wait"): 1}
    assert log.kernels["aten::_amp_foreach_non_finite_check_and_unscale_"] == 1
    assert log.kernels["aten::_amp_update_scale_"] == 1


def work_of(name: str, kind: str) -> Work:
    """What a step of `tools.gpu` does, without a moving average."""
    run = make_run("sgd", name, **KINDS[kind])
    run.ema = None
    flops = count_flops(run.model, SIDE).by_kind
    with DeviceLog() as log:
        train_step(run, iter([batch_of(BATCH)]), 0, Requests, loss_and_right)
    assert log.waits == []
    products = sum(moved for operator, moved in log.bytes.items() if operator in PRODUCTS)
    others = sum(moved for operator, moved in log.bytes.items() if not operator.startswith(("sasa::", *PRODUCTS)))
    has_stem = any(isinstance(module, AttentionStem) for module in run.model.modules())
    return Work(
        3 * BATCH * sum(flops.get(part, 0) for part in ("convolution", "linear", "projection")) / 1e12,
        products / 1e9,
        others / 1e9,
        attention_instructions(run.model) / 1e9 + STEM_INSTRUCTIONS * has_stem,
    )


def attention_instructions(model: nn.Module) -> float:
    """Warp instructions of all local attention, forward and backward, by the committed table."""
    found = []

    def note(layer, inputs):
        side = inputs[0].shape[-1]
        each = [counted(stage, Form(layer.head_dim, side, 1), torch.bfloat16, COUNTED_WITH) for stage in STAGES]
        found.append(sum(each) * layer.num_heads * side**2 * BATCH)

    for layer in model.modules():
        if isinstance(layer, LocalAttention2d):
            layer.register_forward_pre_hook(note)
    with torch.no_grad():
        model.eval()(torch.empty(1, 3, SIDE, SIDE, device=META))
    return sum(found)


@pytest.mark.parametrize(
    ("name", "kind"),
    [pytest.param(*key, marks=[] if key == ("ResNet26", "attention + stem") else pytest.mark.slow) for key in WORK],
)
def test_predictions_rest_on_what_a_step_is_counted_to_do(as_cuda, name, kind, monkeypatch):
    monkeypatch.setattr(stem_operator, "kernel_for", lambda *_: "triton")
    work = work_of(name, kind)
    print(name, kind, *(f"{x:.4g}" for x in work))
    assert tuple(work) == pytest.approx(tuple(WORK[name, kind]), rel=0.01)


class Split:
    """A validation split of three batches on the device, the last a shorter one."""

    SIZES = (4, 4, 2)
    skipped = 0

    def __len__(self):
        return sum(self.SIZES)

    def eval_batches(self, batch_size, rank, world_size):
        for size in self.SIZES:
            images = torch.empty(size, 3, 32, 32, device=META).to(memory_format=torch.channels_last)
            yield images, torch.empty(size, dtype=torch.int64, device=META)


@pytest.mark.parametrize("classes", [3, 1001])  # with the confusion matrix, and too many for it
def test_an_evaluation_waits_once_a_split(as_cuda, classes):
    with META:
        model = build("ResNet26", classes, False)
    with DeviceLog() as log:
        found = evaluate(model, Split(), classes, 4, Autocast)
    assert log.copies == {("device", "host", "wait"): 1} and log.waits == ["copy from device to host"]
    assert found.images == 10 and (found.confusion is None) == (classes > 1000)
    assert log.kernels["aten::topk"] == 3


@pytest.mark.parametrize("kind", ["rand", "trivial", "auto"])
def test_a_batch_is_made_without_a_wait_by_as_many_copies_as_there_are_kinds_of_numbers(kind):
    config = AugmentConfig(flip=True, auto_augment=kind, random_erase=0.5, cutout=8, mixup=0.2)
    info, rng, count = info_without_files("CIFAR10", 10, 32), np.random.default_rng(0), 64
    draws = draw(rng, count, 32, 32, config, "CIFAR10")._replace(erase=erasing.draw(rng, count, 32, 32, 0.5))
    piece = Piece(torch.arange(count), draws, draw_mix(rng, 32, 32, config))
    images = torch.empty(count, 3, 32, 32, dtype=torch.uint8, device=META)
    labels = torch.empty(count, dtype=torch.int64, device=META)
    transform(images, labels, piece, config, info)  # which keeps constants on the device
    with DeviceLog() as log:
        images, _ = transform(images, labels, piece, config, info, torch.channels_last)
    assert log.waits == []
    assert log.copies == {("host", "device", "no wait"): 5}  # flip, places, matrices, cutout, rectangles
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_the_log_sees_copies_and_waits():
    with DeviceLog() as log:
        torch.tensor([1.0, 2.0], device=META)
        torch.zeros(3).to(META)
        torch.zeros(3).to(META, non_blocking=True)
        torch.zeros(3, device=META).cpu()
        with pytest.raises(AssertionError, match="reads a number"):
            torch.zeros(3, device=META).sum().item()
    assert log.copies["host", "device", "wait"] == 2 and log.copies["host", "device", "no wait"] == 1
    assert log.copies["device", "host", "wait"] == 1 and len(log.waits) == 3


def test_what_goes_to_cuda_goes_from_pinned_memory(monkeypatch):
    """Out of other memory a copy that should not wait may wait all the same."""
    seen = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: seen.append("pinned") or x)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *where, **how: seen.append((where, how)) or x)
    to_device(torch.zeros(2), torch.device("cuda", 0))
    assert seen == ["pinned", ((torch.device("cuda", 0),), {"non_blocking": True})]
