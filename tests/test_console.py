"""sasa/console.py: messages are one printable line that names things exactly; wrong usage ends with exit code 2."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sasa.console import Parser, as_path, as_path_text, one_line, print_error, printable

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("two  spaces and a trailing ", "two  spaces and a trailing "),
        ("caf\u00e9 \u4e2d", "caf\u00e9 \u4e2d"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("a\nb\r\tc\x85\u2028\u2029", "a\\x0ab\\x0d\\x09c\\x85\\u2028\\u2029"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\U000e0041", "\\U000e0041"),
        (os.fsdecode(b"caf\xe9"), "caf\\xe9"),
        (7, "7"),
    ],
)
def test_printable_escapes_what_a_terminal_would_act_on_and_nothing_else(text, shown):
    assert printable(text) == shown


def test_one_line_joins_lines_and_keeps_the_spaces_of_names():
    assert one_line("a  b\n    c\n\nd") == "a  b c d"
    assert one_line(KeyError()) == "KeyError" and one_line("") == ""
    assert one_line("x" * 30, limit=10) == "x" * 10 + "..."
    assert one_line("x" * 10, limit=10) == "x" * 10


PRINTS = """
import sys
sys.path.insert(0, sys.argv[1])
from sasa.console import Parser, run_main
def main():
    Parser("tool").parse_args(sys.argv[2:])
    for i in range(100_000):
        print(i)
    return 3
run_main(main)
"""


@pytest.mark.parametrize("flags", [[], ["--help"]])
@pytest.mark.parametrize("reads", [True, False])
def test_a_reader_that_has_gone_ends_a_command_without_a_word(reads, flags):
    """As `| head` does."""
    command = [sys.executable, "-c", PRINTS, str(ROOT), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        if not reads:
            process.stdout.close()
            process.stdout = None
        _, errors = process.communicate(timeout=60)
    assert errors == ""
    if flags:  # argparse ignores that it cannot print its help
        assert process.returncode in ((0,) if reads else (0, 141))
    else:
        assert process.returncode == (3 if reads else 141)


def test_a_broken_pipe_to_another_process_is_told():
    code = PRINTS.replace("print(i)", "raise BrokenPipeError('to a worker')")
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1 and "to a worker" in done.stderr


def test_an_error_is_one_line_on_stderr(capsys):
    print_error("tool", "first\nsecond \x1b[2J")
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "tool: error: first second \\x1b[2J\n"


@pytest.mark.parametrize("arguments", [["--number", "x"], ["--numb", "1"], ["--other"]])
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, capsys):
    parser = Parser("python -m tools.name", description="x")
    parser.add_argument("--number", type=int)
    with pytest.raises(SystemExit) as end:
        parser.parse_args(arguments)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("tools.name: error: ") and error.count("\n") == 1


def test_a_command_on_an_ascii_terminal_loses_no_line():
    program = "from sasa.console import Parser; Parser('x').parse_args([]); print('caf\\xe9 \\udcff'); print('end')"
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, timeout=120)
    assert done.stdout.splitlines() == [b"caf\\xe9 \\udcff", b"end"], done.stderr


@pytest.mark.parametrize("module", ["sasa.console", "sasa.files", "config"])
def test_does_not_import_torch(module):
    program = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=120).returncode == 0


def test_a_reader_that_has_gone_is_no_error():
    code = "import sys; sys.path.insert(0, sys.argv[1]); from sasa.console import show; show('x' * 10**6); show('y')"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(ROOT)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) == 0


def test_paths_of_a_command_line(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/me")
    assert as_path("~/x") == Path("/home/of/me/x") and as_path_text("~/x/*.png") == "/home/of/me/x/*.png"
    assert as_path("a/~") == Path("a/~") and as_path_text("~") == "/home/of/me"
    for kind in (as_path, as_path_text):
        with pytest.raises(argparse.ArgumentTypeError, match="must not be empty"):
            kind("")


def test_every_command_takes_its_paths_alike():
    """train.py expands a leading ~: a tool that did not would look elsewhere for what train.py has written."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("tools/**/*.py"), *ROOT.glob("sasa/**/*.py")]
    assert len(files) > 100
    assert not [path for path in files if "type=Path" in path.read_text()]


@pytest.mark.parametrize("closes", [True, False])
def test_a_command_that_tells_of_errors_of_files_says_nothing_of_a_reader_that_has_gone(closes):
    code = """
import sys
sys.path.insert(0, sys.argv[1])
from sasa.console import raise_if_reader_is_gone, run_main
def main():
    try:
        if sys.argv[2] == "True":
            print("x" * 10**6, flush=True)
        raise BrokenPipeError("to a worker")
    except OSError as error:
        raise_if_reader_is_gone(error)
        print(f"tool: error: {error}", file=sys.stderr)
    return 2
run_main(main)
"""
    command = [sys.executable, "-c", code, str(ROOT), str(closes)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        if closes:
            process.stdout.close()
            process.stdout = None
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == ((141, "") if closes else (2, "tool: error: to a worker\n"))
