"""A tree of images for the tests of the data."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(scope="module")
def tree_source(tmp_path_factory):
    """train/ and val/ with two classes of real JPEGs of several sizes, one of them gray."""
    root = tmp_path_factory.mktemp("tree")
    rng = np.random.default_rng(0)
    for split, size in (("train", 11), ("val", 7)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(size):
                coarse = rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)
                image = Image.fromarray(coarse).resize((24 + i, 40 - i), Image.Resampling.BICUBIC)
                (image.convert("L") if i == 3 else image).save(root / split / name / f"{i:02}.jpg", quality=90)
    return root


@pytest.fixture
def tree(tree_source, tmp_path):
    """A copy that the test may damage."""
    return Path(shutil.copytree(tree_source, tmp_path / "tree"))


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Images of a few pixels gain nothing from more, and other work on the machine is left alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
