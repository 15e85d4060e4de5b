"""Runs of train.py, in this process. What is about the loop uses a network of 300 weights in place of ResNet26."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model
import preprocess
import small_runs
import train
from config import resolve
from sasa.training import checkpoint, classification
from sasa.training import run as runs
from sasa.training.device import set_fp32_precision
from sasa.training.lamb import Lamb
from sasa.training.run import describe
from tiny_runs import BASE, Tiny, TinyWithNorm, go, model_of, read, spoiled_gradient, spoiled_loss

LOG_KEYS = {"epoch", "step", "train_loss", "train_top1_pct", "val_loss", "val_top1_pct", "val_top5_pct", "lr",
            "images_per_s", "epoch_s", "peak_mem_mib", "digests", "environment"}  # fmt: skip
SUMMARY_KEYS = {"test_top1_pct", "test_top5_pct", "test_balanced_pct", "test_loss", "test_images", "parameters",
                "flops_per_image", "epochs", "steps", "seconds", "save_seconds", "selected", "bad_images",
                "data_changes", "device", "torch", "environment", "environment_digest"}  # fmt: skip


def first_batches(run, count: int = 1) -> list:
    batches = run.batches()
    return [next(batches) for _ in range(count)]


# ---- what a run leaves ----------------------------------------------------------------------------------------------


def test_the_files_of_a_run_and_their_keys(tmp_path, tiny, capsys):
    folder = go(tmp_path)
    out, error = capsys.readouterr()
    names = {path.name for path in folder.iterdir() if not path.name.startswith("events.out.tfevents.")}
    files = ("config.json", "log.jsonl", "summary.json", "last.pt", "previous.pt", "best.pt", "images.jsonl.gz")
    assert names == {*files, ".run.lock"}
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [set(row) for row in rows] == [LOG_KEYS] * 2
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 10), (2, 20)]
    assert all(row["images_per_s"] > 0 and row["epoch_s"] > 0 and row["peak_mem_mib"] > 0 for row in rows)
    summary = read(folder)
    assert set(summary) == SUMMARY_KEYS
    assert (summary["epochs"], summary["steps"], summary["test_images"], summary["bad_images"]) == (2, 20, 12, 0)
    assert summary["parameters"] == sum(p.numel() for p in Tiny(10).parameters())
    assert summary["test_top1_pct"] == rows[-1]["val_top1_pct"] and summary["test_loss"] == rows[-1]["val_loss"]
    assert summary["test_top1_pct"] <= summary["test_top5_pct"] <= 100
    config = read(folder, "config.json")
    assert (config["form"], config["amp"], config["img_size"], config["dataset"]) == ("small", "off", 8, "DIGITS")
    # the terminal: what is about to run, one line an epoch, the end
    for word in ("CPU", "40 train and 12 test", "ResNet26", "parameters", "FLOPs", "default", str(folder),
                 f"tensorboard --logdir {tmp_path}", "test split's"):  # fmt: skip
        assert word in out, word
    lines = out.splitlines()
    assert len([line for line in lines if line.startswith("epoch ")]) == 2
    assert lines[-1].startswith(f"test top-1 {summary['test_top1_pct']:.2f}%") and "summary.json" in lines[-1]
    assert error == ""


def test_without_holdout_the_last_epoch_is_kept_and_summary_says_so(tmp_path, tiny):
    folder = go(tmp_path)
    assert "last epoch" in read(folder)["selected"]
    assert torch.load(folder / "best.pt", weights_only=True)["epoch"] == 2
    assert small_runs.differences(model_of(folder), model_of(folder, "best.pt")) == []


def test_with_holdout_the_best_epoch_is_kept_and_the_test_set_is_scored_once(tmp_path, tiny, monkeypatch):
    """Epoch 1 of 3 is made the best; 40 - 8 images, 8 steps an epoch."""
    original, scores, sizes = classification.evaluate, iter([50.0, 40.0, 50.0]), []

    def evaluate(model, split, *args, **options):
        result = original(model, split, *args, **options)
        sizes.append(len(split))
        if len(split) == 8:
            result.top1_pct = next(scores)
        return result

    monkeypatch.setattr(classification, "evaluate", evaluate)
    folder = go(tmp_path, "--holdout 8 --epochs 3")
    assert sizes == [8, 8, 8, 12]
    assert "50.00%" in read(folder)["selected"] and "epoch 1" in read(folder)["selected"]
    best = torch.load(folder / "best.pt", weights_only=True)
    assert (best["epoch"], best["selected"]) == (1, read(folder)["selected"])
    monkeypatch.setattr(classification, "evaluate", original)
    after_one = go(tmp_path / "one", "--holdout 8 --epochs 3 --max-steps 8")
    assert small_runs.differences(best["model"], model_of(after_one)) == []
    assert small_runs.differences(best["model"], model_of(folder)) != []
    assert read(folder)["test_loss"] == read(after_one)["test_loss"]


def test_a_part_of_the_training_images_survives_a_resume_and_is_not_needed_to_evaluate(tmp_path, tiny, monkeypatch):
    part = "--train-images 20 --holdout 4"
    straight = go(tmp_path / "a", part)
    cut = go(tmp_path / "b", part, "--max-steps 3")
    go(tmp_path / "b", part, "--resume")
    assert small_runs.log_rows(cut) == small_runs.log_rows(straight)
    assert small_runs.log_rows(cut)[-1]["step"] == 2 * (16 // 4)
    assert small_runs.run(tmp_path / "b", *BASE.split(), "--train-images", "21", "--holdout", "4", "--resume") == 2
    small_runs.few_digits(monkeypatch, train_images=10)  # fewer than the run had
    assert small_runs.run(tmp_path / "b", "--evaluate", str(cut / "best.pt")) == 0


def test_max_steps_ends_the_run_as_its_last_epoch(tmp_path, tiny):
    folder = go(tmp_path, "--max-steps 3")
    assert read(folder)["steps"] == 3 and read(folder)["epochs"] == 0
    assert [row["step"] for row in small_runs.log_rows(folder)] == [3]
    straight = small_runs.log_rows(go(tmp_path / "whole"))
    assert small_runs.log_rows(folder)[0]["lr"] != straight[0]["lr"]
    last = torch.load(folder / "last.pt", weights_only=True)["progress"]
    assert (last["step"], last["batch"], last["epoch"]) == (3, 3, 0)
    assert (folder / "best.pt").exists()


def test_the_moving_average_is_what_is_scored_and_kept(tmp_path, tiny):
    folder = go(tmp_path, "--ema 0.9")
    state = torch.load(folder / "last.pt", weights_only=True)
    average = {k.removeprefix("module."): v for k, v in state["ema"].items() if k.startswith("module.")}
    assert small_runs.differences(average, model_of(folder, "best.pt")) == []
    assert small_runs.differences(average, state["model"]) != []


# ---- one step -------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_smoothed_cross_entropy(tmp_path, tiny, seen):
    folder = go(tmp_path, "--label-smoothing 0.3 --max-steps 1")
    network = Tiny(10)
    network.load_state_dict(seen.first[0])
    seen[0].progress = checkpoint.Progress(global_batch=4)
    ((images, labels),) = first_batches(seen[0])
    log_p = network(images).log_softmax(1)
    wanted = -(0.7 * log_p.gather(1, labels[:, None]).mean() + 0.3 * log_p.mean())
    assert small_runs.log_rows(folder)[0]["train_loss"] == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("mixing", ["--mixup 0.4", "--cutmix 1"])
def test_mixed_images_have_soft_targets(tmp_path, tiny, seen, mixing):
    folder = go(tmp_path, mixing, "--label-smoothing 0 --max-steps 1")
    network = Tiny(10)
    network.load_state_dict(seen.first[0])
    seen[0].progress = checkpoint.Progress(global_batch=4)
    ((images, targets),) = first_batches(seen[0])
    assert targets.shape == (4, 10) and ((targets > 0).sum(1) == 2).any()
    wanted = -(targets * network(images).log_softmax(1)).sum(1).mean()
    assert small_runs.log_rows(folder)[0]["train_loss"] == pytest.approx(wanted.item(), rel=1e-5)


def test_two_batches_of_four_are_one_of_eight(tmp_path, tiny, seen):
    """Loss, gradient norm's effect and weights after 3 steps, but for rounding."""
    flags = "--lr 0.1 --optimizer sgd --clip-grad 1 --max-steps 3 --batch-size"
    whole, parts = go(tmp_path / "a", flags, "8"), go(tmp_path / "b", flags, "4 --accumulate 2")
    a, b = small_runs.log_rows(whole)[0], small_runs.log_rows(parts)[0]
    assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5) and a["step"] == b["step"] == 3
    assert small_runs.differences(seen.first[0], model_of(whole)) != []
    for name, value in model_of(whole).items():
        torch.testing.assert_close(value, model_of(parts)[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("limit", [0.001, 0.0])
def test_the_gradient_is_clipped_to_its_norm(tmp_path, tiny, seen, limit):
    """One plain SGD step with rate 1 moves the weights by the clipped gradient: its norm is the limit."""
    flags = f"--optimizer sgd --momentum 0 --weight-decay 0 --lr 1 --warmup-epochs 0 --max-steps 1 --clip-grad {limit}"
    after = model_of(go(tmp_path, flags))
    moved = torch.cat([(after[name] - before).flatten() for name, before in seen.first[0].items()]).norm().item()
    assert moved == pytest.approx(limit, rel=1e-3) if limit else moved > 0.01


@pytest.mark.parametrize("flags", ["--optimizer sgd", "--optimizer adamw", "--randaugment", "--mixup 0.2 --cutmix 1",
                                   "--recipe port", "--recipe paper", "--optimizer lamb"])  # fmt: skip
def test_these_flags_train_and_change_the_result(tmp_path, tiny, seen, flags):
    other = {"--optimizer sgd": "--optimizer adamw", "--optimizer adamw": "--optimizer sgd"}.get(flags, "")
    plain = f"--max-steps 2 {other}"
    folder = go(tmp_path / "with", flags, "--max-steps 2")
    assert small_runs.differences(model_of(go(tmp_path / "without", plain)), model_of(folder)) != []
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "lamb": Lamb}[read(folder, "config.json")["optimizer"]]
    assert type(seen[0].optimizer) is kind


def test_the_papers_batch_norm_and_average(tmp_path, tiny, seen, monkeypatch):
    monkeypatch.setattr(model, "build", lambda name, num_classes, stem, **options: TinyWithNorm(num_classes))
    flags = BASE.replace("--ema 0", "--recipe paper --max-steps 1 --overwrite")
    assert small_runs.run(tmp_path, *flags.replace("--epochs 2", "--epochs 5000").split()) == 0
    assert seen[0].model.bn.momentum == 1e-4
    assert seen[0].eval_model is seen[0].ema.module
    assert small_runs.run(tmp_path, *flags.split()) == 0
    saved = json.loads((seen[1].folder / "config.json").read_text())["ema"]
    assert (seen[0].config.ema, seen[1].config.ema, saved) == (0.9999, 0.75, 0.75)  # 20 steps: 1 - 5 / 20


def test_the_warm_up_and_rate_of_each_step_reach_the_optimizer(tmp_path, tiny, monkeypatch):
    rates = []
    original = train.check_finite

    def check_finite(run, step):
        rates.append((step.lr, *{group["lr"] for group in run.optimizer.param_groups}))
        return original(run, step)

    monkeypatch.setattr(train, "check_finite", check_finite)
    folder = go(tmp_path, "--lr 0.5 --warmup-epochs 1 --max-steps 11")
    assert [a for a, _ in rates[:10]] == pytest.approx([0.05 * i for i in range(1, 11)])
    assert all(a == b for a, b in rates)
    assert [row["lr"] for row in small_runs.log_rows(folder)] == [rates[9][0], rates[10][0]]


# ---- precision, layout, compilation ---------------------------------------------------------------------------------


def test_bf16_on_the_cpu_is_near_fp32(tmp_path, tiny):
    losses = [small_runs.log_rows(go(tmp_path / amp, "--amp", amp))[-1]["train_loss"] for amp in ("off", "bf16")]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)
    assert read(tmp_path / "bf16/run", "config.json")["amp"] == "bf16"


