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
import base64
import gzip
import hashlib
import html
import json
import math
import os
import platform
import random
import re
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import fields
from itertools import islice
from pathlib import Path

import numpy as np
import peft
import requests
import torch
import transformers
from tqdm import tqdm
from transformers import GenerationConfig, StoppingCriteriaList

from igpo import (DEMO, HERE, SCHEMA, TAG, Config, Rollout, TurnEnd, UserError, answer_words, begin, encode, exact_match, f1_score,
                  finish, first_line, gathered, join_processes, left_pad, load_model, load_questions, locate, mean, open_run_search, process,
                  read_config, record, score, unwrap, write_whole)
from search_tool import SearchError, clean_text

BENCHMARKS = ("nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle")
CACHE = Path.home() / ".cache" / "igpo" / "benchmarks"


# ---- benchmarks ------------------------------------------------------------------------------------------------------

WAIT = 1.0      # seconds before the first retry of a download, doubled each time


def download(url: str, path: Path, tries: int = 6) -> None:
    """Fetch url into path, whole or not at all. A cut download goes on where it was cut if the file is still the same.

    Raises FileNotFoundError on 404, UserError on all that retrying did not mend.
    """
    part, tag = path.with_name(path.name + ".part"), path.with_name(path.name + ".etag")
    path.parent.mkdir(parents=True, exist_ok=True)
    # identity: the size of a compressed answer would say nothing about the file. requests drops the token on a redirect to another host.
    login = {"Authorization": f"Bearer {os.environ['HF_TOKEN']}"} if os.environ.get("HF_TOKEN") else {}
    for attempt in range(tries):
        have, wait = (part.stat().st_size if part.exists() and tag.exists() else 0), WAIT * 2 ** attempt
        going_on = {"Range": f"bytes={have}-", "If-Range": tag.read_text()} if have else {}
        try:
            with requests.get(url, headers={"Accept-Encoding": "identity", **login, **going_on}, stream=True, timeout=30) as answer:
                code, problem = answer.status_code, f"HTTP {answer.status_code}"
                if code == 404:
                    raise FileNotFoundError(url)
                if code in (401, 403):
                    raise UserError(f"{url}: HTTP {code}. Set HF_TOKEN to a token that may read it.")
                if code in (200, 206):
                    total = answer.headers.get("Content-Range", "").rpartition("/")[2] or answer.headers.get("Content-Length", "")
                    same = answer.headers.get("ETag", "").removeprefix("W/") or answer.headers.get("Last-Modified", "")
                    tag.write_text(same) if same else tag.unlink(missing_ok=True)
                    with open(part, "ab" if code == 206 else "wb") as file, tqdm(total=int(total) if total.isdigit() else None, unit="B", unit_scale=True,
                                                                                initial=have if code == 206 else 0, desc="/".join(path.parts[-2:]), leave=False) as bar:
                        for block in answer.iter_content(1 << 16):
                            file.write(block)
                            bar.update(len(block))
                    size = part.stat().st_size
                    if not total.isdigit() or size == int(total):
                        tag.unlink(missing_ok=True)
                        os.replace(part, path)
                        return
                    problem = f"{size} bytes came, not {total}"
                    if size > int(total):
                        part.unlink()
                elif code == 416:
                    part.unlink(missing_ok=True)
                elif code in (408, 429) or code >= 500:
                    asked = answer.headers.get("Retry-After", "")
                    wait = min(float(asked), 120.0) if asked.isdigit() else wait
                else:
                    break
        except requests.RequestException as e:
            problem = first_line(e)
        if attempt < tries - 1:
            time.sleep(wait)
    raise UserError(f"{url}: could not be downloaded ({problem}). Run again to go on, or put the file at {path} yourself.")


def fetch(name: str, split: str) -> Path:
    """The FlashRAG file of a benchmark in the cache, downloaded if it is not there. split "test" takes dev where there is no test."""
    host = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    splits = ("test", "dev") if split == "test" else (split,)
    paths = [CACHE / name / f"{s}.jsonl" for s in splits]
    for path in paths:
        if path.exists():
            return path
    for path in paths:
        try:
            download(f"{host}/datasets/RUC-NLPIR/FlashRAG_datasets/resolve/main/{name}/{path.name}", path)
            return path
        except FileNotFoundError:
            continue
    raise UserError(f"{name} has no {' or '.join(splits)} split at {host}.")


