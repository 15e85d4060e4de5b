"""A run that is ready to train: device, data, network and optimizer of a specification (resume.py)."""

import dataclasses
import math
import os
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import preprocess
from attention import AttentionStem, LocalAttention2d
from config import Config, ConfigError, Settings, nominal_batch, rate_factor, rate_for
from preprocess import AugmentConfig, DataError, DataInfo, FolderData, Split
from sasa.analysis.flops import count_flops, count_parameters
from sasa.data.batches import own_pieces
from sasa.data.fingerprint import differences
from sasa.data.transfer import to_device
from sasa.training import checkpoint, class_weights, digests, distributed, drop_path, environment
from sasa.training.checkpoint import Identity, Progress
from sasa.training.compiling import check_accumulation, keep_builds
from sasa.training.device import (
    AMP_NAMES,
    autocast_in,
    check_bf16_gradients,
    decoding_processes,
    keep_freed,
    pick_amp,
    pick_device,
    set_fp32_precision,
)
from sasa.training.distributed import SharedError
from sasa.training.drop_path import DropPath
from sasa.training.files import new_run_id
from sasa.training.guard import Guard
from sasa.training.image_list import SPLITS, Listed
from sasa.training.network import build_network
from sasa.training.optim import (
    MovingAverage,
    build_ema,
    build_optimizer,
    ema_decay,
    learning_rate,
    set_batch_norm_momentum,
)
from sasa.training.resume import RunSpec, form_of
from sasa.training.sync_batchnorm import sync_batch_norms


