"""What a person sees: TensorBoard's files read back, the content of the pictures, bars only on a terminal."""

import io
import json
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

import preprocess
import small_runs
import train
from attention import LocalAttention2d
from config import resolve
from model import ResNet26
from sasa.analysis import figures as sheets
from sasa.analysis.attention_maps import LayerAttention, collect, entropy, lattice, mean_distance
from sasa.training import monitor
from sasa.training.evaluation import Evaluation, evaluate
from sasa.training.monitor import Monitor, captioned, confusion_picture, enlarge, grid, text_strip
from test_train import Tiny, go, tiny  # noqa: F401 (a fixture)

DARK = (8, 48, 107)
STEP_TAGS = {"train/loss", "train/top1_pct", "train/lr", "train/grad_norm"}
EPOCH_TAGS = {"epoch/train_loss", "epoch/train_top1_pct", "epoch/val_loss", "epoch/val_top1_pct", "epoch/val_top5_pct",
              "epoch/lr", "epoch/images_per_s"}  # fmt: skip
IMAGE_TAGS = {"images/first_batch", "images/wrong_label_then_prediction", "images/confusion_matrix"}


def picture(events: EventAccumulator, tag: str) -> torch.Tensor:
    """(3, H, W) uint8 of the tag's only image."""
    (image,) = events.Images(tag)
    return pil_to_tensor(Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB"))


def to_bytes(image: torch.Tensor) -> torch.Tensor:
    return (image * 255).round().byte()


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for the rounding of TensorBoard's writer."""
    return a.shape == b.shape and bool(((a.int() - b.int()).abs() <= 1).all())


def cells(image: torch.Tensor, classes: int) -> torch.Tensor:
    """The first pixel of each cell, (classes, classes, 3) uint8: the cells are the lower right square."""
    side = monitor.CELL * classes if classes <= 20 else image.shape[-1]
    square, step = image[:, -side:, -side:], side // classes
    return to_bytes(square[:, ::step, ::step]).permute(1, 2, 0)


# ---- a run's event files --------------------------------------------------------------------------------------------


@pytest.fixture
def events(tmp_path, tiny, monkeypatch):  # noqa: F811
    monkeypatch.setattr(monitor, "SCALAR_EVERY", 5)
    folder = go(tmp_path, "--holdout 8 --mixup 0")
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    accumulator.Reload()
    accumulator.run = folder
    return accumulator


def test_the_scalars_are_those_of_the_log(events):
    """32 images, 8 steps an epoch, 16 in all; a point of the training curves each 5 steps here."""
    assert STEP_TAGS | EPOCH_TAGS | {"hparam/test_top1_pct", "hparam/test_loss"} == set(events.Tags()["scalars"])
    for tag in STEP_TAGS:
        assert [point.step for point in events.Scalars(tag)] == [5, 10, 15], tag
    assert all(point.value > 0 for point in events.Scalars("train/grad_norm"))
    rows = [json.loads(line) for line in (events.run / "log.jsonl").read_text().splitlines()]
    for tag in EPOCH_TAGS:
        points = events.Scalars(tag)
        assert [point.step for point in points] == [8, 16], tag
        assert [p.value for p in points] == pytest.approx([row[tag.removeprefix("epoch/")] for row in rows], rel=1e-6)


def test_the_images_text_and_hparams_are_there(events):
    assert set(events.Tags()["images"]) == IMAGE_TAGS
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert (
        "| batch_size | 4 |" in texts["config/text_summary"] and "| recipe | default |" in texts["config/text_summary"]
    )
    assert "Conv2d(3, 8" in texts["model/text_summary"] and "Linear" in texts["model/text_summary"]
    plugin = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hparams = HParamsPluginData.FromString(plugin).session_start_info.hparams
    assert hparams["dataset"].string_value == "DIGITS" and hparams["batch_size"].number_value == 4
    declared = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/experiment").plugin_data.content)
    assert "hparam/test_top1_pct" in [info.name.tag for info in declared.experiment.metric_infos]
    summary = json.loads((events.run / "summary.json").read_text())
    assert events.Scalars("hparam/test_top1_pct")[0].value == pytest.approx(summary["test_top1_pct"])


def test_the_pictures_show_the_first_batch_and_the_test_splits_mistakes(events):
    info, train_data, _, test = preprocess.load(dataset="DIGITS", holdout=8)
    augment = train.augment_config(resolve({}, "DIGITS"))
    batch, _ = next(train_data.batches(0, batch_size=4, augment=augment))
    assert near(picture(events, "images/first_batch"), to_bytes(grid(preprocess.denormalise(batch, info))))
    best = torch.load(events.run / "best.pt", weights_only=True)["model"]
    network = Tiny(10)
    network.load_state_dict(best)
    result = evaluate(network, test, 10, 64, nullcontext, 24)
    assert near(
        picture(events, "images/confusion_matrix"), to_bytes(confusion_picture(result.confusion, info.class_names))
    )
    wrong = [preprocess.denormalise(image[None], info)[0] for image, _, _ in result.wrong]
    captions = [(str(label), str(guess)) for _, label, guess in result.wrong]
    assert len(wrong) == result.images - result.confusion.diagonal().sum() > 0
    assert near(picture(events, "images/wrong_label_then_prediction"), to_bytes(captioned(wrong, captions)))


def test_without_holdout_the_mistakes_of_the_last_epoch_are_shown(tmp_path, tiny):  # noqa: F811
    events = EventAccumulator(str(go(tmp_path, "--max-steps 1")))
    events.Reload()
    assert set(events.Tags()["images"]) == IMAGE_TAGS


# ---- attention panels -----------------------------------------------------------------------------------------------


def test_the_attention_panels_read_back(tmp_path):
    """Each layer's sheets as they were drawn, histograms over images, heads and pixels, and the largest logit."""
    network = ResNet26(10, stem=True, small_images=True).eval()
    with torch.no_grad(), collect(network, pixels=lattice(9)) as layers:
        network(torch.randn(2, 3, 12, 12))
    writer = Monitor(tmp_path, [], 0, bars=False)
    writer.attention(7, layers)
    writer.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0}).Reload()
    assert len(layers) == 9
    for layer in layers:
        maps = sheets.table([sheets.map_row(layer)])
        assert near(picture(events, f"attention_maps/{layer.name}"), to_bytes(sheets.to_tensor(maps)))
        tables = sheets.table(sheets.embedding_rows(layer))
        assert near(picture(events, f"attention_embeddings/{layer.name}"), to_bytes(sheets.to_tensor(tables)))
        for kind, values in (("entropy_bits", entropy(layer.weights)), ("distance_pixels", mean_distance(layer))):
            (point,) = events.Histograms(f"attention_{kind}/{layer.name}")
            found = point.histogram_value
            assert point.step == 7 and found.num == values.numel()
            wanted = [values.min().item(), values.max().item(), values.double().sum().item()]
            assert [found.min, found.max, found.sum] == pytest.approx(wanted, rel=1e-5)
        (point,) = events.Scalars(f"attention_largest_logit/{layer.name}")
        assert point.value == pytest.approx(layer.largest_logit)