def read_benchmark(name: str, split: str = "test") -> list[dict]:
    """All questions of a benchmark or file, as {"id", "question", "answers"} and, where known, "supporting", "hops", "data_source".

    Files: this project's jsonl, FlashRAG's jsonl, HotpotQA's and 2Wiki's json, MuSiQue's jsonl, the official IGPO parquet.
    """
    path = locate(f"demo/{split}.jsonl") if name == "demo" else str(fetch(name, split)) if name in BENCHMARKS else name
    if not Path(path).is_file():
        raise UserError(f"{path}: neither a file nor one of demo, {', '.join(BENCHMARKS)}.")
    try:
        if path.endswith(".parquet"):
            try:
                import pyarrow.parquet as parquet
            except ImportError:
                raise UserError(f"{path}: to read parquet, pip install pyarrow") from None
            raw = parquet.read_table(path).to_pylist()
        else:
            with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as file:
                head = next((line for line in file if line.strip()), "").strip()
                file.seek(0)
                if head.startswith("["):
                    raw = json.load(file)
                elif '"paragraphs"' in head and '"answers"' not in head:                # MuSiQue
                    raw = [json.loads(line) for line in file if line.strip()]
                else:
                    raw = load_questions(path)
    except (ValueError, OSError, EOFError, RecursionError, zlib.error) as e:
        raise UserError(f"{path}: cannot be read ({first_line(e)}).") from None
    answerable = [row for row in raw if not (isinstance(row, dict) and row.get("answerable") is False)]
    if len(answerable) < len(raw):
        print(f"{path}: {len(raw) - len(answerable)} questions marked unanswerable are left out.")
    rows, seen = [], {}
    for number, row in enumerate(answerable, 1):
        try:
            row = plain_question(row, number)
        except (AttributeError, KeyError, IndexError, TypeError) as e:
            raise UserError(f"{path}: question {number} is in no format I know ({e!r}).") from None
        if not row["question"] or not row["answers"]:
            raise UserError(f"{path}: question {number} has no {'answer' if row['question'] else 'text'}.")
        seen[row["id"]] = seen.get(row["id"], 0) + 1
        rows.append(row if seen[row["id"]] == 1 else {**row, "id": f"{row['id']}#{seen[row['id']]}"})    # an id names one question
    if not rows:
        raise UserError(f"{path}: no questions in it.")
    return rows


def plain_question(row: dict, number: int) -> dict:
    """A question of any of the formats in ours.

    >>> plain_question({"_id": "x", "question": "Who?", "answer": "Ann", "supporting_facts": [["Ann", 0], ["Bo", 1], ["Ann", 2]]}, 1)
    {'id': 'x', 'question': 'Who?', 'answers': ['Ann'], 'supporting': ['Ann', 'Bo']}
    """
    meta = row.get("metadata") or {}
    extra = row.get("extra_info") or {}
    if "reward_model" in row:                                                     # IGPO's parquet
        answers = str(row["reward_model"]["ground_truth"]).split("<|answer_split|>")
        question = next((m["content"] for m in reversed(row["prompt"]) if m["role"] == "user"), "")
    else:
        answers = row.get("answers") or row.get("golden_answers") or [row.get("answer") or "", *row.get("answer_aliases", [])]
        question = row.get("question") or ""
    facts = row.get("supporting_facts") or meta.get("supporting_facts") or []
    titles = (row.get("supporting")
              or (facts.get("title") if isinstance(facts, dict) else [fact[0] for fact in facts])
              or [p["title"] for p in row.get("paragraphs", []) if p.get("is_supporting")]
              or [(step.get("support_paragraph") or {}).get("title") for step in meta.get("question_decomposition") or [] if isinstance(step, dict)])
    name = row.get("id", row.get("_id", extra.get("index", number)))
    known = {"supporting": list(dict.fromkeys(t for t in titles if t)), "hops": row.get("hops"), "data_source": row.get("data_source")}
    return {"id": str(name), "question": question.strip(), "answers": [a for a in answers if isinstance(a, str) and a.strip()],
            **{key: value for key, value in known.items() if value}}


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
    "failed_searches": ("Failed", "%", "share of searches that came back with an error"),
    "recall": ("Recall", "%", "share of the supporting passages found by any search of the rollout, by id or title"),
    "belief_first": ("Before", "nats", "mean log-probability of the gold answer's tokens before the first turn (Eq. 3)"),
    "belief_last": ("After", "nats", "the same after the last search"),
    "entropy_reduction": ("After − before", "nats", "after minus before: what all searches together added (paper, Fig. 5)"),
    "gain_positive": ("Gain > 0", "%", "share of rollouts whose gains add up to more than 0"),
    "stop_answer": ("Answered", "%", "share that ended with an answer"),
    "stop_format": ("Format", "%", "share that broke the format"),
    "stop_length": ("Cut", "%", "share cut in the middle of a turn, or out of context"),
    "stop_turns": ("Turns up", "%", "share that still searched on the last turn"),
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
        "cover_em": (cover_em(answer, golds), 1), "turns": (len(turns), 1), "searches": (len(searches), 1), "tokens": (row["policy_tokens"], 1),
        "failed_searches": (sum(t["error"] is not None for t in searches), len(searches)),
        "recall": (sum(name_key(w) in found for w in wanted), len(wanted)),
        "belief_first": (first, known), "belief_last": (last, known), "entropy_reduction": (last - first, known), "gain_positive": (last > first, known),
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


