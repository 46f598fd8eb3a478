"""Does information gain help, when, and against whom? Settings over several seeds, on the demo world.

    python -m benchmarks.evidence                    # all that can be run: days of one CPU thread
    python -m benchmarks.evidence --regimes mixed --settings igpo gigpo      # a part; stop and start at will
    python -m benchmarks.evidence --tables           # CSVs, figure, evidence.md from the runs in --folder
    python -m benchmarks.evidence --tables --keep    # .. and from the rows of the CSVs, for runs that are not

Three regimes, from the same warm start: *dense*, 2-hop questions, which it now and then answers; *sparse*,
4-hop questions, where at first the F1 of nearly all groups agree; *mixed*, the demo as it is, 2 to 4 hops.
All settings of a regime share questions, rollouts per question, updates and the seeds' data order. dev and
test questions are of ships that no training question names.

Written: evidence_curves.csv (a row per evaluation), evidence_final.csv (a row per run, with the commit of its
code), evidence.md and ../docs/evidence.png. evidence_costs.csv is of commit e026da0.
"""
import argparse
import contextlib
import csv
import json
import math
import os
import shutil
import statistics
import sys
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from matplotlib.ticker import MaxNLocator

import igpo
from benchmarks.common import EARLIER, HERE, ROOT, commit, figure, rounded, searches, table
from search_tool import load_questions, open_search
from tools.comparators import CREDITS
from tools.metrics import read_jsonl

HOPS = {"dense": (2,), "sparse": (4,), "mixed": (2, 3, 4)}
STEPS = {"dense": 20, "sparse": 40, "mixed": 30}
COMMON = dict(questions=8, group=8, eval_every=5)
CREDITS = {**CREDITS, "reasonrag": partial(CREDITS["reasonrag"], mc_rollouts=1)}

MAIN = {        # z-scored: divided by the spread of the group, as GRPO is published; centred: not, as igpo
    "igpo": {"credit": "igpo"},
    "grpo, centred": {"credit": "dr-grpo"},
    "grpo, z-scored": {"credit": "grpo"},
    "grpo, z-scored, no penalty": {"credit": "grpo", "format_penalty": 0.0},
    "stepsearch": {"credit": "stepsearch"},
    "reasonrag": {"credit": "reasonrag"},
    "gigpo": {"credit": "gigpo"},
    "igpo v2": {"credit": "igpo-v2"},
}
OTHERS = {
    "igpo v1": {"credit": "igpo-v1"},
    "gains only": {"credit": "ig"},
    "igpo, no penalty": {"credit": "igpo", "format_penalty": 0.0},
    "grpo, centred, no penalty": {"credit": "dr-grpo", "format_penalty": 0.0},
    "igpo, no penalty, G 4": {"credit": "igpo", "format_penalty": 0.0, "group": 4},
    "grpo, centred, no penalty, G 4": {"credit": "dr-grpo", "format_penalty": 0.0, "group": 4},
    "grpo, z-scored, no penalty, G 4": {"credit": "grpo", "format_penalty": 0.0, "group": 4},
    **{name: {"credit": name} for name in CREDITS if name not in MAIN},
}
RUN = {**MAIN, **OTHERS}        # the settings that can be run
# What can be run no more has its options of then in evidence_final.csv.
ABLATION = ("igpo", "grpo, centred", "igpo v2", "igpo v1", "gains only", "prob, turn", "prob, separate",
            "prob, scale", "logprob, centre", "logprob, turn", "logprob, scale", "stepsearch, turn",
            "reference's belief", "gamma 0.9", "gamma 0.5", "curriculum")
NO_PENALTY = [(f"igpo, no penalty{g}", f"grpo, {form}, no penalty{g}")
              for g in ("", ", G 4") for form in ("centred", "z-scored")]
PAIRS = [*(("igpo", other) for other in MAIN if other != "igpo"), ("gains only", "grpo, centred"),
         ("stepsearch", "grpo, centred"), ("prob, turn", "grpo, z-scored"),
         ("prob, turn", "grpo, z-scored, no penalty"), *NO_PENALTY]
