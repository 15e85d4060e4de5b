"""The side of tests/kernels/test_triton*.py that computes, in a process of its own where Triton's interpreter is on.

TRITON_INTERPRET is read when a kernel is decorated, so the interpreter and the compiler cannot share a process. What is
here runs on any device: the GPU tests call it in their own process.
"""

import contextlib
import functools
import importlib.util
import mmap
import os
import sys
from typing import NamedTuple

import pytest
import torch

import oracle
from local_attention_cases import channels_innermost, sliced
from sasa.kernels import choose_backend, local_attention, local_attention_packed
from sasa.kernels import triton_backend as cuda
from sasa.kernels import triton_tiles as tiles
from sasa.kernels.interface import CallKind

NAMES = ("query", "key", "value", "rel_row", "rel_col")
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = {"fp32": torch.float32} | HALF
NO_RESERVE = 0x4000  # of mmap on Linux; Python names it from 3.11 on
LIMIT = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}  # of the largest value

refused = cuda.cannot_compile()
needs_triton = pytest.mark.skipif(
    refused is not None, reason=f"{refused}; what the kernels compute is not checked here"
)
needs_compiler = pytest.mark.skipif(
    cuda.interpreted(), reason="TRITON_INTERPRET is set: this process cannot compile kernels"
)


def start() -> None:
    """First thing in the process."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    global imported_early
    cuda.unusable()
    imported_early = "triton" in sys.modules
    if refused is None:
        check_offsets(False)


def check_offsets(check):
    """See `offsets_checked`."""
    from triton.runtime import interpreter

    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", check)  # its dataclass is frozen


def triton_was_imported_early():
    """Whether the process imported triton before it called a kernel."""
    return imported_early


class Case(NamedTuple):
    """A call of local attention."""

    batch: int
    heads: int
    width: int
    size: int
    height: int
    map_width: int
    border: str
    content: bool
    embeddings: bool
    scale: float

    def __str__(self):
        text = f"B{self.batch}N{self.heads}D{self.width}-K{self.size}-{self.height}x{self.map_width}-{self.border}"
        text += ("" if self.content else "-nokey") + ("" if self.embeddings else "-norel")
        return text if self.scale == 1 else f"{text}-scale{self.scale}"


def case(heads, width, size, height, map_width, border="mask", content=True, embeddings=True, scale=1.0, batch=1):
    return Case(batch, heads, width, size, height, map_width, border, content, embeddings, scale)


def check(found, dtype):
    """The largest error stays below a limit; the root mean square, in half types, below that of plain PyTorch.

    Not the largest again: on a small map it is a few roundings that happen to add up, in either of the two.
    """
    for name, (error, rms, plain, largest) in found.items():
        is_zero = largest < 1e-9  # the exact gradient: an error in absolute terms
        scale = 1.0 if is_zero else largest
        assert error <= LIMIT[dtype] * scale, f"{name}: off by {error} of {largest}"
        if dtype != torch.float32:  # a rounding of the result is what even an exact computation would have
            few = is_zero or name in ("rel_row", "rel_col")  # numbers, each a sum over the map: room for chance
            bound = plain + torch.finfo(dtype).eps * scale * (1 / 2 if few else 1 / 8)
            assert rms <= bound, f"{name}: off by {rms} (root mean square), plain types {plain}"


def draw(case):
    """The inputs in fp64, channels innermost, and a direction; every number is one that fp16 and bf16 also have."""
    batch, heads, width, size, height, map_width, _, content, embeddings, _ = case
    generator = torch.Generator().manual_seed(size * 1000 + width)

    def numbers(*shape, std=1.0):
        return (torch.randn(*shape, generator=generator) * std).half().bfloat16().double()

    shape, std = (batch, heads, width, height, map_width), width**-0.25
    inputs = {
        "query": channels_innermost(numbers(*shape, std=std)),
        "key": channels_innermost(numbers(*shape, std=std)) if content else None,
        "value": channels_innermost(numbers(*shape)),
        "rel_row": numbers(heads, width // 2, size, std=std) if embeddings else None,
        "rel_col": numbers(heads, width // 2, size, std=std) if embeddings else None,
    }
    return inputs, channels_innermost(numbers(*shape))


def gradients(function, inputs, direction):
    leaves = {n: None if x is None else x.detach().requires_grad_() for n, x in inputs.items()}
    out = function(*leaves.values())
    out.backward(direction.to(out))
    return {"out": out.detach()} | {n: x.grad for n, x in leaves.items() if x is not None}


def cast(inputs, dtype, device="cpu"):
    return {n: None if x is None else x.to(device, dtype) for n, x in inputs.items()}


def options(case, backend):
    return {"kernel_size": case.size, "border": case.border, "scale": case.scale, "backend": backend}


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
def offsets_checked():
    """The interpreter computes sums of integers in 64 bits too, and refuses those that 32 bits do not hold.

    It takes half of its time: on where an offset could be wrong, in tests of layouts and sizes.
    """
    if not cuda.interpreted():
        yield
        return
    check_offsets(True)
    try:
        yield
    finally:
        check_offsets(False)


@contextlib.contextmanager
def tile_settings(settings):
    """Other values of names in triton_tiles.py."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setattr(tiles, name, value)
        yield