def interval(value, replicates) -> dict:
    """{"value", "low", "high"}, or None where the metric is not known."""
    low, high = np.nanpercentile(replicates, [2.5, 97.5]) if not np.isnan(replicates).all() else (math.nan, math.nan)
    return {"value": float(value), "low": float(low), "high": float(high)} if math.isfinite(value) else None


def summarise(rows: list[dict], seed: int = 0) -> dict:
    """{benchmark: {"questions", "rollouts", metric: {"value", "low", "high"} or None}}, with "macro average" if there are several."""
    tables: dict[str, list] = {}
    for (benchmark, _), samples in by_question(rows).items():
        tables.setdefault(benchmark, []).append((question_metrics(samples), len(samples)))
    names = [name for name in METRICS if all(name in m for table in tables.values() for m, _ in table)]
    summary, values, replicates = {}, [], []
    for k, (benchmark, table) in enumerate(tables.items()):
        amounts, counts = (np.array([[m[name][part] for name in names] for m, _ in table], float) for part in (0, 1))
        with np.errstate(invalid="ignore"):
            values.append(amounts.sum(0) / counts.sum(0))
        replicates.append(bootstrap(amounts, counts, seed=seed + k))
        summary[benchmark] = {"questions": len(table), "rollouts": sum(n for _, n in table),
                              **{name: interval(v, r) for name, v, r in zip(names, values[-1], replicates[-1].T)}}
    if len(tables) > 1:     # unknown in one benchmark: the average is over the others
        known = np.isfinite(values)
        averages = [(np.mean([v[i] for v, ok in zip(values, known) if ok[i]]), np.mean([r[:, i] for r, ok in zip(replicates, known) if ok[i]], axis=0))
                    if known[:, i].any() else (math.nan, np.array([math.nan])) for i in range(len(names))]
        summary["macro average"] = {key: sum(s[key] for s in summary.values()) for key in ("questions", "rollouts")}
        summary["macro average"] |= {name: interval(*average) for name, average in zip(names, averages)}
    return summary


def compare(a: list[dict], b: list[dict], metric: str = "f1_paper", resamples: int = 10_000, seed: int = 0) -> list[dict]:
    """Is b better than a? One row per benchmark: means, difference with its interval, two-sided p, wins / ties / losses of b.

    Paired: both are judged on the questions that both answered, and a resample draws the same questions for both. p is twice
    the share of resamples in which the difference has the other sign or is 0 (paper, table 9).
    """
    figures = []
    for rows in (a, b):
        sums = {key: question_metrics(samples)[metric] for key, samples in by_question(rows).items()}
        figures.append({key: amount / count for key, (amount, count) in sums.items() if count})
    texts = [{key: samples[0]["question"] for key, samples in by_question(rows).items()} for rows in (a, b)]
    keys = [key for key in figures[0] if key in figures[1] and texts[0][key] == texts[1][key]]
    if not keys:
        raise UserError("--compare: the two have no question in common.")
    table, replicates = [], []

    def line(benchmark, va, vb, wins, ties, losses, n, draws):
        sides = [float(np.mean(draws <= 1e-12)), float(np.mean(draws >= -1e-12))]
        low, high = np.percentile(draws, [2.5, 97.5])
        table.append({"benchmark": benchmark, "questions": n, "a": va, "b": vb, "difference": vb - va, "low": float(low), "high": float(high),
                      "p": min(1.0, max(2 * min(sides), 1 / resamples)), "win": wins, "tie": ties, "loss": losses})
    for k, benchmark in enumerate(dict.fromkeys(key[0] for key in keys)):
        pair = np.array([(figures[0][key], figures[1][key]) for key in keys if key[0] == benchmark])
        gap = pair[:, 1] - pair[:, 0]
        replicates.append(bootstrap(gap[:, None], np.ones((len(gap), 1)), resamples, seed + k)[:, 0])
        wins, losses = int((gap > 1e-9).sum()), int((gap < -1e-9).sum())
        line(benchmark, *map(float, pair.mean(0)), wins, len(gap) - wins - losses, losses, len(gap), replicates[-1])
    if len(table) > 1:
        line("macro average", *(mean(row[key] for row in table) for key in "ab"), *(sum(row[key] for row in table) for key in ("win", "tie", "loss", "questions")),
             np.mean(replicates, axis=0))
    return table


# ---- running ---------------------------------------------------------------------------------------------------------

