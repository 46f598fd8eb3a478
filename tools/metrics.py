"""Scores of answers, figures of an evaluation with their intervals, and the comparison of two evaluations.

    python -m tools.metrics results/a results/b                     is b better than a? paired bootstrap
    python -m tools.metrics results/a results/b --metric em_squad   by another metric

All figures are made from rollouts.jsonl, so a scorer can be changed after the evaluation. Two conventions of
scoring stand side by side. "paper" is what the authors of IGPO do, and what training uses (search_tool.py).
"squad" is what the scripts of SQuAD do. docs/evaluation.md compares them, and explains every metric.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import re
import string
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from igpo import mean
from search_tool import UserError, clean_text, exact_match, f1_score, first_line, normalise

METRICS = {     # name: (heading, unit, what it is)
    "f1_paper": ("F1", "%", "word F1 with the best gold alias, sets of words (the authors' convention)"),
    "em_paper": ("EM", "%", "exact match: the words of a gold alias in order (the authors' convention)"),
    "f1_squad": ("F1 SQuAD", "%", "word F1 as SQuAD's script has it: articles dropped, multisets of words"),
    "em_squad": ("EM SQuAD", "%", "exact match as SQuAD's script has it"),
    "cover_em": ("cover-EM", "%", "share of answers in which a gold alias stands"),
    "pass_f1": ("F1 best of n", "%", "F1 of the best of n samples"),
    "pass_em": ("pass@n", "%", "share of questions with an exact match among n samples"),
    "turns": ("Turns", "", "mean turns per rollout"),
    "searches": ("Searches", "", "mean searches per rollout"),
    "tokens": ("Tokens", "#", "mean tokens written by the policy per rollout"),
    "failed_searches": ("Failed searches", "%", "share of searches that came back with an error"),
    "cached_searches": ("Cached searches", "%", "share of searches that the disk cache answered"),
    "recall": ("Recall", "%", "share of the supporting passages that the policy was shown, by id or title"),
    "belief_first": ("Belief before", "nats", "log-probability per gold token before the first turn"),
    "belief_last": ("Belief after", "nats", "log-probability per gold token after the last search"),
    "entropy_reduction": ("Entropy reduction", "nats", "log-probability per gold token, after minus before"),
    "gain_positive": ("Gain > 0", "%", "share of rollouts whose belief is higher after than before"),
    "stop_answer": ("Answered", "%", "share of rollouts that ended with an answer"),
    "stop_format": ("Broken format", "%", "share that broke the format"),
    "stop_length": ("Cut short", "%", "share cut in the middle of a turn, or without room for another"),
    "stop_turns": ("Out of turns", "%", "share that still searched on the last turn"),
}
STOPS = ("answer", "format", "length", "turns")


# ---- one answer --------------------------------------------------------------------------------------------

def without_punctuation(text: str) -> str:
    """A text in NFC without ASCII punctuation: "Zoé's" is "Zoés", however its é was typed."""
    return "".join(c for c in normalise(text) if c not in string.punctuation)


def squad_words(text: str) -> list[str]:
    """Words as in evaluate-v1.1.py and -v2.0.py of SQuAD: lower case, no ASCII punctuation, no articles.

    >>> squad_words("The U.S. Navy's"), squad_words("A")
    (['us', 'navys'], [])
    """
    return re.sub(r"\b(a|an|the)\b", " ", without_punctuation(text).lower()).split()


def squad_f1(answer: str, gold: str) -> float:
    """F1 of two multisets of words. One without words, as the grade "A": 1.0 if both have none, else 0.0."""
    p, g = squad_words(answer), squad_words(gold)
    if not p or not g:
        return float(p == g)
    return 2 * (Counter(p) & Counter(g)).total() / (len(p) + len(g))


def covers(answer: str, gold: str) -> bool:
    """Do the words of the gold stand in the answer, one after the other? ("art" is not in "party".)

    A gold of articles alone, as the blood type "A", is looked for as it is written: "a" is in many answers.
    """
    p, g = squad_words(answer), squad_words(gold)
    if p == g:
        return True
    if not g:
        p, g = without_punctuation(answer).split(), without_punctuation(gold).split()
    return bool(g) and any(p[i:i + len(g)] == g for i in range(len(p)))


def scores(answer: str | None, golds: list[str]) -> dict[str, float]:
    """F1 and exact match in both conventions, and cover-EM, all 0..1, each with the best gold alias.

    Without an answer, None or blank, all are 0.

    >>> scores("the red fox", ["wolf", "red fox"])
    {'f1_paper': 0.8, 'em_paper': 0.0, 'f1_squad': 1.0, 'em_squad': 1.0, 'cover_em': 1.0}
    """
    golds = golds if answer and answer.strip() else []
    return {"f1_paper": f1_score(answer, golds), "em_paper": exact_match(answer, golds),
            "f1_squad": max((squad_f1(answer, gold) for gold in golds), default=0.0),
            "em_squad": float(any(squad_words(answer) == squad_words(gold) for gold in golds)),
            "cover_em": float(any(covers(answer, gold) for gold in golds))}


# ---- one rollout, one question -----------------------------------------------------------------------------

def name_key(text) -> str:
    """An id or title in the form in which two of them are compared."""
    return clean_text(text, 200).casefold()


def is_number(x) -> bool:
    return isinstance(x, (int, float)) and math.isfinite(x)


def measure(row: dict) -> dict[str, tuple[float, float]]:
    """Each metric of a line of rollouts.jsonl as (amount, out of how many); (0, 0) where it is not known.

    The figure of a benchmark is the sum of the amounts over the sum of the counts. So a share of searches is
    one of all searches, not a mean over rollouts.
    """
    searches = [turn for turn in row["turns"] if turn["query"] is not None]
    shown = {name_key(p[key]) for turn in searches for p in turn["passages"] for key in ("id", "title")}
    wanted = [name_key(name) for name in row.get("supporting") or []]
    known = bool(row["beliefs"]) and all(map(is_number, row["beliefs"]))
    first, last = (row["beliefs"][0], row["beliefs"][-1]) if known else (0.0, 0.0)
    return {
        **{name: (score, 1) for name, score in scores(row["answer"], row["answers"]).items()},
        "turns": (len(row["turns"]), 1),
        "searches": (len(searches), 1),
        "tokens": (row["policy_tokens"], 1),
        "failed_searches": (sum(turn["error"] is not None for turn in searches), len(searches)),
        "cached_searches": (sum(turn.get("cached", False) for turn in searches), len(searches)),
        "recall": (sum(name in shown for name in wanted), len(wanted)),
        "belief_first": (first, known),
        "belief_last": (last, known),
        "entropy_reduction": (last - first, known),
        "gain_positive": (last > first, known),
        **{f"stop_{why}": (row["stop"] == why, 1) for why in STOPS},
    }


def by_question(rows: list[dict]) -> dict[tuple, list[dict]]:
    """The samples of each question: {(benchmark, id): rows}."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row.get("benchmark", ""), row["id"]), []).append(row)
    return groups


