"""What the benchmarks share: tables, the machine, plots, intervals, and which searches were right."""
import contextlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import matplotlib
import numpy as np
import torch

from tools.metrics import bootstrap, interval

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first: there may be no display)

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "benchmarks"
EARLIER = "e026da0"         # the last commit of the code that measured what is committed here

def table(head: list[str], rows: list[list], left: int = 1) -> list[str]:
    """Lines of a Markdown table, the first `left` columns of which are text.

    >>> print(*table(["what", "s"], [["rollout", 1.5]]), sep=chr(10))
    | what | s |
    |---|---:|
    | rollout | 1.5 |
    """
    lines = [head, *rows]
    text = ["| " + " | ".join(map(str, line)) + " |" for line in lines]
    return [text[0], "|" + "---|" * left + "---:|" * (len(head) - left), *text[1:]]

def rounded(row: dict) -> dict:
    """A row as it goes to a CSV: numbers with five digits."""
    return {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}

def machine(*packages: str) -> str:
    """What a measurement was made with, in one line."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    named = ("torch", "transformers", "peft", *packages)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in named]
    facts = [f"{os.cpu_count()} cores, {platform.machine()}", device, f"Python {platform.python_version()}"]
    return ", ".join([*facts, *versions])

def commit(folder: Path = ROOT) -> str:
    """The commit of the code in a folder, with a + if files of it were changed; "?" where git cannot tell."""
    git = lambda *command: subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True)
    head, changes = git("rev-parse", "--short=7", "HEAD"), git("status", "--porcelain", "-uno")
    return head.stdout.strip() + "+" * bool(changes.stdout.strip()) if head.returncode == 0 else "?"

@contextlib.contextmanager
def figure(path: Path, rows: int = 1, columns: int = 1, size: tuple = (11, 4), **options):
    """Yields (figure, axes (rows, columns)) in one frame for all plots, and writes the file."""
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, constrained_layout=True, **options)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    yield fig, axes
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120)
    plt.close(fig)

def mean_and_interval(groups: list[list[float]]) -> tuple[float, float, float]:
    """(mean of all values, low, high), a 95 % interval, groups (questions) being drawn with replacement."""
    sums, counts = np.array([[sum(g)] for g in groups]), np.array([[len(g)] for g in groups])
    found = interval(sums.sum() / counts.sum(), bootstrap(sums, counts, 10_000))
    return found["value"], found["low"], found["high"]

def searches(record: dict) -> list[tuple[bool, dict]]:
    """(right, turn) of each search behind which a rollout, a line of rollouts.jsonl, went on.

    Right: it found a supporting passage that none before it had found. "supporting" may name ids or titles.
    """
    found, seen = [], set()
    for turn in record["turns"][:-1]:
        names = {p[key] for p in turn["passages"] for key in ("id", "title")}
        found.append((bool((names - seen) & set(record["supporting"])), turn))
        seen |= names
    return found
