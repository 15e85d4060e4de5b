"""erasing.py by hand, and distributed as torchvision's RandomErasing; repeated augmentation."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from data_sets import batches, small_set
from sasa.data import augment, erasing
from sasa.data.augment import AugmentConfig
from sasa.data.batches import plan


def test_a_rectangle_of_the_mean():
    out = erasing.erase(torch.ones(3, 2, 4, 5), torch.tensor([[1, 2, 2, 3], [0, 0, 0, 0], [3, 0, 1, 4]]))
    expected = torch.ones(3, 2, 4, 5)
    expected[0, :, 1:3, 2:5] = 0
    expected[2, :, 3, :4] = 0
    assert torch.equal(out, expected)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 60), (8, 8)])
def test_rectangles_are_distributed_as_torchvisions(height, width):
    boxes = erasing.draw(np.random.default_rng(0), 4000, height, width, 0.25).double()
    used = boxes[boxes[:, 2] > 0]
    assert abs(len(used) / 4000 - 0.25) < 0.03
    assert (used[:, 0] + used[:, 2]).max() <= height and (used[:, 1] + used[:, 3]).max() <= width
    ours = erasing.draw(np.random.default_rng(1), 3000, height, width, 1.0).double()
    blank, theirs = torch.zeros(1, height, width), v2.RandomErasing(p=1.0)
    theirs = [theirs.make_params([blank]) for _ in range(3000)]
    theirs = torch.tensor([[p["i"], p["j"], p["h"], p["w"]] for p in theirs], dtype=torch.float64)
    for quantity in (lambda b: b, lambda b: b[:, 2:3] * b[:, 3:4], lambda b: (b[:, 2:3] / b[:, 3:4]).log()):
        left, right = quantity(ours), quantity(theirs)
        error = ((left.var(0) + right.var(0)) / 3000).sqrt()
        assert ((left.mean(0) - right.mean(0)).abs() < 4.5 * error).all()
        torch.testing.assert_close(left.std(0), right.std(0), atol=0, rtol=0.1)


def test_nothing_fits_nothing_is_erased():
    """An image of one pixel: no rectangle is smaller, but for one without pixels."""
    assert erasing.draw(np.random.default_rng(0), 50, 1, 1, 1.0)[:, 2:].prod(1).eq(0).all()


def test_erasing_is_part_of_a_batch_and_leaves_other_draws_as_they_are():
    data = small_set(48)
    data.images.fill_(255)
    plain, erased = (batches(data, augment=AugmentConfig(flip=True, random_erase=p)) for p in (0.0, 0.5))
    holes = torch.cat([(x == 0).sum((1, 2, 3)) for x, _ in erased])
    assert 10 < (holes > 0).sum() < 38 and all((x != 0).all() for x, _ in plain)
    draws = [next(plan(data.info, 48, 0, batch_size=12, augment=AugmentConfig(pad=1, random_erase=p))).draws
             for p in (0.0, 0.5)]  # fmt: skip
    assert torch.equal(draws[0].shift, draws[1].shift)


@pytest.mark.parametrize(("total", "repeats", "distinct"), [(12, 3, 4), (12, 1, 12), (10, 3, 4), (12, 12, 1)])
def test_each_image_of_a_step_is_repeated_and_copies_stand_apart(total, repeats, distinct):
    data = small_set(40)
    config = AugmentConfig(flip=True, repeats=repeats)
    pieces = list(plan(data.info, 40, 0, batch_size=total, augment=config, seed=3))
    order = augment.stream(3, "order", 0).permutation(40)
    assert len(pieces) == 40 // total  # an epoch has as many steps, and takes 1 / repeats of the images
    for step, piece in enumerate(pieces):
        wanted = [order[step * distinct + i % distinct] for i in range(total)]
        assert piece.index.tolist() == wanted
        assert len(set(wanted)) == distinct
    flips = pieces[0].draws.flip.view(-1, distinct) if total % distinct == 0 else None
    if flips is not None and distinct == 4:
        assert not torch.equal(flips[0], flips[1])  # augmented anew


def test_wrong_values_are_refused():
    for wrong in ({"auto_augment": "best"}, {"random_erase": 1.5}, {"repeats": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            AugmentConfig(**wrong)