class RunData(Protocol):
    """What a run needs of its data, whatever the task: `Data`, `DetectionData`."""

    train: Any  # a split: its length, `steps_per_epoch`, `batches`
    splits: list[Any]  # all of them, with the `bad_images` of each

    def identity(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data: class names, normalisation, and a fingerprint of every split."""

    def listed(self) -> Iterator[Listed]:
        """Every image, split by split."""

    def close(self) -> None:
        """End the workers: an abandoned epoch's cannot be ended once the garbage collector has reached it."""


@dataclass
class Data:
    """A data set, in its splits: the `RunData` of a classification run."""

    info: DataInfo
    train: Split
    holdout: Split | None  # None without --holdout
    test: Split

    @property
    def splits(self) -> list[Split]:
        """Those that there are."""
        return [split for split in (self.train, self.holdout, self.test) if split is not None]

    @property
    def val(self) -> Split:
        """What the epochs are watched on: the held-out images, else the test split."""
        return self.test if self.holdout is None else self.holdout

    def identity(self) -> dict[str, Any]:
        return preprocess.data_identity(self.info, self.train, self.holdout, self.test)

    def listed(self) -> Iterator[Listed]:
        splits = zip(SPLITS, (self.train, self.holdout, self.test), strict=True)
        return (Listed(name, *image) for name, split in splits if split is not None for image in split.listed())

    def close(self) -> None:
        for split in self.splits:
            split.close()


@dataclass
class Run:
    """Everything that trains; `network` is `model`, compiled under --compile and wrapped by DDP on several ranks.

    `progress` and `best` (the weights that the held-out images selected) change while it trains, and the weights.
    """

    config: Settings  # of train.py a Config
    identity: Identity
    recipe: dict[str, Any]  # what the recipe provided of the config: `resume.RunSpec`
    folder: Path
    device: torch.device
    data: Data
    model: nn.Module
    network: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    ema: MovingAverage | None
    guard: Guard
    autocast: Callable[[], AbstractContextManager]
    progress: Progress
    best: dict[str, Tensor] | None = None
    drop_path: DropPath | None = None
    class_weights: Tensor | None = None  # (classes,) of the loss

    @property
    def eval_model(self) -> nn.Module:
        """The network that is evaluated and kept: the moving average where there is one."""
        return self.model if self.ema is None else self.ema.module

    @property
    def global_batch(self) -> int:
        """Images of a step over all ranks: all of the training set where it has fewer."""
        return min(self.progress.global_batch, len(self.data.train))

    @property
    def steps_per_epoch(self) -> int:
        return self.data.train.steps_per_epoch(self.global_batch)

    @property
    def micro_batches(self) -> int:
        """This rank's batches in a step: the run's own, or on fewer ranks as many as keep each within --batch-size."""
        return math.ceil(self.progress.global_batch / (self.config.batch_size * distributed.world_size()))

    def batches(self):
        """This rank's batches of the open epoch from the next one on: `micro_batches` pairs a step."""
        progress = self.progress
        return self.data.train.batches(
            progress.epoch, progress.batch, batch_size=self.config.batch_size, accumulate=self.micro_batches,
            seed=self.config.seed, augment=augmentation(self.config), rank=distributed.rank(),
            world_size=distributed.world_size(), global_batch=progress.global_batch,
        )  # fmt: skip

    def rate(self, index: int) -> float:
        """The learning rate of step `index`, the run's first being 0; it belongs to the open epoch.

        The schedule goes by the epochs that are done, not by the steps: with more or fewer images
        (--allow-changed-data) it neither jumps nor ends elsewhere.
        """
        progress, steps = self.progress, self.steps_per_epoch
        batch = min(progress.batch + index - progress.step, steps - 1)  # above it where the epoch has become shorter
        return learning_rate(self.config, progress.epoch * steps + batch, steps)

    def draw_drop_path(self, index: int, piece: int) -> None:
        """The residual branches that the micro-batch number `piece` of step `index` leaves out."""
        if self.drop_path is None:
            return
        progress, total = self.progress, self.global_batch
        batch = progress.batch + index - progress.step
        keep = drop_path.draw(self.config.seed, progress.epoch, batch, total, self.drop_path.rates)
        own = own_pieces(total, self.micro_batches, distributed.rank(), distributed.world_size())[piece]
        self.drop_path.keep = to_device(keep[own.start : own.stop], self.device)

    def buffers(self) -> list[Tensor]:
        """The buffers of the network and of its moving average."""
        models = [self.model] if self.ema is None else [self.model, self.ema]  # in the same order on every rank
        return [buffer for model in models for buffer in model.buffers()]

    def weights(self) -> list[dict[str, Tensor]]:
        """All weights that a save writes: the network's, the moving average's and the selected ones."""
        states = [self.model.state_dict(), self.best or {}]
        return states if self.ema is None else [*states, self.ema.state_dict()]

    def select(self, top1: float, epoch: int) -> None:
        """The weights as they are now are those to keep: the best so far by the held-out images."""
        self.progress.best_top1, self.progress.best_epoch = top1, epoch
        self.best = {name: value.detach().cpu().clone() for name, value in self.eval_model.state_dict().items()}

    def state(self) -> dict[str, Any]:
        """Everything that the run needs to go on exactly. Called on every rank, as each has its own generators."""
        parts = (self.model, self.optimizer, self.scaler, self.ema, self.best, self.progress)
        return checkpoint.run_state(self.config, self.identity, self.recipe, *parts)

    def digests(self) -> dict[str, str]:
        """The digests of the run as it stands (sasa/training/digests.py). Called on every rank."""
        generators = distributed.all_gather_object(checkpoint.generator_states(self.device))
        return digests.of_run(self.model, self.optimizer, self.scaler, self.ema, generators)

    def environment(self) -> dict[str, Any]:
        """What the run's bits depend on beside its state: sasa/training/environment.py."""
        attends = any(isinstance(module, LocalAttention2d | AttentionStem) for module in self.model.modules())
        return environment.describe(self.device, self.config.backend if attends else None)

    def environment_digest(self) -> str:
        """SHA-256 of `environment`, as hex."""
        return environment.digest(self.environment())

    def restore(self, state: dict[str, Any]) -> None:
        """Put a run's state back.

        Raises:
            CheckpointError: it is of another network.
        """
        self.progress = checkpoint.restore(state, self.model, self.optimizer, self.scaler, self.ema)
        self.best = state["best"]


def augmentation(config: Config) -> AugmentConfig:
    """The augmentation of the training images."""
    return AugmentConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(AugmentConfig)})


