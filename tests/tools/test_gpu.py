"""tools.gpu: a walk through every stage without a GPU, its limits of time, and the arithmetic behind its figures."""

import json
import subprocess
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sasa.kernels import triton_backend, triton_tiles
from sasa.training.cli import parse_command_line
from sasa.training.optim import learning_rate
from sasa.training.saving import TrainingError
from tools.gpu import __main__ as gpu
from tools.gpu import kernels, page, stem, training
from tools.gpu.predictions import CYCLES, PREDICTIONS, WORK, Work, step_ms, verdict
from tools.gpu.stage import DeviceLost, Lab, Stage, Unmet
from tools.gpu.timer import StubTimer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """A dry run: its files' folder, what it printed, the commands that it would run, and the file after each unit."""
    folder = tmp_path_factory.mktemp("gpu")
    commands, kept = [], []

    def shell(command, seconds):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "12 passed\n", "")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "stub_shell", shell)
        write = gpu.files.write_text
        patch.setattr(gpu.files, "write_text", lambda path, text: (write(path, text), kept.append(text)))
        flags = ["--dry-run", "--results", str(folder / "r.json"), "--write", str(folder / "docs" / "page.md")]
        assert gpu.main(flags) == 0
    return folder, commands, kept


def test_a_dry_run_walks_all_stages(walked):
    folder, _, kept = walked
    results = json.loads((folder / "r.json").read_text())
    assert list(results) == list(gpu.STAGES)
    assert "tests/kernels/test_triton_numbers.py" in results["tests"]["units"]
    for stage, result in results.items():
        assert result["units"], stage
        assert not any("error" in unit for unit in result["units"].values()), result
    units = sum(len(result["units"]) for result in results.values())
    assert len(kept) >= units  # the file is written after each of them, and the page
    assert all(json.loads(text) for text in kept[:-1])
    assert {"forward_ms", "backward_ms", "conv3x3_forward_ms", "conv1x1_qkv_backward_ms"} <= results["times"]["units"][
        str(kernels.DRY_FORMS[0])
    ].keys()
    for form in stem.DRY_STEMS:
        assert {"largest_error", "limit"} <= results["right"]["units"][f"{form} bfloat16"].keys()
        assert {"attention_ms", "conv_ms"} <= results["times"]["units"][str(form)].keys()
    assert len(results["steps"]["units"]) == len(results["compiled"]["units"]) == 6


def test_its_commands_are_ones_that_train_py_takes(walked):
    _, commands, _ = walked
    assert any(command[1:6] == ["-m", "pytest", "-q", "-m", "gpu"] for command in commands)
    runs = [command[next(i for i, x in enumerate(command) if x.endswith("train.py")) + 1 :]
            for command in commands if any(x.endswith("train.py") for x in command)]  # fmt: skip
    parsed = [parse_command_line(run) for run in runs]
    assert {command.given.get("amp") for command in parsed} >= {"off", "bf16", "fp16"}
    assert any(command.given.get("auto_augment") == "rand" for command in parsed)
    for flag in ("deterministic", "compile"):
        assert any(command.given.get(flag) is True for command in parsed), flag
    assert [command.given["max_steps"] for command in parsed if command.given.get("deterministic")][-3:] == [20, 10, 20]
    assert any(command.resume == "" for command in parsed)
    assert any("torch.distributed.run" in command for command in commands)


def test_its_page_says_that_it_was_dry_and_holds_every_prediction(walked):
    folder, *_ = walked
    text = (folder / "docs" / "page.md").read_text()
    assert "dry run" in text.split("##")[0]
    assert all(f"## {title}" in text for title in page.TITLES.values())
    for stage in ("machine", "times", "steps", "compiled"):
        lines = [line for line in text.splitlines() if line.startswith(f"| {stage} | ")]
        assert len(lines) == sum(prediction.stage == stage for prediction in PREDICTIONS) > 0


@pytest.mark.parametrize("stage", ["steps", "compiled"])
def test_every_step_is_predicted(walked, stage):
    """A dry run walks ResNet26 alone; the units of ResNet50 have the same names but for it."""
    folder, *_ = walked
    results = json.loads((folder / "r.json").read_text())
    rows = [verdict(p, results) for p in PREDICTIONS if p.stage == stage and p.key == "step_ms"]
    assert {row["unit"] for row in rows if row["measured"] is not None} == results[stage]["units"].keys()
    assert {row["unit"].replace("ResNet50", "ResNet26") for row in rows} == results[stage]["units"].keys()
    assert all(0 < row["low"] < row["high"] for row in rows)


