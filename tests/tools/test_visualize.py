"""tools.visualize: its files, the numbers behind the page, and what it refuses."""

import base64
import dataclasses
import json
import re

import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

import preprocess
import small_runs
from config import resolve
from model import ResNet26, ResNet50, build
from sasa.analysis import attention_maps as heads
from sasa.analysis import causal, figures, page
from sasa.analysis.attention_maps import record_attention
from sasa.analysis.page import NetworkAttention
from sasa.backbone import FEATURES
from sasa.training import checkpoint
from tools import visualize
from tools.visualize import NamedImage

pytestmark = pytest.mark.usefixtures("small_network")
SIDE = 12  # pixels: the maps are then 12, 6, 3 and 2 wide


def save(folder, network, dataset="DIGITS", **given):
    config = resolve({"form": "small", "img_size": SIDE, "name": "run", **given}, dataset)
    weights = network.state_dict()
    identity = small_runs.identity(dataset, len(weights["fc.weight"]))
    state = checkpoint.weights_state(config, identity, weights, 3, 77, "the last epoch")
    checkpoint.save(state, folder, "best.pt")
    return folder / "best.pt"


@pytest.fixture(scope="module")
def network(small_network):
    torch.manual_seed(1)
    return ResNet26(10, stem=True, small_images=True).eval()


@pytest.fixture(scope="module")
def best(tmp_path_factory, network):
    return save(tmp_path_factory.mktemp("run"), network, stem=True)


QUICK = ["--no-effects", "--probe-images", "0"]  # the maps alone


@pytest.fixture(scope="module")
def written(tmp_path_factory, best):
    """The folder that the command wrote for two images, with probes of 60 training images."""
    folder, flags = tmp_path_factory.mktemp("written"), "--index 7 2 --pixel 9 4 --probe-images 60 --output-dir"
    assert visualize.main([str(best), *flags.split(), str(folder)]) == 0
    return folder


def data_of(folder):
    """What the page holds."""
    return data_of_text((folder / "attention.html").read_text(encoding="utf-8"))


def data_of_text(text):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def numbers(text, *shape):
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8).view(shape).float()


def test_the_files_are_written_and_named(best, capsys):
    assert visualize.main([str(best), *QUICK]) == 0
    folder, out = best.parent / "attention", capsys.readouterr().out
    names = {"maps.png", "measures.png", "embeddings.png", "image-0.png", "attention.html"}
    assert {path.name for path in folder.iterdir()} == names and all(str(folder / name) in out for name in names)
    for path in folder.glob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) > 100 and len(picture.convert("RGB").getcolors(1 << 24)) > 20, path


def test_the_pages_numbers_are_the_networks(written, network):
    """To the rounding of a byte: a weight over its map's largest."""
    _, _, _, test = preprocess.load(dataset="DIGITS", img_size=SIDE)
    images = torch.cat([image for image, _ in test.eval_batches(100)])[[7, 2]]
    labels = torch.cat([label for _, label in test.eval_batches(100)])[[7, 2]]
    with torch.no_grad(), record_attention(network) as layers:
        probabilities = network(images).softmax(1)
    data = data_of(written)
    assert data["title"] == "ResNet26, attention stem, DIGITS" and "step 77" in data["about"]
    shown_layers = data["networks"][0]["layers"]
    assert [layer["name"] for layer in shown_layers] == [layer.name for layer in layers]
    for i, image in enumerate(data["images"]):
        assert image["label"] == str(labels[i].item()) and image["guess"][0][0] == str(probabilities[i].argmax().item())
        assert image["guess"][0][1] == pytest.approx(probabilities[i].max().item(), abs=1e-5)
        for kept, shown, layer in zip(image["layers"], shown_layers, layers, strict=True):
            pixels, n, k = len(layer.pixels), shown["heads"], shown["size"]
            assert (shown["rows"], shown["cols"]) == (list(range(layer.size[0])), list(range(layer.size[1])))
            weights = layer.weights[i].transpose(0, 1)  # (P, N, K, K)
            found = numbers(kept["maps"], pixels, n, k, k) / 255
            assert (found - weights / weights.amax((-2, -1), keepdim=True)).abs().max() <= 0.5 / 255 + 1e-5
            mean = weights.mean(1)
            found = numbers(kept["mean"], pixels, k, k) / 255
            assert (found - mean / mean.amax((-2, -1), keepdim=True)).abs().max() <= 0.5 / 255 + 1e-5
            entropy = torch.tensor(kept["measures"])[:, 0]
            assert (entropy - heads.entropy(layer.weights[i]).mean(1)).abs().max() < 1e-3


