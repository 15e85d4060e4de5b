"""Time and peak memory of attention beside the 3x3 convolution it replaces and the unfold of the definition.

Every figure is of a forward and a backward. A machine's speed moves within minutes, so times of different moments are
never compared: the candidates of a row take turns round by round, a ratio is of times of one round, and its median and
range over the rounds are given. Peak memory is what one forward and backward add to the process: on a CPU the growth
of the resident set's high-water mark in a fresh process (which sees what a kernel allocates itself, too), on CUDA
torch's own count.

Columns: `conv` 3x3 convolution; `core` local attention alone; `layer` with its 1x1 projections; `unfold` the core by
the backend "reference". Shapes: B batch, C channels, H x H map, K window side; 8 heads.
"""

import argparse

import torch

from sasa import kernels
from sasa.console import Parser, run_main
from sasa.files import json_text
from sasa.training.device import set_fp32_precision
from tools.arguments import one_of, positive, usable_device
from tools.benchmark import layers as benchmark_layers
from tools.benchmark import network as benchmark_network
from tools.benchmark.layers import CIFAR, HEADS, PAPER, WINDOW
from tools.benchmark.measure import Bench, machine
from tools.benchmark.step_memory import step_memory

DTYPES = ("float32", "float64", "bfloat16", "float16")


def parse_shapes(text: str) -> tuple[tuple[int, int, int], ...]:
    """Of --shapes.

    Raises:
        argparse.ArgumentTypeError: neither a name nor three numbers that fit.
    """
    named = {"paper": PAPER, "cifar": CIFAR, "all": PAPER + CIFAR}
    if text in named:
        return named[text]
    try:
        b, c, h = (int(part) for part in text.split(","))
    except ValueError:
        b = c = h = 0
    if min(b, c, h) < 1 or c % (2 * HEADS):
        raise argparse.ArgumentTypeError(f"{text!r}: allowed are paper, cifar, all, or B,C,H with C a multiple of 16")
    return ((b, c, h),)


def batch_size(text: str) -> int | str:
    """Of --batch-size: "auto" or a number above 0."""
    return text if text == "auto" else positive(text)


def parse(argv: list[str] | None) -> tuple[Parser, argparse.Namespace]:
    """The parser and what it made of the command line."""
    parser = Parser("python -m tools.benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=parse_shapes, metavar="paper|cifar|all|B,C,H", help="only the layers of these")
    parser.add_argument("--network", action="store_true", help="only the networks: ResNet26, 38 and 50, with peaks "
                        "and evaluation")  # fmt: skip
    parser.add_argument("--step-memory", action="store_true", help="only the memory of a training step, by stage")
    parser.add_argument("--batch-size", type=batch_size, metavar="N|auto", help="of --network (auto: the largest that "
                        "fits) and --step-memory")  # fmt: skip
    parser.add_argument("--models", nargs="+", choices=benchmark_network.DEPTHS, help="of --network and --step-memory")
    parser.add_argument("--form", type=one_of(benchmark_network.FORMS), choices=benchmark_network.FORMS,
                        help="of --step-memory, ImageNet or CIFAR (default: ImageNet)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="few shapes and rounds")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="without it, all that are usable here")
    parser.add_argument("--rounds", type=positive, help="without it 5, or 2 with --quick")
    parser.add_argument("--threads", type=positive)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--json", action="store_true", help="JSON on stdout, the tables on stderr")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The command line; -> exit code."""
    parser, args = parse(argv)
    if args.step_memory and args.batch_size == "auto":
        parser.error("--batch-size auto: --step-memory needs a number")
    if args.batch_size and not (args.step_memory or args.network):
        parser.error(f"--batch-size {args.batch_size}: goes with --network or --step-memory")
    if args.step_memory and args.network:
        parser.error("--step-memory: does not go with --network")
    if args.shapes and (args.step_memory or args.network):
        parser.error(f"--shapes: of the layers, does not go with {'--network' if args.network else '--step-memory'}")
    if args.form and not args.step_memory:
        parser.error(f"--form {args.form}: goes with --step-memory; the other networks are timed in both forms")
    if args.models and args.shapes:
        parser.error("--models: of the networks, does not go with --shapes")
    if args.rounds and args.step_memory:
        parser.error(f"--rounds {args.rounds}: --step-memory counts bytes, once")
    device = usable_device(parser, args.device)
    set_fp32_precision("highest")  # PyTorch by itself has the convolutions beside ours in TF32
    usable = kernels.backends()
    backends = args.backends or [name for name, reason in usable.items() if reason is None]
    widest = max(c for _, c, _ in args.shapes or PAPER + CIFAR) // HEADS
    query = torch.empty(1, HEADS, widest, 8, 8, dtype=getattr(torch, args.dtype), device=device)
    for name in dict.fromkeys(backends):
        try:
            kernels.choose_backend(query, WINDOW, name)
        except ValueError as error:
            if args.backends:
                parser.error(f"--backends {name}: {error}")
            backends.remove(name)
    if args.threads:
        torch.set_num_threads(args.threads)
    bench = Bench(args, device, backends)
    result: dict = {"machine": machine(device), "dtype": args.dtype, "rounds": bench.rounds, "backends": backends}
    bench.print("  ".join(f"{key} {value}" for key, value in result["machine"].items()))
    bench.print(f"device {device}  {args.dtype}  rounds {bench.rounds}  backends {', '.join(backends)}")
    layers = not args.network and not args.step_memory
    if layers:
        rows = result["layers"] = benchmark_layers.layers(bench, args.shapes)
        if not args.shapes:
            result["strided"] = benchmark_layers.strided(bench)
            result["scaling"] = benchmark_layers.scaling(bench)
    if args.step_memory:
        names = args.models or ["ResNet50"]
        result["step_memory"] = [step_memory(bench, args.batch_size, args.form or "ImageNet", name) for name in names]
    elif args.network or not args.shapes:
        names = tuple(args.models or (benchmark_network.DEPTHS if args.network else ("ResNet26",)))
        result["network"] = benchmark_network.network(bench, names, args.batch_size)
        if args.network:
            result["evaluation"] = benchmark_network.evaluation(bench, result["network"])
    if layers:
        result["geometric_means"] = benchmark_layers.means(rows)
        bench.print(f"\nGeometric means over {len(rows)} shapes (stride 1)")
        for name, value in result["geometric_means"].items():
            bench.print(f"  {name:<28} {value:8.3f}")
    if args.json:
        print(json_text(result, indent=1))
    return 0


if __name__ == "__main__":
    run_main(main)
