"""The C++ kernel: the definition in fp64 is its yardstick; every thread count gives the same bits."""

import ctypes
import itertools
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fresh_process import run_python
from sasa import kernels
from sasa.kernels import cpu, reference
from sasa.kernels.interface import AttentionOptions, CallKind, empty_like_map

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("out", "lse", "grad query", "grad key", "grad value", "grad rel_row", "grad rel_col")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
LAYOUTS = ("nchw", "channels_last", "fused", "strange", "heads_apart")

needs_kernel = pytest.mark.skipif(cpu.unusable() is not None, reason=f"no CPU kernel: {cpu.unusable()}")


def make_map(shape, layout, dtype):
    b, n, d, h, w = shape
    if layout == "channels_last":
        return torch.randn(b, h, w, n, d, dtype=dtype).permute(0, 3, 4, 1, 2)
    if layout == "heads_apart":  # channels side by side, but not those of neighbouring heads
        return torch.randn(b, h, w, n, 2 * d, dtype=dtype)[..., :d].permute(0, 3, 4, 1, 2)
    if layout == "strange":  # W outermost, every second element
        return torch.randn(w, n, b, d, 2 * h, dtype=dtype)[..., ::2].permute(2, 1, 3, 4, 0)
    return torch.randn(shape, dtype=dtype)


def make_inputs(shape, size, layout="nchw", dtype=torch.float32, embeddings=True, content=True):
    """grad_out, query, key, value, rel_row, rel_col."""
    b, n, d, h, w = shape
    if layout == "fused":
        query, key, value = torch.randn(b, 3, n, d, h, w, dtype=dtype).unbind(1)
    elif layout == "fused_channels_last":
        query, key, value = (x.permute(0, 3, 4, 1, 2) for x in torch.randn(b, h, w, 3, n, d, dtype=dtype).unbind(3))
    else:
        query, key, value = (make_map(shape, layout, dtype) for _ in range(3))
    rel = [torch.randn(n, d // 2, size, dtype=dtype) if embeddings else None for _ in range(2)]
    return [make_map(shape, layout, dtype), query, key if content else None, value, *rel]


def both_ways(module, inputs, size, border, scale):
    grad, *rest = inputs
    options = AttentionOptions(size, border, scale)
    out, lse = module.forward(*rest, options)
    return out, lse, *module.backward(grad, *rest, out, lse, options)


def check(inputs, size, border="mask", scale=0.7):
    dtype = inputs[0].dtype
    expected = both_ways(reference, [None if x is None else x.double() for x in inputs], size, border, scale)
    got = both_ways(cpu, inputs, size, border, scale)
    for name, a, b in zip(NAMES, got, expected, strict=True):
        if b is None:
            assert a is None, name
            continue
        if name != "lse":
            assert a.dtype == dtype, name
        error = (a.double() - b).abs().max() / b.abs().max().clamp_min(1.0)
        assert error <= TOLERANCE[dtype], f"{name}: {error:.2e} of the largest value"


# ---- values --------------------------------------------------------------------------------------------------------

MAPS = ((1, 1), (2, 2), (4, 4), (5, 3), (3, 11), (7, 7), (8, 8), (13, 9), (14, 14), (6, 33))


@needs_kernel
@pytest.mark.parametrize("border", kernels.BORDERS)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 13])
def test_matches_the_definition_on_every_map(size, border):
    for i, (height, width) in enumerate(MAPS):
        check(make_inputs((2, 8, (4, 6, 10)[i % 3], height, width), size, LAYOUTS[i % len(LAYOUTS)]), size, border)


@needs_kernel
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [1, 2, 3, 8, 16])
def test_matches_the_definition_for_every_layout(heads, layout):
    for dtype, (height, width) in itertools.product((torch.float64, torch.float32), ((7, 7), (5, 14), (9, 20))):
        check(make_inputs((3, heads, 8, height, width), 7, layout, dtype), 7)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("embeddings", "content"), [(True, True), (False, True), (True, False)])
def test_matches_the_definition_without_parts(dtype, embeddings, content):
    for border in kernels.BORDERS:
        check(make_inputs((2, 4, 4, 6, 9), 5, "nchw", dtype, embeddings, content), 5, border)


