"""visualize.py: its files, the numbers behind the page, what it refuses; and the page itself in headless Chromium."""

import base64
import json
import re

import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

import browser
import preprocess
import small_runs
from config import resolve
from model import ResNet26, ResNet50, build
from sasa.analysis import attention_maps as heads
from sasa.analysis import figures, page
from sasa.analysis.attention_maps import lattice, record_attention
from sasa.analysis.page import ImageAttention
from sasa.training import checkpoint
from tools import visualize
from tools.visualize import NamedImage

SIDE = 12  # pixels: the maps are then 12, 6, 3 and 2 wide


def save(folder, network, **given):
    config = resolve({"form": "small", "img_size": SIDE, "name": "run", **given}, "DIGITS")
    checkpoint.save(checkpoint.weights_state(config, network.state_dict(), 3, 77, "the last epoch"), folder, "best.pt")
    return folder / "best.pt"


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    return ResNet26(10, stem=True, small_images=True).eval()


@pytest.fixture(scope="module")
def best(tmp_path_factory, network):
    return save(tmp_path_factory.mktemp("run"), network, stem=True)


@pytest.fixture(scope="module")
def written(tmp_path_factory, best):
    """The folder that the command wrote for two images."""
    folder = tmp_path_factory.mktemp("written")
    assert visualize.main([str(best), "--index", "7", "2", "--pixel", "9", "4", "--output-dir", str(folder)]) == 0
    return folder


def data_of(folder):
    """What the page holds."""
    text = (folder / "attention.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def numbers(text, *shape):
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8).view(shape).float()


def test_the_files_are_written_and_named(best, capsys):
    assert visualize.main([str(best)]) == 0
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
    assert [layer["name"] for layer in data["layers"]] == [layer.name for layer in layers]
    for i, image in enumerate(data["images"]):
        assert image["label"] == str(labels[i].item()) and image["guess"][0][0] == str(probabilities[i].argmax().item())
        assert image["guess"][0][1] == pytest.approx(probabilities[i].max().item(), abs=1e-5)
        for kept, shown, layer in zip(image["layers"], data["layers"], layers, strict=True):
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
    shown = visualize.attention_of(network, image, info)
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
    assert visualize.main([str(best), "--output-dir", str(folder)]) == 0
    assert other.read_text() == "kept"
    assert {path.name for path in folder.iterdir() if not path.is_symlink()} == set(names)