EPISODE = ("model", "search", "search_cache", "seed", "max_turns", "max_new_tokens", "top_k", "max_info_tokens", "temperature", "gain", "belief", "dtype",
           "rollout_batch", "batch_tokens")                            # the fields of igpo.Config that an evaluation has
INHERITED = ("model", "search", "max_turns", "max_new_tokens", "top_k", "max_info_tokens", "gain", "belief")   # .. and takes from a run


@torch.no_grad()
def closed_book(model, tokenizer, rollouts: list[Rollout], cfg: Config) -> Iterator[Rollout]:
    """As igpo.finish, without search: the policy is made to answer at once, under the very words that its belief is read under."""
    lm, schema = unwrap(model), encode(tokenizer, SCHEMA)
    eos = lm.generation_config.eos_token_id
    eos = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    sampling = GenerationConfig(do_sample=cfg.temperature > 0, temperature=cfg.temperature or 1.0, top_k=0, top_p=1.0, max_new_tokens=cfg.max_new_tokens,
                                pad_token_id=tokenizer.pad_token_id, eos_token_id=sorted(eos))
    for first in range(0, len(rollouts), cfg.rollout_batch):
        batch = rollouts[first:first + cfg.rollout_batch]
        for r in batch:
            r.write(schema, False, 0)
        ids, seen = left_pad([r.ids for r in batch], tokenizer.pad_token_id, lm.device)
        end = TurnEnd(tokenizer, ids.shape[1], len(batch), eos)
        theirs, lm.generation_config = lm.generation_config, sampling
        try:
            out = lm.generate(ids, attention_mask=seen, generation_config=sampling, stopping_criteria=StoppingCriteriaList([end]))
        finally:
            lm.generation_config = theirs
        for r, row, length, done in zip(batch, out[:, ids.shape[1]:].tolist(), end.length, end.done):
            r.write(row[:length], True, 0)
            text, closed, _ = tokenizer.decode(row[:length]).partition("</answer>")
            r.stop = "answer" if closed and text.strip() and not TAG.search(text) else "format" if done else "length"
            r.answer = text.strip() if r.stop == "answer" else None
        yield from batch


def fingerprint(path: str) -> str:
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


def adapter_folder(path: str) -> Path:
    """Where the adapter of a run (or a plain PEFT folder) lies."""
    folder = next((f for f in (Path(path) / "checkpoint", Path(path) / "checkpoint.old", Path(path)) if (f / "adapter_config.json").is_file()), None)
    if folder is None:
        raise UserError(f"--adapter {path}: no checkpoint/adapter_config.json in it. Is it a run folder?")
    return folder


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
    cfg = Config(**{"temperature": 0.0 if args.n == 1 else 1.0, "group": 1, "gradient_checkpointing": False, **base, **given})
    if args.n > 1 and cfg.temperature <= 0:
        raise UserError("--n samples of a greedy rollout are all alike: give a --temperature above 0.")
    for name, bound in {"max_turns": 1, "max_new_tokens": 1, "top_k": 1, "rollout_batch": 1, "temperature": 0}.items():
        if getattr(cfg, name) < bound:
            raise UserError(f"--{name} must be at least {bound}.")
    strange = [name for name in args.benchmark if name != "demo"]
    if strange and cfg.search == Config().search and "search" not in given and not args.no_search:
        raise UserError(f"--search: the demo's corpus knows nothing of {strange[0]}. Say where to search, see search_tool.py, or --no_search.")
    return cfg


def load_questions_of(args: argparse.Namespace, cfg: Config) -> tuple[dict[str, list[dict]], dict[str, dict]]:
    """{benchmark: questions} and, for the report, {benchmark: what was taken of what}."""
    chosen, notes = {}, {}
    for name in args.benchmark:
        rows = read_benchmark(name)
        label = name if name in BENCHMARKS or name == "demo" else Path(name).stem
        for source in dict.fromkeys(row.get("data_source", label) for row in rows):       # the official parquet holds several benchmarks
            part = [row for row in rows if row.get("data_source", label) == source]
            while source in chosen:
                source += "'"
            chosen[source] = sample(part, args.limit, cfg.seed)
            text = json.dumps([[q["id"], q["question"], q["answers"]] for q in chosen[source]], ensure_ascii=False)
            few = len(chosen[source]) < len(part)
            notes[source] = {"questions": f"{len(chosen[source])} of {len(part)}, drawn with seed {cfg.seed}" if few else f"all {len(part)}",
                             "sha256": hashlib.sha256(text.encode()).hexdigest()[:16]}
    return chosen, notes


def result_folder(args: argparse.Namespace, cfg: Config, settings: dict) -> Path:
    """--out, or results/<name>: the first that is free or was begun with these very settings (then it is gone on with)."""
    name = args.adapter or locate(cfg.model)
    name = os.path.basename(os.path.abspath(name)) if Path(name).exists() else name.replace("/", "-")
    name += "-closed-book" * args.no_search + f"-n{args.n}" * (args.n > 1)
    for k in range(1, 10_000):
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
    raise UserError("results: too many folders of that name. Give --out.")


