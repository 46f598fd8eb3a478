"""Does information gain help, when, and against whom?  Every setting below over several seeds, on the demo world.

    python benchmarks/evidence.py                                        # all of it: hours
    python benchmarks/evidence.py --regimes mixed --settings igpo grpo   # a part; stop and start it at will, finished runs are kept
    python benchmarks/evidence.py --tables                               # CSVs, figure and tables from the runs that are there
    python benchmarks/evidence.py --tables --keep                            # .. and from the rows of the CSVs, for runs that are not

Three regimes, from the same warm start: *dense*, 2-hop questions, which the warm start now and then answers; *sparse*, 4-hop
questions, where the outcomes of most groups agree; *mixed*, the demo as it is, 2 to 4 hops. All settings of a regime share
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
MAIN = {
    "igpo": {},
    "outcome only": {"credit": "grpo"},       # undivided, as igpo has it
    "grpo": {"credit": "grpo", "norm": "separate"},
    "grpo, no format penalty": {"credit": "grpo", "norm": "separate", "format_penalty": 0.0},
    "igpo v2 (paper)": {"gain": "logprob", "norm": "separate"},
    "stepsearch": {"credit": "stepsearch"},
    "reasonrag": {"credit": "reasonrag", "mc_rollouts": 1},
    "gigpo": {"credit": "gigpo", "gamma": 0.95},
}
ABLATION = {
    "gains only": {"credit": "ig"},
    "prob, turn": {"norm": "turn"},
    "prob, joint (v1)": {"norm": "joint"},
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
    "igpo, no format penalty": {"format_penalty": 0.0},
    "prob, turn, no format penalty": {"norm": "turn", "format_penalty": 0.0},
    "igpo, format penalty -2": {"format_penalty": -2.0},
    "outcome only, no format penalty": {"credit": "grpo", "format_penalty": 0.0},
    "igpo, no penalty, groups of 4": {"format_penalty": 0.0, "group": 4},
    "outcome only, no penalty, groups of 4": {"credit": "grpo", "format_penalty": 0.0, "group": 4},
    "grpo, no penalty, groups of 4": {"credit": "grpo", "norm": "separate", "format_penalty": 0.0, "group": 4},
}
SETTINGS = {**MAIN, **ABLATION, **LEVERS}
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
    torch.set_num_threads(1)
    out = Path(folder) / f"{regime}-{''.join(c if c.isalnum() else '_' for c in setting)}-seed{seed}"
    if (out / "final.json").is_file():
        return f"{out.name}: done before"
    cfg = igpo.Config(**{**igpo.DEMO, **COMMON, **options, "steps": STEPS[regime], "seed": seed, "out": str(out),
                         "train": f"{folder}/{regime}-train.jsonl", "dev": f"{folder}/{regime}-dev.jsonl"})
    if out.exists():
        import shutil
        shutil.rmtree(out)
    with open(os.devnull, "w") as nothing:
        sys.stdout, sys.stderr, screen = nothing, nothing, (sys.stdout, sys.stderr)
        try:
            igpo.train(cfg)
            model, tokenizer = igpo.load_model(cfg, adapter=str(out))
        finally:
            sys.stdout, sys.stderr = screen
    test = igpo.evaluate(model, tokenizer, igpo.load_questions(f"{folder}/{regime}-test.jsonl"), igpo.open_run_search(cfg), cfg)
    (out / "final.json").write_text(json.dumps({"regime": regime, "setting": setting, "seed": seed, "test_f1": test["eval_f1"], "test_em": test["eval_em"]}) + "\n")
    return f"{out.name}: test F1 {test['eval_f1']:.3f}"


# ---- what came out ---------------------------------------------------------------------------------------------------

def read(out: Path) -> tuple[dict, list[dict]]:
    """(numbers of a finished run, its curve)."""
    final = json.loads((out / "final.json").read_text())
    rows = [json.loads(line) for line in open(out / "metrics.jsonl")]
    steps = rows[1:]
    tokens, curve = 0, []
    for row in rows:
        tokens += row.get("policy_tokens", 0)
        if "eval_f1" in row:
            curve.append({"step": row["step"], "policy_tokens": tokens, "dev_f1": row["eval_f1"], "turns": row["eval_turns"]})
    mean = lambda key, some=steps: statistics.mean(row[key] for row in some)
    area = sum((b["step"] - a["step"]) * (a["dev_f1"] + b["dev_f1"]) / 2 for a, b in zip(curve, curve[1:])) / curve[-1]["step"]
    from igpo import info_gains
    earned = defaultdict(list)            # what right and wrong searches gained and were credited with (Eq. 6), early and late in the run
    for line in open(out / "rollouts.jsonl"):
        r = json.loads(line)
        part = "early" if r["step"] <= 5 else "late" if r["step"] > len(steps) - 5 else None
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
            "no_signal_outcome": mean("no_signal_outcome"), "no_signal_igpo": mean("no_signal_igpo"), "seconds": mean("seconds"),
            "searches": mean("searches"), "generated_tokens": mean("generated_tokens"), "policy_tokens": mean("policy_tokens"),
            "score_share": mean("seconds_score") / mean("seconds"), "turns_start": steps[0]["turns"], "turns_end": mean("turns", steps[-5:]), **calibration}, curve


def show(values: list[float]) -> str:
    """Mean and half width of its 95 % interval (Student's t); the values themselves if there are fewer than three."""
    if len(values) < 3:
        return ", ".join(f"{v:.3f}" for v in values)
    t = {3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}[len(values)]
    return f"{statistics.mean(values):.3f} ± {t * statistics.stdev(values) / math.sqrt(len(values)):.3f}"


def summary(finals: list[dict]) -> list[str]:
    """The README's table: a row a setting, test F1 and area under the dev curve by regime."""
    lines = ["\n**All settings**: test F1 in the end and area under the curve of dev F1, mean over (seeds)\n",
             "| setting | options | " + " | ".join(f"{regime}: test F1 | area" for regime in HOPS) + " |", "|---|---|" + "---:|" * 2 * len(HOPS)]
    for setting, options in SETTINGS.items():
        cells = []
        for regime in HOPS:
            fs = [f for f in finals if (f["regime"], f["setting"]) == (regime, setting)]
            cells += [f"{statistics.mean(f['test_f1'] for f in fs):.3f} ({len(fs)})", f"{statistics.mean(f['area'] for f in fs):.3f}"] if fs else ["", ""]
        if any(cells):
            flags = " ".join(f"--{k}" if v is True else f"--{k} {v:g}" if isinstance(v, (int, float)) else f"--{k} {v}" for k, v in options.items())
            lines.append(f"| {setting} | {flags and f'`{flags}`'} | " + " | ".join(cells) + " |")
    return lines


def tables(folder: Path, keep: bool) -> None:
    finals, curves = [], []
    for path in folder.glob("*/final.json"):
        final, curve = read(path.parent)
        finals.append(final)
        curves += [{"regime": final["regime"], "setting": final["setting"], "seed": final["seed"], **row} for row in curve]
    which = lambda row: (row["regime"], row["setting"], int(row["seed"]))
    there = set(map(which, finals))
    for name, rows in (("final", finals), ("curves", curves)) if keep else ():
        with open(HERE / f"evidence_{name}.csv", newline="") as file:
            rows += [{k: v if k in ("regime", "setting") else int(v) if v.isdigit() else float(v) for k, v in row.items() if v}
                     for row in csv.DictReader(file) if which(row) not in there]
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
    lines = summary(finals)
    for title, settings in (("Credits", MAIN), ("Parts of IGPO", {"igpo": {}, "outcome only": {}, **ABLATION}), ("Levers", {"igpo": {}, "grpo": {}, "grpo, no format penalty": {}, **LEVERS})):
        for regime, hops in HOPS.items():
            those = [f for f in finals if f["regime"] == regime and f["setting"] in settings]
            if not {f["setting"] for f in those} & {"Credits": set(MAIN) - {"igpo"}, "Parts of IGPO": set(ABLATION), "Levers": set(LEVERS)}[title]:
                continue
            best = max(statistics.mean(f["best"] for f in those if f["setting"] == s) for s in {f["setting"] for f in those})
            start = statistics.mean(f["dev_f1_start"] for f in those)
            lines += [f"\n**{title}, {regime}** ({' to '.join(map(str, sorted({hops[0], hops[-1]})))} hops, {STEPS[regime]} steps; warm start: dev F1 {start:.3f})\n",
                      "| setting | seeds | test F1 | dev F1 | area | half of the best (steps, 1,000 tokens) | no signal (outcome -> IGPO) | turns | gain right / wrong, early | return right / wrong, early | s a step | searches | generated |",
                      "|---|---|---|---|---|---|---|---|---|---|---|---|---|"]
            for setting in settings:
                fs = [f for f in those if f["setting"] == setting]
                if not fs:
                    continue
                m = lambda key: statistics.mean([f[key] for f in fs if key in f] or [math.nan])      # few steps may hold no right search
                reached = []
                for f in fs:
                    own = [c for c in curves if (c["regime"], c["setting"], c["seed"]) == (regime, setting, f["seed"])]
                    reached.append(next(((c["step"], c["policy_tokens"] / 1000) for c in own if c["dev_f1"] >= best / 2), None))
                got = [r for r in reached if r] if best > 2 * start else []      # else no one learned anything to speak of
                half = (f"{statistics.mean(s for s, _ in got):.0f}, {statistics.mean(t for _, t in got):.0f}" + (f" ({len(got)} of {len(fs)})" if len(got) < len(fs) else "")) if got else "never"
                lines.append(f"| {setting} | {len(fs)} | {show([f['test_f1'] for f in fs])} | {show([f['dev_f1'] for f in fs])} | {m('area'):.3f} | {half} | {m('no_signal_outcome'):.0%} -> {m('no_signal_igpo'):.0%} "
                             f"| {m('turns_start'):.1f} -> {m('turns_end'):.1f} | {m('gain_right_early'):+.2f} / {m('gain_wrong_early'):+.2f} | {m('return_right_early'):+.2f} / {m('return_wrong_early'):+.2f} | {m('seconds'):.1f} | {m('searches'):.0f} | {m('generated_tokens'):.0f} |")
    for regime in HOPS:
        for other in ("outcome only", "grpo", "grpo, no format penalty", "prob, turn"):
            ours, theirs = ({f["seed"]: f for f in finals if f["regime"] == regime and f["setting"] == s} for s in ("igpo", other))
            if both := sorted(set(ours) & set(theirs)):
                apart = {key: show([ours[seed][key] - theirs[seed][key] for seed in both]) for key in ("test_f1", "area")}
                lines.append(f"\n{regime}, igpo less {other} of the same seed: test F1 {apart['test_f1']}, area {apart['area']}")
    (HERE / "evidence.md").write_text("Made by `python benchmarks/evidence.py`; ± is a 95 % interval over seeds, and fewer than three seeds stand one by one. Gains are in nats.\n" + "\n".join(lines) + "\n")
    print((HERE / "evidence.md").read_text())
    figure(curves)


def figure(curves: list[dict]) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 3, figsize=(14, 4), sharey=True)
    drawn = {}
    for axis, (regime, hops) in zip(axes, HOPS.items()):
        for i, setting in enumerate(MAIN):
            by_step = defaultdict(list)
            for c in curves:
                if c["regime"] == regime and c["setting"] == setting:
                    by_step[c["step"]].append(c["dev_f1"])
            if by_step:
                steps = sorted(by_step)
                middle = [statistics.mean(by_step[s]) for s in steps]
                drawn[setting], = axis.plot(steps, middle, color=f"C{i}")
                axis.fill_between(steps, [min(by_step[s]) for s in steps], [max(by_step[s]) for s in steps], color=f"C{i}", alpha=0.12)
        axis.set(title=f"{regime}: {' to '.join(map(str, sorted({hops[0], hops[-1]})))} hops", xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("dev F1 (greedy)")
    axes[0].legend(drawn.values(), drawn, frameon=False)
    fig.suptitle("Mean over seeds; the band is from the worst seed to the best", fontsize=10)
    fig.tight_layout()
    (HERE.parent / "docs").mkdir(exist_ok=True)
    fig.savefig(HERE.parent / "docs" / "evidence.png", dpi=130)


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
