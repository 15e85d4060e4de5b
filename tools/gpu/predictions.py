"""What was expected before any GPU was at hand, to be held against what one measures. Written down beforehand.

For one H100, bf16, 128 images, 8 heads, K = 7. Sources: an estimate from bytes and instructions at an IPC between 4 and
4 / 2.2, made when the kernels were designed; and cuDNN's 3x3 convolution at the rate that such a GPU is known for.
"""

from typing import NamedTuple


class Prediction(NamedTuple):
    """That `key` of the result of `unit` in `stage` lies between low and high."""

    stage: str
    unit: str
    key: str
    low: float
    high: float


PREDICTIONS = (
    Prediction("machine", "copy", "gb_per_s", 2300, 3100),
    Prediction("machine", "product", "tflop_per_s", 550, 850),
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
    Prediction("times", "d8 56x56", "forward_ipc", 1.8, 4.0),
    Prediction("times", "d16 28x28", "forward_ipc", 1.8, 4.0),
    Prediction("times", "d32 14x14", "forward_ipc", 1.8, 4.0),
)


def verdict(prediction: Prediction, results: dict) -> dict:
    """The prediction as a row: what was measured (None: not), and whether it lies within."""
    unit = results.get(prediction.stage, {}).get("units", {}).get(prediction.unit, {})
    measured = unit.get(prediction.key)
    within = None if measured is None else prediction.low <= measured <= prediction.high
    return prediction._asdict() | {"measured": measured, "within": within}
