"""tools.benchmark: the order and the arithmetic on a fake clock, tables, JSON, bad input."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import build
from sasa.kernels import cpu, projected_operator
from tools.benchmark import __main__ as benchmark
from tools.benchmark import layers as benchmark_layers
from tools.benchmark import measure, step_memory
from tools.benchmark import network as benchmark_network

ROOT = Path(benchmark.__file__).resolve().parents[2]


def command(*words):
    """A run in a process of its own: (exit code, stdout, stderr)."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=120
    )
    return done.returncode, done.stdout, done.stderr


# ---- on a fake clock -----------------------------------------------------------------------------------------------


def test_candidates_take_turns_and_the_first_round_does_not_count():
    now, order = [0.0], []

    def candidate(name, seconds):
        def run():
            order.append(name)
            now[0] += seconds * (100 if len(order) <= 3 else 1)  # the first calls are slow

        return run

    syncs = []
    candidates = {name: candidate(name, seconds) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    times = measure.interleave(candidates, 3, lambda: now[0], lambda: syncs.append(now[0]))
    assert order == [*"abc", *"abc", *"bca", *"cab"]
    assert times == {"a": [1.0] * 3, "b": [2.0] * 3, "c": [4.0] * 3}
    assert len(syncs) == 2 * len(order)


def test_a_slow_candidate_takes_part_in_two_rounds():
    order = []
    candidates = {name: lambda name=name: order.append(name) for name in "abc"}
    times = measure.interleave(candidates, 4, lambda: 0.0, lambda: None, few=("b",))
    assert order == [*"ac", *"abc", *"bca", *"ca", *"ac"]
    assert [len(times[name]) for name in "abc"] == [4, 2, 4]
    assert measure.ratio([2.0, 6.0], [1.0, 2.0, 7.0]) == {"median": 2.5, "low": 2.0, "high": 3.0}


def test_a_ratio_is_of_times_of_one_round():
    """A machine that is ten times slower in one round gives the same ratio there."""
    got = measure.ratio([2.0, 30.0, 4.0], [1.0, 10.0, 1.0])
    assert got == {"median": 3.0, "low": 2.0, "high": 4.0}


def test_flags_of_the_kernels_build_are_of_the_machine(monkeypatch):
    """They can take a vector width from the kernel, which torch's own name of the processor does not show."""
    monkeypatch.setenv("SASA_CXXFLAGS", "-mno-avx512f")
    assert measure.machine(torch.device("cpu"))["SASA_CXXFLAGS"] == "-mno-avx512f"
    monkeypatch.delenv("SASA_CXXFLAGS")
    assert "SASA_CXXFLAGS" not in measure.machine(torch.device("cpu"))


def test_memory_that_a_cycle_holds_does_not_hide_a_growth():
    """As an optimizer's of an earlier step: it would be freed while the next one runs."""
    gc.disable()
    try:
        held = [torch.ones(32 << 20, dtype=torch.uint8)]
        held.append(held)
        del held
        found = measure.growth(lambda: (gc.collect(), torch.ones(32 << 20, dtype=torch.uint8)))
        assert found > 24 << 20
    finally:
        gc.enable()


def test_geometric_mean():
    assert measure.geometric_mean([0.5, 2.0, 8.0]) == pytest.approx(2.0)


def test_shapes():
    assert benchmark.parse_shapes("paper") == benchmark_layers.PAPER
    assert benchmark.parse_shapes("cifar") == benchmark_layers.CIFAR
    assert len(benchmark.parse_shapes("all")) == 11
    assert benchmark.parse_shapes("2,32,5") == ((2, 32, 5),)


# ---- the steps that are timed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2])
def test_every_step_gives_a_gradient_of_every_input(stride):
    cpu, fp32 = torch.device("cpu"), torch.float32
    shapes = [tuple(x.shape) for x in benchmark_layers.conv_step(2, 16, 5, stride, cpu, fp32)()]
    assert shapes == [(2, 16, 5, 5), (16, 16, 3, 3)]
    shapes = [tuple(x.shape) for x in benchmark_layers.core_step(2, 16, 5, 3, "reference", cpu, fp32)()]
    assert shapes == [(2, 8, 2, 5, 5)] * 3 + [(8, 1, 3)] * 2
    shapes = [tuple(x.shape) for x in benchmark_layers.layer_step(2, 16, 5, stride, "reference", cpu, fp32)()]
    assert shapes == [(2, 16, 5, 5), *[(8, 1, 7)] * 2, *[(16, 16, 1, 1)] * 3]


@pytest.mark.skipif(cpu.unusable() is not None, reason=f"no CPU kernel: {cpu.unusable()}")
@pytest.mark.parametrize("stride", [1, 2])
def test_the_layer_that_is_timed_is_that_of_a_network(stride, monkeypatch):
    """By the operator that a network's training step takes, not by one projection after the other."""
    run = benchmark_layers.layer_step(2, 16, 4, stride, "auto", torch.device("cpu"), torch.float32)
    seen, attend = [], projected_operator.attend
    monkeypatch.setattr(projected_operator, "attend", lambda *a: seen.append(a[-1]) or attend(*a))
    run()
    assert seen == [stride == 2]


# ---- the command ---------------------------------------------------------------------------------------------------


def test_json_is_all_of_stdout_and_the_table_is_on_stderr():
    code, out, err = command(
        "-m", "tools.benchmark", "--shapes", "1,16,24", "--rounds", "2", "--json", "--threads", "1",
        "--backends", "tiled", "reference",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(out)
    assert result["machine"]["threads"] == 1
    assert result["machine"]["torch"] == torch.__version__
    (row,) = result["layers"]
    assert row["shape"] == [1, 16, 24]
    assert list(row["candidates"]) == ["conv", "core tiled", "layer tiled", "unfold"]
    for figures in row["candidates"].values():
        assert figures["ms"] > 0
        assert figures["ratio"]["low"] <= figures["ratio"]["median"] <= figures["ratio"]["high"]
    assert row["candidates"]["conv"]["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    means = result["geometric_means"]
    assert means["unfold / core tiled"] == pytest.approx(means["unfold / conv"] / means["core tiled / conv"])
    if sys.platform == "linux":
        # At least its 49 windows of keys in fp32, 49 * 16 * 24 * 24 * 4 bytes.
        assert row["candidates"]["unfold"]["peak_mib"] >= 1.7
    for heading in ("peak MiB", "/ conv", "Geometric means", "torch"):
        assert heading in err


def test_the_table_is_on_stdout_without_json(capsys, monkeypatch):
    monkeypatch.setattr(benchmark_layers, "peak_memory", lambda kind, arguments, device: 1.5)
    assert benchmark.main(["--shapes", "1,16,4", "--rounds", "1", "--backends", "tiled"]) == 0
    out = capsys.readouterr().out
    assert "core tiled" in out
    assert "1, 16, 4" in out
    assert "unfold" not in out.partition("B, C, H")[2]


def test_every_section(capsys, monkeypatch):
    """All of a full run, on shapes that cost nothing."""
    monkeypatch.setattr(benchmark_layers, "peak_memory", lambda kind, sizes, device: float(sizes[2] ** 2))
    monkeypatch.setattr(benchmark_layers, "QUICK", ((1, 16, 4),))
    monkeypatch.setattr(benchmark_layers, "STRIDED", ((1, 16, 5),))
    series = {"H*W": ((1, 16, 4, 3), (1, 16, 8, 3)), "K": ((1, 16, 4, 3), (1, 16, 4, 5))}
    monkeypatch.setattr(benchmark_layers, "SCALING", series)
    monkeypatch.setattr(benchmark_network, "FORMS", {"CIFAR": (2, 8)})
    assert benchmark.main(["--quick", "--json", "--rounds", "1", "--backends", "tiled", "reference"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert set(result) >= {"layers", "strided", "scaling", "network", "geometric_means"}
    assert [row["memory_exponent"] for row in result["scaling"]] == [pytest.approx(1.0), pytest.approx(0.0)]
    assert [row["network"] for row in result["network"]] == ["convolution", "attention", "attention + stem"]
    assert "images/s" in captured.err


BAD = {
    "shape": (["--shapes", "1,2"], "--shapes"),
    "channels": (["--shapes", "1,20,4"], "multiple of 16"),
    "backend": (["--backends", "magic"], "magic"),
    "rounds": (["--rounds", "0"], "--rounds"),
    "dtype": (["--dtype", "int8"], "--dtype"),
    "device": (["--device", "magic"], "magic"),
    "flag": (["--fast"], "--fast"),
    "batch size": (["--network", "--batch-size", "0"], "--batch-size"),
    "batch size of layers": (["--batch-size", "4"], "--network"),
    "step memory of any batch": (["--step-memory", "--batch-size", "auto"], "--step-memory"),
    "step memory and network": (["--step-memory", "--network"], "--network"),
    "shapes of a network": (["--network", "--shapes", "paper"], "--shapes"),
    "form of a network": (["--network", "--form", "CIFAR"], "--form CIFAR"),
    "form of layers": (["--form", "ImageNet"], "--form ImageNet"),
    "models of layers": (["--shapes", "paper", "--models", "ResNet50"], "--models"),
    "rounds of step memory": (["--step-memory", "--rounds", "9"], "--rounds 9"),
    "model": (["--network", "--models", "ResNet27"], "ResNet27"),
}


@pytest.mark.parametrize("which", BAD)
def test_bad_input_is_one_line_and_exit_2(which, capsys):
    arguments, word = BAD[which]
    with pytest.raises(SystemExit) as stop:
        benchmark.main(arguments)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert word in captured.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu_is_one_line_and_exit_2(capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["--device", "cuda"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


# ---- whole networks and plans --------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 63, 64, 100, 4095])
def test_the_largest_batch_is_within_an_eighth_of_the_limit(limit):
    tried = []

    def fits(batch):
        tried.append(batch)
        return batch <= limit

    found = benchmark_network.largest_batch(fits)
    assert found <= limit <= found + max(found // 8, 1) and len(tried) < 18
    assert benchmark_network.largest_batch(lambda batch: True, 256) == 256


def test_a_batch_by_available_memory(monkeypatch):
    """A step of b images takes 100 + 10 b MiB here: 80% of 1000 MiB hold 70 images."""
    monkeypatch.setattr(benchmark_network, "peak_of_step", lambda *a: 100 + 10.0 * a[3])
    fits = benchmark_network.fits_in_memory(1000, "ResNet26", {}, "CIFAR", 32, torch.device("cpu"), torch.float32)
    assert fits(70) and not fits(71)
    arguments = ("ResNet26", {}, "CIFAR", 32, torch.device("cpu"), torch.float32)
    monkeypatch.setattr(benchmark_network, "free_mib", lambda: 1000)
    assert 62 <= benchmark_network.choose_batch("auto", 5, *arguments) <= 70
    assert benchmark_network.choose_batch(None, 5, *arguments) == 5
    assert benchmark_network.choose_batch(7, 5, *arguments) == 7


def test_the_network_table_has_every_depth_and_peak(capsys, monkeypatch):
    monkeypatch.setattr(benchmark_network, "FORMS", {"CIFAR": (2, 8), "ImageNet": (2, 8)})
    made = {"step": 0, "evaluation": 0}

    def counting(kind):
        def make(*arguments):
            made[kind] += 1
            return lambda: None

        return make

    monkeypatch.setattr(benchmark_network, "train_step", counting("step"))
    monkeypatch.setattr(benchmark_network, "evaluation_pass", counting("evaluation"))
    monkeypatch.setattr(benchmark_network, "peak_of_step", lambda *a: 3.5)
    assert benchmark.main(["--network", "--json", "--rounds", "1", "--backends", "tiled"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    for rows in (result["network"], result["evaluation"]):
        assert len(rows) == 2 * 3 * 3 and {row["model"] for row in rows} == {"ResNet26", "ResNet38", "ResNet50"}
        assert all(row["images_per_s"] > 0 and row["batch"] == 2 for row in rows)
    assert all(row["peak_mib"] == 3.5 for row in result["network"])
    assert all("peak_mib" not in row for row in result["evaluation"]) and made == {"step": 18, "evaluation": 18}
    steps, evaluation = captured.err.split("Evaluation (no gradients)")
    assert steps.count(" 3.5\n") == 18 and "ImageNet  ResNet50 attention (tiled)" in evaluation


def test_evaluation_is_the_forward_alone(monkeypatch):
    built = []
    monkeypatch.setattr(benchmark_network, "build", lambda *a, **k: built.append(build(*a, **k)) or built[-1])
    run = benchmark_network.evaluation_pass(
        "ResNet26", {"backend": "tiled"}, "CIFAR", 2, 8, torch.device("cpu"), torch.float32
    )
    before = {name: x.clone() for name, x in built[0].state_dict().items()}
    seen = []
    built[0].register_forward_hook(lambda module, args, out: seen.append(out))
    run()
    assert seen[0].is_inference() and seen[0].shape == (2, 10) and not built[0].training
    assert all(torch.equal(x, before[name]) for name, x in built[0].state_dict().items())


def step_memory_flags(batch_size: int) -> list[str]:
    flags = f"--step-memory --form CIFAR --models ResNet26 --batch-size {batch_size} --json --threads 1"
    return flags.split()


@pytest.mark.slow
def test_a_steps_memory_is_what_a_real_step_takes(capsys):
    """ResNet26 in the CIFAR form, 16 images: each total within 25% of the peak of a step in a process of its own."""
    command = step_memory_flags(16)
    assert benchmark.main([*command, "--backends", "tiled"]) == 0
    captured = capsys.readouterr()
    (found,) = json.loads(captured.out)["step_memory"]
    assert "layer4" in captured.err and "work, tiled" in captured.err
    for net, options in {"convolution": {"attention_stages": ()}, "tiled": {"backend": "tiled"}}.items():
        real = benchmark_network.peak_of_step("ResNet26", options, "CIFAR", 16, 32, torch.device("cpu"), torch.float32)
        assert found["total_mib"][net] == pytest.approx(real, rel=0.25)


def test_a_steps_memory_adds_what_is_kept_and_the_largest_work(capsys, monkeypatch):
    monkeypatch.setattr(step_memory, "peak_memory", lambda kind, arguments, device: float(arguments[1]))
    command = [*step_memory_flags(2), "--backends", "tiled"]
    assert benchmark.main(command) == 0
    (found,) = json.loads(capsys.readouterr().out)["step_memory"]
    assert found["work_mib"]["tiled"] == {f"layer{i}": 32.0 * 2**i for i in range(1, 5)}
    kept = {net: sum(stages.values()) for net, stages in found["kept_mib"].items()}
    assert found["total_mib"]["tiled"] == pytest.approx(found["state_mib"]["attention"] + kept["attention"] + 512)
    assert found["total_mib"]["convolution"] == pytest.approx(found["state_mib"]["convolution"] + kept["convolution"])
    numbers = {"convolution": 11_660_362, "attention": 8_306_442}  # of docs/results.md
    assert found["state_mib"] == {net: pytest.approx(12 * count / 2**20) for net, count in numbers.items()}


def test_kept_bytes_by_hand():
    """A stem of the small form on 2 images of 8x8: input, convolution, ReLU, and batch norm's statistics."""
    kept = step_memory.kept_by_stage("ResNet26", {}, "CIFAR", 2, 8, torch.float32)
    maps = 4 * (3 + 64 + 64) * 2 * 8 * 8
    assert 0 < kept["stem"] - maps <= 4 * 4 * 64
    assert all(size > 0 for size in kept.values())
