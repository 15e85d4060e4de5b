"""The pictures: their pixels where these are data, their texts, and what drawing must leave alone."""

import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from attention import LocalAttention2d
from model import ResNet26
from sasa.analysis import figures
from sasa.analysis.attention_maps import LayerAttention, lattice, record_attention
from sasa.analysis.figures import Cell, Strip

ROOT = Path(__file__).resolve().parents[2]


def pixels(figure) -> np.ndarray:
    """(height, width, 3) uint8 as drawn."""
    return (figures.to_tensor(figure) * 255).round().byte().permute(1, 2, 0).numpy()


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


@pytest.fixture(scope="module")
def layers(small_network):
    network = ResNet26(10, stem=True, small_images=True).eval()
    with torch.no_grad(), record_attention(network, pixels=lattice(9)) as layers:
        network(torch.randn(2, 3, 12, 12))
    return layers


# ---- sheets ---------------------------------------------------------------------------------------------------------


def test_a_sheets_tiles_keep_their_pixels_and_captions_stand_below():
    random_tile = np.random.default_rng(0).integers(0, 255, (10, 20, 3), np.uint8)
    tiles = [Cell(random_tile + i, f"c{i}\nwrong") for i in range(3)]
    found = pixels(figures.sheet([Strip("a name", tiles), Strip("", tiles[:1])], "heading", columns=2))
    margin, line, gap = figures.MARGIN, figures.LINE, figures.GAP
    assert found.shape[1] == 2 * margin + 2 * 20 + gap
    top = margin + line + gap + line + 2  # below the heading and the strip's name
    for i, (row, col) in enumerate(((0, 0), (0, 1), (1, 0), (2, 0))):
        y, x = top + row * (10 + 2 * line + gap), margin + col * (20 + gap)
        assert np.array_equal(found[y : y + 10, x : x + 20], random_tile + i % 3), i
        below = found[y + 10 : y + 10 + line, x : x + 20]
        assert (below < 200).any(), i
    assert (found[:margin] == 255).all() and (found[:, :margin] == 255).all()
    assert (found[margin : margin + line, margin:] < 200).any()


def test_a_mean_map_is_white_for_nothing_and_blue_for_the_most():
    weights = torch.zeros(1, 2, 1, 3, 3)
    weights[0, 0, 0, 0, 2], weights[0, 0, 0, 1, 1] = 0.75, 0.25
    weights[0, 1] = 1 / 9
    places = torch.tensor([[1, 1]])
    layer = LayerAttention("x", LocalAttention2d(4, 4, 3, num_heads=2), (3, 3), places, places - 1, weights, 0.0)
    name, ((first, bits), (second, even)) = figures.map_strip(layer)
    assert name == "x" and (bits, even) == ("0.81 bit", "3.17 bit")
    cell = figures.MAP_SIDE // 3
    middles = first[cell // 2 :: cell, cell // 2 :: cell].astype(int)  # (3, 3, 3)
    most, third, none = middles[0, 2], middles[1, 1], middles[2, 0]
    assert none.min() >= 245 and most[0] < 20 and most[2] > most[0] + 60
    assert most[0] < third[0] < none[0]
    assert len(np.unique(second.reshape(-1, 3), axis=0)) == 1


def test_embeddings_share_a_scale_and_keep_their_sign():
    layer = LocalAttention2d(8, 8, 3, num_heads=2)
    with torch.no_grad():
        layer.rel_row.zero_()
        layer.rel_col.zero_()
        layer.rel_row[0, 0, 0], layer.rel_row[1, 1, 2], layer.rel_col[0, 1, 1] = 2.0, -2.0, 1.0
    attention = LayerAttention("x", layer, (1, 1), torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2, 1, 3, 3), 0.0)
    rows, cols, row_cosines, col_cosines = figures.embedding_strips(attention)
    assert [strip.name for strip in (rows, col_cosines)] == [
        "x, rows, 2.00 at most",
        "x, columns, cosine, 1.00 at most",
    ]
    half, third = figures.MAP_SIDE // 2, figures.MAP_SIDE // 3
    positive, negative = rows.cells[0].picture[0, 0].astype(int), rows.cells[1].picture[half, 2 * third].astype(int)
    weaker = cols.cells[0].picture[half, third].astype(int)
    assert positive[0] > positive[2] + 50 and negative[2] > negative[0] + 50 and weaker[1] > positive[1] + 50
    assert (rows.cells[0].picture[half:, third:] > 240).all()
    diagonal = np.array([tile.picture[5, 5] for tile in row_cosines.cells]).astype(int)
    assert diagonal[0, 0] > diagonal[0, 2] + 50  # an embedding is like itself; one of zeros is like nothing
    assert (diagonal[1] > 240).all()
    none = LayerAttention(
        "x",
        LocalAttention2d(8, 8, 3, position="none"),
        (1, 1),
        torch.zeros(1, 2),
        torch.zeros(1, 2),
        torch.ones(1),
        0.0,
    )
    assert figures.embedding_strips(none) == []


