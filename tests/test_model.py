"""The networks: counts to the unit, keys, gradients, sizes, forms, hybrids, errors, and that they learn."""

import hashlib

import pytest
import torch
from torch import nn

import model
import small_runs
from attention import AttentionStem, LocalAttention2d
from model import NaiveResNet26, NaiveResNet38, ResNet26, ResNet38, ResNet50, build

NETWORKS = {"ResNet26": ResNet26, "ResNet38": ResNet38, "ResNet50": ResNet50}
NETWORKS |= {"NaiveResNet26": NaiveResNet26, "NaiveResNet38": NaiveResNet38}


def on_meta(network, *arguments, **options):
    with torch.device("meta"):
        return network(*arguments, **options)


def count(net):
    return sum(p.numel() for p in net.parameters())


def small(stem=False, **options):
    """The cheapest network that has every part: 26 layers, small form, 3x3 windows."""
    return ResNet26(10, stem, **{"small_images": True, "kernel_size": 3, **options})


@pytest.fixture
def narrow(monkeypatch):
    """Networks of five narrow blocks, for tests that need every part of one and not its size."""
    small_runs.small_network(monkeypatch)


# ---- parameters ----------------------------------------------------------------------------------------------------

CIFAR, IMAGENET = {"num_classes": 10, "small_images": True}, {}
# Attention stem of 4 heads and 4 mixtures: q, k 192 each, values 768, embeddings 64 + 64 + 64; the convolutions that
# it takes the place of have 1728 (3x3) and 9408 (7x7) weights.
STEM = 192 + 192 + 768 + 192
SMALL_STEM = 192 + 192 + 16 * 192 + (64 + 64 + 256)  # 16 mixtures
COUNTS = [
    ("ResNet26", CIFAR, 8_306_442),
    ("ResNet38", CIFAR, 12_154_442),
    ("ResNet50", CIFAR, 16_002_442),
    ("NaiveResNet26", CIFAR, 8_740_682),
    ("NaiveResNet38", CIFAR, 15_011_402),
    ("ResNet26", CIFAR | {"attention_stages": ()}, 11_660_362),
    ("ResNet38", CIFAR | {"attention_stages": ()}, 17_590_602),
    ("ResNet50", CIFAR | {"attention_stages": ()}, 23_520_842),
    ("ResNet26", CIFAR | {"stem": True}, 8_306_442 - 1728 + SMALL_STEM),
    ("ResNet26", IMAGENET, 10_342_632),
    ("ResNet38", IMAGENET, 14_190_632),
    ("ResNet50", IMAGENET, 18_038_632),
    ("ResNet26", IMAGENET | {"stem": True}, 10_342_632 - 9408 + STEM),
    ("ResNet26", IMAGENET | {"attention_stages": ()}, 13_696_552),
    ("ResNet38", IMAGENET | {"attention_stages": ()}, 19_626_792),
    ("ResNet50", IMAGENET | {"attention_stages": ()}, 25_557_032),  # torchvision's resnet50, to the unit
    ("ResNet50", IMAGENET | {"content": False}, 18_038_632 - 1_257_472),  # Table 6
]


@pytest.mark.parametrize(("name", "options", "wanted"), COUNTS, ids=[f"{n}-{o}" for n, o, _ in COUNTS])
def test_parameter_counts_to_the_unit(name, options, wanted):
    assert count(on_meta(NETWORKS[name], **options)) == wanted


@pytest.mark.parametrize("conv_stages", [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), (2, 3, 4), (3, 4), (4,)], ids=str)
def test_hybrids_have_the_parameters_of_table_3(conv_stages):
    printed = {(): 18.0, (1,): 18.1, (1, 2): 18.5, (1, 2, 3): 20.8, (1, 2, 3, 4): 25.6}
    printed |= {(2, 3, 4): 25.5, (3, 4): 25.0, (4,): 22.7}
    net = on_meta(ResNet50, attention_stages=[s for s in (1, 2, 3, 4) if s not in conv_stages])
    for stage in (1, 2, 3, 4):
        layers = [isinstance(m, LocalAttention2d) for m in getattr(net, f"layer{stage}").modules()]
        assert any(layers) == (stage not in conv_stages)
    assert -0.05 <= count(net) / 1e6 - printed[conv_stages] < 0.1  # rounded, or cut


