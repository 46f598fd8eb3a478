"""docs/ against the code: each metric and field is explained, and what is named is there."""
import ast
import csv
import re

import pytest

import igpo
from tests.common import HERE, rows_of

TEXTS = {name: (HERE / "docs" / name).read_text(encoding="utf-8")
         for name in ("metrics.md", "faults.md", "paper_vs_here.md")}
README = (HERE / "README.md").read_text(encoding="utf-8")


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


def test_tests_that_are_named_exist():
    files = {}
    for file, test in re.findall(r"\b((?:tests/)?test_\w+\.py)::(\w+)", TEXTS["faults.md"]):
        files.setdefault(file, functions_of(file))
        assert test in files[file], f"{file}::{test}"
    assert files


def test_functions_and_tests_of_the_equations_exist():
    """The table of README.md, which has each equation once."""
    table = section(README, "Copy from it")
    assert all(re.search(rf"\| Eq\. .*{n}", table) for n in range(2, 8))
    functions, tests = named(table, 2), named(table, 3)
    assert len(functions) >= 8 and {f for f in functions if not callable(getattr(igpo, f, None))} == set()
    assert len(tests) >= 8 and tests <= functions_of("test_igpo.py")


def rows_of_tables(text) -> list[str]:
    return [line for line in text.splitlines() if re.match(r"\|.*\d", line)]


@pytest.mark.parametrize("text", ["README.md", "docs/evidence.md"])
def test_figures_of_runs_are_those_of_the_generated_tables(text):
    """Each row with a figure stands as it is in a file that a command of benchmarks/ writes from its CSV."""
    made = "\n".join(path.read_text(encoding="utf-8") for path in (HERE / "benchmarks").glob("*.md"))
    rows = rows_of_tables((HERE / text).read_text(encoding="utf-8"))
    if text == "README.md":
        rows = rows_of_tables(section(README, "Do the gains help?"))
    assert len(rows) >= 8 and [row for row in rows if row not in made.splitlines()] == []


def test_forms_of_the_instruction_are_those_of_the_csv():
    with open(HERE / "benchmarks/forms.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    made = (HERE / "benchmarks/hotpotqa.md").read_text(encoding="utf-8")
    for form in {row["form"] for row in rows}:
        some = [row for row in rows if row["form"] == form]
        total = lambda key: sum(float(row[key]) for row in some)
        answered, n = sum(row["stop"] == "answer" for row in some), len(some)
        assert (f"| {form} | {n} | {total('f1') / n:.2f} | {answered} | {total('searches') / n:.1f} | "
                f"{total('recall') / n:.2f} | {total('copied'):.0f} | {total('probe_form'):.0f} |") in made


def test_forms_of_the_probe_are_those_of_the_csv():
    with open(HERE / "benchmarks/probe_forms.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    made = (HERE / "benchmarks/hotpotqa.md").read_text(encoding="utf-8")
    for key in ("line_break", "inline", "space"):
        right, wrong = ([float(row[key]) for row in rows if (float(row["f1"]) >= 0.5) == kind]
                        for kind in (True, False))
        a, b = sum(right) / len(right), sum(wrong) / len(wrong)
        assert f"| {a:.2f} | {b:.2f} | {a - b:.2f} |" in made
