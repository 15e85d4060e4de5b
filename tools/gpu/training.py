"""Stages about training: the test suite, steps of whole networks, and short runs of train.py in every mode."""

import gc
import itertools
import shutil
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from config import resolve
from sasa.training.classification import loss_and_right
from sasa.training.network import build_network
from sasa.training.resume import RunSpec
from sasa.training.run import Run, assemble, prepare_machine, seeded
from sasa.training.step import QueuedStep, Requests, check_finite, train_step
from tools.gpu.stage import Lab, Stage, Unmet, checked

ROOT = Path(__file__).resolve().parents[2]
NETWORKS = ("ResNet50", "ResNet26")
KINDS = {
    "convolution": {"attention_stages": (), "stem": False},
    "attention": {"stem": False},
    "attention + stem": {"stem": True},
}
BATCH, SIDE, CLASSES = 128, 224, 1000
DRY = (2, 8, 10)
IMAGENET_IMAGES = 1_281_167
WARM_STEPS, TIMED_STEPS = 5, 20
CRASH_STEPS = 20


# ---- the tests ------------------------------------------------------------------------------------------------------


def tests(lab: Lab, stage: Stage) -> None:
    """pytest -m gpu, file by file."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    for path in gpu_test_files():
        whole = [*command, str(ROOT / path)]
        stage.unit(path, lambda whole=whole: {"result": last_line(checked(lab.shell(whole, stage.left)))})


def gpu_test_files() -> list[str]:
    """The files of tests that need a GPU, below the repository's root."""
    paths = (ROOT / "tests").rglob("test_*.py")
    return sorted(str(x.relative_to(ROOT)) for x in paths if "pytest.mark.gpu" in x.read_text(encoding="utf-8"))


