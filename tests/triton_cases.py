"""The side of tests/kernels/test_triton.py that computes, in a process of its own where Triton's interpreter is on.

TRITON_INTERPRET is read when a kernel is decorated, so the interpreter and the compiler cannot share a process. What is
here runs on any device: the GPU tests call it in their own process. A case is (B, N, D, K, H, W, border, content,
embeddings, scale).
"""

import contextlib
import functools
import importlib.util
import os

import torch

import oracle
from sasa.kernels import choose_backend, local_attention, local_attention_packed
from sasa.kernels import triton_backend as cuda
from sasa.kernels import triton_tiles as tiles
from sasa.kernels.interface import CallKind

NAMES = ("query", "key", "value", "rel_row", "rel_col")


def start() -> None:
    """First thing in the process."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


def innermost(x):
    return x.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)


def draw(case):
    """The inputs in fp64, channels innermost, and a direction; every number is one that fp16 and bf16 also have."""
    batch, heads, width, size, height, map_width, _, content, embeddings, _ = case
    generator = torch.Generator().manual_seed(size * 1000 + width)

    def numbers(*shape, std=1.0):
        return (torch.randn(*shape, generator=generator) * std).half().bfloat16().double()

    shape, std = (batch, heads, width, height, map_width), width**-0.25
    inputs = {
        "query": innermost(numbers(*shape, std=std)),
        "key": innermost(numbers(*shape, std=std)) if content else None,
        "value": innermost(numbers(*shape)),
        "rel_row": numbers(heads, width // 2, size, std=std) if embeddings else None,
        "rel_col": numbers(heads, width // 2, size, std=std) if embeddings else None,
    }
    return inputs, innermost(numbers(*shape))


def gradients(function, inputs, direction):
    leaves = {n: None if x is None else x.detach().requires_grad_() for n, x in inputs.items()}
    out = function(*leaves.values())
    out.backward(direction.to(out))
    return {"out": out.detach()} | {n: x.grad for n, x in leaves.items() if x is not None}


def cast(inputs, dtype, device="cpu"):
    return {n: None if x is None else x.to(device, dtype) for n, x in inputs.items()}


def options(case, backend):
    return {"kernel_size": case[3], "border": case[6], "scale": case[9], "backend": backend}


@contextlib.contextmanager
def unwritten_memory_is_nan():
    """What a kernel does not write shows: new buffers hold NaN instead of whatever was there."""
    new_empty = torch.Tensor.new_empty

    def filled(self, *args, **kwargs):
        x = new_empty(self, *args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    torch.Tensor.new_empty = filled
    try:
        yield
    finally:
        torch.Tensor.new_empty = new_empty


@functools.lru_cache(maxsize=64)
def expected(case):
    return gradients(functools.partial(local_attention, **options(case, "reference")), *draw(case))


def errors(case, dtype, device="cpu"):
    """name -> (largest error, root mean square, that of plain PyTorch in the same dtype, largest exact value)."""
    inputs, direction = draw(case)
    with unwritten_memory_is_nan():
        got = gradients(
            functools.partial(local_attention, **options(case, "triton")), cast(inputs, dtype, device), direction
        )
    settings = options(case, "triton")
    del settings["backend"]
    plain = gradients(functools.partial(oracle.plain_local_attention, **settings), cast(inputs, dtype), direction)
    assert all(x.dtype == dtype for x in got.values())

    def largest(x):
        return x.double().abs().max().item()

    def rms(x):
        return x.double().square().mean().sqrt().item()

    return {
        name: (largest(got[name].cpu() - x), rms(got[name].cpu() - x), rms(plain[name] - x), largest(x))
        for name, x in expected(case).items()
    }


@contextlib.contextmanager
def settings_of_tiles(settings):
    """Names of triton_tiles.py with other values."""
    before = {name: getattr(tiles, name) for name in settings}
    for name, value in settings.items():
        setattr(tiles, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(tiles, name, value)


def errors_with(settings, case, dtype):
    """`errors` with other settings of triton_tiles.py."""
    with settings_of_tiles(settings):
        return errors(case, dtype)


def heads_of_a_program(settings, num_heads):
    """How many heads one program serves of a call of few tiles."""
    with settings_of_tiles(settings):
        return tiles.heads_per_program(num_heads, 4)


def error_of_far_rows(height, stride):
    """Relative error of out for a map of rows `stride` elements apart, in fp16."""
    width, heads, head_dim = 3, 2, 8
    room = torch.empty((height - 1) * stride + 1000, dtype=torch.float16)  # virtual memory, not touched
    shape, strides = (1, 3, heads, head_dim, height, width), (0, heads * head_dim, head_dim, 1, stride, 48)
    qkv = room.as_strided(shape, strides)
    qkv.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    query, key, value = qkv.unbind(1)
    out = local_attention(query, key, value, None, None, kernel_size=3, backend="triton")
    exact = local_attention(*(x.double() for x in (query, key, value)), None, None, kernel_size=3, backend="reference")
    return ((out - exact).abs().max() / exact.abs().max()).item()


def errors_of_mutant(path, case):
    """`errors` in fp32 with the device side loaded from the file `path`."""
    name = "sasa.kernels.triton_kernels"
    spec = importlib.util.spec_from_file_location(name, path)
    module, before = importlib.util.module_from_spec(spec), cuda._kernels()
    spec.loader.exec_module(module)
    try:
        cuda._kernels = lambda: module
        return errors(case, torch.float32)
    finally:
        cuda._kernels = lambda: before


def bf16_in_the_interpreter():
    """fp32 rounded to bf16, a product of bf16 matrices, integers as bf16: by the interpreter, and as it should be."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x, y, rounded, product, integers, N: tl.constexpr):
        at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
        a, b = tl.load(x + at).to(tl.bfloat16), tl.load(y + at)
        tl.store(rounded + at, a)
        tl.store(product + at, tl.dot(a, b))
        tl.store(integers + at, tl.where(at < 128, at.to(tl.bfloat16), (at % 2 == 1).to(tl.bfloat16)))

    cuda._kernels()  # repairs the interpreter
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 16, 16, generator=generator)
    x[0, :4] = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1e-39, -0.0])  # two ties, a denormal number
    y = y.bfloat16()
    rounded, product, integers = x.bfloat16(), torch.empty(16, 16), x.bfloat16()
    kernel.fn.__globals__.update(tl=tl)  # the interpreter looks for the language there
    kernel[(1,)](x, y, rounded.zero_(), product, integers.zero_(), N=16)
    counted = torch.arange(256).view(16, 16)
    counted = torch.where(counted < 128, counted, counted % 2).bfloat16()
    return (rounded, product, integers), (x.bfloat16(), x.bfloat16().float() @ y.float(), counted)


