"""Steps whose figures are read after their update is queued, as on CUDA: here by the CPU's fused optimizers."""

import copy
import functools
import itertools
import os
import signal

import pytest
import torch
from torch import nn

import model
import small_runs
import train
from config import resolve
from sasa.training import classification, step
from sasa.training import run as runs
from sasa.training.guard import Guard
from sasa.training.optim import build_ema, build_optimizer
from tiny_runs import BASE, Tiny, TinyWithNorm, go, model_of, read, spoiled_gradient, spoiled_loss

CPU = torch.device("cpu")
FLAGS = "--ema 0.9 --warmup-epochs 1 --lr 0.01"


@pytest.fixture
def late(monkeypatch, tiny):
    monkeypatch.setattr(step, "reads_late", lambda run: True)
    monkeypatch.setattr(model, "build", lambda name, num_classes, stem, **options: TinyWithNorm(num_classes))


def state_of(run) -> dict:
    """Everything that a step may change, but LAMB's number of skipped steps."""
    progress = {key: getattr(run.progress, key) for key in ("step", "batch", "images", "loss_sum", "correct")}
    optimizer = run.optimizer.state_dict()["state"]
    optimizer = {i: {key: x for key, x in state.items() if key != "skipped"} for i, state in optimizer.items()}
    parts = (run.model.state_dict(), run.ema.state_dict(), optimizer, progress)
    return dict(zip(("model", "ema", "optimizer", "progress"), parts, strict=True))


@pytest.mark.parametrize(
    "flags", ["--optimizer sgd", "--optimizer adamw", "--optimizer lamb", "--optimizer sgd --amp bf16"]
)
@pytest.mark.parametrize(("spoil", "what"), [(spoiled_loss, "the loss is nan"), (spoiled_gradient, "gradient's norm")])
def test_a_bad_step_and_those_queued_behind_it_change_nothing(
    tmp_path, late, seen, monkeypatch, capsys, spoil, what, flags
):
    """Step 3 of 10 is spoiled, step 4 is queued by then: all is as after step 2."""
    flags = f"{FLAGS} {flags}"
    go(tmp_path / "good", f"{flags} --max-steps 2")
    calls = []

    def counted(logits, call):
        calls.append(call)
        return spoil(logits, call)

    monkeypatch.setattr(Tiny, "spoil", staticmethod(counted))
    capsys.readouterr()
    assert small_runs.run(tmp_path, *BASE.split(), *flags.split()) == 1
    error = capsys.readouterr().err
    assert what in error and "step 3," in error and error.count("\n") == 1
    assert calls == [1, 2, 3, 4]
    assert small_runs.differences(state_of(seen[1]), state_of(seen[0])) == []
    assert not list((tmp_path / "run").glob("*.pt")) and not (tmp_path / "run/summary.json").exists()
    assert seen[1].guard.flag == 1


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def fp16(request, monkeypatch, late):
    """Flags of a run under fp16, with its scaler: on a GPU, and on a CPU, which otherwise refuses it."""
    if request.param == "cpu":
        monkeypatch.setattr(runs, "pick_amp", lambda name, device: torch.float16)
        monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, "cpu"))
    return f"{FLAGS} --amp fp16 --device {request.param}"