@needs_kernel
@pytest.mark.parametrize("width", [1, 3, 4, 8, 12, 16, 24, 32, 64])
def test_matches_the_definition_for_every_head_width(width):
    for layout in ("fused", "fused_channels_last"):
        check(make_inputs((2, 8, width, 6, 10), 7, layout, embeddings=width % 2 == 0), 7)


@needs_kernel
@pytest.mark.parametrize("size", [1, 2, 7, 13])
def test_the_log_of_the_sum_is_right_to_the_last_bits(size):
    """Equal logits: it is the logarithm of the number of keys in the map."""
    zero = torch.zeros(1, 1, 4, 15, 18)
    _, lse = cpu.forward(zero, zero, zero, None, None, AttentionOptions(size))
    y, x = ([min(n, i + size // 2 + 1) - max(0, i - (size - 1) // 2) for i in range(n)] for n in (15, 18))
    wanted = torch.tensor([[math.log(a * b) for b in x] for a in y], dtype=torch.float64)
    assert (lse[0, 0].double() - wanted).abs().max() <= 4e-7


@needs_kernel
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*(st.integers(1, top) for top in (3, 9, 5, 17, 19))),
    size=st.integers(1, 13),
    border=st.sampled_from(kernels.BORDERS),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from((torch.float64, torch.float32)),
    parts=st.sampled_from(((True, True), (False, True), (True, False))),
)
def test_matches_the_definition_anywhere(shape, size, border, layout, dtype, parts):
    b, n, half, h, w = shape
    check(make_inputs((b, n, 2 * half, h, w), size, layout, dtype, *parts), size, border)


@needs_kernel
@pytest.mark.slow
@pytest.mark.parametrize("border", kernels.BORDERS)
@pytest.mark.parametrize("size", range(1, 14))
def test_matches_the_definition_exhaustively(size, border):
    maps = [*MAPS, (17, 28), (9, 56), (32, 32)]
    for (height, width), heads, depth, layout in itertools.product(maps, (1, 6, 8), (2, 8, 16), LAYOUTS):
        check(make_inputs((2, heads, depth, height, width), size, layout), size, border)


@needs_kernel
def test_a_large_map_is_cut_to_a_modest_scratch():
    check(make_inputs((1, 8, 2, 10, 700), 7), 7)


@needs_kernel
def test_gradcheck_and_opcheck():
    _, *inputs = make_inputs((2, 2, 4, 4, 5), 3, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in inputs]
    for border in kernels.BORDERS:
        call = (3, border, 0.5, "cpu")
        assert torch.autograd.gradcheck(lambda *x, c=call: torch.ops.sasa.local_attention(*x, *c)[0], inputs)
        torch.library.opcheck(torch.ops.sasa.local_attention.default, (*inputs, *call))


@needs_kernel
def test_large_logits():
    """+-1e4, exact in fp32: softmax and gradients as good as the definition's own fp32."""
    for size in (3, 7):
        grad, query, key, value, row, col = make_inputs((2, 8, 4, 6, 9), size)
        query = torch.zeros_like(query)
        query[:, :, 0], query[:, :, 1] = torch.randint(-1, 2, query[:, :, 0].shape) * 100.0, 1.0
        key = torch.randint(-1, 2, key.shape).float()
        key[:, :, 0] = 100.0
        inputs = [grad, query, key, value, row * 0.01, col * 0]
        expected = both_ways(reference, [x.double() for x in inputs], size, "mask", 1.0)
        assert expected[1].abs().max() > 9e3
        for name, a, b in zip(NAMES, both_ways(cpu, inputs, size, "mask", 1.0), expected, strict=True):
            assert (a - b).abs().max() <= 1e-3 * b.abs().max(), name


@needs_kernel
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan"), 1e30])
@pytest.mark.parametrize("border", kernels.BORDERS)
def test_infinities_and_nans_are_the_definition_s(border, bad):
    for i, which in itertools.product(range(8), range(6)):
        size, heads, (height, width) = (1, 3, 4, 7)[i % 4], (1, 8)[i % 2], ((1, 3), (7, 9), (4, 17))[i % 3]
        inputs = make_inputs((2, heads, 4, height, width), size, content=i != 5 or which == 2)
        place = tuple(int(torch.randint(0, n, ())) for n in inputs[which].shape) if inputs[which] is not None else None
        if place is None:
            continue
        inputs[which][place] = bad
        expected = both_ways(reference, inputs, size, border, 0.5)
        for name, a, b in zip(NAMES, both_ways(cpu, inputs, size, border, 0.5), expected, strict=True):
            if b is None:
                continue
            for test in (torch.isnan, torch.isposinf, torch.isneginf):
                assert torch.equal(test(a), test(b)), (name, which, size)


@needs_kernel
def test_writes_in_the_layout_promised_and_into_given_tensors():
    for layout in LAYOUTS:
        grad, *inputs = make_inputs((2, 8, 4, 7, 9), 5, layout)
        out, lse = cpu.forward(*inputs, AttentionOptions(5))
        assert out.stride() == empty_like_map(inputs[0]).stride()
        expected = cpu.backward(grad, *inputs, out, lse, AttentionOptions(5))
        for given_layout in LAYOUTS:
            into = [make_map((2, 8, 4, 7, 9), given_layout, torch.float32).fill_(float("nan")) for _ in range(3)]
            got = cpu.backward(grad, *inputs, out, lse, AttentionOptions(5), into=tuple(into))
            assert all(a is b for a, b in zip(got, into, strict=False))
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    expanded = torch.ones((), dtype=torch.float32).expand(2, 8, 4, 7, 9)
    got = cpu.backward(expanded, *inputs, out, lse, AttentionOptions(5))
    dense = cpu.backward(expanded.contiguous(), *inputs, out, lse, AttentionOptions(5))
    assert all(torch.equal(a, b) for a, b in zip(got, dense, strict=True))


@needs_kernel
@pytest.mark.parametrize("name", ["AttentionCall", "StemCall"])
def test_a_library_of_another_interface_is_refused(name, monkeypatch):
    """The C++ side compares the size of the record: fields that were added on one side alone are an error, no crash."""
    wider = type(name, (getattr(cpu, name),), {"_fields_": [("added", ctypes.c_int64)]})
    monkeypatch.setattr(cpu, name, wider)
    x = torch.randn(1, 3, 4, 5, 5)
    with pytest.raises(RuntimeError, match="interface"):
        if name == "AttentionCall":
            cpu.forward(x, x, x, None, None, AttentionOptions(3))
        else:
            weights = torch.randn(2, 3, 3), torch.randn(16, 1), torch.randn(1, 4, 3)
            cpu.stem_forward(weights, x[0].transpose(0, 1), "block", "mask", torch.empty(4, 4, 5, 5))


@needs_kernel
def test_says_what_it_does_not_take():
    x = torch.randn(1, 2, 4, 5, 5)
    assert cpu.unsupported(CallKind.of(x, 13)) is None
    assert "14" in cpu.unsupported(CallKind.of(x, 14))
    assert "meta" in cpu.unsupported(CallKind.of(x.to("meta"), 7))
    assert "int" in cpu.unsupported(CallKind.of(x.int(), 7))
    assert kernels.choose_backend(x, 7) == "cpu"
    assert kernels.choose_backend(x, 14) != "cpu"
    empty = x[:0]
    out, lse = cpu.forward(empty, empty, empty, None, None, AttentionOptions(3))
    assert out.shape == empty.shape
    assert lse.shape == (0, 2, 5, 5)
    assert cpu.backward(empty, empty, empty, empty, None, None, out, lse, AttentionOptions(3))[1].shape == empty.shape


# ---- threads -------------------------------------------------------------------------------------------------------


@needs_kernel
@pytest.mark.parametrize("shape", [(3, 8, 8, 12, 14), (1, 2, 4, 40, 9), (2, 3, 6, 7, 7)])
def test_every_thread_count_gives_the_same_bits(shape):
    inputs = make_inputs(shape, 7)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 4, 7):
            torch.set_num_threads(threads)
            results.append(both_ways(cpu, inputs, 7, "mask", 1.0))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@needs_kernel
def test_scratch_that_is_kept_carries_nothing_over():
    """Calls of one layout and of several, after infinities and NaNs, give the first call's bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for dtype, border in itertools.product((torch.float32, torch.float64), kernels.BORDERS):
            cases = [make_inputs((2, 8, 4, h, w), 5, dtype=dtype) for h, w in ((3, 7), (3, 7), (9, 6), (1, 1))]
            first = [both_ways(cpu, x, 5, border, 0.5) for x in cases]
            for bad in (float("inf"), float("nan")):
                broken = [torch.full_like(x, bad) for x in cases[0]]
                for case, expected in zip(cases, first, strict=True):
                    both_ways(cpu, broken, 5, border, 0.5)
                    for got in (both_ways(cpu, case, 5, border, 0.5) for _ in range(2)):
                        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    finally:
        torch.set_num_threads(before)


@needs_kernel
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_uses_torch_s_threads_and_no_second_runtime():
    code = """
from sasa.kernels import cpu
from sasa.kernels.interface import AttentionOptions
assert cpu.unusable() is None and cpu._parallel_region() != 0
x = torch.randn(4, 8, 8, 16, 16)
threads = lambda: len(os.listdir("/proc/self/task"))
torch.set_num_threads(3)
torch.randn(2000000).exp_()
before = threads()
for _ in range(5):
    cpu.forward(x, x, x, None, None, AttentionOptions(7))
assert threads() == before, (before, threads())
libraries = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line and "/" in line}
assert len([p for p in libraries if os.path.basename(p).startswith(("libgomp", "libomp", "libiomp"))]) == 1, libraries
"""
    assert run_python(code).returncode == 0


@needs_kernel
def test_a_forked_child_does_not_hang():
    code = """
from sasa.kernels import cpu
from sasa.kernels.interface import AttentionOptions
torch.set_num_threads(4)
x = torch.randn(1, 8, 8, 16, 16)  # too small for torch's own functions to be parallel: those do hang in such a child
expected = cpu.forward(x, x, x, None, None, AttentionOptions(7))[0]  # the parent's pool of threads exists
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(cpu.forward(x, x, x, None, None, AttentionOptions(7))[0], expected) else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        return cpu.forward(x, x, x, None, None, AttentionOptions(7))[0]
for batch in torch.utils.data.DataLoader(Images(), num_workers=2):
    assert torch.equal(batch[0], expected)
"""
    assert run_python(code, timeout=60).returncode == 0


def attend(weight, rel_row, rel_col, x):
    q, k, v = torch.nn.functional.conv2d(x, weight).unflatten(1, (3, 2, 4)).unbind(1)
    return kernels.local_attention(q, k, v, rel_row, rel_col, kernel_size=3, backend="cpu").square().mean()


# ---- memory --------------------------------------------------------------------------------------------------------


@needs_kernel
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_keeps_nothing_of_the_windows_size():
    """Peak memory of forward and backward grows by a few maps; K * K copies of one would be 196 MiB."""
    code = """
import resource
from sasa.kernels import cpu
from sasa.kernels.interface import AttentionOptions
shape = (2, 8, 16, 64, 64)
inputs = [torch.randn(shape) for _ in range(4)]
rel = [torch.randn(8, 8, 7) for _ in range(2)]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
cpu.unusable()
small = [x[:, :, :, :8, :8] for x in inputs]
out, lse = cpu.forward(*small[:3], *rel, AttentionOptions(7))
cpu.backward(small[3], *small[:3], *rel, out, lse, AttentionOptions(7))
before = peak()
out, lse = cpu.forward(*inputs[:3], *rel, AttentionOptions(7))
cpu.backward(inputs[3], *inputs[:3], *rel, out, lse, AttentionOptions(7))
print(peak() - before)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    map_mib = 2 * 8 * 16 * 64 * 64 * 4 / 2**20
    assert float(done.stdout) < 4 * map_mib + 2 * 12 + 4  # out and three gradients; two threads' scratch; slack


# ---- the whole file with other flags, and a cheap answer ------------------------------------------------------------


@needs_kernel
@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="flags of x86-64")
@pytest.mark.parametrize("flags", ["-mno-avx512f", "-march=x86-64"])
def test_narrower_instruction_sets(flags, tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", __file__]
    command += ["-k", "definition or logits or bits or layout or gradcheck"]
    env = {**os.environ, "SASA_CXXFLAGS": flags, "SASA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@needs_kernel
def test_asking_again_is_cheap():
    cpu.unusable()
    start = time.perf_counter()
    for _ in range(1000):
        cpu.unusable()
    assert time.perf_counter() - start < 0.1
