"""torch.hub entry points, each loaded as a user does: from another folder and in a process of its own."""

import inspect
import os
import subprocess
import sys

import hubconf
from conftest import ROOT

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


def test_every_entry_point_is_a_network_and_says_what_it_is():
    entries = {name: entry for name, entry in vars(hubconf).items() if callable(entry)}
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
