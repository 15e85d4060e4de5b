"""The memory of a training step, stage by stage: `python -m tools.benchmark --step-memory`.

It counts the bytes that a step keeps for its backward: the sizes of the tensors that autograd saves in a forward on
the meta device, which computes nothing. They are the same for every backend, as all keep query, key, value, output and
log-sum-exp; what differs is the memory that a backend works in while one layer runs, which is measured, one layer of
each stage.
"""

import torch
import torch.nn.functional as F
from torch import nn

from model import VARIANTS, build
from sasa.backbone import FEATURES
from tools.benchmark.layers import WINDOW, peak_memory
from tools.benchmark.measure import Bench
from tools.benchmark.network import FORMS


def kept_by_stage(name: str, options: dict, form: str, batch: int, side: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes that a forward keeps for its backward, by stage; each storage once, weights not. On the meta device."""
    model = on_meta(name, options, form, dtype)
    x = torch.randn(batch, 3, side, side, dtype=dtype, device="meta")
    weights = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
    stage, seen, alive = ["stem"], set(), []
    kept = dict.fromkeys((*FEATURES, "head"), 0)

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights | seen:
            seen.add(storage._cdata)
            kept[stage[0]] += storage.nbytes()
        alive.append(tensor)  # its storage's address stays its own
        return tensor

    for child, module in model.named_children():
        module.register_forward_pre_hook(
            lambda *_, child=child: stage.__setitem__(0, child if child in kept else "head")
        )
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        F.cross_entropy(model(x), torch.zeros(batch, dtype=torch.long, device="meta"))
    return kept


def largest_layers(name: str, form: str, side: int) -> dict[str, tuple[int, int]]:
    """Channels and map of each stage's first layer of full size: the layer whose work takes most memory."""
    side = side if form == "CIFAR" else -(-side // 4)
    return {
        f"layer{i}": (64 * 2 ** (i - 1), -(-side // 2 ** max(i - 2, 0))) for i in range(1, len(VARIANTS[name][1]) + 1)
    }


def step_memory(bench: Bench, batch_size: int | None = None, form: str = "ImageNet", name: str = "ResNet50") -> dict:
    """Prints and returns MiB by stage of a training step; `total` is what a real step's peak is held against.

    It is an upper bound: what is kept is freed while the gradients are made, and a first step has no momentum yet.
    """
    batch, side = batch_size or FORMS[form][0], FORMS[form][1]
    mib = 2**20
    nets = {"convolution": {"attention_stages": ()}, "attention": {}}
    state = {net: state_bytes(name, options, form, bench.dtype) / mib for net, options in nets.items()}
    kept = {
        net: {stage: size / mib for stage, size in kept_by_stage(name, options, form, batch, side, bench.dtype).items()}
        for net, options in nets.items()
    }
    layers = largest_layers(name, form, side)
    work: dict[str, dict[str, float | None]] = {backend: {} for backend in bench.backends}
    for backend in bench.backends:
        for stage, (channels, height) in layers.items():
            call = (batch, channels, height, WINDOW, backend, bench.device, bench.dtype)
            work[backend][stage] = peak_memory("core", call, bench.device)
    bench.print(
        f"\n{name}, {form} form, {batch} images of {side}x{side}, {bench.dtype}: MiB of a training step with SGD"
    )
    columns = f"{'stage':<10} {'kept, conv':>11} {'kept, attention':>16}" + "".join(
        f" {'work, ' + backend:>16}" for backend in work
    )
    bench.print(columns + "\n" + "-" * len(columns))
    for stage in kept["attention"]:
        text = f"{stage:<10} {kept['convolution'][stage]:>11.1f} {kept['attention'][stage]:>16.1f}"
        for backend in work:
            found = work[backend].get(stage)
            text += f" {'' if found is None else f'{found:.1f}':>16}"
        bench.print(text)
    total = {"convolution": state["convolution"] + sum(kept["convolution"].values())}
    for backend, stages in work.items():
        work_at_most = max(found or 0 for found in stages.values())
        total[backend] = state["attention"] + sum(kept["attention"].values()) + work_at_most
    bench.print(
        "weights, gradients, momentum: " + ", ".join(f"{net} {size:.1f}" for net, size in state.items())
        + "; in all at most: " + ", ".join(f"{k} {v:.0f}" for k, v in total.items())
    )  # fmt: skip
    return {"model": name, "form": form, "batch": batch, "image": side, "state_mib": state, "kept_mib": kept,
            "work_mib": work, "total_mib": total}  # fmt: skip


def state_bytes(name: str, options: dict, form: str, dtype: torch.dtype) -> int:
    """Of the weights, their gradients and their momentum."""
    return 3 * sum(p.numel() * p.element_size() for p in on_meta(name, options, form, dtype).parameters())


def on_meta(name: str, options: dict, form: str, dtype: torch.dtype) -> nn.Module:
    """The network without its numbers."""
    with torch.device("meta"):
        return build(name, 10 if form == "CIFAR" else 1000, small_images=form == "CIFAR", **options).to(dtype)