@pytest.fixture
def after_steps(monkeypatch):
    """What `state_of` gives after each step's update, its progress when the step's figures were read."""
    states, sums = [], []
    update, record_step = step.update, train.record_step

    def updated(run, flag):
        update(run, flag)
        states.append(copy.deepcopy(state_of(run)) | {"scale": run.scaler.get_scale()})

    def recorded(run, *more):
        requests = record_step(run, *more)
        sums.append(state_of(run)["progress"])
        return requests

    monkeypatch.setattr(step, "update", updated)
    monkeypatch.setattr(train, "record_step", recorded)
    return states, sums


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lamb"])
def test_under_fp16_a_loss_that_is_not_finite_ends_the_run_and_changes_nothing(
    tmp_path, fp16, seen, after_steps, monkeypatch, capsys, optimizer
):
    monkeypatch.setattr(Tiny, "spoil", staticmethod(spoiled_loss))
    assert small_runs.run(tmp_path, *BASE.split(), *fp16.split(), "--optimizer", optimizer) == 1
    error = capsys.readouterr().err
    assert "the loss is nan" in error and "step 3," in error
    (run,), (states, sums) = seen, after_steps
    assert run.guard.flag == 1 and run.model.calls == len(states) == 4  # step 4 was queued by then
    wanted = {key: value for key, value in states[1].items() if key != "scale"} | {"progress": sums[1]}
    assert len(sums) == 2 and small_runs.differences(state_of(run), wanted) == []


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lamb"])
def test_under_fp16_an_infinite_gradient_skips_its_own_step_alone(
    tmp_path, fp16, seen, after_steps, monkeypatch, optimizer
):
    monkeypatch.setattr(Tiny, "spoil", staticmethod(spoiled_gradient))
    go(tmp_path, f"{fp16} --optimizer {optimizer} --max-steps 5")
    (run,), (states, sums) = seen, after_steps
    for part, kept in (("optimizer", "momentum_buffer" if optimizer == "sgd" else "exp_avg"), ("model", "conv.weight")):
        values = [s[part][0][kept] if part == "optimizer" else s[part][kept] for s in states]
        same = [torch.equal(a, b) for a, b in itertools.pairwise(values)]
        assert same == [False, True, False, False], part
    assert [b["scale"] / a["scale"] for a, b in itertools.pairwise(states)] == [1, 0.5, 1, 1]
    assert run.guard.flag == 0 and run.progress.skipped == 0 and [x["step"] for x in sums] == [1, 2, 3, 4, 5]


def test_under_fp16_ten_skipped_steps_in_a_row_end_the_run(tmp_path, fp16, seen, monkeypatch, capsys):
    def spoil(logits, call):
        if call >= 3:
            logits.register_hook(lambda grad: grad * float("inf"))
        return logits

    monkeypatch.setattr(Tiny, "spoil", staticmethod(spoil))
    assert small_runs.run(tmp_path, *BASE.split(), *fp16.split()) == 1
    assert "gradient's norm is" in (error := capsys.readouterr().err) and "step 12," in error
    assert seen[0].progress.step == 11


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lamb"])
def test_a_run_whose_steps_are_finite_is_the_same_either_way(tmp_path, late, seen, monkeypatch, optimizer):
    flags = f"{FLAGS} --optimizer {optimizer}"
    folder = go(tmp_path / "late", flags)
    monkeypatch.setattr(step, "reads_late", lambda run: False)
    early = go(tmp_path / "early", flags)
    assert small_runs.differences(model_of(folder), model_of(early)) == []
    averages = [run.ema.state_dict() for run in seen]
    torch.testing.assert_close(averages[0], averages[1], rtol=1e-5, atol=1e-7)
    losses = [[row["train_loss"] for row in small_runs.log_rows(f)] for f in (folder, early)]
    assert losses[0] == losses[1]


def test_a_signal_is_noticed_a_step_late_and_the_resume_is_bitwise(tmp_path, late, monkeypatch, capsys):
    straight = go(tmp_path / "straight", FLAGS)

    def terminate(logits, call):
        if call == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(Tiny, "spoil", staticmethod(terminate))
        assert small_runs.run(tmp_path, *BASE.split(), *FLAGS.split()) == 75
    assert "stopped by SIGTERM at step 5, saved" in capsys.readouterr().out
    go(tmp_path, FLAGS, "--resume")
    states = [small_runs.state_without_times(folder) for folder in (straight, tmp_path / "run")]
    assert small_runs.differences(*states) == []
    assert small_runs.log_rows(straight) == small_runs.log_rows(tmp_path / "run")


