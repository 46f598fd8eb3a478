"""Does information gain help, when, and against whom?  Every setting below over several seeds, on the demo world.

    python benchmarks/evidence.py                                        # all of it: days of one CPU thread
    python benchmarks/evidence.py --regimes mixed --settings igpo "grpo, centred"   # a part; stop and start it at will, it goes on
    python benchmarks/evidence.py --costs                                # what a step of each --credit costs: minutes, on a machine that does nothing else
    python benchmarks/evidence.py --tables                               # CSVs, figure and tables from the runs that are there
    python benchmarks/evidence.py --tables --keep                        # .. and from the rows of the CSVs, for runs that are not

Three regimes, from the same warm start: *dense*, 2-hop questions, which the warm start now and then answers; *sparse*, 4-hop
questions, where at first the F1 of nearly all groups agree; *mixed*, the demo as it is, 2 to 4 hops. All settings of a regime share
questions, rollouts per question, updates and the seeds' data order. dev and test questions are of ships that no training
question names.

Writes evidence_curves.csv (a row per evaluation), evidence_final.csv (a row per run), evidence_costs.csv (a row per step that was
timed), evidence.md and ../docs/evidence.png.
"""
import argparse
import contextlib
import csv
import json
import math
import os
import statistics
import sys
import tempfile
import unittest.mock
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

HOPS = {"dense": (2,), "sparse": (4,), "mixed": (2, 3, 4)}
STEPS = {"dense": 20, "sparse": 40, "mixed": 30}
MAIN = {      # z-scored: divided by the spread of the group, as GRPO is published; centred: not divided, as igpo
    "igpo": {},
    "grpo, centred": {"credit": "grpo"},
    "grpo, z-scored": {"credit": "grpo", "norm": "separate"},
    "grpo, z-scored, no penalty": {"credit": "grpo", "norm": "separate", "format_penalty": 0.0},
    "stepsearch": {"credit": "stepsearch"},
    "reasonrag": {"credit": "reasonrag", "mc_rollouts": 1},
    "gigpo": {"credit": "gigpo", "gamma": 0.95},
    "igpo v2": {"gain": "logprob", "norm": "separate"},
}
ABLATION = {
    "igpo v1": {"norm": "joint"},
    "gains only": {"credit": "ig"},
    "prob, turn": {"norm": "turn"},
    "prob, separate": {"norm": "separate"},
    "prob, scale": {"norm": "scale"},
    "logprob, centre": {"gain": "logprob"},
    "logprob, turn": {"gain": "logprob", "norm": "turn"},
    "logprob, scale": {"gain": "logprob", "norm": "scale"},
    "stepsearch, turn": {"credit": "stepsearch", "norm": "turn"},
    "reference's belief": {"belief": "reference"},
    "gamma 0.9": {"gamma": 0.9},
    "gamma 0.5": {"gamma": 0.5},
    "curriculum": {"curriculum": True},
}
LEVERS = {   # what might decide whether a dense signal pays: the penalty for a broken format, the size of a group; and what might keep v2 from shortening
    "igpo, no penalty": {"format_penalty": 0.0},
    "grpo, centred, no penalty": {"credit": "grpo", "format_penalty": 0.0},
    "gigpo, no penalty": {"credit": "gigpo", "gamma": 0.95, "format_penalty": 0.0},
    "igpo v2, no penalty": {**MAIN["igpo v2"], "format_penalty": 0.0},
    "prob, turn, no penalty": {"norm": "turn", "format_penalty": 0.0},
    "igpo, no penalty, G 4": {"format_penalty": 0.0, "group": 4},
    "grpo, centred, no penalty, G 4": {"credit": "grpo", "format_penalty": 0.0, "group": 4},
    "grpo, z-scored, no penalty, G 4": {"credit": "grpo", "norm": "separate", "format_penalty": 0.0, "group": 4},
    "igpo, penalty -2": {"format_penalty": -2.0},
    "igpo v2, penalty -2": {**MAIN["igpo v2"], "format_penalty": -2.0},      # from here: what the paper has and we do not, smaller steps, a stronger KL
    "igpo v2, 10 turns": {**MAIN["igpo v2"], "max_turns": 10},
    "igpo v2, 4 x 16": {**MAIN["igpo v2"], "questions": 4, "group": 16},
    "igpo v2, lr 1e-4": {**MAIN["igpo v2"], "lr": 1e-4},
    "igpo v2, KL 0.1": {**MAIN["igpo v2"], "kl_coef": 0.1},
}
SETTINGS = {**MAIN, **ABLATION, **LEVERS}
COSTS = ("igpo", "igpo without beliefs", "grpo, centred", "stepsearch", "reasonrag", "gigpo")      # a setting for each kind of turn reward
PAIRS = [*(("igpo", other) for other in MAIN if other != "igpo"), ("gains only", "grpo, centred"), ("stepsearch", "grpo, centred"),
         ("prob, turn", "grpo, z-scored"), ("prob, turn", "grpo, z-scored, no penalty"),      # gains with rewards that are divided by their spread
         *((f"igpo, no penalty{group}", f"grpo, {form}, no penalty{group}") for group in ("", ", G 4") for form in ("centred", "z-scored"))]