def test_a_pictures_strips_are_of_the_chosen_pixel(written, network, monkeypatch):
    seen = []
    original = figures.overlay_strip
    monkeypatch.setattr(figures, "overlay_strip", lambda *args: seen.append(args) or original(*args))
    info, _, _, test = preprocess.load(dataset="DIGITS", img_size=SIDE)
    images, labels = next(test.eval_batches(8))
    image = NamedImage("DIGITS test 7", info.class_names[labels[7]], images[7])
    shown = visualize.image_attention(network, image, info, effects=False)
    figure = visualize.draw_pixel(network, image, shown, (9, 4))
    with Image.open(written / "image-0.png") as first:
        found = pil_to_tensor(first)
    assert torch.equal(found, (figures.to_tensor(figure) * 255).round().byte())
    assert [attention.pixels.tolist() for _, attention, _ in seen[:4]] == [[[9, 4]], [[9, 4]], [[9, 4]], [[4, 2]]]
    with torch.no_grad(), record_attention(network, mean_heads=True) as everywhere:
        network(images[7:8])
    assert torch.equal(seen[3][2], heads.rollout(everywhere[:4], 0, 4, 2))


def test_files_are_replaced_and_links_not_written_through(best, tmp_path):
    """Each of its files lies there as a link to someone else's: the links go, what they point at stays."""
    other, folder = tmp_path / "other", tmp_path / "out"
    folder.mkdir()
    other.write_text("kept")
    names = ("maps.png", "measures.png", "embeddings.png", "image-0.png", "attention.html")
    for name in names:
        (folder / name).symlink_to(other)
    assert visualize.main([str(best), *QUICK, "--output-dir", str(folder)]) == 0
    assert other.read_text() == "kept"
    assert {path.name for path in folder.iterdir() if not path.is_symlink()} == set(names)