@contextlib.contextmanager
def half_programs():
    """fp32 is computed by the programs that half types have: their tiles and their sums, without their rounding."""
    tile_of, constants = tiles.tile_of, tiles.constants

    def constants_of_half(stage, tile, problem, dtype, heads=1, confine=False):
        return constants(stage, tile, problem, torch.bfloat16, heads, confine)

    with tile_settings({
        "tile_of": lambda stage, problem, dtype, target=None: tile_of(stage, problem, torch.bfloat16, target),
        "constants": constants_of_half,
    }):  # fmt: skip
        yield


def errors_with(settings, case, dtype=torch.float32, device="cpu"):
    with tile_settings(settings):
        return errors(case, dtype, device)


def errors_of_other_tiles(case):
    """Errors with the tiles that the case's row has for some targets instead of the chosen ones, and how many."""
    used = []

    def choice(entry, target):
        others = list(entry.get("instead", {}).values())
        used.extend(others[:1])
        return tuple(others[0] if others else entry["tile"])

    with half_programs(), tile_settings({"choice": choice}):
        return errors(case, torch.float32), len(used)


def heads_with(settings, case):
    """How many heads a program of the forward kernel serves, in fp32."""
    with tile_settings(settings):
        tile = tiles.tile_of("forward", tiles.Problem(*case[1:3], *case[4:6], case.size), torch.float32)
        count = case.batch * -(-case.height // tile[0]) * -(-case.map_width // tile[1])
        return tiles.heads_per_program(case.heads, count)


def errors_of_half_programs(case):
    with half_programs():
        return errors(case, torch.float32)


def error_of_far_rows(height, stride):
    """Relative error of out for a map of rows `stride` elements apart, in fp32 with the values of fp16."""
    width, heads, head_dim = 3, 2, 8
    # Address space, not memory: no more than the few pages that are written.
    room = mmap.mmap(-1, 4 * (height * stride), flags=mmap.MAP_PRIVATE | NO_RESERVE)
    room = torch.frombuffer(room, dtype=torch.float32)
    shape, strides = (1, 3, heads, head_dim, height, width), (0, heads * head_dim, head_dim, 1, stride, 48)
    qkv = room.as_strided(shape, strides)
    qkv.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    query, key, value = qkv.unbind(1)
    with offsets_checked():
        out = local_attention(query, key, value, None, None, kernel_size=3, backend="triton")
    exact = local_attention(*(x.double() for x in (query, key, value)), None, None, kernel_size=3, backend="reference")
    return ((out - exact).abs().max() / exact.abs().max()).item()


DEVICE_FILES = ("triton_parts", "triton_kernels", "triton_gradients")


@contextlib.contextmanager
def device_side(folder):
    """The kernels of the files in `folder`, all of DEVICE_FILES."""
    modules = {}
    with pytest.MonkeyPatch.context() as patch:
        for file in DEVICE_FILES:
            name = f"sasa.kernels.{file}"
            spec = importlib.util.spec_from_file_location(name, folder / f"{file}.py")
            modules[file] = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, name, modules[file])  # where the next one's imports find it
            spec.loader.exec_module(modules[file])
        kernels = {"forward": modules["triton_kernels"].forward_kernel}
        kernels |= {stage: getattr(modules["triton_gradients"], f"{stage}_kernel") for stage in ("query", "key")}
        cuda.load()
        patch.setattr(cuda, "_kernels", lambda: kernels)
        yield