CHOSEN_ON = {"sparse": (0,), "mixed": (0, 1, 2, 3, 4)}      # seeds on which settings were compared before igpo was made the default
COMMON = dict(questions=8, group=8, eval_every=5, eval_questions=200, show_every=0)


def write_questions(folder: Path) -> None:
    """The demo's questions by regime; of one hop count there are about 700 to train on, 67 dev and 67 test."""
    for regime, hops in HOPS.items():
        for split in ("train", "dev", "test"):
            lines = (HERE.parent / f"demo/{split}.jsonl").read_text(encoding="utf-8").splitlines(True)
            (folder / f"{regime}-{split}.jsonl").write_text("".join(line for line in lines if json.loads(line)["hops"] in hops), encoding="utf-8")


@contextlib.contextmanager
def quietly():
    """Nothing is printed within."""
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        yield


def run(job: tuple[str, str, dict, int, str]) -> str:
    """One run in a process of its own, and its F1 on the test questions. Goes on where it was stopped."""
    regime, setting, options, seed, folder = job
    import torch
    import igpo
    from eval import read_jsonl
    torch.set_num_threads(1)
    out = Path(folder) / f"{regime}-{''.join(c if c.isalnum() else '_' for c in setting)}-seed{seed}"
    if (out / "final.json").is_file():
        return f"{out.name}: done before"
    cfg = igpo.Config(**{**igpo.DEMO, **COMMON, **options, "steps": STEPS[regime], "seed": seed, "out": str(out),
                         "train": f"{folder}/{regime}-train.jsonl", "dev": f"{folder}/{regime}-dev.jsonl", "resume": str(out) if (out / "checkpoint").is_dir() else ""})
    with quietly():
        igpo.train(cfg)
        model, tokenizer = igpo.load_model(cfg, adapter=str(out))
    if read_jsonl(out / "metrics.jsonl")[-1]["step"] < cfg.steps:
        raise SystemExit(f"{out}: interrupted. The same command goes on from here.")
    test = igpo.evaluate(model, tokenizer, igpo.load_questions(f"{folder}/{regime}-test.jsonl"), igpo.open_run_search(cfg), cfg)
    (out / "final.json").write_text(json.dumps({"regime": regime, "setting": setting, "seed": seed, "test_f1": test["eval_f1"], "test_em": test["eval_em"]}) + "\n")
    return f"{out.name}: test F1 {test['eval_f1']:.3f}"


