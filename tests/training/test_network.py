"""Networks by configuration, and those that checkpoints hold."""

import dataclasses

import pytest
import torch

import small_runs
from config import ConfigError, resolve
from model import build
from sasa.training import checkpoint
from sasa.training.checkpoint import CheckpointError
from sasa.training.network import as_flags, build_network, network_of

pytestmark = pytest.mark.usefixtures("small_network")
CLASSES = 7


def state_of(network, **given):
    """The state of a best.pt of `network`, in a run on images of 12 pixels."""
    config = resolve({"form": "small", "img_size": 12, "name": "run", "kernel_size": 3, **given}, "DIGITS")
    identity = small_runs.identity("DIGITS", CLASSES)
    return checkpoint.weights_state(config, identity, network.state_dict(), 3, 77, "the last epoch")


@pytest.fixture(scope="module")
def network(small_network):
    torch.manual_seed(0)
    return build("ResNet26", CLASSES, small_images=True, kernel_size=3).eval()


def test_a_checkpoints_network_computes_what_the_saved_one_did(network):
    trained = network_of(state_of(network))
    images = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        assert torch.equal(trained.network(images), network(images))
    assert not trained.network.training and trained.config.kernel_size == 3
    assert trained.info.class_names == tuple(f"class {i}" for i in range(CLASSES))
    assert (trained.info.image_size, trained.info.eval_size) == (12, 12)


def test_it_is_evaluated_at_the_size_that_its_run_chose(network):
    assert network_of(state_of(network, eval_size=16)).info.eval_size == 16


def test_another_backend_is_taken_where_one_is_named(network):
    state = state_of(network, backend="reference")
    assert network_of(state).network.layer1[0].spatial.backend == "reference"
    assert network_of(state, "composite").network.layer1[0].spatial.backend == "composite"
    with pytest.raises(ConfigError, match="nonsense"):
        network_of(state, "nonsense")


def test_weights_of_another_network_are_refused(network):
    state = state_of(network)
    state["config"] = dataclasses.replace(resolve({"form": "small", "img_size": 12, "stem": True}, "DIGITS")).to_dict()
    with pytest.raises(CheckpointError):
        network_of(state)


def test_as_many_names_as_classes(network):
    state = state_of(network)
    state["data"] = {**state["data"], "class_names": state["data"]["class_names"][:-1]}
    with pytest.raises(CheckpointError, match="6 class names for 7 classes"):
        network_of(state)


def test_a_size_that_no_run_settled_is_refused(network):
    state = state_of(network)
    state["config"] = {**state["config"], "img_size": None}
    with pytest.raises(ConfigError, match="--img-size"):
        network_of(state)


def test_options_that_do_not_go_together_are_named_by_their_flags():
    with pytest.raises(ConfigError, match=r"--num-heads 7") as error:
        build_network(resolve({"num_heads": 7}, "DIGITS"), 10)
    assert "num_heads=" not in str(error.value)


def test_flags_stand_in_place_of_arguments_that_are_settings():
    assert as_flags("num_heads=7: x, y=1") == "--num-heads 7: x, y=1"
