"""tools.gpu as processes: a stage's own, the GPU that it gets, how it is ended, and the files that are there then."""

import json
import math
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch._utils import _get_device_index

from tools.gpu import __main__ as gpu
from tools.gpu.stage import Lab
from tools.gpu.timer import StubTimer

CPU = torch.device("cpu")


def test_the_chosen_gpu_is_the_first_one_of_what_a_stage_starts(monkeypatch):
    monkeypatch.setattr(gpu.torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [gpu.chosen_first(name) for name in ("cuda", "cuda:0", "cuda:2")] == ["0,1,2,3", "0,1,2,3", "2,0,1,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,5")
    assert gpu.chosen_first("cuda:1") == "5,GPU-a"


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_stages_own_process_finds_its_gpu(monkeypatch, tmp_path, name):
    """PyTorch's set_device refuses a device without a number."""
    chosen = []
    monkeypatch.setattr(gpu.torch.cuda, "set_device", lambda device: chosen.append(_get_device_index(device)))
    monkeypatch.setattr(gpu.torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=1))
    monkeypatch.setattr(gpu, "CudaTimer", lambda cache_bytes: cache_bytes)
    assert gpu.make_lab(torch.device(name), False).device == torch.device(name)
    assert chosen == [0] * (name == "cuda:0")
    command = gpu.stage_command("times", tmp_path / "r.json", 9.5, ["--again"])
    _, args = gpu.parse(command[3:])
    assert command[:3] == [sys.executable, "-m", "tools.gpu"] and args.here and args.again
    assert (args.device, args.stages, args.results, args.seconds) == ("cuda:0", ["times"], tmp_path / "r.json", 9.5)


def test_a_stage_that_hangs_is_ended_with_what_it_started(tmp_path):
    mark = tmp_path / "late"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    start = time.monotonic()
    assert gpu.run_group([sys.executable, "-c", code], 1.5) is None
    assert time.monotonic() - start < 30
    time.sleep(3)
    assert not mark.exists()
    assert gpu.run_group([sys.executable, "-c", "raise SystemExit(7)"], 60) == 7


def test_a_figure_that_is_no_number_ends_no_stage(tmp_path):
    path = tmp_path / "r.json"
    lab = Lab(CPU, "reference", StubTimer(), gpu.stub_shell, dry=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gpu.STAGES, "machine", lambda lab, stage: stage.unit("copy", lambda: {"gb_per_s": math.nan}))
        _, args = gpu.parse(["--stages", "machine"])
        gpu.run_stage("machine", lab, {}, path, args)
    assert gpu.read(path)["machine"]["units"]["copy"]["gb_per_s"] is None


@pytest.mark.parametrize("page_is_in_the_way", [False, True])
@pytest.mark.parametrize("named", [True, False])
def test_the_page_is_there_after_every_stage(tmp_path, monkeypatch, capsys, named, page_is_in_the_way):
    """Also where --write names no file; one that cannot be written ends no stage."""
    target = tmp_path / "new" / "page.md" if named else tmp_path / "docs" / "gpu" / "nvidia-x.md"
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.torch.cuda, "get_device_name", lambda _: "NVIDIA X")
    monkeypatch.setattr(gpu, "usable_device", lambda parser, name: torch.device(name))
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    if page_is_in_the_way:
        target.mkdir(parents=True)
    seen = []

    def start_stage(name, args, path):
        results = gpu.read(path)
        seen.append((name, target.is_file() and sorted(results)))
        results[name] = {"units": {"copy": {"gb_per_s": 1.0}}, "seconds": 1.0}
        path.write_text(json.dumps(results))

    monkeypatch.setattr(gpu, "start_stage", start_stage)
    flags = ["--stages", "machine", "times", "--results", str(tmp_path / "r.json"), "--write", *[str(target)] * named]
    if page_is_in_the_way:
        with pytest.raises(SystemExit):
            gpu.main(flags)
        assert [name for name, _ in seen] == ["machine", "times"] and "no page" in capsys.readouterr().out
        return
    assert gpu.main(flags) == 0
    assert seen == [("machine", False), ("times", ["machine"])]
    assert "| copy | 1 |" in target.read_text()


def test_a_device_that_is_lost_ends_its_process_at_once(monkeypatch):
    codes = iter([gpu.DEVICE_LOST, 1])
    monkeypatch.setattr(gpu, "main", lambda: next(codes))
    ended = []
    monkeypatch.setattr(gpu.os, "_exit", ended.append)
    assert gpu.command() == gpu.DEVICE_LOST and ended == [gpu.DEVICE_LOST]
    assert gpu.command() == 1 and ended == [gpu.DEVICE_LOST]
