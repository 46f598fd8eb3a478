"""Evaluate a search agent on public benchmarks, tell whether one agent is better than another, and look at what they do.

    python eval.py                                         the embedded demo: 200 test questions, offline
    python eval.py --adapter runs/x                        the same after training; model and episode come from the run
    python eval.py --adapter runs/x --no_search            closed book: made to answer at once. Does search help?
    python eval.py --model Qwen2.5-3B-Instruct --benchmark all --limit 500 --search http://127.0.0.1:8000/retrieve
    torchrun --nproc_per_node 4 -- eval.py ..              on four GPUs: each takes its share of the questions
    python eval.py --compare results/a results/b           is b better than a? paired bootstrap, win / tie / loss
    python eval.py --report runs/x                         a page on the rollouts of a training run
    python eval.py --plot runs/a runs/b -o curves.png      training curves; seeds of one setting become a line with a band

An evaluation writes results/<name>/: rollouts.jsonl (what happened), results.json and results.md (the figures) and
report.html (a page to read it all). The same command goes on where it was stopped. Figures are made from rollouts.jsonl alone.
Tables, page and curves are drawn in benchmarks/report.py, benchmarks are downloaded in benchmarks/download.py.

How an answer is found and scored; published figures differ because these rules do:
  1. The answer is what the policy wrote between <answer> and </answer>, in a turn of the right form. A turn ends at its
     first closing tag, so a rollout has one answer at most; two in one turn are a broken format.
  2. An answer in a search result is no answer: results are cleaned of tags, and only what the policy wrote is parsed.
  3. No answer (an unclosed tag, a broken format, cut short, no turn left) scores 0 and stays in every mean.
  4. Two conventions, side by side. paper, as the authors' code: lower-case, punctuation to spaces, *sets* of words.
     squad, as SQuAD v1.1: punctuation and articles dropped, *multisets* for F1, sequences for EM. Neither folds accents or
     full-width letters; text without spaces, such as Chinese, is one word.
  5. Every gold alias counts, the best one is taken. Empty golds are dropped on reading; an empty answer scores 0.
  6. cover-EM: the squad words of a gold alias stand in the answer one after the other ("art" is not in "party").
  7. Intervals are 95 % percentile bootstrap over questions (not over rollouts); the macro average weighs benchmarks alike.
"""
from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import os
import random
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.download import fetch
from igpo import (DEMO, SCHEMA, TAG, Config, Rollout, UserError, answer_words, begin, check_bounds, encode, exact_match, f1_score,
                  find_checkpoint, finish, first_line, gathered, join_processes, load_model, load_questions, locate, mean,
                  open_run_search, process, read_config, record, score, write_whole)
from search_tool import SearchError, clean_text

BENCHMARKS = ("nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle")


# ---- benchmarks ------------------------------------------------------------------------------------------------------

def read_rows(path: str) -> list[dict]:
    """The questions of a file as they stand there."""
    if path.endswith(".parquet"):
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise UserError(f"{path}: to read parquet, pip install pyarrow") from None
        return parquet.read_table(path).to_pylist()
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as file:
        head = next((line for line in file if line.strip()), "").strip()
        file.seek(0)
        if head.startswith("["):                                                      # HotpotQA, 2Wiki
            return json.load(file)
        if '"paragraphs"' in head and '"answers"' not in head:                        # MuSiQue
            return [json.loads(line) for line in file if line.strip()]
    return load_questions(path)


