"""Attention weights of both layers against the loops, their collection from a network, and what is measured of them."""

import itertools
import math

import pytest
import torch

import oracle
from attention import AttentionStem, LocalAttention2d
from dispatch_modes import LargestStorage
from model import ResNet26
from sasa.analysis import attention_maps as heads
from sasa.analysis.attention_maps import LayerAttention, attention_layers, every_pixel, lattice, record_attention
from sasa.kernels import reference

HEIGHT, WIDTH = 4, 3
KEYS = HEIGHT * WIDTH  # a head as wide as the map has pixels: one-hot values then give the weights back
FORMS = [
    {}, {"border": "zero"}, {"kernel_size": 4}, {"kernel_size": 1}, {"position": "none"}, {"position": "absolute"},
    {"content": False}, {"share_embeddings": True}, {"grouped": True}, {"scale": 0.3, "stride": 2},
]  # fmt: skip


def dense(weights, origins, height, width):
    """Windows put at their place: (B, N, H, W, K, K) -> (B, N, H * W, H * W), row the pixel, column the key."""
    size = weights.shape[-1]
    out = weights.new_zeros(*weights.shape[:2], height * width, height * width)
    for p, (top, left) in enumerate(origins.tolist()):
        for i, j in itertools.product(range(size), repeat=2):
            y, x = top + i, left + j
            if 0 <= y < height and 0 <= x < width:
                out[:, :, p, y * width + x] += weights.flatten(2, 3)[:, :, p, i, j]
    return out


# ---- the layers' weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_layers_weights_are_those_of_the_loops(form):
    layer = LocalAttention2d(8, 2 * KEYS, **{"kernel_size": 3, "num_heads": 2} | form).double()
    x = torch.randn(2, 8, HEIGHT, WIDTH, dtype=torch.float64)
    weights = layer.attention_weights(x)
    size = layer.kernel_size
    assert weights.shape == (2, 2, HEIGHT, WIDTH, size, size)
    assert (weights.sum((-2, -1)) - 1).abs().max() < 1e-12
    placed = x + oracle.position_code(8, HEIGHT, WIDTH) if layer.position == "absolute" else x
    query, key = (
        None if part is None else part(placed).unflatten(1, (2, KEYS)) for part in (layer.query, layer.key)
    )  # fmt: skip
    one_hot = torch.eye(KEYS, dtype=torch.float64).view(1, 1, KEYS, HEIGHT, WIDTH).expand(2, 2, -1, -1, -1)
    tables = (None, None) if layer.rel_row is None else (layer.rel_row, layer.rel_col)
    tables = [None if table is None else table.expand(2, -1, -1) for table in tables]
    options = {"kernel_size": size, "border": layer.border, "scale": layer.scale}
    wanted = oracle.local_attention(query, torch.zeros_like(query) if key is None else key, one_hot, *tables, **options)
    got = dense(weights, layer.window_origins(every_pixel(HEIGHT, WIDTH)), HEIGHT, WIDTH)
    assert (got.mT - wanted.flatten(-2)).abs().max() < 1e-12  # wanted: (B, N, key, pixel)


@pytest.mark.parametrize("border", ["mask", "zero"])
def test_the_weights_are_the_reference_backends_softmax(border):
    layer = LocalAttention2d(16, 16, num_heads=4, border=border)
    x = torch.randn(2, 16, 9, 7)
    query, key = (part(x).unflatten(1, (4, 4)) for part in (layer.query, layer.key))
    wanted = reference.attention_weights(query, key, layer.rel_row, layer.rel_col, 7, border)
    assert (layer.attention_weights(x) - wanted).abs().max() < 1e-6
    value = layer.value(x).unflatten(1, (4, 4))
    mixed = torch.einsum("bnhwij,bndhwij->bndhw", layer.attention_weights(x), reference.windows(value, 7))
    assert (mixed.flatten(1, 2) - layer(x)).abs().max() < 1e-5  # and what the layer's own backend did with them


