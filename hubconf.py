"""Entry points for torch.hub: torch.hub.load(folder, "resnet26", source="local", num_classes=10, small_images=True).

Every entry takes the options of `model.ResNet`; there are no pretrained weights to load.

The caller may have an attention.py or a model.py too. So ours are loaded under private names, and `sys.modules` and
`sys.path` are left as they were, but for our package `sasa`. Names that do not begin with _ are entry points.
"""

import importlib.util
import sys
from pathlib import Path as _Path
from types import ModuleType as _ModuleType

_ROOT = _Path(__file__).resolve().parent
_ABSENT = object()


def _is_ours(name: str, path: _Path) -> bool:
    """Whether `name` was imported from `path`, as from a checkout that is on sys.path."""
    file = getattr(sys.modules.get(name), "__file__", None)
    return file is not None and _Path(file).resolve() == path


def _load(name: str, path: _Path, **options) -> _ModuleType:
    spec = importlib.util.spec_from_file_location(name, path, **options)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _load_package() -> None:
    """Our package `sasa`; what it imports later, it finds by its own path."""
    path = _ROOT / "sasa" / "__init__.py"
    if "sasa" not in sys.modules:
        _load("sasa", path, submodule_search_locations=[str(path.parent)])
    elif not _is_ours("sasa", path):
        raise ImportError(f"another package named sasa is imported, from {sys.modules['sasa'].__file__}: not {path}")


def _load_model() -> _ModuleType:
    """model.py, which imports attention.py by that name: the caller's, if there is one, steps aside meanwhile.

    torch.hub runs this file at each load, but classes must stay those of the first, or their networks cannot be saved.
    """
    for name in ("model", "sasa_hub_model"):
        if _is_ours(name, _ROOT / "model.py"):
            return sys.modules[name]
    _load_package()
    path = _ROOT / "attention.py"
    ours = sys.modules["attention"] if _is_ours("attention", path) else _load("sasa_hub_attention", path)
    theirs = sys.modules.get("attention", _ABSENT)
    sys.modules["attention"] = ours
    try:
        return _load("sasa_hub_model", _ROOT / "model.py")
    finally:
        if theirs is _ABSENT:
            del sys.modules["attention"]
        else:
            sys.modules["attention"] = theirs


_model = _load_model()
naive_resnet26, naive_resnet38 = _model.NaiveResNet26, _model.NaiveResNet38
resnet26, resnet38, resnet50 = _model.ResNet26, _model.ResNet38, _model.ResNet50

dependencies = ["torch"]