def read_benchmark(name: str, split: str = "test") -> list[dict]:
    """All questions of a benchmark or file, as {"id", "question", "answers"} and, where known, "supporting", "hops", "data_source".

    Files: this project's jsonl, FlashRAG's jsonl, HotpotQA's and 2Wiki's json, MuSiQue's jsonl, the official IGPO parquet.
    """
    path = str(fetch(name, split)) if name in BENCHMARKS else locate(f"demo/{split}.jsonl") if name == "demo" else name
    if not Path(path).is_file():
        raise UserError(f"{path}: neither a file nor one of demo, {', '.join(BENCHMARKS)}.")
    try:
        raw = read_rows(path)
    except (ValueError, OSError, EOFError, RecursionError, zlib.error) as e:
        raise UserError(f"{path}: cannot be read ({first_line(e)}).") from None
    answerable = [row for row in raw if not (isinstance(row, dict) and row.get("answerable") is False)]
    if len(answerable) < len(raw):
        print(f"{path}: {len(raw) - len(answerable)} questions marked unanswerable are left out.")
    rows, seen = [], Counter()
    for number, row in enumerate(answerable, 1):
        try:
            row = plain_question(row, number)
            json.dumps(row, ensure_ascii=False).encode()      # half a surrogate pair is JSON, but could never be written down
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as e:
            raise UserError(f"{path}: question {number} is in no format I know ({e!r}).") from None
        if not row["question"] or not row["answers"]:
            raise UserError(f"{path}: question {number} has no {'answer' if row['question'] else 'text'}.")
        seen[row["id"]] += 1
        rows.append(row if seen[row["id"]] == 1 else {**row, "id": f"{row['id']}#{seen[row['id']]}"})    # an id names one question
    if not rows:
        raise UserError(f"{path}: no questions in it.")
    return rows


def plain_question(row: dict, number: int) -> dict:
    """A question of any of the formats in ours.

    >>> plain_question({"_id": "x", "question": "Who?", "answer": "Ann", "supporting_facts": [["Ann", 0], ["Bo", 1], ["Ann", 2]]}, 1)
    {'id': 'x', 'question': 'Who?', 'answers': ['Ann'], 'supporting': ['Ann', 'Bo']}
    """
    meta, extra = row.get("metadata") or {}, row.get("extra_info") or {}
    if "reward_model" in row:                                                         # IGPO's parquet
        answers = str(row["reward_model"]["ground_truth"]).split("<|answer_split|>")
        question = next((m["content"] for m in reversed(row["prompt"]) if m["role"] == "user"), "")
    else:
        answers = row.get("answers") or row.get("golden_answers") or [row.get("answer") or "", *row.get("answer_aliases", [])]
        question = row.get("question") or ""
    answers = [answers] if isinstance(answers, str) else answers
    facts = row.get("supporting_facts") or meta.get("supporting_facts") or []         # HotpotQA, 2Wiki: [[title, sentence], ..]
    steps = [step for step in meta.get("question_decomposition") or [] if isinstance(step, dict)]          # FlashRAG's MuSiQue
    titles = (row.get("supporting")
              or (facts.get("title") if isinstance(facts, dict) else [fact[0] for fact in facts])
              or [p["title"] for p in row.get("paragraphs", []) if p.get("is_supporting")]
              or [(step.get("support_paragraph") or {}).get("title") for step in steps])
    known = {"supporting": list(dict.fromkeys(t for t in titles if t)), "hops": row.get("hops"), "data_source": row.get("data_source")}
    return {"id": str(row.get("id", row.get("_id", extra.get("index", number)))), "question": question.strip(),
            "answers": [a for a in answers if isinstance(a, str) and a.strip()], **{key: value for key, value in known.items() if value}}


def sample(rows: list[dict], limit: int, seed: int) -> list[dict]:
    """limit questions drawn by seed, in the order of the file; all if limit is 0 or too large."""
    if not 0 < limit < len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), limit))]


def load_benchmark(name: str, split: str = "test", limit: int = 0, seed: int = 0) -> list[dict]:
    """Questions of a benchmark (nq .. bamboogle, demo) or of a file in any of the formats of `read_benchmark`."""
    return sample(read_benchmark(name, split), limit, seed)


# ---- metrics ---------------------------------------------------------------------------------------------------------

METRICS = {   # name: (heading, unit, what it is)
    "f1_paper": ("F1", "%", "word F1 with the best gold alias, sets of words (the authors' convention)"),
    "em_paper": ("EM", "%", "exact match, sets of words"),
    "f1_squad": ("F1 SQuAD", "%", "word F1, SQuAD normalisation, multisets"),
    "em_squad": ("EM SQuAD", "%", "exact match, SQuAD normalisation"),
    "cover_em": ("cover-EM", "%", "a gold alias stands in the answer"),
    "pass_f1": ("F1 best of n", "%", "F1 of the best of n samples"),
    "pass_em": ("pass@n", "%", "share of questions with an exact match among n samples"),
    "turns": ("Turns", "", "mean turns per rollout"),
    "searches": ("Searches", "", "mean searches per rollout"),
    "tokens": ("Tokens", "#", "mean tokens written by the policy"),
    "failed_searches": ("Failed searches", "%", "share of searches that came back with an error"),
    "recall": ("Recall", "%", "share of the supporting passages found by any search of the rollout, by id or title"),
    "belief_first": ("Belief before", "nats", "mean log-probability of the gold answer's tokens before the first turn (Eq. 3)"),
    "belief_last": ("Belief after", "nats", "the same after the last search"),
    "entropy_reduction": ("Entropy reduction", "nats", "belief after minus before: what all searches together added (paper, Fig. 5)"),
    "gain_positive": ("Gain > 0", "%", "share of rollouts whose gains add up to more than 0"),
    "stop_answer": ("Answered", "%", "share that ended with an answer"),
    "stop_format": ("Broken format", "%", "share that broke the format"),
    "stop_length": ("Cut short", "%", "share cut in the middle of a turn, or out of context"),
    "stop_turns": ("Out of turns", "%", "share that still searched on the last turn"),
}