def test_depths_and_widths():
    for name, depths in {"ResNet26": (1, 2, 4, 1), "ResNet38": (2, 3, 5, 2), "ResNet50": (3, 4, 6, 3)}.items():
        net = on_meta(NETWORKS[name])
        assert tuple(len(getattr(net, f"layer{i}")) for i in (1, 2, 3, 4)) == depths
        layers = [m for m in net.modules() if isinstance(m, LocalAttention2d)]
        assert len(layers) == sum(depths)
        assert {(m.kernel_size, m.num_heads) for m in layers} == {(7, 8)}
        assert [m.out_channels for m in layers] == [64 * 2**i for i, n in enumerate(depths) for _ in range(n)]
        assert [m.stride for m in layers].count(2) == 3


# A digest of the names and shapes of the whole state dict: a change breaks every checkpoint, and must be meant.
DIGESTS = {
    "ResNet26": ({}, "5c3de17c668d3bbf"),
    "ResNet26 stem": ({"stem": True}, "0a097225f1700296"),
    "ResNet26 convolution": ({"attention_stages": ()}, "90f8a0510e1d8d12"),
    "NaiveResNet26": ({}, "7f9f7ec57a0cf2b4"),
}


@pytest.mark.parametrize("which", DIGESTS)
def test_state_dict_keys_are_pinned(which):
    options, digest = DIGESTS[which]
    state = on_meta(NETWORKS[which.split()[0]], **options).state_dict()
    text = "\n".join(f"{name} {tuple(x.shape)}" for name, x in state.items())
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest, text


