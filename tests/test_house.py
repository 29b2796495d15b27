"""The house: which way imports run, and what the first import of a program costs."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# Who may import whom: rooms of vlsm/, `core` its own files, `front` the programs. Nothing imports a tool.
ALLOWED = {
    "kernels": set(),
    "system": set(),
    "data": {"system"},
    "networks": {"kernels", "system"},
    "methods": {"networks", "kernels"},
    "core": {"networks", "methods", "kernels", "data", "system"},
    "training": {"core", "methods", "networks", "data", "system"},
    "raw": {"data", "system"},
    "results": {"core", "data", "system"},
    "mini": {"data"},
    "train": {"datasets", "core", "networks", "data", "training", "system", "kernels"},
    "evaluate": {"datasets", "core", "data", "results", "system"},
    "datasets": {"data", "raw", "results", "mini", "system"},
    "tools": {
        "train", "datasets", "core", "methods", "networks", "training", "results", "data", "system",
    },
}  # fmt: skip


def room_of(module):
    """The room of a module of the project, or None for another package's."""
    head, _, rest = module.partition(".")
    if head != "vlsm":
        return head if head in ("kernels", "train", "evaluate", "datasets") else None
    return rest.split(".")[0] if (ROOT / "vlsm" / rest.split(".")[0]).is_dir() and rest else "core"


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_run_one_way():
    files = [*ROOT.glob("*.py"), *(ROOT / "vlsm").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
    for path in files:
        here = room_of(path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."))
        wanted = {room_of(module) for module in imports(path)} - {None, here}
        assert wanted <= ALLOWED[here], f"{path}: {here} imports {wanted - ALLOWED[here]}"


@pytest.mark.parametrize(
    "command, absent",
    [
        ("import vlsm", ("torch", "triton", "transformers")),
        ("import vlsm; vlsm.build", ("triton", "torch._inductor", "transformers", "matplotlib")),
        ("import datasets; datasets.main(['--list'])", ("torch", "triton", "matplotlib")),
        ("import train", ("triton", "torch._inductor", "transformers", "matplotlib")),
        ("import evaluate", ("triton", "torch._inductor", "transformers", "matplotlib")),
        ("import kernels", ("torch", "triton")),
    ],
)
def test_nothing_heavy_is_loaded_before_it_is_asked_for(command, absent):
    code = f"import sys; {command}; print([m for m in {absent} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_names_stay_where_readme_says():
    import vlsm

    assert all(getattr(vlsm, name) is not None for name in vlsm.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        vlsm.nothing  # noqa: B018