def test_channels_last_is_used_and_changes_nothing_but_rounding(tmp_path, tiny, seen, monkeypatch):
    layouts, original = [], Tiny.forward

    def forward(self, x):
        if self.training:
            layouts.append((x, self.conv.weight.detach()))
        return original(self, x)

    monkeypatch.setattr(Tiny, "forward", forward)
    plain, last = go(tmp_path / "a", "--no-channels-last"), go(tmp_path / "b")
    assert all(value.is_contiguous() for value in layouts[0])
    for value in layouts[-1]:
        assert value.is_contiguous(memory_format=torch.channels_last) and not value.is_contiguous()
    for name, value in model_of(plain).items():
        torch.testing.assert_close(value, model_of(last)[name], rtol=1e-3, atol=1e-5)


def test_precision_of_products_and_cudnns_choice_reach_torch(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    try:
        go(tmp_path / "a", "--matmul-precision high --max-steps 1")
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.benchmark
        assert torch.backends.cudnn.allow_tf32
    finally:
        set_fp32_precision("highest")
    go(tmp_path / "b", "--no-cudnn-benchmark --max-steps 1")
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.benchmark
    assert not torch.backends.cudnn.allow_tf32  # by itself PyTorch computes fp32 convolutions in TF32


def test_what_a_gpu_computes_by_is_printed(tmp_path, tiny, seen, monkeypatch, capsys):
    go(tmp_path, "--matmul-precision high --max-steps 1")
    set_fp32_precision("highest")
    config = dataclasses.replace(seen[0].config, compile=True, compile_mode="max-autotune", amp="bf16")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(runs, "keep_builds", lambda: "/the/cache")
    for benchmark, choice in ((True, "fastest"), (False, "own")):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
        capsys.readouterr()
        describe(dataclasses.replace(seen[0], config=config, device=torch.device("cuda", 0)))
        out = capsys.readouterr().out
        assert f"A GPU, bf16, fp32 products and convolutions at high precision, cuDNN's {choice} choice of " in out
        assert "compiled  in mode max-autotune; builds are kept in /the/cache" in out


def test_torch_compiles_around_ddp(monkeypatch):
    """So that it cuts the network where gradients are summed, and sums overlap with the rest of backward."""
    network, config = nn.Linear(2, 2), resolve({"compile": True, "compile_mode": "max-autotune"}, "DIGITS")
    found = []
    monkeypatch.setattr(runs.distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(runs, "DistributedDataParallel", lambda inner, **options: ("ddp", inner, options))
    monkeypatch.setattr(runs, "keep_builds", lambda: found.append("kept"))
    monkeypatch.setattr(torch, "compile", lambda module, mode: found.append((module, mode)) or "compiled")
    assert runs.as_trained(network, config, torch.device("cuda", 0), True) == "compiled"
    kept, ((name, inner, options), mode) = found
    assert (kept, name, mode) == ("kept", "ddp", "max-autotune") and inner is network
    assert options["device_ids"] == [torch.device("cuda", 0)] and not options["broadcast_buffers"]
    assert runs.as_trained(network, config, torch.device("cuda", 0), False)[:2] == ("ddp", network)


def test_deterministic_reaches_torch(tmp_path, tiny, seen):
    try:
        go(tmp_path, "--deterministic --max-steps 1")
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)


def test_compile_trains_the_compiled_network_and_keeps_plain_names(tmp_path, tiny, monkeypatch):
    steps = []

    class Compiled(nn.Module):
        def __init__(self, inner, mode):
            super().__init__()
            self._orig_mod = inner
            assert mode == "reduce-overhead"

        def forward(self, x):
            steps.append(1)
            return self._orig_mod(x)

    monkeypatch.setattr(torch, "compile", Compiled)
    folder = go(tmp_path, "--compile --compile-mode reduce-overhead --max-steps 3")
    assert len(steps) == 3  # evaluation takes the network itself
    assert model_of(folder).keys() == Tiny(10).state_dict().keys()
    assert small_runs.differences(model_of(folder), model_of(go(tmp_path / "plain", "--max-steps 3"))) == []


@pytest.mark.slow
def test_compile_of_the_real_network(tmp_path, monkeypatch):
    small_runs.few_digits(monkeypatch)
    flags = "--max-steps 2 --lr 1e-3 --kernel-size 3 --backend reference"
    compiled, plain = go(tmp_path / "a", flags, "--compile"), go(tmp_path / "b", flags)
    a, b = small_runs.log_rows(compiled)[0], small_runs.log_rows(plain)[0]
    assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-3)