def test_the_predicted_times_in_the_docs_are_those_that_are_printed():
    docs = (Path(gpu.ROOT) / "docs" / "kernels.md").read_text(encoding="utf-8")
    for (name, kind), work in WORK.items():
        times = (f"{low:.0f} to {high:.0f}" for low, high in (step_ms(work, False), step_ms(work, True)))
        counts = f"{work.tflop:.2f} | {work.product_gb:.1f} | {work.other_gb:.1f} | {work.instructions:.2f}"
        assert f"| {name} {kind} | {counts} | {' | '.join(times)} |" in docs


def test_a_predicted_time_follows_from_what_a_step_does():
    """Of 850 TFLOP at the highest rate a second; of 2 x 3100 GB two more; of 4 instructions a cycle another."""
    work = Work(850, 3000, 6200, 4 * CYCLES / 1e9)
    assert step_ms(work, False)[0] == pytest.approx(4000)
    assert step_ms(work, True)[0] == pytest.approx(3000)
    assert step_ms(work, True)[1] == pytest.approx(1e3 * (850 * 4 / 550 + (3000 + 1.6 * 6200) / 2300 + 4 / 1.8))


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_what_is_timed_is_what_is_trained(ema):
    """The rate of the schedule, clipping and the moving average are the run's, and its guard ends it."""
    lab = Lab(CPU, "tiled", StubTimer(), gpu.stub_shell, dry=True)
    run = training.make_run(lab, "ResNet26", "attention", ema, False)
    step = training.training_step(run)
    for index in range(2):
        step()
        assert run.optimizer.param_groups[0]["lr"] == learning_rate(run.config, index, run.steps_per_epoch) > 0
    assert all(state["momentum_buffer"].any() for state in run.optimizer.state.values())
    assert (run.ema is None) == (ema == 0) and (run.ema is None or run.ema.n_averaged.item() == 2)
    with torch.no_grad():
        run.model.fc.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="the loss is nan at step 3"):
        step()


def test_done_units_are_kept_and_chosen_stages_alone_run(walked, tmp_path, capsys):
    folder, *_ = walked
    path = tmp_path / "r.json"
    results = json.loads((folder / "r.json").read_text())
    results["machine"]["units"]["copy"]["gb_per_s"] = 77.0
    results["machine"]["units"]["product"] = {"error": "was lost"}
    path.write_text(json.dumps(results))
    assert gpu.main(["--dry-run", "--results", str(path), "--stages", "machine"]) == 0
    out = capsys.readouterr().out
    assert "right:" not in out
    units = json.loads(path.read_text())["machine"]["units"]
    assert units["copy"]["gb_per_s"] == 77.0
    assert "error" not in units["product"]
    assert gpu.main(["--dry-run", "--results", str(path), "--stages", "machine", "--again"]) == 0
    assert json.loads(path.read_text())["machine"]["units"]["copy"]["gb_per_s"] != 77.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_it_says_so_in_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        gpu.main([])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no CUDA device" in line
    with pytest.raises(SystemExit) as end:
        gpu.main(["--stages", "speed"])
    assert end.value.code == 2


def stage_at(clock, until=540.0, **options):
    return Stage({}, until, lambda: None, report=lambda line: None, clock=clock, **options)


def test_a_stage_ends_in_its_time_and_goes_on_later():
    now = [0.0]

    def slow():
        now[0] += 300.0
        return {"figure": 1.0}

    stage = stage_at(lambda: now[0])
    for name in "abc":
        stage.unit(name, slow)
    assert [set(unit) for unit in stage.found.values()] == [
        {"figure", "seconds"},
        {"figure", "seconds"},
        {"not_reached"},
    ]
    again = Stage(stage.found, now[0] + 540, lambda: None, report=lambda line: None, clock=lambda: now[0])
    for name in "abc":
        again.unit(name, slow)
    assert now[0] == 900.0  # only c
    assert "figure" in again.found["c"]