def set_up(spec: RunSpec, is_stopped: Callable[[], bool] = lambda: False) -> Run:
    """Device, data, network and optimizer of a run, and its folder; nothing in the folder is changed yet.

    Raises:
        SharedError: the configuration, the data or the machine do not allow it.
    """
    config = spec.config
    device, amp = prepare_machine(config)
    data = load_data(config, device, is_stopped)
    nominal = spec.global_batch or nominal_batch(config, distributed.world_size())
    config = settle(config, data, amp, nominal, spec)
    weights = distributed.on_all_ranks(partial(_class_weights, config, data, device))
    model = distributed.on_all_ranks(partial(_make_network, config, data, device))
    distributed.on_all_ranks(partial(check_bf16_gradients, model, config.img_size, amp, device))
    run = assemble(Run, spec, config, data, model, device, amp, nominal, config.compile)
    distributed.on_all_ranks(partial(check_accumulation, config, run.micro_batches, device))
    run.class_weights = weights
    run.drop_path = DropPath(model, config.drop_path) if config.drop_path else None
    return run


def prepare_machine(config: Settings) -> tuple[torch.device, torch.dtype | None]:
    """The device, and the dtype of mixed precision (None for none); torch is set up for them.

    Raises:
        SharedError: the machine has not got them.
    """
    device, amp = distributed.on_all_ranks(partial(_pick_machine, config))
    if device.type == "cpu":
        keep_freed()
    set_fp32_precision(config.matmul_precision)
    torch.backends.cudnn.benchmark = config.cudnn_benchmark and not config.deterministic
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses
        torch.use_deterministic_algorithms(True)
    return device, amp


def assemble(
    kind: type[Run],
    spec: RunSpec,
    config: Settings,
    data: RunData,
    model: nn.Module,
    device: torch.device,
    amp: torch.dtype | None,
    nominal: int,
    compiled: bool = False,
) -> Run:
    """The run that trains `model`: with its optimizer, moving average and, on several ranks, DDP around it.

    Args:
        kind: Run, or a class of it for other data. config: settled. nominal: images of a step over all ranks.
    """
    run_id = distributed.on_main_rank(lambda: spec.run_id or new_run_id())
    identity = Identity(run_id, data.identity(), spec.init_from)
    check_ranks_agree(identity.data)
    return kind(
        config, identity, spec.recipe, spec.folder, device, data, model,
        network=as_trained(model, config, device, compiled),
        optimizer=build_optimizer(model, config, device),
        scaler=torch.amp.GradScaler() if amp is torch.float16 else None,
        ema=build_ema(model, config.ema),
        guard=Guard(model, device),
        autocast=autocast_in(amp, device),
        progress=Progress(global_batch=nominal),
    )  # fmt: skip


def check_ranks_agree(identity: dict[str, Any]) -> None:
    """Ranks whose folders differ would train on contradicting labels.

    Raises:
        SharedError: a rank has other data than the main one.
    """
    main, *others = distributed.all_gather_object(identity)
    for rank, other in enumerate(others, start=1):
        if other != main:
            raise SharedError(DataError(f"rank {rank} has other data than rank 0: {differences(main, other)[0]}"))


def settle(config: Config, data: Data, amp: torch.dtype | None, nominal: int, spec: RunSpec) -> Config:
    """The Config with nothing open: what only the data and the machine could tell."""
    info, real = data.info, min(nominal, len(data.train))
    lr = config.lr
    if not spec.started and "lr" in spec.recipe and real < nominal:  # the recipe's rate, for the batch that there is
        lr = rate_for(config, real, nominal)
    return dataclasses.replace(
        config,
        form=form_of(info.image_size) if config.form == "auto" else config.form,
        img_size=info.image_size, eval_size=info.eval_size or info.image_size, amp=AMP_NAMES[amp], lr=lr,
        ema=ema_decay(config.ema, spec.recipe.get("ema"), config.epochs * data.train.steps_per_epoch(nominal)),
        name=spec.folder.name,
    )  # fmt: skip