# ---- not finite -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spoil", "what"), [(spoiled_loss, "the loss is nan"), (spoiled_gradient, "gradient's norm")])
def test_what_is_not_finite_stops_the_run_before_the_update(tmp_path, tiny, seen, monkeypatch, capsys, spoil, what):
    good = go(tmp_path / "good", "--max-steps 2 --warmup-epochs 1 --lr 0.01")
    monkeypatch.setattr(Tiny, "spoil", staticmethod(spoil))
    capsys.readouterr()
    flags = [*BASE.split(), "--save-minutes", "1e-9", "--warmup-epochs", "1", "--lr", "0.01"]
    assert small_runs.run(tmp_path, *flags) == 1
    error = capsys.readouterr().err
    last_loss = torch.load(good / "last.pt", weights_only=True)["progress"]["last_loss"]
    for words in (what, "step 3,", "epoch 1", "rate 0.003", f"last finite loss {last_loss:.4f}", "--lr"):
        assert words in error, words
    assert "Traceback" not in error and error.count("\n") == 1
    assert small_runs.differences(dict(seen[1].model.state_dict()), model_of(good)) == []  # in memory and on the disk
    assert small_runs.differences(model_of(tmp_path / "run"), model_of(good)) == []
    assert not (tmp_path / "run/summary.json").exists()


