"""Does the belief rise when a supporting passage comes back?  Eq. 4 as a measurement on real text, without training.

    python benchmarks/real_text.py --model FOLDER --questions FILE --corpus FILE
    python benchmarks/real_text.py --tables          # table and figure from the gains in real_text.json

For each question that names two supporting passages (HotpotQA), scripted rollouts of two searches, `search <title>`, each of
which brings one passage:

  supporting    the two supporting passages, in either order: two rollouts
  distractor    BM25's best two for the question that are not supporting: one rollout

The model as it stands, its fresh adapter changing nothing, is asked for b_0, b_1, b_2 (Eq. 3); their differences are the gains of the
first and second search. Means are over gains, intervals 95 % bootstrap over questions. A passage *holds the answer* if
the gold's words stand in it one after the other. Writes real_text.json, real_text.md and ../docs/real_text.png.
"""
import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import igpo  # noqa: E402
from eval import bootstrap, interval  # noqa: E402
from search_tool import open_search, read_passages  # noqa: E402

SLICES = {"all": {}, "first search": {"turn": 0}, "second search": {"turn": 1}, "answer is yes or no": {"yes_no": True}, "any other answer": {"yes_no": False},
          "any other, passage holds it": {"yes_no": False, "holds": True}, "any other, passage does not": {"yes_no": False, "holds": False},
          **{f"any other, {search} search, passage {'holds it' if holds else 'does not'}": {"yes_no": False, "holds": holds, "turn": turn}
             for holds in (True, False) for turn, search in enumerate(("first", "second"))}}


def scripted_rollout(tokenizer, question: str, passages: list, max_info_tokens: int) -> igpo.Rollout:
    """What igpo.rollout would have written of a policy that looks each passage up by its title."""
    prompt = igpo.encode_prompt(tokenizer, question)
    r = igpo.Rollout(list(prompt), [0] * len(prompt), [-1] * len(prompt), [len(prompt)])
    for turn, p in enumerate(passages):
        r.write(igpo.encode(tokenizer, f" I need to look up {p.title}.\n</think>\n<search> {p.title} </search>", data=True), True, turn)
        r.write(igpo.encode_information(tokenizer, [p], None, max_info_tokens), False, turn)
        r.boundaries.append(len(r.ids))
    return r


def measure(model, tokenizer, search, passages: dict, q: dict, cfg: igpo.Config) -> list[dict]:
    """The six gains of a question: two searches in each of three rollouts."""
    words = lambda text: f" {' '.join(igpo.answer_words(text))} "
    one, two = (passages[i] for i in q["supporting"])
    best = [passages[p.id] for p in search.search(q["question"], 8) if p.id not in q["supporting"]]
    paths = [[one, two], [two, one], best[:2]]
    rollouts = [scripted_rollout(tokenizer, q["question"], path, cfg.max_info_tokens) for path in paths]
    _, beliefs = igpo.score(model, tokenizer, rollouts, [q["answers"]] * len(paths), cfg)
    return [{"id": q["id"], "supporting": n < 2, "turn": t, "yes_no": q["answers"][0].lower() in ("yes", "no"), "holds": words(q["answers"][0]) in words(f"{p.title} {p.text}"),
             "before": b[t], "after": b[t + 1], **{gain: igpo.info_gains(b, gain)[t] for gain in ("logprob", "prob")}}
            for n, (path, b) in enumerate(zip(paths, beliefs)) for t, p in enumerate(path)]


def with_interval(values: list[tuple[str, float]]) -> dict:
    """Mean of (question, value) pairs; the questions are drawn with replacement."""
    groups = [[v for other, v in values if other == i] for i in {i: 0 for i, _ in values}]
    sums, counts = np.array([[sum(g)] for g in groups]), np.array([[len(g)] for g in groups])
    return interval(sums.sum() / counts.sum(), bootstrap(sums, counts, 10000))


def summarise(rows: list[dict]) -> dict:
    """Per slice and scale the supporting gains, the distractors', and the difference to the distractor of the same question and turn."""
    other, out = {(r["id"], r["turn"]): r for r in rows if not r["supporting"]}, {}
    for name, wanted in SLICES.items():
        some = [r for r in rows if all(r[k] == v for k, v in wanted.items())]
        for scale in ("logprob", "prob"):
            kinds = {"supporting": [r for r in some if r["supporting"]], "distractor": [r for r in some if not r["supporting"]]}
            values = {kind: [(r["id"], r[scale]) for r in found] for kind, found in kinds.items()}
            values["difference"] = [(r["id"], r[scale] - other[r["id"], r["turn"]][scale]) for r in kinds["supporting"]]
            out.setdefault(name, {})[scale] = {kind: {"questions": len(dict(v)), "gains": len(v), **with_interval(v), "median": statistics.median(x for _, x in v),
                                                      "rises": with_interval([(i, float(x > 0)) for i, x in v])} for kind, v in values.items() if v}
    return out


