"""README and docs: one screen, links that lead somewhere, commands that are taken, and a line for every command."""

import re
import shlex
from pathlib import Path

import pytest

from sasa.training.cli import parse_command_line

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def commands(page: Path) -> list[list[str]]:
    """The lines of the page's code blocks as words, without comments; a line that goes on is one."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if re.search(r"python|torchrun", line)]


def test_the_readme_has_at_most_200_lines():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    links = re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", text)
    for link in (one or other for one, other in links):
        assert "://" in link or (page.parent / link.partition("#")[0]).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_lines_of_train_py_are_taken(page):
    for words in commands(page):
        if "train.py" in words:
            given = words[words.index("train.py") + 1 :]
            end = next((i for i, word in enumerate(given) if word in ("||", "&&", "&", ";")), len(given))
            assert parse_command_line(given[:end]) is not None, words  # else it ends the process


def test_every_command_has_its_line_and_every_line_its_command():
    page = (ROOT / "docs" / "tools.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"`python -m ((?:tools|sasa)[\w.]*)", page))
    ours = [*ROOT.glob("tools/**/*.py"), *ROOT.glob("sasa/**/*.py")]
    commands = {path for path in ours if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")}
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__") for path in commands}
    assert listed == modules - {"tools.gpu.probe"}  # which tools.gpu starts


def test_what_the_readme_names_to_read_is_there():
    named = re.findall(r"`(\w+)` in\s+`([\w/]+\.py)`", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(named) == 6
    for what, file in named:
        assert re.search(rf"^(def|class) {what}\b", (ROOT / file).read_text(encoding="utf-8"), flags=re.M), what


def test_the_layer_in_six_lines_is_what_the_readme_says(capsys):
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)[1]
    exec(block, {})
    shape = re.search(r"print\(.*#\s*(\(.*\))", block)[1]
    assert capsys.readouterr().out.strip() == f"torch.Size([{shape[1:-1]}])"