def plan(args: argparse.Namespace) -> tuple:
    """(config, settings, folder made for the results, names of the benchmarks, rows that are there, [(name, question, sample), ..] still to be run)."""
    cfg = load_config(args)
    chosen, notes = load_questions_of(args, cfg)
    corpus = locate(cfg.search.removeprefix("bm25:")) if cfg.search.startswith("bm25:") else ""
    adapter = adapter_folder(args.adapter) if args.adapter else None
    settings = {**{name: getattr(cfg, name) for name in EPISODE if name not in ("rollout_batch", "batch_tokens", "search_cache")},
                "adapter": args.adapter, "no_search": args.no_search, "n": args.n, "benchmarks": notes,
                "fingerprints": {"model": fingerprint(locate(cfg.model)), "adapter": fingerprint(adapter) if adapter else "",
                                 "corpus": fingerprint(corpus) if corpus and not args.no_search else ""}}
    out = result_folder(args, cfg, settings)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "config.json", json.dumps(settings, indent=1) + "\n")
    log = out / "rollouts.jsonl"
    rows = read_jsonl(log) if log.exists() else []
    if log.exists():
        write_whole(log, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))          # without a line that was cut
    done = {(row["benchmark"], row["id"], row["sample"]) for row in rows}
    todo = [(name, q, k) for name, questions in chosen.items() for q in questions for k in range(args.n) if (name, q["id"], k) not in done]
    print(f"{len(done) + len(todo)} rollouts on {', '.join(name + ' (' + note['questions'] + ')' for name, note in notes.items())}"
          + f"; {len(done)} of them are there already" * bool(done) + f". Results go to {out}.", flush=True)
    return cfg, settings, out, list(chosen), rows, todo


def evaluate(args: argparse.Namespace) -> Path:
    """Run what is still to be run, then write figures and page. Under torchrun each process plays its share; the first one plans and writes.

    What is cut is played again. Of samples (--n) that favours short rollouts a little: they are the ones that had ended.
    """
    join_processes()
    rank, processes = process()
    if rank:
        sys.stdout = open(os.devnull, "w")
    (cfg, settings, out, names, rows, todo), = gathered([] if rank else [plan(args)])
    if todo:
        search = None if args.no_search else open_run_search(cfg)
        model, tokenizer = load_model(cfg, adapter=args.adapter) if args.adapter else load_model(cfg)
        mine = todo[rank::processes]
        begun = [begin(tokenizer, q["question"]) for _, q, _ in mine]
        task_of, total = {id(r): task for r, task in zip(begun, mine)}, len(rows) + len(todo)
        torch.manual_seed(cfg.seed + len(rows) + 10**6 * rank)                      # gone on with, it must not draw the same numbers again
        ended = closed_book(model, tokenizer, begun, cfg) if args.no_search else finish(model, tokenizer, begun, search, cfg)
        with (open(os.devnull if rank else out / "rollouts.jsonl", "a", encoding="utf-8") as file,
              tqdm(total=total, initial=len(rows), unit="rollout", dynamic_ncols=True, disable=bool(rank)) as bar):
            while len(rows) < total:
                rollouts = list(islice(ended, cfg.rollout_batch))
                part = [task_of[id(r)] for r in rollouts]
                _, beliefs = score(model, tokenizer, rollouts, [q["answers"] for _, q, _ in part], cfg)
                new = gathered([{"benchmark": name, "sample": k, **record(tokenizer, r, q, b, gain=cfg.gain)} for (name, q, k), r, b in zip(part, rollouts, beliefs)])
                searches = [turn for row in new for turn in row["turns"] if turn["query"] is not None]
                errors = [turn["error"] for turn in searches if turn["error"]]
                if len(errors) > cfg.max_failed_searches * len(searches):
                    raise UserError(f"{len(errors)} searches failed ({errors[-1]}). Stopped; when the search works again, the same command goes on.")
                rows += new
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in new)
                file.flush()
                bar.set_postfix_str(f"F1 {100 * mean(row['f1'] for row in rows):.1f}, EM {100 * mean(row['em'] for row in rows):.1f}", refresh=False)
                bar.update(len(new))
    if rank:
        return out
    rows.sort(key=lambda row: (names.index(row["benchmark"]), row["id"], row["sample"]))
    summary = summarise(rows)
    code = {file.name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in (HERE / "igpo.py", HERE / "search_tool.py", Path(__file__))}
    versions = {"python": platform.python_version(), **{m.__name__: m.__version__ for m in (torch, transformers, peft, np)}, **code}
    write_whole(out / "results.json", json.dumps({"results": summary, "settings": settings, "versions": versions}, indent=1) + "\n")
    write_whole(out / "results.md", markdown(summary, settings))
    write_report(out / "report.html", out.name, describe(settings), rows, summary)
    print("\n" + markdown(summary, settings) + f"\nTo read the rollouts, open {out / 'report.html'}")
    return out