CHOSEN_ON = {"sparse": (0,), "mixed": (0, 1, 2, 3, 4)}      # seeds that had a part in the choice of igpo

# ---- the runs --------------------------------------------------------------------------------------------
def write_questions(folder: Path) -> None:
    """The demo's questions by regime; of one hop count about 700 to train on, 67 dev and 67 test."""
    for regime, hops in HOPS.items():
        for split in ("train", "dev", "test"):
            lines = (ROOT / f"demo/{split}.jsonl").read_text(encoding="utf-8").splitlines(True)
            text = "".join(line for line in lines if json.loads(line)["hops"] in hops)
            path = folder / f"{regime}-{split}.jsonl"
            if path.exists() and path.read_text(encoding="utf-8") != text:
                raise SystemExit(f"{path} has other questions. Take another --folder.")
            path.write_text(text, encoding="utf-8")

def config(folder: Path, regime: str, setting: str, seed: int) -> igpo.Config:
    name = "".join(c if c.isalnum() else "_" for c in setting)
    return igpo.Config(**{**igpo.DEMO, **COMMON, **RUN[setting], "steps": STEPS[regime], "seed": seed,
                          "out": f"{folder}/{regime}-{name}-seed{seed}",
                          "train": f"{folder}/{regime}-train.jsonl", "dev": f"{folder}/{regime}-dev.jsonl"})

def check_settings(cfg: igpo.Config) -> None:
    """SystemExit if there is a run that was started with other settings: half of each would be neither."""
    if (Path(cfg.out) / "config.json").exists():
        before, now = (asdict(replace(c, resume="")) for c in (igpo.read_config(cfg.out), cfg))
        if changed := [name for name in now if now[name] != before[name]]:
            was = ", ".join(f"{name} {before[name]}, now {now[name]}" for name in changed)
            raise SystemExit(f"{cfg.out} has other settings ({was}). Delete it, or take another --folder.")

@contextlib.contextmanager
def quietly():
    """Nothing is printed within."""
    with open(os.devnull, "w") as nothing:
        with contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
            yield

def run(job: tuple[Path, str, str, int]) -> str:
    """One run in a process of its own, and its F1 on the test questions. Goes on where it was stopped."""
    torch.set_num_threads(1)
    folder, regime, setting, seed = job
    cfg = config(*job)
    out = Path(cfg.out)
    check_settings(cfg)
    if (out / "final.json").is_file():
        return f"{out.name}: done before"
    if (out / "checkpoint" / "state.pt").is_file():
        cfg.resume = cfg.out
    elif out.is_dir():
        shutil.rmtree(out)      # stopped before the first step was saved
    with quietly():
        igpo.train(cfg, CREDITS.get(cfg.credit, igpo.recipe_credit))
        model, tokenizer = igpo.load_model(cfg, adapter=str(out / "checkpoint"))
        questions = load_questions(f"{folder}/{regime}-test.jsonl")
        test = igpo.evaluate(model, tokenizer, questions, open_search(f"bm25:{ROOT}/demo/corpus.jsonl"), cfg)
    final = {"regime": regime, "setting": setting, "seed": seed, "commit": commit(),
             "test_f1": test["eval_f1"], "test_em": test["eval_em"]}
    (out / "final.json").write_text(json.dumps(final) + "\n")
    return f"{out.name}: test F1 {test['eval_f1']:.3f}"

