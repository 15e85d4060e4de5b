"""Backend "triton" as an operator and as a choice: torch.compile, opcheck, autocast, what serves a call and why.

The interpreter runs in a process of its own (tests/triton_cases.py). What the kernels compute is in
test_triton_numbers.py, their builds are in test_triton_builds.py.
"""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

import triton_cases
from sasa import kernels
from sasa.kernels import dispatch
from sasa.kernels import triton_backend as cuda
from sasa.kernels import triton_tiles as tiles
from sasa.kernels.interface import AttentionOptions, CallKind
from triton_cases import DTYPES, case, needs_compiler, needs_triton, refused

# ---- the operator --------------------------------------------------------------------------------------------------

SMALL = case(2, 8, 3, 3, 5, batch=2)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_calls_repeat_bit_for_bit(dtype, interpreter):
    assert interpreter(triton_cases.repeats_bit_for_bit, case(1, 8, 3, 3, 9), DTYPES[dtype])


@needs_triton
def test_it_compiles_without_a_graph_break(interpreter):
    assert interpreter(triton_cases.compiles_without_a_break, SMALL) == 0


@needs_triton
@pytest.mark.parametrize(("content", "embeddings"), [(True, True), (False, True), (True, False)])
def test_opcheck(content, embeddings, interpreter):
    interpreter(triton_cases.opcheck, case(1, 4, 3, 3, 4, content=content, embeddings=embeddings))


@needs_triton
def test_autocast(interpreter):
    assert interpreter(triton_cases.autocast_equals_narrow_inputs, SMALL, torch.bfloat16)


@needs_triton
def test_an_empty_batch(interpreter):
    assert interpreter(triton_cases.empty_batch, SMALL)


# ---- the choice ----------------------------------------------------------------------------------------------------


@needs_triton
def test_the_interpreter_serves_by_name_only(interpreter):
    assert interpreter(triton_cases.chosen, (1, 1, 2, 3, 3), 3) != "triton"
    assert interpreter(triton_cases.chosen, (1, 1, 2, 3, 3), 3, "triton") == "triton"


@needs_triton
def test_what_it_does_not_take_is_named(interpreter):
    assert "14" in interpreter(triton_cases.refusal, (1, 1, 2, 3, 3), 14, torch.float32)
    assert "65" in interpreter(triton_cases.refusal, (1, 1, 65, 3, 3), 3, torch.float32)
    assert "float64" in interpreter(triton_cases.refusal, (1, 1, 2, 3, 3), 3, torch.float64)
    assert interpreter(triton_cases.refusal, (1, 1, 64, 3, 3), 13, torch.float32) is None


@needs_compiler
def test_cpu_tensors_are_refused_without_the_interpreter():
    assert "cuda" in cuda.unsupported(CallKind(torch.device("cpu"), torch.float32, 2, 3))


@needs_compiler
def test_the_next_best_backend_serves_what_it_refuses(monkeypatch):
    """On a CUDA machine; the tensors here only say that they are on one."""
    monkeypatch.setattr(cuda, "unusable", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))

    def on_gpu(width, dtype=torch.bfloat16):
        return SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=torch.Size((1, 1, width, 3, 3)))

    assert kernels.choose_backend(on_gpu(64), 13) == "triton"
    assert kernels.choose_backend(on_gpu(65), 13) == "tiled"
    assert kernels.choose_backend(on_gpu(64), 14) == "tiled"
    assert kernels.choose_backend(on_gpu(64, torch.float64), 13) == "tiled"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    dispatch.forget()
    assert kernels.choose_backend(on_gpu(64), 13) == "tiled"


def test_a_launch_keeps_nan_in_its_windows_where_the_table_says_so(monkeypatch):
    """By the kernel, the call and the target: asked of the table's row."""
    asked = []
    monkeypatch.setattr(tiles, "confines", lambda *question: asked.append(question) or True)
    call = ("key", tiles.Problem(8, 8, 14, 28, 7), torch.bfloat16)
    assert cuda._confines(*call, "3.8 90") and asked == [("key", "K7 d16 map56 half", "3.8 90")]
    assert cuda._confines(*call, None) and len(asked) == 1
    for stage, side, row in (("forward", 7, "map56"), ("query", 7, "map56"), ("key", 7, "map8"), ("key", 4, "map4")):
        assert cuda._confines(stage, tiles.Problem(8, 8, side, side, 7, mask=False), torch.bfloat16, "3.8 90")
        assert asked[-1] == (stage, f"K7 d16 {row} half", "3.8 90")
    asked.clear()
    for stage in ("forward", "query"):  # counted with patches that the border clamps
        assert not cuda._confines(stage, tiles.Problem(8, 8, 4, 4, 7, mask=False), torch.bfloat16, "3.8 90")
    assert not asked


