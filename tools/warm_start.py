"""Teach a model the format before igpo.py trains it: imitation of scripted rollouts.

    python -m tools.warm_start --model MODEL --data FOLDER --out warm
    python igpo.py --model warm --data FOLDER
    python igpo.py --model MODEL --init_adapter warm/adapter --data FOLDER       # the same

Small models often break the format of igpo.INSTRUCTION at temperature 1. If no rollout of a group is whole,
no outcome differs and no search gains: there is nothing to learn from. This makes up for it, and leaves the
searching for igpo.py to improve.

What is imitated is made from questions with supporting passages (--data: train.jsonl and corpus.jsonl). The
script looks up one supporting passage after the other, by its name if question or passages so far tell it,
else by words of the question; then it answers with the gold. Some rollouts (--wrong) begin with a sloppy
search, for two words of the question. What searches bring is what they really bring.

The loss is that of igpo.py with an advantage of 1 for every token that the script wrote. Where all ratios are
1, as they are here, its gradient is that of maximum likelihood.

All options of igpo.py are understood. Here --questions is the number of scripted rollouts in a step, and
--group how often each dev question is sampled to see what was learned. Written: <out>/adapter, a PEFT folder;
<out>, the model with the adapter merged, a folder like any other; <out>/warm_start.json, what the dev
questions said before and after.
"""
import argparse
import copy
import json
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig

import igpo
from igpo import Config, Rollout, encode, unwrap
from search_tool import (Passage, UserError, clean_query, f1_score, load_questions, open_search,
                         read_passages)

DEFAULTS = {"out": "warm", "steps": 60, "lr": 3e-4, "questions": 8, "group": 4}

def teachable(questions: list[dict], corpus: str) -> list[tuple[dict, list[Passage]]]:
    """The questions whose supporting passages the corpus holds, by id or title, with these."""
    wanted, held = {name for q in questions for name in q["supporting"]}, {}
    for p in read_passages(corpus):
        for name in {p.id, p.title} & wanted:
            held.setdefault(name, p)
    found = [(q, [held[name] for name in q["supporting"]]) for q in questions
             if q["supporting"] and set(q["supporting"]) <= set(held)]
    if not found:
        raise UserError(f"no training question has supporting passages that {corpus} holds")
    return found

def turn_text(query: str) -> str:
    """A turn that searches, in the form that igpo.INSTRUCTION shows."""
    return f"\nI need to find out about {query}.\n</think>\n<search>\n{query}\n</search>"

def scripted_rollout(tokenizer, question: dict, supporting: list[Passage], search, context: int, cfg: Config,
                     rng: random.Random, wrong: float) -> Rollout:
    """A rollout by the script. If it does not fit the turns or the model, its stop is not "answer"."""
    r, left, read = igpo.begin(tokenizer, question["question"]), list(supporting), question["question"]
    name = lambda p: re.sub(r"\s*\(.*\)$", "", p.title) or p.title      # of "Oss (town)": "Oss"
    asked = False       # by words of the question
    words = [w for w in re.findall(r"\w+", read) if len(w) > 3] or [read]
    sloppy = rng.random() < wrong and len(left) + 1 < cfg.max_turns
    while not r.stop:
        if sloppy and not r.queries:
            query = " ".join(rng.sample(words, min(2, len(words))))
        elif left:
            left.sort(key=lambda p: name(p).lower() not in read.lower())    # first those that have been named
            told = asked or name(left[0]).lower() in read.lower()
            query, asked = name(left.pop(0)) if told else " ".join(words), asked or not told
        else:
            answer = encode(tokenizer, igpo.SCHEMA) + encode(tokenizer, question["answers"][0].strip(), True)
            igpo.take_turn(r, answer + encode(tokenizer, "\n</answer>"), True, tokenizer, cfg)
            continue
        igpo.take_turn(r, encode(tokenizer, turn_text(clean_query(query))), True, tokenizer, cfg)
        if not r.stop:
            found = search.search(r.queries[-1], cfg.passages)
            igpo.take_results(r, found, context, tokenizer, cfg)
            read += " ".join(f" {p.title} {p.text}" for p in r.retrieved[-1])
            left = [p for p in left if p.id not in {shown.id for shown in r.retrieved[-1]}]
    return r

