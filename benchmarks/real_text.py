"""Does the belief rise when a supporting passage comes back? Eq. 4 as a measurement, without training.

    python -m benchmarks.real_text --model MODEL --data FOLDER       # FOLDER: dev.jsonl and corpus.jsonl
    python -m benchmarks.real_text --model MODEL --init_adapter runs/x/best --data FOLDER --out after
    python -m benchmarks.real_text --tables                          # table and figure from <out>.csv

For each question with two supporting passages (as HotpotQA has), scripted rollouts of two searches by title,
each of which brings one passage:

  supporting    the two supporting passages, in either order: two rollouts
  distractor    BM25's best two for the question that are not supporting: one rollout

The model is asked for b_0, b_1, b_2 (Eq. 3). Their differences are the gains of the first and second search,
in log-probability and in probability, as --credit igpo-v2 and igpo have them. Means are over gains, intervals
95 % bootstrap over questions. A passage *holds the answer* if the gold's words stand in it side by side.

Written: <out>.csv, a row per gain, <out>.md, and docs/<name>.png.
"""
import argparse
import csv
import json
import math
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import igpo
from benchmarks.common import HERE, ROOT, commit, figure, machine, mean_and_interval, table
from search_tool import Passage, Results, answer_words, clean_query, load_questions, open_search
from tools.warm_start import teachable, turn_text

NAMED = {"yes_no": False}       # an answer other than yes or no
SLICES = {
    "all": {}, "first search": {"turn": 0}, "second search": {"turn": 1},
    "answer is yes or no": {"yes_no": True}, "any other answer": NAMED,
    "any other, passage holds it": {**NAMED, "holds": True},
    "any other, first search, passage holds it": {**NAMED, "holds": True, "turn": 0},
    "any other, second search, passage holds it": {**NAMED, "holds": True, "turn": 1},
    "any other, passage does not": {**NAMED, "holds": False},
    "any other, first search, passage does not": {**NAMED, "holds": False, "turn": 0},
    "any other, second search, passage does not": {**NAMED, "holds": False, "turn": 1}}

def rollout_of(tokenizer, question: str, passages: list[Passage], cfg: igpo.Config) -> igpo.Rollout:
    """What igpo.rollout would have written of a policy that looks each passage up by its title."""
    r = igpo.begin(tokenizer, question)
    for p in passages:
        r.write(igpo.encode(tokenizer, turn_text(clean_query(p.title))), True)
        r.write(igpo.encode_information(tokenizer, Results([p]), cfg.max_info_tokens)[0], False)
        r.boundaries.append(len(r.ids))
    return r

def holds(passage: Passage, gold: str) -> bool:
    """Do the gold's words stand in the passage side by side?"""
    words = lambda text: f" {' '.join(answer_words(text))} "
    return words(gold) in words(f"{passage.title} {passage.text}")

def measure(model, tokenizer, q: dict, supporting: list[Passage], best: list[Passage], cfg) -> list[dict]:
    """The six gains of a question: two searches in each of three rollouts."""
    one, two = supporting
    paths, gold = [[one, two], [two, one], best], q["answers"][0]
    rollouts = [rollout_of(tokenizer, q["question"], path, cfg) for path in paths]
    _, beliefs = igpo.score(model, tokenizer, rollouts, [q["answers"]] * len(paths), cfg)
    return [{"id": q["id"], "supporting": n < 2, "turn": t, "yes_no": gold.lower() in ("yes", "no"),
             "holds": holds(p, gold), "before": b[t], "after": b[t + 1]}
            for n, (path, b) in enumerate(zip(paths, beliefs)) for t, p in enumerate(path)]

GAINS = {"logprob": lambda row: row["after"] - row["before"],
         "prob": lambda row: math.exp(row["after"]) - math.exp(row["before"])}

def figures(rows: list[dict], gain: str) -> list[tuple[str, str, list[tuple[str, float]]]]:
    """(slice, what came back, [(question, gain)]); a difference is to the distractor of question and turn."""
    value, found = GAINS[gain], []
    other = {(r["id"], r["turn"]): value(r) for r in rows if not r["supporting"]}
    for name, wanted in SLICES.items():
        some = [r for r in rows if all(r[key] == v for key, v in wanted.items())]
        found += [(name, "supporting", [(r["id"], value(r)) for r in some if r["supporting"]]),
                  (name, "distractor", [(r["id"], value(r)) for r in some if not r["supporting"]]),
                  (name, "difference", [(r["id"], value(r) - other[r["id"], r["turn"]]) for r in some
                                        if r["supporting"]])]
    return [row for row in found if row[2]]

def gain_table(rows: list[dict], gain: str, digits: int) -> list[str]:
    lines = []
    for name, kind, values in figures(rows, gain):
        groups: dict = {}
        for i, v in values:
            groups.setdefault(i, []).append(v)
        rises = mean_and_interval([[float(v > 0) for v in g] for g in groups.values()])
        means = mean_and_interval(list(groups.values()))
        lines.append([name, kind, len(groups), len(values),
                      "{:+.{d}f} [{:+.{d}f}, {:+.{d}f}]".format(*means, d=digits),
                      f"{statistics.median(v for _, v in values):+.{digits}f}",
                      "{:.0%} [{:.0%}, {:.0%}]".format(*rises)])
    head = [gain, "what came back", "questions", "gains", "mean gain", "median", "above 0"]
    return table(head, lines, left=2)

