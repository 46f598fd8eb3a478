"""Which signal finds the bridge? The raw reward of a search, by recipe, against what the search brought.

    python -m benchmarks.bridge                               # the demo: rollouts that its policy samples
    python -m benchmarks.bridge --model MODEL --data FOLDER --out benchmarks/bridge_hotpotqa      # scripted
    python -m benchmarks.bridge --tables [--out ..]           # the table again, from <out>.csv

A search is *right* if it brought a supporting passage that none before it had brought. Each reward is judged
by the area under the ROC curve: how often a right search has more of it than a wrong one, ties counting half
(0.5: it says nothing). Right searches are taken apart:

  bridge     the passage does not hold the answer: a hop on the way
  answer     it does: the last hop
  first      .. of the first turn, against wrong searches of the first turn
  later      .. of later turns, against wrong searches of later turns

Rewards, from the mean log-probability of the gold's tokens before the search, after it, and after one random
passage of another question in the place of what it brought:

  prob             exp(after) - exp(before): igpo, igpo-v1, ig, a2tgpo
  logprob          after - before: igpo-v2, dr-venus, dr-venus-scaled (which then divide it by group)
  positive         max(after - before, 0): dbelief
  prob, random     exp(after) - exp(after random): random-baseline
  logprob, random  after - after random: IG-Search
  .., best form    the same of the likeliest of a few forms of the gold: all aliases, each as it is, in lower
                   case, and with a capital first letter

The demo: 4 rollouts for each of the 200 dev questions, sampled by the warm start. Otherwise, as in
real_text.py: searches by title that bring the two supporting passages in either order, or BM25's two best
others. Intervals are 95 %, questions drawn with replacement. Answers yes and no are left out.
"""

import argparse
import csv
import math
import random
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import DynamicCache

import igpo
from benchmarks.common import HERE, commit, machine, rounded, table
from benchmarks.real_text import holds, rollout_of
from search_tool import Passage, Results, load_questions, open_search
from tools.data import yes_or_no
from tools.warm_start import teachable

REWARDS = {
    "prob": lambda r, form="": math.exp(r["after" + form]) - math.exp(r["before" + form]),
    "logprob": lambda r, form="": r["after" + form] - r["before" + form],
    "positive": lambda r, form="": max(r["after" + form] - r["before" + form], 0.0),
    "prob, random": lambda r, form="": math.exp(r["after" + form]) - math.exp(r["random" + form]),
    "logprob, random": lambda r, form="": r["after" + form] - r["random" + form],
    "prob, best form": lambda r: REWARDS["prob"](r, "_best"),
    "logprob, best form": lambda r: REWARDS["logprob"](r, "_best"),
}
COLUMNS = {
    "all": (lambda r: True, lambda r: True),
    "bridge, first": (lambda r: not r["holds"] and r["turn"] == 0, lambda r: r["turn"] == 0),
    "bridge, later": (lambda r: not r["holds"] and r["turn"] > 0, lambda r: r["turn"] > 0),
    "answer, first": (lambda r: r["holds"] and r["turn"] == 0, lambda r: r["turn"] == 0),
    "answer, later": (lambda r: r["holds"] and r["turn"] > 0, lambda r: r["turn"] > 0),
}

def gold_forms(aliases: list[str]) -> list[str]:
    """The first alias as it is comes first."""
    forms = (form.strip() for a in aliases for form in (a, a.lower(), a[:1].upper() + a[1:]))
    return list(dict.fromkeys(forms))

@torch.no_grad()
def walk(
    lm, tokenizer, r: igpo.Rollout, probes: list[list[int]], skip: int, others: list[Passage], cfg
) -> list[dict]:
    """The beliefs around each search of a rollout, read once from left to right: what is only tried is taken
    out of the cache again. probes: tokens that lead to a gold, the first `skip` of them its way there."""
    cache = DynamicCache()

    def read(ids: list[int]):
        out = lm.base_model(torch.tensor([ids], device=lm.device), cache=cache, use_cache=True)
        return out[0][0]

    def beliefs() -> tuple[float, float]:
        found = []
        for probe in probes:
            logits = lm.get_output_embeddings()(read(probe)[skip - 1 : -1]).float() / cfg.temperature
            gold = torch.tensor(probe[skip:], device=lm.device)[:, None]
            found.append(logits.log_softmax(-1).gather(1, gold).mean().item())
            cache.crop(-len(probe))
        return found[0], max(found)

    read(r.ids[: r.boundaries[0]])
    rows, now = [], beliefs()
    for t, (start, end) in enumerate(zip(r.boundaries, r.boundaries[1:])):
        policy = start + sum(r.mask[start:end])
        read(r.ids[start:policy])
        block = igpo.encode_information(tokenizer, Results([others[t]]), cfg.max_info_tokens)[0]
        read(block)
        swapped = beliefs()
        cache.crop(-len(block))
        read(r.ids[policy:end])
        before, now = now, beliefs()
        found = {"before": before, "after": now, "random": swapped}
        rows.append({"turn": t, **{name + form: values[i] for name, values in found.items()
                                   for i, form in enumerate(("", "_best"))}})
    return rows

def measure(
    lm, tokenizer, q: dict, r: igpo.Rollout, shown: list[list[Passage]], pool: list[Passage], draw, cfg
) -> list[dict]:
    """A row for each search of a rollout: what it brought, and the beliefs around it."""
    schema, gold = igpo.encode(tokenizer, igpo.SCHEMA), q["answers"][0]
    probes = [schema + igpo.encode_gold(tokenizer, [form]) for form in gold_forms(q["answers"])]
    others = [draw.choice([p for p in pool if p.title not in q["supporting"]]) for _ in shown]
    rows, seen = [], set()
    for row, passages in zip(walk(lm, tokenizer, r, probes, len(schema), others, cfg), shown):
        new = [p for p in passages if {p.id, p.title} & set(q["supporting"]) and p.title not in seen]
        seen |= {p.title for p in passages}
        rows.append({"id": q["id"], "right": bool(new), "holds": any(holds(p, gold) for p in new), **row})
    return rows

