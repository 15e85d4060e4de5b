"""From a command to a run: which configuration, folder and state, then device, data, network and optimizer."""

import dataclasses
import json
import math
import os
import random
import time
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import preprocess
from attention import LocalAttention2d
from config import SIDES, Config, ConfigError, rate_factor, resolve
from preprocess import DataInfo
from sasa.analysis.flops import count_flops, count_parameters
from sasa.training import checkpoint, distributed
from sasa.training import device as memory
from sasa.training.checkpoint import BEST, LAST, PREVIOUS, Progress
from sasa.training.cli import Command
from sasa.training.monitor import Monitor, write_json
from sasa.training.network import build_network
from sasa.training.optim import build_ema, build_optimizer, ema_decay, set_batch_norm_momentum
from sasa.training.signals import StopRequest
from sasa.training.sync_batchnorm import sync_batch_norms

SMALL_FORM_LIMIT = 64  # pixels: images up to this side get the small form of the network
RUN_FILES = (LAST, PREVIOUS, BEST, "config.json", "log.jsonl", "summary.json")
AMP_NAMES = {None: "off", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass
class Data:
    info: DataInfo
    train: Any
    holdout: Any  # None without --holdout
    test: Any

    @property
    def splits(self) -> list:
        return [split for split in (self.train, self.holdout, self.test) if split is not None]

    @property
    def val(self) -> Any:
        """What the epochs are watched on: the held-out images, else the test split."""
        return self.test if self.holdout is None else self.holdout

    def close(self) -> None:
        """Ends the workers: an abandoned epoch's cannot be ended once the garbage collector has met it."""
        for split in self.splits:
            if isinstance(split, preprocess.FolderData):
                split.close()


@dataclass
class Run:
    """Everything that trains; `network` is `model`, compiled where asked for and wrapped by DDP on several ranks."""

    config: Config
    folder: Path
    device: torch.device
    data: Data
    model: nn.Module
    network: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    ema: nn.Module | None
    autocast: Any
    progress: Progress
    best: dict[str, Tensor] | None = None  # weights that the held-out images selected
    monitor: Monitor | None = None
    stop: StopRequest = field(default_factory=StopRequest)
    saved_at: float = field(default_factory=time.monotonic)
    save_failures: int = 0  # in a row
    save_seconds: float = 0.0  # spent on saves by this process
    overwrite: bool = False  # the folder's old run is removed once this one is known to start
    told: set[str] = field(default_factory=set)  # skipped images that were named already
    stopping: bool = False  # a rank was asked to stop: known to all from the same step on
    save_due: bool = False  # by the main rank's clock, known to all from the same step on

    @property
    def scored_model(self) -> nn.Module:
        """The network that is evaluated and kept: the moving average where there is one."""
        return self.model if self.ema is None else self.ema.module

    @property
    def step_images(self) -> int:
        """Images of a step over all ranks."""
        return min(self.progress.global_batch, len(self.data.train))

    @property
    def steps_per_epoch(self) -> int:
        return self.data.train.steps_per_epoch(self.step_images)

    @property
    def accumulate(self) -> int:
        """Batches a step of this rank: the run's own, or on fewer ranks as many as keep each within --batch-size."""
        return math.ceil(self.progress.global_batch / (self.config.batch_size * distributed.world_size()))

    def batch_norm_buffers(self) -> list[Tensor]:
        """Of the network and of its moving average."""
        models = [self.model] if self.ema is None else [self.model, self.ema]  # in the same order on every rank
        return [buffer for model in models for buffer in model.buffers()]


def plan(command: Command) -> tuple[Config, Path, dict[str, Any] | None]:
    """The run's Config, its folder, and the state to go on from (None: from step 0). For the main rank."""
    given = without_auto(command.given)
    if command.resume:
        state = checkpoint.load_run(Path(command.resume))
        folder = (
            Path(given.get("output_dir", "runs"), given["name"]) if "name" in given else Path(command.resume).parent
        )
        return resumed_config(state["config"], given), folder, state
    config = resolve(given, given.get("dataset") or auto_dataset(given), distributed.world_size())
    folder = Path(config.output_dir, config.name or config.default_name())
    if command.resume is None:
        refuse_other_run(folder, command.overwrite)
        return config, folder, None
    found = checkpoint.newest(folder)
    if found is None:
        print(f"--resume: no checkpoint was ever written to {folder}: starting at step 0")
        if (folder / "config.json").exists():
            config = resumed_config(read_config(folder / "config.json"), given)
        return config, folder, None
    state, path, problems = found
    for problem in problems:
        print(f"--resume: {problem}: using {path.name}, the whole one before it")
    if path.name == PREVIOUS and (folder / LAST).exists():  # the next save must not put a damaged file in its place
        (folder / LAST).replace(folder / f"damaged-{LAST}")
    return resumed_config(state["config"], given), folder, state


def without_auto(given: dict[str, Any]) -> dict[str, Any]:
    """The flags whose value is not their default, "auto"."""
    automatic = {f.name for f in dataclasses.fields(Config) if f.default == "auto"}
    return {key: value for key, value in given.items() if not (key in automatic and value == "auto")}


def read_config(path: Path) -> dict[str, Any]:
    """Raises ConfigError for a damaged file."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: damaged ({error}): --overwrite starts anew") from error


def resumed_config(saved: dict[str, Any], given: dict[str, Any]) -> Config:
    """The saved configuration with what the command line may change.

    Raises:
        ConfigError: flags of the command line that would change the result.
    """
    config = dataclasses.replace(Config.from_dict(saved), **{"max_steps": None} | given)
    changed = checkpoint.changed_keys(saved, config)
    if changed:
        raise ConfigError(f"--resume: the run was started with another configuration: {'; '.join(changed)}")
    return config


def auto_dataset(given: dict[str, Any]) -> str:
    has_gpu = torch.cuda.is_available() and given.get("device") != "cpu"
    name, reason = preprocess.resolve_auto(given.get("data_dir", "datasets"), has_gpu)
    print(f"--dataset auto: {name}, {reason}")
    return name


def refuse_other_run(folder: Path, overwrite: bool) -> None:
    """A folder that holds a run is not trained into without --overwrite. Raises ConfigError."""
    if held_files(folder) and not overwrite:
        raise ConfigError(
            f"{folder} already holds a run: --resume goes on with it, --overwrite replaces it, --name names another"
        )


def held_files(folder: Path) -> list[Path]:
    """The files of a run that the folder holds. Raises ConfigError where it cannot be looked into."""
    try:
        return [folder / name for name in RUN_FILES if (folder / name).exists()]
    except OSError as error:
        raise ConfigError(f"--output-dir, --name: {folder} cannot be written to: {error.strerror}") from error


def claim_folder(run: Run) -> None:
    """The folder is this run's from here on: with --overwrite the old run's files go; config.json is written."""
    if run.overwrite:
        for path in held_files(run.folder) + list(run.folder.glob("events.out.tfevents.*")):
            path.unlink()
    write_json(run.folder / "config.json", run.config.to_dict())


def pick_device(name: str) -> torch.device:
    """Of several ranks, each takes the GPU of its own number. Raises ConfigError where there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if distributed.several() and name.startswith("cuda"):
        if name != "cuda":
            raise ConfigError(f"--device {name}: every rank takes a GPU of its own; allowed are auto, cpu, cuda")
        name = f"cuda:{distributed.local_rank()}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: allowed are auto, cpu, cuda, cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: allowed are auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def pick_amp(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype of mixed precision, None for none. Raises ConfigError where the device has not got it."""
    has_bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported()
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and has_bf16 else None
    if name == "fp16" and device.type != "cuda":
        raise ConfigError(f"--amp fp16: needs a CUDA device, this run is on {device.type}; allowed here are off, bf16")
    if name == "bf16" and not has_bf16:
        raise ConfigError("--amp bf16: this GPU has no bfloat16; allowed here are off, fp16")
    return next(dtype for dtype, amp_name in AMP_NAMES.items() if amp_name == name)


def load_data(config: Config, device: torch.device) -> Data:
    """On the main rank first, which downloads what is missing."""
    holdout = config.holdout if config.holdout < 1 else int(config.holdout)
    evaluation = {"eval_size": config.eval_size, "eval_interpolation": config.eval_interpolation}
    evaluation["eval_crop"] = config.eval_crop
    usual = {"eval_size": None, "eval_crop": 0.875 if SIDES[config.dataset] is None else 1.0}
    usual["eval_interpolation"] = "bilinear"
    evaluation = {key: value for key, value in evaluation.items() if value != usual[key]}
    load = partial(
        preprocess.load, dataset=config.dataset, data_dir=config.data_dir, img_size=config.img_size,
        train_images=config.train_images, holdout=holdout, seed=config.seed, skip_bad_images=config.skip_bad_images,
        num_workers=config.num_workers, device=device, **evaluation,
    )  # fmt: skip
    return Data(*distributed.main_first(load))


def check_batch(config: Config, data: Data) -> None:
    """Raises ConfigError where batch norm would meet one value a channel: one image whose last map is one pixel."""
    ranks = distributed.world_size()
    images = min(config.batch_size, len(data.train) // (config.accumulate * ranks))
    if config.sync_bn:
        images *= ranks
    side = math.ceil(data.info.image_size / (8 if config.form == "small" else 32))
    if images == 1 and side == 1:
        raise ConfigError(
            f"--batch-size {config.batch_size}: batch norm needs 2 images at a time where the last map is one pixel, "
            f"as of {config.img_size}x{config.img_size} images; allowed is a larger batch or a larger --img-size"
        )


def set_up(config: Config, folder: Path, global_batch: int = 0) -> Run:
    """Device, data, network and optimizer of a run, and its folder; nothing in the folder is changed yet.

    global_batch: images of a step over all ranks, of a run that goes on; 0: --batch-size * --accumulate on each rank.
    """
    device, amp = distributed.together(partial(pick_machine, config))
    if device.type == "cpu":
        memory.keep_freed()
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses
        torch.use_deterministic_algorithms(True)
    distributed.from_main(partial(make_folder, folder))
    data = load_data(config, device)
    global_batch = global_batch or config.batch_size * config.accumulate * distributed.world_size()
    steps = config.epochs * data.train.steps_per_epoch(global_batch)
    config = dataclasses.replace(
        config, form=form_of(config, data.info), img_size=data.info.image_size, amp=AMP_NAMES[amp], name=folder.name,
        ema=ema_decay(config, steps),
    )  # fmt: skip
    model = distributed.together(partial(make_network, config, data, device))
    run = Run(
        config, folder, device, data, model,
        network=parallel(torch.compile(model) if config.compile else model, device),
        optimizer=build_optimizer(model, config, device),
        scaler=torch.amp.GradScaler() if amp is torch.float16 else None,
        ema=build_ema(model, config.ema),
        autocast=partial(torch.autocast, device.type, dtype=amp, enabled=amp is not None),
        progress=Progress(global_batch=global_batch),
    )  # fmt: skip
    if distributed.is_main():
        describe(run)
    return run


def pick_machine(config: Config) -> tuple[torch.device, torch.dtype | None]:
    device = pick_device(config.device)
    return device, pick_amp(config.amp, device)


def make_network(config: Config, data: Data, device: torch.device) -> nn.Module:
    """The network as it is trained, with the same weights on every rank."""
    check_batch(config, data)
    random.seed(config.seed)
    torch.manual_seed(config.seed)
    model = build_network(config, data.info.num_classes).to(device)
    set_batch_norm_momentum(model, config.bn_momentum)
    if config.sync_bn:
        model = sync_batch_norms(model, device)
    return model.to(memory_format=torch.channels_last) if config.channels_last else model


def parallel(network: nn.Module, device: torch.device) -> nn.Module:
    """The network whose gradients are the mean over the ranks.

    Buffers are copied where they matter, before an evaluation, instead of before each forward.
    """
    if not distributed.several():
        return network
    devices = [device] if device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its new name is not known to the oldest torch served here
        return DistributedDataParallel(
            network, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
        )


def form_of(config: Config, info: DataInfo) -> str:
    if config.form != "auto":
        return config.form
    return "small" if info.image_size <= SMALL_FORM_LIMIT else "imagenet"


def make_folder(folder: Path) -> None:
    """Raises ConfigError where the folder cannot be written to: before an hour of training, not after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"--output-dir, --name: {folder} cannot be written to: {error.strerror}") from error


def describe(run: Run) -> None:
    """What is about to run, for a person."""
    config, info, cpu = run.config, run.data.info, run.device.type == "cpu"
    device = f"CPU, {torch.get_num_threads()} threads" if cpu else torch.cuda.get_device_name(run.device)
    precision = "fp32" if config.amp == "off" else config.amp
    val = f"{info.holdout_size} held out" if info.holdout_size else "none held out: val figures are the test split's"
    stages = sum(isinstance(module, LocalAttention2d) for module in run.model.modules())
    batch, ranks = run.progress.global_batch, distributed.world_size()
    factor = rate_factor(config, batch)
    scaling = f"a recipe's rate is scaled by {factor:g} here"
    average = f", moving average of the weights {config.ema:g}" if config.ema else ""
    flops = count_flops(run.model, info.image_size).total
    print(f"device    {device}, {precision}, torch {torch.__version__}")
    if ranks > 1:
        norm = "over all ranks" if config.sync_bn else "of each rank's own batch"
        share = f"{run.accumulate} x {batch / ranks / run.accumulate:g} images a step"
        print(f"ranks     {ranks}, each {share}; batch norm {norm}")
    print(f"data      {info.name}: {info.train_size} train and {info.test_size} test images, {val}")
    print(f"          {info.num_classes} classes, fed at {info.image_size}x{info.image_size}")
    print(f"model     {config.model_name}, {'attention' if config.stem else 'convolution'} stem, {config.form} form")
    print(f"          {stages} attention layers, {count_parameters(run.model):,} parameters, {flops:,} FLOPs an image")
    print(f"recipe    {config.recipe}: {config.epochs} epochs of {run.steps_per_epoch} steps of {batch} images")
    print(f"          {config.optimizer}, peak rate {config.lr:g} ({scaling}), seed {config.seed}{average}")
    print(f"folder    {run.folder}; watch it with: tensorboard --logdir {run.folder.parent}", flush=True)


def initialise(run: Run, path: Path) -> None:
    """--init-from: the weights of a checkpoint, and a list of what was not taken."""
    weights = distributed.from_main(lambda: checkpoint.weights_of(checkpoint.load(path)))
    lines = distributed.together(lambda: checkpoint.transfer_weights(run.model, weights))
    if distributed.is_main():
        print(f"--init-from {path}: weights taken, {len(lines)} exceptions")
        for line in lines:
            print(f"  {line}")
    run.ema = build_ema(run.model, run.config.ema)
