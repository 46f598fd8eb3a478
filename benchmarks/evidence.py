"""Does information gain help, when, and against whom?  Every setting below over several seeds, on the demo world.

    python benchmarks/evidence.py                                        # all of it: hours
    python benchmarks/evidence.py --regimes mixed --settings igpo "grpo, centred"   # a part; stop and start it at will, it goes on
    python benchmarks/evidence.py --tables                               # CSVs, figure and tables from the runs that are there
    python benchmarks/evidence.py --tables --keep                        # .. and from the rows of the CSVs, for runs that are not

Three regimes, from the same warm start: *dense*, 2-hop questions, which the warm start now and then answers; *sparse*, 4-hop
questions, where at first the F1 of nearly all groups agree; *mixed*, the demo as it is, 2 to 4 hops. All settings of a regime share
questions, rollouts per question, updates and the seeds' data order. dev and test questions are of ships that no training
question names.

Writes evidence_curves.csv (a row per evaluation), evidence_final.csv (a row per run), evidence.md and ../docs/evidence.png.
"""
import argparse
import csv
import json
import math
import os
import statistics
import sys
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
LEVERS = {   # what might decide whether a dense signal pays: the penalty for a broken format, and the size of a group
    "igpo, no penalty": {"format_penalty": 0.0},
    "grpo, centred, no penalty": {"credit": "grpo", "format_penalty": 0.0},
    "gigpo, no penalty": {"credit": "gigpo", "gamma": 0.95, "format_penalty": 0.0},
    "igpo v2, no penalty": {"gain": "logprob", "norm": "separate", "format_penalty": 0.0},
    "prob, turn, no penalty": {"norm": "turn", "format_penalty": 0.0},
    "igpo, penalty -2": {"format_penalty": -2.0},
    "igpo, no penalty, G 4": {"format_penalty": 0.0, "group": 4},
    "grpo, centred, no penalty, G 4": {"credit": "grpo", "format_penalty": 0.0, "group": 4},
    "grpo, z-scored, no penalty, G 4": {"credit": "grpo", "norm": "separate", "format_penalty": 0.0, "group": 4},
}
SETTINGS = {**MAIN, **ABLATION, **LEVERS}
PAIRS = [*(("igpo", other) for other in [*MAIN, "prob, turn"] if other != "igpo"),
         *((f"igpo, no penalty{group}", f"grpo, {form}, no penalty{group}") for group in ("", ", G 4") for form in ("centred", "z-scored"))]
COMMON = dict(questions=8, group=8, eval_every=5, eval_questions=200, show_every=0)


def write_questions(folder: Path) -> None:
    """The demo's questions by regime; of one hop count there are about 700 to train on, 67 dev and 67 test."""
    for regime, hops in HOPS.items():
        for split in ("train", "dev", "test"):
            lines = (HERE.parent / f"demo/{split}.jsonl").read_text(encoding="utf-8").splitlines(True)
            (folder / f"{regime}-{split}.jsonl").write_text("".join(line for line in lines if json.loads(line)["hops"] in hops), encoding="utf-8")


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
    with open(os.devnull, "w") as nothing:
        sys.stdout, sys.stderr, screen = nothing, nothing, (sys.stdout, sys.stderr)
        try:
            igpo.train(cfg)
            model, tokenizer = igpo.load_model(cfg, adapter=str(out))
        finally:
            sys.stdout, sys.stderr = screen
    if read_jsonl(out / "metrics.jsonl")[-1]["step"] < cfg.steps:
        raise SystemExit(f"{out}: interrupted. The same command goes on from here.")
    test = igpo.evaluate(model, tokenizer, igpo.load_questions(f"{folder}/{regime}-test.jsonl"), igpo.open_run_search(cfg), cfg)
    (out / "final.json").write_text(json.dumps({"regime": regime, "setting": setting, "seed": seed, "test_f1": test["eval_f1"], "test_em": test["eval_em"]}) + "\n")
    return f"{out.name}: test F1 {test['eval_f1']:.3f}"


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
    scores = defaultdict(set)             # F1 of a group
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
            "no_signal_f1": statistics.mean(len(f1s) == 1 for f1s in scores.values()), "no_signal_outcome": mean("no_signal_outcome"), "no_signal_igpo": mean("no_signal_igpo"), "seconds": mean("seconds"),
            "searches": mean("searches"), "generated_tokens": mean("generated_tokens"), "policy_tokens": mean("policy_tokens"),
            "score_share": mean("seconds_score") / mean("seconds"), "turns_start": steps[0]["turns"], "turns_end": mean("turns", steps[-5:]), **calibration}, curve