def without_parts(config: Config) -> Config:
    """The Config with the whole training set: for another folder's images, or where only those of test are used."""
    return dataclasses.replace(config, train_images=None, holdout=0.0, early_stop=0)


def load_data(config: Config, device: torch.device | str, is_stopped: Callable[[], bool] = lambda: False) -> Data:
    """The data set of a Config, on the main rank first, which downloads what is missing.

    Args:
        is_stopped: whether the run is to stop: then nothing waits for a silent worker.

    Raises:
        SharedError: what is wrong with it.
    """
    holdout = config.holdout if config.holdout < 1 else int(config.holdout)
    load = partial(
        preprocess.load, dataset=config.dataset, data_dir=config.data_dir, img_size=config.img_size,
        train_images=config.train_images, holdout=holdout, seed=config.seed, skip_bad_images=config.skip_bad_images,
        num_workers=decoding_processes(config.num_workers, torch.device(device)), device=device,
        eval_size=config.eval_size, eval_crop=config.eval_crop,
        eval_interpolation=config.eval_interpolation, worker_timeout=config.worker_timeout, is_stopped=is_stopped,
        index_dir=config.index_dir, report=print if distributed.is_main() else lambda line: None,
        channels_last=config.channels_last,
    )  # fmt: skip
    return Data(*distributed.main_rank_first(load))


def _check_batch(config: Config, data: Data) -> None:
    check_last_map(config, len(data.train), math.ceil(data.info.image_size / (8 if config.form == "small" else 32)))