def imitate(model, tokenizer, lessons: list, search, cfg: Config, wrong: float) -> None:
    """cfg.steps steps of maximum likelihood, with a learning rate that falls to 0."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, weight_decay=0.0)
    rng, context = random.Random(cfg.seed), igpo.context_length(unwrap(model))
    for step in range(1, cfg.steps + 1):
        rollouts = [scripted_rollout(tokenizer, *lesson, search, context, cfg, rng, wrong)
                    for lesson in igpo.step_questions(lessons, step, cfg)]
        whole = [r for r in rollouts if r.stop == "answer"]
        if not whole:
            raise UserError("no scripted rollout fits. More --max_turns, or less --max_info_tokens")
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * (1 - (step - 1) / cfg.steps)
        old, _ = igpo.score(model, tokenizer, whole, None, cfg)
        ones = [[1.0] * len(r.boundaries) for r in whole]
        stats = igpo.update(model, optimizer, whole, old, old, ones, cfg)[0]
        left_out = f"  {len(rollouts) - len(whole)} did not fit" if len(whole) < len(rollouts) else ""
        print(f"step {step:4}  nats a token {stats['entropy'] / stats['tokens']:.3f}{left_out}", flush=True)

def examine(model, tokenizer, questions: list[dict], search, cfg: Config) -> dict:
    """What sampled rollouts are like. The format is kept by those that answer, or search to the end."""
    torch.manual_seed(cfg.seed)
    rollouts = igpo.rollout(model, tokenizer, questions, search, cfg)
    asked = [q["answers"] for q in questions for _ in range(cfg.group)]
    scores = [f1_score(r.answer, golds) for r, golds in zip(rollouts, asked)]
    found = {"format_kept": igpo.mean(r.stop in ("answer", "turns") for r in rollouts),
             "answered": igpo.mean(r.stop == "answer" for r in rollouts), "f1": igpo.mean(scores),
             "searches": igpo.mean(len(r.queries) for r in rollouts)}
    print(f"{len(rollouts)} sampled rollouts on {len(questions)} dev questions: format kept "
          f"{found['format_kept']:.0%}, answered {found['answered']:.0%}, F1 {found['f1']:.3f}, "
          f"{found['searches']:.1f} searches a rollout", flush=True)
    return found

def save(model, tokenizer, generation, cfg: Config, adapter_only: bool) -> None:
    """The adapter, and the model with it merged, its settings being those it came with and not igpo.py's."""
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    igpo.save_adapter(model, out / "adapter")
    if not adapter_only:
        lm = model.merge_and_unload()
        lm.generation_config = generation
        file = {"gguf_file": Path(cfg.model).name} if cfg.model.endswith(".gguf") else {}
        came = AutoConfig.from_pretrained(lm.config.name_or_path, **file).get_text_config()
        for name in ("max_position_embeddings", "sliding_window"):      # igpo.make_exact() has changed these
            if hasattr(came, name):
                setattr(lm.config.get_text_config(), name, getattr(came, name))
        lm.save_pretrained(out)
        tokenizer.save_pretrained(out)

def warm_start(cfg: Config, wrong: float, dev_questions: int, adapter_only: bool) -> dict:
    """The whole of it; returns what is written to warm_start.json."""
    read = lambda name: load_questions(igpo.locate(getattr(cfg, name) or f"{cfg.data}/{name}.jsonl"))
    corpus = igpo.locate(f"{cfg.data}/corpus.jsonl")
    lessons, dev = teachable(read("train"), corpus), read("dev")[:dev_questions]
    search = open_search(cfg.search or f"bm25:{corpus}", cfg.search_cache)
    model, tokenizer = igpo.load_model(cfg)
    igpo.check_questions(model, tokenizer, [q for q, _ in lessons] + dev, cfg)
    generation = copy.deepcopy(unwrap(model).generation_config)         # play() puts another in its place
    print(f"{cfg.model}: {cfg.steps} steps of {cfg.questions} rollouts, {len(lessons)} questions", flush=True)
    before = examine(model, tokenizer, dev, search, cfg)
    imitate(model, tokenizer, lessons, search, replace(cfg, minibatches=1), wrong)
    after = examine(model, tokenizer, dev, search, cfg)
    save(model, tokenizer, generation, cfg, adapter_only)
    options = {name: getattr(cfg, name) for name in ("model", "data", "steps", "questions", "lr", "seed")}
    return {**options, "wrong": wrong, "before": before, "after": after}

def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="warm_start", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wrong", type=float, default=0.3, help="share of sloppy first searches (0.3)")
    parser.add_argument("--dev_questions", type=int, default=20, help="dev questions to look at (20)")
    parser.add_argument("--adapter_only", action="store_true", help="write no merged model")
    own, rest = parser.parse_known_args(argv)
    try:
        cfg = igpo.parse_config([f"--{name}={value}" for name, value in DEFAULTS.items()] + rest)
        if cfg.resume:
            raise UserError("--resume: a warm start is made in one go")
        said = warm_start(cfg, **vars(own))
        (Path(cfg.out) / "warm_start.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        print(f"written to {cfg.out}")
    except (UserError, torch.OutOfMemoryError) as e:
        print(f"warm_start: {e}", file=sys.stderr)
        return 2
    return 0

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")           # any script, on a terminal that knows one
    sys.exit(main())
