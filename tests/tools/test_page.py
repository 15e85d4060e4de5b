"""The page of tools.visualize in headless Chromium: what a click changes, hostile names, two networks, any width."""

import math

import pytest
import torch
from test_visualize import HOSTILE, SIDE, best, data_of, data_of_text, hostile_page, network, written  # noqa: F401

import browser
import preprocess
from sasa.analysis import attention_maps as heads
from sasa.analysis.attention_maps import lattice, record_attention

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.CHROMIUM is None, reason="needs chromium (Debian: apt install chromium)"),
]
HERE = "[...document.querySelectorAll('[data-part=measures] tr.on')][0].cells[1].textContent"
PART = "document.querySelectorAll('.side')[{side}].querySelector('[data-part={part}]')"


class Page(browser.Browser):
    """A tab with the page open; `part` is an element of a side, as the page's script calls it."""

    def text(self, part, side=0):
        return self.value(PART.format(side=side, part=part) + ".textContent")

    def picture(self, part, side=0):
        return self.value(PART.format(side=side, part=part) + ".toDataURL()")


def selector(part, side=0):
    return f".side:nth-child({side + 1}) [data-part={part}]"


def test_pixel_head_and_image_are_chosen_by_mouse_and_keyboard(written, network, tmp_path):  # noqa: F811
    address, data = (written / "attention.html").as_uri(), data_of(written)
    with Page(tmp_path / "profile") as tab:
        tab.open(address + "#layer=3&head=2")
        tile = "document.querySelector('.layer:nth-child(6) button:nth-child(3) canvas').toDataURL()"
        before = [tab.picture("map"), tab.picture("rollout"), tab.value(tile)]
        tab.click(selector("map"), 0.8, 0.2)
        after = [tab.picture("map"), tab.picture("rollout"), tab.value(tile)]
        assert all(a != b for a, b in zip(before, after, strict=True))
        assert tab.text("map-caption") == "layer2.1, head 3, from pixel (row 1, column 4) of 6 \u00d7 6"
        tab.press("ArrowDown")  # the image has the focus
        assert "pixel (row 2, column 4)" in tab.text("map-caption")
        tab.click(".layer:nth-child(2) button:nth-child(5)")
        tab.press("ArrowUp")  # from the tile of layer1.0 to the stem, which has four heads
        assert tab.text("map-caption").startswith("stem, head 4, ")
        assert tab.value("document.activeElement.getAttribute('aria-label')").startswith("stem, head 4, silenced: ")
        tab.click("#thumbs button:nth-child(2)")
        assert tab.text("label") == "label: " + data["images"][1]["label"]
        _, _, _, test = preprocess.load(dataset="DIGITS", img_size=SIDE)
        with torch.no_grad(), record_attention(network, pixels=lattice(10**9), mean_heads=True) as layers:
            network(next(test.eval_batches(8))[0][[2]])
        for last, row, col in ((0, 5, 5), (3, 2, 4), (8, 1, 0)):
            wanted = heads.rollout(layers[: last + 1], 0, row, col)
            found = tab.value(f"Array.from(rollout(data.images[1], {last}, {row}, {col}))")
            assert (torch.tensor(found).view_as(wanted) - wanted).abs().max() < 2e-3 * wanted.max()
        assert tab.errors == []


