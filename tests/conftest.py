"""What tests share: the repository root on the path, a fixed seed, a reason for skipped GPU tests, small networks."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # the project is run from its checkout, not installed
    sys.path.insert(0, str(ROOT))

import model  # noqa: E402
import small_runs  # noqa: E402
import tiny_runs  # noqa: E402
import train  # noqa: E402
from sasa.kernels import dispatch  # noqa: E402

# The tensors of these tests are small: a second thread only waits, and on a busy machine slows them a lot.
# Tests of threads ask for them by `threads`; subprocesses have their own.
torch.set_num_threads(1)


def pytest_report_header(config):
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, CUDA device: {device}"


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, torch sees none here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed(monkeypatch):
    """Each test draws the same numbers alone and in the suite; backends chosen earlier are forgotten."""
    torch.manual_seed(0)
    monkeypatch.delenv("SASA_BACKEND", raising=False)
    dispatch.forget()


@pytest.fixture
def threads():
    """A function that sets torch's threads for this test only."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def small_network():
    """`small_runs.small_network` for a whole module: name it in `pytestmark` and in module fixtures that build one."""
    with pytest.MonkeyPatch.context() as patch:
        small_runs.small_network(patch)
        yield


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


@pytest.fixture
def tiny(monkeypatch):
    """DIGITS cut to 40 + 12 images, 10 steps an epoch, and tiny_runs.Tiny for every model name."""
    small_runs.few_digits(monkeypatch)
    monkeypatch.setattr(model, "build", lambda name, num_classes, stem, **options: tiny_runs.Tiny(num_classes))


@pytest.fixture
def seen(monkeypatch):
    """The Run objects of the test's runs, with the weights that each started from as `seen.first[i]`."""

    class Seen(list):
        first: list = []  # noqa: RUF012 (one list a test)

    runs_seen = Seen()
    runs_seen.first = []
    original = train.train

    def watched(run, *more):
        runs_seen.append(run)
        runs_seen.first.append({k: v.clone() for k, v in run.model.state_dict().items()})
        return original(run, *more)

    monkeypatch.setattr(train, "train", watched)
    yield runs_seen
    for run in runs_seen:  # workers of an abandoned epoch outlive the cyclic garbage collector's idea of an end
        for split in run.data.splits:
            if hasattr(split, "_files"):
                split.close()
