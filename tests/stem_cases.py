"""The side of tests/kernels/test_triton_stem.py that computes, in the interpreter's process (tests/triton_cases.py).

What is here runs on any device: the GPU tests call it in their own process.
"""

import contextlib
import copy

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import triton_cases
from attention import AttentionStem
from model import make_stem
from sasa.kernels import stem_operator


def results(stem, x, direction):
    """Output and gradients of the image and of every parameter."""
    x = x.detach().requires_grad_()
    stem.zero_grad()
    out = stem(x)
    out.backward(direction.to(out))
    grads = {name: parameter.grad.clone() for name, parameter in stem.named_parameters()}
    return {"out": out.detach(), "x": x.grad} | grads


def relative(got, wanted):
    """Largest error of each result over its largest value (over 1 where that is smaller)."""
    return {
        name: ((got[name].cpu().double() - x).abs().max() / x.abs().max().clamp(min=1.0)).item()
        for name, x in wanted.items()
    }


def draw(shape, channels, side=1, channels_last=False):
    generator = torch.Generator().manual_seed(sum(shape))
    b, h, w = shape
    x = torch.randn(b, 3, h, w, generator=generator)
    direction = torch.randn(b, channels, -(-h // side), -(-w // side), generator=generator)
    if channels_last:
        x, direction = (y.contiguous(memory_format=torch.channels_last) for y in (x, direction))
    return x, direction


def errors(shape, options, device="cpu", channels_last=False):
    """The kernel in fp32 against PyTorch in fp64."""
    torch.manual_seed(0)
    stem = AttentionStem(backend="triton", **options)
    definition = AttentionStem(backend="reference", **options).double()
    definition.load_state_dict(stem.state_dict())
    x, direction = draw(shape, stem.out_channels, channels_last=channels_last)
    stem = stem.to(device)
    assert stem.kernel(device, torch.float32) == "triton"
    checked = triton_cases.offsets_checked() if channels_last else contextlib.nullcontext()
    with triton_cases.unwritten_memory_is_nan(), checked:
        got = results(stem, x.to(device), direction.to(device))
    return relative(got, results(definition, x.double(), direction.double()))


def pooled_stems(options, device="cpu"):
    """A stem that pools in the kernel, with weights of both signs and zero in its norm, and its layers in fp64."""
    torch.manual_seed(0)
    channels, options = options["out_channels"], {k: v for k, v in options.items() if k != "out_channels"}
    fused = make_stem(channels, True, False, options | {"backend": "triton"})
    with torch.no_grad():
        fused[1].weight.normal_()
        fused[1].bias.normal_()
        fused[1].weight[3], fused[1].bias[3] = 0, 1  # the ReLU lets its gradient pass
        fused[1].running_mean.normal_()
        fused[1].running_var.uniform_(0.5, 2)
    layers = make_stem(channels, True, False, options | {"backend": "reference"}).double()
    layers.load_state_dict(fused.state_dict())
    layers[0].register_forward_hook(lambda *_: None)
    return copy.deepcopy(fused).to(device), layers


def errors_pooled(shape, options, training, device="cpu", dtype=None):
    """The stem that pools in the kernel, under autocast of `dtype` where that is given, against its layers in fp64."""
    options = {"out_channels": 8, "num_heads": 2} | options
    fused, layers = (stem.train(training) for stem in pooled_stems(options, device))
    x, direction = draw(shape, options["out_channels"], side=4)
    autocast = torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None)
    with autocast, triton_cases.unwritten_memory_is_nan():
        assert fused[0].can_pool(x.to(device))
        got = results(fused, x.to(device), direction.to(device))
    assert got["out"].dtype == (dtype or torch.float32)
    found = relative(got, results(layers, x.double(), direction.double()))
    wanted = dict(layers.named_buffers())
    buffers = {name: value for name, value in fused.named_buffers() if value.is_floating_point()}
    return found | relative(buffers, {name: wanted[name].double() for name in buffers})


def repeats_bit_for_bit(window, device="cpu"):
    torch.manual_seed(0)
    stem = AttentionStem(out_channels=8, num_heads=2, window=window, backend="triton").to(device)
    x, direction = (y.to(device) for y in draw((1, 5, 9), 8))
    first, second = results(stem, x, direction), results(stem, x, direction)
    return all(torch.equal(first[name], second[name]) for name in first)


def opcheck(pooled, image_gradient, device="cpu"):
    stem = AttentionStem(out_channels=4, num_heads=2, backend="triton").to(device)
    x = torch.randn(1, 3, 4, 6, device=device, requires_grad=image_gradient)
    weights = [w.detach().requires_grad_() for w in (stem._forms(), stem._mixture(x), stem._value_weight())]
    signs = torch.tensor([1.0, -1.0, 0.0, 1.0], device=device) if pooled else None
    operator = torch.ops.sasa.stem_attention.default
    torch.library.opcheck(operator, (x, *weights, "block", "mask", signs, "triton"))


def spread_of_a_nan(window):
    """Where the output changes when a pixel becomes NaN: (H, W), and whether the pixel itself becomes NaN."""
    stem, x = AttentionStem(out_channels=4, num_heads=2, window=window, backend="triton"), torch.randn(1, 3, 8, 12)
    clean = stem(x)
    x[0, 1, 5, 6] = float("nan")
    return (stem(x) != clean).flatten(0, 1).any(0), bool(torch.isnan(stem(x)[0, :, 5, 6]).all())


def kernels_chosen():
    """The kernel for fp32 images of this process by backend."""
    return [stem_operator.kernel_for("cpu", torch.float32, 3, backend, 4, 4, 16) for backend in ("auto", "triton")]


class Bytes(TorchDispatchMode):
    """Counts what operators read and write: each of their tensors once, views excepted."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not getattr(function, "is_view", False):
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            self.total += sum(x.numel() * x.element_size() for x in tensors)
        return out


def bytes_moved(images, size, small, *, attention):
    """Of the stem's forward and backward in fp32, the image's gradient left out."""
    stem = make_stem(64, attention, small, {}).to("meta")
    x = torch.empty(images, 3, size, size, device="meta")
    with Bytes() as counted:
        stem(x).sum().backward()
    return counted.total