def histogram(rows: list[dict], path: Path) -> None:
    """Gains of questions whose answer is not yes or no, by what came back."""
    rows = [r for r in rows if not r["yes_no"]]
    gain = GAINS["logprob"]
    edges = np.linspace(*np.percentile([gain(r) for r in rows], [1, 99]), 28)
    kinds = {"supporting, with the answer": ("C0", lambda r: r["supporting"] and r["holds"]),
             "supporting, without": ("C2", lambda r: r["supporting"] and not r["holds"]),
             "distractor": ("C1", lambda r: not r["supporting"])}
    with figure(path, columns=2, size=(9.5, 3.6), sharey=True) as (fig, axes):
        for turn, axis in enumerate(axes[0]):
            for name, (color, fits) in kinds.items():
                if some := [gain(r) for r in rows if r["turn"] == turn and fits(r)]:
                    axis.hist(np.clip(some, edges[0], edges[-1]), edges, weights=[1 / len(some)] * len(some),
                              histtype="step", linewidth=1.8, color=color,
                              label=f"{name}: {igpo.mean(some):+.2f}")
                    axis.axvline(igpo.mean(some), ymax=0.06, color=color, linewidth=4)
            axis.axvline(0, color="black", linewidth=0.8)
            axis.set_title(f"{('first', 'second')[turn]} search", loc="left")
            axis.set_xlabel("information gain, nats per gold token")
            axis.legend(frameon=False, fontsize=9)
        axes[0][0].set_ylabel("share of gains")
        fig.suptitle("Figures and marks at the bottom: means. The outer bins include all that lies beyond",
                     fontsize=9)

def run(args: argparse.Namespace) -> tuple[list[dict], dict]:
    """(gains, what they were measured with)."""
    start, corpus = time.time(), igpo.locate(f"{args.data}/corpus.jsonl")
    cfg = igpo.Config(model=args.model, init_adapter=args.init_adapter, gradient_checkpointing=False)
    asked = teachable(load_questions(igpo.locate(args.questions or f"{args.data}/dev.jsonl")), corpus)
    asked = [(q, supporting) for q, supporting in asked if len(supporting) == 2][:args.limit]
    search, (model, tokenizer), rows = open_search(f"bm25:{corpus}"), igpo.load_model(cfg), []
    for q, supporting in tqdm(asked):
        known = {p.id for p in supporting}
        best = [p for p in search.search(q["question"], 8) if p.id not in known][:2]
        rows += measure(model, tokenizer, q, supporting, best, cfg)
    options = "".join(f" --{key} {value}" for key in ("model", "init_adapter", "data", "questions", "limit")
                      if (value := getattr(args, key)))
    return rows, {"command": f"python -m benchmarks.real_text{options}", "commit": commit(),
                  "with": machine(), "minutes": round((time.time() - start) / 60, 1)}

def write_csv(path: Path, rows: list[dict], setting: dict) -> None:
    """The first line is what the gains were measured with."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        file.write(f"# {json.dumps(setting)}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0])
        cell = lambda v: f"{v:.6f}" if isinstance(v, float) else int(v) if isinstance(v, bool) else v
        writer.writerows(map(cell, row.values()) for row in rows)

def read_csv(path: Path) -> tuple[list[dict], dict]:
    with open(path, newline="", encoding="utf-8") as file:
        setting = json.loads(file.readline()[2:])
        of = {"id": str, "turn": int, "before": float, "after": float}
        rows = [{key: of.get(key, lambda v: v == "1")(value) for key, value in row.items()}
                for row in csv.DictReader(file)]
    return rows, setting

def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", default="", help="as for igpo.py")
    parser.add_argument("--init_adapter", default="", help="PEFT folder that is merged into the model")
    parser.add_argument("--data", default="", help="folder of dev.jsonl and corpus.jsonl")
    parser.add_argument("--questions", default="", help="questions, if not <data>/dev.jsonl")
    parser.add_argument("--limit", type=int, help="only the first so many questions")
    parser.add_argument("--out", type=Path, default=HERE / "real_text", help="writes <out>.csv and <out>.md")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "real_text.png")
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.tables and not (args.model and args.data):
        parser.error("--model and --data are needed")
    rows, setting = read_csv(args.out.with_suffix(".csv")) if args.tables else run(args)
    if not args.tables:
        write_csv(args.out.with_suffix(".csv"), rows, setting)
    facts = ", ".join(f"{key} {value}" for key, value in setting.items() if key != "command")
    lines = ["# Eq. 4 on real text: the gain when a supporting passage came back, and when not", "",
             f"`{setting['command']}`, {facts}.",
             "What is measured is told at the top of benchmarks/real_text.py. "
             "*difference*: supporting less distractor, same question and turn.", "",
             *gain_table(rows, "logprob", 3), "", *gain_table(rows, "prob", 4)]
    args.out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    histogram(rows, args.figure)

if __name__ == "__main__":
    main()