# ---- layouts -------------------------------------------------------------------------------------------------------


def _sliced(x):
    room = x.new_full((2 * x.shape[0], *x.shape[1:4], 2 * x.shape[4]), float("nan"))
    room[::2, ..., ::2] = x
    return room[::2, ..., ::2]


LAYOUTS = {
    "channels innermost": innermost,
    "contiguous": torch.Tensor.contiguous,
    "every other column": _sliced,
    "columns before rows": lambda x: x.transpose(-2, -1).contiguous().transpose(-2, -1),
    "stride 0": lambda x: x[:1].expand(x.shape),
}


def errors_of_layout(case, layout, device="cpu"):
    """Largest error of each result, relative to the largest value, with all three maps in a layout."""
    inputs, direction = draw(case)
    inputs = cast(inputs, torch.float32, device)
    relaid = {n: LAYOUTS[layout](x) if n in NAMES[:3] and x is not None else x for n, x in inputs.items()}
    direction = LAYOUTS[layout](direction)
    exact = gradients(
        functools.partial(local_attention, **options(case, "reference")), cast(relaid, torch.float64), direction
    )
    with unwritten_memory_is_nan():
        got = gradients(functools.partial(local_attention, **options(case, "triton")), relaid, direction)
    return {n: ((got[n].cpu() - x).abs().max() / x.abs().max()).item() for n, x in exact.items()}


