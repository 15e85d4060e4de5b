"""How fast training images are made beside how fast a network trains on them.

    python -m tools.pipeline [--recipe strong] [--dataset CIFAR10] [--model-name ResNet26] [--batch-size N]

Random images of the data set's shape: none of its files is needed. Rounds of the input (order, augmentation,
normalisation, mixing) and of the training step (forward, backward, update) take turns; medians of the rounds.
"""

import argparse
import dataclasses
import statistics
import time

import torch

from config import DATASETS, FIELDS, MODELS, Config, ConfigError, resolve
from preprocess import TensorData, info_without_files
from sasa.console import Parser, fail, run_main
from sasa.data.specs import SIDES
from sasa.training.device import set_fp32_precision
from sasa.training.losses import mean_loss
from sasa.training.network import build_network
from sasa.training.optim import build_optimizer
from sasa.training.run import augmentation
from tools.arguments import one_of, positive, usable_device

PROG = "tools.pipeline"
IMAGES, CLASSES = 4096, 10
INPUT_BATCHES, STEPS = 8, 1  # of a round


def parse(arguments: list[str] | None) -> tuple[Parser, argparse.Namespace]:
    small = [name for name in DATASETS if SIDES[name] is not None]
    parser = Parser("python -m tools.pipeline", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--recipe",
        choices=FIELDS["recipe"].metadata["rule"]["choices"],
        default="strong",
        help="whose augmentation (default: strong)",
    )
    parser.add_argument("--dataset", type=one_of(small), choices=small, default="CIFAR10",
                        help="whose shape (default: CIFAR10)")  # fmt: skip
    parser.add_argument("--model-name", choices=MODELS, default="ResNet26", help="the network (default: ResNet26)")
    parser.add_argument("--batch-size", type=positive, help="images a step (default: the recipe's)")
    parser.add_argument("--rounds", type=positive, default=5, help="rounds of each (default: 5)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    return parser, parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Prints images/s of both and their ratio; returns the exit code."""
    parser, args = parse(arguments)
    device = usable_device(parser, args.device)
    given = {"recipe": args.recipe, "model_name": args.model_name}
    try:
        config = resolve(given | ({"batch_size": args.batch_size} if args.batch_size else {}), args.dataset)
    except ConfigError as error:
        fail(PROG, error)
    rates = measure(config, device, args.rounds)
    made, trained = (statistics.median(values) for values in rates)
    on = "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    print(f"{on}, {torch.get_num_threads()} threads; {args.dataset}, recipe {args.recipe}, batch {config.batch_size}")
    print(f"input {made:.0f} images/s, {args.model_name} trains {trained:.1f}: {made / trained:.1f} times as fast")
    return 0


def measure(config: Config, device: torch.device, rounds: int) -> tuple[list[float], list[float]]:
    """Images/s of the input and of the training, a value a round; the first round of each is not counted."""
    set_fp32_precision(config.matmul_precision)  # as train.py
    side = SIDES[config.dataset]
    info = info_without_files(config.dataset, CLASSES, side)
    images = torch.randint(0, 256, (max(IMAGES, config.batch_size), 3, side, side), dtype=torch.uint8)
    data = TensorData(images, torch.arange(len(images)) % CLASSES, info, device)
    batches = data.batches(0, batch_size=config.batch_size, augment=augmentation(config))
    network = build_network(dataclasses.replace(config, form="small"), CLASSES).to(device)
    network = network.to(memory_format=torch.channels_last).train()
    optimizer = build_optimizer(network, config, device)
    rates, epoch = ([], []), 0
    for turn in range(rounds + 1):
        made = []
        started = clock(device)
        while len(made) < INPUT_BATCHES:
            batch = next(batches, None)
            if batch is None:
                epoch += 1
                batches = data.batches(epoch, batch_size=config.batch_size, augment=augmentation(config))
                continue
            made.append(batch)
        input_s = clock(device) - started
        started = clock(device)
        for pixels, targets in made[:STEPS]:
            logits = network(pixels.contiguous(memory_format=torch.channels_last))
            loss = mean_loss(logits, targets, kind=config.loss, label_smoothing=config.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        train_s = clock(device) - started
        if turn:
            rates[0].append(INPUT_BATCHES * config.batch_size / input_s)
            rates[1].append(STEPS * config.batch_size / train_s)
    return rates


def clock(device: torch.device) -> float:
    """Seconds, when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    run_main(main)