def costs(seeds: list[int]) -> None:
    """Seconds of steps in the mixed regime, setting after setting, of the same rollouts (the learning rate is 0); the first step of a run warms up.

    *Without beliefs* only the old log-probs are computed, as PPO needs them: the rest is what the information gain costs.
    """
    import torch
    import igpo
    from eval import read_jsonl
    torch.set_num_threads(1)
    rows = []

    def no_beliefs(model, tokenizer, rollouts, golds, cfg):
        return igpo.forward_scores(model, tokenizer, rollouts, None, cfg)[0], [[0.0] * len(r.boundaries) for r in rollouts]
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            for setting in COSTS:
                out = Path(folder) / f"{setting}-{seed}"
                with quietly(), unittest.mock.patch.object(igpo, "score", no_beliefs if "without" in setting else igpo.score):
                    igpo.train(igpo.Config(**{**igpo.DEMO, **COMMON, **SETTINGS.get(setting, {}), "lr": 0.0, "steps": 3, "eval_every": 0, "seed": seed, "out": str(out)}))
                for row in read_jsonl(out / "metrics.jsonl")[1:]:
                    kept = ("policy_tokens", "generated_tokens", "searches", *(key for key in row if key.startswith("seconds")))
                    rows.append({"setting": setting, "seed": seed, "step": row["step"], **{key: row[key] for key in kept}})
                print(f"{setting}, seed {seed}: {rows[-1]['seconds']:.1f} s", flush=True)
    write_csv("costs", rows)


# ---- what came out ---------------------------------------------------------------------------------------------------

def read(out: Path, last: int) -> tuple[dict, list[dict]]:
    """(numbers of a run up to its step `last`, its curve)."""
    from eval import read_jsonl
    from igpo import info_gains
    final = json.loads((out / "final.json").read_text())
    rows = [row for row in read_jsonl(out / "metrics.jsonl") if row["step"] <= last]
    if rows[-1]["step"] != last:
        raise SystemExit(f"{out}: it ends at step {rows[-1]['step']}, not {last}. Delete its final.json and run it again.")
    steps = rows[1:]
    tokens, curve = 0, []
    for row in rows:
        tokens += row.get("generated_tokens", 0)
        if "eval_f1" in row:
            curve.append({"step": row["step"], "generated_tokens": tokens, "dev_f1": row["eval_f1"], "turns": row["eval_turns"]})
    mean = lambda key, some=steps: statistics.mean(row[key] for row in some)
    area = sum((b["step"] - a["step"]) * (a["dev_f1"] + b["dev_f1"]) / 2 for a, b in zip(curve, curve[1:])) / curve[-1]["step"]
    earned = defaultdict(list)            # what right and wrong searches gained and were credited with (Eq. 6), early and late in the run
    scores = defaultdict(set)             # F1 of a group, by step and question
    for r in read_jsonl(out / "rollouts.jsonl"):
        if r["step"] > last:
            break
        scores[r["step"], r["id"]].add(r["f1"])
        part = "early" if r["step"] <= 5 else "late" if r["step"] > last - 5 else None
        met = set()
        for turn, gain in zip(r["turns"], info_gains(r["beliefs"])):       # in nats, whatever --gain is
            new = {p["id"] for p in turn["passages"]} - met
            if part:
                kind = "right" if new & set(r["supporting"]) else "wrong"
                earned["gain", kind, part].append(gain)
                earned["return", kind, part].append(turn["return"])
            met |= new
    calibration = {"_".join(key): statistics.mean(values) for key, values in earned.items()}
    return {**final, "dev_f1_start": curve[0]["dev_f1"], "dev_f1": curve[-1]["dev_f1"], "best": max(c["dev_f1"] for c in curve), "area": area,
            "no_signal_f1": statistics.mean(len(f1s) == 1 for f1s in scores.values()),
            "no_signal_f1_early": statistics.mean(len(f1s) == 1 for (step, _), f1s in scores.items() if step <= 5), "no_signal_outcome": mean("no_signal_outcome"), "no_signal_igpo": mean("no_signal_igpo"), "seconds": mean("seconds"),
            "searches": mean("searches"), "generated_tokens": mean("generated_tokens"), "policy_tokens": mean("policy_tokens"),
            "score_share": mean("seconds_score") / mean("seconds"), "turns_start": steps[0]["turns"], "turns_end": mean("turns", steps[-5:]), **calibration}, curve


