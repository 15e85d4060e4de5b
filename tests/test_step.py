"""What keeps a device busy: nothing waits for it inside a step, no layout copies, input as fast as the decoder."""

import io
import statistics
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import preprocess
import small_runs
import train
from model import build


class Calls(TorchDispatchMode):
    """Every operator that runs, with its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[torch.Tensor]]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.name().partition(".")[0]
        self.seen.append((name, [x for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor)]))
        return out

    def count(self, *names: str) -> int:
        return sum(name in names for name, _ in self.seen)


def test_a_step_waits_for_the_device_once(tmp_path, monkeypatch):
    """Data, forward, backward, clipping, optimizer, average: the one read of a tensor's value is `agree`'s.

    Steps counted on the CPU take the way of CUDA but for fused kernels. The average's own counter is a CPU tensor.
    """
    small_runs.few_digits(monkeypatch)
    original, waits, reads = train.train_step, [], []
    agree = train.agree

    def counted_agree(run, *figures):
        reads.append(1)
        return agree(run, *figures)

    def train_step(run, pairs):
        with Calls() as calls:
            figures = original(run, pairs)
        own = [t for name, t in calls.seen if name == "aten::_local_scalar_dense" and t[0] is not run.ema.n_averaged]
        waits.append(len(own) + calls.count("aten::is_nonzero", "aten::nonzero", "aten::unique", "aten::equal"))
        return figures

    monkeypatch.setattr(train, "train_step", train_step)
    monkeypatch.setattr(train, "agree", counted_agree)
    flags = "--dataset DIGITS --epochs 1 --batch-size 8 --max-steps 3 --ema 0.9 --mixup 0.2 --clip-grad 1 --name run"
    assert small_runs.run(tmp_path, *flags.split(), "--no-progress", "--device", "cpu") == 0
    assert waits == [0, 0, 0] and len(reads) == 3


COPIES = ("aten::clone", "aten::copy_", "aten::contiguous", "aten::_to_copy")


@pytest.mark.parametrize("stem", [False, True])
def test_channels_last_is_kept_through_the_network(stem):
    """Every map of forward and backward lies channels-last, and no map is copied between attention and its neighbours.

    The attention's own operator is a black box here: what it does inside is the backend's.
    """
    model = build("ResNet26", 10, stem=stem, small_images=True, num_heads=4).to(memory_format=torch.channels_last)
    wrong, seen = [], []

    def check(name):
        def hook(module, inputs, output):
            for x in (*inputs, output):
                if x.dim() == 4 and min(x.shape[1], x.shape[2] * x.shape[3]) > 1:
                    seen.append(name)
                    if not x.is_contiguous(memory_format=torch.channels_last):
                        wrong.append((name, tuple(x.shape), x.stride()))

        return hook

    for name, module in model.named_modules():
        if name and not isinstance(module, torch.nn.Sequential):
            module.register_forward_hook(check(name))
    x = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    with Calls() as calls:
        loss = model(x).square().mean()
    assert len(seen) > 50 and wrong == []
    if not stem:
        with calls:
            loss.backward()
        maps = [
            t[0].shape for name, t in calls.seen if name in COPIES and t and t[0].dim() >= 4 and t[0].numel() > 4096
        ]
        assert calls.count("sasa::local_attention") == calls.count("sasa::local_attention_backward") == 8
        assert maps == []


def photo(rng: np.random.Generator, height: int, width: int) -> bytes:
    """A JPEG of a photograph's size and smoothness."""
    coarse = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.BICUBIC), dtype=np.int16)
    noisy = (pixels + rng.integers(-12, 13, pixels.shape)).clip(0, 255).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(noisy).save(content, "jpeg", quality=90)
    return content.getvalue()


@pytest.mark.slow
def test_the_input_pipeline_keeps_80_percent_of_the_decoders_speed(tmp_path, capsys):
    """One core, 500x375 JPEGs, crop to 224, flip and mixup on, against decoding alone; rounds take turns."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 48), ("val", 2)):
        for name in ("a", "b"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count // 2):
                (folder / f"{i}.jpg").write_bytes(photo(rng, 375, 500))
    _, data, _, _ = preprocess.load(dataset="FOLDER", data_dir=tmp_path)
    augment = preprocess.AugmentConfig(flip=True, mixup=0.2)

    def pipeline(epoch):
        return sum(len(images) for images, _ in data.batches(epoch, batch_size=16, augment=augment))

    def decode(_):
        return sum(data._files._read(i) is not None for i in range(len(data)))

    rates = {pipeline: [], decode: []}
    for turn in range(-1, 5):
        for way in (pipeline, decode) if turn % 2 else (decode, pipeline):
            started = time.perf_counter()
            images = way(turn + 1)
            if turn >= 0:
                rates[way].append(images / (time.perf_counter() - started))
    ratio = statistics.median(a / b for a, b in zip(*rates.values(), strict=True))
    with capsys.disabled():
        medians = [statistics.median(values) for values in rates.values()]
        print(f"\npipeline {medians[0]:.0f}, decoder {medians[1]:.0f} images/s a core; {100 * ratio:.0f}%")
    assert ratio >= 0.8
