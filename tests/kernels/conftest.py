"""What the tests of the kernels share."""

import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

import triton_cases
from sasa.kernels import build


@pytest.fixture(scope="session")
def interpreter():
    """A function that calls another one in the one process of Triton's interpreter (tests/triton_cases.py)."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=triton_cases.start) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


@pytest.fixture
def compiler(tmp_path):
    """A compiler that counts its calls and delivers the library already built, so that no test waits for a real one."""
    library = build.library(torch.float32)
    if isinstance(library, str):
        pytest.skip(f"no CPU kernel: {library}")
    script = tmp_path / "c++"
    script.write_text(
        f"""#!/bin/sh
[ "$1" = --version ] && echo "a compiler" && exit
echo called >> {tmp_path}/calls
sleep 0.2
while [ "$1" != -o ]; do shift; done
exec cat {library._name} > "$2"
"""
    )
    script.chmod(0o755)

    def calls():
        path = tmp_path / "calls"
        return len(path.read_text().splitlines()) if path.exists() else 0

    return {"CXX": str(script), "SASA_CACHE_DIR": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}, calls


@pytest.fixture
def cached(tmp_path):
    """A library in a cache folder of its own: the folder, the library's name."""
    library = build.library(torch.float32)
    if isinstance(library, str):
        pytest.skip(f"no CPU kernel: {library}")
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    shutil.copy(library._name, folder / "a.so")
    (folder / "a.so").chmod(0o600)
    return folder, "a.so"