# ---- what people look at ---------------------------------------------------------------------------------------------

SCORES = ("f1_paper", "em_paper", "f1_squad", "em_squad", "cover_em", "pass_f1", "pass_em")


def cell(figure: dict | None, unit: str, spread: bool) -> str:
    """A figure as text; spread: with its interval."""
    if figure is None:
        return "–"
    scale, digits = {"%": (100, 1), "#": (1, 0)}.get(unit, (1, 2))
    value, low, high = (f"{scale * figure[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]" if spread else value


def tables(summary: dict) -> list[tuple[str, list[list[str]]]]:
    """(caption, rows of cells, the heading first): scores with intervals, then behaviour."""
    known = [name for name in METRICS if any(name in row for row in summary.values())]
    count = [("Questions", [f"{row['questions']:,}" for row in summary.values()])]
    columns = [[(METRICS[n][0], [cell(row[n], METRICS[n][1], scores) for row in summary.values()]) for n in known if (n in SCORES) == scores] for scores in (True, False)]
    return [(caption, [["", *(heading for heading, _ in table)], *map(list, zip(summary, *(cells for _, cells in table)))])
            for caption, table in (("Scores in %, with 95 % bootstrap intervals", count + columns[0]),
                                   ("Behaviour: shares in %, belief in the gold answer in nats per token, share of each ending in %", columns[1]))]


def markdown_table(rows: list[list[str]]) -> str:
    rows = [[c.replace("|", "\\|") for c in row] for row in rows]
    rule = ["---"] + ["---:"] * (len(rows[0]) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])


def describe(settings: dict) -> dict[str, str]:
    """Settings of an evaluation in the few words that a reader needs."""
    facts = {"Model": settings["model"], "Adapter": settings["adapter"] or "none",
             "Questions": "; ".join(f"{name}: {note['questions']}" for name, note in settings["benchmarks"].items()),
             "Search": "none: closed book, made to answer at once" if settings["no_search"] else f"{settings['search']}, {settings['top_k']} passages",
             "Episode": f"up to {settings['max_turns']} turns of {settings['max_new_tokens']} tokens",
             "Decoding": f"temperature {settings['temperature']:g}" if settings["temperature"] else "greedy"}
    if settings["n"] > 1:
        facts["Decoding"] += f", {settings['n']} samples a question: figures are means over samples"
    return facts


def markdown(summary: dict, settings: dict) -> str:
    facts = "\n".join(f"- {key}: {value}" for key, value in describe(settings).items())
    return "\n\n".join([facts, *(f"{caption}:\n\n{markdown_table(rows)}" for caption, rows in tables(summary))]) + "\n"


def page_data(title: str, facts: dict, rows: list[dict], summary: dict, note: str = "") -> dict:
    """What report.html shows. Passages are kept once, however often they were found."""
    passages: dict[tuple, int] = {}
    num = lambda x, digits=4: round(x, digits) if isinstance(x, (int, float)) and math.isfinite(x) else None      # JSON has no NaN

    def show(row):
        gold = {name_key(s) for s in row.get("supporting") or []}
        turns = []
        for turn in row["turns"]:
            found = [[passages.setdefault((p["id"], p["title"], p["text"]), len(passages)), num(p["score"], 2), int(bool(gold & {name_key(p["id"]), name_key(p["title"])}))]
                     for p in turn["passages"]]
            turns.append({"text": turn["text"], "query": turn["query"], "found": found, "error": turn["error"], "gain": num(turn["gain"]), "return": num(turn["return"])})
        return {"benchmark": row.get("benchmark", ""), "id": row["id"], "question": row["question"], "answers": row["answers"], "answer": row["answer"],
                "step": row.get("step"), "sample": row.get("sample", 0), "stop": row["stop"], "f1": num(row["f1"]), "em": row["em"],
                "beliefs": [num(b) for b in row["beliefs"]], "tokens": row["policy_tokens"], "turns": turns}
    shown = [show(row) for row in rows]
    return {"title": title, "facts": facts, "note": note, "tables": tables(summary), "help": {METRICS[n][0]: METRICS[n][2] for n in METRICS},
            "rows": shown, "passages": [list(p) for p in passages]}