def test_nothing_is_saved_or_evaluated_while_a_steps_figures_are_unread(tmp_path, late, seen, monkeypatch):
    """With a save after every step there is one for each two."""
    found = {"save": [], "evaluate": [], "row": []}

    def watch(owner, name, kind):
        original = getattr(owner, name)

        def watched(*args, **kwargs):
            found[kind].append((seen[0].progress.step, seen[0].model.calls))
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    watch(train.Saver, "save", "save")
    watch(classification, "evaluate", "evaluate")
    watch(train.Monitor, "epoch", "row")
    go(tmp_path, f"{FLAGS} --save-minutes 1e-9")
    assert all(step == calls for pairs in found.values() for step, calls in pairs)
    assert len(found["save"]) > 8 and found["evaluate"] == found["row"] == [(10, 10), (20, 20)]
    assert read(tmp_path / "run")["steps"] == 20


def test_momentum_of_a_first_step_that_is_skipped_is_zero():
    network = nn.Linear(40, 30)
    optimizer = build_optimizer(network, resolve({"recipe": "port"}, "CIFAR10"), CPU)
    before = [p.clone() for p in network.parameters()]
    network(torch.randn(2, 40)).sum().backward()
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(map(torch.equal, network.parameters(), before))
    buffers = [optimizer.state[p]["momentum_buffer"] for p in network.parameters()]
    assert [buffer.abs().max().item() for buffer in buffers] == [0, 0]


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_that_begins_as_zeros_trains_as_torchs(nesterov):
    config = resolve({"recipe": "port", "nesterov": nesterov, "weight_decay": 0.0, "lr": 0.1}, "CIFAR10")
    networks = [nn.Linear(6, 5), nn.Linear(6, 5)]
    networks[1].load_state_dict(networks[0].state_dict())
    ours = build_optimizer(networks[0], config, CPU)
    theirs = torch.optim.SGD(networks[1].parameters(), lr=0.1, momentum=0.9, nesterov=nesterov, fused=True)
    x = torch.randn(4, 6)
    for _ in range(3):
        for network, optimizer in zip(networks, (ours, theirs), strict=True):
            optimizer.zero_grad()
            network(x).square().sum().backward()
            optimizer.step()
    assert all(map(torch.equal, networks[0].parameters(), networks[1].parameters()))


def test_the_average_is_torchs_but_for_integers_which_are_copied():
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    network = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    ours = [build_ema(network, 0.9) for _ in range(2)]
    theirs = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    assert ours[0].state_dict().keys() == theirs.state_dict().keys()
    for number in range(4):
        network(torch.randn(8, 6)).sum().backward()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1)
        ours[0].update_parameters(network)
        ours[1].update_parameters(network, torch.zeros(()) if number else None)
        theirs.update_parameters(network)
    counts = [average.module[1].num_batches_tracked.item() for average in (*ours, theirs)]
    assert counts[:2] == [4, 4] and counts[2] < 4  # 3.4 and less, rounded down each time
    for name, value in theirs.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(ours[0].state_dict()[name], value), name
            torch.testing.assert_close(ours[1].state_dict()[name], value)
    before = {name: value.clone() for name, value in ours[1].state_dict().items()}
    ours[1].update_parameters(network, torch.ones(()))
    assert small_runs.differences(ours[1].state_dict(), before) == []


def test_buffers_that_are_not_finite_are_put_back():
    norm = nn.BatchNorm1d(3)
    guard = Guard(norm, CPU)
    norm(torch.randn(4, 3))
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    guard.keep()
    norm(torch.full((4, 3), float("nan")))
    guard.put_back(torch.zeros(()))
    assert norm.running_mean.isnan().all() and norm.num_batches_tracked == 2
    guard.put_back(torch.ones(()))
    assert small_runs.differences(norm.state_dict(), before) == []
    guard.set(torch.tensor([1.0, 2.0]))
    assert guard.flag == 0
    guard.set(torch.tensor([1.0, float("inf")]))
    guard.set(torch.tensor([1.0, 2.0]))
    assert guard.flag == 1  # for good