def test_a_launch_takes_the_tile_of_its_target(monkeypatch):
    """Each kernel, and the room for the embeddings' gradients, which is of the query kernel's tile."""
    asked = []

    class Asked(Exception):
        pass

    def tile_of(*question):
        asked.append(question)
        raise Asked

    monkeypatch.setattr(tiles, "tile_of", tile_of)
    monkeypatch.setattr(cuda, "_target", lambda query: "3.8 120")
    x = torch.zeros(1, 4, 5, 2, 16).permute(0, 3, 4, 1, 2)
    table, lse = torch.zeros(2, 8, 3), torch.zeros(1, 2, 4, 5)
    for stage in tiles.STAGES:
        with pytest.raises(Asked):
            cuda._launch(stage, tiles.Problem(2, 16, 4, 5, 3), x, (), (), ())
    with pytest.raises(Asked):
        cuda.backward(x, x, x, x, table, table, x, lse, AttentionOptions(3, "mask", 1.0))
    assert [(question[0], question[3]) for question in asked] == [(s, "3.8 120") for s in (*tiles.STAGES, "query")]


def test_a_target_has_a_tile_of_its_own_where_the_table_says_so(monkeypatch):
    entry = {"tile": [2, 8, 8, 1, 0], "instead": {"3.8 80": [2, 8, 4, 1, 0]}}
    monkeypatch.setattr(tiles, "table", lambda: {"K7 d16 map56 half": {"key": entry}})
    call = ("key", tiles.Problem(8, 16, 28, 28, 7), torch.bfloat16)
    assert tiles.tile_of(*call) == tiles.tile_of(*call, "3.8 90") == tiles.tile_of(*call, None) == (2, 8, 8, 1, 0)
    assert tiles.tile_of(*call, "3.8 80") == (2, 8, 4, 1, 0)


def test_the_interpreter_has_no_target_and_a_gpu_its_version_and_capability(monkeypatch):
    monkeypatch.setattr(cuda, "_version", lambda: "3.9")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (12, 0))
    assert cuda._target(torch.zeros(1)) is None
    assert cuda._target(SimpleNamespace(device=torch.device("cuda"))) == "3.9 120"


@needs_compiler
def test_without_triton_or_a_gpu_there_is_a_reason(monkeypatch):
    if not torch.cuda.is_available() and refused is None:
        assert cuda.unusable() == "no CUDA device"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "triton is not installed" in cuda.unusable()


@pytest.mark.parametrize("lacks", ["compiler", "headers", None])
def test_without_what_builds_a_launcher_there_is_a_reason(lacks, monkeypatch, tmp_path):
    """As in images with the CUDA runtime alone: Triton itself would raise at the first launch."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    tools, headers = tmp_path / "bin", tmp_path / "include"
    tools.mkdir(), headers.mkdir()
    if lacks != "compiler":
        (tools / "gcc").touch(0o755)
    if lacks != "headers":
        (headers / "Python.h").touch()
    for name in ("CC", "CPATH", "C_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setattr(cuda.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path / "none")})
    monkeypatch.setenv("CPATH", f"/nowhere:{headers}")
    found = cuda._cuda_missing.__wrapped__()
    wanted = {"compiler": "install gcc or clang, or name one by CC", "headers": "install python3-dev", None: ""}[lacks]
    assert found is None if lacks is None else wanted in found
    monkeypatch.setenv("CC", "/opt/cc")
    assert (cuda._cuda_missing.__wrapped__() is None) == (lacks != "headers")


@pytest.mark.parametrize("version", ["3.2.0", "2.3.1"])
def test_a_triton_without_gather_is_refused(version, monkeypatch, tmp_path):
    """Neither compiled nor interpreted, with a reason of one line, and before it is imported."""
    file = tmp_path / "__init__.py"
    file.write_text(f'"""isort:skip_file"""\n__version__ = \'{version}\'\n')
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(file)))
    for interpreted in (False, True):
        monkeypatch.setattr(cuda, "interpreted", lambda interpreted=interpreted: interpreted)
        assert cuda.unusable() == f"triton {version[:3]} is installed, it needs 3.3 or newer"
    with pytest.raises(ValueError, match=r"triton [23]\.[23] is installed"):
        kernels.local_attention(*[torch.zeros(1, 1, 2, 3, 3)] * 3, None, None, kernel_size=3, backend="triton")


def test_a_newer_triton_is_not_refused(monkeypatch, tmp_path):
    file = tmp_path / "__init__.py"
    file.write_text("__version__ = '3.10.0'\n")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(file)))
    assert cuda.cannot_compile() is None


def test_triton_is_imported_by_the_first_call_only(interpreter):
    assert not interpreter(triton_cases.triton_was_imported_early)


# ---- GPU -----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_triton
def test_on_the_gpu_calls_repeat_bit_for_bit_and_compile():
    assert triton_cases.repeats_bit_for_bit(case(8, 16, 7, 28, 28, batch=4), torch.bfloat16, "cuda")
    assert triton_cases.compiles_without_a_break(SMALL, "cuda") == 0
    triton_cases.opcheck(SMALL, "cuda")


@pytest.mark.gpu
@needs_triton
def test_on_the_gpu_a_call_is_captured_by_a_cuda_graph():
    inputs, direction = triton_cases.draw(case(8, 16, 7, 28, 28, batch=4))
    inputs = triton_cases.cast(inputs, torch.bfloat16, "cuda")
    leaves = [x.requires_grad_() for x in inputs.values()]
    direction = direction.to(leaves[0])

    def run():
        out = kernels.local_attention(*leaves, kernel_size=7, backend="triton")
        return out, *torch.autograd.grad(out, leaves, direction)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # for the inputs
    with torch.cuda.stream(side):
        wanted = run()  # builds the kernels
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))
