"""The losses and the weights of classes, by hand."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from sasa.settings import ConfigError
from sasa.training.class_weights import of_classes, settle
from sasa.training.losses import mean_loss

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 1.0, 0.0]])
LABELS = torch.tensor([0, 2])


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_binary_cross_entropy_by_hand():
    """softplus(-x) where the class is present, else softplus(x); the mean over images and classes."""
    wanted = (softplus(-2) + softplus(0) + softplus(-1) + softplus(0.5) + softplus(1) + softplus(0)) / 6
    assert mean_loss(LOGITS, LABELS, kind="bce").item() == pytest.approx(wanted, rel=1e-6)


def test_binary_cross_entropy_of_mixed_images_takes_classes_above_the_threshold():
    shares = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.2, 0.8]])
    for threshold, present in (
        (0.0, [[1, 1, 0], [0, 1, 1]]),
        (0.2, [[1, 1, 0], [0, 0, 1]]),
        (0.5, [[1, 0, 0], [0, 0, 1]]),
    ):
        wanted = F.binary_cross_entropy_with_logits(LOGITS, torch.tensor(present).float())
        assert torch.equal(mean_loss(LOGITS, shares, kind="bce", threshold=threshold), wanted)


def test_smoothed_binary_targets():
    """0.3 of three classes: present 0.7 + 0.1, absent 0.1."""
    wanted = F.binary_cross_entropy_with_logits(LOGITS, torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]]))
    torch.testing.assert_close(mean_loss(LOGITS, LABELS, kind="bce", label_smoothing=0.3), wanted)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_weighted_cross_entropy_is_a_mean_over_images(smoothing):
    """Not over their weights: so it is the same however the images are dealt to ranks."""
    weights = torch.tensor([2.0, 1.0, 0.25])
    log_p = LOGITS.log_softmax(1)
    soft = torch.eye(3)[LABELS] * (1 - smoothing) + smoothing / 3
    wanted = -(weights * soft * log_p).sum() / 2
    torch.testing.assert_close(mean_loss(LOGITS, LABELS, label_smoothing=smoothing, weights=weights), wanted)
    torch.testing.assert_close(
        mean_loss(LOGITS, torch.eye(3)[LABELS], label_smoothing=smoothing, weights=weights), wanted
    )
    parts = [
        mean_loss(LOGITS[i : i + 1], LABELS[i : i + 1], label_smoothing=smoothing, weights=weights) for i in (0, 1)
    ]
    torch.testing.assert_close(sum(parts) / 2, wanted)
    weighted = mean_loss(LOGITS, LABELS, kind="bce", weights=weights)
    terms = F.binary_cross_entropy_with_logits(LOGITS, torch.eye(3)[LABELS], reduction="none")
    torch.testing.assert_close(weighted, (terms * weights).mean())


def test_without_weights_it_is_torchs_own():
    assert torch.equal(
        mean_loss(LOGITS, LABELS, label_smoothing=0.1), F.cross_entropy(LOGITS, LABELS, label_smoothing=0.1)
    )


# ---- weights of classes ---------------------------------------------------------------------------------------------


def test_balanced_weights_by_hand():
    """6 images of 1, 2 and 3: 6 / (3 * count); their mean over the images is 1. A class without images weighs 1."""
    assert of_classes("balanced", ("a", "b", "c"), [1, 2, 3]) == pytest.approx([2.0, 1.0, 2 / 3])
    assert of_classes("balanced", ("a", "b", "c"), [2, 0, 6]) == pytest.approx([2.0, 1.0, 2 / 3])
    assert of_classes("none", ("a", "b"), [1, 2]) is None


def test_a_file_becomes_text_of_the_configuration(tmp_path):
    path = tmp_path / "weights.json"
    path.write_text('{"dog": 2, "cat": 0.5}')
    settled = settle(str(path))
    assert settled == '{"cat": 0.5, "dog": 2.0}' == settle(settled)
    path.unlink()
    assert of_classes(settled, ("dog", "cat"), [1, 1]) == [2.0, 0.5]
    assert settle("Balanced") == "balanced" and settle("none") == "none"


@pytest.mark.parametrize(("content", "words"), [
    (None, "cannot be read"), ("{", "is not JSON"), ("[1]", "must be"), ('{"a": -1}', "must be"),
    ('{"a": 1, "b": 2, "a": 9}', "a stands there more than once"), ("{}", "must be"),
    ('{"a": 1' + "0" * 400 + "}", "must be"), ('{"a": 1' + "0" * 5000 + "}", "is not JSON"),
    ('{"a": NaN}', "must be"), ('{"a": 1, "b": 1e39}', "must be"), ('{"a": 1e-39}', "must be"),
    ('{"a": 0}', "must be"), ('{"a": true}', "must be"),
])  # fmt: skip
def test_a_wrong_file_is_one_line(tmp_path, content, words):
    path = tmp_path / "weights.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=words) as error:
        settle(str(path))
    assert "--class-weights" in str(error.value) and "\n" not in str(error.value)


def test_names_that_look_alike_are_shown_apart():
    """Composed in the folder's name, decomposed in the file, as some editors and file systems write it."""
    with pytest.raises(ConfigError, match=r"'cafe\\u0301' is no class"):
        of_classes(settle(json.dumps({"cafe\u0301": 1})), ("caf\u00e9",), [1])


@pytest.mark.parametrize(
    ("given", "words"), [({"a": 1}, "b has no weight"), ({"a": 1, "b": 1, "c": 1}, "c is no class")]
)
def test_weights_of_other_classes_are_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        of_classes(settle(json.dumps(given)), ("a", "b"), [1, 1])