def test_nothing_is_fetched(written):
    """No address but those of data that the page holds itself."""
    text = re.sub(
        r'<script type="application/json".*?</script>', "", (written / "attention.html").read_text(), flags=re.S
    )
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<link|<iframe|fetch\(|XMLHttp|<script src|<img", text)
    assert all(image["src"].startswith("data:image/png;base64,") for image in data_of(written)["images"])


def test_the_effects_are_those_of_the_network_without_each_head(written, network):
    _, _, _, test = preprocess.load(dataset="DIGITS", img_size=SIDE)
    for shown, index in zip(data_of(written)["images"], (7, 2), strict=True):
        image = test.image(index)[0][None]
        wanted = causal.head_effects(network, image)
        names = [layer["name"] for layer in data_of(written)["networks"][0]["layers"]]
        assert len(shown["effects"]) == len(wanted) == 4 + 5 * 8
        decided = network(image).argmax().item()
        for found, effect in zip(shown["effects"], wanted, strict=True):
            assert (names[found["layer"]], found["head"]) == (effect.layer, effect.head)
            for shown_answer, answer in ((found["mean"], effect.by_mean), (found["zero"], effect.by_zero)):
                assert shown_answer["logit"] == pytest.approx(answer.logit, abs=1e-4)
                assert shown_answer["drop"] == pytest.approx(answer.drop, abs=1e-4)
                assert shown_answer["share"] == pytest.approx(answer.probability, abs=1e-4)
                assert shown_answer["thenShare"] == pytest.approx(answer.prediction_probability, abs=1e-4)
                assert shown_answer["then"] == str(answer.prediction)
                assert shown_answer["same"] == (answer.prediction == decided)


def test_the_probes_are_fitted_on_training_images_spread_over_the_split(written, network):
    """60 of 1,437, by hand; scored on all 360 test images."""
    _, train_data, _, test = preprocess.load(dataset="DIGITS", img_size=SIDE)
    of_train = [train_data.image(i * 1437 // 60) for i in range(60)]
    features = causal.pooled_features(network, torch.stack([image for image, _ in of_train]))
    images, labels = next(test.eval_batches(360))
    tests = causal.pooled_features(network, images)
    data = data_of(written)
    stages, note = data["networks"][0]["probes"]["stages"], data["networks"][0]["probes"]["note"]
    assert [name for name, _ in stages] == list(FEATURES) and "60 training" in note and "360 test" in note
    for place, (stage, top1) in enumerate(stages):
        probe = causal.fit_probe(features[stage], torch.tensor([label for _, label in of_train]), 10)
        shares = probe.probabilities(tests[stage])
        assert top1 == pytest.approx(100 * (shares.argmax(1) == labels).double().mean().item(), abs=0.6)
        for shown, index in zip(data["images"], (7, 2), strict=True):
            name, share = shown["probes"][place]
            assert name == str(shares[index].argmax().item())
            assert share == pytest.approx(shares[index, int(shown["guess"][0][0])].item(), abs=2e-3)


@pytest.mark.parametrize(
    ("flags", "words"),
    [("--probe-images 0", "--probe-images 0"), ("", "they need the training data (nowhere: no such folder")],
)
def test_without_training_data_a_line_stands_in_place_of_the_probes(tmp_path, network, flags, words):
    """A network of a tree that is not there: images of one's own need none of it."""
    saved = save(tmp_path, network, "FOLDER", stem=True, data_dir="nowhere")
    Image.new("RGB", (20, 20), "gray").save(tmp_path / "image.png")
    given = ["--images", str(tmp_path / "image.png"), *flags.split()]
    assert visualize.main([str(saved), "--no-effects", *given, "--output-dir", str(tmp_path / "out")]) == 0
    probes = data_of(tmp_path / "out")["networks"][0]["probes"]
    assert probes["stages"] == [] and words in probes["note"] and "\n" not in probes["note"]


@pytest.mark.parametrize("skip", [False, True])
def test_a_damaged_training_image_costs_the_probes_and_not_the_page(tmp_path, network, tree, skip):
    """With --skip-bad-images of the run, that image alone."""
    narrow = ResNet26(2, stem=True, small_images=True).eval()
    saved = save(tmp_path, narrow, "FOLDER", stem=True, data_dir=str(tree), img_size=24, skip_bad_images=skip)
    (tree / "train" / "cat" / "00.jpg").write_bytes(b"damaged")
    given = ["--data-dir", str(tree), "--no-effects", "--output-dir", str(tmp_path / "out")]
    assert visualize.main([str(saved), *given]) == 0
    probes = data_of(tmp_path / "out")["networks"][0]["probes"]
    assert bool(probes["stages"]) == skip
    assert ("of 21 training images" if skip else "they need the training data (cannot read image") in probes["note"]


def read_images(saved, *flags):
    """The images that the command shows, (B, 3, H, W)."""
    args = visualize.parse([str(saved), *map(str, flags)])[1]
    return torch.stack([chosen.image for chosen in visualize.read_images(args, visualize.load(saved, "cpu")[0])[1]])


def test_own_images_of_a_gray_set_are_fed_as_its_test_images(tmp_path, network):
    saved = save(tmp_path, network, stem=True, img_size=8)
    digit = preprocess.load(dataset="DIGITS")[3].images[3]
    to_pil_image(digit).save(tmp_path / "digit.png")
    pixels = torch.randint(256, (3, 8, 8), dtype=torch.uint8)
    to_pil_image(pixels).save(tmp_path / "photo.png")
    to_pil_image(pixels).convert("L").save(tmp_path / "gray.png")
    names = ("digit.png", "photo.png", "gray.png")
    found = read_images(saved, "--images", *(tmp_path / name for name in names))
    torch.testing.assert_close(found[:1], read_images(saved, "--index", 3), atol=2e-6, rtol=0)
    assert torch.equal(found[1, 0], found[1, 1]) and torch.equal(found[1, 0], found[1, 2])
    torch.testing.assert_close(found[1], found[2], atol=0.02, rtol=0)  # to the rounding of PIL's gray


def test_own_images_of_a_tree_are_fed_as_the_run_evaluates(tmp_path, network, tree):
    fed = {"img_size": 24, "eval_size": 28, "eval_crop": 0.8, "eval_interpolation": "bicubic"}
    saved = save(tmp_path, network, "FOLDER", stem=True, data_dir=str(tree), **fed)
    path = tree / "val" / "cat" / "05.jpg"
    found = read_images(saved, "--images", path)
    assert found.shape == (1, 3, 28, 28) and torch.equal(found, read_images(saved, "--index", 5))


def test_another_folder_need_not_have_the_parts_that_the_run_trained_on(tmp_path, network, tree):
    """8 test images and 8 to train on, fewer than the run's --train-images and --holdout."""
    saved = save(tmp_path, network, "FOLDER", stem=True, data_dir="nowhere", train_images=60, holdout=20, early_stop=3)
    for path in sorted(tree.glob("*/*/*.jpg")):
        if path.name >= "04.jpg":
            path.unlink()
    assert len(read_images(saved, "--data-dir", tree, "--index", 0, 7)) == 2
    flags = ["--data-dir", str(tree), "--no-effects", "--output-dir", str(tmp_path / "out")]
    assert visualize.main([str(saved), *flags]) == 0
    note = data_of(tmp_path / "out")["networks"][0]["probes"]["note"]
    assert f"{tree} has 2 classes, the network 10" in note


def test_two_checkpoints_are_shown_on_one_page(best, tmp_path, network):
    """Of another depth, too: each has its own layers, maps and pictures; the second's first image is compared."""
    (tmp_path / "other").mkdir()
    torch.manual_seed(2)
    other = ResNet50(10, small_images=True).eval()
    saved = save(tmp_path / "other", other, model_name="ResNet50")
    flags = [str(best), str(saved), "--index", "3", "5", *QUICK, "--output-dir", str(tmp_path / "out")]
    assert visualize.main(flags) == 0
    data = data_of(tmp_path / "out")
    assert [net["name"] for net in data["networks"]] == [f"{best.parent.name}/best.pt", "other/best.pt"]
    assert [len(net["layers"]) for net in data["networks"]] == [6, 16] and data["compare"] == 2
    assert [(image["network"], image["place"], image["name"]) for image in data["images"]] == [
        (0, 0, "DIGITS test 3"), (0, 1, "DIGITS test 5"), (1, 0, "DIGITS test 3"), (1, 1, "DIGITS test 5"),
    ]  # fmt: skip
    _, _, _, test = preprocess.load(dataset="DIGITS", img_size=SIDE)
    with torch.no_grad():
        shares = other(test.image(5)[0][None]).softmax(1)[0]
    assert data["images"][3]["guess"][0] == [str(shares.argmax().item()), pytest.approx(shares.max().item(), abs=1e-5)]
    assert {"maps.png", "second-maps.png", "second-image-1.png"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_checkpoints_of_other_data_are_not_compared_by_number(best, tmp_path, network, capsys):
    saved = save(tmp_path, network, "MNIST", stem=True, data_dir="nowhere")
    Image.new("RGB", (20, 20), "gray").save(tmp_path / "image.png")
    own = ["--images", str(tmp_path / "image.png"), *QUICK, "--output-dir", str(tmp_path / "out")]
    assert visualize.main([str(best), str(saved), *own]) == 0
    with pytest.raises(SystemExit) as end:
        visualize.main([str(best)] * 3)
    assert end.value.code == 2 and "3 checkpoints: allowed are one, or two" in capsys.readouterr().err
    chosen = [(preprocess.info_without_files(name, 10, 12), [NamedImage(name, "", torch.rand(3, 12, 12))])
              for name in ("DIGITS", "MNIST")]  # fmt: skip
    with pytest.raises(visualize.ConfigError, match="different data sets, DIGITS and MNIST"):
        visualize.check_pixel(visualize.parse([str(best)])[1], chosen)


@pytest.mark.parametrize("spoiled", ["fc.weight", "layer1.0.spatial.query.weight"])
def test_weights_that_are_not_finite_are_named_and_the_page_is_whole(tmp_path, spoiled, capsys):
    torch.manual_seed(1)
    other = ResNet26(10, stem=True, small_images=True).eval()
    with torch.no_grad():
        other.get_parameter(spoiled).view(-1)[3] = float("nan")
    saved = save(tmp_path, other, stem=True)
    assert visualize.main([str(saved)]) == 0
    out, error = capsys.readouterr()
    assert spoiled in error and error.count("\n") == 1 and "attention.html" in out

    def refuse(constant):
        raise AssertionError(constant)

    text = (tmp_path / "attention/attention.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1], parse_constant=refuse)
    assert "not finite" in data["notice"] and spoiled in data["notice"]
    assert data["images"][0]["guess"][0][1] is None and data["images"][0]["effects"] == []


HOSTILE = (
    "</script><script>alert(1)</script>", "<!--", "<img src=x onerror=alert(2)>", "'\"`${alert(3)}@STYLE@@DATA@",
    "a\u2028b\n\x1b[31m\u202egnp", "\udcff\ud800 \U0001f600", "&lt;b&gt;&#39;", "javascript:alert(4)",
)  # fmt: skip


def hostile_page(network, folder):
    """A page whose every name is hostile: image, label, classes, network, title. Two images, with effects."""
    names = [HOSTILE[i % len(HOSTILE)] for i in range(10)]
    info = dataclasses.replace(preprocess.info_without_files("DIGITS", 10, SIDE), class_names=tuple(names))
    torch.manual_seed(0)
    images = [
        NamedImage(name, label, torch.randn(3, SIDE, SIDE))
        for name, label in zip(HOSTILE, reversed(HOSTILE), strict=True)
    ]
    shown = [visualize.image_attention(network, image, info) for image in images]
    networks = [
        NetworkAttention(HOSTILE[0], shown, [], HOSTILE[2]),
        NetworkAttention(HOSTILE[2], shown, [], HOSTILE[0]),
    ]
    path = folder / "hostile.html"
    path.write_text(page.render(HOSTILE[0], HOSTILE[2], networks), encoding="utf-8")
    return path


def test_names_cannot_end_the_data(network, tmp_path):
    text = hostile_page(network, tmp_path).read_text(encoding="utf-8")
    assert text.count("</script>") == 2 and text.count("<script") == 2 and "<!--" not in text.split("<body>")[1]
    assert "<img" not in text and "\u2028" not in text and "\x1b" not in text and "\u202e" not in text
    data = data_of_text(text)
    assert data["images"][0]["name"] == HOSTILE[0] and data["networks"][1]["name"] == HOSTILE[2]
    assert data["images"][4]["name"] == "a\\u2028b\\x0a\\x1b[31m\\u202egnp"
    assert data["images"][3]["name"] == HOSTILE[3]  # what looks like a placeholder of the template stays


def test_a_lattice_is_said_and_keeps_to_the_budget(network, monkeypatch):
    image = torch.randn(3, 24, 24)
    info = preprocess.info_without_files("DIGITS", 10, 24)
    image = NamedImage("a", "", image)
    whole = visualize.image_attention(network, image, info, effects=False)
    monkeypatch.setattr(page, "BUDGET", 220_000)
    sparse = visualize.image_attention(network, image, info, effects=False)
    assert [len(layer.pixels) for layer in whole.layers] == [24 * 24] * 3 + [12 * 12] * 2 + [36]
    means = sum(layer.weights.numel() for layer in sparse.everywhere)
    kept = sum(layer.weights.numel() for layer in sparse.layers)
    assert 4 * (means + kept) / 3 <= 220_000 < 4 * (means + 4 * kept) / 3
    assert "at every pixel, each weight to 1/255" in page._stored([NetworkAttention("a", [whole])])
    both = page._stored([NetworkAttention("a", [whole]), NetworkAttention("b", [sparse])])
    assert "a: This page" in both and "layer1.0 16 of 576" in both.split("b: ")[1]


def test_the_page_of_a_resnet50_is_below_3_mb():
    """One photograph-like image at 224, in the ImageNet form with the attention stem."""
    network = ResNet50(10, stem=True).eval()
    image = torch.nn.functional.interpolate(torch.randn(1, 3, 28, 28), size=224, mode="bicubic")[0]
    info = preprocess.info_without_files("IMAGENET", 10, 224)
    shown = visualize.image_attention(network, NamedImage("photo.jpg", "", image), info, effects=False)
    answer = causal.Silenced(-1.23456, -1.23456, 0.123456, 9, 0.123456)
    effects = [causal.HeadEffect(layer.name, head, answer, answer)
               for layer in shown.layers for head in range(layer.weights.shape[1])]  # fmt: skip
    assert len(effects) == 4 + 16 * 8
    shown = dataclasses.replace(shown, effects=effects)
    assert [layer.size for layer in shown.layers[:2]] == [(224, 224), (56, 56)] and len(shown.layers) == 17
    assert min(len(layer.pixels) for layer in shown.layers[1:]) == 49 and len(shown.layers[1].pixels) == 196
    assert 2_000_000 < len(page.render("title", "about", [NetworkAttention("a", [shown])]).encode()) < 3_000_000


def test_own_images_are_resized_and_named(best, tmp_path):
    for i, size in enumerate(((40, 30), (9, 70))):
        Image.new("RGB", size, (200, 30 * i, 90)).save(tmp_path / f"{i}.png")
    files = [str(tmp_path / f"{i}.png") for i in range(2)]
    assert visualize.main([str(best), "--images", *files, *QUICK, "--output-dir", str(tmp_path / "out")]) == 0
    images = data_of(tmp_path / "out")["images"]
    assert [(image["name"], image["label"], image["width"]) for image in images] == [
        ("0.png", "", 12),
        ("1.png", "", 12),
    ]
    assert images[0]["guess"][0][0].startswith("class ")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--index 360", ["--index 360", "0 to 359"]),
        ("--index -1", ["--index -1"]),
        ("--index x", ["--index", "x"]),
        ("--pixel 12 0", ["--pixel 12 0", "11"]),
        ("--dataset NONE", ["--dataset", "NONE"]),
        ("--dataset FOLDER --data-dir nowhere", ["nowhere", "no such folder"]),
        ("--images nowhere.png", ["nowhere.png"]),
        ("--images a.png --dataset DIGITS", ["--dataset", "--images"]),
        ("--images a.png --index 0", ["--images", "--index"]),
        ("--device gpu", ["--device gpu"]),
        ("--probe-images -1", ["--probe-images -1", "at least 0"]),
        ("--output-dir {file}", ["file"]),
    ],
)
def test_a_wrong_value_ends_with_one_line(best, tmp_path, capsys, flags, words):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as end:
        visualize.main([str(best), *flags.format(file=tmp_path / "file").split()])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("tools.visualize: error: ") and error.count("\n") == 1, error
    assert [word for word in words if word not in error] == [], error


def test_checkpoints_without_anything_to_see_are_refused(tmp_path, capsys):
    convolutions = save(tmp_path, build("ResNet26", 10, small_images=True, attention_stages=()), attention_stages=())
    for path, words in ((convolutions, "no attention layers"), (tmp_path / "none.pt", "no such file")):
        with pytest.raises(SystemExit) as end:
            visualize.main([str(path)])
        error = capsys.readouterr().err
        assert end.value.code == 2 and words in error and error.count("\n") == 1


def test_a_runs_own_checkpoint_is_read(tmp_path, monkeypatch):
    """A state of train.py, with its moving average, in place of weights alone."""
    small_runs.few_digits(monkeypatch)
    assert small_runs.run(tmp_path, *small_runs.FLAGS.split(), "--max-steps", "1") == 0
    assert visualize.main([str(tmp_path / "run/last.pt"), *QUICK]) == 0
    assert "last.pt, step 1" in data_of(tmp_path / "run/attention")["about"]
