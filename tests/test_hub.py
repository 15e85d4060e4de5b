"""torch.hub entry points, each loaded as a user does: from another folder and in a process of its own."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import hubconf

PARAMETERS = {
    "naive_resnet26": 8_740_682,
    "naive_resnet38": 15_011_402,
    "resnet26": 8_306_442,
    "resnet38": 12_154_442,
    "resnet50": 16_002_442,
}

SCRIPT = """
import sys, torch
torch.set_num_threads(1)
torch.manual_seed(0)
folder = sys.argv[1]
for name in sys.argv[2:]:
    net = torch.hub.load(folder, name, source="local", num_classes=10, small_images=True).eval()
    print(name, sum(p.numel() for p in net.parameters()), tuple(net(torch.randn(1, 3, 8, 8)).shape))
net = torch.hub.load(folder, "resnet26", source="local", num_classes=7, stem=True, kernel_size=3, stem_values="plain")
print("stem", tuple(net(torch.randn(2, 3, 32, 40)).shape))
"""

ROOT = Path(__file__).resolve().parents[1]


def test_every_entry_point_is_a_network_and_says_what_it_is():
    entries = {name: entry for name, entry in vars(hubconf).items() if callable(entry) and name[0] != "_"}  # its rule
    assert set(entries) == set(PARAMETERS)
    assert all(inspect.getdoc(entry) for entry in entries.values())


def test_every_network_loads_from_another_folder(tmp_path):
    (tmp_path / "model.py").write_text("raise ImportError('a file of the user, not of the repository')")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["TORCH_HOME"] = str(tmp_path)
    command = [sys.executable, "-c", SCRIPT, str(ROOT), *PARAMETERS]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [f"{name} {count} (1, 10)" for name, count in PARAMETERS.items()]
    assert done.stdout.splitlines() == [*lines, "stem (2, 7)"]


# Each case is a fork of a process that has imported the libraries only: what one imports, the others have not.
LEFT_ALONE = """
import os, sys, torch, torchvision, torch._dynamo
for first in sys.argv[2:]:
    child = os.fork()
    if not child:
        break
    if os.waitpid(child, 0)[1]:
        sys.exit(f"the user's {first} first")
else:
    sys.exit()
if first != "none":
    __import__(first)
before, path = {n: sys.modules.get(n) for n in ("model", "attention", "config", "kernels")}, list(sys.path)
net = torch.hub.load(sys.argv[1], "resnet26", source="local", num_classes=3, small_images=True, kernel_size=3)
assert {n: sys.modules.get(n) for n in before} == before
added = [os.path.realpath(p) for p in sys.path if p not in path]  # torch 2.6 adds a temporary folder of its own
assert [p for p in sys.path if p in path] == path
assert not any(p.startswith(os.path.realpath(sys.argv[1])) for p in added)
net(torch.randn(2, 3, 8, 8)).sum().backward()  # what our package imports later is still found
for name in ("model", "attention", "config", "kernels"):
    assert __import__(name).theirs, name
other = torch.hub.load(sys.argv[1], "resnet38", source="local", num_classes=3, small_images=True, kernel_size=3)
assert other(torch.randn(2, 3, 8, 8)).shape == (2, 3)
import copy, io
file = io.BytesIO()
torch.save(copy.deepcopy(net), file)
file.seek(0)
assert torch.load(file, weights_only=False).fc.out_features == 3
"""


def test_files_of_the_user_and_ours_leave_each_other_alone(tmp_path):
    """Whichever of the user's files was imported before."""
    for name in ("model", "attention", "config"):
        (tmp_path / f"{name}.py").write_text("theirs = True\n")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("theirs = True\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", LEFT_ALONE, str(ROOT), "none", "model", "attention", "config", "kernels"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_another_package_of_our_name_is_refused_in_one_line(tmp_path):
    (tmp_path / "sasa").mkdir()
    (tmp_path / "sasa" / "__init__.py").write_text("")
    program = "import sys, sasa, torch; torch.hub.load(sys.argv[1], 'resnet26', source='local')"
    command = [sys.executable, "-c", program, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert "another package named sasa is imported" in done.stderr.splitlines()[-1]
