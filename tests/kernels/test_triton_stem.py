"""The stem's Triton kernel without a GPU: numbers by the interpreter, builds by the compiler; and on a GPU."""

from pathlib import Path

import pytest
import torch

import stem_cases
from sasa.kernels import dispatch, stem_operator, triton_backend, triton_builds, triton_stem
from triton_cases import needs_compiler, needs_triton, refused

DOCS = Path(triton_stem.__file__).parents[2] / "docs" / "kernels.md"
needs_builds = pytest.mark.skipif(
    refused is not None, reason=f"{refused}; registers, stack and atomics of the stem's builds are not checked here"
)


# (B, H, W) and the options of AttentionStem: ragged blocks, one pixel, larger windows, more units than lanes
SMALL = {"out_channels": 6, "num_heads": 2}
CASES = [
    ((2, 8, 8), SMALL),
    ((1, 5, 6), SMALL | {"border": "zero"}),
    ((1, 1, 1), SMALL),
    ((1, 10, 26), {"out_channels": 3, "num_heads": 1, "block_size": 2, "num_mixtures": 1}),
    ((1, 7, 5), {"out_channels": 20, "num_heads": 1, "block_size": 5, "values": "plain"}),
    ((1, 6, 7), SMALL | {"window": "sliding", "block_size": 3, "num_mixtures": 3}),
    ((2, 3, 5), SMALL | {"window": "sliding", "border": "zero"}),
    ((1, 3, 4), SMALL | {"window": "sliding", "num_mixtures": 16}),
    ((1, 4, 3), {"out_channels": 2, "num_heads": 2, "window": "sliding", "block_size": 1}),
]


def label(c):
    shape, options = c
    return "x".join(map(str, shape)) + "".join(f"-{value}" for value in options.values())


@needs_triton
@pytest.mark.parametrize("c", CASES, ids=label)
def test_matches_the_reference(c, interpreter):
    found = interpreter(stem_cases.errors, *c)
    assert max(found.values()) <= 1e-5, found


@needs_triton
@pytest.mark.parametrize("window", ["block", "sliding"])
def test_channels_last(window, interpreter):
    found = interpreter(stem_cases.errors, (1, 5, 7), SMALL | {"window": window}, "cpu", True)
    assert max(found.values()) <= 1e-5, found


@needs_triton
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("shape", "border"), [((2, 9, 6), "mask"), ((1, 6, 13), "zero")])
def test_pooling_inside_is_the_layers_one_by_one(shape, border, training, interpreter):
    found = interpreter(stem_cases.errors_pooled, shape, {"border": border}, training)
    assert max(found.values()) <= 1e-4, found


@needs_triton
def test_pooling_inside_under_autocast(interpreter):
    """fp32 inside, rounded once at the end."""
    found = interpreter(stem_cases.errors_pooled, (1, 8, 8), {}, True, "cpu", torch.bfloat16)
    assert found["out"] <= 2**-8 and max(found.values()) <= 2**-6, found


@needs_triton
@pytest.mark.parametrize("window", ["block", "sliding"])
def test_calls_repeat_bit_for_bit(window, interpreter):
    assert interpreter(stem_cases.repeats_bit_for_bit, window)


@needs_triton
@pytest.mark.parametrize(("pooled", "image_gradient"), [(False, True), (True, False)])
def test_opcheck(pooled, image_gradient, interpreter):
    interpreter(stem_cases.opcheck, pooled, image_gradient)


@needs_triton
def test_a_nan_stays_in_the_windows_that_hold_it(interpreter):
    for window, rows, cols in (("block", slice(4, 8), slice(4, 8)), ("sliding", slice(3, 7), slice(4, 8))):
        changed, here = interpreter(stem_cases.spread_of_a_nan, window)
        wanted = torch.zeros(8, 12, dtype=torch.bool)
        wanted[rows, cols] = True
        assert here and torch.equal(changed, wanted), window


@needs_triton
def test_the_interpreter_serves_by_name_only(interpreter):
    auto, named = interpreter(stem_cases.kernels_chosen)
    assert auto != "triton" and named == "triton"


def test_the_choice_on_a_gpu(monkeypatch):
    """On a CUDA machine; nothing here touches one."""
    monkeypatch.setattr(triton_backend, "unusable", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    dispatch.forget()

    def chosen(backend="auto", dtype=torch.float32, side=4):
        return stem_operator.kernel_for("cuda", dtype, 3, backend, side, 4, 16)

    assert chosen() == chosen("triton") == chosen(dtype=torch.bfloat16) == "triton"
    assert chosen("tiled") is chosen("cpu") is chosen(dtype=torch.float64) is chosen(side=9) is None
    dispatch.forget()


def test_what_it_does_not_take_is_named():
    taken = (3, 4, 4, 16, torch.float32)
    assert triton_stem.unsupported(*taken) is None
    for at, value, named in ((0, 4, "3 channels"), (1, 9, "up to 8"), (2, 17, "16 mixtures"), (3, 65, "width of 64")):
        assert named in triton_stem.unsupported(*taken[:at], value, *taken[at + 1 :])
    assert "fp32" in triton_stem.unsupported(*taken[:4], torch.float64)
    assert "shared memory" in triton_stem.unsupported(3, 6, 11, 33, torch.float32)
    for sizes in ((5, 16, 64), (8, 10, 64), (8, 16, 32)):
        assert triton_stem.unsupported(3, *sizes, torch.float32) is None


def test_sizes_beyond_32_bits_are_named():
    x = torch.empty((1, 3, 24, 24), device="meta").expand(1, 3, 24, 24)
    assert triton_stem.exceeded(x.shape, x.stride()) is None
    assert "it takes up to 2147483647" in triton_stem.exceeded((1, 64, 5793, 5793), (0, 5793**2, 5793, 1))
    assert triton_stem.exceeded((9999, 64, 5792, 5792), (64 * 5792**2, 5792**2, 5792, 1)) is None


@needs_builds
@needs_compiler
@pytest.mark.parametrize("form", ["pooled", pytest.param("block", marks=pytest.mark.slow), "sliding"])
@pytest.mark.parametrize("stage", ["forward", "backward"])
def test_builds_keep_to_registers_without_atomics(stage, form):
    """Triton 3.3 and 3.6 spill 104 and 96 bytes in backward; with four warps none, for 6% more instructions and up."""
    got = triton_builds.compile_stem(stage, form)
    assert got.registers <= 255 and got.stack <= 128 and got.shared <= 48 * 1024 and got.atomics == 0, got


# ---- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("images", "size", "small"), [(64, 224, False), (256, 32, True)])
def test_a_step_moves_at_most_one_and_a_half_times_the_bytes_of_the_convolution_stem(images, size, small, monkeypatch):
    """Inputs and outputs of every operator of the stem, forward and backward in fp32, counted on the meta device."""
    convolution = stem_cases.bytes_moved(images, size, small, attention=False)
    assert 5e8 < convolution < 1e10
    monkeypatch.setattr(stem_operator, "kernel_for", lambda *_: "triton")
    fused = stem_cases.bytes_moved(images, size, small, attention=True)
    assert fused <= 1.5 * convolution
    monkeypatch.setattr(stem_operator, "kernel_for", lambda *_: None)
    plain = stem_cases.bytes_moved(images, size, small, attention=True)
    assert plain > 5 * convolution
    form = "small images" if small else "ImageNet form"
    (row,) = [x for x in DOCS.read_text(encoding="utf-8").splitlines() if f"{images} images of {size}, {form}" in x]
    shown = [float(cell) * 1e9 for cell in row.strip("| ").split("|")[1:]]
    assert shown == pytest.approx([convolution, fused, plain], rel=0.1)  # operators differ by version of torch


# ---- GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("c", CASES, ids=label)
def test_on_the_gpu_it_matches_the_reference(c):
    found = stem_cases.errors(*c, "cuda")
    assert max(found.values()) <= 1e-5, found


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_on_the_gpu_pooling_inside_is_the_layers_one_by_one(dtype):
    found = stem_cases.errors_pooled((2, 33, 70), {}, True, "cuda", dtype)
    assert max(found.values()) <= (1e-4 if dtype is None else 2**-6), found


@pytest.mark.gpu
@needs_triton
def test_on_the_gpu_calls_repeat_bit_for_bit():
    assert stem_cases.repeats_bit_for_bit("block", "cuda") and stem_cases.repeats_bit_for_bit("sliding", "cuda")