def check_last_map(config: Settings, images: int, side: int) -> None:
    """Refuses a batch in which batch norm would see one value a channel: one image whose last map is one pixel.

    Args:
        images: of the training set.
        side: of the network's last map, pixels.

    Raises:
        ConfigError: there is one image at a time, and one pixel.
    """
    ranks = distributed.world_size()
    together = min(config.batch_size, images // (config.accumulate * ranks)) * (ranks if config.sync_bn else 1)
    if together == 1 and side == 1:
        raise ConfigError(
            f"--batch-size {config.batch_size}: batch norm needs 2 images at a time where the last map is one pixel, "
            f"as of {config.img_size}x{config.img_size} images; allowed is a larger batch or a larger --img-size"
        )


def _pick_machine(config: Settings) -> tuple[torch.device, torch.dtype | None]:
    device = pick_device(config.device)
    return device, pick_amp(config.amp, device)


def _class_weights(config: Config, data: Data, device: torch.device) -> Tensor | None:
    """What each class counts in the loss, (classes,) on the device. Raises ConfigError."""
    weights = class_weights.of_classes(config.class_weights, data.info.class_names, data.train.class_counts())
    return None if weights is None else torch.tensor(weights, dtype=torch.float32, device=device)


def _make_network(config: Config, data: Data, device: torch.device) -> nn.Module:
    """The network as it is trained, with the same weights on every rank."""
    _check_batch(config, data)
    return seeded(lambda: build_network(config, data.info.num_classes), config, device)


def seeded(build: Callable[[], nn.Module], config: Settings, device: torch.device) -> nn.Module:
    """The network that `build` makes from the run's seed, on the device, with the run's batch norm and layout."""
    random.seed(config.seed)
    torch.manual_seed(config.seed)
    model = build().to(device)
    set_batch_norm_momentum(model, config.bn_momentum)
    if config.sync_bn:
        model = sync_batch_norms(model, device)
    return model.to(memory_format=torch.channels_last) if config.channels_last else model


def as_trained(model: nn.Module, config: Settings, device: torch.device, compiled: bool) -> nn.Module:
    """The network with DDP around it on several ranks.

    Compiled, DDP is inside, so that torch cuts the graph where gradients are summed over the ranks.
    """
    network = _parallel(model, device)
    if not compiled:
        return network
    keep_builds()
    return torch.compile(network, mode=config.compile_mode)


def _parallel(network: nn.Module, device: torch.device) -> nn.Module:
    """The network whose gradients are the mean over the ranks.

    Buffers are copied where they matter, before an evaluation, instead of before each forward.
    """
    if not distributed.is_distributed():
        return network
    devices = [device] if device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its new name is not known to the oldest torch served here
        return DistributedDataParallel(
            network, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
        )


def initialise(run: Run, path: Path, select: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """--init-from: the weights of a checkpoint that `select` takes, and a list of what was not taken."""
    weights = distributed.on_main_rank(lambda: select(checkpoint.weights_of(checkpoint.load(path))))
    lines = distributed.on_all_ranks(lambda: checkpoint.transfer_weights(run.model, weights))
    if distributed.is_main():
        print(f"--init-from {path}: weights taken, {len(lines)} exceptions")
        for line in lines:
            print(f"  {line}")
    run.ema = build_ema(run.model, run.config.ema)


def describe(run: Run) -> None:
    """What is about to run, for a person."""
    config, info, cpu = run.config, run.data.info, run.device.type == "cpu"
    device = f"CPU, {torch.get_num_threads()} threads" if cpu else torch.cuda.get_device_name(run.device)
    precision = "fp32" if config.amp == "off" else config.amp
    if not cpu:
        precision += f", fp32 products and convolutions at {config.matmul_precision} precision, "
        precision += f"cuDNN's {'fastest' if torch.backends.cudnn.benchmark else 'own'} choice of convolutions"
    val = f"{info.holdout_size} held out" if info.holdout_size else "none held out: val figures are the test split's"
    stages = sum(isinstance(module, LocalAttention2d) for module in run.model.modules())
    batch, ranks = run.global_batch, distributed.world_size()
    scaling = f"the recipe's, times {rate_factor(config, batch):g} for this batch" if "lr" in run.recipe else "as given"
    average = f", moving average of the weights {config.ema:g}" if config.ema else ""
    flops = count_flops(run.model, info.image_size).total
    print(f"device    {device}, {precision}, torch {torch.__version__}")
    if ranks > 1:
        norm = "over all ranks" if config.sync_bn else "of each rank's own batch"
        share = f"{run.micro_batches} x {batch / ranks / run.micro_batches:g} images a step"
        print(f"ranks     {ranks}, each {share}; batch norm {norm}")
    print(f"data      {info.name}: {info.train_size} train and {info.test_size} test images, {val}")
    by = ""
    if isinstance(run.data.train, FolderData):
        by = f", decoded by {decoding_processes(config.num_workers, run.device)} processes a rank"
    print(f"          {info.num_classes} classes, fed at {info.image_size}x{info.image_size}{by}")
    print(f"model     {config.model_name}, {'attention' if config.stem else 'convolution'} stem, {config.form} form")
    print(f"          {stages} attention layers, {count_parameters(run.model):,} parameters, {flops:,} FLOPs an image")
    if config.compile:
        print(f"compiled  in mode {config.compile_mode}; builds are kept in {keep_builds()}")
    print(f"recipe    {config.recipe}: {config.epochs} epochs of {run.steps_per_epoch} steps of {batch} images")
    print(f"          {config.optimizer}, peak rate {config.lr:g} ({scaling}), seed {config.seed}{average}")
    print(f"folder    {run.folder}; watch it with: tensorboard --logdir {run.folder.parent}", flush=True)


def bad_images(run: Run) -> set[str]:
    """The images that were skipped so far, on any rank: "path: what is wrong"."""
    own = [line for split in run.data.splits for line in split.bad_images]
    return {line for lines in distributed.all_gather_object(own) for line in lines}