@pytest.mark.parametrize("values", ["mixture", "plain", "conv"])
@pytest.mark.parametrize(("window", "border"), [*itertools.product(("block", "sliding"), ("mask", "zero"))])
def test_the_stems_weights_make_its_output(window, border, values):
    """As many channels as pixels: with plain values no other weights would. The values do not enter the weights."""
    height, width = 6, 5  # ragged both ways
    options = {"window": window, "border": border, "num_heads": 2}
    stem = AttentionStem(height * width, 8, values="plain", **options).double()
    other = AttentionStem(height * width, 8, values=values, **options).double()
    for name in ("query", "key"):
        getattr(other, name).weight = getattr(stem, name).weight
    x = torch.randn(2, height * width, height, width, dtype=torch.float64)
    weights = other.attention_weights(x)
    assert weights.shape == (2, 2, height, width, 4, 4)
    assert (weights.sum((-2, -1)) - 1).abs().max() < 1e-12
    matrix = dense(weights, other.window_origins(every_pixel(height, width)), height, width)
    made = stem.value(x).unflatten(1, (2, 4)).flatten(-2) @ matrix.mT  # (B, N, D, pixels)
    assert (made.flatten(1, 2) - stem(x).flatten(-2)).abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["layer", "block", "sliding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chosen_pixels_have_the_weights_that_they_have_among_all(kind, dtype):
    layer = LocalAttention2d(8, 8, 5, num_heads=2) if kind == "layer" else AttentionStem(8, 8, num_heads=2, window=kind)
    x, pixels = torch.randn(2, 8, 6, 7), torch.tensor([[5, 6], [0, 0], [3, 2], [0, 0]])
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        whole, chosen = layer.attention_weights(x), layer.attention_weights(x, pixels)
    assert whole.dtype == chosen.dtype == torch.float32
    assert chosen.shape[:3] == (2, 2, 4)
    assert (chosen - whole[:, :, pixels[:, 0], pixels[:, 1]]).abs().max() < 1e-6


def test_wrong_inputs_are_refused_as_in_forward():
    for layer in (LocalAttention2d(16, 16), AttentionStem()):
        with pytest.raises(ValueError, match="channels"):
            layer.attention_weights(torch.randn(1, 5, 8, 8))


# ---- collection ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network(small_network):
    torch.manual_seed(0)
    return ResNet26(10, stem=True, small_images=True).eval()


def test_a_network_is_collected_layer_by_layer(network):
    x = torch.randn(3, 3, 17, 14)
    inputs = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].clone()}))
        for name, module in attention_layers(network).items()
    ]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.no_grad(), record_attention(network, images=[2, 0], pixels=lattice(6)) as layers:
        network(x)
    for hook in hooks:
        hook.remove()
    names = "stem layer1.0 layer2.0 layer2.1 layer3.0 layer4.0"
    assert [layer.name for layer in layers] == list(inputs) == names.split()
    assert [layer.size for layer in layers[:4]] == [(17, 14), (17, 14), (17, 14), (9, 7)]
    for layer in layers:
        wanted = layer.layer.attention_weights(inputs[layer.name][[2, 0]])
        assert len(layer.pixels) <= 6
        assert (layer.weights - wanted[:, :, layer.pixels[:, 0], layer.pixels[:, 1]]).abs().max() < 1e-6
        logits = layer.layer.attention_logits(inputs[layer.name][[2, 0]], layer.pixels)
        assert layer.largest_logit == pytest.approx(logits[logits.isfinite()].abs().max().item())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    with torch.no_grad():
        network(x)
    assert len(layers) == len(inputs)  # closed: nothing more is collected