# ---- what came out ---------------------------------------------------------------------------------------
def read(out: Path, last: int) -> tuple[dict, list[dict]]:
    """(numbers of a run of `last` steps, its curve). No signal: all F1, or all outcomes, of a group agree."""
    final, rows = json.loads((out / "final.json").read_text()), read_jsonl(out / "metrics.jsonl")
    if rows[-1]["step"] != last:
        raise SystemExit(f"{out} ends at step {rows[-1]['step']}, not {last}. Delete it, and run it again.")
    curve = [{"step": row["step"], "dev_f1": row["eval_f1"]} for row in rows if "eval_f1" in row]
    pairs = zip(curve, curve[1:])
    area = sum((b["step"] - a["step"]) * (a["dev_f1"] + b["dev_f1"]) / 2 for a, b in pairs) / last
    gained, scores, steps = defaultdict(list), defaultdict(set), rows[1:]
    for r in read_jsonl(out / "rollouts.jsonl"):
        scores[r["step"], r["id"]].add(r["f1"])
        part = "early" if r["step"] <= 5 else "late" if r["step"] > last - 5 else None
        nats = igpo.info_gains(r["beliefs"], "logprob")         # whatever the recipe counts
        for (right, _), gain in zip(searches(r), nats if part else []):
            gained[f"gain_{'right' if right else 'wrong'}_{part}"].append(gain)
    agree = lambda until: igpo.mean(len(f1s) == 1 for (step, _), f1s in scores.items() if step <= until)
    mean = lambda key, some: igpo.mean(row[key] for row in some)
    return {**final, "dev_f1_start": curve[0]["dev_f1"], "dev_f1": curve[-1]["dev_f1"], "area": area,
            "no_signal_f1_early": agree(5), "no_signal_f1": agree(last),
            "no_signal_outcome": mean("no_signal_outcome", steps), "turns_start": steps[0]["turns"],
            "turns_end": mean("turns", steps[-5:]),
            **{key: igpo.mean(gains) for key, gains in gained.items()}}, curve

def show(values) -> str:
    """Mean and half width of its 95 % interval (Student's t), and the number of values unless it is five.

    The values themselves if there are fewer than three.
    """
    values = list(values)
    n = len(values)
    if n < 3:
        return ", ".join(f"{v:.3f}" for v in values)
    t = {3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}.get(n, 1.96 + 2.5 / (n - 1))
    half = t * statistics.stdev(values) / math.sqrt(n)
    return f"{statistics.mean(values):.3f} ± {half:.3f}" + ("" if n == 5 else f" ({n})")

def of(finals: list[dict], regime: str, setting: str) -> dict[int, dict]:
    """The runs of a setting in a regime, by seed."""
    return {f["seed"]: f for f in finals if (f["regime"], f["setting"]) == (regime, setting)}

def flags(setting: str, earlier: dict) -> str:
    """The setting as it is typed, or as it was."""
    if setting in RUN:
        return "`" + " ".join(f"--{k} {v}" for k, v in RUN[setting].items()) + "`"
    return f"earlier code: `{earlier.get(setting, '?')}`"

def hops_of(regime: str) -> str:
    return " to ".join(map(str, sorted({HOPS[regime][0], HOPS[regime][-1]}))) + " hops"

def by_regime(head: list[str], rows: list[tuple[list[str], dict]]) -> list[str]:
    """A table of rows (leading cells, {regime: (test F1, area)}); what holds no regime is left out."""
    regimes = [regime for regime in HOPS if any(regime in cells for _, cells in rows)]
    head = [*head, *(name for r in regimes for name in (f"{r}, {hops_of(r)}: test F1", "area"))]
    rows = [[*lead, *(cell for regime in regimes for cell in cells.get(regime, ("", "")))]
            for lead, cells in rows if cells]
    return table(head, rows, left=len(rows[0]) - 2 * len(regimes) if rows else 1)

def overview(finals: list[dict], settings, earlier: dict) -> list[str]:
    """A row a setting: its options, test F1 and the area under the dev curve, by regime."""
    rows = []
    for setting in settings:
        runs = {regime: list(fs.values()) for regime in HOPS if (fs := of(finals, regime, setting))}
        cells = {r: [show(f[key] for f in fs) for key in ("test_f1", "area")] for r, fs in runs.items()}
        rows.append(([setting, flags(setting, earlier)], cells))
    return by_regime(["setting", "options"], rows)

