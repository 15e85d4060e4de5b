"""The choice of mixed precision by what a device computes in; nothing here touches a GPU."""

import pytest
import torch

from sasa.training.device import pick_amp


@pytest.mark.parametrize(("native", "wanted"), [(True, torch.bfloat16), (False, None)])
def test_emulated_bf16_is_not_chosen_unasked(native, wanted, monkeypatch):
    """A V100 or T4 says that it supports bf16, which it emulates."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert pick_amp("auto", torch.device("cuda")) == wanted
    assert pick_amp("bf16", torch.device("cuda")) == torch.bfloat16
    assert pick_amp("auto", torch.device("cpu")) is None
