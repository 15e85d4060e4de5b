"""Imports go one way (the house of DESIGN: README, "Where things are")."""

import ast
from pathlib import Path

import pytest

from fresh_process import run_python

ROOT = Path(__file__).resolve().parents[1]
BASE = {"sasa.console", "sasa.files"}
# What the modules of a part may import of ours, apart from their own part.
ALLOWED = {
    "sasa.console": set(),
    "sasa.files": set(),
    "sasa.data.specs": set(),
    "sasa.settings": BASE,
    "sasa.recipes": {"sasa.data.specs"},
    "config": BASE | {"sasa.data.specs", "sasa.recipes", "sasa.settings"},
    "sasa.kernels": BASE,
    "sasa.initialise": BASE,
    "attention": BASE | {"sasa.kernels", "sasa.initialise"},
    "sasa.backbone": BASE | {"sasa.kernels"},
    "sasa.convert": BASE | {"sasa.kernels", "attention"},
    "model": BASE | {"sasa.kernels", "sasa.initialise", "attention", "sasa.backbone", "sasa.convert"},
    "hubconf": BASE | {"model"},
    "sasa.analysis": BASE | {"sasa.kernels", "attention", "sasa.backbone", "model"},
    "sasa.data": BASE | {"sasa.data.specs"},
    "preprocess": BASE | {"sasa.data", "sasa.data.specs"},
    "sasa.training": BASE
    | {
        "sasa.kernels",
        "attention",
        "sasa.backbone",
        "model",
        "sasa.analysis",
        "sasa.data",
        "sasa.data.specs",
        "preprocess",
        "config",
        "sasa.settings",
    },
}
ALLOWED["sasa.timm_models"] = BASE | {"model"}
ALLOWED["train"] = ALLOWED["sasa.training"] | {"sasa.training"}
ALLOWED["sasa.detection"] = ALLOWED["tools"] = ALLOWED["train"] | {"train", "sasa.detection"}
FILES = sorted(p for p in [*ROOT.glob("*.py"), *ROOT.glob("sasa/**/*.py"), *ROOT.glob("tools/**/*.py")])


def part_of(module: str) -> str | None:
    """The part of the house that a module is in; None for other people's packages."""
    fitting = [part for part in ALLOWED if module == part or module.startswith(part + ".")]
    return max(fitting, key=len, default=None)


def imports(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            yield from ((node.module, alias.name) for alias in node.names)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way_and_take_no_private_name(path):
    own, tree, ours = part_of(module_name(path)), ast.parse(path.read_text()), set()
    for module, name in imports(tree):
        target = part_of(f"{module}.{name}") or part_of(module)
        if target is None:
            assert module != "sasa" and not module.startswith("sasa."), f"{module} is in no part of the house"
            continue
        assert target == own or target in ALLOWED[own], f"{path.name} must not import {module}"
        assert name is None or not name.startswith("_") or name == "__main__", f"{name} is private to {module}"
        ours.add(name or module)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours:
            assert not node.attr.startswith("_") or node.attr.startswith("__"), f"{node.attr} is private"


def test_importing_the_training_imports_neither_the_compiler_nor_triton():
    """Both take seconds, and Triton reads its environment when it is imported. Nor does a look for the kernels."""
    code = "import train, sasa.kernels.triton_backend as cuda; cuda.unusable()\n"
    code += "print(sorted({'torch._dynamo', 'triton', 'matplotlib', 'torchvision'} & set(sys.modules)))"
    done = run_python(code)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr
