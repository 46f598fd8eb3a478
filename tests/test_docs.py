"""docs/ against the code: each metric and field is explained, and what is named is there."""
import ast
import re

import pytest

import igpo
from tests.common import HERE, rows_of

TEXTS = {name: (HERE / "docs" / name).read_text(encoding="utf-8")
         for name in ("metrics.md", "faults.md", "paper_vs_here.md")}


def section(text, title) -> str:
    """What stands below a heading, up to the next of its kind."""
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def named(text, column) -> set[str]:
    """What stands in backticks in that column of the tables; a bar in a cell is written \\|."""
    rows = [re.split(r"(?<!\\)\|", line) for line in text.splitlines() if line.startswith("|")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row[column])}


def paths(value, at="") -> set[str]:
    """Where the values of a record stand: turns[].gain."""
    if isinstance(value, dict):
        return set().union(*(paths(v, f"{at}.{k}" if at else k) for k, v in value.items()))
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return set().union(*(paths(v, f"{at}[]") for v in value))
    return {at}


def functions_of(file) -> set[str]:
    tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_metrics_are_those_of_a_step(half):
    keys = set().union(*rows_of(half))
    assert named(section(TEXTS["metrics.md"], "metrics.jsonl"), 1) == keys


def test_fields_are_those_of_a_rollout(half):
    found = set().union(*(paths(row) for row in rows_of(half, "rollouts.jsonl")))
    found -= {"turns[].passages"}                                               # of a turn without any
    assert named(section(TEXTS["metrics.md"], "rollouts.jsonl"), 1) == found


@pytest.mark.parametrize("name", TEXTS)
def test_tests_that_are_named_exist(name):
    files = {}
    for file, test in re.findall(r"\b((?:tests/)?test_\w+\.py)::(\w+)", TEXTS[name]):
        files.setdefault(file, functions_of(file))
        assert test in files[file], f"{file}::{test}"
    assert files or name == "metrics.md"


def test_functions_of_the_equations_exist():
    table = section(TEXTS["paper_vs_here.md"], "Equation, function, test")
    functions = named(table, 2)
    assert len(functions) >= 8 and {f for f in functions if not callable(getattr(igpo, f, None))} == set()
    assert all(f"Eq. {n}" in table for n in range(2, 8))