def show(values: list[float]) -> str:
    """Mean and half width of its 95 % interval (Student's t); the values themselves if there are fewer than three."""
    if len(values) < 3:
        return ", ".join(f"{v:.3f}" for v in values)
    n = len(values)
    t = {3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}.get(n, 1.96 + 2.5 / (n - 1))
    return f"{statistics.mean(values):.3f} ± {t * statistics.stdev(values) / math.sqrt(n):.3f}"


def counted(values) -> str:
    """show(), with the number of values in brackets unless it is the usual five or can be seen."""
    values = list(values)
    return show(values) + ("" if len(values) in (0, 1, 2, 5) else f" ({len(values)})")


HEAD = """# Does information gain help?

Made by `python benchmarks/evidence.py`. Every setting of a regime starts from the same policy. *Test F1*: greedy, after the last step, on 67
(2 hops), 66 (4 hops) or 200 questions; one question is 0.015 or 0.005. *Area*: the mean height of the dev F1 curve over training. ± is half a
95 % t interval over seeds (it does not cover the choice of questions; 0.000 says that all seeds answered equally many). One or two seeds are
listed one by one, more or fewer than five are counted in brackets. Settings with one or two seeds are explorations: do not rank them. Where one
seed fails and the others learn, ± is wider than the scale allows: look at the seeds.

The questions of a split are of 30 ships, and the warm start's habit (to look a ship up by half of its name) finds some of them by luck. So a
policy that has learned nothing may score quite differently on dev and test; low figures of the two cannot be compared.

How *igpo* was chosen: gains in probability after seeds 0 to 4 of *logprob, turn* and *prob, turn* in the mixed regime, `centre` against `turn` and
`scale` by dev F1 of seed 0 of the sparse and, without a run of `scale`, the mixed one; *igpo v1* and *prob, separate* were run later. Seeds 1 to 4 of
the sparse regime and all of the dense one had no part in it. Seeds 5 to 9 of the mixed one were run to check, after the others had been read (first 5 to 7, then two more).

By regime, means over seeds: *dev F1 x*: the first evaluation that reached half of the best dev F1, by step and by the tokens the policy
generated till then, those of Monte-Carlo rollouts included. *No signal*: groups in which all F1 agree, in the first five steps and in all
(of the runs whose rollouts were at hand: how many, if not all, stands in brackets); in which all outcomes do, where a format penalty alone makes a
difference; and which would teach nothing if gains were used, whatever the setting uses, where noise in a gain counts. *Turns*: in the first step
and the last five. *Right*: a search that found a supporting page not seen before; its mean gain in nats, in the first five and the last five
steps (the calibration of the belief), and its return (Eq. 6) in the first five. *Searches, generated tokens*: of a step. For seconds see
*What a step costs*: those of the runs are of one thread beside other jobs, and not comparable."""


def hops_of(regime: str) -> str:
    return " to ".join(map(str, sorted({HOPS[regime][0], HOPS[regime][-1]}))) + " hops"


def of(finals: list[dict], regime: str, setting: str) -> dict[int, dict]:
    """The runs of a setting in a regime, by seed."""
    return {f["seed"]: f for f in finals if (f["regime"], f["setting"]) == (regime, setting)}


def flags(setting: str) -> str:
    """The setting as it is typed after `python igpo.py`."""
    options = (f"--{k}" if v is True else f"--{k} {v:g}" if isinstance(v, (int, float)) else f"--{k} {v}" for k, v in SETTINGS[setting].items())
    return f"`{' '.join(options)}`" if SETTINGS[setting] else ""


def regime_table(heads: list[str], rows: list[tuple[list[str], dict]]) -> list[str]:
    """A table of rows (leading cells, {regime: (test F1, area)}); a row of no regime and a regime of no row are left out."""
    regimes = [regime for regime in HOPS if any(regime in cells for _, cells in rows)]
    lines = ["| " + " | ".join([*heads, *(f"{regime}, {hops_of(regime)}: test F1 | area" for regime in regimes)]) + " |",
             "|" + "---|" * len(heads) + "---:|" * 2 * len(regimes)]
    return lines + ["| " + " | ".join([*lead, *(cell for regime in regimes for cell in cells.get(regime, ("", "")))]) + " |" for lead, cells in rows if cells]


