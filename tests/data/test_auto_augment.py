"""auto_augment.py: bitwise torchvision's own policies, and drawn as often as they draw."""

import numpy as np
import pytest
import torch
from torchvision.transforms import AutoAugmentPolicy, v2

from data_sets import batches, same, small_set
from sasa.data import auto_augment
from sasa.data.augment import AugmentConfig, stream
from sasa.data.auto_augment import OPERATIONS, apply, draw
from sasa.data.auto_augment_policies import POLICIES, policy_of

THEIR_NAMES = {name.lower().replace("_", ""): name for name in OPERATIONS}
THEIRS = {"trivial": v2.TrivialAugmentWide(), "auto": v2.AutoAugment(), "rand": v2.RandAugment()}


def code(name: str, magnitude: int, negative: int) -> int:
    return int(auto_augment._encode(*(np.array([x]) for x in (OPERATIONS.index(name), magnitude, negative))))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("kind", "bins"), [("rand", 31), ("trivial", 31), ("auto", 10)])
def test_every_operation_at_every_magnitude_is_torchvisions(kind, bins, channels):
    image, theirs = torch.randint(0, 256, (channels, 16, 12), dtype=torch.uint8), THEIRS[kind]
    codes, wanted = {}, []
    for name, (magnitudes, signed) in theirs._AUGMENTATION_SPACE.items():
        values = magnitudes(bins, 16, 12)
        for magnitude in range(1 if values is None else bins):
            for negative in range(1 + signed):
                number = code(THEIR_NAMES[name.lower()], magnitude, negative)
                assert number not in codes
                codes[number] = len(wanted)
                value = 0.0 if values is None else float(values[magnitude]) * (-1 if negative else 1)
                wanted.append(theirs._apply_image_or_video_transform(
                    image, name, value, interpolation=theirs.interpolation, fill=theirs._fill))  # fmt: skip
    ours = apply(image.expand(len(codes), -1, -1, -1), torch.tensor(list(codes))[:, None], kind)
    wrong = [number for number, i in codes.items() if not torch.equal(ours[i], wanted[i])]
    assert wrong == [] and len(codes) > 2 * bins * 9


def test_batch_mates_change_nothing():
    images = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8)
    for kind in ("rand", "trivial", "auto"):
        codes = draw(np.random.default_rng(1), kind, 20, "CIFAR10")
        whole = apply(images, codes, kind)
        for i in range(20):
            assert torch.equal(whole[i : i + 1], apply(images[i : i + 1], codes[i : i + 1], kind))
        for turn in codes.split(1, 1):
            images = apply(images, turn, kind)
        assert torch.equal(whole, images)


def test_rand_draws_two_operations_of_fourteen_at_one_magnitude():
    codes = draw(np.random.default_rng(0), "rand", 4000, "CIFAR10")
    assert codes.shape == (4000, 2)
    names = [name for name in OPERATIONS if name != "invert"]
    wanted = {code(name, 9, negative) for name in names for negative in (0, 1)}
    assert set(codes.unique().tolist()) == wanted and len(wanted) == 14 + 9


def test_trivial_draws_one_operation_of_fourteen_at_any_magnitude():
    codes = draw(np.random.default_rng(0), "trivial", 20000, "CIFAR10")
    assert codes.shape == (20000, 1)
    shares = torch.bincount(codes[:, 0] // 62, minlength=15) / 20000
    torch.testing.assert_close(shares, torch.tensor([1 / 14] * 14 + [0.0]), atol=0.01, rtol=0)
    rotated = codes[codes // 62 == OPERATIONS.index("rotate")]
    assert (rotated // 2 % 31).unique().tolist() == list(range(31)) and 0.45 < (rotated % 2).float().mean() < 0.55


@pytest.mark.parametrize(("dataset", "policy"), [
    ("IMAGENET", AutoAugmentPolicy.IMAGENET), ("FOLDER", AutoAugmentPolicy.IMAGENET),
    ("CIFAR100", AutoAugmentPolicy.CIFAR10), ("DIGITS", AutoAugmentPolicy.SVHN),
])  # fmt: skip
def test_the_policies_are_torchvisions(dataset, policy):
    theirs = [
        tuple((THEIR_NAMES[name.lower()], chance, magnitude or 0) for name, chance, magnitude in row)
        for row in v2.AutoAugment(policy)._policies
    ]
    assert [tuple(map(tuple, row)) for row in POLICIES[policy_of(dataset)]] == theirs and len(theirs) == 25


def test_auto_does_each_step_with_its_own_probability(monkeypatch):
    """One row only: shear_x always, forwards or backwards; invert in a quarter of the images."""
    row = (auto_augment.POLICIES["cifar"][0][0]._replace(operation="shear_x", chance=1.0, magnitude=4),
           auto_augment.POLICIES["cifar"][0][0]._replace(operation="invert", chance=0.25))  # fmt: skip
    monkeypatch.setitem(auto_augment.POLICIES, "cifar", (row,))
    auto_augment._policy_tables.cache_clear()
    try:
        first, second = draw(np.random.default_rng(0), "auto", 4000, "CIFAR10").unbind(1)
    finally:
        auto_augment._policy_tables.cache_clear()
    assert first.unique().tolist() == [code("shear_x", 4, 0), code("shear_x", 4, 1)]
    assert second.unique().tolist() == [0, code("invert", 0, 0)]
    assert 0.22 < (second > 0).float().mean() < 0.28


def test_randaugment_draws_what_it_did_before_there_were_others():
    """A run that was started with --randaugment goes on exactly: the numbers of its stream are pinned."""
    old = np.random.default_rng(3).integers(0, 28, (2, 2))
    codes = draw(np.random.default_rng(3), "rand", 2, "DIGITS")
    wanted = [[code(OPERATIONS[number // 2], 9, number % 2) for number in pair] for pair in old.tolist()]
    assert codes.tolist() == wanted


@pytest.mark.parametrize("kind", ["trivial", "auto"])
def test_ranks_and_pieces_take_their_part_of_one_draw(kind):
    data = small_set(48)
    config = AugmentConfig(auto_augment=kind, random_erase=0.5, repeats=3, mixup=0.4)
    alone = batches(data, batch_size=24, augment=config)
    assert not same(alone, batches(data, batch_size=24))
    parts = [batches(data, batch_size=6, accumulate=2, rank=rank, world_size=2, augment=config) for rank in range(2)]
    joined = [[torch.cat(pair) for pair in zip(*(parts[r][2 * s + i] for r in range(2) for i in range(2)), strict=True)]
              for s in range(2)]  # fmt: skip
    assert same(alone, joined)
    assert same(alone[1:], batches(data, start_step=1, batch_size=24, augment=config))
    assert stream(0, "erase", 1, 2).random() != stream(0, "drop_path", 1, 2).random()