def test_the_heads_that_count_are_listed_and_lead_to_their_maps(written, tmp_path):  # noqa: F811
    data = data_of(written)
    image, names = data["images"][0], [layer["name"] for layer in data["networks"][0]["layers"]]
    ranked = sorted(image["effects"], key=lambda effect: -effect["mean"]["drop"])
    with Page(tmp_path / "profile") as tab:
        tab.open((written / "attention.html").as_uri())
        rows = tab.value("[...document.querySelectorAll('.effects tbody tr')].map((row) => row.cells[0].textContent)")
        assert rows == [f"{names[effect['layer']]}, head {effect['head'] + 1}" for effect in ranked]
        losses = tab.value("[...document.querySelectorAll('.effects tbody tr')].map((row) => row.cells[1].textContent)")
        assert [float(text.replace("\u2212", "-")) for text in losses] == pytest.approx(
            [effect["mean"]["drop"] for effect in ranked], abs=0.0051
        )
        assert tab.text("map-caption").startswith(rows[0])  # the page opens on the head that counts most
        tab.click(".effects tbody tr:nth-child(9) button")
        ninth, decided = ranked[8], image["guess"][0]
        assert tab.text("map-caption").startswith(rows[8] + ", from pixel")
        lines = tab.value("[...document.querySelectorAll('[data-part=effect] span')].map((line) => line.textContent)")
        for line, how, kind in zip(lines, ("its mean", "zero"), ("mean", "zero"), strict=True):
            answer = ninth[kind]
            verb = "rises" if answer["drop"] < 0 else "falls"
            assert line.startswith(f"Silenced by {how}: the logit of class {decided[0]} {verb} by ")
            assert f"from {100 * decided[1]:.1f}% to {100 * answer['share']:.1f}%" in line
            assert ("the decision stays" in line) == answer["same"]
            assert answer["same"] or f"becomes class {answer['then']} ({100 * answer['thenShare']:.1f}%)" in line
        place = f".layer:nth-child({ninth['layer'] + 1}) button:nth-child({ninth['head'] + 1})"
        assert tab.value(f"document.querySelector('{place}').getAttribute('aria-pressed')") == "true"
        assert tab.value(f"document.querySelector('{place} small').textContent") == losses[8]
        stages = tab.value("[...document.querySelectorAll('.probes tbody tr')].map((row) => row.cells[1].textContent)")
        assert stages == [f"{top1:.1f}%" for _, top1 in data["networks"][0]["probes"]["stages"]]
        assert tab.errors == []


def even_figures(layer):
    """Entropy in bit, distance and own share of equal weights over the window's keys in the map; means over pixels."""
    figures = []
    for row in range(layer["height"]):
        for col in range(layer["width"]):
            top, left = row - layer["back"], col - layer["back"]
            rows = range(max(top, 0), min(top + layer["size"], layer["height"]))
            cols = range(max(left, 0), min(left + layer["size"], layer["width"]))
            keys = [(y, x) for y in rows for x in cols]
            distance = sum(math.hypot(y - row, x - col) for y, x in keys) / len(keys)
            figures.append((math.log2(len(keys)), distance, 1 / len(keys)))
    return [sum(figure) / len(figures) for figure in zip(*figures, strict=True)]


def test_where_a_head_looks_is_put_beside_even_weights(written, network, tmp_path):  # noqa: F811
    layer, head = 3, 2
    data = data_of(written)
    stored = data["networks"][0]["layers"][layer]
    entropy, distance, own = data["images"][0]["layers"][layer]["measures"][head]
    wanted = even_figures(stored)
    with torch.no_grad(), record_attention(network) as layers:
        network(torch.zeros(1, 3, SIDE, SIDE))
    even = heads.even_attention(layers[layer])
    measures = (heads.entropy(even.weights), heads.mean_distance(even), heads.centre_share(even))
    assert [measure.mean().item() for measure in measures] == pytest.approx(wanted, abs=1e-5)
    with Page(tmp_path / "profile") as tab:
        tab.open((written / "attention.html").as_uri() + f"#layer={layer}&head={head}&row=0&col=0")
        assert tab.value(f"evenMeasuresOverImage(layersOf(data.images[0])[{layer}])") == pytest.approx(wanted)
        text = tab.text("spread")
        assert text.startswith("Where it looks: from this pixel ") and f": entropy {tab.value(HERE)} bit" in text
        inside = (stored["size"] - stored["back"]) ** 2  # of the corner's window
        assert f"even weights have {math.log2(inside):.2f}" in text
        assert f"window ({inside} of its pixels lie in the map): entropy" in text
        assert f": {entropy:.2f} of {wanted[0]:.2f} bit, mean distance {distance:.2f} pixels" in text
        assert (
            f"(even {wanted[1]:.2f}), own pixel {100 * own:.1f}% (even {100 * wanted[2]:.1f}%). Windows are cut" in text
        )
        rows = tab.value(
            "[...document.querySelectorAll('[data-part=measures] tr')].map((row) => row.cells[0].textContent)"
        )
        assert rows[-1] == "even"
        last = data["networks"][0]["layers"][8]  # all weight on the pixel (1, 2) of a 3 x 3 map
        sharp = "const p = storedPixel(data.images[0], 8, [0, 0]), w = Array(p.layer.size ** 2).fill(0);"
        sharp += f"w[{(1 + last['back']) * last['size'] + 2 + last['back']}] = 1; p.weights = () => w;"
        named = tab.value(f"(() => {{ {sharp} return sides[0].spread(8, 0, p); }})()")
        assert "from this pixel on a part of its" in named and "100.0% of the weight on row 1, column 2." in named
        # An even map is drawn pale, a sharp one in full orange; the list is walked by arrow keys.
        inner = "{ layer: { size: 3, height: 9, width: 9, back: 1 }, at: [4, 4], origin: [3, 3] }"
        assert tab.value(f"strength({inner}, Array(9).fill(1 / 9))") == pytest.approx(0.3)
        assert tab.value(f"strength({inner}, [1, 0, 0, 0, 0, 0, 0, 0, 0])") == 1
        tab.click(".effects tbody tr:nth-child(3) button")
        tab.press("ArrowDown")
        chosen = tab.value("document.querySelector('.effects tr.on button').textContent")
        assert chosen == tab.value("document.querySelector('.effects tbody tr:nth-child(4) button').textContent")
        assert (
            tab.value("[...document.querySelectorAll('.effects button')].filter((b) => b.tabIndex === 0).length") == 1
        )
        assert tab.errors == []