def cover_em(prediction: str | None, golds: list[str]) -> float:
    """1.0 if the words of a gold alias stand in the answer one after the other.

    >>> cover_em("yes, it is", ["yes"]), cover_em("party", ["art"])
    (1.0, 0.0)
    """
    words = answer_words(prediction or "", "squad")
    golds = [answer_words(gold, "squad") for gold in golds]
    return float(any(g and words[i:i + len(g)] == g for g in golds for i in range(len(words))))


def name_key(text) -> str:
    """An id or title in the form in which two of them are compared."""
    return clean_text(text, 200).casefold()


def measure(row: dict) -> dict[str, tuple[float, float]]:
    """Each metric of one line of rollouts.jsonl as (amount, out of how many); (0, 0) where it is not known.

    A benchmark's figure is the sum of amounts over the sum of counts, so that shares of searches are weighed by searches.
    """
    answer, golds, turns, beliefs = row["answer"], row["answers"], row["turns"], row["beliefs"]
    searches = [t for t in turns if t["query"] is not None]
    found = {name_key(p[key]) for t in searches for p in t["passages"] for key in ("id", "title")}
    wanted = row.get("supporting") or []
    known = bool(beliefs) and all(map(math.isfinite, beliefs))
    first, last = (beliefs[0], beliefs[-1]) if known else (0.0, 0.0)
    return {
        **{f"f1_{style}": (f1_score(answer, golds, style), 1) for style in ("paper", "squad")},
        **{f"em_{style}": (exact_match(answer, golds, style), 1) for style in ("paper", "squad")},
        "cover_em": (cover_em(answer, golds), 1),
        "turns": (len(turns), 1), "searches": (len(searches), 1), "tokens": (row["policy_tokens"], 1),
        "failed_searches": (sum(t["error"] is not None for t in searches), len(searches)),
        "recall": (sum(name_key(w) in found for w in wanted), len(wanted)),
        "belief_first": (first, known), "belief_last": (last, known),
        "entropy_reduction": (last - first, known), "gain_positive": (last > first, known),
        **{f"stop_{why}": (row["stop"] == why, 1) for why in ("answer", "format", "length", "turns")},
    }


