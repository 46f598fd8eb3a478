"""What people look at: tables, results.json, results.md, report.html and training curves, made from what a run has left.

The commands are eval.py's: an evaluation ends with `write_results`; --compare, --report and --plot are `comparison`, `report` and `plot`.
"""
from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import os
import platform
import re
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

from eval import METRICS, compare, name_key, read_jsonl, summarise
from igpo import HERE, UserError, first_line, mean, write_whole

# ---- tables ----------------------------------------------------------------------------------------------------------

SCORES = ("f1_paper", "em_paper", "f1_squad", "em_squad", "cover_em", "pass_f1", "pass_em")


def cell(figure: dict | None, unit: str, spread: bool) -> str:
    """A figure as text; spread: with its interval."""
    if figure is None:
        return "–"
    scale, digits = {"%": (100, 1), "#": (1, 0)}.get(unit, (1, 2))
    value, low, high = (f"{scale * figure[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]" if spread else value


def tables(summary: dict) -> list[tuple[str, list[list[str]]]]:
    """(caption, rows of cells, the heading first): scores with intervals, then behaviour."""
    known = [name for name in METRICS if any(name in row for row in summary.values())]
    scores, behaviour = [n for n in known if n in SCORES], [n for n in known if n not in SCORES]
    first = [["", "Questions", *(METRICS[n][0] for n in scores)]]
    second = [["", *(METRICS[n][0] for n in behaviour)]]
    for label, row in summary.items():
        first.append([label, f"{row['questions']:,}", *(cell(row[n], METRICS[n][1], True) for n in scores)])
        second.append([label, *(cell(row[n], METRICS[n][1], False) for n in behaviour)])
    return [("Scores in %, with 95 % bootstrap intervals", first),
            ("Behaviour: shares in %, belief in the gold answer in nats per token, share of each ending in %", second)]


def markdown_table(rows: list[list[str]]) -> str:
    """Rows of cells, the heading first, as a Markdown table."""
    rows = [[c.replace("|", "\\|") for c in row] for row in rows]
    rule = ["---"] + ["---:"] * (len(rows[0]) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])


def describe(settings: dict) -> dict[str, str]:
    """Settings of an evaluation in the few words that a reader needs."""
    top_k, n, turns = settings["top_k"], settings["n"], 1 if settings["no_search"] else settings["max_turns"]
    decoding = f"temperature {settings['temperature']:g}" if settings["temperature"] else "greedy"
    return {"Model": settings["model"], "Adapter": settings["adapter"] or "none",
            "Questions": "; ".join(f"{name}: {note['questions']}" for name, note in settings["benchmarks"].items()),
            "Search": "none: closed book, made to answer at once" if settings["no_search"] else
                      f"{settings['search']}, {top_k} passage{'s' * (top_k > 1)}",
            "Episode": f"{f'up to {turns} turns' if turns > 1 else 'one turn'} of {settings['max_new_tokens']} tokens",
            "Decoding": decoding + f", {n} samples a question: figures are means over samples" * (n > 1),
            "Gains": "in nats per token" if settings["gain"] == "logprob" else "in probability per token"}


def markdown(summary: dict, settings: dict) -> str:
    """results.md."""
    facts = "\n".join(f"- {key}: {value}" for key, value in describe(settings).items())
    return "\n\n".join([facts, *(f"{caption}:\n\n{markdown_table(rows)}" for caption, rows in tables(summary))]) + "\n"


def comparison(a: str, b: str, metric: str) -> str:
    """What --compare prints: `compare` of two result folders as a table."""
    heading, unit, _ = METRICS[metric]
    scale = 100 if unit == "%" else 1
    rows = [["", "Questions", a, b, "difference", "95 % interval", "p", "win / tie / loss"]]
    for row in compare(read_rollouts(a), read_rollouts(b), metric):
        rows.append([row["benchmark"], str(row["questions"]), f"{scale * row['a']:.2f}", f"{scale * row['b']:.2f}",
                     f"{scale * row['difference']:+.2f}", f"[{scale * row['low']:+.2f}, {scale * row['high']:+.2f}]",
                     f"{row['p']:.3f}" if row["p"] >= .001 else "< 0.001", f"{row['win']} / {row['tie']} / {row['loss']}"])
    return f"{heading}{' in %' if scale == 100 else ''}: {b} against {a}\n\n{markdown_table(rows)}"


# ---- results and page ------------------------------------------------------------------------------------------------

def write_results(out: Path, settings: dict, rows: list[dict]) -> str:
    """results.json, results.md and report.html of an evaluation; returns what results.md says."""
    rows = in_order(rows, settings)
    summary = summarise(rows)
    text = markdown(summary, settings)
    code = {name: hashlib.sha256((HERE / name).read_bytes()).hexdigest()[:16] for name in ("igpo.py", "search_tool.py", "eval.py")}
    versions = {"python": platform.python_version(), **{m.__name__: m.__version__ for m in (torch, transformers, peft, np)}, **code}
    write_whole(out / "results.json", json.dumps({"results": summary, "settings": settings, "versions": versions}, indent=1) + "\n")
    write_whole(out / "results.md", text)
    write_report(out / "report.html", out.resolve().name, describe(settings), rows, summary)
    return text


