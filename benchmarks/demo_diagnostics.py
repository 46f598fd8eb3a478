"""Is the demo's policy a calibrated reader and a poor searcher, as demo/make.py wants it?

    python -m benchmarks.demo_diagnostics        # writes demo/diagnostics.json: a minute of one CPU thread

gold_path    by hops: mean belief (log-prob per gold token) at b_0 .. b_hops of rollouts that follow the chain
wrong_path   by hops: the same where every page read is of an entity off the chain
gains        of the policy's own sampled rollouts, by turn: how many searches, the share of right ones, and
             the mean gain, of all, of right and of wrong ones, in probability and in log-probability
f1           by hops: F1 and exact match of sampled and of greedy rollouts, and turns
guess        what it scores when it must answer at once
stop         why sampled rollouts ended

The committed file is of commit e026da0. The paths and the greedy figures come out the same today. The sampled
ones are of other draws: F1 0.046 in place of 0.031.
"""
import argparse
import json
import random
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import torch

import igpo
from benchmarks.common import ROOT, searches
from demo import make
from search_tool import Passage, Results

def rounded(values) -> float | None:
    values = list(values)
    return round(igpo.mean(values), 4) if values else None

class OffTheChain:
    """A search that finds nothing but pages off a chain."""
    def __init__(self, world: make.World, search, chain: list[str], rng: random.Random):
        self.world, self.inner, self.chain, self.rng = world, search, chain, rng

    def search(self, query: str, k: int) -> Results:
        found = list(self.inner.search(query, 10))
        found += [Passage(**page) for page in self.rng.sample(self.world.pages, 20)]
        return Results([next(p for p in found if p.title not in self.chain)])

def diagnose(model: str, questions: list[dict], world: make.World, samples: int = 4) -> dict:
    """Every number comes from igpo.py's own rollout() and score(). The fresh adapter changes nothing."""
    cfg = igpo.Config(**{**igpo.DEMO, "model": model, "group": samples})
    lm, tokenizer = igpo.load_model(cfg)
    torch.manual_seed(0)
    search, rng, out = world.search(), random.Random("diagnose"), {"gold_path": {}, "wrong_path": {}}
    for hops in (2, 3, 4):
        some = [q for q in questions if q["hops"] == hops]
        path = lambda q, search, follow: make.scripted_rollout(tokenizer, world, search, q, rng, follow)
        gold = [path(q, search, True) for q in some]
        wrong = [path(q, OffTheChain(world, search, q["chain"], rng), False) for q in some]
        for name, rollouts in (("gold_path", gold), ("wrong_path", wrong)):
            _, beliefs = igpo.score(lm, tokenizer, rollouts, [q["answers"] for q in some], cfg)
            out[name][hops] = [rounded(b[t] for b in beliefs if len(b) > t) for t in range(hops + 1)]

    def play(**changes) -> list[dict]:
        """The records of rollouts under a changed configuration."""
        now = replace(cfg, **changes)
        rollouts = igpo.rollout(lm, tokenizer, questions, search, now)
        asked = [q for q in questions for _ in range(now.group)]
        _, beliefs = igpo.score(lm, tokenizer, rollouts, [q["answers"] for q in asked], now)
        return [igpo.record(tokenizer, r, q, b, 0.0, None, now) for r, q, b in zip(rollouts, asked, beliefs)]

    sampled = play()
    at_once, greedy = play(max_turns=1, group=1, temperature=0.0), play(group=1, temperature=0.0)
    by_turn = defaultdict(list)
    for r in sampled:
        gains = zip(igpo.info_gains(r["beliefs"], "prob"), igpo.info_gains(r["beliefs"], "logprob"))
        for turn, ((right, _), gain) in enumerate(zip(searches(r), gains), 1):
            by_turn[turn].append((right, *gain))
    out["gains"] = {turn: {
        "searches": len(rows), "right_share": rounded(right for right, _, _ in rows),
        **{f"{name}{part}": rounded(row[i] for row in rows if row[0] in kinds)
           for i, name in ((1, "prob"), (2, "logprob"))
           for part, kinds in (("", (True, False)), ("_right", (True,)), ("_wrong", (False,)))}}
        for turn, rows in sorted(by_turn.items())}
    out["f1"] = {}
    for hops in (2, 3, 4, "all"):
        own, best = ([r for r in rows if hops in ("all", r["hops"])] for rows in (sampled, greedy))
        out["f1"][hops] = {f"{head}{name}": rounded(r[key] for r in rows)
                           for head, key in (("", "f1"), ("em_", "em"))
                           for name, rows in (("sampled", own), ("greedy", best))}
        out["f1"][hops]["turns"] = rounded(len(r["turns"]) for r in own)
    usual = Counter(q["answers"][0] for q in questions).most_common(1)[0][1]
    out["guess"] = {"answered_at_once": rounded(r["stop"] == "answer" for r in at_once),
                    "em_at_once": rounded(r["em"] for r in at_once),
                    "most_common_answer": usual / len(questions)}
    out["stop"] = dict(Counter(r["stop"] for r in sampled))
    return out

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo/policy")
    parser.add_argument("--out", type=Path, default=ROOT / "demo" / "diagnostics.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    world = make.World(0)
    text = json.dumps(diagnose(args.model, world.questions("dev", make.SIZES["dev"]), world), indent=1)
    args.out.write_text(text + "\n", encoding="utf-8")
    print(text)

if __name__ == "__main__":
    main()
