"""Export a trained network for other programs, and check the file against the network before it is kept.

    python -m tools.export CHECKPOINT --format onnx|pt2|safetensors

onnx (onnxruntime and others) and pt2 (torch.export; loads without this project) hold the network in plain operations,
for any batch, height and width; safetensors holds the weights. Each also holds what its user must know: class names,
the images' size, mean and standard deviation, and the run's configuration. Input: (B, 3, H, W) fp32, normalised.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from config import Config, ConfigError
from preprocess import DataInfo
from sasa import files
from sasa.console import Parser, as_path, one_line, print_error, printable, run_main
from sasa.training.checkpoint import CheckpointError
from sasa.training.network import build_network, load_network

PROG = "tools.export"
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "pt2": (), "safetensors": ("safetensors",)}
# Of those tried, the oldest whose exporters keep height and width free. 2.8 does not; 2.10 and 2.11 do, but for the
# overlapping max pool after the convolution stem of the ImageNet form.
OLDEST_TORCH, OLDEST_WITH_MAX_POOL = (2, 10), (2, 13)
TOLERANCE = 1e-5  # of the largest output: the largest difference that rounding may make
# Pixels of an image's side, by the form of the network: the last map has two. For torch.export one is a fixed size.
SMALLEST = {"small": 9, "imagenet": 33}
LARGEST = 4096


class ExportError(Exception):
    """The file is not the network, or this torch cannot write it; in one line."""


def parse(arguments: list[str] | None) -> tuple[Parser, argparse.Namespace]:
    parser = Parser(
        "python -m tools.export",
        description="Export a trained network, checked against the network.",
        epilog="exit code: 0 written and checked, 1 the export failed or is not the network, 2 wrong usage or data",
    )
    parser.add_argument("checkpoint", type=as_path, metavar="CHECKPOINT", help="best.pt or last.pt of a run")
    parser.add_argument("--format", choices=PACKAGES, required=True, help="kind of file")
    parser.add_argument("--output", type=as_path, metavar="FILE",
                        help="file to write (default: the checkpoint's path with the format's ending)")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there already")
    return parser, parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    parser, args = parse(arguments)
    missing = [name for name in PACKAGES[args.format] if not is_installed(name)]
    if missing:
        parser.error(f"--format {args.format} needs {', '.join(missing)}: pip install {' '.join(missing)}")
    output = args.output or args.checkpoint.with_suffix(f".{args.format}")
    try:
        if os.path.lexists(output) and not args.overwrite:
            raise ConfigError(f"{output} is there already: --overwrite replaces it, --output names another")
        if not output.parent.is_dir():
            raise ConfigError(f"--output {output}: there is no folder {output.parent}")
        (network, config, info), _ = load_network(args.checkpoint, backend="composite")
        if args.format != "safetensors":
            check_torch(args.format, config)
        facts = describe(config, info)
        content, load = EXPORTERS[args.format](network, config, info, facts)
        difference = verify(load(content), network, noise_images(config, info))
        with files.replacing(output) as file:
            file.write(content)
    except ExportError as error:
        print_error(PROG, f"{args.checkpoint}: {error}")
        return 1
    except (ConfigError, CheckpointError, OSError) as error:
        parser.error(str(error))
    print(f"{len(content):,} bytes, outputs within {difference:.1e} of the network's: {printable(output)}")
    return 0


def oldest_torch(form: str, stem: bool) -> tuple[int, int]:
    """The oldest torch that exports a network of that form ("small" or "imagenet") with a free height and width."""
    return OLDEST_WITH_MAX_POOL if form == "imagenet" and not stem else OLDEST_TORCH


def torch_can_export(form: str = "imagenet", stem: bool = False) -> bool:
    """Whether this torch does; for any network by default."""
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= oldest_torch(form, stem)


def check_torch(kind: str, config: Config) -> None:
    """Checks that this torch can export the network of `config`.

    Raises:
        ConfigError: it is too old.
    """
    if not torch_can_export(config.form, config.stem):
        oldest = oldest_torch(config.form, config.stem)
        which = " of the ImageNet form without --stem" if oldest == OLDEST_WITH_MAX_POOL else ""
        wanted = ".".join(map(str, oldest))
        raise ConfigError(f"--format {kind}{which} needs torch {wanted} or newer, this is torch {torch.__version__}")


def is_installed(name: str) -> bool:
    """Whether the package can be imported."""
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def describe(config: Config, info: DataInfo) -> dict[str, str]:
    """What a file holds beside the network: JSON by name."""
    facts = {
        "config": config.to_dict(),
        "class_names": list(info.class_names),
        "eval_size": config.eval_size or info.image_size,
        "mean": list(info.mean),
        "std": list(info.std),
    }
    return {f"sasa.{name}": json.dumps(fact) for name, fact in facts.items()}


# ---- the check ------------------------------------------------------------------------------------------------------


def noise_images(config: Config, info: DataInfo) -> list[Tensor]:
    """Batches of noise of the run's own size, and of others: one image, odd sides, height and width apart."""
    size = config.eval_size or info.image_size
    least = SMALLEST[config.form]
    shapes = [(2, size, size), (1, least, least + 5), (3, size + 7, max(size - 3, least))]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 3, height, width, generator=generator) for batch, height, width in shapes]