SHORT = ("igpo", "grpo, centred", "grpo, z-scored", "grpo, z-scored, no penalty", "igpo v2", "igpo v1",
         "dr-venus", "stepsearch")

def short(finals: list[dict]) -> list[str]:
    """The README's table: two regimes, and the value of --credit alone."""
    rows = []
    for setting in SHORT:
        cells = [[show(f[key] for f in of(finals, regime, setting).values()) for key in ("test_f1", "area")]
                 for regime in ("mixed", "sparse")]
        rows.append([setting, flags(setting, {}).replace("--credit ", ""), *sum(cells, [])])
    return table(["", "`--credit`", "mixed: test F1", "area", "sparse: test F1", "area"], rows, left=2)

RECENT = ("igpo", "igpo v2", "igpo v1", "grpo, centred", "grpo, z-scored", "dr-venus", "dr-venus-scaled",
          "a2tgpo", "dbelief", "random-baseline")

def newer(finals: list[dict]) -> list[str]:
    """A row a regime and recipe: F1, area, turns, and igpo less it on the same seeds."""
    rows = []
    for regime in ("mixed", "sparse"):
        ours = of(finals, regime, "igpo")
        for setting in RECENT:
            if runs := of(finals, regime, setting):
                of_all = lambda key: igpo.mean(f[key] for f in runs.values())
                apart = less(ours, runs) if setting != "igpo" else ["", ""]
                rows.append([regime, setting, len(runs), *(show(f[key] for f in runs.values())
                                                           for key in ("test_f1", "area")),
                             f"{of_all('turns_start'):.1f} -> {of_all('turns_end'):.1f}", *apart])
    head = ["seeds", "test F1", "area", "turns", "igpo − it: test F1", "area"]
    return table(["regime", "recipe", *head], rows, left=2)

def by_step(curves: list[dict]) -> list[str]:
    """Dev F1 of the default at some steps, a row a seed."""
    f1 = {(c["seed"], c["step"]): c["dev_f1"] for c in curves
          if (c["regime"], c["setting"]) == ("mixed", "igpo")}
    steps = [step for step in (0, 5, 10, 20, 30) if any(key[1] == step for key in f1)]
    rows = [[seed, *(f"{f1[seed, step]:.3f}" for step in steps)] for seed in sorted({key[0] for key in f1})]
    return table(["seed", *(f"step {step}" for step in steps)], rows)

def less(ours: dict[int, dict], theirs: dict[int, dict], but=()) -> list[str]:
    """[test F1, area] of the first less the second, of the seeds that both have and `but` has not."""
    both = sorted(set(ours) & set(theirs) - set(but))
    return [show(ours[seed][key] - theirs[seed][key] for seed in both) for key in ("test_f1", "area")]

def differences(finals: list[dict], pairs: list[tuple[str, str]], but: dict) -> list[str]:
    """A row a pair of settings: the first less the second, of the same seeds, without those of `but`."""
    rows = []
    for pair in pairs:
        cells = {r: less(*(of(finals, r, setting) for setting in pair), but.get(r, ())) for r in HOPS}
        rows.append(([f"{pair[0]} − {pair[1]}"], {r: both for r, both in cells.items() if any(both)}))
    return by_regime(["the first − the second"], rows)

def ablation(finals: list[dict], earlier: dict) -> list[str]:
    """A row a setting: the mixed regime, igpo less the setting of the same seeds, and the sparse one."""
    rows, ours = [], of(finals, "mixed", "igpo")
    for setting in ABLATION:
        mixed, sparse = of(finals, "mixed", setting), of(finals, "sparse", setting)
        own = [show(run[key] for run in mixed.values()) for key in ("test_f1", "area")]
        apart = less(ours, mixed) if setting != "igpo" else ["", ""]
        if mixed or sparse:
            scarce = show(f["test_f1"] for f in sparse.values())
            rows.append([setting, flags(setting, earlier), *own, *apart, scarce])
    head = ["mixed: test F1", "area", "igpo − it: test F1", "area", "sparse: test F1"]
    return table(["setting", "options", *head], rows, left=2)