def by_question(rows: list[dict]) -> dict[tuple, list[dict]]:
    """The samples of each question: {(benchmark, id): rows}."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row.get("benchmark", ""), row["id"]), []).append(row)
    return groups


def question_metrics(samples: list[dict]) -> dict[str, tuple[float, float]]:
    """`measure` of one question: amounts and counts summed over its samples, and the best of them."""
    each = [measure(row) for row in samples]
    total = {name: (sum(m[name][0] for m in each), sum(m[name][1] for m in each)) for name in each[0]}
    if len(each) > 1:
        total |= {f"pass_{kind}": (max(m[f"{kind}_paper"][0] for m in each), 1) for kind in ("f1", "em")}
    return total


def bootstrap(amounts: np.ndarray, counts: np.ndarray, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """(resamples, M) figures of M metrics, each over as many questions drawn with replacement. amounts, counts: (N, M)."""
    rng, n, parts = np.random.default_rng(seed), len(amounts), []
    for start in range(0, resamples, 200):
        drawn = rng.multinomial(n, np.full(n, 1 / n), size=min(200, resamples - start))       # how often each question, (200, N)
        with np.errstate(invalid="ignore"):
            parts.append((drawn @ amounts) / (drawn @ counts))
    return np.concatenate(parts)


def interval(value, replicates) -> dict | None:
    """{"value", "low", "high"}, or None where the metric is not known."""
    if not math.isfinite(value):
        return None
    low, high = np.nanpercentile(replicates, [2.5, 97.5])
    return {"value": float(value), "low": float(low), "high": float(high)}


def summarise(rows: list[dict], seed: int = 0) -> dict:
    """{benchmark: {"questions", "rollouts", metric: {"value", "low", "high"} or None}}, with "macro average" if there are several."""
    measured: dict[str, list] = {}
    for (benchmark, _), samples in by_question(rows).items():
        measured.setdefault(benchmark, []).append((question_metrics(samples), len(samples)))
    names = [name for name in METRICS if all(name in m for questions in measured.values() for m, _ in questions)]
    summary, values, replicates = {}, [], []
    for k, (benchmark, questions) in enumerate(measured.items()):
        amounts, counts = (np.array([[m[name][part] for name in names] for m, _ in questions], float) for part in (0, 1))
        with np.errstate(invalid="ignore"):
            values.append(amounts.sum(0) / counts.sum(0))
        replicates.append(bootstrap(amounts, counts, seed=seed + k))
        summary[benchmark] = {"questions": len(questions), "rollouts": sum(n for _, n in questions)}
        summary[benchmark] |= {name: interval(v, r) for name, v, r in zip(names, values[-1], replicates[-1].T)}
    if len(summary) > 1:
        macro = {key: sum(row[key] for row in summary.values()) for key in ("questions", "rollouts")}
        for i, name in enumerate(names):      # unknown in one benchmark: the average is over the others
            known = [k for k in range(len(values)) if math.isfinite(values[k][i])]
            average = np.mean([replicates[k][:, i] for k in known], axis=0) if known else None
            macro[name] = interval(mean(values[k][i] for k in known), average) if known else None
        summary["macro average"] = macro
    return summary


def compare(a: list[dict], b: list[dict], metric: str = "f1_paper", resamples: int = 10_000, seed: int = 0) -> list[dict]:
    """Is b better than a? One row per benchmark: means, difference with its interval, two-sided p, wins / ties / losses of b.

    Paired: both are judged on the questions that both answered, and a resample draws the same questions for both. p is twice
    the share of resamples in which the difference has the other sign or is 0 (paper, table 9).
    """
    figures = []      # {(benchmark, id, question): figure} of a and of b
    for rows in (a, b):
        sums = {(*key, samples[0]["question"]): question_metrics(samples)[metric] for key, samples in by_question(rows).items()}
        figures.append({key: amount / n for key, (amount, n) in sums.items() if n})
    pairs: dict[str, list] = {}
    for key in figures[0]:
        if key in figures[1]:
            pairs.setdefault(key[0], []).append((figures[0][key], figures[1][key]))
    if not pairs:
        raise UserError("--compare: the two have no question in common.")
    table, replicates = [], []
    for k, (benchmark, both) in enumerate(pairs.items()):
        gaps = np.array([y - x for x, y in both])
        wins, losses = int((gaps > 1e-9).sum()), int((gaps < -1e-9).sum())
        replicates.append(bootstrap(gaps[:, None], np.ones((len(gaps), 1)), resamples, seed + k)[:, 0])
        table.append({"benchmark": benchmark, "questions": len(both), "a": mean(x for x, _ in both), "b": mean(y for _, y in both),
                      "win": wins, "tie": len(both) - wins - losses, "loss": losses})
    if len(table) > 1:
        replicates.append(np.mean(replicates, axis=0))
        table.append({"benchmark": "macro average", **{key: mean(row[key] for row in table) for key in ("a", "b")},
                      **{key: sum(row[key] for row in table) for key in ("questions", "win", "tie", "loss")}})
    for row, draws in zip(table, replicates):
        low, high = np.percentile(draws, [2.5, 97.5])
        p = 2 * float(min(np.mean(draws <= 1e-12), np.mean(draws >= -1e-12)))
        row |= {"difference": row["b"] - row["a"], "low": float(low), "high": float(high), "p": min(1.0, max(p, 1 / resamples))}
    return table


# ---- running ---------------------------------------------------------------------------------------------------------

# The fields of igpo.Config that an evaluation has, and those it takes from the run that an adapter comes from.
EPISODE = ("model", "search", "search_cache", "seed", "max_turns", "max_new_tokens", "top_k", "max_info_tokens", "temperature", "gain",
           "belief", "dtype", "rollout_batch", "batch_tokens")
INHERITED = ("model", "search", "max_turns", "max_new_tokens", "top_k", "max_info_tokens", "gain", "belief")


def closed_book(model, tokenizer, rollouts: list[Rollout], cfg: Config) -> Iterator[Rollout]:
    """As igpo.finish, without search: the policy is made to answer at once, under the very words that its belief is read under."""
    schema = encode(tokenizer, SCHEMA)
    for r in rollouts:
        r.write(schema, False, 0)
    for r in finish(model, tokenizer, rollouts, None, replace(cfg, max_turns=1)):
        # To finish() the turn has no thought and so is broken. All that matters here is whether an answer is closed.
        text, closed, _ = tokenizer.decode([i for i, by_policy in zip(r.ids, r.mask) if by_policy]).partition("</answer>")
        if closed and text.strip() and not TAG.search(text):
            r.stop, r.answer = "answer", text.strip()
        else:
            r.stop, r.answer = "length" if r.stop == "length" else "format", None
        yield r


def fingerprint(path: str | Path) -> str:
    """What tells one file or folder of weights from another without reading gigabytes: names, sizes, first and last MiB."""
    digest, path = hashlib.sha256(), Path(path)
    files = [path] if path.is_file() else sorted(p for p in path.glob("*") if p.suffix in (".safetensors", ".bin", ".json", ".gguf"))
    for file in files:
        with open(file, "rb") as data:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode() + data.read(1 << 20))
            data.seek(max(size - (1 << 20), 0))
            digest.update(data.read())
    return digest.hexdigest()[:16] if files else ""


def read_jsonl(path: Path) -> list[dict]:
    """Lines of a log; a last line that was cut while being written is left out. Raises UserError."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]        # text would end at U+2028 too, which JSON leaves as it is
        return [dict(json.loads(line)) for line in lines if line.strip()]
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise UserError(f"{path}: cannot be read ({first_line(e)}).") from None


