"""tools.export: what is written is the network, at every size; what is missing or wrong is one line."""

import io
import json

import pytest
import torch

import small_runs
from config import resolve
from model import ResNet26
from sasa.training import checkpoint
from tools import export

MISSING = {kind: [name for name in names if not export.is_installed(name)] for kind, names in export.PACKAGES.items()}


def needs(kind):
    return pytest.mark.skipif(bool(MISSING[kind]), reason=f"not installed: {', '.join(MISSING[kind])}")


pytestmark = pytest.mark.usefixtures("small_network")
new_torch = pytest.mark.skipif(
    not export.torch_can_export("small", True), reason=f"torch {torch.__version__} is refused"
)


# Of one stage with attention, whose exports hold all that a network's do; tests/kernels/test_tracing.py has the others.
OPTIONS = {"stem": True, "kernel_size": 3, "attention_stages": (2,)}


@pytest.fixture(scope="module")
def network(small_network):
    torch.manual_seed(1)
    network = ResNet26(10, small_images=True, **OPTIONS)
    network(torch.randn(4, 3, 16, 16))  # batch norm's statistics are no longer those of the start
    return network.eval()


def save(folder, network, **given):
    config = resolve({"form": "small", "name": "run"} | OPTIONS | given, "DIGITS")
    identity = small_runs.identity("DIGITS", 10)
    state = checkpoint.weights_state(config, identity, network.state_dict(), 3, 77, "the last epoch")
    checkpoint.save(state, folder, "best.pt")


@pytest.fixture
def best(tmp_path, network):
    save(tmp_path, network, img_size=16)
    return tmp_path / "best.pt"


def code(*arguments):
    try:
        return export.main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code


@new_torch
def test_pt2_is_the_network_in_plain_operations(best, network, capsys):
    assert code(best, "--format", "pt2") == 0, capsys.readouterr().err
    facts = {"sasa.class_names": "", "sasa.config": "", "sasa.eval_size": "", "sasa.mean": ""}
    loaded = torch.export.load(best.with_suffix(".pt2"), extra_files=facts)
    assert not [node for node in loaded.graph.nodes if "sasa" in str(node.target)]  # loads without this project
    for shape in ((1, 3, 9, 30), (5, 3, 16, 16)):
        images = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(loaded.module()(images), network(images), atol=1e-5, rtol=1e-5)
    assert len(json.loads(facts["sasa.class_names"])) == 10
    assert json.loads(facts["sasa.eval_size"]) == 16
    assert json.loads(facts["sasa.config"])["model_name"] == "ResNet26"
    assert len(json.loads(facts["sasa.mean"])) == 3


@new_torch
@needs("onnx")
def test_onnx_is_the_network(best, network, capsys):
    import onnxruntime

    assert code(best, "--format", "onnx") == 0, capsys.readouterr().err
    session = onnxruntime.InferenceSession(best.with_suffix(".onnx"), providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    assert len(json.loads(facts["sasa.class_names"])) == 10
    for shape in ((1, 3, 9, 30), (5, 3, 16, 16)):
        images = torch.randn(shape)
        (got,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(got), network(images), atol=1e-5, rtol=1e-5)


@needs("safetensors")
def test_safetensors_are_the_weights(best, network):
    from safetensors import safe_open

    assert code(best, "--format", "safetensors") == 0
    with safe_open(best.with_suffix(".safetensors"), "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert json.loads(file.metadata()["sasa.config"])["stem"] is True
    assert weights.keys() == network.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in network.state_dict().items())


def test_what_is_not_installed_is_named_with_the_command(best, monkeypatch, capsys):
    monkeypatch.setattr(export, "is_installed", lambda name: name != "onnxscript")
    assert code(best, "--format", "onnx") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("--format onnx needs onnxscript: pip install onnxscript")


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
@pytest.mark.parametrize(("given", "newest_refused", "wanted"), [
    ({"img_size": 16}, "2.9.1+cpu", "2.10"),
    ({"img_size": 64, "form": "imagenet"}, "2.9.1+cpu", "2.10"),
    ({"img_size": 64, "form": "imagenet", "stem": False}, "2.12.0", "2.13"),
], ids=["small", "attention stem", "convolution stem"])  # fmt: skip
def test_an_older_torch_is_refused_in_one_line(tmp_path, monkeypatch, kind, given, newest_refused, wanted, capsys):
    net = ResNet26(10, small_images="form" not in given, **OPTIONS | {"stem": given.get("stem", True)})
    save(tmp_path, net, **given)
    monkeypatch.setattr(export, "is_installed", lambda name: True)
    monkeypatch.setitem(export.EXPORTERS, kind, lambda network, *_: (b"x", lambda content: network))
    monkeypatch.setattr(torch, "__version__", newest_refused)
    assert code(tmp_path / "best.pt", "--format", kind) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f" needs torch {wanted} or newer, this is torch {newest_refused}")
    assert not (tmp_path / f"best.{kind}").exists()
    monkeypatch.setattr(torch, "__version__", f"{wanted}.0")
    assert code(tmp_path / "best.pt", "--format", kind) == 0, capsys.readouterr().err


@new_torch
@pytest.mark.parametrize("fault", ["other weights", "fixed size", "another shape", "nan"])
def test_a_file_that_is_not_the_network_is_not_kept(best, network, monkeypatch, fault, capsys):
    def exporter(given, config, info, facts):
        if fault == "fixed size":
            return b"x", lambda content: lambda images: given(images.view(2, 3, 16, 16))
        if fault == "another shape":
            return b"x", lambda content: lambda images: given(images)[:, :9]
        return b"x", lambda content: lambda images: given(images) + (1e-3 if fault == "other weights" else float("nan"))

    monkeypatch.setitem(export.EXPORTERS, "pt2", exporter)
    assert code(best, "--format", "pt2") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert str(best) in line
    assert not best.with_suffix(".pt2").exists()


@new_torch
def test_images_too_small_for_free_sizes_are_refused(tmp_path, network, capsys):
    save(tmp_path, network, img_size=8)
    assert code(tmp_path / "best.pt", "--format", "pt2") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("images of 8x8 pixels: onnx and pt2 take at least 9x9")


@new_torch
def test_an_exporter_s_error_is_one_line_with_the_version(best, monkeypatch, capsys):
    def fails(*_, **__):
        print("a report of many lines")
        raise ValueError("first\nsecond")

    monkeypatch.setattr(torch.export, "export", fails)
    assert code(best, "--format", "pt2") == 1
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert f"torch.export of torch {torch.__version__} fails: first second" in line


@new_torch
def test_no_file_is_replaced_unasked(best, monkeypatch, capsys):
    buffer = io.BytesIO(b"x")
    monkeypatch.setitem(export.EXPORTERS, "pt2", lambda network, *_: (buffer.getvalue(), lambda content: network))
    target = best.with_suffix(".pt2")
    target.write_text("mine")
    assert code(best, "--format", "pt2") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert target.read_text() == "mine"
    assert code(best, "--format", "pt2", "--output", best.parent / "absent" / "a.pt2") == 2
    assert code(best, "--format", "pt2", "--overwrite") == 0
    assert target.read_bytes() == b"x"
    assert code(best.parent / "absent.pt", "--format", "pt2") == 2