def errors_of_fused(case, innermost_channels, device="cpu"):
    """The same of a fused projection, and how many of its slices and of its gradient's the kernels had copied."""
    inputs, direction = draw(case)
    parts = [inputs[n] for n in NAMES[:3] if inputs[n] is not None]
    qkv = torch.stack(parts, 1).float().to(device)  # (B, P, N, D, H, W)
    if innermost_channels:
        qkv = qkv.permute(0, 4, 5, 1, 2, 3).contiguous().permute(0, 3, 4, 5, 1, 2)
    tables = {n: x.float().to(device) for n, x in inputs.items() if n in NAMES[3:]}
    copies, empty_inner = [], cuda._empty_inner

    def counted(x):
        copies.append(x)
        return empty_inner(x)

    cuda._empty_inner = counted
    try:
        got = gradients(
            functools.partial(local_attention_packed, **options(case, "triton")), {"qkv": qkv} | tables, direction
        )
    finally:
        cuda._empty_inner = empty_inner
    names = [n for n in NAMES[:3] if inputs[n] is not None]
    got |= dict(zip(names, got.pop("qkv").unbind(1), strict=True))
    exact = expected(case)
    return {n: ((got[n].cpu() - x).abs().max() / x.abs().max()).item() for n, x in exact.items()}, len(copies) - 1


# ---- the operator --------------------------------------------------------------------------------------------------


def repeats_bit_for_bit(case, dtype, device="cpu"):
    inputs, direction = draw(case)
    function = functools.partial(local_attention, **options(case, "triton"))
    first, second = (gradients(function, cast(inputs, dtype, device), direction) for _ in range(2))
    return all(torch.equal(first[n], second[n]) for n in first)


def compiles_without_a_break(case, device="cpu"):
    """Largest difference of torch.compile(fullgraph=True) to the call itself."""
    inputs, direction = draw(case)
    function = functools.partial(local_attention, **options(case, "triton"))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    inputs = cast(inputs, torch.float32, device)
    wanted, got = gradients(function, inputs, direction), gradients(compiled, inputs, direction)
    return max((got[n] - x).abs().max().item() for n, x in wanted.items())


def opcheck(case, device="cpu"):
    inputs, _ = draw(case)
    leaves = [None if x is None else x.float().to(device).requires_grad_() for x in inputs.values()]
    arguments = (*leaves, case[3], case[6], case[9], "triton")
    return torch.library.opcheck(torch.ops.sasa.local_attention.default, arguments)


def autocast_equals_narrow_inputs(case, dtype):
    """On the CPU: under autocast, and with inputs that are narrow already."""
    inputs, _ = draw(case)
    function = functools.partial(local_attention, **options(case, "triton"))
    wanted = function(*cast(inputs, dtype).values())
    with torch.autocast("cpu", dtype):
        got = function(*cast(inputs, torch.float32).values())
    return got.dtype == dtype and torch.equal(got, wanted)


def empty_batch(case):
    inputs, direction = draw(case)
    inputs = cast(inputs, torch.float32)
    inputs |= {n: inputs[n][:0] for n in NAMES[:3]}
    got = gradients(functools.partial(local_attention, **options(case, "triton")), inputs, direction[:0])
    return got["out"].shape[0] == 0 and not any(got[n].any() for n in NAMES[3:])


def chosen(shape, kernel_size, backend="auto"):
    """What serves a call on CPU tensors in this process."""
    return choose_backend(torch.zeros(shape), kernel_size, backend)


def refusal(shape, kernel_size, dtype):
    return cuda.unsupported(CallKind(torch.device("cpu"), dtype, shape[2], kernel_size))