def write_report(path: Path, title: str, facts: dict, rows: list[dict], summary: dict, limit: int = 4000) -> None:
    """One self-contained page. It may load nothing and run nothing but its own script; data is only ever shown as text."""
    note, key = "", lambda row: ("" if row.get("step") else row.get("benchmark"), row["id"])
    if len(rows) > limit:      # whole questions, those of most steps first: these can be compared
        steps, kept, left = {}, set(), limit
        for row in rows:
            steps.setdefault(key(row), []).append(row.get("step"))
        for name in sorted(steps, key=lambda name: -len(set(steps[name]))):
            if len(steps[name]) <= left:
                kept.add(name)
                left -= len(steps[name])
        total, rows = len(rows), [row for row in rows if key(row) in kept]
        note = f"The tables count all {total:,} rollouts, the list holds {len(rows):,} of them, whole questions each."
    data = json.dumps(page_data(title, facts, rows, summary, note), ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    page = (HERE / "docs" / "report_template.html").read_text(encoding="utf-8")
    allow = "; ".join(f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(re.search(f'<{tag}>(.*?)</{tag}>', page, re.DOTALL)[1].encode()).digest()).decode()}'"
                      for tag in ("style", "script"))
    fill = {"@TITLE@": html.escape(title), "@CSP@": f"default-src 'none'; {allow}; base-uri 'none'; form-action 'none'", "@DATA@": data}
    write_whole(path, re.sub("|".join(fill), lambda slot: fill[slot[0]], page))


def report(run: str) -> Path:
    """report.html for a folder with a rollouts.jsonl: of an evaluation, or of a training run (figures by tenths of the run)."""
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    rows = read_jsonl(folder / "rollouts.jsonl")
    if not rows:
        raise UserError(f"{folder}/rollouts.jsonl: no rollouts in it.")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) if (folder / "config.json").is_file() else {}
    if rows[0].get("step") is None:
        facts = describe(config) if "benchmarks" in config else {}
    else:
        last = max(row["step"] for row in rows)
        tenth = max(1, math.ceil(last / 10))
        for row in rows:
            start = (row["step"] - 1) // tenth * tenth + 1
            row["benchmark"] = f"step {start}" if tenth == 1 else f"steps {start}–{min(start + tenth - 1, last)}"
        facts = {"Training run": folder.name, "Steps": str(last), **{key: str(config[key]) for key in ("model", "credit", "norm", "gain", "search", "seed") if key in config}}
    summary = summarise(rows)
    if rows[0].get("step") is not None:
        summary.pop("macro average", None)                                             # steps are not benchmarks
    write_report(folder / "report.html", folder.name, facts, rows, summary)
    return folder / "report.html"


# ---- training curves -------------------------------------------------------------------------------------------------

PANELS = (("dev F1 against steps", "step", "eval_f1"), ("dev F1 against tokens trained on", "tokens", "eval_f1"),
          ("groups without signal", "step", "no_signal"), ("belief gained by the searches of a rollout (nats)", "step", "belief_gain"))


def read_run(folder: str) -> tuple[dict, list[dict]]:
    """(config, rows of metrics.jsonl) with what the plots need added: tokens trained on so far, belief_gain."""
    rows, tokens = read_jsonl(Path(folder) / "metrics.jsonl"), 0
    for row in rows:
        tokens += row.get("policy_tokens", 0)
        row["tokens"] = tokens
        if "belief_last" in row:
            row["belief_gain"] = row["belief_last"] - row["belief_first"]
    try:
        return json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")), rows
    except (OSError, ValueError) as e:
        raise UserError(f"{folder}/config.json: cannot be read ({first_line(e)}).") from None


def curves(runs: list[tuple[dict, list[dict]]]) -> dict[str, dict]:
    """{label: {"seeds", metric: [(step, tokens, mean, low, high), ..]}}: runs that differ in the seed alone are one setting.

    Mean, least and greatest over the seeds, at the steps that all of them have. A label says in what the settings differ.
    """
    ignored = {"seed", "out", "resume", "steps", "save_every", "show_every"}
    differ = sorted(key for key in {k for config, _ in runs for k in config} - ignored if len({json.dumps(config.get(key)) for config, _ in runs}) > 1)
    groups: dict[str, list] = {}
    for config, rows in runs:
        groups.setdefault(", ".join(str(config.get(key)) if key == "credit" else f"{key} {config.get(key)}" for key in differ) or config.get("credit", "run"), []).append(rows)
    result = {}
    for label, seeds in groups.items():
        result[label] = {"seeds": len(seeds)}
        for metric in ("eval_f1", "no_signal_outcome", "no_signal_igpo", "belief_gain"):
            at = [{row["step"]: row for row in rows if row.get(metric) is not None} for rows in seeds]
            result[label][metric] = [(step, mean(rows[step]["tokens"] for rows in at), *spread([rows[step][metric] for rows in at]))
                                     for step in sorted(set.intersection(*map(set, at)))]
    return result


def spread(values: list[float]) -> tuple[float, float, float]:
    return mean(values), min(values), max(values)