@torch.no_grad()
def verify(exported: Callable[[Tensor], Tensor], network: nn.Module, batches: list[Tensor]) -> float:
    """The largest difference between the outputs, relative to the largest output where that is above 1.

    Raises:
        ExportError: it is above the tolerance, or not a number.
    """
    worst = 0.0
    for images in batches:
        expected = network(images)
        try:
            got = exported(images)
        except Exception as error:  # whatever the other program raises for a size that it does not take
            raise ExportError(
                f"the exported network fails for {tuple(images.shape)}: {one_line(error, 300)}"
            ) from error
        if got.shape != expected.shape:
            raise ExportError(f"the exported network gives {tuple(got.shape)} instead of {tuple(expected.shape)}")
        difference = ((got - expected).abs().max() / expected.abs().max().clamp_min(1.0)).item()
        if not difference <= TOLERANCE:
            raise ExportError(f"the exported network is off by {difference:.1e} for images {tuple(images.shape)}")
        worst = max(worst, difference)
    return worst


# ---- the formats ----------------------------------------------------------------------------------------------------
# Each: network, config, info, facts -> the file's content, and a function from that content to what can be called.


def to_safetensors(network: nn.Module, config: Config, info: DataInfo, facts: dict[str, str]):
    from safetensors.torch import load, save

    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}

    def restored(content: bytes) -> nn.Module:
        again = build_network(config, info.num_classes)
        again.load_state_dict(load(content))
        return again.eval()

    return save(weights, metadata=facts), restored


def to_pt2(network: nn.Module, config: Config, info: DataInfo, facts: dict[str, str]):
    example, shapes = example_of(config, info)
    file = io.BytesIO()
    with one_error("torch.export"):
        torch.export.save(torch.export.export(network, example, dynamic_shapes=shapes), file, extra_files=facts)
    return file.getvalue(), lambda content: torch.export.load(io.BytesIO(content)).module()


def to_onnx(network: nn.Module, config: Config, info: DataInfo, facts: dict[str, str]):
    import onnxruntime

    example, shapes = example_of(config, info)
    with one_error("torch.onnx.export"):
        program = torch.onnx.export(
            network, example, dynamo=True, dynamic_shapes=shapes, input_names=["images"], output_names=["logits"],
            verbose=False,
        )  # fmt: skip
        model = program.model_proto
    for name, fact in facts.items():
        model.metadata_props.add(key=name, value=fact)

    def session(content: bytes) -> Callable[[Tensor], Tensor]:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        loaded = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(loaded.run(None, {"images": images.numpy()})[0])

    return model.SerializeToString(), session


EXPORTERS = {"onnx": to_onnx, "pt2": to_pt2, "safetensors": to_safetensors}


def example_of(config: Config, info: DataInfo) -> tuple[tuple[Tensor], tuple]:
    """Images to trace with, no two sizes of which are equal, and which sizes may be others."""
    size, least = config.eval_size or info.image_size, SMALLEST[config.form]
    if size < least:
        raise ConfigError(f"images of {size}x{size} pixels: onnx and pt2 take at least {least}x{least}")
    dim = torch.export.Dim
    height, width = (dim(name, min=least, max=LARGEST) for name in ("height", "width"))
    return (torch.randn(2, 3, size + 3, size + 8),), ({0: dim("batch"), 2: height, 3: width},)


@contextlib.contextmanager
def one_error(what: str) -> Iterator[None]:
    """Of torch's exporters only an error reaches the terminal, as an ExportError of one line."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # they raise many kinds
        raise ExportError(f"{what} of torch {torch.__version__} fails: {one_line(error, 300)}") from error


if __name__ == "__main__":
    run_main(main)