def in_order(rows: list[dict], settings: dict) -> list[dict]:
    """Rollouts of an evaluation as they were asked for; in the log they stand as they ended."""
    benchmarks = list(settings["benchmarks"])
    return sorted(rows, key=lambda row: (benchmarks.index(row["benchmark"]), row["id"], row["sample"]))


def read_rollouts(folder: str | Path) -> list[dict]:
    """rollouts.jsonl of a run or an evaluation. Raises UserError if there is none in it."""
    rows = read_jsonl(Path(folder) / "rollouts.jsonl")
    fields = {"id", "question", "answers", "answer", "stop", "f1", "em", "beliefs", "policy_tokens", "turns"}
    if not rows or not all(fields <= row.keys() for row in rows):
        raise UserError(f"{folder}/rollouts.jsonl: holds no rollouts.")
    return rows


def read_settings(folder: str | Path) -> dict:
    """config.json of a run or an evaluation."""
    try:
        return dict(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise UserError(f"{folder}/config.json: cannot be read ({first_line(e)}).") from None


def number(x, digits: int = 4) -> float | None:
    """x rounded; JSON has no NaN."""
    return round(x, digits) if isinstance(x, (int, float)) and math.isfinite(x) else None


def page_row(row: dict, passages: dict[tuple, int]) -> dict:
    """A rollout as the page shows it. Passages stand in a list of their own, once, however often they were found: here is their number."""
    gold, turns = {name_key(s) for s in row.get("supporting") or []}, []
    for turn in row["turns"]:
        found = []      # (number of the passage, its score, is it supporting?)
        for p in turn["passages"]:
            place = passages.setdefault((p["id"], p["title"], p["text"]), len(passages))
            found.append([place, number(p["score"], 2), int(bool(gold & {name_key(p["id"]), name_key(p["title"])}))])
        turns.append({"text": turn["text"], "query": turn["query"], "found": found, "error": turn["error"],
                      "gain": number(turn["gain"]), "return": number(turn["return"])})
    return {"benchmark": row.get("benchmark", ""), "step": row.get("step"), "sample": row.get("sample", 0), "f1": number(row["f1"]),
            "beliefs": [number(b) for b in row["beliefs"]], "tokens": row["policy_tokens"], "turns": turns,
            **{key: row[key] for key in ("id", "question", "answers", "answer", "stop", "em")}}


def whole_questions(rows: list[dict], limit: int) -> list[dict]:
    """At most limit rollouts: whole questions, those of most steps first, since these can be compared; if none fits, every n-th."""
    key = lambda row: (row.get("benchmark") if row.get("step") is None else "", row["id"])
    steps: dict[tuple, list] = {}
    for row in rows:
        steps.setdefault(key(row), []).append(row.get("step"))
    kept = set()
    for name in sorted(steps, key=lambda name: -len(set(steps[name]))):
        if len(steps[name]) <= limit:
            kept.add(name)
            limit -= len(steps[name])
    return [row for row in rows if key(row) in kept] or rows[::math.ceil(len(rows) / limit)]


def write_report(path: Path, title: str, facts: dict, rows: list[dict], summary: dict, limit: int = 4000) -> None:
    """One self-contained page. It may load nothing and run nothing but its own script; data is only ever shown as text."""
    shown = rows if len(rows) <= limit else whole_questions(rows, limit)
    note = "" if shown is rows else f"The tables count all {len(rows):,} rollouts, the list holds {len(shown):,} of them."
    passages: dict[tuple, int] = {}
    data = {"title": title, "facts": facts, "note": note, "tables": tables(summary),
            "help": {heading: what for heading, _, what in METRICS.values()},
            "rows": [page_row(row, passages) for row in shown], "passages": list(passages)}
    page = (HERE / "docs" / "report_template.html").read_text(encoding="utf-8")
    hashes = {}
    for tag in ("style", "script"):
        body = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
        hashes[tag] = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
    allowed = "; ".join(f"{tag}-src 'sha256-{digest}'" for tag, digest in hashes.items())
    fill = {"@TITLE@": html.escape(title), "@CSP@": f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'",
            "@DATA@": json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")}
    write_whole(path, re.sub("|".join(fill), lambda slot: fill[slot[0]], page))


def report(run: str) -> Path:
    """report.html for a folder with a rollouts.jsonl: of an evaluation, or of a training run (figures by tenths of the run)."""
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    rows, config = read_rollouts(folder), read_settings(folder) if (folder / "config.json").exists() else {}
    if rows[0].get("step") is None:
        facts = {}
        if "benchmarks" in config:
            rows, facts = in_order(rows, config), describe(config)
        summary = summarise(rows)
    else:
        last = max(row["step"] for row in rows)
        tenth = math.ceil(last / 10)
        for row in rows:
            start = (row["step"] - 1) // tenth * tenth + 1
            row["benchmark"] = f"step {start}" if tenth == 1 else f"steps {start}–{min(start + tenth - 1, last)}"
        known = [key for key in ("model", "credit", "norm", "gain", "search", "seed") if key in config]
        facts = {"Steps": str(last), **{key.capitalize(): str(config[key]) for key in known}}
        summary = summarise(rows)
        summary.pop("macro average", None)                                            # steps are not benchmarks
    write_report(folder / "report.html", folder.resolve().name, facts, rows, summary)
    return folder / "report.html"


# ---- training curves -------------------------------------------------------------------------------------------------

PANELS = (    # title, x axis, {metric: (line, what the legend adds)}
    ("dev F1 against steps", "step", {"eval_f1": ("-", "")}),
    ("dev F1 against tokens trained on", "tokens", {"eval_f1": ("-", "")}),
    ("groups without signal", "step", {"no_signal_outcome": ("--", ", outcome only"), "no_signal_igpo": ("-", ", with gains")}),
    ("belief gained by the searches of a rollout (nats)", "step", {"belief_gain": ("-", "")}),
)
# What two runs of one setting may differ in: the seed, and what changes nothing in the figures.
NO_SETTING = {"seed", "out", "resume", "steps", "eval_every", "save_every", "show_every", "search_cache", "rollout_batch", "batch_tokens",
              "gradient_checkpointing"}


def read_run(folder: str) -> tuple[dict, list[dict]]:
    """(config, rows of metrics.jsonl) with what the plots need added: tokens trained on so far, belief_gain."""
    rows, tokens = read_jsonl(Path(folder) / "metrics.jsonl"), 0
    for row in rows:
        tokens += row.get("policy_tokens", 0)
        row["tokens"] = tokens
        if "belief_last" in row:
            row["belief_gain"] = row["belief_last"] - row["belief_first"]
    return read_settings(folder), rows


def curves(runs: list[tuple[dict, list[dict]]]) -> dict[str, dict]:
    """{label: {"seeds", metric: [(step, tokens, mean, low, high), ..]}}: runs that differ in the seed alone are one setting.

    Mean, least and greatest over the seeds, at the steps that all of them have. A label says in what the settings differ.
    """
    keys = sorted({key for config, _ in runs for key in config} - NO_SETTING)
    differ = [key for key in keys if len({json.dumps(config.get(key)) for config, _ in runs}) > 1]
    groups: dict[str, list] = {}
    for config, rows in runs:
        told = {key: os.path.basename(str(config.get(key))) for key in differ}        # of a path the file's name will do
        label = ", ".join(value if key == "credit" else f"{key} {value}" for key, value in told.items())
        groups.setdefault(label or config.get("credit", "run"), []).append(rows)
    result: dict[str, dict] = {}
    for label, seeds in groups.items():
        result[label] = {"seeds": len(seeds)}
        for metric in {metric for _, _, metrics in PANELS for metric in metrics}:
            by_step = [{row["step"]: row for row in rows if row.get(metric) is not None} for rows in seeds]
            points = []
            for step in sorted(set.intersection(*map(set, by_step))):
                values = [rows[step][metric] for rows in by_step]
                points.append((step, mean(rows[step]["tokens"] for rows in by_step), mean(values), min(values), max(values)))
            result[label][metric] = points
    return result


def plot(folders: list[str], path: str):
    """Dev F1 by steps and tokens (paper, Fig. 6), groups without signal (Fig. 1), belief gain (Fig. 5). Returns the figure."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        from matplotlib.lines import Line2D
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    settings = curves([read_run(folder) for folder in folders])
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), constrained_layout=True)
    for axis, (title, x, metrics) in zip(axes.flat, PANELS):
        axis.set_title(title, loc="left", fontsize=11)
        axis.set_xlabel("tokens written by the policy and trained on" if x == "tokens" else "step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.grid(alpha=.25)
        axis.spines[["top", "right"]].set_visible(False)
        if "no_signal_igpo" in metrics:
            axis.set_ylim(-.02, 1.02)
        for k, (label, series) in enumerate(settings.items()):
            for metric, (style, added) in metrics.items():
                if series[metric]:
                    steps, tokens, middle, low, high = zip(*series[metric])
                    at = tokens if x == "tokens" else steps
                    axis.plot(at, middle, style, color=f"C{k}", label=label + added, marker="o" if len(at) < 2 else None)
                    if series["seeds"] > 1:
                        axis.fill_between(at, low, high, color=f"C{k}", alpha=.18, linewidth=0)
        if len(metrics) > 1:
            styles = [Line2D([], [], color="grey", linestyle=style, label=added.strip(" ,")) for style, added in metrics.values()]
            axis.legend(handles=styles, fontsize=8, frameon=False)
    lines = []
    for k, (label, series) in enumerate(settings.items()):
        seeds = f" ({series['seeds']} seeds, band: least to greatest)" if series["seeds"] > 1 else ""
        lines.append(Line2D([], [], color=f"C{k}", label=label + seeds))
    figure.legend(handles=lines, loc="outside lower left", fontsize=9, frameon=False)
    figure.savefig(path, dpi=150)
    return figure
