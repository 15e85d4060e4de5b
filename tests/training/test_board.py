"""TensorBoard's files, read back: which cards, in which order, with which numbers and pictures."""

import io
import json
from contextlib import nullcontext

import pytest
import torch
from PIL import Image
from tensorboard import plugin_util
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torchvision.transforms.v2.functional import pil_to_tensor

import preprocess
from config import resolve
from model import ResNet26
from sasa.analysis import figures
from sasa.analysis.attention_maps import entropy, lattice, mean_distance, record_attention
from sasa.training import board, monitor
from sasa.training.board import EPOCH_TAGS, STEP_TAGS, Board
from sasa.training.evaluation import evaluate
from sasa.training.run import augmentation
from tiny_runs import Tiny, go

IMAGE_TAGS = {"5_images/first_batch", "5_images/wrong_label_then_prediction", "5_images/confusion_matrix"}


def picture(events: EventAccumulator, tag: str) -> torch.Tensor:
    """(3, H, W) uint8 of the tag's only image."""
    (image,) = events.Images(tag)
    return pil_to_tensor(Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB"))


def shows(events: EventAccumulator, tag: str, pixels: torch.Tensor) -> bool:
    """Equal but for the rounding of TensorBoard's writer; pixels (3, H, W) in [0, 1]."""
    found, wanted = picture(events, tag).int(), (pixels * 255).round().int()
    return found.shape == wanted.shape and bool(((found - wanted).abs() <= 1).all())


@pytest.fixture
def events(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(monitor, "SCALAR_EVERY", 5)
    folder = go(tmp_path, "--holdout 8 --mixup 0")
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    accumulator.Reload()
    accumulator.run = folder
    return accumulator


def test_the_scalars_are_those_of_the_log(events):
    """32 images, 8 steps an epoch, 16 in all; a point of the training curves each 5 steps here."""
    scores = {"4_test/top1_pct", "4_test/loss"}
    assert {*STEP_TAGS.values(), *EPOCH_TAGS.values()} | scores == set(events.Tags()["scalars"])
    for tag in STEP_TAGS.values():
        assert [point.step for point in events.Scalars(tag)] == [5, 10, 15], tag
    assert all(point.value > 0 for point in events.Scalars("3_step/gradient_norm"))
    rows = [json.loads(line) for line in (events.run / "log.jsonl").read_text().splitlines()]
    for key, tag in EPOCH_TAGS.items():
        points = events.Scalars(tag)
        assert [point.step for point in points] == [8, 16], tag
        assert [point.value for point in points] == pytest.approx([row[key] for row in rows], rel=1e-6)


def test_loss_and_accuracy_come_first_and_attention_last():
    """As TensorBoard sorts: by the group before the slash."""
    groups = {tag.split("/")[0] for tag in (*STEP_TAGS.values(), *EPOCH_TAGS.values())}
    groups |= {board.TEST, board.IMAGES, board.MAPS, board.EMBEDDINGS, board.ENTROPY, board.DISTANCE, board.LARGEST}
    found = sorted(groups)
    assert found[:2] == ["1_validation", "2_training"] and all("attention" in group for group in found[5:])
    assert len(found) == 10 and sorted(EPOCH_TAGS.values())[:2] == ["1_validation/loss", "1_validation/top1_pct"]


def test_the_overview_draws_training_and_validation_together(events):
    tensor = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    (category,) = layout_pb2.Layout.FromString(tensor).category
    charts = {chart.title: list(chart.multiline.tag) for chart in category.chart}
    assert category.title == "Overview" and list(charts) == [
        "loss", "top-1, %", "learning rate", "images/s", "gradient norm",
    ]  # fmt: skip
    assert charts["loss"] == ["2_training/loss", "1_validation/loss"]
    assert {tag for tags in charts.values() for tag in tags} <= set(events.Tags()["scalars"])


def test_the_images_text_and_hparams_are_there(events):
    assert set(events.Tags()["images"]) == IMAGE_TAGS
    tags = [tag for tag in events.Tags()["tensors"] if tag.endswith("text_summary")]
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in tags}
    assert (
        "| batch_size | 4 |" in texts["config/text_summary"] and "| recipe | default |" in texts["config/text_summary"]
    )
    assert "Conv2d(3, 8" in texts["model/text_summary"] and "Linear" in texts["model/text_summary"]
    plugin = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hparams = HParamsPluginData.FromString(plugin).session_start_info.hparams
    assert hparams["dataset"].string_value == "DIGITS" and hparams["batch_size"].number_value == 4
    assert set(hparams) == set(board.HPARAMS) and len(hparams) == 20
    assert not [name for name in hparams if "dir" in name or ("name" in name and name != "model_name")]
    declared = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/experiment").plugin_data.content)
    assert "4_test/top1_pct" in [info.name.tag for info in declared.experiment.metric_infos]
    summary = json.loads((events.run / "summary.json").read_text())
    (point,) = events.Scalars("4_test/top1_pct")
    assert point.value == pytest.approx(summary["test_top1_pct"]) and point.step == 16


def test_the_pictures_show_the_first_batch_and_the_test_splits_mistakes(events):
    info, train_data, _, test = preprocess.load(dataset="DIGITS", holdout=8)
    augment = augmentation(resolve({}, "DIGITS"))
    batch, _ = next(train_data.batches(0, batch_size=4, augment=augment))
    assert shows(events, "5_images/first_batch", figures.image_grid(preprocess.denormalise(batch, info)))
    best = torch.load(events.run / "best.pt", weights_only=True)["model"]
    network = Tiny(10)
    network.load_state_dict(best)
    result = evaluate(network, test, 10, 64, nullcontext, 24)
    matrix = figures.to_tensor(figures.confusion_figure(result.confusion, info.class_names))
    assert shows(events, "5_images/confusion_matrix", matrix)
    wrong = [preprocess.denormalise(image[None], info)[0] for image, _, _ in result.wrong]
    names = [(str(label), str(guess)) for _, label, guess in result.wrong]
    assert len(wrong) == result.images - result.confusion.diagonal().sum() > 0
    mistakes = figures.to_tensor(figures.mistakes_figure(wrong, names))
    assert shows(events, "5_images/wrong_label_then_prediction", mistakes)


def test_without_holdout_the_mistakes_of_the_last_epoch_are_shown(tmp_path, tiny):
    events = EventAccumulator(str(go(tmp_path, "--max-steps 1")))
    events.Reload()
    assert set(events.Tags()["images"]) == IMAGE_TAGS


def test_the_attention_panels_read_back(tmp_path):
    """Each layer's sheets as they were drawn, histograms over images, heads and pixels, and the largest logit."""
    network = ResNet26(10, stem=True, small_images=True).eval()
    with torch.no_grad(), record_attention(network, pixels=lattice(9)) as layers:
        network(torch.randn(2, 3, 12, 12))
    writer = Board(tmp_path, 1)
    writer.attention(7, layers)
    writer.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0}).Reload()
    assert len(layers) == 9
    for layer in layers:
        maps, tables = figures.card([figures.map_strip(layer)]), figures.card(figures.embedding_strips(layer))
        assert shows(events, f"6_attention_maps/{layer.name}", figures.to_tensor(maps))
        assert shows(events, f"7_attention_embeddings/{layer.name}", figures.to_tensor(tables))
        measures = (("8_attention_entropy_bits", entropy(layer.weights)),
                    ("9_attention_distance_pixels", mean_distance(layer)))  # fmt: skip
        for group, values in measures:
            (point,) = events.Histograms(f"{group}/{layer.name}")
            found = point.histogram_value
            assert point.step == 7 and found.num == values.numel()
            wanted = [values.min().item(), values.max().item(), values.double().sum().item()]
            assert [found.min, found.max, found.sum] == pytest.approx(wanted, rel=1e-5)
        (point,) = events.Scalars(f"9_attention_largest_logit/{layer.name}")
        assert point.value == pytest.approx(layer.largest_logit)


HOSTILE = "<img src=x onerror=alert(1)>|a*b*_c_`d`[e](javascript:f)\\|\n\x1b[31m&lt;"


def test_settings_are_shown_as_they_are_and_never_as_markup():
    """TensorBoard's own conversion of Markdown."""
    row = f"| name | {board.as_markdown(HOSTILE)} |"
    shown = plugin_util.markdown_to_safe_html(f"| setting | value |\n| --- | --- |\n{row}")
    cell = shown.split("<td>")[2].split("</td>")[0]
    assert cell.count("<") == 0 and shown.count("<td>") == 2
    text = cell.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    assert text == "<img src=x onerror=alert(1)>|a*b*_c_`d`[e](javascript:f)\\|\\x0a\\x1b[31m&lt;"


def test_hparams_are_plain_values():
    assert [board.as_hparam(value) for value in ([1, 2], [], None, True, 3, 0.5, "a\nb")] == [
        "1 2", "none", "default", True, 3, 0.5, "a\\x0ab",
    ]  # fmt: skip