def errors_of_mutant(folder, settings, case):
    """`errors_with` in fp32 with the device side of the files in `folder`."""
    with device_side(folder):
        return errors_with(settings, case)


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


# ---- numbers that are not finite -----------------------------------------------------------------------------------


@contextlib.contextmanager
def confining(on):
    """Whether the kernels keep NaN in the windows that hold it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_confines", lambda *_: on)
        yield


def results(case, inputs, direction, dtype, fused=False):
    """out and the gradients; of three maps, or of slices of one projection."""
    settings, inputs = options(case, "triton"), cast(inputs, dtype)
    if not fused:
        return gradients(functools.partial(local_attention, **settings), inputs, direction)
    names = [n for n in NAMES[:3] if inputs[n] is not None]
    qkv = torch.stack([inputs[n] for n in names], 1).permute(0, 4, 5, 1, 2, 3).contiguous().permute(0, 3, 4, 5, 1, 2)
    tables = {n: inputs[n] for n in NAMES[3:]}
    found = gradients(functools.partial(local_attention_packed, **settings), {"qkv": qkv} | tables, direction)
    return found | dict(zip(names, found.pop("qkv").unbind(1), strict=True))


def with_number(case, name, value, row, col):
    """The inputs and the direction with `value` in the last head's first channel of a map ("grad": the direction)."""
    inputs, direction = draw(case)
    (direction if name == "grad" else inputs[name])[-1, -1, 0, row, col] = value
    return inputs, direction


def finite_by_mistake(case, name, value, row, col, confine=True):
    """Result -> how many numbers are finite that are not by the definition.

    Args:
        case: the call, by the programs of half types in fp32.
        name: the map that holds `value`: "query", "key", "value" or "grad" (of the output).
        value: NaN or an infinity, of the last head's first channel.
        row: its pixel.
        col: its pixel.
        confine: whether the kernels keep it in its windows.
    """
    inputs, direction = with_number(case, name, value, row, col)
    exact = gradients(functools.partial(local_attention, **options(case, "reference")), inputs, direction)
    assert any(not x.isfinite().all() for x in exact.values())
    with half_programs(), confining(confine):
        got = results(case, inputs, direction, torch.float32)
    return {n: int((got[n].isfinite() & ~x.isfinite()).sum()) for n, x in exact.items() if n in ("out", *NAMES[:3])}


def spread(case, name, values, row, col, dtype=torch.float32, fused=False, settings=None, confine=True, own=False):
    """Result -> how many numbers change, of those that do not depend on the one number that is not finite.

    Which depend on it is found by the definition, with another finite number in its place. fp32 is computed by the
    programs of half types, or with `own` by its own. Arguments are those of `finite_by_mistake`.
    """
    reference = functools.partial(local_attention, **options(case, "reference"))
    exact = expected(case)
    other = gradients(reference, *with_number(case, name, 3.0, row, col))
    apart = {n: exact[n] == x for n, x in other.items() if n in ("out", *NAMES[:3])}
    assert any(x.any() and not x.all() for x in apart.values())
    changed = dict.fromkeys(apart, 0)
    programs = half_programs() if dtype == torch.float32 and not own else contextlib.nullcontext()
    with tile_settings(settings or {}), programs, confining(confine):
        wanted = results(case, *draw(case), dtype, fused)
        for value in values:
            got = results(case, *with_number(case, name, value, row, col), dtype, fused)
            for n, x in apart.items():
                changed[n] += int((x & (got[n] != wanted[n])).sum())
    return changed