def details(regime: str, finals: list[dict]) -> list[str]:
    """What happened in the runs of a regime, a row a setting of three seeds or more."""
    rows = []
    for setting in dict.fromkeys(f["setting"] for f in finals):
        runs = list(of(finals, regime, setting).values())
        if len(runs) > 2:
            mean = lambda key: igpo.mean([f[key] for f in runs if key in f] or [math.nan])
            cells = [*(f"{mean(f'no_signal_{key}'):.0%}" for key in ("f1_early", "f1", "outcome")),
                     f"{mean('turns_start'):.1f} -> {mean('turns_end'):.1f}",
                     *(f"{mean(f'gain_right_{part}'):+.2f} / {mean(f'gain_wrong_{part}'):+.2f}"
                       for part in ("early", "late")), f"{mean('generated_tokens'):.0f}"]
            rows.append([setting, len(runs), show(f["dev_f1"] for f in runs),
                         *("-" if "nan" in cell else cell for cell in cells)])
    start = igpo.mean(f["dev_f1_start"] for f in finals if f["regime"] == regime)
    about = f"**{regime}** ({hops_of(regime)}, {STEPS[regime]} steps; dev F1 of the warm start {start:.3f})"
    head = ["setting", "seeds", "dev F1", "no signal: F1, early", "F1", "outcomes", "turns",
            "gain right / wrong, early", "late", "tokens"]
    return ["", about, "", *table(head, rows)] if rows else []

def cost_table() -> list[str]:
    """Seconds of a step by part, and as a multiple of igpo's in the same step of the same seed."""
    rows = {(row["setting"], row["seed"], row["step"]): row for row in read_csv("costs")}
    steps, found = sorted({key[1:] for key in rows}), []
    for setting in dict.fromkeys(key[0] for key in rows):
        mean = lambda key: igpo.mean(rows[setting, *step][key] for step in steps)
        times = igpo.mean(rows[setting, *step]["seconds"] / rows["igpo", *step]["seconds"] for step in steps)
        parts = [f"{mean(f'seconds_{part}'):.2f}" for part in ("rollout", "score", "credit", "update")]
        tokens = f"{mean('generated_tokens'):.0f}"
        found.append([setting, f"{mean('seconds'):.2f}", f"{times:.2f}", *parts, tokens])
    head = ["setting", "seconds", "times igpo's", "rollouts", "scoring", "step rewards", "update", "tokens"]
    return table(head, found)

HEAD = """# Does information gain help?

Made by `python -m benchmarks.evidence`. Every setting of a regime starts from the same policy. *Test F1* is
greedy, after the last step, on 67 (2 hops), 66 (4 hops) or 200 questions: one question is 0.015 or 0.005.
*Area* is the mean height of the dev F1 curve over training. ± is half a 95 % t interval over five seeds, or
as many as stand in brackets; it does not cover the choice of questions. ± 0.000 says that all seeds answered
equally many. One or two seeds are listed one by one: do not rank these. Where one seed fails and others
learn, ± is wider than the scale allows: look at the seeds in evidence_final.csv.

The questions of a split are of 30 ships, and the warm start's habit (to look a ship up by half of its name)
finds some of them by luck. So a policy that has learned nothing may score quite differently on dev and test,
and low figures of the two cannot be compared.

How *igpo* was chosen: gains in probability after seeds 0 to 4 of *logprob, turn* and *prob, turn* in the
mixed regime; that they are not divided, against *prob, turn* and *prob, scale*, by dev F1 of seed 0 of the
sparse and, without a run of *prob, scale*, the mixed one. *igpo v1* and *prob, separate* were run later.
Seeds 1 to 4 of the sparse regime and all of the dense one had no part in it. Seeds 5 to 9 of the mixed one
were run to check, after the others had been read.

*reasonrag* has one Monte-Carlo rollout per state. *gigpo* of commit e026da0 had `--gamma 0.95`, now 1."""
DETAILS = """## By regime

Settings of three seeds or more, means over seeds. *No signal*: groups in which all F1 agree, in the first
five steps and in all (of the runs whose rollouts were at hand), and in which all outcomes do, where a format
penalty alone makes a difference. *Turns*: in the first step and the last five. *Gain*: mean gain in nats of
right and wrong searches, in the first five and the last five steps: how well the belief tells them apart. A
right search finds a supporting page not seen before. *Tokens*: generated in a step, those of Monte-Carlo
rollouts included; they are not counted now."""