def overview(finals: list[dict], settings, cell) -> list[str]:
    """A row a setting: its options, and cell(key, runs) of test F1 and of the area under the dev curve, by regime."""
    rows = []
    for setting in settings:
        runs = {regime: list(fs.values()) for regime in HOPS if (fs := of(finals, regime, setting))}
        rows.append(([setting, flags(setting)], {regime: (cell("test_f1", fs), cell("area", fs)) for regime, fs in runs.items()}))
    return regime_table(["setting", "options"], rows)


def less(ours: dict[int, dict], theirs: dict[int, dict], but=()) -> tuple[str, str]:
    """(test F1, area) of the first less the second, by the seeds that both have and `but` has not; two empty cells if there are none."""
    both = sorted(set(ours) & set(theirs) - set(but))
    return tuple(counted(ours[seed][key] - theirs[seed][key] for seed in both) for key in ("test_f1", "area"))


def differences(finals: list[dict], pairs: list[tuple[str, str]], but: dict) -> list[str]:
    """A row a pair of settings: the first less the second, of the same seeds, without those of `but`, by regime."""
    rows = []
    for pair in pairs:
        cells = {regime: less(*(of(finals, regime, setting) for setting in pair), but.get(regime, ())) for regime in HOPS}
        cells = {regime: both for regime, both in cells.items() if any(both)}
        rows.append(([f"{pair[0]} − {pair[1]}"], cells))
    return regime_table(["the first − the second"], rows)


def ablation(finals: list[dict]) -> list[str]:
    """A row a setting: the mixed regime, also igpo less the setting on the same seeds, and test F1 in the sparse one."""
    lines = ["| setting | options | mixed: test F1 | area | igpo − it: test F1 | area | sparse: test F1 |", "|---|---|" + "---:|" * 5]
    ours = of(finals, "mixed", "igpo")
    for setting in ("igpo", "grpo, centred", "igpo v2", *ABLATION):
        mixed, sparse = of(finals, "mixed", setting), of(finals, "sparse", setting)
        own = [counted(run[key] for run in mixed.values()) for key in ("test_f1", "area")]
        apart = less(ours, mixed) if setting != "igpo" else ("", "")
        if mixed or sparse:
            lines.append("| " + " | ".join([setting, flags(setting), *own, *apart, counted(run["test_f1"] for run in sparse.values())]) + " |")
    return lines