def show(values: list[float]) -> str:
    """Mean and half width of its 95 % interval (Student's t); the values themselves if there are fewer than three."""
    if len(values) < 3:
        return ", ".join(f"{v:.3f}" for v in values)
    n = len(values)
    t = {3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}.get(n, 1.96 + 2.5 / (n - 1))
    return f"{statistics.mean(values):.3f} ± {t * statistics.stdev(values) / math.sqrt(n):.3f}"


HEAD = """# Does information gain help?

Made by `python benchmarks/evidence.py`. Every setting of a regime starts from the same policy. *Test F1*: greedy, after the last step, on 67
(2 hops), 66 (4 hops) or 200 questions; one question is 0.015 or 0.005. *Area*: the mean height of the dev F1 curve over training. ± is half a
95 % t interval over seeds (it does not cover the choice of questions; 0.000 says that all seeds answered equally many). One or two seeds are
listed one by one, more or fewer than five are counted in brackets. Settings with one or two seeds are explorations: do not rank them.

The normalisation of *igpo* was chosen by dev F1 of seed 0 of the sparse and the mixed regime; the last column of the paired differences
leaves that seed out.

By regime, means over seeds: *dev F1 x*: the first evaluation that reached half of the best dev F1, by step and by the tokens the policy
generated till then, those of Monte-Carlo rollouts included. *No signal*: groups in which all F1 agree (only of runs whose rollouts were at hand,
else -); in which all outcomes do, where a format penalty alone makes a difference; and which would teach nothing if gains were used, whatever
the setting uses, where noise in a gain counts. *Turns*: in the first step and the last five. *Right*: a search that found a supporting page
not seen before; its gain in nats and its return (Eq. 6), in the first five steps: the calibration of the belief. *Seconds, searches, generated
tokens*: of a step. Seconds are of one thread beside other jobs, more of them in some runs than in others: do not compare them."""


def hops_of(regime: str) -> str:
    return " to ".join(map(str, sorted({HOPS[regime][0], HOPS[regime][-1]}))) + " hops"


def overview(finals: list[dict], settings: dict, cell) -> list[str]:
    """A row a setting: its options, and cell(key, runs) of test F1 and of the area under the dev curve, by regime."""
    lines = ["| setting | options | " + " | ".join(f"{regime}, {hops_of(regime)}: test F1 | area" for regime in HOPS) + " |", "|---|---|" + "---:|" * 2 * len(HOPS)]
    for setting, options in settings.items():
        cells = []
        for regime in HOPS:
            fs = [f for f in finals if (f["regime"], f["setting"]) == (regime, setting)]
            cells += [cell("test_f1", fs), cell("area", fs)] if fs else ["", ""]
        if any(cells):
            flags = " ".join(f"--{k}" if v is True else f"--{k} {v:g}" if isinstance(v, (int, float)) else f"--{k} {v}" for k, v in options.items())
            lines.append(f"| {setting} | {flags and f'`{flags}`'} | " + " | ".join(cells) + " |")
    return lines