def test_the_mean_over_heads_in_pieces_is_the_mean(network, monkeypatch):
    x = torch.randn(1, 3, 9, 9)
    with torch.no_grad(), record_attention(network) as each:
        network(x)
    monkeypatch.setattr(heads, "PIXELS_AT_ONCE", 10)
    with torch.no_grad(), record_attention(network, mean_heads=True) as mean:
        network(x)
    for a, b in zip(each, mean, strict=True):
        assert b.weights.shape[1] == 1 and (a.weights.mean(1, keepdim=True) - b.weights).abs().max() < 1e-6


def test_hooks_go_when_the_forward_fails(network):
    with pytest.raises(ValueError, match="at least 8x8"), record_attention(network):
        network(torch.randn(1, 3, 4, 4))
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_memory_is_that_of_the_chosen_pixels():
    """All windows of this map would take 49 times its bytes; three pixels' take next to nothing."""
    layer = LocalAttention2d(64, 64)
    network, x = torch.nn.Sequential(layer), torch.randn(1, 64, 40, 40)
    padded = 64 * 46 * 46 * 4
    largest = {}
    for name, pixels in (("three", lattice(4)), ("all", every_pixel)):
        with torch.no_grad(), record_attention(network, pixels=pixels), LargestStorage() as mode:
            network(x)
        largest[name] = mode.bytes
    with torch.no_grad(), LargestStorage() as alone:
        network(x)
    assert largest["three"] <= max(padded, alone.bytes)
    assert largest["all"] > 49 * 4 * 64 * heads.PIXELS_AT_ONCE // 2  # the measure sees what it should


@pytest.mark.parametrize(
    ("size", "limit", "count"),
    [((7, 7), 49, 49), ((7, 7), 48, 9), ((56, 56), 196, 196), ((28, 28), 196, 196), ((1, 1), 1, 1), ((3, 90), 20, 18)],
)
def test_a_lattice_keeps_its_limit_and_is_even(size, limit, count):
    pixels = lattice(limit)(*size)
    assert len(pixels) == count == len(set(map(tuple, pixels.tolist())))
    assert (pixels >= 0).all() and (pixels < torch.tensor(size)).all()
    for axis in (0, 1):
        steps = pixels[:, axis].unique().diff()
        assert len(steps.unique()) <= 1


# ---- measures ------------------------------------------------------------------------------------------------------


def attention_of(weights, pixels, layer, size=(5, 5)):
    pixels = torch.tensor(pixels)
    return LayerAttention("x", layer, size, pixels, layer.window_origins(pixels), weights, 0.0)


def test_entropy_distance_and_centre_by_hand():
    even, centre, corner = torch.full((3, 3), 1 / 9), torch.zeros(3, 3), torch.zeros(3, 3)
    centre[1, 1] = corner[0, 0] = 1
    weights = torch.stack((even, centre, corner)).view(1, 3, 1, 3, 3)
    layer = attention_of(weights, [(2, 2)], LocalAttention2d(6, 6, 3, num_heads=3))
    assert heads.entropy(weights).flatten().tolist() == pytest.approx([math.log2(9), 0, 0], abs=1e-6)
    assert heads.mean_distance(layer).flatten().tolist() == pytest.approx([(4 + 4 * 2**0.5) / 9, 0, 2**0.5])
    assert heads.centre_share(layer).flatten().tolist() == pytest.approx([1 / 9, 1, 0])
    assert torch.allclose(heads.mean_maps(layer), weights[0, :, 0])


def test_a_blocks_distances_depend_on_the_place_in_it():
    weights = torch.zeros(1, 1, 2, 4, 4)
    weights[..., 0, 0] = 1  # both look at the first key of their block
    layer = attention_of(weights, [(4, 4), (7, 6)], AttentionStem(3, 4, num_heads=1))
    assert heads.mean_distance(layer).flatten().tolist() == pytest.approx([0, 13**0.5])
    assert heads.centre_share(layer).flatten().tolist() == [1, 0]


