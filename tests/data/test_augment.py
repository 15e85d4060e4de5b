"""augment.py: the mathematics of the augmentation, and its random numbers as functions of (seed, epoch, step)."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from data_sets import batches, small_set
from sasa.data import augment as aug
from sasa.data.augment import AugmentConfig, Draws


def test_no_strength_is_no_change():
    data = small_set(30)
    images = data.images
    draws = aug.draw(aug.stream(0, "augment"), 30, 12, 12, AugmentConfig())
    assert draws == Draws(None, None, None, None, None, None)
    assert aug.augment_images(images, draws, AugmentConfig()) is images
    still = AugmentConfig(rotate=1e-12)  # the resampling itself moves nothing
    moved = aug.augment_images(images, aug.draw(aug.stream(0, "augment"), 30, 12, 12, still), still)
    torch.testing.assert_close(moved, images.float(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("reflect", [False, True])
def test_crop_and_flip_by_padding_and_slicing(reflect):
    images = torch.randint(1, 256, (25, 2, 5, 7), dtype=torch.uint8)
    shift = torch.tensor([(y, x) for y in range(-2, 3) for x in range(-2, 3)])
    flip = torch.arange(25) % 3 == 0
    out = aug.crop_flip(images, shift, flip, reflect)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), mode="reflect" if reflect else "constant")
    for i, (dy, dx) in enumerate(shift.tolist()):
        crop = padded[i, :, 2 + dy : 7 + dy, 2 + dx : 9 + dx]
        assert np.array_equal(out[i].numpy(), crop[:, :, ::-1] if flip[i] else crop)
    assert torch.equal(aug.crop_flip(images, None, torch.ones(25, dtype=torch.bool)), images.flip(-1))


def test_resampling_turns_moves_and_enlarges():
    def apply(images, angle=0.0, shift=(0.0, 0.0), scale=1.0, reflect=False):
        theta = aug._theta(np.array([angle]), np.array([shift]), np.array([scale]), images.shape[-2] / images.shape[-1])
        return aug.resample(images, theta, reflect)

    square = torch.rand(1, 2, 6, 6)
    torch.testing.assert_close(apply(square), square)
    torch.testing.assert_close(apply(square, np.pi / 2), torch.rot90(square, 1, (2, 3)), atol=1e-5, rtol=0)
    down_right = apply(square, shift=(2 / 6, 1 / 6))
    torch.testing.assert_close(down_right[:, :, 2:, 1:], square[:, :, :4, :5], atol=1e-5, rtol=0)
    assert down_right[:, :, :2].abs().max() < 1e-5 and down_right[:, :, :, :1].abs().max() < 1e-5
    # H and W differ: a dot one pixel right of the centre comes to stand one pixel above it, then two with scale 2
    wide = torch.zeros(1, 1, 5, 9)
    wide[0, 0, 2, 5] = 1
    for scale, row in ((1.0, 1), (2.0, 0)):
        turned = apply(wide, np.pi / 2, scale=scale)
        assert turned[0, 0, row, 4] > 0.999 and turned[0, 0].argmax() == row * 9 + 4
    # turned first, then moved
    both = apply(wide, np.pi / 2, shift=(2 / 5, 3 / 9))
    assert both[0, 0, 3, 7] > 0.999
    constant = torch.ones(1, 1, 6, 6)
    torch.testing.assert_close(apply(constant, 0.3, (0.2, 0.1), reflect=True), constant)
    assert apply(constant, 0.3, (0.2, 0.1))[0, 0, 0, 0] == 0


def test_cutout_is_a_clipped_square_of_the_mean():
    images = torch.ones(3, 2, 6, 8)
    out = aug.cutout(images, torch.tensor([[1, 2], [-2, -1], [5, 6]]), 3)
    expected = torch.ones(3, 2, 6, 8)
    expected[0, :, 1:4, 2:5] = 0
    expected[1, :, 0:1, 0:2] = 0
    expected[2, :, 5:6, 6:8] = 0
    assert torch.equal(out, expected)
    data = small_set(48)
    data.images.fill_(255)
    holes = torch.cat([(x == 0).sum((2, 3)) for x, _ in batches(data, augment=AugmentConfig(cutout=4))])  # (48, 3)
    assert holes.max() == 16 and holes.min() > 0 and torch.equal(holes[:, 0], holes[:, 2])


def test_draws_stay_in_their_ranges_and_apart():
    config = AugmentConfig(pad=2, flip=True, rotate=30, translate=0.2, zoom=0.3, cutout=5, auto_augment="rand")
    draws = aug.draw(aug.stream(1, "augment"), 4000, 10, 20, config)
    assert draws.shift[:, 0].unique().tolist() == draws.shift[:, 1].unique().tolist() == [-2, -1, 0, 1, 2]
    assert 0.45 < draws.flip.float().mean() < 0.55
    cos, sin = draws.theta[:, 0, 0], draws.theta[:, 0, 1] * -2  # H / W is 1/2
    scale, angle = 1 / torch.hypot(cos, sin), torch.rad2deg(torch.atan2(sin, cos))
    assert 0.7 <= scale.min() < 0.71 and 1.29 < scale.max() <= 1.3001
    assert -30.001 <= angle.min() < -29.5 and 29.5 < angle.max() <= 30.001
    moves = aug.draw(aug.stream(1, "augment"), 4000, 10, 20, AugmentConfig(translate=0.2)).theta[:, :, 2]
    assert 0.39 < moves.abs().max() <= 0.4 and abs(moves.mean()) < 0.02
    centres = draws.cutout + 2
    assert centres.min() == 0 and centres.amax(0).tolist() == [9, 19]
    assert draws.ops.shape == (4000, 2)
    for name, part in (("shift", AugmentConfig(pad=2)), ("flip", AugmentConfig(flip=True))):
        alone = aug.draw(aug.stream(1, "augment"), 4000, 10, 20, part)
        assert torch.equal(getattr(alone, name), getattr(draws, name))
    alone = aug.draw(aug.stream(1, "augment"), 4000, 10, 20, AugmentConfig(cutout=5, auto_augment="rand"))
    assert torch.equal(alone.cutout, draws.cutout) and torch.equal(alone.ops, draws.ops)
    assert torch.equal(draws.take(torch.tensor([7, 3])).theta, draws.theta[[7, 3]])


@pytest.mark.parametrize(("height", "width"), [(375, 500), (60, 40), (1, 1), (3, 900), (900, 3)])
def test_crops_are_distributed_as_torchvisions(height, width):
    uniform = aug.draw_crops(aug.stream(2, "sample"), 4000)
    assert uniform.shape == (4000, aug.CROP_TRIES, 4) and uniform.min() >= 0 and uniform.max() < 1
    ours = torch.tensor([aug.crop_box(numbers, height, width) for numbers in uniform.numpy()])
    top, left, crop_height, crop_width = ours.unbind(1)
    assert ours[:, :2].min() >= 0 and ours[:, 2:].min() >= 1
    assert (top + crop_height).max() <= height and (left + crop_width).max() <= width
    blank = torch.empty(3, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = [v2.RandomResizedCrop(1).make_params([blank]) for _ in range(4000)]
    theirs = torch.tensor([[p["top"], p["left"], p["height"], p["width"]] for p in theirs])
    if min(height, width) > 1 and max(height, width) < 900:  # else no try fits, and both take the centre
        kinds = (ours.double(), theirs.double())
        for quantity in (lambda b: b, lambda b: b[:, 2:3] * b[:, 3:4], lambda b: (b[:, 3:4] / b[:, 2:3]).log()):
            left, right = map(quantity, kinds)
            error = ((left.var(0) + right.var(0)) / 4000).sqrt()
            assert ((left.mean(0) - right.mean(0)).abs() < 4 * error).all()
            torch.testing.assert_close(left.std(0), right.std(0), atol=0, rtol=0.08)
    else:
        assert torch.equal(ours.unique(dim=0), theirs.unique(dim=0)) and len(ours.unique(dim=0)) == 1


def test_crops_reach_every_border():
    for down, right in ((0.0, 0.9999), (0.9999, 0.0)):
        top, left, height, width = aug.crop_box(np.array([[0.5, 0.5, down, right]]), 375, 500)
        assert (top, top + height == 375) == ((0, False) if down == 0 else (375 - height, True))
        assert (left, left + width == 500) == ((0, False) if right == 0 else (500 - width, True))


def test_crops_keep_to_their_own_area_and_aspect():
    uniform = aug.draw_crops(aug.stream(2, "sample"), 500).numpy()
    boxes = torch.tensor([aug.crop_box(numbers, 400, 400, 0.5, 1.1) for numbers in uniform], dtype=torch.float64)
    area, aspect = boxes[:, 2] * boxes[:, 3] / 400**2, boxes[:, 3] / boxes[:, 2]
    assert area.min() > 0.49 and area.min() < 0.52 and area.max() > 0.9
    assert aspect.max() < 1.11 and aspect.min() > 1 / 1.11 and aspect.max() > 1.08 and aspect.min() < 1 / 1.08


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_is_torchvisions(kind, monkeypatch):
    images, labels = torch.rand(6, 3, 9, 11), torch.tensor([0, 3, 1, 1, 2, 0])
    drawn = aug.draw_mix(aug.stream(3, "mix"), 9, 11, AugmentConfig(**{kind: 1.0}))
    assert 0 < drawn.weight < 1 and (drawn.box is None) == (kind == "mixup")
    theirs = v2.MixUp(num_classes=4) if kind == "mixup" else v2.CutMix(num_classes=4)
    top, left, bottom, right = drawn.box or (0, 0, 0, 0)
    params = {"lam": drawn.weight, "lam_adjusted": drawn.weight, "box": (left, top, right, bottom)}
    monkeypatch.setattr(theirs, "make_params", lambda _: params)
    expected, targets = theirs(images, labels)
    ring = torch.tensor([5, 0, 1, 2, 3, 4, 5])
    out, soft = aug.mix(images[ring], labels[ring], 4, drawn)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(soft, targets)


def test_soft_targets_sum_to_one_and_match_the_share_of_pixels():
    images = torch.arange(5.0)[:, None, None, None].expand(5, 3, 8, 8)  # each image shows its own label
    for step in range(40):
        config = AugmentConfig(mixup=0.5, cutmix=0.5)
        mixed, soft = aug.mix(images, torch.arange(5), 5, aug.draw_mix(aug.stream(0, "mix", step), 8, 8, config))
        torch.testing.assert_close(soft.sum(1), torch.ones(4))
        torch.testing.assert_close(mixed.mean((1, 2, 3)), soft @ torch.arange(5.0))


def test_mixing_is_drawn_as_asked():
    def draws(**alphas):
        return [aug.draw_mix(aug.stream(0, "mix", step), 32, 32, AugmentConfig(**alphas)) for step in range(300)]

    assert draws() == [None] * 300
    assert all(d.box is None for d in draws(mixup=0.2))
    assert all(d.box is not None for d in draws(cutmix=0.2))
    assert 110 < sum(d.box is None for d in draws(mixup=0.2, cutmix=1.0)) < 190
    # Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1))
    weights = torch.tensor([d.weight for d in draws(mixup=0.2)])
    assert abs(weights.mean() - 0.5) < 0.07 and abs(weights.var() - 1 / 5.6) < 0.03
    assert len({d.box for d in draws(cutmix=1.0)}) > 250
    # the box has the image's shape, where the border does not clip it
    boxes = [aug.draw_mix(aug.stream(0, "mix", s), 100, 400, AugmentConfig(cutmix=1.0)).box for s in range(300)]
    inside = [(low - top, right - left) for top, left, low, right in boxes if top * left and low < 100 and right < 400]
    assert len(inside) > 30 and all(abs(4 * height - width) <= 8 for height, width in inside)


def test_augmentation_settings_are_checked():
    for wrong in ({"pad": -1}, {"zoom": 1.0}, {"translate": 1.5}, {"mixup": float("nan")}, {"rotate": float("inf")}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            AugmentConfig(**wrong)


def test_streams_of_different_keys_differ():
    keys = [(0, "order", 0), (0, "augment", 0), (0, "order", 0, 0), (0, "order", 0, 1), (1, "order", 0)]
    keys += [(0, "mix", 1, 0), (0, "mix", 0, 1), (2**31 - 1, "order", 0)]
    draws = [tuple(aug.stream(*key).integers(2**60, size=2)) for key in keys]
    assert len(set(draws)) == len(keys)