def details(regime: str, finals: list[dict], curves: list[dict]) -> list[str]:
    """All figures of a regime, a row a setting."""
    by_setting = {s: fs for s in SETTINGS if (fs := [f for f in finals if (f["regime"], f["setting"]) == (regime, s)])}
    if not by_setting:
        return []
    half = max(statistics.mean(f["best"] for f in fs) for fs in by_setting.values()) / 2
    start = statistics.mean(f["dev_f1_start"] for fs in by_setting.values() for f in fs)
    lines = [f"\n**{regime}** ({hops_of(regime)}, {STEPS[regime]} steps; dev F1 of the warm start {start:.3f})\n",
             f"| setting | seeds | test F1 | dev F1 | area | dev F1 {half:.2f}: step, 1,000 tokens | no signal: F1, outcomes, with gains | turns | gain right / wrong | return right / wrong | seconds | searches | generated |",
             "|---|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for setting, fs in by_setting.items():
        m = lambda key: statistics.mean([f[key] for f in fs if key in f] or [math.nan])      # few steps may hold no right search
        reached = []
        for f in fs:
            own = [c for c in curves if (c["regime"], c["setting"], c["seed"]) == (regime, setting, f["seed"])]
            reached += [(c["step"], c["generated_tokens"] / 1000) for c in own if c["dev_f1"] >= half > start][:1]
        when = (", ".join(f"{statistics.mean(x):.0f}" for x in zip(*reached)) + f" ({len(reached)} of {len(fs)})" * (len(reached) < len(fs))) if reached else "never"
        share = lambda key: "-" if math.isnan(m(key)) else f"{m(key):.0%}"
        pair = lambda what: f"{m(f'{what}_right_early'):+.2f} / {m(f'{what}_wrong_early'):+.2f}"
        lines.append(f"| {setting} | {len(fs)} | {show([f['test_f1'] for f in fs])} | {show([f['dev_f1'] for f in fs])} | {m('area'):.3f} | {when} "
                     f"| {', '.join(map(share, ('no_signal_f1', 'no_signal_outcome', 'no_signal_igpo')))} | {m('turns_start'):.1f} -> {m('turns_end'):.1f} | {pair('gain')} | {pair('return')} "
                     f"| {m('seconds'):.1f} | {m('searches'):.0f} | {m('generated_tokens'):.0f} |")
    return lines


def tables(folder: Path, keep: bool) -> None:
    finals, curves = [], []
    for path in folder.glob("*/final.json"):
        final, curve = read(path.parent, STEPS[json.loads(path.read_text())["regime"]])
        finals.append(final)
        curves += [{"regime": final["regime"], "setting": final["setting"], "seed": final["seed"], **row} for row in curve]
    which = lambda row: (row["regime"], row["setting"], int(row["seed"]))
    there = set(map(which, finals))
    for name, rows in (("final", finals), ("curves", curves)) if keep else ():
        with open(HERE / f"evidence_{name}.csv", newline="") as file:
            rows += [{k: v if k in ("regime", "setting") else int(v) if v.isdigit() else float(v) for k, v in row.items() if v}
                     for row in csv.DictReader(file) if which(row) not in there]
    if unknown := {f["setting"] for f in finals} - set(SETTINGS):
        raise SystemExit(f"{folder}: runs of settings that this file does not know: {', '.join(sorted(unknown))}.")
    finals.sort(key=which)
    curves.sort(key=lambda row: (*which(row), row["step"]))
    if not finals:
        raise SystemExit(f"{folder}: no finished run in it yet.")
    columns = list(dict.fromkeys(key for final in finals for key in final))
    for name, rows, keys in (("final", finals, columns), ("curves", curves, list(curves[0]))):
        with open(HERE / f"evidence_{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, keys, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    number = lambda fs: "" if len(fs) in (1, 2, 5) else f" ({len(fs)})"        # one and two show for themselves
    lines = [HEAD, "\n## The main settings\n", *overview(finals, MAIN, lambda key, fs: show([f[key] for f in fs]) + number(fs)),
             "\n## All settings, mean (seeds)\n", *overview(finals, SETTINGS, lambda key, fs: f"{statistics.mean(f[key] for f in fs):.3f} ({len(fs)})"),
             "\n## Paired differences: the first less the second, of the same seeds\n", "| regime | first | second | seeds | test F1 | area | area without seed 0 |", "|---|---|---|---|---|---|---|"]
    for regime in HOPS:
        for first, second in PAIRS:
            ours, theirs = ({f["seed"]: f for f in finals if f["regime"] == regime and f["setting"] == s} for s in (first, second))
            if both := sorted(set(ours) & set(theirs)):
                apart = lambda key, seeds: show([ours[seed][key] - theirs[seed][key] for seed in seeds])
                lines.append(f"| {regime} | {first} | {second} | {len(both)} | {apart('test_f1', both)} | {apart('area', both)} | {apart('area', [s for s in both if s])} |")
    lines += ["\n## Everything, by regime", *(line for regime in HOPS for line in details(regime, finals, curves))]
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
    parser.add_argument("--tables", action="store_true", help="no runs: only read those that are there")
    parser.add_argument("--keep", action="store_true", help="what the CSVs hold of runs that are not in --folder stays")
    args = parser.parse_args()
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
