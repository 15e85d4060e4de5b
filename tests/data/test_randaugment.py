"""randaugment.py: bitwise torchvision's own policy."""

import pytest
import torch
from torchvision.transforms import v2

from sasa.data import randaugment


@pytest.mark.parametrize("channels", [1, 3])
def test_randaugment_is_torchvisions_image_by_image(channels):
    image = torch.randint(0, 256, (channels, 16, 16), dtype=torch.uint8)
    ops = torch.arange(28)[:, None]
    ours = randaugment.apply(image.expand(28, -1, -1, -1), ops)
    theirs = set()
    for seed in range(300):
        torch.manual_seed(seed)
        theirs.add(bytes(v2.RandAugment(num_ops=1)(image).numpy()))
    assert {bytes(out.numpy()) for out in ours} == theirs
    images = torch.randint(0, 256, (20, channels, 16, 16), dtype=torch.uint8)
    ops = torch.randint(0, 28, (20, 2))
    whole = randaugment.apply(images, ops)
    assert torch.equal(whole, randaugment.apply(randaugment.apply(images, ops[:, :1]), ops[:, 1:]))
    for i in range(20):  # batch mates change nothing
        assert torch.equal(whole[i : i + 1], randaugment.apply(images[i : i + 1], ops[i : i + 1]))
