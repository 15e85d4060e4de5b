"""Initialisation that can be repeated module by module, as FSDP does for a network that was built on the meta device.

FSDP calls `reset_parameters` of each module, parents first. A convolution would then draw PyTorch's usual weights over
those of the layer or network that owns it, so its owner gives it a `reset_parameters` of its own.
"""

from collections.abc import Callable
from functools import partial

from torch import nn


def set_initialiser(module: nn.Module, initialise: Callable[..., None], **options) -> None:
    """From now on module.reset_parameters() is initialise(module, **options); the module is not initialised here.

    `initialise` is a function of a module's file, so that the module can be copied and pickled.
    """
    module.reset_parameters = partial(initialise, module, **options)


def normal_weight(module: nn.Module, std: float) -> None:
    """Normal weights of mean 0."""
    nn.init.normal_(module.weight, std=std)


def he_weight(module: nn.Module) -> None:
    """He et al. 2015, by fan-out: for a convolution before a ReLU."""
    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def zero_norm(module: nn.Module) -> None:
    """A batch norm that starts as the constant 0: the last one of a residual branch."""
    type(module).reset_parameters(module)
    nn.init.zeros_(module.weight)