def plot(folders: list[str], path: str):
    """Dev F1 by steps and tokens (paper, Fig. 6), groups without signal (Fig. 1), belief gain (Fig. 5). Returns the figure."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), constrained_layout=True)
    for axis, (title, x, metric) in zip(axes.flat, PANELS):
        axis.set_title(title, loc="left", fontsize=11)
        axis.set_xlabel("tokens written by the policy and trained on" if x == "tokens" else "step")
        axis.grid(alpha=.25)
        axis.spines[["top", "right"]].set_visible(False)
        if metric == "no_signal":
            axis.set_ylim(-.02, 1.02)
    for k, (label, series) in enumerate(curves([read_run(f) for f in folders]).items()):
        seeds = f" ({series['seeds']} seeds, band: least to greatest)" if series["seeds"] > 1 else ""
        for axis, (_, x, metric) in zip(axes.flat, PANELS):
            for name, style, suffix in ((("no_signal_outcome", "--", ", outcome only"), ("no_signal_igpo", "-", ", with gains")) if metric == "no_signal" else ((metric, "-", seeds),)):
                if series[name]:
                    step, tokens, middle, low, high = zip(*series[name])
                    axis.plot(tokens if x == "tokens" else step, middle, style, color=f"C{k}", label=label + suffix, marker="o" if len(step) < 2 else None)
                    if series["seeds"] > 1:
                        axis.fill_between(tokens if x == "tokens" else step, low, high, color=f"C{k}", alpha=.18, linewidth=0)
    for axis in axes.flat:
        if axis.lines:
            axis.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    return figure


# ---- command line ----------------------------------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--benchmark", nargs="+", default=["demo"], metavar="NAME_OR_FILE", help=f"demo, {', '.join(BENCHMARKS)}, all (these seven), or files")
    parser.add_argument("--adapter", default="", help="run folder (or PEFT folder) whose adapter is evaluated; model and episode come from its config.json")
    parser.add_argument("--limit", type=int, default=0, help="questions drawn from each benchmark with --seed; 0: all")
    parser.add_argument("--n", type=int, default=1, help="samples a question, for mean@n and pass@n; above 1 the temperature is 1 unless given")
    parser.add_argument("--no_search", action="store_true", help="closed book: the policy is made to answer at once")
    parser.add_argument("--out", default="", help="folder of the results; empty: results/<name>")
    for f in fields(Config):
        if f.name in EPISODE:
            note = {"temperature": "sampling temperature; 0, greedy, unless --n is above 1", "seed": "seed of the questions drawn and of the sampling"}.get(f.name)
            parser.add_argument(f"--{f.name}", type=type(f.default), default=argparse.SUPPRESS, help=note or f"{f.metadata['help']} ({f.default!r})",
                                **{k: v for k, v in f.metadata.items() if k == "choices"})
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two result folders: is B better than A?")
    parser.add_argument("--metric", default="f1_paper", choices=[m for m in METRICS if not m.startswith("pass_")], help="what --compare compares (f1_paper)")
    parser.add_argument("--report", metavar="FOLDER", help="write report.html for the rollouts.jsonl of a training run or of results")
    parser.add_argument("--plot", nargs="+", metavar="RUN", help="training curves of these run folders")
    parser.add_argument("-o", default="curves.png", metavar="FILE", help="where --plot draws them (curves.png)")
    parser.error = lambda message: parser.exit(2, f"eval: {' '.join(message.split())}; --help lists the options\n")
    args = parser.parse_args(argv)
    args.benchmark = list(dict.fromkeys(b for name in args.benchmark for b in (BENCHMARKS if name == "all" else (name,))))
    try:
        if args.n < 1 or args.limit < 0:
            raise UserError("--n must be at least 1 and --limit at least 0.")
        if args.compare:
            a, b = (read_jsonl(Path(folder) / "rollouts.jsonl") for folder in args.compare)
            heading, unit, _ = METRICS[args.metric]
            scale = 100 if unit == "%" else 1
            rows = [["", "Questions", *args.compare, "difference", "95 % interval", "p", "win / tie / loss"]]
            for row in compare(a, b, args.metric):
                p = "< 0.001" if row["p"] < .001 else f"{row['p']:.3f}"
                rows.append([row["benchmark"], str(row["questions"])] + [f"{scale * row[k]:.2f}" for k in "ab"] + [f"{scale * row['difference']:+.2f}",
                            f"[{scale * row['low']:+.2f}, {scale * row['high']:+.2f}]", p, f"{row['win']} / {row['tie']} / {row['loss']}"])
            print(f"{heading}{' in %' if scale == 100 else ''}: {args.compare[1]} against {args.compare[0]}\n\n{markdown_table(rows)}")
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
    sys.exit(main())
