"""The house stays readable: the limits of tests/house.py hold, and it counts what it says."""

import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parent / "house.py"


def house(*flags):
    command = [sys.executable, HOUSE, *flags]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def project(tmp_path):
    """Writes a project of the files that are given as path -> source, and looks at it."""
    (tmp_path / "data").mkdir()

    def look(**files):
        for name, source in files.items():
            (tmp_path / f"{name.replace('__', '/')}.py").write_text(source)
        return house("--check", "--root", tmp_path)

    return look


def test_nothing_is_above_its_limit():
    result = house("--check")
    assert result.returncode == 0, result.stdout


def test_nodes_are_expressions_and_statements(project):
    # An assignment, its target, a sum, its sides: 5. A statement, a call, a name, an argument: 4.
    printed = project(a="x = 1 + 2\n\nprint(x)\n").stdout
    row = next(line.split() for line in printed.splitlines() if line.startswith("a "))
    assert row == ["a", "9", "3", "3.00", "0"]


@pytest.mark.parametrize("calls, large, code", [(99, 0, 0), (100, 1, 0), (200, 1, 1)])
def test_few_functions_may_be_large_and_none_huge(project, calls, large, code):
    body = "    f()\n\n" * calls  # three nodes each, and the function itself is one
    result = project(a=f"def f():\n{body}")
    assert result.stdout.count("large: a.f ") == large and result.returncode == code


@pytest.mark.parametrize("name", ["b", "data__b"])
@pytest.mark.parametrize(
    "back", ["import a\n", "from a import x\n", "def f():\n    import a\n", "if 1:\n    import a\n"]
)
def test_a_circle_is_found_though_an_import_is_lazy(project, name, back):
    there = "import b" if name == "b" else "from data import b"
    result = project(a=f"import math\n\n{there} as other\n", c="import a\n", **{name: back})
    module = name.replace("__", ".")
    assert result.stdout.count(f"circle: a -> {module} -> a\n") == 1
    assert result.stdout.count("circle:") == 1 and result.returncode == 1
    assert ("(a)" in result.stdout) == ("def" in back)


def test_a_tower_has_no_circle(project):
    result = project(a="import b\nimport data.c\n", b="from data.c import x\n", data__c="x = 1\n\n")
    assert "circle:" not in result.stdout and result.returncode == 0
    assert "b data.c" in result.stdout


def test_places_that_are_not_formatted_are_counted(project):
    result = project(a="x = 1  # fmt: skip\n\n" * 13)
    assert result.returncode == 1 and "fmt: skip                             13" in result.stdout
