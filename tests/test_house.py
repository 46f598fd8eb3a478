"""The house: who imports whom, how long things are, and that two files in an empty folder are enough."""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields

import igpo
from tests.common import HERE, rows_of, small_options

PROGRAMS = [path for path in sorted(HERE.rglob("*.py")) if path.relative_to(HERE).parts[0] in
            {"demo", "tools", "benchmarks", "tests"} or path.parent == HERE]
TREES = {path.relative_to(HERE).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in PROGRAMS}
MODULES = {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name for name in TREES}
# What each may import: itself and all above it. demo/make.py is a program beside tools/.
LAYERS = [["search_tool"], ["igpo"], ["tools", "demo"], ["eval"], ["benchmarks"], ["test_igpo", "tests"]]


def imported(tree):
    """Names of modules that are imported, each with the statement."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ".", node
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


def of_project(name):
    return name if name in MODULES else None


GRAPH = {module: sorted({name for name, _ in imported(TREES[file]) if of_project(name) and name != module})
         for module, file in MODULES.items()}


def layer(module):
    return next(i for i, names in enumerate(LAYERS) if module.split(".")[0] in names)


def test_who_imports_whom():
    """search_tool <- igpo <- tools <- eval, benchmarks, tests."""
    assert GRAPH["search_tool"] == [] and GRAPH["igpo"] == ["search_tool"]
    for module, names in GRAPH.items():
        upwards = [name for name in names if layer(name) > layer(module)]
        assert not upwards, f"{module} imports {upwards}"
    assert all("benchmarks" not in name for module in GRAPH if module.split(".")[0] in ("tools", "eval")
               for name in GRAPH[module])


def test_no_circles():
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            path.append(module)
            for name in GRAPH[module]:
                visit(name)
            done.add(path.pop())
    for module in GRAPH:
        visit(module)


def test_project_files_are_imported_at_the_top():
    for file, tree in TREES.items():
        for function in ast.walk(tree):
            if isinstance(function, (ast.FunctionDef, ast.Lambda, ast.ClassDef)):
                inside = [name for name, _ in imported(function) if of_project(name)]
                assert not inside, f"{file}: {getattr(function, 'name', 'lambda')} imports {inside}"


def lines_of(name):
    return (HERE / name).read_text(encoding="utf-8").splitlines()


def test_igpo_can_be_read_at_one_sitting():
    lines = lines_of("igpo.py")
    assert len(lines) <= 800 and max(map(len, lines)) <= 110
    functions = [node for node in ast.walk(TREES["igpo.py"]) if isinstance(node, ast.FunctionDef)]
    assert {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno + 1 > 50} == {}
    assert len(fields(igpo.Config)) <= 30


def test_its_tests_can_be_read_too():
    lines = lines_of("test_igpo.py")
    assert len(lines) <= 900 and max(map(len, lines)) <= 110


def test_readme_is_short():
    text = "\n".join(lines_of("README.md"))
    assert len(text.split()) <= 1500


def test_readme_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#\s]+)", "\n".join(lines_of("README.md"))):
        assert link.startswith("http") or (HERE / link).exists(), link


def test_every_metric_is_explained(run):
    """docs/metrics.md names each key of metrics.jsonl, in backticks."""
    text = "\n".join(lines_of("docs/metrics.md"))
    keys = set().union(*rows_of(run))
    assert {key for key in keys if f"`{key}`" not in text} == set()


# ---- the copy ----

def test_two_files_in_an_empty_folder_are_enough(small, tmp_path):
    """igpo.py and search_tool.py with data and a model: a step and its resume, as programs."""
    shutil.copy(HERE / "igpo.py", tmp_path)
    shutil.copy(HERE / "search_tool.py", tmp_path)
    shutil.copytree(small, tmp_path / "demo")
    shutil.copytree(HERE / "demo/policy", tmp_path / "demo/policy")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": ""}     # a terminal without ±

    def program(*arguments):
        ran = subprocess.run([sys.executable, "igpo.py", *arguments], cwd=tmp_path, env=environment,
                             text=True, capture_output=True, timeout=600)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout
    options = small_options("demo")
    said = program(*options, "--steps", "1", "--out", "run")
    assert "step    1" in said and "--resume" not in said
    said = program("--resume", "run", "--steps", "2")
    assert "step    2" in said and "step    1" not in said
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [0, 1, 2]
    assert json.loads((tmp_path / "run/config.json").read_text())["data"] == "demo"
