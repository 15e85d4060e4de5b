"""The choice of a backend: by name, by SASA_BACKEND, and the first that is usable and takes the call."""

import sys
import types

import pytest
import torch

from local_attention_cases import draw
from sasa import kernels
from sasa.kernels import dispatch, local_attention, reference
from sasa.kernels.interface import CallKind


@pytest.fixture
def spy(monkeypatch):
    """A backend "spy" in front of the others that counts its calls; its `reason` and `refusal` can be set."""
    module = types.ModuleType("spy_backend")
    module.reason, module.refusal, module.calls = None, None, []
    module.unusable = lambda: module.reason
    module.unsupported = lambda kind: module.refusal

    def forward(*arguments):
        module.calls.append("forward")
        return reference.forward(*arguments)

    def backward(*arguments, **options):
        module.calls.append("backward")
        return reference.backward(*arguments, **options)

    module.forward, module.backward = forward, backward
    monkeypatch.setitem(sys.modules, "spy_backend", module)
    monkeypatch.setattr(dispatch, "MODULES", {"spy": "spy_backend", "reference": "sasa.kernels.reference"})
    return module


def small_call(backend="auto"):
    dispatch.forget()  # what the test changed since the last call
    inputs = draw(1, 1, 2, 3, 3, 3, "mask", True, True, 1.0)[0]
    leaves = [x.requires_grad_() for x in inputs.values()]
    local_attention(*leaves, kernel_size=3, backend=backend).sum().backward()


def test_backends_lists_each_with_none_or_a_reason(spy):
    assert kernels.backends() == {"spy": None, "reference": None}
    spy.reason = "no compiler"
    assert kernels.backends() == {"spy": "no compiler", "reference": None}


def test_auto_takes_the_first_backend_that_is_usable_and_takes_the_call(spy):
    small_call()
    assert spy.calls == ["forward", "backward"]
    spy.refusal = "maps of 3x3"
    small_call()
    spy.refusal, spy.reason = None, "no compiler"
    small_call()
    assert spy.calls == ["forward", "backward"]


def test_a_call_on_another_device_does_not_wait_for_the_build_of_the_c_kernel(spy, monkeypatch):
    def build():
        raise AssertionError("built")

    spy.unusable = build
    monkeypatch.setattr(dispatch, "MODULES", {"cpu": "spy_backend", "reference": "sasa.kernels.reference"})
    dispatch.forget()
    assert dispatch.choose_for(CallKind(torch.device("cuda"), torch.float64, 8, 7)) == "reference"
    with pytest.raises(AssertionError, match="built"):
        dispatch.choose_for(CallKind(torch.device("cpu"), torch.float64, 8, 7))


def test_a_named_backend_serves_the_call(spy):
    small_call("reference")
    assert spy.calls == []
    small_call("spy")
    assert spy.calls == ["forward", "backward"]


def test_sasa_backend_replaces_auto_but_no_named_backend(spy, monkeypatch):
    monkeypatch.setenv("SASA_BACKEND", "reference")
    small_call()
    assert spy.calls == []
    small_call("spy")
    assert spy.calls == ["forward", "backward"]
    monkeypatch.setenv("SASA_BACKEND", "")
    small_call()
    assert len(spy.calls) == 4


def test_a_choice_is_made_once_for_each_kind_of_call(spy, monkeypatch):
    """Polling the backends and reading the environment at each forward and backward would cost host time."""
    polled = []
    spy.unsupported = polled.append
    query = torch.zeros(2, 1, 4, 3, 3)
    for _ in range(3):
        assert kernels.choose_backend(query, 3) == "spy"
    assert polled == [(torch.device("cpu"), torch.float32, 4, 3)]
    assert kernels.choose_backend(query[:1, ..., :2], 3) == "spy"  # batch and map do not count
    assert len(polled) == 1
    for kind in ((query.double(), 3), (query[:, :, :2], 3), (query, 5), (query.to("meta"), 3)):
        assert kernels.choose_backend(*kind) == "spy"
    assert len(polled) == 5
    monkeypatch.setenv("SASA_BACKEND", "reference")
    assert kernels.choose_backend(query, 3) == "spy"  # a process reads it once
    dispatch.forget()
    assert kernels.choose_backend(query, 3) == "reference"


def test_an_unknown_sasa_backend_is_named_as_what_it_is(spy, monkeypatch):
    """The caller passed no backend, so an error about `backend` alone would send him to the wrong place."""
    monkeypatch.setenv("SASA_BACKEND", "magic")
    with pytest.raises(ValueError) as error:
        small_call()
    assert all(word in str(error.value) for word in ("SASA_BACKEND", "magic", "spy", "reference"))


def test_an_unusable_backend_asked_for_by_name_says_why(spy, monkeypatch):
    spy.reason = "no compiler"
    with pytest.raises(ValueError, match=r"backend='spy'.*no compiler"):
        small_call("spy")
    monkeypatch.setenv("SASA_BACKEND", "spy")
    with pytest.raises(ValueError, match=r"spy.*no compiler"):
        small_call()


def test_a_backend_that_refuses_the_call_says_why(spy):
    spy.refusal = "kernel_size=3: up to 2"
    with pytest.raises(ValueError, match=r"backend='spy'.*kernel_size=3: up to 2"):
        small_call("spy")
