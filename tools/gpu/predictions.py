"""What was expected before any GPU was at hand, to be held against what one measures. Written down beforehand.

For one H100, bf16, 128 images, 8 heads, K = 7. Sources: an estimate from bytes and instructions at an IPC between 4 and
4 / 2.2, made when the kernels were designed; cuDNN's 3x3 convolution at the rate that such a GPU is known for; and for
training steps what they are counted to do (`WORK`), at the rates of `step_ms`.
"""

from typing import NamedTuple

COPY, PRODUCT = (2300, 3100), (550, 850)  # GB/s, TFLOP/s
IPC = (1.8, 4.0)  # warp instructions a cycle and multiprocessor
CYCLES = 132 * 1.755e9  # a second, of all multiprocessors at the clock that a loaded H100 holds


class Prediction(NamedTuple):
    """That `key` of the result of `unit` in `stage` lies between low and high."""

    stage: str
    unit: str
    key: str
    low: float
    high: float


# ---- training steps -------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """What a step does, counted without a GPU by tests/training/test_device_step.py.

    Bytes are what operators read and write, each of their tensors once.

    Attributes:
        tflop: of convolutions, projections and the classifier, forward and backward.
        product_gb: that those read and write.
        other_gb: that all other operators do, attention and its stem apart.
        instructions: of attention and its stem, in 1e9 warp instructions; what bounds them is not their bytes.
    """

    tflop: float
    product_gb: float
    other_gb: float
    instructions: float


COUNTED_WITH = {"triton": "3.9", "capability": "9.0"}
STEM_INSTRUCTIONS = 5.624  # forward and backward of the pooled stem, 1e9
WORK = {
    ("ResNet50", "convolution"): Work(3.14, 14.0, 37.4, 0.0),
    ("ResNet50", "attention"): Work(2.46, 16.2, 37.8, 3.68),
    ("ResNet50", "attention + stem"): Work(2.41, 15.7, 37.0, 9.30),
    ("ResNet26", "convolution"): Work(1.80, 8.15, 20.8, 0.0),
    ("ResNet26", "attention"): Work(1.59, 9.58, 21.4, 1.92),
    ("ResNet26", "attention + stem"): Work(1.55, 9.09, 20.6, 7.54),
}


def step_ms(work: Work, is_compiled: bool) -> tuple[float, float]:
    """Between which times a step is expected.

    The least: everything at the ceilings of the machine; of the products' bytes and arithmetic the longer, as one hides
    the other; and under torch.compile half of the other bytes, since it joins norm, ReLU and addition. The most:
    products at a quarter of the lowest ceiling and their bytes on top, other bytes 1.6 times, since a norm reads a map
    twice that no cache holds, and attention at the lowest IPC. The host's own time is left out.
    """
    least = max(work.tflop / PRODUCT[1] * 1e3, work.product_gb / COPY[1] * 1e3)
    least += work.other_gb * (0.5 if is_compiled else 1.0) / COPY[1] * 1e3
    most = work.tflop / (PRODUCT[0] / 4) * 1e3 + (work.product_gb + 1.6 * work.other_gb) / COPY[0] * 1e3
    kernels = [work.instructions * 1e9 / (ipc * CYCLES) * 1e3 for ipc in IPC]
    return least + kernels[1], most + kernels[0]


def of_steps() -> tuple[Prediction, ...]:
    """Of both stages of steps.

    The moving average is left out of the times: its three operators move 7 numbers of 4 bytes for each of ResNet50's 19
    to 26 million parameters, 0.7 GB or 0.3 ms. No operator waits (tests/training/test_device_step.py).
    """
    found = []
    for stage, is_compiled in (("steps", False), ("compiled", True)):
        for (name, kind), work in WORK.items():
            low, high = (round(ms, 1) for ms in step_ms(work, is_compiled))
            for unit in (f"{name} {kind}", f"{name} {kind}, moving average"):
                found.append(Prediction(stage, unit, "step_ms", low, high))
        whole = "ResNet50 attention + stem, moving average"
        found.append(Prediction(stage, whole, "waits", 0, 0))
    return tuple(found)


# ---- all of them ----------------------------------------------------------------------------------------------------

PREDICTIONS = (
    Prediction("machine", "copy", "gb_per_s", *COPY),
    Prediction("machine", "product", "tflop_per_s", *PRODUCT),
    Prediction("times", "d8 56x56", "forward_ms", 0.25, 0.5),
    Prediction("times", "d8 56x56", "backward_ms", 0.7, 1.5),
    Prediction("times", "d16 28x28", "forward_ms", 0.10, 0.19),
    Prediction("times", "d16 28x28", "backward_ms", 0.2, 0.4),
    Prediction("times", "d32 14x14", "forward_ms", 0.05, 0.09),
    Prediction("times", "d32 14x14", "backward_ms", 0.09, 0.18),
    Prediction("times", "d64 7x7", "forward_ms", 0.01, 0.02),
    Prediction("times", "d64 7x7", "backward_ms", 0.03, 0.05),
    Prediction("times", "d8 56x56", "conv3x3_forward_ms", 0.05, 0.09),
    Prediction("times", "d16 28x28", "conv3x3_forward_ms", 0.04, 0.07),
    Prediction("times", "d32 14x14", "conv3x3_forward_ms", 0.04, 0.07),
    Prediction("times", "d64 7x7", "conv3x3_forward_ms", 0.04, 0.07),
    Prediction("times", "d8 56x56", "forward_ipc", *IPC),
    Prediction("times", "d16 28x28", "forward_ipc", *IPC),
    Prediction("times", "d32 14x14", "forward_ipc", *IPC),
    *of_steps(),
)


def verdict(prediction: Prediction, results: dict) -> dict:
    """The prediction as a row: what was measured (None: not), and whether it lies within."""
    unit = results.get(prediction.stage, {}).get("units", {}).get(prediction.unit, {})
    measured = unit.get(prediction.key)
    within = None if measured is None else prediction.low <= measured <= prediction.high
    return prediction._asdict() | {"measured": measured, "within": within}
