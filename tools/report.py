"""What people look at: tables, pages, training curves and transcripts of a run or an evaluation.

    python -m tools.report runs/x                       a page to read its rollouts: runs/x/report.html
    python -m tools.report runs/x --show 3              three of its rollouts in the terminal
    python -m tools.report --plot runs/a runs/b -o curves.png       training curves
    python -m tools.report --plot runs/*-seed*          seeds of one setting become one line with a band

The folder is that of a training run or of an evaluation, with its rollouts.jsonl (for --plot: metrics.jsonl).
docs/evaluation.md says how to read the page and the curves.
"""
from __future__ import annotations

import argparse
import base64
import hashlib
import html
import json
import math
import os
import platform
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

from igpo import TURN, mean
from search_tool import UserError, first_line
from tools.metrics import (METRICS, STOPS, is_number, markdown_table, name_key, read_jsonl, read_rollouts,
                           summarise, write_whole)

HERE = Path(__file__).resolve().parent.parent
SCORES = ("f1_paper", "em_paper", "f1_squad", "em_squad", "cover_em", "pass_f1", "pass_em")
ENDS = dict(zip(STOPS, ("answered", "broken format", "cut short", "out of turns")))


# ---- tables ------------------------------------------------------------------------------------------------

def cell(figure: dict | None, unit: str, spread: bool) -> str:
    """A figure as text; spread: with its interval."""
    if figure is None:
        return "–"
    scale, digits = {"%": (100, 1), "#": (1, 0)}.get(unit, (1, 2))
    value, low, high = (f"{scale * figure[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]" if spread else value


def tables(summary: dict) -> list[tuple[str, list[list[str]]]]:
    """(caption, rows of cells, the heading first) of scores, and of behaviour: a row per benchmark."""
    known = []
    for name in METRICS:
        figures = [row[name] for row in summary.values() if row.get(name)]
        # Without a disk cache that answers, its share is the same 0 in every table.
        if figures and (name != "cached_searches" or any(figure["value"] for figure in figures)):
            known.append(name)
    scores, behaviour = [n for n in known if n in SCORES], [n for n in known if n not in SCORES]
    first = [["", "Questions", *(METRICS[n][0] for n in scores)]]
    second = [["", *(METRICS[n][0] for n in behaviour)]]
    for label, row in summary.items():
        first.append([label, f"{row['questions']:,}", *(cell(row[n], METRICS[n][1], True) for n in scores)])
        second.append([label, *(cell(row[n], METRICS[n][1], False) for n in behaviour)])
    return [("Scores in %, with 95 % bootstrap intervals", first),
            ("Behaviour: shares in %, belief in the gold answer in nats per token", second)]


def describe(settings: dict) -> dict[str, str]:
    """Settings of an evaluation in the few words that a reader needs."""
    k, n, turns, closed = (settings[key] for key in ("passages", "n", "max_turns", "no_search"))
    turns = 1 if closed else turns
    decoding = f"temperature {settings['temperature']:g}" if settings["temperature"] else "greedy"
    search = f"{settings['search']}, {k} passage{'s' * (k > 1)} a search"
    turns = f"up to {turns} turns" if turns > 1 else "one turn"
    questions = [f"{name}: {note['questions']}" for name, note in settings["benchmarks"].items()]
    return {"Model": settings["model"], "Adapter": settings["adapter"] or "none",
            "Questions": "; ".join(questions),
            "Search": "none: closed book, made to answer at once" if closed else search,
            "Episode": f"{turns} of {settings['max_new_tokens']} tokens",
            "Decoding": decoding + f", {n} samples a question: figures are means over samples" * (n > 1)}


def markdown(summary: dict, settings: dict) -> str:
    """results.md. Its tables have a column per benchmark, most often one: so they fit a terminal."""
    parts = ["\n".join(f"- {key}: {value}" for key, value in describe(settings).items())]
    for caption, rows in tables(summary):
        columns = [list(column) for column in zip(*rows)]
        parts.append(f"{caption}:\n\n{markdown_table(columns)}")
    return "\n\n".join(parts) + "\n"


# ---- results and page --------------------------------------------------------------------------------------

def write_results(out: Path, settings: dict, rows: list[dict]) -> str:
    """results.json, results.md and report.html of an evaluation; returns what results.md says."""
    rows = in_order(rows, settings)
    summary = summarise(rows)
    text = markdown(summary, settings)
    versions = {"python": platform.python_version()}
    versions |= {library.__name__: library.__version__ for library in (torch, transformers, peft, np)}
    for name in ("igpo.py", "search_tool.py", "eval.py", "tools/metrics.py"):
        versions[name] = hashlib.sha256((HERE / name).read_bytes()).hexdigest()[:16]
    found = {"results": summary, "settings": settings, "versions": versions}
    write_whole(out / "results.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    write_whole(out / "results.md", text)
    write_report(out / "report.html", out.resolve().name, describe(settings), rows, summary)
    return text


def in_order(rows: list[dict], settings: dict) -> list[dict]:
    """Rollouts of an evaluation by benchmark, question and sample."""
    benchmarks = list(settings["benchmarks"])
    return sorted(rows, key=lambda row: (benchmarks.index(row["benchmark"]), row["id"], row["sample"]))


def read_settings(folder: str | Path) -> dict:
    """config.json of a run or an evaluation. UserError."""
    try:
        return dict(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise UserError(f"{folder}/config.json: cannot be read ({first_line(e)})") from None


def number(x, digits: int = 4) -> float | None:
    """x rounded; None where it is no finite number, since JSON has no NaN."""
    return round(x, digits) if is_number(x) else None


def turn_advantage(turn: dict) -> float | None:
    """What the tokens of a turn were trained with; older files call it "return"."""
    return turn.get("advantage", turn.get("return"))


def page_row(row: dict, passages: dict[tuple, int]) -> dict:
    """A rollout as the page shows it: of a passage just its number, which `passages` gives it."""
    gold, turns = {name_key(name) for name in row.get("supporting") or []}, []
    for turn in row["turns"]:
        found = []      # (number of the passage, its score, is it supporting?)
        for p in turn["passages"]:
            place = passages.setdefault((p["id"], p["title"], p["text"]), len(passages))
            supporting = bool(gold & {name_key(p["id"]), name_key(p["title"])})
            found.append([place, number(p["score"], 2), int(supporting)])
        turns.append({"text": turn["text"], "query": turn["query"], "found": found, "error": turn["error"],
                      "cached": turn.get("cached", False), "gain": number(turn["gain"]),
                      "advantage": number(turn_advantage(turn))})
    return {"benchmark": row.get("benchmark", ""), "step": row.get("step"), "sample": row.get("sample", 0),
            "f1": number(row["f1"]), "beliefs": [number(b) for b in row["beliefs"]],
            "tokens": row["policy_tokens"], "turns": turns,
            **{key: row[key] for key in ("id", "question", "answers", "answer", "stop", "em")}}


def whole_questions(rows: list[dict], limit: int) -> list[dict]:
    """At most `limit` rollouts. Questions are kept whole, so that their rollouts can be compared.

    Those that were played at most steps come first. If none fits as a whole, every n-th rollout is kept.
    """
    steps: dict[tuple, list] = {}
    question = lambda row: (row.get("benchmark") if row.get("step") is None else "", row["id"])
    for row in rows:
        steps.setdefault(question(row), []).append(row.get("step"))
    kept, room = set(), limit
    for name in sorted(steps, key=lambda name: -len(set(steps[name]))):
        if len(steps[name]) <= room:
            kept.add(name)
            room -= len(steps[name])
    return [row for row in rows if question(row) in kept] or rows[::math.ceil(len(rows) / limit)]


def write_report(path: Path, title: str, facts: dict, rows: list[dict], summary: dict,
                 limit: int = 4000) -> None:
    """One page that stands alone. It may load nothing and run only its own script; data is shown as text."""
    shown = rows if len(rows) <= limit else whole_questions(rows, limit)
    note = f"The tables count all {len(rows):,} rollouts, the list holds {len(shown):,} of them."
    passages: dict[tuple, int] = {}
    data = {"title": title, "facts": facts, "note": "" if shown is rows else note, "tables": tables(summary),
            "help": {heading: what for heading, _, what in METRICS.values()},
            "rows": [page_row(row, passages) for row in shown], "passages": list(passages)}
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    page = (HERE / "docs" / "report_template.html").read_text(encoding="utf-8")
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'"
    for tag in ("style", "script"):     # a hash of what stands between the tags: nothing else can act
        body = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
        policy += f"; {tag}-src 'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'"
    fill = {"@TITLE@": html.escape(title), "@CSP@": policy, "@DATA@": text.replace("<", "\\u003c")}
    write_whole(path, re.sub("|".join(fill), lambda slot: fill[slot[0]], page))


def report(folder: str | Path) -> Path:
    """Write the page of a folder with a rollouts.jsonl, and return its path.

    Its figures are per benchmark or, of a training run, per tenth of the run.
    """
    folder = Path(folder)
    rows = read_rollouts(folder)
    config, facts = read_settings(folder) if (folder / "config.json").exists() else {}, {}
    if rows[0].get("step") is None:
        if "benchmarks" in config:
            rows, facts = in_order(rows, config), describe(config)
        summary = summarise(rows)
    else:
        last = max(row["step"] for row in rows)
        tenth = math.ceil(last / 10)
        for row in rows:
            start = (row["step"] - 1) // tenth * tenth + 1
            end = min(start + tenth - 1, last)
            row["benchmark"] = f"step {start}" if start == end else f"steps {start}–{end}"
        known = [key for key in ("model", "credit", "data", "search", "seed") if config.get(key, "") != ""]
        facts = {"Steps": str(last), **{key.capitalize(): str(config[key]) for key in known}}
        summary = summarise(rows)
        summary.pop("macro average", None)      # steps are not benchmarks
    write_report(folder / "report.html", folder.resolve().name, facts, rows, summary)
    return folder / "report.html"


# ---- in the terminal ---------------------------------------------------------------------------------------

def transcript(row: dict, width: int = 100) -> str:
    """A line of rollouts.jsonl as text for a terminal of this width: what was thought, searched and found."""
    def entry(head: str, name: str, text: str, most: int = 400) -> None:
        text = " ".join(text.split())
        text = text if len(text) <= most else text[:most] + " .."
        begin, go_on = f"{head:8}{name:10}", " " * 18
        lines.append(textwrap.fill(text, width, initial_indent=begin, subsequent_indent=go_on))

    lines, beliefs = [], [b if is_number(b) else math.nan for b in row["beliefs"]]
    place = f"step {row['step']}, " if row.get("step") is not None else ""
    lines.append(f"{place}question {row['id']}")
    entry("", "question", row["question"])
    entry("", "gold", " | ".join(row["answers"]))
    for t, turn in enumerate(row["turns"]):
        parts, head = TURN.match(turn["text"]), f"turn {t + 1}"
        if parts:
            entry(head, "thinks", parts["why"])
            entry("", {"search": "searches", "answer": "answers"}[parts["do"]], parts["what"])
        else:       # a broken turn, or a closed book: as it was written
            entry(head, "writes", turn["text"])
        if turn["error"]:
            entry("", "failed", turn["error"])
        for i, passage in enumerate(turn["passages"]):
            entry("", "" if i else "found", f"[{passage['title']}] {passage['text']}", 200)
        if turn["query"] is not None and not turn["error"] and not turn["passages"]:
            entry("", "found", "nothing")
        if t + 1 < len(beliefs):
            gain = turn["gain"] if is_number(turn["gain"]) else math.nan
            entry("", "belief", f"{beliefs[t]:+.2f} -> {beliefs[t + 1]:+.2f}, gain {gain:+.3f}")
        if is_number(turn_advantage(turn)):
            entry("", "advantage", f"{turn_advantage(turn):+.3f}")
    entry("end", "", f"{ENDS.get(row['stop'], row['stop'])}, F1 {row['f1']:.2f}")
    return "\n".join(lines)


def transcripts(folder: str, n: int) -> str:
    """n rollouts of a folder, evenly over the file; the last is always among them."""
    rows = read_rollouts(folder)
    n = min(n, len(rows))
    chosen = [rows[len(rows) - 1 - i * len(rows) // n] for i in reversed(range(n))]
    width = min(os.get_terminal_size().columns, 120) if sys.stdout.isatty() else 100
    return "\n\n".join(transcript(row, width) for row in chosen)


# ---- training curves ---------------------------------------------------------------------------------------

PANELS = (    # title, x axis, {metric: (line, what the legend adds)}
    ("dev F1 against steps", "step", {"eval_f1": ("-", "")}),
    ("dev F1 against tokens trained on", "tokens", {"eval_f1": ("-", "")}),
    ("groups without signal", "step", {"no_signal_outcome": ("--", ", by outcomes alone"),
                                       "no_signal": ("-", ", as trained on")}),
    ("belief gained by the searches of a rollout (nats)", "step", {"belief_gain": ("-", "")}),
)
# What two runs of one setting may differ in: the seed, and what changes nothing in the figures.
NO_SETTING = {"seed", "out", "resume", "steps", "eval_every", "search_cache", "rollout_batch", "batch_tokens",
              "gradient_checkpointing"}


def read_run(folder: str | Path) -> tuple[dict, list[dict]]:
    """(config, rows of metrics.jsonl). Added for the plots: "tokens" trained on so far, and "belief_gain"."""
    rows, tokens = read_jsonl(Path(folder) / "metrics.jsonl"), 0
    for row in rows:
        tokens += row.get("policy_tokens") or 0
        row["tokens"] = tokens
        if is_number(row.get("belief_first")) and is_number(row.get("belief_last")):
            row["belief_gain"] = row["belief_last"] - row["belief_first"]
    return read_settings(folder), rows


def curves(runs: list[tuple[dict, list[dict]]]) -> dict[str, dict]:
    """{label: {"seeds", metric: [(step, tokens, mean, low, high), ..]}} of runs, seeds of one setting as one.

    Mean, least and greatest over the seeds, at the steps that all of them have. A label says in what the
    settings differ.
    """
    keys = sorted({key for config, _ in runs for key in config} - NO_SETTING)
    differ = [key for key in keys if len({json.dumps(config.get(key)) for config, _ in runs}) > 1]
    groups: dict[str, list] = {}
    for config, rows in runs:
        told = {key: os.path.basename(str(config.get(key))) for key in differ}      # a path by its last part
        label = ", ".join(value if key == "credit" else f"{key} {value}" for key, value in told.items())
        groups.setdefault(label or config.get("credit", "run"), []).append(rows)
    result: dict[str, dict] = {}
    for label, seeds in groups.items():
        result[label] = {"seeds": len(seeds)}
        for metric in {metric for _, _, metrics in PANELS for metric in metrics}:
            by_step = [{row["step"]: row for row in rows if is_number(row.get(metric))} for rows in seeds]
            points = []
            for step in sorted(set.intersection(*map(set, by_step))):
                values = [rows[step][metric] for rows in by_step]
                tokens = mean(rows[step]["tokens"] for rows in by_step)
                points.append((step, tokens, mean(values), min(values), max(values)))
            result[label][metric] = points
    return result


def plot(folders: list[str], path: str):
    """Dev F1 by steps and by tokens (paper, Fig. 6), groups without signal (Fig. 1), belief gain (Fig. 5).

    Returns the figure. UserError.
    """
    try:
        import matplotlib       # nothing else needs it
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
        if "no_signal" in metrics:
            axis.set_ylim(-.02, 1.02)
        for k, (label, series) in enumerate(settings.items()):
            for metric, (style, added) in metrics.items():
                draw(axis, series[metric], x, series["seeds"] > 1, style, f"C{k}", label + added)
        if len(metrics) > 1:
            styles = [Line2D([], [], color="grey", linestyle=style, label=added.strip(" ,"))
                      for style, added in metrics.values()]
            axis.legend(handles=styles, fontsize=8, frameon=False)
    lines = []
    for k, (label, series) in enumerate(settings.items()):
        seeds = f" ({series['seeds']} seeds, band: least to greatest)" if series["seeds"] > 1 else ""
        lines.append(Line2D([], [], color=f"C{k}", label=label + seeds))
    figure.legend(handles=lines, loc="outside lower left", fontsize=9, frameon=False)
    figure.savefig(path, dpi=150)
    return figure


def draw(axis, points: list[tuple], x: str, band: bool, style: str, color: str, label: str) -> None:
    """A line of `curves`, and its band."""
    if points:
        steps, tokens, middle, low, high = zip(*points)
        at = tokens if x == "tokens" else steps
        axis.plot(at, middle, style, color=color, label=label, marker="o" if len(at) < 2 else None)
        if band:
            axis.fill_between(at, low, high, color=color, alpha=.18, linewidth=0)


# ---- command line ------------------------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 2 for what the user can mend (told in one line)."""
    parser = argparse.ArgumentParser(prog="tools.report", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"tools.report: {message}; --help lists the options\n")
    add = parser.add_argument
    add("folder", nargs="?", metavar="FOLDER", help="a training run or an evaluation")
    add("--show", type=int, metavar="N", help="print N rollouts, evenly over the file; no page")
    add("--plot", nargs="+", metavar="RUN", help="draw the training curves of these run folders")
    add("-o", default="curves.png", metavar="FILE", help="where --plot draws them (curves.png)")
    args = parser.parse_args(argv)
    if bool(args.folder) == bool(args.plot) or (args.show is not None and (args.plot or args.show < 1)):
        parser.error("give a FOLDER, or --plot RUN ..; --show takes a number from 1 on, and a FOLDER")
    try:
        if args.show:
            print(transcripts(args.folder, args.show))
        elif args.plot:
            plot(args.plot, args.o)
            print(f"written: {args.o}")
        else:
            print(f"written: {report(args.folder)}")
    except (UserError, OSError) as e:
        print(f"tools.report: {first_line(e)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")       # a rollout in any script, on a terminal that knows one
    sys.exit(main())