def test_similarity_is_the_cosine_between_offsets():
    tables = torch.tensor([[[1.0, 2, 0], [0, 0, 3]]])  # offsets (1, 0), (2, 0), (0, 3)
    assert heads.similarity(tables)[0].tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]


def test_embeddings_of_every_kind_of_layer():
    layer = LocalAttention2d(16, 16, 3, num_heads=4, share_embeddings=True)
    rows, cols = heads.embeddings(layer)
    assert torch.equal(rows, layer.rel_row) and torch.equal(cols, layer.rel_col)
    stem = AttentionStem()
    assert torch.equal(heads.embeddings(stem)[1][0], stem.emb_col)
    assert heads.embeddings(AttentionStem(values="plain")) is None
    assert heads.embeddings(LocalAttention2d(8, 8, position="none")) is None


def transfer(layer, image):
    """One layer of a rollout as a matrix (pixels of its map, pixels it hands them to)."""
    height, width = layer.size
    weights = layer.weights[image : image + 1].mean(1, keepdim=True).unflatten(2, layer.size)
    return dense(weights, layer.origins, height, width)[0, 0]


def test_a_rollout_is_the_product_of_the_layers(network):
    """17 x 14, so that the pools are ragged; the matrices by loops."""
    x = torch.randn(2, 3, 17, 14)
    with torch.no_grad(), record_attention(network) as layers:
        network(x)
    layers = heads.rollout_layers(layers)
    assert layers[0].name == "stem"
    for last in (0, 3, len(layers) - 1):
        height, width = layers[last].size
        row, col = height - 1, width // 2
        got = heads.rollout(layers[: last + 1], 1, row, col)
        matrix = torch.eye(height * width) / 2 + transfer(layers[last], 1) / 2
        for layer in reversed(layers[:last]):
            (h, w), s = layer.size, getattr(layer.layer, "stride", 1)
            oh, ow = math.ceil(h / s), math.ceil(w / s)
            pool, keep = torch.zeros(oh * ow, h * w), torch.zeros(oh * ow, h * w)
            for y, x_ in itertools.product(range(h), range(w)):
                pool[y // s * ow + x_ // s, y * w + x_] = 1
            for y, x_ in itertools.product(range(oh), range(ow)):
                keep[y * ow + x_, y * s * w + x_ * s] = 1
            pool = pool / pool.sum(1, keepdim=True)
            matrix = matrix @ (keep / 2 + pool @ transfer(layer, 1) / 2)
        wanted = matrix[row * width + col].view(layers[0].size)
        assert (got - wanted).abs().max() < 1e-6 and got.sum().item() == pytest.approx(1, abs=1e-5)


def test_a_rollout_ends_above_a_pooled_stem_and_crosses_convolutions():
    network = ResNet26(10, stem=True, attention_stages=(1, 3)).eval()
    with torch.no_grad(), record_attention(network, mean_heads=True) as layers:
        network(torch.randn(1, 3, 40, 36))
    layers = heads.rollout_layers(layers)
    assert layers[0].name == "layer1.0" and layers[0].size == (10, 9)
    share = heads.rollout(layers, 0, 1, 1)
    assert share.shape == (10, 9) and share.sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("border", ["mask", "zero"])
@pytest.mark.parametrize("kind", ["layer", "block", "sliding"])
def test_even_weights_are_those_of_a_layer_without_logits(kind, border):
    stem = kind != "layer"
    if stem:
        layer = AttentionStem(3, 16, window=kind, border=border)
    else:
        layer = LocalAttention2d(4, 8, 3, num_heads=2, border=border)
    torch.nn.init.zeros_(layer.query.weight)  # q.k and q.r are 0
    with torch.no_grad(), record_attention(torch.nn.Sequential(layer)) as layers:
        layer(torch.randn(1, 3 if stem else 4, 5, 6))
    even = heads.even_attention(layers[0])
    torch.testing.assert_close(even.weights.expand_as(layers[0].weights), layers[0].weights)