def test_nothing_is_fetched(written):
    """No address but those of data that the page holds itself."""
    text = re.sub(
        r'<script type="application/json".*?</script>', "", (written / "attention.html").read_text(), flags=re.S
    )
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<link|<iframe|fetch\(|XMLHttp|<script src|<img", text)
    assert all(image["src"].startswith("data:image/png;base64,") for image in data_of(written)["images"])


def test_names_cannot_end_the_data(network):
    with torch.no_grad(), record_attention(network) as layers:
        network(torch.randn(1, 3, 12, 12))
    guess = [("</script>", 1.0)]
    shown = ImageAttention("</script><b>", "<!--", torch.rand(3, 12, 12), layers, layers, guess)
    text = page.render("</script>", "about", [shown])
    assert text.count("</script>") == 2 and "<!--" not in text.split("<body>")[1]


def test_a_lattice_is_said_and_keeps_to_the_budget(network, monkeypatch):
    image = torch.randn(3, 24, 24)
    info = preprocess.info_without_files("DIGITS", 10, 24)
    image = NamedImage("a", "", image)
    whole = visualize.attention_of(network, image, info)
    monkeypatch.setattr(page, "BUDGET", 250_000)
    sparse = visualize.attention_of(network, image, info)
    assert [len(layer.pixels) for layer in whole.layers] == [24 * 24] * 3 + [12 * 12] * 2 + [36] * 4
    means = sum(layer.weights.numel() for layer in sparse.everywhere)
    kept = sum(layer.weights.numel() for layer in sparse.layers)
    assert 4 * (means + kept) / 3 <= 250_000 < 4 * (means + 4 * kept) / 3
    assert "at every pixel." in page._stored(whole.layers) and "layer1.0 16 of 576" in page._stored(sparse.layers)


def test_the_page_of_a_resnet50_is_below_3_mb():
    """One photograph-like image at 224, in the ImageNet form with the attention stem."""
    network = ResNet50(10, stem=True).eval()
    image = torch.nn.functional.interpolate(torch.randn(1, 3, 28, 28), size=224, mode="bicubic")[0]
    info = preprocess.info_without_files("IMAGENET", 10, 224)
    shown = visualize.attention_of(network, NamedImage("photo.jpg", "", image), info)
    assert [layer.size for layer in shown.layers[:2]] == [(224, 224), (56, 56)] and len(shown.layers) == 17
    assert min(len(layer.pixels) for layer in shown.layers[1:]) == 49 and len(shown.layers[1].pixels) == 196
    assert 2_000_000 < len(page.render("title", "about", [shown]).encode()) < 3_000_000


def test_own_images_are_resized_and_named(best, tmp_path):
    for i, size in enumerate(((40, 30), (9, 70))):
        Image.new("RGB", size, (200, 30 * i, 90)).save(tmp_path / f"{i}.png")
    files = [str(tmp_path / f"{i}.png") for i in range(2)]
    assert visualize.main([str(best), "--images", *files, "--output-dir", str(tmp_path / "out")]) == 0
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
    assert visualize.main([str(tmp_path / "run/last.pt")]) == 0
    assert "last.pt, step 1" in data_of(tmp_path / "run/attention")["about"]


# ---- in a browser --------------------------------------------------------------------------------------------------

needs_chromium = pytest.mark.skipif(browser.CHROMIUM is None, reason="needs chromium (Debian: apt install chromium)")
PICTURE = "document.querySelector({!r}).toDataURL()"


@pytest.mark.slow
@needs_chromium
def test_the_page_in_chromium(written, network, tmp_path):
    address = (written / "attention.html").as_uri()
    with browser.Browser(tmp_path / "profile") as tab:
        tab.open(address + "#layer=3&head=2")
        shown = ("#map", "#rollout", ".layer:nth-child(6) button:nth-child(3) canvas")
        before = [tab.value(PICTURE.format(name)) for name in shown]
        tab.click("#map", 0.8, 0.2)
        after = [tab.value(PICTURE.format(name)) for name in shown]
        assert all(a != b for a, b in zip(before, after, strict=True))
        assert (
            tab.value("document.querySelector('#map-says').textContent")
            == "layer2.1, head 3, from pixel (1, 4) of 6 \u00d7 6"
        )
        tab.press("ArrowDown")  # the image has the focus
        assert "pixel (2, 4)" in tab.value("document.querySelector('#map-says').textContent")
        tab.click(".layer:nth-child(2) button:nth-child(5)")
        tab.press("ArrowUp")  # from the tile of layer1.0 to the stem, which has four heads
        assert tab.value("document.querySelector('#map-says').textContent").startswith("stem, head 4, ")
        assert tab.value("document.activeElement.getAttribute('aria-label')") == "stem, head 4"
        tab.click("#thumbs button:nth-child(2)")
        assert "label: " + data_of(written)["images"][1]["label"] in tab.value(
            "document.querySelector('#label').textContent"
        )
        _, _, _, test = preprocess.load(dataset="DIGITS", img_size=SIDE)
        with torch.no_grad(), record_attention(network, pixels=lattice(10**9), mean_heads=True) as layers:
            network(next(test.eval_batches(8))[0][[2]])
        for last, row, col in ((0, 5, 5), (3, 2, 4), (8, 1, 0)):
            wanted = heads.rollout(layers[: last + 1], 0, row, col)
            found = torch.tensor(tab.value(f"Array.from(rollout(1, {last}, {row}, {col}))")).view_as(wanted)
            assert (found - wanted).abs().max() < 2e-3 * wanted.max()
        assert tab.errors == []


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("width", [360, 700, 1280])
def test_no_width_is_too_narrow(written, tmp_path, width):
    with browser.Browser(tmp_path / "profile", width=width, height=800, scheme="dark") as tab:
        tab.open((written / "attention.html").as_uri())
        assert tab.value("document.documentElement.scrollWidth") <= width
        assert tab.value("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 28)"
        assert tab.errors == []
