"""What --compile keeps and refuses, and that local attention can be captured by a CUDA graph; nothing is compiled."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import triton_cases
from config import ConfigError, resolve
from device_log import META, DeviceLog
from sasa.kernels import triton_backend, triton_stem
from sasa.kernels.interface import AttentionOptions
from sasa.kernels.triton_tiles import STAGES
from sasa.training.compiling import CACHE, check_accumulation, keep_builds
from sasa.training.device import decoding_processes

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_graphs_do_not_go_with_several_batches_a_step(mode):
    config = resolve({"compile": True, "compile_mode": mode}, "DIGITS")
    with pytest.raises(ConfigError, match=f"--compile-mode {mode}: a step is 2 batches"):
        check_accumulation(config, 2, CUDA)
    check_accumulation(config, 1, CUDA)
    check_accumulation(config, 2, CPU)
    check_accumulation(replace(config, compile_mode="default"), 2, CUDA)
    check_accumulation(replace(config, compile=False), 2, CUDA)


def test_builds_are_kept_in_the_users_cache_or_where_torch_is_told(monkeypatch, tmp_path):
    monkeypatch.delenv(CACHE, raising=False)
    monkeypatch.setenv("SASA_CACHE_DIR", str(tmp_path / "ours"))
    assert keep_builds() == os.environ[CACHE] == str(tmp_path / "ours" / "inductor")
    assert (tmp_path / "ours" / "inductor").stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv(CACHE, str(tmp_path / "theirs"))
    assert keep_builds() == str(tmp_path / "theirs") and not (tmp_path / "theirs").exists()


def test_a_folder_that_others_can_write_is_not_taken(monkeypatch, tmp_path):
    monkeypatch.delenv(CACHE, raising=False)
    monkeypatch.setenv("SASA_CACHE_DIR", str(tmp_path / "open"))
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    assert "torch's own" in keep_builds() and CACHE not in os.environ


@pytest.mark.parametrize(("cpus", "ranks", "wanted"), [(1, 1, 1), (8, 1, 7), (16, 2, 7), (64, 8, 7), (200, 1, 32)])
def test_as_many_decoding_processes_as_the_cpus_allow(monkeypatch, cpus, ranks, wanted):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert decoding_processes(None, CUDA) == wanted
    assert decoding_processes(None, CPU) == min(cpus, 4) and decoding_processes(0, CUDA) == 0


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function._schema.name)
        return function(*args, **(kwargs or {}))


def test_a_call_can_be_captured_by_a_cuda_graph(monkeypatch):
    """Around its kernels a call allocates by torch, whose pool a capture redirects, and reads nothing of the device."""
    launched = []
    monkeypatch.setattr(triton_backend, "_launch", lambda stage, *_: launched.append(stage))
    inputs, direction = triton_cases.draw((2, 2, 8, 7, 9, 9, "mask", True, True, 1.0))
    inputs, direction = [x.float() for x in inputs.values()], direction.float()
    with Names() as names:
        out, lse = triton_backend.forward(*inputs, AttentionOptions(7))
        triton_backend.backward(direction, *inputs, out, lse, AttentionOptions(7))
    assert launched == ["forward", "query", "key"]
    allowed = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "permute", "view", "sum",
               "split", "split_with_sizes", "chunk", "detach", "alias"}  # fmt: skip
    assert {name.removeprefix("aten::") for name in names.seen} <= allowed
    for name in ("local_attention", "local_attention_packed", "stem_attention"):
        for operator in (name, f"{name}_backward"):
            tags = getattr(torch.ops.sasa, operator).default.tags
            assert getattr(torch.Tag, "cudagraph_unsafe", None) not in tags


class Kernel:
    """In place of a Triton kernel: notes the options of its launches."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append(options)


@pytest.mark.parametrize("form", ["pooled", "block", "sliding"])
def test_a_call_of_the_stem_can_be_captured_too(form, monkeypatch):
    kernels = SimpleNamespace(stem_forward_kernel=Kernel(), stem_backward_kernel=Kernel())
    monkeypatch.setattr(triton_stem, "_kernels", lambda: kernels)
    monkeypatch.setattr(triton_backend, "interpreted", lambda: False)
    x, out = torch.empty(2, 3, 10, 9, device=META), torch.empty(2, 8, 10, 9, device=META)
    weights = [torch.empty(shape, device=META) for shape in ((2, 3, 3), (16, 4), (4, 8, 3))]
    window, chosen, slopes = form, {}, {}
    if form == "pooled":
        window, out, index = "block", torch.empty(2, 8, 3, 3, device=META), torch.empty(2, 8, 3, 3, device=META)
        chosen = {"index": index, "signs": torch.empty(8, device=META)}
        slopes = {"index": index, "slopes": torch.empty(2, 8, device=META)}
    with DeviceLog() as log:
        moments = triton_stem.forward(weights, x, window, "mask", out, **chosen)
        grads = triton_stem.backward(weights, x, window, "mask", out, torch.empty_like(x), **slopes)
    assert (moments is not None) == (form == "pooled") and [y.shape for y in grads] == [w.shape for w in weights]
    assert log.waits == [] and not log.copies and log.kernels
    launches = kernels.stem_forward_kernel.launches + kernels.stem_backward_kernel.launches
    assert len(launches) == 2 and all(options["enable_fp_fusion"] for options in launches)


def test_products_and_sums_are_fused_whatever_the_versions_default(monkeypatch):
    kernels = {stage: Kernel() for stage in STAGES}
    monkeypatch.setattr(triton_backend, "_kernels", lambda: kernels)
    monkeypatch.setattr(triton_backend, "interpreted", lambda: False)
    maps, tables = [torch.empty(1, 2, 8, 5, 5)] * 3, [torch.empty(2, 4, 3)] * 2
    out, lse = triton_backend.forward(*maps, *tables, AttentionOptions(3))
    triton_backend.backward(out, *maps, *tables, out, lse, AttentionOptions(3))
    for stage, kernel in kernels.items():
        (options,) = kernel.launches
        assert options["enable_fp_fusion"] is True and options["num_stages"] == 1, stage