def of_the_demo(args) -> list[dict]:
    cfg = igpo.Config(**{**igpo.DEMO, "group": 4})
    model, tokenizer = igpo.load_model(cfg)
    questions = load_questions(igpo.locate("demo/dev.jsonl"))[: args.limit]
    search, draw = open_search(f"bm25:{igpo.locate('demo/corpus.jsonl')}"), random.Random(0)
    torch.manual_seed(0)
    rollouts = igpo.rollout(model, tokenizer, questions, search, cfg)
    pool, rows = [p for r in rollouts for found in r.retrieved for p in found], []
    for q, r in zip(tqdm([q for q in questions for _ in range(cfg.group)]), rollouts):
        shown = r.retrieved[: len(r.boundaries) - 1]
        rows += measure(igpo.unwrap(model), tokenizer, q, r, shown, pool, draw, cfg)
    return rows

def of_data(args) -> list[dict]:
    cfg = igpo.Config(model=args.model, gradient_checkpointing=False)
    corpus = igpo.locate(f"{args.data}/corpus.jsonl")
    model, tokenizer = igpo.load_model(cfg)
    search, draw, rows = open_search(f"bm25:{corpus}"), random.Random(0), []
    asked = teachable(load_questions(igpo.locate(args.questions or f"{args.data}/dev.jsonl")), corpus)
    asked = [(q, some) for q, some in asked if len(some) == 2 and not yes_or_no(q)][: args.limit]
    pool = [p for _, some in asked for p in some]
    for q, (one, two) in tqdm(asked):
        best = [p for p in search.search(q["question"], 8) if p.id not in (one.id, two.id)][:2]
        q = {**q, "supporting": [one.id, two.id, one.title, two.title]}
        for path in ([one, two], [two, one], best):
            r = rollout_of(tokenizer, q["question"], path, cfg)
            rows += measure(igpo.unwrap(model), tokenizer, q, r, [[p] for p in path], pool, draw, cfg)
    return rows

def auc(right: np.ndarray, wrong: np.ndarray) -> float:
    """How often a right one is above a wrong one, ties counting half.

    >>> auc(np.array([2.0, 1.0]), np.array([0.0, 1.0]))
    0.875
    """
    order = np.sort(wrong)
    above = (np.searchsorted(order, right, "left") + np.searchsorted(order, right, "right")) / 2
    return float(above.mean() / len(wrong)) if len(right) and len(wrong) else math.nan

def auc_table(rows: list[dict], draws: int = 500) -> list[str]:
    """A line for each reward; "-" where there is no search of that kind."""
    number = {name: i for i, name in enumerate(sorted({r["id"] for r in rows}))}
    ids, right = np.array([number[r["id"]] for r in rows]), np.array([r["right"] for r in rows])
    columns = [(right & [takes(r) for r in rows], ~right & [against(r) for r in rows])
               for takes, against in COLUMNS.values()]
    size, rng = len(number), np.random.default_rng(0)
    weights = [np.bincount(rng.integers(size, size=size), minlength=size) for _ in range(draws)]
    lines = [["right, wrong searches", *(f"{yes.sum()}, {no.sum()}" for yes, no in columns)]]
    for name, reward in REWARDS.items():
        values, cells = np.array([reward(r) for r in rows]), []
        for both in columns:
            drawn = [auc(*(np.repeat(values[one], w[ids[one]]) for one in both)) for w in weights]
            some = [value for value in drawn if not math.isnan(value)] or [math.nan]
            low, high = np.percentile(some, [2.5, 97.5])
            cells.append(f"{auc(*(values[one] for one in both)):.2f} [{low:.2f}, {high:.2f}]")
        lines.append([name, *(cell if "nan" not in cell else "-" for cell in cells)])
    return table(["reward", *COLUMNS], lines)

def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="", help="as for igpo.py; empty: the demo")
    parser.add_argument("--data", default="", help="folder of dev.jsonl and corpus.jsonl")
    parser.add_argument("--questions", default="", help="questions, if not <data>/dev.jsonl")
    parser.add_argument("--limit", type=int, help="only the first so many questions")
    parser.add_argument("--out", type=Path, default=HERE / "bridge", help="writes <out>.csv and <out>.md")
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    args = parser.parse_args()
    path = args.out.with_suffix(".csv")
    types = {"id": str, "right": "True".__eq__, "holds": "True".__eq__, "turn": int}
    if not args.tables:
        rows = of_data(args) if args.model else of_the_demo(args)
        name = Path(args.model).name or "the demo"
        about = f"# {commit()}, {machine()}; {name}, {len({r['id'] for r in rows})} questions"
        with open(path, "w", newline="", encoding="utf-8") as file:
            file.write(about + "\n")
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(map(rounded, rows))
    with open(path, newline="", encoding="utf-8") as file:
        about = file.readline()[2:].strip()
        rows = [{k: types.get(k, float)(v) for k, v in row.items()} for row in csv.DictReader(file)]
    lines = [
        "# Which signal finds the bridge?",
        "",
        f"{about}. What stands here is told at the top of benchmarks/bridge.py.",
        "",
        *auc_table(rows),
    ]
    args.out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))

if __name__ == "__main__":
    main()