def test_keys_of_one_block_are_readable():
    keys = [
        k for k in on_meta(small).state_dict() if k.startswith("layer2.0.") and ("spatial" in k or "downsample" in k)
    ]
    layer = ["rel_row", "rel_col", "query.weight", "key.weight", "value.weight"]
    shortcut = ["0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert keys == [f"layer2.0.spatial.{n}" for n in layer] + [f"layer2.0.downsample.{n}" for n in shortcut]


FORMS = {
    "small": {},
    "small, stem": {"stem": True},
    "small, plain stem": {"stem": True, "stem_values": "plain"},
    "small, conv stem": {"stem": True, "stem_values": "conv"},
    "imagenet": {"small_images": False},
    "imagenet, stem": {"small_images": False, "stem": True},
    "imagenet, sliding stem": {"small_images": False, "stem": True, "stem_window": "sliding"},
    "hybrid": {"attention_stages": (3, 4)},
    "convolution": {"attention_stages": ()},
    "zero border, no content": {"border": "zero", "content": False},
    "absolute": {"position": "absolute"},
    "shared, grouped": {"share_embeddings": True, "grouped": True},
}
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("which", FORMS)
def test_every_parameter_gets_a_finite_gradient_that_is_not_zero(which):
    net = small(**FORMS[which])
    # 64 x 64 for the ImageNet form: layer4 needs a map of more than one pixel for its keys to matter.
    side = 16 if net.small_images else 64
    nn.functional.cross_entropy(net(torch.randn(2, 3, side, side)), torch.tensor([1, 7])).backward()
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.any(), name


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("which", FORMS)
def test_evaluation_does_not_depend_on_batch_mates(which):
    net = small(**FORMS[which])
    net.train()(torch.randn(4, 3, 16, 16))  # running statistics that are not the initial ones
    net.eval()
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        together = net(x)
        alone = torch.cat([net(image[None]) for image in x])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


# ---- initialisation ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("narrow")
def test_the_networks_initialisation_leaves_the_layers_alone(monkeypatch):
    """Each attention layer is as its own reset_parameters left it; each other convolution is not."""
    for layer in (LocalAttention2d, AttentionStem):

        def mark(self):
            for i, p in enumerate(self.parameters()):
                nn.init.constant_(p, 0.01 * (i + 1))

        monkeypatch.setattr(layer, "reset_parameters", mark)
    net = small(stem=True, attention_stages=(2, 4))
    own = set()
    for module in net.modules():
        if isinstance(module, LocalAttention2d | AttentionStem):
            for i, p in enumerate(module.parameters()):
                assert (p == 0.01 * (i + 1)).all()
            own |= set(module.modules())
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module not in own:
            fan_out = module.weight.shape[0] * module.weight[0, 0].numel()
            assert 0.9 < module.weight.std() * (fan_out / 2) ** 0.5 < 1.1


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("network", [ResNet26, NaiveResNet26])
def test_zero_init_residual_starts_every_branch_at_zero(network):
    for zero in (True, False):
        net = network(10, small_images=True, zero_init_residual=zero)
        for module in net.modules():
            if isinstance(module, model.Bottleneck | model.BasicBlock):
                last = module.bn3 if isinstance(module, model.Bottleneck) else module.bn2
                assert (last.weight == (0 if zero else 1)).all()
                if zero and module.downsample is None:
                    x = torch.rand(1, last.num_features, 4, 4)
                    torch.testing.assert_close(module.eval()(x), x)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("stem", [False, True])
def test_one_seed_gives_one_network(stem):
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(small(stem).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
    assert not torch.equal(states[0]["fc.weight"], states[2]["fc.weight"])


# ---- shapes and forms ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("size", [(8, 8), (9, 8), (8, 13), (11, 17), (31, 33)], ids=str)
@pytest.mark.parametrize("which", [w for w in FORMS if "stem" in w or w in ("small", "imagenet", "convolution")])
def test_sizes_from_8x8_up(which, size):
    net = small(**FORMS[which]).eval()
    with torch.no_grad():
        assert net(torch.randn(1, 3, *size)).shape == (1, 10)


@pytest.mark.parametrize(
    ("options", "size", "wanted"),
    [
        ({"small_images": True}, (32, 32), (4, 4)),
        ({"small_images": True, "stem": True}, (33, 31), (5, 4)),
        ({}, (224, 224), (7, 7)),
        ({"stem": True}, (224, 224), (7, 7)),
        ({}, (8, 64), (1, 2)),
        ({"stem": True}, (65, 33), (3, 2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["ResNet26", "NaiveResNet26"])
def test_forward_features_gives_the_map_before_the_pool(name, options, size, wanted):
    net = on_meta(NETWORKS[name], **options)
    assert net.num_features == (512 if name.startswith("Naive") else 2048)
    features = net.forward_features(torch.empty(2, 3, *size, device="meta"))
    assert features.shape == (2, net.num_features, *wanted)


def test_the_stems_of_the_two_forms():
    def kinds(**options):
        return [type(m).__name__ for m in on_meta(ResNet26, **options).stem]

    tail = ["BatchNorm2d", "ReLU"]
    assert kinds() == ["Conv2d", *tail, "MaxPool2d"]
    assert kinds(small_images=True) == ["Conv2d", *tail]
    assert kinds(stem=True) == ["AttentionStem", "BatchNorm2d", "CeilMaxPool2d", "ReLU"]
    assert kinds(stem=True, small_images=True) == ["AttentionStem", *tail]
    assert on_meta(ResNet26, stem=True).stem[0].window == "block"
    assert on_meta(ResNet26, stem=True, small_images=True).stem[0].window == "sliding"
    assert on_meta(ResNet26, stem=True, small_images=True, stem_window="block").stem[0].window == "block"
    for options, side in (({}, 56), ({"stem": True}, 56), ({"small_images": True}, 224)):
        assert on_meta(ResNet26, **options).stem(torch.empty(1, 3, 224, 224, device="meta")).shape == (
            1,
            64,
            side,
            side,
        )


def test_the_pool_comes_right_after_the_attention_and_before_its_batch_norm():
    """At 2x2 -> 1x1: the batch norm and the last 1x1 must already see the pooled map."""
    block = model.Bottleneck(16, 8, 2, lambda i, o, stride: LocalAttention2d(i, o, 3, stride=stride, num_heads=2))
    seen = {}
    for name in ("conv1", "spatial", "bn2", "conv3"):
        getattr(block, name).register_forward_hook(
            lambda m, i, o, n=name: seen.update({n: (i[0].shape[-2:], o.shape[-2:])})
        )
    assert block(torch.randn(2, 16, 6, 5)).shape == (2, 32, 3, 3)
    assert {n: (tuple(a), tuple(b)) for n, (a, b) in seen.items()} == {
        "conv1": ((6, 5), (6, 5)),
        "spatial": ((6, 5), (3, 3)),
        "bn2": ((3, 3), (3, 3)),
        "conv3": ((3, 3), (3, 3)),
    }


def test_options_reach_every_layer_and_the_stem():
    options = {"kernel_size": 5, "num_heads": 4, "border": "zero", "scale": 0.5, "share_embeddings": True}
    net = on_meta(ResNet26, stem=True, stem_num_heads=2, stem_values="plain", backend="reference", **options)
    layers = [m for m in net.modules() if isinstance(m, LocalAttention2d)]
    assert len(layers) == 8
    for layer in layers:
        assert {name: getattr(layer, name) for name in options} == options
        assert layer.backend == "reference"
    assert (net.stem[0].num_heads, net.stem[0].values) == (2, "plain")


def test_reset_classifier():
    net = small().eval()
    x = torch.randn(2, 3, 8, 8)
    body = {name: p.clone() for name, p in net.state_dict().items() if not name.startswith("fc.")}
    net.reset_classifier(7)
    assert (net(x).shape, net.num_classes, net.fc.weight.shape) == ((2, 7), 7, (7, 2048))
    net.reset_classifier(0)
    assert net.num_classes == 0
    assert not [name for name in net.state_dict() if name.startswith("fc")]
    torch.testing.assert_close(net(x), net.forward_features(x).mean((2, 3)))
    net.double().reset_classifier(3)
    assert net(x.double()).shape == (2, 3)
    assert all(
        torch.equal(net.state_dict()[name], p.double() if p.is_floating_point() else p) for name, p in body.items()
    )
    assert on_meta(ResNet26, 0)(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 2048)


def test_reset_classifier_takes_timms_second_argument_where_it_names_the_pool_that_is_there():
    net = on_meta(ResNet26, 4)
    net.reset_classifier(7, None)
    net.reset_classifier(5, global_pool="avg")
    assert net.fc.out_features == 5
    for other in ("max", ""):
        with pytest.raises(ValueError, match="global_pool="):
            net.reset_classifier(3, other)
    assert net.fc.out_features == net.num_classes == 5


@pytest.mark.usefixtures("narrow")
def test_channels_last_gives_the_same():
    net = small(stem=True).eval()
    x = torch.randn(2, 3, 9, 10)
    with torch.no_grad():
        wanted = net(x)
        got = net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("which", ["small", "small, stem", "imagenet, stem", "small, conv stem"])
def test_autocast_stays_close_to_fp64(which, dtype):
    net = small(**FORMS[which]).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        with torch.autocast("cpu", dtype):
            got = net(x)
        wanted = net.double()(x.double())
    assert got.dtype == dtype
    assert (got.double() - wanted).norm() < 16 * torch.finfo(dtype).eps * wanted.norm()


@pytest.mark.usefixtures("narrow")
def test_compiles_without_a_graph_break():
    torch._dynamo.reset()
    net = small(stem=True).eval()
    x = torch.randn(2, 3, 9, 8)
    wanted = net(x)
    got = torch.compile(net, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    grads = [torch.autograd.grad(out.square().mean(), list(net.parameters())) for out in (got, wanted)]
    for ours, eager in zip(*grads, strict=True):
        assert (ours - eager).norm() <= 1e-3 * eager.norm() + 1e-7


# ---- names and errors ----------------------------------------------------------------------------------------------


def test_networks_are_built_by_name_in_any_case():
    for name, network in NETWORKS.items():
        with torch.device("meta"):
            assert count(build(name.upper(), 10)) == count(build(name.lower(), 10)) == count(network(10))
    with pytest.raises(ValueError) as error:
        build("ResNet27")
    assert all(word in str(error.value) for word in ("ResNet27", *NETWORKS))


BAD = {
    "stage": (ValueError, {"attention_stages": (1, 5)}, ("attention_stages", "5", "1 to 4")),
    "classes": (ValueError, {"num_classes": -1}, ("num_classes", "-1", "at least 0")),
    "border": (ValueError, {"border": "wrap"}, ("border", "'wrap'", "mask")),
    "position": (ValueError, {"position": "left"}, ("position", "'left'", "relative")),
    "heads": (ValueError, {"num_heads": 7}, ("num_heads=7", "64")),
    "kernel_size": (ValueError, {"kernel_size": 0}, ("kernel_size", "0")),
    "backend": (ValueError, {"backend": "magic"}, ("backend", "'magic'", "reference")),
    "stem values": (ValueError, {"stem": True, "stem_values": "dense"}, ("values", "'dense'", "mixture")),
    "stem window": (ValueError, {"stem": True, "stem_window": "round"}, ("window", "'round'", "block")),
    "option": (TypeError, {"kernel": 3}, ("kernel", "kernel_size", "border")),
    "heads of a stage": (
        ValueError,
        {"attention_stages": (2, 4), "num_heads": 256},
        ("stage 2", "num_heads=256", "128"),
    ),
    "baseline, option": (TypeError, {"attention_stages": (), "kernel": 3}, ("kernel", "kernel_size")),
    "baseline, value": (ValueError, {"attention_stages": (), "border": "wrap"}, ("border='wrap'", "mask")),
    "baseline, heads": (ValueError, {"attention_stages": (), "num_heads": 7}, ("num_heads=7", "512")),
    "baseline, no stem": (ValueError, {"attention_stages": (), "stem_border": "wrap"}, ("stem_border='wrap'", "mask")),
    "stem option": (TypeError, {"stem_size": 3}, ("stem_size", "stem_block_size", "stem_values")),
    "stride": (TypeError, {"stride": 2}, ("stride", "allowed")),
}


@pytest.mark.parametrize("which", BAD)
def test_bad_options(which):
    kind, options, words = BAD[which]
    with pytest.raises(kind) as error:
        on_meta(ResNet26, **options)
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{error.value} does not say {missing}"


def test_options_need_to_fit_the_attention_stages_alone():
    """128 heads divide the 512 channels of stage 4, and not the 64 of stage 1."""
    assert on_meta(ResNet26, attention_stages=(4,), num_heads=128).layer4[0].spatial.num_heads == 128
    on_meta(ResNet26, attention_stages=(), num_heads=128)


def test_naive_networks_have_no_attention():
    with pytest.raises(ValueError, match="attention_stages"):
        on_meta(NaiveResNet26, attention_stages=(1,))


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((2, 3, 7, 32), ("8x8", "7x32")),
        ((2, 3, 32, 4), ("8x8", "32x4")),
        ((2, 1, 32, 32), ("(2, 1, 32, 32)", "(B, 3, H, W)")),
        ((3, 32, 32), ("(3, 32, 32)", "(B, 3, H, W)")),
    ],
    ids=str,
)
@pytest.mark.parametrize("stem", [False, True])
def test_bad_images(shape, words, stem):
    with pytest.raises(ValueError) as error:
        on_meta(small, stem)(torch.empty(shape, device="meta"))
    assert all(word in str(error.value) for word in words), error.value


# ---- learning ------------------------------------------------------------------------------------------------------


def labelled_images():
    """64 images of 8 x 8 in 8 classes: a blob whose place tells the class, in noise and with a random colour."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(64) % 8
    images = torch.randn(64, 3, 8, 8, generator=generator) * 0.5
    for image, label in zip(images, labels.tolist(), strict=True):
        y, x = divmod(label, 4)
        image[:, 4 * y : 4 * y + 3, 2 * x : 2 * x + 2] += 1 + torch.rand(3, 1, 1, generator=generator)
    return images, labels


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("stem", [False, True], ids=["attention", "attention stem"])
def test_a_network_learns_64_images_to_the_last_one(stem):
    net = ResNet26(8, stem, small_images=True, zero_init_residual=True, kernel_size=3)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.5  # the averages that eval() uses must follow within a few steps
    images, labels = labelled_images()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    for epoch in range(20):
        net.train()
        for batch in torch.randperm(64, generator=torch.Generator().manual_seed(epoch)).split(16):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
        net.eval()
        with torch.no_grad():
            right = (net(images).argmax(1) == labels).sum().item()
        if right == 64:
            return
    pytest.fail(f"{right} of 64 after {epoch + 1} epochs")
