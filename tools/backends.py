"""python -m tools.backends: the backends, whether each is usable here, and the choice for each layer of a network.

The layers' shapes are those of a forward on the meta device: nothing is computed.
"""

import argparse

import torch
from torch import nn

from attention import AttentionStem, LocalAttention2d
from model import MIN_SIZE, VARIANTS, build
from sasa import kernels
from sasa.console import Parser, run_main
from tools.arguments import positive, usable_device


def layers(model: nn.Module, batch: int, size: int) -> list[tuple[str, LocalAttention2d | AttentionStem, torch.Size]]:
    """(name, layer, shape of its input (B, C, H, W)) of each attention layer, in the order of the forward."""
    found = []

    def record(name):
        return lambda layer, inputs: found.append((name, layer, inputs[0].shape))

    hooks = [
        layer.register_forward_pre_hook(record(name))
        for name, layer in model.named_modules()
        if isinstance(layer, LocalAttention2d | AttentionStem)
    ]
    with torch.no_grad():
        model.eval()(torch.empty(batch, 3, size, size, device="meta"))
    for hook in hooks:
        hook.remove()
    return found


def choice(layer: LocalAttention2d | AttentionStem, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> str:
    """A line: shape of the call and the backend that serves it."""
    batch, _, height, width = shape
    heads, head_dim = layer.num_heads, layer.head_dim
    size = layer.block_size if isinstance(layer, AttentionStem) else layer.kernel_size
    line = f"B {batch}  N {heads}  D {head_dim:<3}  H {height:<3}  W {width:<3}  K {size:<2}"
    if isinstance(layer, AttentionStem) and not (layer.window == "sliding" and layer.values == "conv"):
        sources = {"cpu": "cpu (sasa/kernels/csrc/stem.cpp)", "triton": "triton (sasa/kernels/triton_stem.py)"}
        by = sources.get(layer.kernel(device.type, dtype), "PyTorch (sasa/kernels/stem.py)")
        return f"{line}  {by}, {layer.window} windows of the image"
    # One number, seen as the whole query: the choice asks for device, dtype and shape only.
    query = torch.empty((), dtype=dtype, device=device).expand(batch, heads, head_dim, height, width)
    return f"{line}  {kernels.choose_backend(query, size, layer.backend)}"


def parse(argv: list[str] | None) -> tuple[Parser, argparse.Namespace]:
    parser = Parser("python -m tools.backends", description=__doc__.splitlines()[0])
    parser.add_argument("--model-name", default="ResNet26", help=f"{', '.join(VARIANTS)} (any case)")
    parser.add_argument("--form", choices=("small", "imagenet"), default="imagenet")
    parser.add_argument("--img-size", type=positive, help="pixels; without it 32 (small) or 224 (imagenet)")
    parser.add_argument("--batch-size", type=positive, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float64", "bfloat16", "float16"), default="float32")
    parser.add_argument("--stem", action=argparse.BooleanOptionalAction, default=False)
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    parser, args = parse(argv)
    size = args.img_size or {"small": 32, "imagenet": 224}[args.form]
    if size < MIN_SIZE:
        parser.error(f"--img-size {size}: must be at least {MIN_SIZE}")
    device = usable_device(parser, args.device)
    try:
        with torch.device("meta"):
            model = build(args.model_name, stem=args.stem, small_images=args.form == "small")
        print("Backends, fastest first:")
        for name, reason in kernels.backends().items():
            print(f"  {name:<10} {'usable' if reason is None else f'not usable here: {reason}'}")
        where = f"{device}, {args.dtype}, {args.form} form, {size}x{size}"
        print(f"{args.model_name}{' with the attention stem' if args.stem else ''} on {where}:")
        found = layers(model, args.batch_size, size)
        for name, layer, shape in found:
            print(f"  {name:<18} {choice(layer, shape, device, getattr(torch, args.dtype))}")
    except ValueError as error:
        parser.error(str(error))
    if not found:
        print("  no attention layers")
    return 0


if __name__ == "__main__":
    run_main(main)
