"""torch.hub entry points, each loaded as a user does: from another folder and in a process of its own."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hubconf

PARAMETERS = {
    "naive_resnet26": 8_740_682,
    "naive_resnet38": 15_011_402,
    "resnet26": 8_306_442,
    "resnet38": 12_154_442,
    "resnet50": 16_002_442,
}

ROOT = Path(__file__).resolve().parents[1]

# The libraries take seconds to import: a process has imported them and nothing of ours, and each program runs in a fork
# of it. It is given folder and program by a line of JSON, and answers with the exit code.
LIBRARIES = """
import json, os, sys, torch, torchvision, torch._dynamo
torch.set_num_threads(1)
for line in sys.stdin:
    folder, program = json.loads(line)
    child = os.fork()
    if not child:
        os.environ["TORCH_HOME"] = folder
        os.chdir(folder)
        printed = os.open("printed", os.O_WRONLY | os.O_CREAT)
        os.dup2(printed, 1), os.dup2(printed, 2)
        exec(program, {})
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def user():
    """A function that runs a program in a folder as a user does: its exit code, and what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", LIBRARIES, str(ROOT)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT.parent, env=environment, **pipes) as process:

        def run(folder, program):
            print(json.dumps([str(folder), program]), file=process.stdin, flush=True)
            return int(process.stdout.readline()), (folder / "printed").read_text()

        yield run
        process.stdin.close()


NETWORKS = """
import sys, torch
torch.manual_seed(0)
for name, count in PARAMETERS.items():
    net = torch.hub.load(sys.argv[1], name, source="local", num_classes=10, small_images=True).eval()
    assert sum(p.numel() for p in net.parameters()) == count, name
    assert net(torch.randn(1, 3, 8, 8)).shape == (1, 10)
options = {"num_classes": 7, "stem": True, "kernel_size": 3, "stem_values": "plain"}
net = torch.hub.load(sys.argv[1], "resnet26", source="local", **options)
assert net(torch.randn(2, 3, 32, 40)).shape == (2, 7)
"""


def test_every_entry_point_is_a_network_and_says_what_it_is():
    entries = {name: entry for name, entry in vars(hubconf).items() if callable(entry) and name[0] != "_"}  # its rule
    assert set(entries) == set(PARAMETERS)
    assert all(inspect.getdoc(entry) for entry in entries.values())


def test_every_network_loads_from_another_folder(tmp_path, user):
    (tmp_path / "model.py").write_text("raise ImportError('a file of the user, not of the repository')")
    code, printed = user(tmp_path, f"PARAMETERS = {PARAMETERS}\n{NETWORKS}")
    assert code == 0, printed


LEFT_ALONE = """
import os, sys, torch
for name in first:
    __import__(name)
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


@pytest.mark.parametrize("first", [[], ["model"], ["model", "attention", "config", "kernels"]], ids=str)
def test_files_of_the_user_and_ours_leave_each_other_alone(tmp_path, user, first):
    """Whichever of the user's files was imported before."""
    for name in ("model", "attention", "config"):
        (tmp_path / f"{name}.py").write_text("theirs = True\n")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("theirs = True\n")
    code, printed = user(tmp_path, f"first = {first}\n{LEFT_ALONE}")
    assert code == 0, printed


def test_another_package_of_our_name_is_refused_in_one_line(tmp_path, user):
    (tmp_path / "sasa").mkdir()
    (tmp_path / "sasa" / "__init__.py").write_text("")
    code, printed = user(tmp_path, "import sys, sasa, torch; torch.hub.load(sys.argv[1], 'resnet26', source='local')")
    assert code == 1
    assert "another package named sasa is imported" in printed.splitlines()[-1]