def last_line(text: str) -> str:
    """The last line that is not empty."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")


# ---- steps of networks ----------------------------------------------------------------------------------------------


def steps(lab: Lab, stage: Stage) -> None:
    """Training steps without torch.compile."""
    _all_steps(lab, stage, is_compiled=False)


def compiled(lab: Lab, stage: Stage) -> None:
    """Training steps with torch.compile."""
    _all_steps(lab, stage, is_compiled=True)


def _all_steps(lab: Lab, stage: Stage, is_compiled: bool) -> None:
    for name, kind in itertools.product(NETWORKS[-1:] if lab.dry else NETWORKS, KINDS):
        for ema in (0.0, 0.9999):
            unit = f"{name} {kind}{', moving average' if ema else ''}"
            stage.unit(unit, partial(measure_step, lab, name, kind, ema, is_compiled))


def measure_step(lab: Lab, name: str, kind: str, ema: float, is_compiled: bool) -> dict:
    """images/s, peak memory, waits of the host in a step, and the share of the time that the GPU has nothing to do."""
    torch._dynamo.reset()  # else the ninth network that a process compiles would run uncompiled
    gc.collect()  # what the network before this one held would count as this one's memory
    run = make_run(lab, name, kind, ema, is_compiled)
    step, batch = training_step(run), run.global_batch
    for _ in range(0 if lab.dry else WARM_STEPS):
        step()
    if lab.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = lab.timer.steps(step, TIMED_STEPS)
    found = {"images_per_s": batch / statistics.median(seconds), "step_ms": 1e3 * statistics.median(seconds)}
    if lab.device.type == "cuda":
        found["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        found["waits"] = waits_of(step)
        found["idle_pct"] = idle_pct(step)
    return found


class SameBatch:
    """Data whose training set, as long as ImageNet's, is one batch on the device repeated."""

    def __init__(self, batch: int, side: int, classes: int, device: torch.device) -> None:
        images = torch.randn(batch, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
        self.pair: tuple[Tensor, Tensor] = images, torch.randint(classes, (batch,), device=device)
        self.train = self

    def __len__(self) -> int:
        return IMAGENET_IMAGES

    def steps_per_epoch(self, global_batch: int) -> int:
        """Whole ones."""
        return len(self) // global_batch

    def identity(self) -> dict:
        """Nothing: no checkpoint is written."""
        return {}


def make_run(lab: Lab, name: str, kind: str, ema: float, is_compiled: bool) -> Run:
    """A run as train.py sets one up by ImageNet's recipe, in bf16, without data on a disk."""
    batch, side, classes = DRY if lab.dry else (BATCH, SIDE, CLASSES)
    given = {"model_name": name, "form": "small" if lab.dry else "imagenet", "img_size": side, "batch_size": batch,
             "backend": lab.backend, "device": str(lab.device), "amp": "bf16", "ema": ema, **KINDS[kind]}  # fmt: skip
    config = resolve(given, "IMAGENET")
    device, amp = prepare_machine(config)
    model = seeded(lambda: build_network(config, classes), config, device)
    data, spec = SameBatch(batch, side, classes, device), RunSpec(config, Path(), {})
    run = assemble(Run, spec, config, data, model, device, amp, batch, is_compiled and not lab.dry)
    run.network.train()
    return run


def training_step(run: Run) -> Callable[[], None]:
    """The next step of a run, as train.py's loop does it: the figures of a guarded one are read a step late."""
    unread: list[QueuedStep] = []
    numbers = itertools.count()

    def step() -> None:
        queued = train_step(run, iter([run.data.pair]), next(numbers), Requests, loss_and_right)
        unread.append(queued)
        while len(unread) > queued.is_guarded:
            run.progress.skipped = check_finite(run, unread.pop(0).read())

    return step


def waits_of(step: Callable[[], object]) -> int:
    """How often the host waits for the device in one step, but for the event behind the last step's figures."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchron" in str(warning.message) for warning in caught)


def idle_pct(step: Callable[[], object], count: int = 5) -> float | None:
    """Share of the time between the first kernel's start and the last one's end in which none runs.

    None where the profiler has seen no kernel.
    """
    from torch.autograd import DeviceType

    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(count):
            step()
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation  # which spans the gaps of a graph
    )
    return idle_share(spans) if spans else None


def idle_share(spans: list[tuple[float, float]]) -> float:
    """Percent of the time from the first start to the last end that no span covers; spans are sorted by start."""
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(stop - max(start, end), 0.0)
        end = max(end, stop)
    return 100 * (1 - busy / (end - spans[0][0]))


# ---- short runs -----------------------------------------------------------------------------------------------------

RUNS = {
    "amp off": ["--amp", "off"],
    "amp bf16": ["--amp", "bf16"],
    "amp fp16": ["--amp", "fp16"],
    "deterministic": ["--deterministic"],
    "randaugment": ["--randaugment"],
    "compile": ["--compile"],
    "compile, bf16, moving average": ["--compile", "--amp", "bf16", "--ema", "0.9"],
    "compile, CUDA graphs": ["--compile", "--compile-mode", "reduce-overhead"],
    "lamb": ["--optimizer", "lamb"],
    "adamw, accumulate": ["--optimizer", "adamw", "--accumulate", "2"],
}
COMMON = ["--dataset", "DIGITS", "--stem", "--epochs", "2", "--batch-size", "64", "--attention-every", "0",
          "--save-minutes", "0", "--no-progress"]  # fmt: skip


def runs(lab: Lab, stage: Stage) -> None:
    """Twenty steps of train.py in every mode, a resume that must give the same bits, and two ranks."""
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in RUNS.items():
            stage.unit(name, partial(short_run, lab, stage, Path(folder), name, flags))
        stage.unit("resume", partial(resumed_run, lab, stage, Path(folder)))
        stage.unit("two ranks", partial(two_ranks, lab, stage, Path(folder)))


def train_command(lab: Lab, folder: Path, name: str, flags: list[str], max_steps: int = CRASH_STEPS) -> list[str]:
    """train.py with its arguments, for a run in `folder`."""
    where = ["--device", "cpu" if lab.dry else "cuda", "--output-dir", str(folder), "--name", name]
    return [str(ROOT / "train.py"), *COMMON, *where, "--max-steps", str(max_steps), *flags]


def short_run(lab: Lab, stage: Stage, folder: Path, name: str, flags: list[str]) -> dict:
    """The last line of a run of twenty steps.

    Raises:
        RuntimeError: it failed.
    """
    command = train_command(lab, folder, name.replace(", ", "-").replace(" ", "-"), flags)
    return {"result": last_line(checked(lab.shell([sys.executable, *command], stage.left)))}


def resumed_run(lab: Lab, stage: Stage, folder: Path) -> dict:
    """A run in two halves and one in one piece.

    Raises:
        RuntimeError: a run failed, or they end with different weights.
    """
    for name, parts in (("straight", [[]]), ("halves", [None, ["--resume"]])):
        shutil.rmtree(folder / name, ignore_errors=True)
        for flags in parts:
            steps = CRASH_STEPS if flags is not None else CRASH_STEPS // 2
            command = train_command(lab, folder, name, ["--deterministic", *(flags or [])], steps)
            checked(lab.shell([sys.executable, *command], stage.left))
    if lab.dry:
        return {"result": "commands only"}
    one, two = (torch.load(folder / name / "best.pt", weights_only=True)["model"] for name in ("straight", "halves"))
    different = [name for name in one if not torch.equal(one[name], two[name])]
    if different:
        raise RuntimeError(f"{len(different)} of {len(one)} weights differ after a resume, the first: {different[0]}")
    return {"result": f"{len(one)} weights bitwise equal"}


def two_ranks(lab: Lab, stage: Stage, folder: Path) -> dict:
    """A run on two GPUs.

    Raises:
        Unmet: there is one GPU.
        RuntimeError: the run failed.
    """
    if not lab.dry and torch.cuda.device_count() < 2:
        raise Unmet("needs two GPUs, there is one")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return {"result": last_line(checked(lab.shell([*launch, *train_command(lab, folder, "ranks", [])], stage.left)))}