def test_a_command_that_outlasts_the_stage_is_an_error_only_where_it_had_all_of_it():
    """Else a hang would never be one, and what merely came late always."""

    def hangs():
        raise subprocess.TimeoutExpired("pytest", 500)

    stage = stage_at(lambda: 0.0)
    assert "timed out" in stage.unit("a", hangs)["error"]
    assert stage.unit("b", hangs).keys() == {"not_reached", "seconds"}


def test_every_network_of_a_process_is_compiled(monkeypatch):
    """torch.compile gives up a function's code, the forward of all of them, after eight different networks."""
    compiled = []

    class Chain(torch.nn.Module):
        def __init__(self, length):
            super().__init__()
            self.parts = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(length))

        def forward(self, x):
            for part in self.parts:
                x = part(x)
            return x

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    def make_run(lab, length, *_):
        return SimpleNamespace(network=torch.compile(Chain(length), backend=backend), global_batch=1)

    monkeypatch.setattr(training, "make_run", make_run)
    monkeypatch.setattr(training, "training_step", lambda run: lambda: run.network(torch.zeros(1, 2)))
    lab = Lab(CPU, "tiled", StubTimer(), gpu.stub_shell, dry=True)
    for length in range(1, 11):
        training.measure_step(lab, length, "", 0.0, True)
        assert len(compiled) == length


def test_errors_are_results_and_a_lost_device_ends_the_process():
    def fails(message):
        raise RuntimeError(message)

    def cannot():
        raise Unmet("two GPUs are needed")

    stage = stage_at(lambda: 0.0)
    assert "first line second" in stage.unit("a", lambda: fails("first line\nsecond"))["error"]
    assert stage.unit("b", cannot)["unmet"] == "two GPUs are needed"
    with pytest.raises(DeviceLost):
        stage.unit("c", lambda: fails("CUDA error: an illegal memory access was encountered"))
    assert "illegal" in stage.found["c"]["error"]
    later = stage_at(lambda: 0.0, keeps_errors=True)
    later.found = stage.found
    later.unit("c", cannot)
    assert "illegal" in stage.found["c"]["error"]  # not tried again by the process that goes on


def test_only_errors_of_triton_that_break_the_device_end_the_process():
    def fails(message):
        raise RuntimeError(message)

    stage = stage_at(lambda: 0.0)
    stage.unit("a", lambda: fails("Triton Error [CUDA]: out of memory"))
    stage.unit("b", lambda: fails("Triton Error [CUDA]: invalid argument"))
    with pytest.raises(DeviceLost):
        stage.unit("c", lambda: fails("Triton Error [CUDA]: an illegal memory access was encountered"))


def test_inputs_are_those_of_a_layer():
    """Slices of one projection, for which the kernels have builds of their own: copies would measure others."""
    _, query, key, value, *_ = kernels.make_inputs(kernels.DRY_FORMS[0], 2, torch.float32, CPU)
    assert triton_backend._follow(query, key, value) and triton_backend._follow(*kernels.gradient_maps(query))
    assert all(x.stride() == query.stride() for x in (key, value, *kernels.gradient_maps(query)))
    assert triton_backend._alike(query, key, value)[0] is query
    assert key.std().item() == pytest.approx(value.std().item() * query.shape[2] ** -0.25, rel=0.05)


def test_nvidia_smi_is_asked_for_the_chosen_gpu(monkeypatch):
    asked = []

    def shell(command, seconds):
        asked.append(command[1])
        return subprocess.CompletedProcess(command, "MIG" in command[1], "1980, 580.1, 700\n", "")

    lab = Lab(torch.device("cuda", 0), "triton", StubTimer(), shell)
    for visible, wanted in ((None, "--id=0"), ("", "--id=0"), (" 2, 0", "--id=2"), ("GPU-a", "--id=GPU-a"),
                            ("MIG-a", "--id=0")):  # fmt: skip
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert kernels.ask_nvidia_smi(lab) == (1980.0, "580.1", "700")
        assert asked.pop() == wanted