def test_cards_fit_tensorboards_width(layers):
    for layer in layers:
        for strips in ([figures.map_strip(layer)], figures.embedding_strips(layer)):
            assert figures.to_tensor(figures.card(strips)).shape[-1] <= 330
    ten = figures.confusion_figure(torch.eye(10, dtype=torch.int64), tuple("0123456789"))
    assert figures.to_tensor(ten).shape[-1] <= 330
    shown = figures.mistakes_figure([torch.rand(3, 8, 8)] * 5, [("a", "b")] * 5)
    assert figures.to_tensor(shown).shape[-1] <= 330


def test_a_set_of_panels_takes_less_than_a_second(layers):
    """Of the main command's network: maps and embeddings of nine layers."""

    def draw() -> float:
        started = time.process_time()
        for layer in layers:
            figures.to_tensor(figures.card([figures.map_strip(layer)]))
            figures.to_tensor(figures.card(figures.embedding_strips(layer)))
        return time.process_time() - started

    draw()  # the import and the fonts
    assert min(draw() for _ in range(3)) < 1.0


# ---- images ---------------------------------------------------------------------------------------------------------


def test_mistakes_have_label_and_prediction_below():
    images = [torch.full((3, 8, 8), 0.25), torch.full((3, 8, 8), 0.5)]
    figure = figures.mistakes_figure(images, [("cat", "dog"), ("a very long name of a class", "cat")])
    found, side, margin = pixels(figure), figures.IMAGE_SIDE, figures.MARGIN
    assert (found[margin : margin + side, margin : margin + side] == 64).all()
    assert texts(figure) == ["cat", "> dog", "a very long\u2026", "> cat"]
    orange = (found[..., 0].astype(int) - found[..., 2] > 100).any(1)
    assert orange[margin + side + figures.LINE :].any() and not orange[: margin + side + figures.LINE].any()


def test_small_images_are_enlarged_by_whole_numbers():
    image = torch.rand(2, 3, 8, 8)
    grid = figures.image_grid(image)
    first = grid[:, 2 : 2 + 64, 2 : 2 + 64]
    assert torch.equal(first[:, ::8, ::8], image[0]) and torch.equal(first[:, 7::8, 7::8], image[0])
    assert figures.image_grid(torch.rand(2, 3, 65, 65)).shape == (3, 65 + 4, 2 * 67 + 2)


def test_an_overlay_glows_where_the_weight_is_and_frames_the_window():
    image, weights = torch.full((3, 8, 8), 0.5), torch.zeros(1, 1, 1, 3, 3)
    weights[..., 0, 1] = 1.0
    place = torch.tensor([[4, 4]])
    attention = LayerAttention("x", LocalAttention2d(4, 4, 3, num_heads=1), (8, 8), place, place - 1, weights, 0.0)
    (tile,) = figures.overlay_strip(image, attention, None).cells
    cell = figures.OVERLAY_SIDE / 8
    at = lambda row, col: tile.picture[int((row + 0.5) * cell), int((col + 0.5) * cell)].astype(int)  # noqa: E731
    assert tile.picture.shape == (figures.OVERLAY_SIDE, figures.OVERLAY_SIDE, 3) and tile.caption == "head 1"
    assert at(3, 4)[0] > 230 and at(3, 4)[2] < 30  # the glow, one pixel above the centre
    assert abs(at(0, 0) - at(7, 7)).max() == 0 and len(set(at(0, 0))) == 1  # grey elsewhere
    assert (tile.picture[round(4 * cell), round(4.5 * cell)] == 255).all()  # the frame of the pixel
    assert tuple(tile.picture[round(3 * cell), round(3.2 * cell)]) == figures.WINDOW
    strip = figures.overlay_strip(image, attention, torch.eye(8))
    assert [tile.caption for tile in strip.cells] == ["head 1", "\u221a rollout"]


def test_a_frame_outside_the_picture_is_left_out():
    picture = np.zeros((16, 16, 3), np.uint8)
    figures.frame(picture, (-2, -2), 4, (8, 8), (9, 9, 9))
    assert (picture[3, :4] == 9).all() and (picture[:4, 3] == 9).all() and picture.sum() == 27 * 7


# ---- charts ---------------------------------------------------------------------------------------------------------


