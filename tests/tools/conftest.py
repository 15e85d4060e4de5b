import pytest

from finished_runs import make_table_5


@pytest.fixture
def made(tmp_path):
    """A folder of runs of Table 5: three seeds of "relative", two of "none", no "absolute"."""
    make_table_5(tmp_path / "runs" / "digits")
    return tmp_path / "runs" / "digits"
