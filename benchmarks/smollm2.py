"""IGPO and GRPO train SmolLM2-135M-Instruct, a pretrained model, on the demo's 2-hop questions, on one CPU thread.

    python benchmarks/smollm2.py --warm_start BASE WARM               # BASE: a folder of SmolLM2-135M-Instruct; writes the folder WARM
    python benchmarks/smollm2.py --train WARM --folder RUNS                # stop and start it at will; more --steps go on
    python benchmarks/smollm2.py --tables --folder RUNS               # smollm2.jsonl, smollm2.md, ../docs/smollm2.png

Warm start.  As it comes, the model hardly ever keeps to the format at temperature 1. It is fine-tuned (LoRA, merged) on rollouts
scripted by demo/make.py in worlds other than the committed one: to keep the format, to read (the gold answer under the belief
probe at every boundary), and to search as poorly as HABITS say, so that something is left to learn. Its chat template
drops the system message, whose 280 tokens a policy that knows the format does not need.

Runs.  igpo against grpo with the same normalisation (--norm centre), so that gains are the only difference; a seed's questions
come in the same order. Both start from WARM with a fresh adapter.
"""
import argparse
import json
import math
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "demo"), str(HERE)]
import evidence  # noqa: E402
import igpo  # noqa: E402
import make  # noqa: E402
import torch  # noqa: E402
from benchmarks.report import read_run  # noqa: E402
from search_tool import BM25, Passage  # noqa: E402

make.LOOK_UP = "The {what}."       # the name follows in the query; every token counts on a CPU
make.MAX_TURNS = 3                 # two searches and the answer: just enough for two hops
HABITS = make.Habits(ship=0.4, right=0.4, named_first=0.8, done=0.95)
# Stages of the warm start: steps, learning rate, first world, rows of a step. page: the last one of the gold path, to read; gold: the
# whole of it, to read and to answer from, but not where to go; poor: a poor searcher's rollout, to read and to imitate.
STAGES = ((45, 1e-3, 1, ("page",) * 3 + ("poor",) * 3), (24, 7e-4, 101, ("page",) * 4 + ("gold",) * 2 + ("poor",)))
COMMON = dict(questions=2, group=4, max_turns=3, max_new_tokens=32, top_k=1, max_info_tokens=90, lr=5e-4, kl_coef=0.0, dtype="bfloat16",
              gradient_checkpointing=False, batch_tokens=2048, eval_every=15, eval_questions=24, show_every=5)


def two_hops(world: make.World, split: str, count: int) -> list[dict]:
    return [q for q in world.questions(split, count) if q["hops"] == 2]


def warm_row(tokenizer, kind: str, world, search, question: dict, rng: random.Random) -> tuple[dict, list[int]]:
    """(row for igpo.token_logps, kind of each of its targets), as in demo/make.py."""
    if kind == "page":
        return make.page_row(tokenizer, world, question, 1)
    rollout = make.scripted_rollout(tokenizer, world, search, question, rng, kind == "gold", HABITS)
    row, kinds = make.training_row(tokenizer, rollout, question["answers"][0], True)
    kept = [i for i, j in enumerate(row["targets"]) if kind == "poor" or kinds[i] == make.READER or rollout.turns[j] == len(rollout.queries)]
    return {**row, "targets": [row["targets"][i] for i in kept]}, [kinds[i] for i in kept]