def question_metrics(samples: list[dict]) -> dict[str, tuple[float, float]]:
    """`measure` of one question: amounts and counts summed over its samples, and the best of several."""
    each = [measure(row) for row in samples]
    total = {name: tuple(sum(m[name][part] for m in each) for part in (0, 1)) for name in each[0]}
    if len(each) > 1:
        for kind in ("f1", "em"):
            total[f"pass_{kind}"] = (max(m[f"{kind}_paper"][0] for m in each), 1)
    return total


# ---- many questions ----------------------------------------------------------------------------------------

def bootstrap(amounts: np.ndarray, counts: np.ndarray, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """(resamples, M) figures of M metrics, of N questions drawn with replacement. amounts, counts: (N, M).

    Where no question that was drawn has a count, the figure is NaN.
    """
    rng, n, parts = np.random.default_rng(seed), len(amounts), []
    for start in range(0, resamples, 200):      # (200, N) at a time: how often each question was drawn
        drawn = rng.multinomial(n, np.full(n, 1 / n), size=min(200, resamples - start))
        with np.errstate(invalid="ignore"):
            parts.append((drawn @ amounts) / (drawn @ counts))
    return np.concatenate(parts)


def interval(value: float, replicates: np.ndarray) -> dict | None:
    """{"value", "low", "high"}, a 95 % percentile interval; None where the value is not known."""
    if not math.isfinite(value):
        return None
    low, high = np.nanpercentile(replicates, [2.5, 97.5])
    return {"value": float(value), "low": float(low), "high": float(high)}


def summarise(rows: list[dict], seed: int = 0) -> dict:
    """{benchmark: {"questions", "rollouts", metric: {"value", "low", "high"} or None}} of rollouts.

    Intervals are over questions, not over rollouts. If there are several benchmarks, "macro average" weighs
    them alike; what is unknown in one of them is averaged over the others.
    """
    measured: dict[str, list] = {}
    for (benchmark, _), samples in by_question(rows).items():
        measured.setdefault(benchmark, []).append((question_metrics(samples), len(samples)))
    everywhere = set.intersection(*(set(m) for questions in measured.values() for m, _ in questions))
    names = [name for name in METRICS if name in everywhere]
    summary, values, replicates = {}, [], []
    for k, (benchmark, questions) in enumerate(measured.items()):
        table = np.array([[m[name] for name in names] for m, _ in questions], float)       # (N, M, 2)
        amounts, counts = table[..., 0], table[..., 1]
        with np.errstate(invalid="ignore"):
            values.append(amounts.sum(0) / counts.sum(0))
        replicates.append(bootstrap(amounts, counts, seed=seed + k))
        summary[benchmark] = {"questions": len(questions), "rollouts": sum(n for _, n in questions)}
        for name, value, column in zip(names, values[-1], replicates[-1].T):
            summary[benchmark][name] = interval(value, column)
    if len(summary) > 1:
        macro = {key: sum(row[key] for row in summary.values()) for key in ("questions", "rollouts")}
        for i, name in enumerate(names):
            known = [k for k in range(len(values)) if math.isfinite(values[k][i])]
            columns = [replicates[k][:, i] for k in known]
            average = mean(values[k][i] for k in known)
            macro[name] = interval(average, np.mean(columns, axis=0)) if known else None
        summary["macro average"] = macro
    return summary


def question_figures(rows: list[dict], metric: str) -> dict[tuple, float]:
    """{(benchmark, id, text of the question): figure} of the questions where the metric is known."""
    figures = {}
    for key, samples in by_question(rows).items():
        amount, count = question_metrics(samples)[metric]
        if count:
            figures[*key, samples[0]["question"]] = amount / count
    return figures


def compare(a: list[dict], b: list[dict], metric: str = "f1_paper", resamples: int = 10_000,
            seed: int = 0) -> list[dict]:
    """Is b better than a? Per benchmark means, difference, interval, two-sided p, wins of b, ties, losses.

    Paired: both are judged on the questions that both have, and a resample draws the same questions for both.
    p is twice the share of resamples in which the difference is 0 or has the other sign (paper, table 9).
    UserError if they have no question in common.
    """
    of_a, of_b = question_figures(a, metric), question_figures(b, metric)
    pairs: dict[str, list] = {}
    for key in of_a:
        if key in of_b:
            pairs.setdefault(key[0], []).append((of_a[key], of_b[key]))
    if not pairs:
        raise UserError("the two have no question in common")
    table, replicates = [], []
    for k, (benchmark, both) in enumerate(pairs.items()):
        gaps = np.array([y - x for x, y in both])
        wins, losses = int((gaps > 1e-9).sum()), int((gaps < -1e-9).sum())
        replicates.append(bootstrap(gaps[:, None], np.ones((len(gaps), 1)), resamples, seed + k)[:, 0])
        table.append({"benchmark": benchmark, "questions": len(both),
                      "a": mean(x for x, _ in both), "b": mean(y for _, y in both),
                      "win": wins, "tie": len(both) - wins - losses, "loss": losses})
    if len(table) > 1:
        replicates.append(np.mean(replicates, axis=0))
        table.append({"benchmark": "macro average", **{key: mean(row[key] for row in table) for key in "ab"},
                      **{key: sum(row[key] for row in table) for key in ("questions", "win", "tie", "loss")}})
    for row, draws in zip(table, replicates):
        low, high = np.percentile(draws, [2.5, 97.5])
        p = 2 * float(min(np.mean(draws <= 1e-12), np.mean(draws >= -1e-12)))
        row |= {"difference": row["b"] - row["a"], "low": float(low), "high": float(high)}
        row["p"] = min(1.0, max(p, 1 / resamples))
    return table


# ---- files and tables --------------------------------------------------------------------------------------

def read_jsonl(path: Path) -> list[dict]:
    """The lines of a log. A last line that was cut while it was written is left out. UserError."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]        # a text would be split at U+2028 too
        return [dict(json.loads(line)) for line in lines if line.strip()]
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise UserError(f"{path}: cannot be read ({first_line(e)})") from None


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def read_rollouts(folder: str | Path) -> list[dict]:
    """rollouts.jsonl of a run or an evaluation. UserError if there are none in it."""
    path = Path(folder) / "rollouts.jsonl"
    rows, needed = read_jsonl(path), {"id", "question", "answers", "answer", "stop", "f1", "em", "beliefs",
                                      "policy_tokens", "turns"}
    if not rows or not all(needed <= row.keys() for row in rows):
        raise UserError(f"{path}: holds no rollouts")
    return rows


def markdown_table(rows: list[list[str]]) -> str:
    """Rows of cells, the heading first, as a Markdown table that can be read as it stands, too.

    >>> print(markdown_table([["", "F1"], ["demo", "5.0"]]))
    |      |  F1 |
    | ---- | --: |
    | demo | 5.0 |
    """
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    lines = []
    for row in [rows[0], rule, *rows[1:]]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def comparison(a: str, b: str, metric: str = "f1_paper") -> str:
    """What `python -m tools.metrics A B` prints: `compare` of two folders as a table."""
    of_a, of_b = read_rollouts(a), read_rollouts(b)
    heading, unit, what = METRICS[metric]
    scale, rest = (100, " in %") if unit == "%" else (1, " in nats" if unit == "nats" else "")
    rows = [["", "questions", "A", "B", "B - A", "95 % interval", "p", "win / tie / loss"]]
    for row in compare(of_a, of_b, metric):
        x, y, gap, low, high = (scale * row[key] for key in ("a", "b", "difference", "low", "high"))
        p = f"{row['p']:.3f}" if row["p"] >= .001 else "< 0.001"
        rows.append([row["benchmark"], f"{row['questions']:,}", f"{x:.2f}", f"{y:.2f}", f"{gap:+.2f}",
                     f"[{low:+.2f}, {high:+.2f}]", p, f"{row['win']} / {row['tie']} / {row['loss']}"])
    keys = [set(question_figures(rows, metric)) for rows in (of_a, of_b)]
    alone = [f"{len(keys[k] - keys[1 - k]):,} only in {'AB'[k]}" for k in (0, 1) if keys[k] - keys[1 - k]]
    note = f"\n\nQuestions that are not in both do not count: {', '.join(alone)}." if alone else ""
    return f"A: {a}\nB: {b}\n{heading}{rest}: {what}\n\n{markdown_table(rows)}{note}"


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 2 for what the user can mend (told in one line)."""
    parser = argparse.ArgumentParser(prog="tools.metrics", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"tools.metrics: {message}; --help lists the options\n")
    parser.add_argument("a", metavar="A", help="folder of results (or of a training run)")
    parser.add_argument("b", metavar="B", help="another one, that may be better")
    names = [name for name in METRICS if not name.startswith("pass_")]
    parser.add_argument("--metric", default="f1_paper", choices=names, metavar="M",
                        help=f"what is compared (f1_paper): {', '.join(names)}")
    args = parser.parse_args(argv)
    try:
        print(comparison(args.a, args.b, args.metric))
    except UserError as e:
        print(f"tools.metrics: {first_line(e)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")       # a name in any script, on a terminal that knows one
    sys.exit(main())