def load_config(args: argparse.Namespace) -> Config:
    """What is given on the command line, over what the adapter's run was trained with (or the demo's values), over the defaults."""
    given = {name: getattr(args, name) for name in EPISODE if hasattr(args, name)}
    base = {}
    if args.adapter:
        try:
            base = {name: getattr(read_config(args.adapter), name) for name in INHERITED}
        except UserError as e:      # a PEFT folder of another make may hold a config.json of its own, or none
            if "model" not in given:
                raise UserError(f"--adapter {e} If it is a PEFT folder, give --model too.") from None
    elif "model" not in given:
        base = {name: DEMO[name] for name in INHERITED if name in DEMO}
    cfg = Config(**{"temperature": 0.0 if args.n == 1 else 1.0, "gradient_checkpointing": False, **base, **given})
    check_bounds(cfg)
    if cfg.temperature < 0:
        raise UserError("--temperature must be at least 0, which is greedy.")
    if args.n > 1 and cfg.temperature == 0:
        raise UserError("--n samples of a greedy rollout are all alike: give a --temperature above 0.")
    strange = next((name for name in args.benchmark if name != "demo"), None)
    if strange and cfg.search == Config().search and "search" not in given and not args.no_search:
        raise UserError(f"--search: the demo's corpus knows nothing of {strange}. Say where to search, see search_tool.py, or --no_search.")
    return cfg


def load_questions_of(args: argparse.Namespace, cfg: Config) -> tuple[dict[str, list[dict]], dict[str, dict]]:
    """{benchmark: questions} and, for the report, {benchmark: what was taken of what}."""
    chosen, notes = {}, {}
    for name in args.benchmark:
        label = name if name in BENCHMARKS or name == "demo" else Path(name.removesuffix(".gz")).stem
        sources: dict[str, list] = {}
        for row in read_benchmark(name):
            sources.setdefault(row.get("data_source", label), []).append(row)         # the official parquet holds several benchmarks
        for source, rows in sources.items():
            while source in chosen:
                source += "'"
            chosen[source] = part = sample(rows, args.limit, cfg.seed)
            text = json.dumps([[q["id"], q["question"], q["answers"]] for q in part], ensure_ascii=False)
            taken = f"{len(part)} of {len(rows)}, drawn with seed {cfg.seed}" if len(part) < len(rows) else f"all {len(rows)}"
            notes[source] = {"questions": taken, "sha256": hashlib.sha256(text.encode()).hexdigest()[:16]}
    return chosen, notes


