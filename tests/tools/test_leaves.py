"""Tools are leaves: nothing imports one; each is short, shows an example, and ends a mistake in a sentence."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.test_house import imports

TOOLS = sorted(path for path in (ROOT / "vlsm" / "tools").glob("*.py") if path.stem != "__init__")
NAMES = [path.stem for path in TOOLS]


def test_nothing_imports_a_tool():
    files = [*ROOT.glob("*.py"), *(ROOT / "vlsm").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    assert len(files) > 50 and "report" in NAMES
    for path in files:
        tools = [module for module in imports(path) if module.startswith("vlsm.tools")]
        assert not tools, f"{path} imports {tools}"


@pytest.mark.parametrize("path", TOOLS, ids=NAMES)
def test_a_tool_is_short(path):
    statements = 0
    for node in ast.walk(ast.parse(path.read_text())):
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        statements += isinstance(node, ast.stmt) and not is_docstring
    assert statements <= 150


@pytest.mark.parametrize("name", NAMES)
def test_help_shows_an_example(cli, name):
    code, said, err = cli(f"vlsm.tools.{name}", "--help")
    assert code == 0 and "xample" in said, err
    assert f"python -m vlsm.tools.{name} " in said.split("xample", 1)[1]


@pytest.mark.parametrize("name", NAMES)
def test_a_mistake_is_a_sentence(cli, name, tmp_path):
    code, _, err = cli(f"vlsm.tools.{name}", "--no-such-option")
    assert code == 2 and err.startswith("error: ") and "Traceback" not in err


def test_as_people_type_it(tmp_path):
    command = [sys.executable, "-m", "vlsm.tools.score", tmp_path / "a", tmp_path / "b"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "There is no folder" in done.stderr and not done.stdout