def tune(base: str, out: Path, steps: int, lr: float, first_world: int, parts: tuple) -> None:
    """One stage: an adapter on base is trained and merged."""
    cfg = igpo.Config(**{**COMMON, "model": base, "lora_rank": 32, "lora_alpha": 64})
    model, tokenizer = igpo.load_model(cfg)
    tokenizer.chat_template = make.CHAT_TEMPLATE
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 5, 1.1 - i / steps))
    rng, start = random.Random("warm start"), time.time()
    for step in range(steps):
        if step % 20 == 0:
            world = make.World(first_world + step // 20)
            search, questions = BM25([Passage(**page) for page in world.pages]), iter(two_hops(world, "all", 60 * len(parts)))
        rows, kinds = zip(*[warm_row(tokenizer, part, world, search, next(questions), rng) for part in parts])
        counts, sums = torch.bincount(torch.tensor(sum(kinds, [])), minlength=2).clamp(min=1), torch.zeros(2)
        for batch in igpo.by_tokens([len(row["ids"]) for row in rows], 1024):
            scores, kind = torch.cat(igpo.token_logps(igpo.unwrap(model), [rows[i] for i in batch], 1.0)), torch.tensor(sum([kinds[i] for i in batch], []))
            losses = torch.stack([-scores[kind == k].sum() for k in (make.SEARCHER, make.READER)]) / counts
            losses.sum().backward()
            sums += losses.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        print(f"step {step + 1:3}  nats a token: searcher {sums[0]:.3f}  reader {sums[1]:.3f}  {time.time() - start:.0f} s", flush=True)
    model.save_pretrained(out / "adapter")
    merged, _ = igpo.load_model(replace(cfg, dtype="float32"), adapter=str(out / "adapter"))
    merged.merge_and_unload().save_pretrained(out)
    tokenizer.save_pretrained(out)


def warm_start(base: str, out: Path) -> None:
    start = time.time()
    for number, stage in enumerate(STAGES, 1):
        folder = out if number == len(STAGES) else out / f"stage{number}"
        tune(base, folder, *stage)
        base = str(folder)
    minutes = round((time.time() - start) / 60, 1)
    (out / "warm_start.json").write_text(json.dumps({"minutes": minutes, **diagnose(out)}, indent=1) + "\n")
    print((out / "warm_start.json").read_text())


@torch.no_grad()
def diagnose(folder: Path, count: int = 10) -> dict:
    """What the warm start can do on dev questions of the committed world: belief on the gold path, F1, and its own searches' gains, in nats."""
    cfg, world, rng = igpo.Config(**{**COMMON, "model": str(folder)}), make.World(0), random.Random(0)
    model, tokenizer = igpo.load_model(cfg)
    search, questions = BM25([Passage(**page) for page in world.pages]), two_hops(world, "dev", make.SIZES["dev"])[:count]
    paths = [make.scripted_rollout(tokenizer, world, search, q, rng, True) for q in questions]
    _, on_path = igpo.score(model, tokenizer, paths, [q["answers"] for q in questions], cfg)
    greedy, rollouts = igpo.evaluate(model, tokenizer, questions, search, cfg), igpo.rollout(model, tokenizer, questions, search, cfg)
    asked, gains = [q for q in questions for _ in range(cfg.group)], {True: [], False: []}
    _, beliefs = igpo.score(model, tokenizer, rollouts, [q["answers"] for q in asked], cfg)
    for r, q, b in zip(rollouts, asked, beliefs):
        for t, gain in enumerate(igpo.info_gains(b)):
            met = {p.id for found in r.retrieved[:t] for p in found}
            gains[bool(({p.id for p in r.retrieved[t]} - met) & set(q["supporting"]))].append(gain)
    mean = lambda values: round(igpo.mean(values), 3)
    return {"questions": count, "rollouts": len(rollouts), "greedy_f1": round(greedy["eval_f1"], 3), "sampled_f1": mean(igpo.f1_score(r.answer, q["answers"]) for r, q in zip(rollouts, asked)),
            "format_kept": mean(r.stop in ("answer", "turns") for r in rollouts), "belief_on_gold_path": [mean(b[t] for b in on_path) for t in range(3)],
            "right_searches": len(gains[True]), "wrong_searches": len(gains[False]), "gain_right": mean(gains[True]), "gain_wrong": mean(gains[False])}


def test_f1(cfg: igpo.Config, folder: Path, adapter: str = "") -> float:
    """Greedy F1 on all 2-hop test questions, of a run or, with no adapter, of the warm start."""
    model, tokenizer = igpo.load_model(cfg, adapter)
    return igpo.evaluate(model, tokenizer, igpo.load_questions(str(folder / "dense-test.jsonl")), igpo.open_run_search(cfg), cfg)["eval_f1"]


def train(warm: str, folder: Path, seeds: list[int], steps: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    evidence.write_questions(folder)
    for seed in seeds:
        for credit in ("igpo", "grpo"):
            out = folder / f"{credit}-seed{seed}"
            if (out / "final.json").is_file() and json.loads((out / "final.json").read_text())["steps"] >= steps:
                continue
            cfg = igpo.Config(**{**COMMON, "credit": credit, "model": warm, "steps": steps, "seed": seed, "out": str(out), "resume": str(out) if (out / "checkpoint").is_dir() else "",
                                 "train": str(folder / "dense-train.jsonl"), "dev": str(folder / "dense-dev.jsonl")})
            igpo.train(cfg)
            if read_run(str(out))[1][-1]["step"] < steps:
                raise SystemExit(f"{out}: interrupted. The same command goes on from here.")
            final = {"setting": credit, "seed": seed, "steps": steps, "test_f1_before": test_f1(cfg, folder), "test_f1": test_f1(cfg, folder, str(out))}
            (out / "final.json").write_text(json.dumps(final) + "\n")


NAMES = {"igpo": "igpo", "grpo": "grpo, centred"}      # as evidence.py has it


# ---- what came out ---------------------------------------------------------------------------------------------------

def tables(folder: Path) -> None:
    outs = sorted((path.parent for path in folder.glob("*/final.json")), key=lambda out: (out.name[-1], out.name[:4] != "igpo"))
    lengths = {json.loads((out / "final.json").read_text())["steps"] for out in outs}
    if len(lengths) > 1:
        raise SystemExit(f"{folder}: its runs have {sorted(lengths)} steps. Let --train bring all to the same.")
    length, = lengths
    runs = [(*evidence.read(out, length), [row for row in read_run(str(out))[1] if row["step"] <= length]) for out in outs]
    (HERE / "smollm2.jsonl").write_text("".join(json.dumps({"setting": f["setting"], "seed": f["seed"], **row}) + "\n" for f, _, rows in runs for row in rows))
    config, steps = json.loads((outs[0] / "config.json").read_text()), [c["step"] for c in runs[0][1]]
    warm = json.loads((Path(config["model"]) / "warm_start.json").read_text())
    lines = ["# SmolLM2-135M-Instruct on the demo's 2-hop questions", "",
             "Made by `python benchmarks/smollm2.py`, which tells how. One thread of a CPU that ran other jobs too, no GPU. Gains are in nats per gold token; early and late: "
             f"the first and the last five steps. Runs: {', '.join(f'{key} {config[key]}' for key in list(COMMON)[:9])}, norm {config['norm']}, gain {config['gain']}, "
             f"LoRA rank {config['lora_rank']}, steps {config['steps']}. dev: 24 questions, test: 67.", "",
             f"Warm start: {warm['minutes']} minutes. On {warm['questions']} dev questions, each once greedily and {config['group']} times sampled: F1 {warm['greedy_f1']} and "
             f"{warm['sampled_f1']}, format kept by {warm['format_kept']:.0%}, belief on the gold path {', '.join(map(str, warm['belief_on_gold_path']))}, "
             f"gain of {warm['right_searches']} right searches {warm['gain_right']:+}, of {warm['wrong_searches']} wrong ones {warm['gain_wrong']:+}. "
             "The other F1 of the warm start below are of other questions.", "",
             f"| | {' | '.join(f'dev F1 at {s}' for s in steps)} | F1 of rollouts, first ten steps -> last ten | test F1 | turns | no signal (outcome -> with gains) |", "|---|" + "---:|" * (len(steps) + 4)]
    name = lambda f: f"| {NAMES[f['setting']]}, seed {f['seed']} | "
    for f, curve, rows in runs:
        first, last = (igpo.mean(row["outcome_f1"] for row in part) for part in (rows[1:11], rows[1:][-10:]))
        lines.append(name(f) + " | ".join(f"{c['dev_f1']:.3f}" for c in curve) + f" | {first:.3f} -> {last:.3f} | {f['test_f1_before']:.3f} -> {f['test_f1']:.3f} | {f['turns_start']:.1f} -> {f['turns_end']:.1f} "
                     f"| {f['no_signal_outcome']:.0%} -> {f['no_signal_igpo']:.0%} |")
    lines += ["", "| | gain of right / wrong searches, early | late | return of right / wrong searches, early | s a step | policy tokens | ratio farthest from 1 |", "|---|" + "---:|" * 6]
    for f, _, rows in runs:
        pair = lambda kind: " / ".join("%+.2f" % f.get(kind.format(which), math.nan) for which in ("right", "wrong"))
        lines.append(name(f) + f"{pair('gain_{}_early')} | {pair('gain_{}_late')} | {pair('return_{}_early')} | {f['seconds']:.0f} | {rows[-1]['tokens']:,} "
                     f"| {max((row['ratio_start'] for row in rows[1:]), key=lambda x: abs(x - 1)):.2f} |")
    (HERE / "smollm2.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    figure(runs, config)


def figure(runs: list[tuple[dict, list, list]], config: dict, width: int = 5) -> None:
    """Dev F1 as it is; what the few rollouts of a step say, as running means."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    panels = {"eval_f1": "dev F1, greedy", "outcome_f1": f"F1 of sampled rollouts, running mean of {width} steps", "belief_gain": f"belief gained by searches, running mean of {width} steps"}
    fig, axes = plt.subplots(1, 3, figsize=(13, 3.9), constrained_layout=True)
    for axis, (key, title) in zip(axes, panels.items()):
        for color, setting in (("C0", "igpo"), ("C1", "grpo")):
            seeds = []       # {step: value} of each run
            for rows in (rows for f, _, rows in runs if f["setting"] == setting):
                value = {row["step"]: row[key] for row in rows if key in row}
                seeds.append(value if key == "eval_f1" else {s: igpo.mean(value[s - i] for i in range(width)) for s in value if s - width + 1 in value})
                axis.plot(*zip(*seeds[-1].items()), color=color, linewidth=0.9, alpha=0.5)
            steps = sorted(set.intersection(*map(set, seeds)))
            axis.plot(steps, [igpo.mean(s[step] for s in seeds) for step in steps], color=color, linewidth=2.2, marker="o" if key == "eval_f1" else None, label=f"{NAMES[setting]} (thin: a seed)")
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(0, 1.02)
    axes[1].set_ylim(0, 1.02)
    axes[2].set_ylabel("nats per gold token")
    axes[0].legend(frameon=False, loc="lower right")
    fig.suptitle(f"SmolLM2-135M-Instruct, warm-started; 2-hop questions, {config['questions']} x {config['group']} rollouts a step; thick: mean of {len(runs) // 2} seeds", fontsize=10)
    fig.savefig(HERE.parent / "docs" / "smollm2.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warm_start", nargs=2, metavar=("BASE", "WARM"))
    parser.add_argument("--train", metavar="WARM")
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--folder", type=Path, default=HERE.parent / "runs" / "smollm2", help="of the runs")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.warm_start:
        warm_start(args.warm_start[0], Path(args.warm_start[1]))
    if args.train:
        train(args.train, args.folder, args.seeds, args.steps)
    if args.tables:
        tables(args.folder)


if __name__ == "__main__":
    main()