def tables(folder: Path, keep: bool) -> None:
    finals, curves = [], []
    for path in sorted(folder.glob("*/final.json")):
        about = json.loads(path.read_text())
        which = {key: about[key] for key in ("regime", "setting", "seed")}
        check_settings(config(folder, **which))
        final, curve = read(path.parent, STEPS[about["regime"]])
        finals.append(final)
        curves += [{**which, **row} for row in curve]
    key = lambda row: (row["regime"], row["setting"], row["seed"])
    there = set(map(key, finals))
    for name, rows in (("final", finals), ("curves", curves)) if keep else ():
        rows += [row for row in read_csv(name) if key(row) not in there]
    if not finals:
        raise SystemExit(f"{folder}: no finished run in it yet.")
    finals.sort(key=key)
    curves.sort(key=lambda row: (*key(row), row["step"]))
    write_csv("final", finals)
    write_csv("curves", curves)
    lines = text(read_csv("final"))         # as they were rounded there
    (HERE / "evidence.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    plot(curves)

def text(finals: list[dict]) -> list[str]:
    """The lines of evidence.md."""
    earlier = {f["setting"]: f["options"] for f in finals if "options" in f}
    code = ", ".join(f"{n} run{'s' * (n > 1)} by commit {name}" for name, n in Counter(f["commit"] for f in finals).items())
    rest = [s for s in [*OTHERS, *earlier] if s not in {*MAIN, *ABLATION}]
    chosen = [pair for pair in PAIRS if "igpo" in pair]
    return [
        HEAD, "", f"{code}. *Earlier code* stands before options that are no more; a + behind a commit: and changes.",
        "", "## The default, by seed", "", "Dev F1 of *igpo*, mixed.", "", *by_step(read_csv("curves")),
        "", "## In short", "", *short(finals), "", "## The main settings", "", *overview(finals, MAIN, earlier),
        "", "## Paired differences, of the same seeds", "", *differences(finals, PAIRS, {}),
        "", "Of seeds that had no part in the choice of *igpo*:", "", *differences(finals, chosen, CHOSEN_ON),
        "", "## The ablation", "", *ablation(finals, earlier),
        "", "## Recipes, old and new", "", *newer(finals),
        "", "## Other settings, most of them explorations", "", *overview(finals, rest, earlier),
        "", "## What a step cost", "",
        f"Commit {EARLIER}: means over 4 steps of the mixed regime, one setting after another on a machine",
        "that did nothing else, one thread. All play the same rollouts from the warm start.",
        "", *cost_table(),
        "", DETAILS, *(line for regime in HOPS for line in details(regime, finals))]

def write_csv(name: str, rows: list[dict]) -> None:
    with open(HERE / f"evidence_{name}.csv", "w", newline="", encoding="utf-8") as file:
        heads = list(dict.fromkeys(key for row in rows for key in row))
        writer = csv.DictWriter(file, heads, restval="", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(rounded(row))

TEXTS = {"regime": str, "setting": str, "commit": str, "options": str, "seed": int, "step": int}

def read_csv(name: str) -> list[dict]:
    """The rows, without their empty cells; none if there is no such file."""
    path = HERE / f"evidence_{name}.csv"
    with open(path if path.exists() else os.devnull, newline="", encoding="utf-8") as file:
        return [{key: TEXTS.get(key, float)(value) for key, value in row.items() if value}
                for row in csv.DictReader(file)]

PANELS = {"normalisation, format penalty":
          ("igpo", "grpo, centred", "grpo, z-scored", "grpo, z-scored, no penalty", "igpo v2"),
          "other rewards for turns": ("igpo", "stepsearch", "reasonrag", "gigpo"),
          "newer recipes": ("igpo", "dr-venus", "dr-venus-scaled", "a2tgpo", "dbelief", "random-baseline")}

def plot(curves: list[dict]) -> None:
    """Dev F1 by step. evidence.png: a row a regime, a column a question; curves.png: the README's two."""
    draw(curves, "evidence", [[(f"{regime}: {title}", regime, settings) for title, settings in PANELS.items()]
                              for regime in HOPS], (9.5, 10))
    settings = next(iter(PANELS.values()))
    draw(curves, "curves", [[(f"{regime}, {hops_of(regime)}", regime, settings)
                             for regime in ("mixed", "sparse")]], (9, 4))

def draw(curves: list[dict], name: str, panels: list[list], size: tuple[float, float]) -> None:
    """panels: rows of (title, regime, settings)."""
    with figure(ROOT / f"docs/{name}.png", len(panels), len(panels[0]), size, sharey=True) as (fig, axes):
        for axis, (title, regime, settings) in zip(axes.flat, sum(panels, [])):
            for i, setting in enumerate(settings):
                seeds, by_step = set(), defaultdict(list)
                for c in curves:
                    if (c["regime"], c["setting"]) == (regime, setting):
                        by_step[c["step"]].append(c["dev_f1"])
                        seeds.add(c["seed"])
                if not seeds:       # for the legend
                    axis.plot([], color=f"C{i}", marker="o", markersize=3, label=setting)
                    continue
                steps = sorted(by_step)
                values = [by_step[step] for step in steps]
                axis.plot(steps, list(map(statistics.mean, values)), color=f"C{i}", marker="o", markersize=3,
                          linestyle="-" if len(seeds) > 2 else "--", label=setting)
                axis.fill_between(steps, list(map(min, values)), list(map(max, values)), color=f"C{i}",
                                  alpha=0.12, linewidth=0)
            axis.set_title(title, loc="left", fontsize=11)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 5, 10]))
            axis.set_visible(sum(len(line.get_xdata()) > 0 for line in axis.lines) > 1)
        for axis in axes[-1]:
            axis.set_xlabel("step")
        for axis in axes[-1] if len(panels) > 1 else ():
            axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.18))
        if len(panels) == 1:
            fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        for axis in axes[:, 0]:
            axis.set_ylabel("dev F1 (greedy)")
        fig.suptitle("Line: mean over seeds, dashed if one or two; band: worst to best seed", fontsize=10)

def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--regimes", nargs="+", choices=HOPS, default=list(HOPS))
    parser.add_argument("--settings", nargs="+", choices=RUN, default=list(RUN))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once, one thread each")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "evidence")
    parser.add_argument("--tables", action="store_true", help="no runs: only read those that are there")
    parser.add_argument("--keep", action="store_true", help="rows of the CSVs stay, for runs not in --folder")
    args = parser.parse_args()
    if not args.tables:
        os.environ["OMP_NUM_THREADS"] = "1"
        args.folder.mkdir(parents=True, exist_ok=True)
        write_questions(args.folder)
        jobs = [(args.folder, regime, setting, seed)
                for seed in args.seeds for setting in args.settings for regime in args.regimes]
        with ProcessPoolExecutor(args.jobs) as pool:
            for i, line in enumerate(pool.map(run, jobs), 1):
                print(f"{i}/{len(jobs)}  {line}", flush=True)
    tables(args.folder, args.keep)

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")           # ± on a terminal that does not know it
    main()
