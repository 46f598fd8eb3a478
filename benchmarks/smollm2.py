"""IGPO and outcome-only training of SmolLM2-135M-Instruct, a pretrained model, on the demo's 2-hop questions, on one CPU thread.

    python benchmarks/smollm2.py --warm_start BASE WARM      # BASE: folder of SmolLM2-135M-Instruct; writes the folder WARM
    python benchmarks/smollm2.py --train WARM --folder RUNS  # four runs, one after the other; goes on where it was stopped, and with more --steps
    python benchmarks/smollm2.py --tables --folder RUNS      # smollm2.jsonl, smollm2.md, ../docs/smollm2.png

Warm start.  As it comes, the model hardly ever keeps to the format at temperature 1. Supervised fine-tuning (LoRA, merged) on
scripted rollouts of demo/make.py, in worlds other than the committed one, teaches three things at once: the format, to read
(the gold answer under the belief probe at every boundary), and the habits of a poor searcher (HABITS), so that something
is left to learn. Its chat template drops the system message, whose 280 tokens a policy that knows the format does not need.

Runs.  Credits igpo and grpo with the same normalisation (--norm centre), so that gains are the only difference; the same budget,
questions and order of questions for a seed.
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
from eval import read_run  # noqa: E402
from search_tool import BM25, Passage  # noqa: E402

make.LOOK_UP = "The {what}."                # the name follows in the query; every token counts on a CPU
make.MAX_TURNS = 3                          # two searches and the answer: just enough for two hops
HABITS = make.Habits(ship=0.4, right=0.4, named_first=0.8, done=0.95)
# Stages of the warm start: steps, learning rate, first world, rows of a step. A page: the last one of the gold path, to read. Gold: that
# path whole, to read and to answer from, but not where to go. Poor: a poor searcher's rollout, to read and to imitate.
STAGES = ((45, 1e-3, 1, ("page",) * 3 + ("poor",) * 3), (24, 7e-4, 101, ("page",) * 4 + ("gold",) * 2 + ("poor",)))
SETTINGS = {"igpo": {"credit": "igpo"}, "grpo": {"credit": "grpo"}}
COMMON = dict(steps=60, questions=2, group=4, max_turns=3, max_new_tokens=32, top_k=1, max_info_tokens=90, kl_coef=0.0, lr=5e-4, dtype="bfloat16",
              gradient_checkpointing=False, batch_tokens=2048, eval_every=15, eval_questions=24, show_every=5, save_every=5)


def two_hops(world: make.World, split: str, count: int) -> list[dict]:
    return [q for q in world.questions(split, count) if q["hops"] == 2]


def warm_row(tokenizer, kind: str, world, search, question: dict, rng: random.Random) -> tuple[dict, list[int]]:
    """(row for igpo.token_logps, kind of each of its targets): see demo/make.py."""
    if kind == "page":
        return make.page_row(tokenizer, world, question, 1)
    rollout = make.scripted_rollout(tokenizer, world, search, question, rng, kind == "gold", HABITS)
    row, kinds = make.training_row(tokenizer, rollout, question["answers"][0], True)
    kept = [i for i, j in enumerate(row["targets"]) if kind == "poor" or kinds[i] == make.READER or rollout.turns[j] == len(rollout.queries)]
    return {**row, "targets": [row["targets"][i] for i in kept]}, [kinds[i] for i in kept]


def tune(base: str, out: Path, steps: int, lr: float, first_world: int, kinds_of_rows: tuple) -> None:
    """One stage: a LoRA adapter on base, trained and merged; writes the folder out."""
    cfg = igpo.Config(**{**COMMON, "model": base, "lora_rank": 32, "lora_alpha": 64})
    model, tokenizer = igpo.load_model(cfg)
    tokenizer.chat_template = make.CHAT_TEMPLATE
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 5, 1.1 - i / steps))
    rng, start, n = random.Random("warm start"), time.time(), len(kinds_of_rows)
    for step in range(steps):
        if step % 20 == 0:
            world = make.World(first_world + step // 20)
            search, questions = BM25([Passage(**page) for page in world.pages]), two_hops(world, "all", 60 * n)
        rows, kinds = zip(*[warm_row(tokenizer, kind, world, search, questions[step % 20 * n + i], rng) for i, kind in enumerate(kinds_of_rows)])
        counts, sums = torch.bincount(torch.tensor(sum(kinds, [])), minlength=2), torch.zeros(2)
        for batch in igpo.by_tokens([len(row["ids"]) for row in rows], 1024):
            scores, kind = torch.cat(igpo.token_logps(igpo.unwrap(model), [rows[i] for i in batch], 1.0)), torch.tensor(sum([kinds[i] for i in batch], []))
            losses = torch.stack([-scores[kind == k].sum() for k in (make.SEARCHER, make.READER)]) / counts.clamp(min=1)
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
    for number, stage in enumerate(STAGES, 1):
        folder = out if number == len(STAGES) else out / f"stage{number}"
        if not (folder / "tokenizer.json").is_file():
            tune(base, folder, *stage)
        base = str(folder)
    (out / "warm_start.json").write_text(json.dumps(diagnose(out), indent=1) + "\n")
    print((out / "warm_start.json").read_text())


@torch.no_grad()
def diagnose(folder: Path, count: int = 10) -> dict:
    """What a warm start can do, on dev questions of the committed world: belief along the gold path, greedy F1, and its own rollouts."""
    cfg, world = igpo.Config(**{**COMMON, "model": str(folder)}), make.World(0)
    model, tokenizer = igpo.load_model(cfg)
    search, questions, rng = BM25([Passage(**page) for page in world.pages]), two_hops(world, "dev", make.SIZES["dev"])[:count], random.Random(0)
    golds = [q["answers"] for q in questions]
    _, path = igpo.score(model, tokenizer, [make.scripted_rollout(tokenizer, world, search, q, rng, True) for q in questions], golds, cfg)
    greedy = igpo.evaluate(model, tokenizer, questions, search, cfg)
    rollouts, asked = igpo.rollout(model, tokenizer, questions, search, cfg), [q for q in questions for _ in range(cfg.group)]
    _, beliefs = igpo.score(model, tokenizer, rollouts, [q["answers"] for q in asked], cfg)
    gains = {True: [], False: []}
    for r, q, b in zip(rollouts, asked, beliefs):
        for t, gain in enumerate(igpo.info_gains(b)):
            met = {p.id for found in r.retrieved[:t] for p in found}
            gains[bool(({p.id for p in r.retrieved[t]} - met) & set(q["supporting"]))].append(gain)
    for r, q, b in list(zip(rollouts, asked, beliefs))[:12:4]:
        print(igpo.transcript(igpo.record(tokenizer, r, q, b)), flush=True)
    share = lambda values: round(igpo.mean(values), 3)
    return {"questions": count, "greedy_f1": share([greedy["eval_f1"]]), "belief_on_gold_path": [share(bs[t] for bs in path) for t in range(3)],
            "sampled_f1": share(igpo.f1_score(r.answer, q["answers"]) for r, q in zip(rollouts, asked)),
            "format_kept": share(r.stop in ("answer", "turns") for r in rollouts), "answered": share(r.stop == "answer" for r in rollouts),
            "right_searches": len(gains[True]), "wrong_searches": len(gains[False]), "gain_right": share(gains[True]), "gain_wrong": share(gains[False])}


def train(warm: str, folder: Path, seeds: list[int], steps: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    evidence.write_questions(folder)
    for seed in seeds:
        for setting, options in SETTINGS.items():
            out = folder / f"{setting}-seed{seed}"
            if (out / "final.json").is_file() and json.loads((out / "final.json").read_text())["steps"] >= steps:
                continue
            cfg = igpo.Config(**{**COMMON, **options, "model": warm, "steps": steps, "seed": seed, "out": str(out),
                                 "train": str(folder / "dense-train.jsonl"), "dev": str(folder / "dense-dev.jsonl")})
            igpo.train(replace(cfg, resume=str(out) if (out / "checkpoint").is_dir() else ""))
            if read_run(str(out))[1][-1]["step"] < steps:
                raise SystemExit(f"{out}: interrupted. The same command goes on from here.")
            (out / "final.json").write_text(json.dumps({"setting": setting, "seed": seed, "steps": steps}) + "\n")


# ---- what came out ---------------------------------------------------------------------------------------------------

def tables(folder: Path) -> None:
    outs = [path.parent for seed in range(9) for setting in SETTINGS for path in folder.glob(f"{setting}-seed{seed}/final.json")]
    runs = [(*evidence.read(out), read_run(out)[1]) for out in outs]
    lines = [json.dumps({"setting": final["setting"], "seed": final["seed"], **row}) for final, _, rows in runs for row in rows]
    (HERE / "smollm2.jsonl").write_text("\n".join(lines) + "\n")
    config = json.loads((outs[0] / "config.json").read_text())
    warm = json.loads((Path(config["model"]) / "warm_start.json").read_text())
    told = ", ".join(f"{key} {config[key]}" for key in ("steps", *list(COMMON)[1:10]))
    steps = [c["step"] for c in runs[0][1]]
    text = ["# SmolLM2-135M-Instruct on the demo's 2-hop questions", "",
            f"Made by `python benchmarks/smollm2.py`, which tells how. Warm start: {', '.join(f'{k} {v}' for k, v in warm.items())}. Runs: {told}, norm {config['norm']}, "
            f"gain {config['gain']}; LoRA rank {config['lora_rank']}. One thread of a CPU that ran other jobs too. Gains are in nats; early and late are the first and the last five steps.", "",
            f"| dev F1 at step | {' | '.join(map(str, steps))} | F1 of rollouts, first and last ten steps |", "|---|" + "---:|" * (len(steps) + 1)]
    for final, curve, rows in runs:
        ends = [igpo.mean(row["outcome_f1"] for row in part) for part in (rows[1:11], rows[-10:])]
        text.append(f"| {final['setting']}, seed {final['seed']} | " + " | ".join(f"{c['dev_f1']:.3f}" for c in curve) + f" | {ends[0]:.3f} -> {ends[1]:.3f} |")
    text += ["", "| | turns | no signal (outcome -> with gains) | gain right / wrong, early | .. late | return right / wrong, early | s a step | policy tokens | ratio farthest from 1 |", "|---|" + "---:|" * 8]
    for f, _, rows in runs:
        pair = lambda kind, part: " / ".join("%+.2f" % f.get(f"{kind}_{right}_{part}", math.nan) for right in ("right", "wrong"))
        text.append(f"| {f['setting']}, seed {f['seed']} | {f['turns_start']:.1f} -> {f['turns_end']:.1f} | {f['no_signal_outcome']:.0%} -> {f['no_signal_igpo']:.0%} | {pair('gain', 'early')} "
                    f"| {pair('gain', 'late')} | {pair('return', 'early')} | {f['seconds']:.0f} | {rows[-1]['tokens']:,} | {max((row['ratio_start'] for row in rows[1:]), key=lambda x: abs(x - 1)):.2f} |")
    (HERE / "smollm2.md").write_text("\n".join(text) + "\n")
    print("\n".join(text))
    figure(runs, config)


def figure(runs: list[tuple[dict, list, list]], config: dict, width: int = 10) -> None:
    """Dev F1 as it is; what the few rollouts of a step say as running means."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    panels = {"eval_f1": "dev F1, greedy", "outcome_f1": f"F1 of the sampled rollouts (mean of {width} steps)", "belief_gain": f"belief gained by a rollout's searches, nats (mean of {width} steps)"}
    fig, axes = plt.subplots(1, 3, figsize=(13, 3.9), constrained_layout=True)
    for axis, (key, title) in zip(axes, panels.items()):
        for k, setting in enumerate(SETTINGS):
            series = []
            for rows in (rows for final, _, rows in runs if final["setting"] == setting):
                points = {row["step"]: row[key] for row in rows if key in row}
                series.append(points if key == "eval_f1" else {s: igpo.mean(points[s - i] for i in range(width)) for s in points if s - width + 1 in points})
                axis.plot(*zip(*series[-1].items()), color=f"C{k}", linewidth=0.8, alpha=0.45)
            if series:
                steps = sorted(set.intersection(*map(set, series)))
                axis.plot(steps, [igpo.mean(s[step] for s in series) for step in steps], color=f"C{k}", linewidth=2, marker="o" if key == "eval_f1" else None, label=f"{setting}, mean of {len(series)} seed{'s' * (len(series) > 1)}")
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(0, 1)
    axes[1].set_ylim(0, 1)
    axes[0].legend(frameon=False)
    fig.suptitle(f"SmolLM2-135M-Instruct, warm-started, 2-hop questions; {config['questions']} x {config['group']} rollouts a step; thin: one seed", fontsize=10)
    fig.savefig(HERE.parent / "docs" / "smollm2.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warm_start", nargs=2, metavar=("BASE", "WARM"))
    parser.add_argument("--train", metavar="WARM")
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--folder", type=Path, default=HERE.parent / "runs" / "smollm2")
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
