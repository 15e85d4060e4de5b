"""What a person sees of a run: TensorBoard's files read back, bars only on a terminal."""

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
from config import resolve
from model import ResNet26
from sasa.analysis import figures
from sasa.analysis.attention_maps import entropy, lattice, mean_distance, record_attention
from sasa.training import monitor
from sasa.training.checkpoint import Progress
from sasa.training.evaluation import Evaluation, evaluate
from sasa.training.monitor import Monitor
from sasa.training.run import augmentation
from test_train import Tiny, go, tiny  # noqa: F401 (a fixture)

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


def shows(events: EventAccumulator, tag: str, figure) -> bool:
    return near(picture(events, tag), to_bytes(figures.to_tensor(figure)))


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
    augment = augmentation(resolve({}, "DIGITS"))
    batch, _ = next(train_data.batches(0, batch_size=4, augment=augment))
    assert near(
        picture(events, "images/first_batch"), to_bytes(figures.image_grid(preprocess.denormalise(batch, info)))
    )
    best = torch.load(events.run / "best.pt", weights_only=True)["model"]
    network = Tiny(10)
    network.load_state_dict(best)
    result = evaluate(network, test, 10, 64, nullcontext, 24)
    assert shows(events, "images/confusion_matrix", figures.confusion_figure(result.confusion, info.class_names))
    wrong = [preprocess.denormalise(image[None], info)[0] for image, _, _ in result.wrong]
    captions = [(str(label), str(guess)) for _, label, guess in result.wrong]
    assert len(wrong) == result.images - result.confusion.diagonal().sum() > 0
    assert shows(events, "images/wrong_label_then_prediction", figures.mistakes_figure(wrong, captions))


def test_without_holdout_the_mistakes_of_the_last_epoch_are_shown(tmp_path, tiny):  # noqa: F811
    events = EventAccumulator(str(go(tmp_path, "--max-steps 1")))
    events.Reload()
    assert set(events.Tags()["images"]) == IMAGE_TAGS


# ---- attention panels -----------------------------------------------------------------------------------------------


def test_the_attention_panels_read_back(tmp_path):
    """Each layer's sheets as they were drawn, histograms over images, heads and pixels, and the largest logit."""
    network = ResNet26(10, stem=True, small_images=True).eval()
    with torch.no_grad(), record_attention(network, pixels=lattice(9)) as layers:
        network(torch.randn(2, 3, 12, 12))
    writer = Monitor(tmp_path, Progress(), 1, bars=False)
    writer.attention(7, layers)
    writer.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0}).Reload()
    assert len(layers) == 9
    for layer in layers:
        assert shows(events, f"attention_maps/{layer.name}", figures.card([figures.map_strip(layer)]))
        assert shows(events, f"attention_embeddings/{layer.name}", figures.card(figures.embedding_strips(layer)))
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
    watcher = SimpleNamespace(attention=lambda step, layers: shown.append((step, layers)))
    run = SimpleNamespace(
        eval_model=network, data=SimpleNamespace(val=test), autocast=nullcontext, progress=SimpleNamespace(step=5),
    )  # fmt: skip
    before, generator = {k: v.clone() for k, v in network.state_dict().items()}, torch.get_rng_state()
    train.show_attention(run, watcher)
    assert network.training and all(module.training for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    with torch.no_grad(), record_attention(network.eval(), pixels=lattice(train.WATCHED_PIXELS)) as wanted:
        network(next(test.eval_batches(train.WATCHED_IMAGES))[0])
    ((step, layers),) = shown
    assert step == 5 and len(layers) == 8
    assert all(torch.equal(a.weights, b.weights) for a, b in zip(layers, wanted, strict=True))


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
    Monitor(tmp_path, Progress(rows=[{"epoch": 1}], step=4), 4, bars=False).close()
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