def table(summary: dict, scale: str, digits: int) -> list[str]:
    show = lambda f: f"{f['value']:+.{digits}f} [{f['low']:+.{digits}f}, {f['high']:+.{digits}f}]"
    share = lambda f: f"{f['value']:.0%} [{f['low']:.0%}, {f['high']:.0%}]"
    lines = [f"| {scale} | what came back | questions | gains | mean gain | median | above 0 |", "|---|---|" + "---:|" * 5]
    return lines + [f"| {name} | {kind} | {f['questions']} | {f['gains']} | {show(f)} | {f['median']:+.{digits}f} | {share(f['rises'])} |"
                    for name, scales in summary.items() for kind, f in scales[scale].items()]


def figure(rows: list[dict], path: Path) -> None:
    """Gains of questions whose answer is not yes or no, by what came back."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 2, figsize=(11, 3.8), sharey=True, constrained_layout=True)
    rows = [r for r in rows if not r["yes_no"]]
    edges = np.linspace(*np.percentile([r["logprob"] for r in rows], [1, 99]), 28)
    kinds = {"supporting, the answer stands in it": lambda r: r["supporting"] and r["holds"], "supporting, the answer does not": lambda r: r["supporting"] and not r["holds"],
             "distractor": lambda r: not r["supporting"]}
    for turn, axis in enumerate(axes):
        for color, (name, fits) in zip(("C0", "C2", "C1"), kinds.items()):
            if some := [r["logprob"] for r in rows if r["turn"] == turn and fits(r)]:
                axis.hist(np.clip(some, edges[0], edges[-1]), edges, weights=[1 / len(some)] * len(some), histtype="step", linewidth=1.8, color=color,
                          label=f"{name}: mean {igpo.mean(some):+.2f}")
                axis.axvline(igpo.mean(some), ymax=0.06, color=color, linewidth=4)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(f"{('first', 'second')[turn]} search", loc="left")
        axis.set_xlabel("information gain, nats per gold token")
        axis.legend(frameon=False, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("share of gains")
    fig.suptitle("Marks at the bottom: means. The first and the last bin include all that lies beyond", fontsize=9)
    fig.savefig(path, dpi=120)


def run(args: argparse.Namespace) -> tuple[list[dict], dict]:
    """(gains, what they were measured with)."""
    start, cfg = time.time(), igpo.Config(model=args.model, gradient_checkpointing=False, batch_tokens=4096)
    questions = [q for q in igpo.load_questions(args.questions) if len(q.get("supporting", [])) == 2][:args.limit]
    passages, search = {p.id: p for p in read_passages(args.corpus)}, open_search(f"bm25:{args.corpus}")
    model, tokenizer = igpo.load_model(cfg)
    rows = [row for q in igpo.tqdm(questions) for row in measure(model, tokenizer, search, passages, q, cfg)]
    return rows, {"command": "python benchmarks/real_text.py" + "".join(f" --{k} {Path(str(v)).name}" for k, v in list(vars(args).items())[:4] if v), "questions": len(questions),
               "machine": f"{os.cpu_count()} cores, {platform.machine()}, " + ("a GPU" if igpo.torch.cuda.is_available() else "no GPU"), "minutes": round((time.time() - start) / 60, 1),
               "python": platform.python_version(), **{p: importlib.metadata.version(p) for p in ("torch", "transformers", "peft")}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "questions", "corpus"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--limit", type=int, help="only the first so many questions")
    parser.add_argument("--out", type=Path, default=HERE / "real_text", help="writes <out>.json and <out>.md")
    parser.add_argument("--figure", type=Path, default=HERE.parent / "docs" / "real_text.png")
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if args.tables:
        before = json.loads(args.out.with_suffix(".json").read_text())
        rows, setting = before["gains"], before["setting"]
    elif args.model and args.questions and args.corpus:
        rows, setting = run(args)
    else:
        parser.error("--model, --questions and --corpus are needed")
    summary = summarise(rows)
    args.out.with_suffix(".json").write_text(json.dumps({"setting": setting, "summary": summary}, indent=1)[:-2] + ',\n "gains": [\n  ' + ",\n  ".join(map(json.dumps, rows)) + "\n ]\n}\n")
    lines = ["# Eq. 4 on real text: the gain when a supporting passage came back, and when not", "", f"`{setting['command']}`; what is measured is told at the top of that file. "
             + ", ".join(f"{k} {v}" for k, v in setting.items() if k != "command") + ". *difference*: supporting less distractor, same question and turn.", "",
             *table(summary, "logprob", 3), "", *table(summary, "prob", 4)]
    args.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    figure(rows, args.figure)


if __name__ == "__main__":
    main()