def details(regime: str, finals: list[dict], curves: list[dict]) -> list[str]:
    """All figures of a regime, a row a setting."""
    by_setting = {s: list(fs.values()) for s in SETTINGS if (fs := of(finals, regime, s))}
    if not by_setting:
        return []
    half = max(statistics.mean(f["best"] for f in fs) for fs in by_setting.values()) / 2
    start = statistics.mean(f["dev_f1_start"] for fs in by_setting.values() for f in fs)
    lines = [f"\n**{regime}** ({hops_of(regime)}, {STEPS[regime]} steps; dev F1 of the warm start {start:.3f})\n",
             f"| setting | seeds | test F1 | dev F1 | area | dev F1 {half:.2f}: step, 1,000 tokens | no signal: F1 early, F1, outcomes, with gains | turns | gain right / wrong: early | late | return right / wrong | searches | generated |",
             "|---|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for setting, fs in by_setting.items():
        m = lambda key: statistics.mean([f[key] for f in fs if key in f] or [math.nan])      # few steps may hold no right search
        reached = []
        for f in fs:
            own = [c for c in curves if (c["regime"], c["setting"], c["seed"]) == (regime, setting, f["seed"])]
            reached += [(c["step"], c["generated_tokens"] / 1000) for c in own if c["dev_f1"] >= half > start][:1]
        when = (", ".join(f"{statistics.mean(x):.0f}" for x in zip(*reached)) + f" ({len(reached)} of {len(fs)})" * (len(reached) < len(fs))) if reached else "never"
        share = lambda key: "-" if math.isnan(m(key)) else f"{m(key):.0%}"
        known = [f for f in fs if "no_signal_f1" in f]
        pair = lambda what, part: f"{m(f'{what}_right_{part}'):+.2f} / {m(f'{what}_wrong_{part}'):+.2f}"
        lines.append(f"| {setting} | {len(fs)} | {show([f['test_f1'] for f in fs])} | {show([f['dev_f1'] for f in fs])} | {m('area'):.3f} | {when} "
                     f"| {', '.join(map(share, ('no_signal_f1_early', 'no_signal_f1')))}{f' ({len(known)})' * (0 < len(known) < len(fs))}, "
                     f"{share('no_signal_outcome')}, {share('no_signal_igpo')} | {m('turns_start'):.1f} -> {m('turns_end'):.1f} "
                     f"| {pair('gain', 'early')} | {pair('gain', 'late')} | {pair('return', 'early')} "
                     f"| {m('searches'):.0f} | {m('generated_tokens'):.0f} |")
    return lines


def cost_table() -> list[str]:
    """Seconds of a step by part, and as a multiple of igpo's in the same step of the same seed, from the least to the greatest."""
    rows = {(row["setting"], row["seed"], row["step"]): row for row in read_csv("costs")}
    if not rows:
        return ["Not measured yet: `python benchmarks/evidence.py --costs`."]
    steps = sorted({key[1:] for key in rows})
    seeds = " ".join(map(str, sorted({seed for seed, _ in steps})))
    lines = [f"`python benchmarks/evidence.py --costs --seeds {seeds}`: means over {len(steps)} steps of the mixed regime, one setting after another on a machine that did nothing else, one thread. All settings\n"
             "play the same rollouts from the warm start, and read beliefs, for the metrics, whether their credit uses them or not.\n",
             "| setting | seconds | times igpo's | rollouts | searches | scoring | step rewards | update | generated tokens | queries |", "|---|" + "---:|" * 9]
    for setting in COSTS:
        m = lambda key: statistics.mean(rows[setting, *step][key] for step in steps)
        times = [rows[setting, *step]["seconds"] / rows["igpo", *step]["seconds"] for step in steps]
        parts = " | ".join(f"{m(f'seconds_{part}'):.2f}" for part in ("rollout", "search", "score", "credit", "update"))
        lines.append(f"| {setting} | {m('seconds'):.2f} | {statistics.mean(times):.2f} ({min(times):.2f} to {max(times):.2f}) | {parts} | {m('generated_tokens'):.0f} | {m('searches'):.0f} |")
    return lines


def write_csv(name: str, rows: list[dict]) -> None:
    with open(HERE / f"evidence_{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def read_csv(name: str) -> list[dict]:
    """The rows, numbers as such; none if there is no such file."""
    path = HERE / f"evidence_{name}.csv"
    with open(path if path.exists() else os.devnull, newline="") as file:
        return [{k: v if k in ("regime", "setting") else int(v) if v.isdigit() else float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def tables(folder: Path, keep: bool) -> None:
    finals, curves = [], []
    for path in folder.glob("*/final.json"):
        final, curve = read(path.parent, STEPS[json.loads(path.read_text())["regime"]])
        finals.append(final)
        curves += [{"regime": final["regime"], "setting": final["setting"], "seed": final["seed"], **row} for row in curve]
    which = lambda row: (row["regime"], row["setting"], int(row["seed"]))
    there = set(map(which, finals))
    for name, rows in (("final", finals), ("curves", curves)) if keep else ():
        rows += [row for row in read_csv(name) if which(row) not in there]
    if unknown := {f["setting"] for f in finals} - set(SETTINGS):
        raise SystemExit(f"{folder}: runs of settings that this file does not know: {', '.join(sorted(unknown))}.")
    finals.sort(key=which)
    curves.sort(key=lambda row: (*which(row), row["step"]))
    if not finals:
        raise SystemExit(f"{folder}: no finished run in it yet.")
    write_csv("final", finals)
    write_csv("curves", curves)
    lines = [HEAD, "\n## The main settings\n", *overview(finals, MAIN, lambda key, fs: counted(f[key] for f in fs)),
             "\n## All settings, mean (seeds)\n", *overview(finals, SETTINGS, lambda key, fs: f"{statistics.mean(f[key] for f in fs):.3f} ({len(fs)})"),
             "\n## Paired differences, of the same seeds\n", *differences(finals, PAIRS, but={}),
             "\nThe same, of seeds that had no part in the choice of *igpo*:\n", *differences(finals, [pair for pair in PAIRS if "igpo" in pair], but=CHOSEN_ON),
             "\n## The ablation\n", *ablation(finals)]
    lines += ["\n## What a step costs\n", *cost_table(), "\n## Everything, by regime", *(line for regime in HOPS for line in details(regime, finals, curves))]
    (HERE / "evidence.md").write_text("\n".join(lines) + "\n")
    print((HERE / "evidence.md").read_text())
    figure(curves)


ROWS = {"normalisation and format penalty": ("igpo", "grpo, centred", "grpo, z-scored", "grpo, z-scored, no penalty", "igpo v2"),
        "other rewards for turns": ("igpo", "stepsearch", "reasonrag", "gigpo")}


def figure(curves: list[dict]) -> None:
    """Dev F1 by step: a column a regime, a row a question."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator
    fig, axes = plt.subplots(len(ROWS), len(HOPS), figsize=(13, 7), sharey=True, sharex="col", constrained_layout=True)
    for row, (title, settings) in zip(axes, ROWS.items()):
        drawn = {}
        for axis, regime in zip(row, HOPS):
            for setting in settings:
                seeds, by_step = set(), defaultdict(list)
                for c in curves:
                    if (c["regime"], c["setting"]) == (regime, setting):
                        by_step[c["step"]].append(c["dev_f1"])
                        seeds.add(c["seed"])
                if seeds:
                    steps, color = sorted(by_step), f"C{list(MAIN).index(setting)}"
                    line, = axis.plot(steps, [statistics.mean(by_step[s]) for s in steps], color=color, linestyle="-" if len(seeds) > 2 else "--", marker="o", markersize=3)
                    axis.fill_between(steps, [min(by_step[s]) for s in steps], [max(by_step[s]) for s in steps], color=color, alpha=0.12, linewidth=0)
                    drawn.setdefault(setting, line)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 5, 10]))
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(f"{title}\n\ndev F1 (greedy)")
        row[0].legend(drawn.values(), drawn, frameon=False, loc="lower right", fontsize=9)
    for axis, regime in zip(axes[0], HOPS):
        axis.set_title(f"{regime}: {hops_of(regime)}", loc="left")
    for axis in axes[-1]:
        axis.set_xlabel("step")
    fig.suptitle("Line: mean over seeds, dashed where there are one or two; band: from the worst seed to the best", fontsize=10)
    (HERE.parent / "docs").mkdir(exist_ok=True)
    fig.savefig(HERE.parent / "docs" / "evidence.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regimes", nargs="+", choices=HOPS, default=list(HOPS))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once, one thread each")
    parser.add_argument("--folder", type=Path, default=HERE.parent / "runs" / "evidence")
    parser.add_argument("--costs", action="store_true", help="no runs: time some steps of each --credit")
    parser.add_argument("--tables", action="store_true", help="no runs: only read those that are there")
    parser.add_argument("--keep", action="store_true", help="what the CSVs hold of runs that are not in --folder stays")
    args = parser.parse_args()
    if args.costs:
        return costs(args.seeds)
    if not args.tables:
        os.environ["OMP_NUM_THREADS"] = "1"
        args.folder.mkdir(parents=True, exist_ok=True)
        write_questions(args.folder)
        jobs = [(regime, setting, SETTINGS[setting], seed, str(args.folder))
                for seed in args.seeds for setting in args.settings for regime in args.regimes]
        with ProcessPoolExecutor(args.jobs) as pool:
            for i, line in enumerate(pool.map(run, jobs), 1):
                print(f"{i}/{len(jobs)}  {line}", flush=True)
    tables(args.folder, args.keep)


if __name__ == "__main__":
    main()