def test_a_wrong_kernel_is_found(monkeypatch):
    """Off by a little more than rounding, or another result at each call."""
    lab = Lab(CPU, "reference", StubTimer(), gpu.stub_shell, dry=True)
    form = kernels.DRY_FORMS[0]
    compare = partial(kernels.compare, lab, form, torch.float32, 1e-5)
    assert compare()["largest_error"] < 1e-5
    real = kernels.both_ways
    calls = []

    def changed(scale_of):
        def both_ways(backend, inputs):
            out = real(backend, inputs)
            if backend == "reference":
                calls.append(1)
                out[3] = out[3] * scale_of(len(calls))
            return out

        return both_ways

    monkeypatch.setattr(kernels, "both_ways", changed(lambda call: 1 + 1e-4))
    with pytest.raises(RuntimeError, match="grad value is off"):
        compare()
    calls.clear()
    monkeypatch.setattr(kernels, "both_ways", changed(lambda call: 1 + 3e-7 * (call == 3)))
    with pytest.raises(RuntimeError, match="other bits"):
        compare()


@pytest.mark.parametrize("form", [stem.DRY_STEMS[0]._replace(side=40, compared=2), stem.DRY_STEMS[1]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_stem_is_found(form, dtype, monkeypatch):
    """Off by a little more than rounding, or another result at each call; by the CPU kernel, which pools too."""
    compare = partial(stem.compare_stem, Lab(CPU, "auto", StubTimer(), gpu.stub_shell), form, dtype)
    assert compare()["largest_error"] <= (1e-5 if dtype == torch.float32 else 2**-7)
    real, calls = stem.results, []

    def changed(scale_of):
        def results(*arguments):
            found = real(*arguments)
            if arguments[1].dtype == torch.float32:
                calls.append(1)
                found["grad 0.value.weight"] *= scale_of(len(calls))
            return found

        return results

    monkeypatch.setattr(stem, "results", changed(lambda call: 1 + 3 * stem.LIMITS[dtype]))
    with pytest.raises(RuntimeError, match=r"grad 0\.value\.weight is off"):
        compare()
    calls.clear()
    monkeypatch.setattr(stem, "results", changed(lambda call: 1 + 3e-7 * (call == 3)))
    with pytest.raises(RuntimeError, match="other bits"):
        compare()


def test_gradients_of_a_stem_are_compared_where_rounding_cannot_turn_them():
    """Two equal values of a block, and one at 0 before the ReLU: to which pixel a gradient goes is chance."""
    pair = torch.nn.Sequential(torch.nn.Identity(), torch.nn.BatchNorm2d(1).eval())
    values = torch.tensor([[1.0, 2.0, 3.0, 5.0], [2.0, 0.5, 4.0, 5.0], [-1.0, 0.0, 7.0, 6.0]])[None, None]
    assert stem.is_clear(pair, values, 2, 1e-4).flatten().tolist() == [False, False, False, True]
    assert stem.is_clear(pair, values, 1, 1e-4).flatten().tolist() == [True] * 9 + [False] + [True] * 2


def test_the_forms_are_those_of_resnet50():
    from attention import LocalAttention2d
    from model import ResNet50

    found = {}

    def note(layer, inputs):
        key = (layer.head_dim, inputs[0].shape[-1])
        found[key] = found.get(key, 0) + 1

    with torch.device("meta"):
        network = ResNet50(backend="reference").eval()
    for layer in network.modules():
        if isinstance(layer, LocalAttention2d):
            layer.register_forward_pre_hook(note)
    network(torch.empty(1, 3, 224, 224, device="meta"))
    assert found == {(form.width, form.side): form.layers for form in kernels.FORMS}


def test_counters_are_read_from_ncu_s_table():
    text = '==PROF== Connected\n"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
    text += '"0","forward","dram__bytes.sum","byte","1,234"\n"1","forward","dram__bytes.sum","byte","2,000"\n'
    text += '"1","forward","another","","5"\n'
    assert kernels.counters_of(text) == {"forward dram__bytes.sum": 2000.0}
    lab = Lab(
        CPU, "tiled", StubTimer(), lambda *_: subprocess.CompletedProcess([], 1, "ERR_NVGPUCTRPERM", ""), dry=True
    )
    with pytest.raises(Unmet, match="counters"):
        kernels.count_form(lab, stage_at(lambda: 0.0), kernels.DRY_FORMS[0])


def test_the_idle_share_of_overlapping_kernels():
    assert training.idle_share([(0, 2), (1, 3), (1, 2), (6, 8)]) == pytest.approx(100 * 3 / 8)


def test_a_resume_with_other_weights_is_found(tmp_path):
    def shell(command, seconds):
        folder = tmp_path / command[command.index("--name") + 1]
        folder.mkdir(exist_ok=True)
        torch.save({"model": {"fc": torch.full((2,), float("--resume" in command) * difference)}}, folder / "best.pt")
        return subprocess.CompletedProcess(command, 0, "", "")

    lab = Lab(CPU, "tiled", StubTimer(), shell)
    difference = 0.0
    assert "bitwise" in training.resumed_run(lab, stage_at(lambda: 0.0), tmp_path)["result"]
    difference = 1e-7
    with pytest.raises(RuntimeError, match="differ after a resume"):
        training.resumed_run(lab, stage_at(lambda: 0.0), tmp_path)


def test_a_prediction_is_held_against_what_is_measured():
    one = PREDICTIONS[0]
    for value, within in ((one.low, True), (one.high * 1.01, False), (None, None)):
        unit = {} if value is None else {one.key: value}
        row = verdict(one, {one.stage: {"units": {one.unit: unit}}})
        assert (row["measured"], row["within"]) == (value, within)
    assert verdict(one, {})["measured"] is None


def test_names_and_text_of_other_programs_are_plain():
    assert gpu.name_of("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert gpu.name_of("../..") == "device"
    assert page.escape("a|b<script>") == r"a\|b\<script\>"
    assert Path(gpu.name_of("x/y")).name == "x-y"


def test_instructions_are_those_of_the_committed_table():
    about = {"triton": "3.9.1", "capability": "9.0"}
    row = json.loads(triton_tiles.TABLE.read_text())["K7 d16 map56 half"]["query"]
    expected = row["builds"][" ".join(map(str, row["tile"]))]["3.9 90"][0]
    form = kernels.Form(16, 28, 3)
    assert kernels.counted("query", form, torch.bfloat16, about) == expected > 0
    assert kernels.counted("query", form, torch.bfloat16, about | {"capability": "7.7"}) == expected
    assert kernels.counted("query", form, torch.bfloat16, about | {"triton": "1.0"}) is None
    assert kernels.counted("query", form, torch.float32, about) is None


@pytest.mark.parametrize(
    ("code", "text", "wanted"),
    [
        (0, "1980, 570.86.10, 700.00\n", (1980.0, "570.86.10", "700.00")),
        (0, "[N/A], 570.86.10, [N/A]\n", (None, "570.86.10", "[N/A]")),
        (0, "No devices were found\n", (None,) * 3),
        (9, "", (None,) * 3),
        (None, "", (None,) * 3),
    ],
)
def test_what_nvidia_smi_does_not_say_stops_nothing(code, text, wanted):
    def shell(command, seconds):
        if code is None:
            raise FileNotFoundError(command[0])
        return subprocess.CompletedProcess(command, code, text, "")

    assert kernels.ask_nvidia_smi(Lab(CPU, "triton", StubTimer(), shell)) == wanted


def test_without_the_clock_there_are_times_but_no_instructions_a_cycle(monkeypatch):
    monkeypatch.setattr(kernels, "counted", lambda *_: 100.0)
    lab = Lab(CPU, "tiled", StubTimer(), gpu.stub_shell, dry=True)
    found = kernels.time_form(lab, kernels.DRY_FORMS[0], {"max_clock_mhz": None, "multiprocessors": 10})
    assert "forward_ms" in found and "forward_ipc" not in found


def test_instructions_a_cycle_follow_from_count_and_time(monkeypatch):
    """100 instructions a pixel and head of an 8-head map of 6 x 6 in 1 ms, on 10 multiprocessors at 1 GHz."""
    monkeypatch.setattr(kernels, "counted", lambda *_: 100.0)
    lab = Lab(CPU, "tiled", StubTimer(), gpu.stub_shell, dry=True)
    found = kernels.time_form(lab, kernels.DRY_FORMS[0], {"max_clock_mhz": 1000.0, "multiprocessors": 10})
    cycles = 1e-3 * 1e9 * 10
    assert found["forward_ipc"] == pytest.approx(100 * 36 * 8 / cycles)
    assert found["backward_ipc"] == pytest.approx(200 * 36 * 8 / cycles)  # two kernels
