"""What the tests of the kernels share."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest

import triton_cases


@pytest.fixture(scope="session")
def interpreter():
    """A function that calls another one in the one process of Triton's interpreter (tests/triton_cases.py)."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=triton_cases.start) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()