def test_a_confusion_matrix_of_known_cells():
    """Row the label: 3 of class 0 right; of class 1 one right, three taken for class 2; class 2 has no images."""
    figure = figures.confusion_figure(torch.tensor([[3, 0, 0], [0, 1, 3], [0, 0, 0]]), ("a", "b", "c"))
    ax = figure.axes[0]
    shares = np.array([[100, 0, 0], [0, 25, 75], [0, 0, 0]])
    assert np.allclose(ax.images[0].get_array(), shares) and ax.images[0].get_clim() == (0, 100)
    assert {text.get_position(): text.get_text() for text in ax.texts} == {(0, 0): "3", (1, 1): "1", (2, 1): "3"}
    for axis in (ax.get_xticklabels(), ax.get_yticklabels()):
        assert [label.get_text() for label in axis] == ["a", "b", "c"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("prediction", "label")


def test_a_large_confusion_matrix_has_neither_names_nor_counts():
    (ax,) = figures.confusion_figure(torch.eye(21, dtype=torch.int64), ("name",) * 21).axes
    assert not ax.texts and "name" not in [label.get_text() for label in ax.get_xticklabels()]
    assert figures.to_tensor(figures.confusion_figure(torch.eye(1000, dtype=torch.int64), ("",) * 1000)).min() < 0.2


HOSTILE = ("T-shirt/top", "$x^2", "a\nb", "\udcff\x1b[31m", "n\u00e9 \u732b\U0001f600", "\\frac{", "%s {0}", "")


def test_names_of_any_length_and_script_are_drawn_as_they_are(recwarn):
    """No mark-up, no error, no warning; what a terminal would act on is escaped."""
    matrix = figures.confusion_figure(torch.ones(8, 8, dtype=torch.int64), HOSTILE)
    labels = [label.get_text() for label in matrix.axes[0].get_xticklabels()]
    assert labels[:3] == ["T-shirt/top", "$x^2", "a\\x0ab"] and labels[3] == "\\xff\\x1b[31m"
    assert not any(label.get_parse_math() for label in matrix.axes[0].get_xticklabels())
    mistakes = figures.mistakes_figure([torch.rand(3, 8, 8)] * 8, list(zip(HOSTILE, HOSTILE, strict=True)))
    assert texts(mistakes)[4:6] == ["a\\x0ab", "> a\\x0ab"]
    for figure in (matrix, mistakes):
        assert figures.to_tensor(figure).isfinite().all()
    assert not recwarn.list


def test_measures_are_a_dot_a_head_and_a_row_a_layer(layers):
    figure = figures.measures_figure(layers)
    for ax in figure.axes:
        dots = [collection.get_offsets() for collection in ax.collections]
        assert [len(of) for of in dots] == [layer.weights.shape[1] for layer in layers]
        assert all((of[:, 1] == row).all() for row, of in enumerate(dots))
    bits = figures.entropy(layers[2].weights).mean((0, 2))
    assert np.allclose(figure.axes[0].collections[2].get_offsets()[:, 0], bits)


def test_progress_shows_the_curves_so_far_and_the_first_mistakes():
    rows = [
        {"epoch": 1, "train_loss": 2.0, "val_loss": 1.5, "train_top1_pct": 10.0, "val_top1_pct": 9.0},
        {"epoch": 2, "train_loss": 1.0, "val_loss": 0.5, "train_top1_pct": 20.0, "val_top1_pct": 18.0},
    ]
    figure = figures.progress_figure(rows, [(torch.rand(3, 8, 8), "cat$", f"dog{i}") for i in range(11)])
    loss, top1, *mistakes = figure.axes
    curves = {line.get_label(): line.get_xydata().tolist() for line in (*loss.lines, *top1.lines)}
    assert curves == {
        "training, 1": [[1, 2.0], [2, 1.0]], "validation, 0.5": [[1, 1.5], [2, 0.5]],
        "training, 20": [[1, 10.0], [2, 20.0]], "validation, 18": [[1, 9.0], [2, 18.0]],
    }  # fmt: skip
    assert [ax.get_title() for ax in mistakes] == [f"cat$\n> dog{i}" for i in range(8)]
    assert figures.to_tensor(figure).shape == (3, 560, 1000)
    assert figures.to_tensor(figures.progress_figure(rows[:1], [])).shape == (3, 400, 1000)


# ---- what drawing leaves alone --------------------------------------------------------------------------------------


def test_a_file_is_the_figure_and_replaces_a_link(tmp_path):
    figure = figures.sheet([Strip("a", [Cell(np.zeros((5, 5, 3), np.uint8), "")])])
    other = tmp_path / "other"
    other.write_text("kept")
    (tmp_path / "a.png").symlink_to(other)
    figures.save(figure, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert np.array_equal(np.asarray(picture), pixels(figure))
    assert other.read_text() == "kept" and not (tmp_path / "a.png").is_symlink()


def test_drawing_draws_no_random_numbers(layers):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

    before = states()
    for figure in (figures.card([figures.map_strip(layers[0])]), figures.confusion_figure(torch.eye(3), "abc")):
        figures.to_tensor(figure)
    assert states() == before


def test_matplotlib_is_imported_only_to_draw_and_never_pyplot():
    code = """
import sys, torch, train, tools.visualize, tools.plot
from sasa.analysis import figures
figures.image_grid(torch.rand(1, 3, 8, 8))
assert "matplotlib" not in sys.modules
figures.to_tensor(figures.confusion_figure(torch.eye(3), "abc"))
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