def test_pixel_and_layer_move_together_on_two_sides(written, tmp_path):  # noqa: F811
    with Page(tmp_path / "profile") as tab:
        tab.open((written / "attention.html").as_uri())
        assert tab.value("document.querySelectorAll('.side').length") == 1
        tab.value("(e => { e.value = '1'; e.onchange(); })(document.querySelector('#other'))")
        assert tab.value("document.querySelectorAll('.side').length") == 2
        assert [tab.text("title", side) for side in (0, 1)] == ["DIGITS test 7", "DIGITS test 2"]
        tab.click(selector("map", 1), 0.1, 0.9)  # on the right
        tab.click(".side:nth-child(1) .layer:nth-child(5) button:nth-child(2)")  # on the left
        assert (
            tab.text("map-caption", 0)
            == tab.text("map-caption", 1)
            == ("layer3.0, head 2, from pixel (row 5, column 0) of 6 \u00d7 6")
        )
        assert tab.picture("map", 0) != tab.picture("map", 1)
        assert tab.value("location.hash").startswith("#image=0&other=1&row=10&col=1&layer=4&head=1")
        tab.value("(e => { e.value = '-1'; e.onchange(); })(document.querySelector('#other'))")
        assert tab.value("document.querySelectorAll('.side').length") == 1 and tab.errors == []


def test_names_are_text_and_nothing_runs(network, tmp_path):  # noqa: F811
    path = hostile_page(network, tmp_path)
    names = [image["name"] for image in data_of_text(path.read_text(encoding="utf-8"))["images"]]
    with Page(tmp_path / "profile", height=1400) as tab:
        tab.call("Page.addScriptToEvaluateOnNewDocument", source="window.ran = []; window.alert = (x) => ran.push(x);")
        tab.open(path.as_uri())
        for image in range(len(HOSTILE)):
            tab.value(f"go({{ image: {image}, other: {len(HOSTILE) + (image + 1) % len(HOSTILE)} }})")
            assert tab.text("title").endswith(names[image]) and tab.text("label") == f"label: {names[-1 - image]}"
            assert tab.value("document.querySelectorAll('.guess li span')[0].textContent") in names
        assert tab.value("document.querySelector('#about').textContent") == HOSTILE[2]
        assert tab.value("document.title").endswith(HOSTILE[0])
        assert tab.value("ran") == [] and tab.errors == []
        # What only the page's own script makes: no element came out of a name.
        assert tab.value("document.querySelectorAll('body img:not(#thumbs img), b *, script:not(#data)').length") == 1
        assert tab.value("[...document.querySelectorAll('#thumbs img')].every((i) => i.src.startsWith('data:image/'))")
        assert tab.value("[...document.querySelectorAll('*')].every((e) => !e.onerror && !e.getAttribute('onerror'))")


@pytest.mark.parametrize("width", [360, 700, 1280])
@pytest.mark.parametrize("other", [-1, 1])
def test_no_width_is_too_narrow(written, tmp_path, width, other):  # noqa: F811
    with Page(tmp_path / "profile", width=width, height=800, scheme="dark") as tab:
        tab.open((written / "attention.html").as_uri() + f"#other={other}")
        assert tab.value("document.documentElement.scrollWidth") <= width
        assert tab.value("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 28)"
        assert tab.errors == []