def test_drawing_panels_leaves_the_network_as_it_was():
    """Its mode, its batch norms' statistics and torch's generator; the images are the first of the validation split."""
    _, _, _, test = preprocess.load(dataset="DIGITS")
    network, shown = ResNet26(10, small_images=True).train(), []
    run = SimpleNamespace(
        scored_model=network, data=SimpleNamespace(val=test), autocast=nullcontext, progress=SimpleNamespace(step=5),
        monitor=SimpleNamespace(attention=lambda step, layers: shown.append((step, layers))),
    )  # fmt: skip
    before, generator = {k: v.clone() for k, v in network.state_dict().items()}, torch.get_rng_state()
    train.show_attention(run)
    assert network.training and all(module.training for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    with torch.no_grad(), collect(network.eval(), pixels=lattice(train.WATCHED_PIXELS)) as wanted:
        network(next(test.eval_batches(train.WATCHED_IMAGES))[0])
    ((step, layers),) = shown
    assert step == 5 and len(layers) == 8
    assert all(torch.equal(a.weights, b.weights) for a, b in zip(layers, wanted, strict=True))


def test_a_mean_maps_tile_is_white_for_nothing_and_blue_for_the_most():
    weights = torch.zeros(1, 2, 1, 3, 3)
    weights[0, 0, 0, 0, 2], weights[0, 0, 0, 1, 1] = 0.75, 0.25
    weights[0, 1] = 1 / 9
    pixels = torch.tensor([[1, 1]])
    layer = LayerAttention("x", LocalAttention2d(4, 4, 3, num_heads=2), (3, 3), pixels, pixels - 1, weights, 0.0)
    name, ((first, first_bits), (second, second_bits)) = sheets.map_row(layer)
    assert name == "x" and (first_bits, second_bits) == ("0.81 bit", "3.17 bit")
    cell = sheets.TILE // 3
    found = sheets.to_tensor(first)[:, cell // 2 :: cell, cell // 2 :: cell]
    deep, white = (torch.tensor(colour) / 255 for colour in (sheets.DEEP, sheets.PAPER))
    assert near(to_bytes(found[:, 0, 2]), to_bytes(deep)) and near(to_bytes(found[:, 2, 0]), to_bytes(white))
    assert near(to_bytes(found[:, 1, 1]), to_bytes(white + (deep - white) / 3))
    assert len(sheets.to_tensor(second).flatten(1).unique(dim=1).T) == 1


# ---- pictures -------------------------------------------------------------------------------------------------------


def test_a_confusion_matrix_of_known_cells():
    """Row the label: 3 of class 0 right; of class 1 one right, three taken for class 2; class 2 has no images."""
    confusion = torch.tensor([[3, 0, 0], [0, 1, 3], [0, 0, 0]])
    found = cells(confusion_picture(confusion, ("a", "b", "c")), 3)
    white = torch.tensor((255, 255, 255), dtype=torch.uint8)
    assert torch.equal(found[0, 0], torch.tensor(DARK, dtype=torch.uint8))
    share = torch.tensor([255 + 0.75 * (dark - 255) for dark in DARK])
    assert (found[1, 2].float() - share).abs().max() <= 1
    for row, column in ((0, 1), (0, 2), (1, 0), (2, 0), (2, 1), (2, 2)):
        assert torch.equal(found[row, column], white)


def test_counts_and_names_are_written_up_to_20_classes():
    def ink(image, colour):  # pixels that are not of the background
        return ((image - colour).abs().amax(0) > 0.3).sum().item()

    zero, one = torch.zeros(3, 3, dtype=torch.int64), torch.zeros(3, 3, dtype=torch.int64)
    one[1, 1], one[1, 2] = 1, 9
    cell = slice(-2 * monitor.CELL, -monitor.CELL)
    assert ink(confusion_picture(zero, ("a", "b", "c"))[:, cell, cell], 1.0) == 0
    assert ink(confusion_picture(one, ("a", "b", "c"))[:, cell, cell], 1.0) > 3  # the digit 1
    names = [confusion_picture(zero, name) for name in (("", "", ""), ("a", "b", "c"))]
    side = 3 * monitor.CELL
    assert ink(names[0][:, -side:, :-side], 1.0) == 0 and ink(names[1][:, -side:, :-side], 1.0) > 20
    big = confusion_picture(torch.eye(21, dtype=torch.int64), ("name",) * 21)
    assert big.shape == (3, 21 * 28, 21 * 28) and set(cells(big, 21).flatten().tolist()) == {*DARK, 255}


@pytest.mark.parametrize(
    "names", [("T-shirt/top", "a class with a very long name", "x"), ("n\u00e9", "\u732b", "\udcff")]
)
def test_names_of_any_length_and_script_are_drawn(names):
    image = confusion_picture(torch.ones(3, 3, dtype=torch.int64), names)
    assert image.shape[-1] > 3 * monitor.CELL and image.min() >= 0 and image.max() <= 1
    assert captioned([torch.rand(3, 8, 8)], [(names[0], names[1])]).shape[0] == 3


def test_captions_are_below_their_images_and_not_empty():
    images = [torch.full((3, 8, 8), 0.25), torch.full((3, 8, 8), 0.5)]
    shown = captioned(images, [("cat", "dog"), ("dog", "cat")])
    side = monitor.CAPTIONED_TILE
    assert shown.shape == (3, side + 2 * monitor.LINE + 4, 2 * side + 6)
    assert torch.equal(shown[:, 2 : 2 + side, 2 : 2 + side], torch.full((3, side, side), 0.25))
    strips = shown[:, 2 + side : -2]
    first, second = strips[:, :, 2 : 2 + side], strips[:, :, 4 + side : 4 + 2 * side]
    assert torch.equal(first[:, : monitor.LINE], text_strip("cat", side, "white"))
    assert torch.equal(first[:, monitor.LINE :], text_strip("> dog", side, "orange"))
    assert (first[:, : monitor.LINE] > 0.5).sum() > 50 and not torch.equal(first, second)


def test_enlarging_repeats_pixels():
    image = torch.rand(2, 3, 8, 8)
    big = enlarge(image)
    assert (
        big.shape == (2, 3, 64, 64)
        and torch.equal(big[..., ::8, ::8], image)
        and torch.equal(big[..., 7::8, 7::8], image)
    )
    assert enlarge(torch.rand(1, 3, 65, 65)).shape == (1, 3, 65, 65)


# ---- the terminal ---------------------------------------------------------------------------------------------------


WATCHED = "--dataset DIGITS --name run --epochs 2 --batch-size 4 --device cpu"


class EagerBar(tqdm):
    """Draws each update, however fast they come."""

    def __init__(self, **options):
        super().__init__(**options, mininterval=0, miniters=1)


def test_quiet_where_standard_error_is_no_terminal(tmp_path, tiny, capsys):  # noqa: F811
    assert (
        small_runs.run(
            tmp_path, *["--dataset", "DIGITS", "--name", "run", "--epochs", "2", "--batch-size", "4", "--device", "cpu"]
        )
        == 0
    )
    out, error = capsys.readouterr()
    assert error == "" and "\r" not in out and out.count("\nepoch ") == 2


@pytest.mark.parametrize("flag", ["", "--no-progress"])
def test_bars_on_a_terminal_unless_told_not_to(tmp_path, tiny, capsys, monkeypatch, flag):  # noqa: F811
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(monitor, "tqdm", EagerBar)
    assert small_runs.run(tmp_path, *WATCHED.split(), *flag.split()) == 0
    error = capsys.readouterr().err
    if flag:
        assert error == ""
    else:
        assert all(word in error for word in ("epochs", "epoch 1", "loss=", "top1=", "images=", "/s"))


def test_the_log_is_rebuilt_from_the_rows(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')
    Monitor(tmp_path, [{"epoch": 1}], 4, bars=False).close()
    assert (tmp_path / "log.jsonl").read_text() == '{"epoch": 1}\n'


# ---- evaluation -----------------------------------------------------------------------------------------------------


class Split(list):
    bad_images: tuple = ()

    def eval_batches(self, size, rank, world_size):
        for i in range(0, len(self), size):
            images, labels = zip(*self[i : i + size], strict=True)
            yield torch.stack(images), torch.tensor(labels)


def test_scores_by_hand():
    """Logits are the images: labels 0, 1, 1, 6 of 7 classes; right, right, wrong (in the top 5), wrong (not)."""
    rows = [[5, 0, 0, 0, 0, 0, 0], [0, 5, 0, 0, 0, 0, 0], [5, 4, 3, 2, 1, 0, 0], [6, 5, 4, 3, 2, 1, 0]]
    split = Split(zip(torch.tensor(rows, dtype=torch.float32), (0, 1, 1, 6), strict=True))
    network = torch.nn.Identity().train()
    result = evaluate(network, split, 7, 3, nullcontext, keep_wrong=1)
    assert network.training
    assert (result.images, result.top1_pct, result.top5_pct) == (4, 50.0, 75.0)
    log_p = torch.tensor(rows, dtype=torch.float64).log_softmax(1)
    assert result.loss == pytest.approx(
        -sum(log_p[i, label].item() for i, (_, label) in enumerate(split)) / 4, rel=1e-6
    )
    wanted = torch.zeros(7, 7, dtype=torch.int64)
    for label, guess in ((0, 0), (1, 1), (1, 0), (6, 0)):
        wanted[label, guess] += 1
    assert torch.equal(result.confusion, wanted)
    assert result.per_class_pct() == [100.0, 50.0, None, None, None, None, 0.0]
    assert [(label, guess) for _, label, guess in result.wrong] == [(1, 0)]


def test_fewer_than_five_classes_and_a_lost_image():
    split = Split(zip(torch.eye(3), (0, 1, 0), strict=True))
    result = evaluate(torch.nn.Identity(), split, 3, 2, nullcontext)
    assert isinstance(result, Evaluation) and result.top5_pct == 100 and result.top1_pct == pytest.approx(200 / 3)
    split.bad_images = ("x",)
    with pytest.raises(RuntimeError, match="evaluated 3 images of a split of 2"):
        evaluate(torch.nn.Identity(), split, 3, 2, nullcontext)