# ---- the real network -----------------------------------------------------------------------------------------------


def test_the_main_commands_network_takes_a_step(tmp_path, monkeypatch):
    small_runs.few_digits(monkeypatch)
    folder = go(tmp_path, "--stem --max-steps 2 --epochs 1")
    assert "stem.0.emb_mix" in model_of(folder, "best.pt")
    assert read(folder, "config.json")["form"] == "small"


def test_the_imagenet_form_takes_a_step(tmp_path, monkeypatch, capsys):
    small_runs.few_digits(monkeypatch)
    folder = go(tmp_path, "--stem --form imagenet --img-size 64 --max-steps 1 --batch-size 2")
    assert "imagenet form" in capsys.readouterr().out
    assert read(folder, "config.json")["form"] == "imagenet"
    assert preprocess.load(dataset="DIGITS", img_size=64)[0].image_size == 64


def test_images_above_64_pixels_get_the_imagenet_form(tmp_path, tiny):
    assert read(go(tmp_path / "a", "--img-size 65 --max-steps 1"), "config.json")["form"] == "imagenet"
    assert read(go(tmp_path / "b", "--img-size 64 --max-steps 1"), "config.json")["form"] == "small"


def test_a_small_network_learns_the_digits(tmp_path, monkeypatch):
    """200 images of 10 classes learned well above chance: the loop's parts work together."""
    small_runs.few_digits(monkeypatch, 200, 60)
    monkeypatch.setattr(model, "build", lambda name, num_classes, stem, **options: TinyWithNorm(num_classes))
    folder = go(tmp_path, "--epochs 8 --lr 0.02 --optimizer adamw")
    assert read(folder)["test_top1_pct"] > 40
    losses = [row["train_loss"] for row in small_runs.log_rows(folder)]
    assert losses[-1] < 0.6 * losses[0]
    assert F.cross_entropy(torch.zeros(1, 10), torch.zeros(1, dtype=torch.long)).item() > losses[-1]
