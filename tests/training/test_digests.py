"""Digests of a run's state, and the states that a run keeps."""

import hashlib
import time

import pytest
import torch
from torch import nn

import model
import ranks
import small_runs
from sasa.training import digests, environment
from sasa.training.files import kept_states

FLAGS = "--dataset DIGITS --name run --no-progress --device cpu --epochs 3 --batch-size 8 --ema 0.9 --save-minutes 0"


@pytest.fixture
def small(monkeypatch):
    small_runs.few_digits(monkeypatch, 24)
    monkeypatch.setattr(model, "build", lambda name, num_classes, stem, **options: ranks.Small(num_classes, None, True))


def test_a_digest_by_hand():
    """A line for each leaf: its path and value, or a tensor's dtype, shape and the SHA-256 of its bytes."""
    value = torch.tensor([[1.0, 2.0]])
    inner = hashlib.sha256(value.numpy().tobytes()).hexdigest()
    lines = [" {2}", '/a "x"', "/b [2]", f"/b/0 torch.float32 (1, 2) {inner}", "/b/1 null"]
    wanted = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digests.digest({"b": [value, None], "a": "x"}) == wanted


def test_layout_does_not_count_but_every_value_does():
    value = torch.randn(2, 3, 4, 4)
    same = value.contiguous(memory_format=torch.channels_last)
    assert digests.digest([value]) == digests.digest([same]) == digests.digest((value,))
    for other in (value.double(), value.flatten(), -value, value.flip(0)):
        assert digests.digest([value]) != digests.digest([other])
    assert digests.digest([torch.tensor(1)]) != digests.digest([1])
    assert digests.digest({"a": 1}) != digests.digest({"b": 1})
    assert len(digests.digest([torch.empty(0), torch.tensor(True), torch.ones(3, dtype=torch.bfloat16)])) == 64


def test_each_group_answers_for_its_own_part():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    ema = torch.optim.swa_utils.AveragedModel(net)

    def now(generators=(1,)):
        return digests.of_run(net, optimizer, None, ema, list(generators))

    before = now()
    assert tuple(before) == digests.GROUPS
    changes = {
        "buffers": lambda: net[1].running_mean.add_(1),
        "moving_average": lambda: ema.module[0].weight.data.add_(1),
        "optimizer": lambda: optimizer.param_groups[0].update(lr=0.2),
        "weights": lambda: net[0].weight.data.view(-1)[3].mul_(1.0000001),
    }
    for group, change in changes.items():
        change()
        after = now()
        assert [name for name in digests.GROUPS if after[name] != before[name]] == [group]
        before = after
    assert now([2])["generators"] != before["generators"]
    assert "moving_average" not in digests.of_run(net, optimizer, None, None, [])


def test_rows_hold_the_digests_of_the_kept_states(tmp_path, small):
    """--keep-states 2 of 3 epochs: the start and the second; each is what the log has the digest of."""
    assert small_runs.run(tmp_path, *FLAGS.split(), "--keep-states", "2") == 0
    folder = tmp_path / "run"
    assert [path.name for path in kept_states(folder).values()] == ["state-0000.pt", "state-0002.pt"]
    rows = small_runs.log_rows(folder)
    buffers = [name for name, _ in model.build("", 10, False).named_buffers()]
    state = torch.load(folder / "state-0002.pt", weights_only=True)
    assert (state["progress"]["epoch"], state["progress"]["batch"]) == (2, 0) and len(state["progress"]["rows"]) == 2
    assert digests.of_state(state, buffers) == rows[1]["digests"]
    assert all(tuple(row["digests"]) == digests.GROUPS and len(row["environment"]) == 64 for row in rows)
    summary = small_runs.json.loads((folder / "summary.json").read_text())
    assert summary["environment_digest"] == rows[0]["environment"] == environment.digest(summary["environment"])
    assert small_runs.run(tmp_path, *FLAGS.split(), "--overwrite", "--no-digest") == 0  # takes the kept ones away
    assert kept_states(folder) == {} and "digests" not in small_runs.log_rows(folder)[0]


def test_a_kept_state_is_gone_on_from_bitwise(tmp_path, small):
    assert small_runs.run(tmp_path, *FLAGS.split(), "--keep-states", "1") == 0
    wanted = small_runs.log_rows(tmp_path / "run")
    kept = tmp_path / "run" / "state-0001.pt"
    small_runs.scramble_generators()
    assert small_runs.run(tmp_path / "other", "--resume", str(kept), "--output-dir", str(tmp_path / "other")) == 0
    assert small_runs.log_rows(tmp_path / "other" / "run") == wanted


def test_a_state_that_cannot_be_kept_costs_no_run(tmp_path, small, monkeypatch, capsys):
    from sasa.training import saving

    save = saving.checkpoint.save

    def full_disk(state, folder, name="last.pt"):
        if name.startswith("state"):
            raise OSError("no space left")
        save(state, folder, name)

    monkeypatch.setattr(saving.checkpoint, "save", full_disk)
    assert small_runs.run(tmp_path, *FLAGS.split(), "--keep-states", "1") == 0
    assert "no space left; the run goes on without it" in capsys.readouterr().out


def test_the_environment_names_what_differs():
    now = environment.describe(torch.device("cpu"), None)
    assert now["kernel_build"] == "none" and now["threads"] == torch.get_num_threads()
    assert environment.differences(now, now) == []
    other = now | {"threads": 7, "torch": "1.0"}
    assert environment.differences(other, now) == [
        f"torch version was 1.0, is {torch.__version__}", f"thread count was 7, is {now['threads']}",
    ]  # fmt: skip
    assert environment.digest(other) != environment.digest(now)


@pytest.mark.parametrize("reason", [None, "no C compiler"])
def test_the_environment_names_a_kernel_only_where_it_runs(monkeypatch, reason):
    """Without a compiler a GPU's attention is computed by other code: with other bits."""
    pytest.importorskip("triton")
    monkeypatch.setattr(environment.torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(environment.triton_backend, "unusable", lambda: reason)
    build = environment.describe(torch.device("cuda"), "auto")["kernel_build"]
    assert build.startswith("triton ") if reason is None else build == "none"


@pytest.mark.slow
def test_the_digests_of_resnet26_take_less_than_a_fifth_of_a_second():
    """Weights, AdamW's two moments and the moving average: 133 MB. The best of a few, since others use the machine."""
    net = model.build("ResNet26", 10, small_images=True)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(net.parameters())
    optimizer.step()
    ema = torch.optim.swa_utils.AveragedModel(net)
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        digests.of_run(net, optimizer, None, ema, [])
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.2