def result_folder(args: argparse.Namespace, cfg: Config, settings: dict) -> Path:
    """--out, or results/<name>: the first that is free or was begun with these very settings (then it is gone on with)."""
    name = args.adapter or locate(cfg.model)
    name = os.path.basename(os.path.abspath(name)) if Path(name).exists() else name.replace("/", "-")
    name += "-closed-book" * args.no_search + f"-n{args.n}" * (args.n > 1)
    for k in count(1):
        out = Path(args.out or f"results/{name}" + f"-{k}" * (k > 1))
        if not out.exists() or not any(out.iterdir()):
            return out
        try:
            before = json.loads((out / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            before = {}
        if before == settings:
            return out
        if args.out:
            changed = next((key for key in settings if before.get(key) != settings[key]), "config.json")
            raise UserError(f"--out {out}: holds something else, or results of other settings ({changed}). Choose another folder.")


def plan(args: argparse.Namespace) -> tuple:
    """(config, settings, results folder, rows that are there, [(benchmark, question, sample), ..] still to be run)."""
    cfg = load_config(args)
    chosen, notes = load_questions_of(args, cfg)
    files = {"model": locate(cfg.model), "adapter": find_checkpoint(Path(args.adapter), "adapter_config.json") if args.adapter else None,
             "corpus": locate(cfg.search[5:]) if cfg.search.startswith("bm25:") and not args.no_search else None}
    settings = {**{name: getattr(cfg, name) for name in EPISODE if name not in ("rollout_batch", "batch_tokens", "search_cache")},
                "adapter": args.adapter, "no_search": args.no_search, "n": args.n, "benchmarks": notes,
                "fingerprints": {name: fingerprint(path) if path else "" for name, path in files.items()}}
    out = result_folder(args, cfg, settings)
    rows = read_jsonl(out / "rollouts.jsonl") if (out / "rollouts.jsonl").exists() else []
    done = {(row["benchmark"], row["id"], row["sample"]) for row in rows}
    todo = [(name, q, k) for name, part in chosen.items() for q in part for k in range(args.n) if (name, q["id"], k) not in done]
    taken = ", ".join(f"{name} ({note['questions']})" for name, note in notes.items())
    there = f"; {len(done)} of them are there already" if done else ""
    print(f"{len(done) + len(todo)} rollouts on {taken}{there}. Results go to {out}.", flush=True)
    return cfg, settings, out, rows, todo


def play(args: argparse.Namespace, cfg: Config, settings: dict, out: Path, rows: list[dict], todo: list[tuple]) -> None:
    """Run and score what is still to be run, and add it to rows and to rollouts.jsonl as it ends. Each process plays its share."""
    rank, processes = process()
    search = None if args.no_search else open_run_search(cfg)
    model, tokenizer = load_model(cfg, adapter=args.adapter) if args.adapter else load_model(cfg)
    if not rank:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "config.json", json.dumps(settings, indent=1) + "\n")
        # Written anew: a last line may have been cut.
        write_whole(out / "rollouts.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    mine, total = todo[rank::processes], len(rows) + len(todo)
    begun = [begin(tokenizer, q["question"]) for _, q, _ in mine]
    task_of = {id(r): task for r, task in zip(begun, mine)}
    torch.manual_seed(cfg.seed + len(rows) + 10**6 * rank)      # gone on with, it must not draw the same numbers again
    ended = closed_book(model, tokenizer, begun, cfg) if args.no_search else finish(model, tokenizer, begun, search, cfg)
    with (open(os.devnull if rank else out / "rollouts.jsonl", "a", encoding="utf-8") as file,
          tqdm(total=total, initial=len(rows), unit="rollout", dynamic_ncols=True, disable=bool(rank)) as bar):
        while len(rows) < total:
            rollouts = list(islice(ended, min(cfg.rollout_batch, 16)))      # few at a time: what is written survives an interruption
            tasks = [task_of[id(r)] for r in rollouts]
            _, beliefs = score(model, tokenizer, rollouts, [q["answers"] for _, q, _ in tasks], cfg)
            new = gathered([{"benchmark": name, "sample": k, **record(tokenizer, r, q, b, gain=cfg.gain)}
                            for (name, q, k), r, b in zip(tasks, rollouts, beliefs)])
            searches = [turn for row in new for turn in row["turns"] if turn["query"] is not None]
            errors = [turn["error"] for turn in searches if turn["error"]]
            if len(errors) > cfg.max_failed_searches * len(searches):
                raise UserError(f"{len(errors)} searches failed ({errors[-1]}). When the search works again, the same command goes on.")
            rows += new
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in new)
            file.flush()
            f1, em = (100 * mean(row[key] for row in rows) for key in ("f1", "em"))
            bar.set_postfix_str(f"F1 {f1:.1f}, EM {em:.1f}", refresh=False)
            bar.update(len(new))


def evaluate(args: argparse.Namespace) -> Path:
    """Run what is still to be run, then write figures and page. Under torchrun the first process plans and writes.

    What is cut is played again. Of samples (--n) that favours short rollouts a little: they are the ones that had ended.
    """
    join_processes()
    rank, _ = process()
    if rank:
        sys.stdout = open(os.devnull, "w")
    cfg, settings, out, rows, todo = gathered([] if rank else [plan(args)])[0]
    if todo:
        play(args, cfg, settings, out, rows, todo)
    if not rank:
        from benchmarks.report import write_results      # here, since it imports this file
        print("\n" + write_results(out, settings, rows) + f"\nTo read the rollouts, open {out / 'report.html'}")
    return out


# ---- command line ----------------------------------------------------------------------------------------------------

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Options of igpo.Config are there only if given: `load_config` tells what else is in force."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--benchmark", nargs="+", default=["demo"], metavar="NAME_OR_FILE", help=f"demo, {', '.join(BENCHMARKS)}, all (these), or files")
    add("--adapter", default="", help="run folder (or PEFT folder) whose adapter is evaluated; model and episode come from its config.json")
    add("--limit", type=int, default=0, help="questions drawn from each benchmark with --seed; 0: all")
    add("--n", type=int, default=1, help="samples a question, for mean@n and pass@n; above 1 the temperature is 1 unless given")
    add("--no_search", action="store_true", help="closed book: the policy is made to answer at once")
    add("--out", default="", help="folder of the results; empty: results/<name>")
    other = {"temperature": "sampling temperature; 0, greedy, unless --n is above 1", "seed": "seed of sampling and of the questions drawn"}
    for f in fields(Config):
        if f.name in EPISODE:
            add(f"--{f.name}", type=type(f.default), default=argparse.SUPPRESS, choices=f.metadata.get("choices"),
                help=other.get(f.name, f"{f.metadata['help']} ({f.default!r})"))
    add("--compare", nargs=2, metavar=("A", "B"), help="two result folders: is B better than A?")
    add("--metric", default="f1_paper", choices=[m for m in METRICS if not m.startswith("pass_")], help="of --compare (f1_paper)")
    add("--report", metavar="FOLDER", help="write report.html for the rollouts.jsonl of a training run or of results")
    add("--plot", nargs="+", metavar="RUN", help="training curves of these run folders")
    add("-o", default="curves.png", metavar="FILE", help="where --plot draws them (curves.png)")
    parser.error = lambda message: parser.exit(2, f"eval: {' '.join(message.split())}; --help lists the options\n")
    args = parser.parse_args(argv)
    args.benchmark = list(dict.fromkeys(b for name in args.benchmark for b in (BENCHMARKS if name == "all" else (name,))))
    if args.n < 1 or args.limit < 0:
        parser.error("--n must be at least 1 and --limit at least 0")
    return args


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 2 for what the user can mend (told in one line), 130 when interrupted."""
    from benchmarks.report import comparison, plot, report      # here, since it imports this file
    args = parse_args(argv)
    try:
        if args.compare:
            print(comparison(*args.compare, args.metric))
        elif args.report:
            print(f"written: {report(args.report)}")
        elif args.plot:
            plot(args.plot, args.o)
            print(f"written: {args.o}")
        else:
            evaluate(args)
    except (UserError, SearchError, OSError) as e:
        print(f"eval: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\neval: interrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.modules["eval"] = sys.modules["__main__"]      # benchmarks/report.py imports eval: let it be this very module
    sys.exit(main())