def lost_by_mutant(folder, settings, case, name, value, spreads):
    """`spread`, or else `finite_by_mistake`, with the device side of the files in `folder`."""
    with device_side(folder):
        if spreads:
            return spread(case, name, (value,), 1, 2, settings=settings)
        return finite_by_mistake(case, name, value, 1, 2)


def confined_and_not(case, dtype):
    """Whether finite inputs give the same bits with kernels that keep NaN in its windows and with those that do not."""
    found = []
    for confine in (True, False):
        with confining(confine):
            found.append(results(case, *draw(case), dtype))
    return all(torch.equal(found[0][n], x) for n, x in found[1].items())


# ---- layouts -------------------------------------------------------------------------------------------------------


LAYOUTS = {
    "channels innermost": channels_innermost,
    "contiguous": torch.Tensor.contiguous,
    "every other column": sliced,
    "columns before rows": lambda x: x.transpose(-2, -1).contiguous().transpose(-2, -1),
    "stride 0": lambda x: x[:1].expand(x.shape),
}


def errors_of_layout(case, layout, device="cpu"):
    """Largest error of each result, relative to the largest value, with all three maps in a layout.

    In fp32, by the programs of half types.
    """
    inputs, direction = draw(case)
    inputs = cast(inputs, torch.float32, device)
    relaid = {n: LAYOUTS[layout](x) if n in NAMES[:3] and x is not None else x for n, x in inputs.items()}
    direction = LAYOUTS[layout](direction)
    exact = gradients(
        functools.partial(local_attention, **options(case, "reference")), cast(relaid, torch.float64), direction
    )
    with unwritten_memory_is_nan(), half_programs(), offsets_checked():
        got = gradients(functools.partial(local_attention, **options(case, "triton")), relaid, direction)
    return {n: ((got[n].cpu() - x).abs().max() / x.abs().max()).item() for n, x in exact.items()}


def errors_of_fused(case, innermost_channels, settings=None):
    """The same of a fused projection, and how many of its slices and of its gradient's the kernels had copied."""
    inputs, direction = draw(case)
    parts = [inputs[n] for n in NAMES[:3] if inputs[n] is not None]
    qkv = torch.stack(parts, 1).float()  # (B, P, N, D, H, W)
    if innermost_channels:
        qkv = qkv.permute(0, 4, 5, 1, 2, 3).contiguous().permute(0, 3, 4, 5, 1, 2)
    tables = {n: x.float() for n, x in inputs.items() if n in NAMES[3:]}
    copies, empty_inner = [], cuda._empty_inner

    def counted(x):
        copies.append(x)
        return empty_inner(x)

    function = functools.partial(local_attention_packed, **options(case, "triton"))
    with pytest.MonkeyPatch.context() as patch, tile_settings(settings or {}), half_programs(), offsets_checked():
        patch.setattr(cuda, "_empty_inner", counted)
        got = gradients(function, {"qkv": qkv} | tables, direction)
    names = [n for n in NAMES[:3] if inputs[n] is not None]
    got |= dict(zip(names, got.pop("qkv").unbind(1), strict=True))
    exact = expected(case)
    return {n: ((got[n] - x).abs().max() / x.abs().max()).item() for n, x in exact.items()}, len(copies) - 1


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
    arguments = (*leaves, case.size, case.border, case.scale, "triton")
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
