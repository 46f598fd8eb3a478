"""IGPO in one file: train a language-model agent that searches over several turns.

Information Gain-based Policy Optimization (Wang et al., arXiv 2510.14967 v2, ICLR 2026). Equation numbers below are theirs.

The policy answers a question in turns. A turn is *think, then search*, or, the last one, *think, then answer*:

    prompt <think> .. </think> <search> query </search>   <information> passages </information>
           <think> .. </think> <answer> words </answer>

  1. rollout()       sample G rollouts for each question; that is one group.
  2. score()         after every turn ask the policy itself, by teacher forcing, how likely the gold answer has become:
                     the belief b_t (Eq. 3). The same forward gives the old log-probs of the sampled tokens.
  3. info_gains()    the reward of turn t is what its search added: r_t = b_t - b_{t-1} (Eq. 4). The last turn's reward is
                     the F1 of the answer (Eq. 2).
  4. turn_returns()  both kinds normalised within the group (Eq. 5), then summed from each turn to the end (Eq. 6).
  5. policy_loss()   PPO-clip with a KL to the reference, on the tokens the policy wrote (Eq. 7).

Where we depart from the paper on purpose (the README compares paper, official code and this file):
  1. The environment opens `<think>` at every turn, so that the belief is read under the very schema the policy answers in.
  2. The belief is that of the first gold alias, cut at 32 tokens; F1 takes the best alias.
  3. LoRA instead of full fine-tuning: the reference policy is the same model with its adapter switched off.
  4. Any rollout without an answer gets the format penalty (broken format, cut short, no turn left); it keeps the gains of the turns before.
  5. The belief is read at the sampling temperature, and its probe ends with the gold's last token.
  6. Gains are in probability, pooled per turn index, and neither they nor the outcomes are divided by their spread: see
     `turn_rewards`. The paper's own variants are --gain logprob --norm separate (v2) and --gain prob --norm joint (v1).

    python igpo.py                                        the embedded demo: offline, on a laptop
    python igpo.py --model Qwen2.5-1.5B-Instruct          the same program on a GPU
    torchrun --nproc_per_node 4 igpo.py --model ..        on four: each takes its share of a step's questions
    python igpo.py --explain                              Eq. 2-7 on one question, with the numbers that occur
    python igpo.py --check --model .. --train ..          before a long run: do model, data and search meet training's assumptions?
"""
from __future__ import annotations

import argparse
import contextlib
import fcntl
import gzip
import hashlib
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import string
import sys
import time
import unicodedata
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import lru_cache
from itertools import accumulate, count, takewhile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig, StoppingCriteria,
                          StoppingCriteriaList)
from transformers.cache_utils import Cache, DynamicLayer
from transformers.utils import logging as transformers_logging

from search_tool import Passage, SearchError, checksum, clean_query, clean_text, open_search

HERE = Path(__file__).resolve().parent
transformers_logging.disable_progress_bar()
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")      # PEFT's call, not ours


# ---- configuration ---------------------------------------------------------------------------------------------------

def option(default, text: str, least: float | None = None, choices: list[str] | None = None):
    """A field of Config: its default, its line of --help, the least value it may have, or the values it may have."""
    return field(default=default, metadata={"help": text, "least": least, **({"choices": choices} if choices else {})})


@dataclass
class Config:
    """Every option. `python igpo.py --help` is made from this; the values in force are saved as config.json."""
    # what to train, and on what
    model: str = option("", "hub id, bare name (Qwen2.5-1.5B-Instruct), folder or .gguf file; empty: demo/policy")
    train: str = option("demo/train.jsonl", "training questions: jsonl, or benchmarks by name (hotpotqa,2wikimultihopqa), see eval.py")
    dev: str = option("demo/dev.jsonl", "questions for the periodic greedy evaluation, jsonl")
    search: str = option("bm25:demo/corpus.jsonl", "search back end, see search_tool.py")
    search_cache: str = option("on", "disk cache of network back ends; only: answer from the cache alone", choices=["on", "off", "only"])
    out: str = option("", "run folder; empty: runs/<model>-<credit>-seed<seed>")
    resume: str = option("", "run folder to continue")
    seed: int = option(0, "seed of sampling, data order and LoRA init")
    steps: int = option(200, "training steps", 0)
    # episode
    questions: int = option(8, "questions per step", 1)
    group: int = option(8, "rollouts per question (G)", 2)
    max_turns: int = option(5, "turns per rollout, the answer included", 1)
    max_new_tokens: int = option(256, "tokens the policy may write in one turn", 1)
    top_k: int = option(3, "passages per search", 1)
    max_info_tokens: int = option(500, "tokens of search results shown per turn", 0)
    temperature: float = option(1.0, "sampling temperature, also used in scoring")
    max_failed_searches: float = option(0.5, "share of a step's searches that may fail before the run stops")
    format_penalty: float = option(-0.1, "outcome of a rollout without an answer: format broken, cut off, out of turns (lambda_fmt, Eq. 2)")
    # credit
    credit: str = option("igpo", "turn rewards: igpo, ig (gains only), grpo (outcome only; its usual z-scores with --norm separate); or of "
                         "benchmarks/comparators.py: stepsearch (needs supporting passages), reasonrag, gigpo (whatever --norm is)",
                         choices=["igpo", "ig", "grpo", "stepsearch", "reasonrag", "gigpo"])
    mc_rollouts: int = option(4, "rollouts from each state for its value (--credit reasonrag)", 1)
    gain: str = option("prob", "information gain in log-probability (paper v2) or probability (v1)", choices=["logprob", "prob"])
    norm: str = option("centre", "Eq. 5, within a group: separate (z-scores, gains and outcomes apart; paper v2), joint (z-scores in one pool; v1), "
                       "turn (gains by turn index), centre (turn, not divided by the std), scale (separate, gains not centred)",
                       choices=["separate", "joint", "turn", "centre", "scale"])
    gamma: float = option(1.0, "discount over turns (Eq. 6)")
    curriculum: bool = option(False, "outcome weight .5 -> 1 and gain weight 1 -> .5 over training")
    belief: str = option("policy", "who is asked for the belief: policy, or reference (adapter off)", choices=["policy", "reference"])
    # update
    lr: float = option(2e-5, "learning rate of AdamW", 0)
    ppo_epochs: int = option(1, "passes over each step's rollouts", 1)
    minibatches: int = option(1, "optimizer updates per pass", 1)
    clip: float = option(0.2, "clip range of the ratio (epsilon, Eq. 7)", 0)
    kl_coef: float = option(0.001, "weight of the KL to the reference (beta, Eq. 7)")
    max_grad_norm: float = option(1.0, "gradient norm is clipped to this; 0: no clipping", 0)
    lora_rank: int = option(16, "LoRA rank, on all linear layers", 1)
    lora_alpha: int = option(32, "LoRA scale is alpha / rank")
    # machine
    dtype: str = option("auto", "auto: bfloat16 on CUDA, else float32", choices=["auto", "float32", "bfloat16"])
    rollout_batch: int = option(64, "rollouts generated at once", 1)
    batch_tokens: int = option(8192, "padded tokens per forward in scoring and update", 1)
    gradient_checkpointing: bool = option(True, "recompute activations in the update: slower, far less memory")
    # what is kept
    eval_every: int = option(10, "steps between evaluations on the dev questions; 0: never", 0)
    eval_questions: int = option(200, "dev questions used", 1)
    show_every: int = option(20, "steps between printed transcripts; 0: never", 0)


# The embedded policy has 1M parameters and reads a page a turn: what it needs otherwise stands here and nowhere else.
DEMO = dict(model="demo/policy", steps=30, max_turns=6, max_new_tokens=32, top_k=1, max_info_tokens=100,
            lr=5e-4, batch_tokens=2048, gradient_checkpointing=False)


# ---- data ------------------------------------------------------------------------------------------------------------

class UserError(Exception):
    """Something the user can mend. main() prints its one line and exits with status 2."""


@dataclass
class Rollout:
    """One trajectory. ids, mask and turns have one entry per token; T turns give T boundaries.

    The forced `<think>` that ends a prompt or an information block lies before the boundary.
    """
    ids: list[int]                                            # prompt, then policy text and forced text in turn
    mask: list[int]                                           # 1: written by the policy, 0: forced (prompt, search results)
    turns: list[int]                                          # turn of each token from 0; results belong to the turn that asked; prompt: -1
    boundaries: list[int]                                     # prefix lengths at which b_0 .. b_{T-1} are read; the first is the prompt's
    answer: str | None = None                                 # what stands in <answer>, None if there is none
    stop: str = ""                                            # answer | format | length | turns
    queries: list[str] = field(default_factory=list)          # one per search
    retrieved: list[list[Passage]] = field(default_factory=list)  # what each search brought
    errors: list[str] = field(default_factory=list)           # error text of each search, "" where it worked

    def write(self, ids: list[int], by_policy: bool, turn: int) -> None:
        """Append tokens and what is known of them in one place, so that the three lists cannot drift apart."""
        self.ids += ids
        self.mask += [int(by_policy)] * len(ids)
        self.turns += [turn] * len(ids)

    @property
    def policy_turns(self) -> list[int]:
        """Turn of each token the policy wrote, in order."""
        return [t for t, m in zip(self.turns, self.mask) if m]


def load_questions(path: str) -> list[dict]:
    """Read .jsonl or .jsonl.gz: {"question", "answers": [..]}, optionally "id", "supporting"; FlashRAG's "golden_answers" is read too.

    Raises UserError with file and line for what cannot be used.
    """
    rows = []
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig", errors="replace") as file:
            lines = file.readlines()
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"{path}: cannot be read ({first_line(e)}). It should be jsonl with a question and its answers on each line.") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()      # half a surrogate pair is JSON, but could never be written down
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path}:{number}: not JSON ({first_line(e)}).") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: a line must be an object like {{\"question\": .., \"answers\": [..]}}.")
        answers, supporting = row.get("answers", row.get("golden_answers")), row.get("supporting") or []
        answers = [answers] if isinstance(answers, str) else answers
        texts = lambda value: isinstance(value, list) and all(isinstance(x, str) for x in value)
        for name, fine, what in (("question", isinstance(row.get("question"), str) and row["question"].strip(), "text"),
                                 ("answers", texts(answers), "a list of texts"), ("supporting", texts(supporting), "a list of passage ids")):
            if not fine:
                raise UserError(f"{path}:{number}: field \"{name}\" is missing or is not {what}.")
        answers = [a for a in answers if a.strip()]
        if not answers:
            raise UserError(f"{path}:{number}: no gold answer that is not empty.")
        rows.append({**row, "id": str(row.get("id", number)), "answers": answers})
    if not rows:
        raise UserError(f"{path}: no questions in it.")
    return rows


def load_train(spec: str) -> list[dict]:
    """Questions of --train: a jsonl file, or benchmarks by name (hotpotqa,2wikimultihopqa), which eval.py downloads."""
    if Path(locate(spec)).is_file():
        return load_questions(locate(spec))
    from eval import load_benchmark      # here, since eval.py imports this file
    return [q for name in spec.split(",") for q in load_benchmark(name.strip(), "train")]


def locate(path: str) -> str:
    """A path as given, or beside this file if there is nothing at it: the demo is found from any folder."""
    return path if Path(path).exists() or not (HERE / path).exists() else str(HERE / path)


def first_line(error: Exception) -> str:
    if str(error).startswith("Weights only load failed"):  # torch goes on to recommend running it
        return "it holds a pickle of more than weights, which is not run"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---- tokens ----------------------------------------------------------------------------------------------------------

INSTRUCTION = """Answer the question. You can search, and what you need to know is to be found by searching.
Work in turns. First reason between <think> and </think>. Then do one of two things:
- search: <search> what to look for </search>. The results come back between <information> and </information>, and the next turn begins.
- answer: <answer> the answer in a few words, nothing else </answer>. This ends the task.
Search for one thing at a time, read what came back, and answer as soon as you know. For example:

<think> I must find out who built the Tavo bridge first. </think>
<search> Tavo bridge builder </search>
<information> (1) Tavo bridge: It was built by Mira Oss. </information>
<think> Mira Oss built it. Now I know enough. </think>
<answer> Mira Oss </answer>"""

SCHEMA = "\nNow there's enough information to answer.\n</think>\n<answer>\n"   # the belief is read under this (paper, section 3.2)
MAX_GOLD_TOKENS = 32
TURN = re.compile(r"\s*(?:<think>)?(?P<think>.*?)</think>\s*<(?P<action>search|answer)>(?P<content>.*?)</(?P=action)>\s*", re.DOTALL)
TAG = re.compile(r"</?(?:think|search|answer|information)>")


def encode(tokenizer, text: str, data: bool = False) -> list[int]:
    """Token ids of text. data=True: whatever it holds, it cannot become a control token of the chat template."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=data)


def encode_prompt(tokenizer, question: str) -> list[int]:
    """The question in the model's chat template, the assistant's message and its think tag opened.

    Base models without a template get plain text, templates that refuse a system message (Gemma) one message. The question
    is data: it is tokenised apart from the template around it.
    """
    slot = "@QUESTION@"
    if tokenizer.chat_template:
        system, user = {"role": "system", "content": INSTRUCTION}, {"role": "user", "content": slot}
        try:
            text = tokenizer.apply_chat_template([system, user], tokenize=False, add_generation_prompt=True)
        except Exception:  # each template raises its own way
            user["content"] = f"{INSTRUCTION}\n\n{slot}"
            text = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    else:
        text = f"{tokenizer.bos_token or ''}{INSTRUCTION}\n\nQuestion: {slot}\n\n"
    if not text.rstrip().endswith("<think>"):
        text += "<think>"
    before, after = text.split(slot)
    return encode(tokenizer, before) + encode(tokenizer, question, data=True) + encode(tokenizer, after)


def encode_information(tokenizer, passages: list[Passage], error: str | None, max_tokens: int) -> list[int]:
    """What the environment writes after a search, up to the open think tag of the next turn.

    Passages are cleaned, so that no tag of ours survives in them, and tokenised as data.
    """
    if error:
        body = f"search failed: {clean_text(error, 200)}"
    else:
        body = "\n".join(f"({i}) {clean_text(p.title, 200)}: {clean_text(p.text)}" for i, p in enumerate(passages, 1)) or "nothing found"
    return (encode(tokenizer, "\n<information>\n") + encode(tokenizer, body, data=True)[:max_tokens]
            + encode(tokenizer, "\n</information>\n<think>"))


def encode_gold(tokenizer, gold: str | list[str]) -> list[int]:
    """Tokens of the first gold alias, cut at MAX_GOLD_TOKENS."""
    gold = gold if isinstance(gold, str) else gold[0]
    return encode(tokenizer, gold.strip(), data=True)[:MAX_GOLD_TOKENS]


def parse_turn(text: str) -> tuple[str, str] | None:
    """The action of a turn's text, ("search", query) or ("answer", words), or None if the format is broken.

    >>> parse_turn(" I need more.</think><search> Tavo </search>")
    ('search', 'Tavo')
    >>> parse_turn("<search> Tavo </search>") is None       # no thought
    True
    >>> parse_turn(" a </think> b <answer> Tavo </answer>") is None       # text between thought and action
    True
    """
    m = TURN.fullmatch(text)
    if not m or TAG.search(m["think"]) or TAG.search(m["content"]) or not m["content"].strip():
        return None
    return m["action"], m["content"].strip()


# ---- model -----------------------------------------------------------------------------------------------------------

FAMILIES = {"qwen": "Qwen", "smollm": "HuggingFaceTB", "llama": "meta-llama", "gemma": "google", "mistral": "mistralai", "phi": "microsoft"}


def load_model(cfg: Config, adapter: str = ""):
    """(model with a fresh LoRA adapter or that of a run or PEFT folder, tokenizer), on the best device there is. Raises UserError."""
    name, options = locate(cfg.model), {}
    if name.endswith(".gguf"):
        if not Path(name).is_file():
            raise UserError(f"--model {name}: no such file.")
        name, options = str(Path(name).parent), {"gguf_file": Path(name).name}
    elif not Path(name).is_dir() and "/" not in name:
        owner = next((owner for family, owner in FAMILIES.items() if name.lower().startswith(family)), None)
        if owner is None:
            raise UserError(f"--model {name}: neither a folder here nor a family I know ({', '.join(FAMILIES)}). Give the hub id, owner/name.")
        name = f"{owner}/{name}"
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    auto = "bfloat16" if device == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    dtype = getattr(torch, auto if cfg.dtype == "auto" else cfg.dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
        lm = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, dtype=dtype, attn_implementation="sdpa", **options)
    except ImportError as e:
        raise UserError(f"--model {cfg.model}: {first_line(e)}") from None
    except Exception as e:  # each library fails in its own way
        raise UserError(f"--model {cfg.model}: could not load {name} ({first_line(e)}). Offline, give a folder that holds config.json, "
                        "the safetensors and the tokenizer, or a .gguf file.") from None
    if getattr(lm.config, "sliding_window", None):  # within its window it is full attention: rollouts stay within it, and nothing slides
        lm.config.max_position_embeddings, lm.config.sliding_window = min(context_length(lm), lm.config.sliding_window), 10**9
    for module in lm.modules():     # GPT-2 and others have dropout, with which the update would score other than score() does
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and (name.endswith("dropout") or (isinstance(module, torch.nn.Dropout) and name == "p")):
                setattr(module, name, 0.0)
    refuse_what_cannot_be_scored(lm, cfg.model)
    if options and hasattr(lm, "hf_quantizer"):  # the weights are plain floats now; the label would make PEFT think otherwise
        del lm.hf_quantizer, lm.config.quantization_config
    if tokenizer.pad_token_id is None:  # padding is known by length, so any id will do
        tokenizer.pad_token = tokenizer.eos_token
    if cfg.gradient_checkpointing:
        lm.activation_checkpointing_enable({"use_reentrant": False})
    if not adapter:
        torch.manual_seed(cfg.seed)
        lora = LoraConfig(r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(lm.to(device), lora).eval(), tokenizer
    folder = find_checkpoint(Path(adapter), "adapter_config.json")
    try:
        model = PeftModel.from_pretrained(lm.to(device), folder).eval()
        loaded = model.load_adapter(folder, "default")      # again: only this call reports missing or extra layers
        if loaded.missing_keys or loaded.unexpected_keys:
            raise ValueError("it has other layers")
        return model, tokenizer
    except Exception as e:
        raise UserError(f"--adapter {adapter}: does not fit {cfg.model} ({first_line(e)}).") from None


@torch.no_grad()
def refuse_what_cannot_be_scored(lm, name: str) -> None:
    """Raise UserError for a model whose logits are more than LM head (hidden state), or whose cache is more than keys and values."""
    pair = torch.tensor([[1, 2]])
    logits = lm(pair).logits
    if torch.dist(logits, lm.get_output_embeddings()(lm.base_model(pair)[0])) > 0.01 * logits.norm():
        raise UserError(f"--model {name}: it scales or caps its logits after the LM head, which token_logps does not. Take another model.")
    try:
        lm(pair, cache=Cache(layer_class_to_replicate=RoomyLayer), use_cache=True)
    except Exception:   # linear attention, convolutions ..
        raise UserError(f"--model {name}: not all of its layers are attention with keys and values, which join_caches needs. "
                        "Take another model.") from None


def context_length(lm) -> int:
    """Tokens that the model can read; a large number if it sets no limit."""
    return getattr(lm.config, "max_position_embeddings", None) or 10**9


def unwrap(model):
    """The Hugging Face causal LM inside a PEFT model (LoRA layers stay in it), or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def reference(model):
    """Within this context the model is the reference policy: the adapter is off."""
    return model.disable_adapter() if isinstance(model, PeftModel) else contextlib.nullcontext()


# ---- rollout ---------------------------------------------------------------------------------------------------------

def rollout(model, tokenizer, questions: list[dict], search, cfg: Config) -> list[Rollout]:
    """Sample cfg.group rollouts for each question, all turns. Question-major: group i is [i * G : (i + 1) * G].

    Only temperature shapes the sampling (cfg.temperature = 0: greedy), so that score() sees the same distribution.
    """
    rollouts = [begin(tokenizer, q["question"]) for q in questions for _ in range(cfg.group)]
    list(finish(model, tokenizer, rollouts, search, cfg))
    return rollouts


def groups_of(rollouts, cfg: Config) -> list[slice]:
    """Where the cfg.group rollouts of each question stand."""
    return [slice(i, i + cfg.group) for i in range(0, len(rollouts), cfg.group)]


def begin(tokenizer, question: str) -> Rollout:
    """A rollout of which there is the prompt alone."""
    prompt = encode_prompt(tokenizer, question)
    return Rollout(prompt, [0] * len(prompt), [-1] * len(prompt), [len(prompt)])


@torch.no_grad()
def finish(model, tokenizer, rollouts: list[Rollout], search, cfg: Config) -> Iterator[Rollout]:
    """Take each rollout, in place, from its last boundary to its end. A generator: it yields each when it ends.

    cfg.rollout_batch are played at once, turn by turn, and one that ends makes room for the next. The KV cache lives across
    turns: only new text is read, and rows that ended leave the batch and the cache.
    """
    lm, waiting, live, parts = unwrap(model), list(rollouts), [], []        # parts: of the cache, see join_caches
    pad, sampling = tokenizer.pad_token_id, sampling_config(lm, tokenizer, cfg)
    checkpoints_defaults, lm.generation_config = lm.generation_config, sampling
    try:
        while live or waiting:
            if room := min(cfg.rollout_batch - len(live), len(waiting)):
                joining, waiting = waiting[:room], waiting[room:]
                live = live + joining
                parts.append(read_texts(lm, [r.ids for r in joining], pad))
            # A row is what the cache holds of it and what it does not, each padded on the left (mask 0; positions count the 1s).
            known = [n for _, held, rows in parts for n in held[rows].sum(1).tolist()]
            cache = join_caches(parts)
            known_ids, known_mask = left_pad([r.ids[:n] for r, n in zip(live, known)], pad, lm.device)
            new_ids, new_mask = left_pad([r.ids[n:] for r, n in zip(live, known)], pad, lm.device)
            ids, mask = torch.cat([known_ids, new_ids], 1), torch.cat([known_mask, new_mask], 1)
            end = TurnEnd(tokenizer, ids.shape[1], len(live), set(sampling.eos_token_id))
            sampled = lm.generate(ids, attention_mask=mask, cache=cache, generation_config=sampling,
                                  stopping_criteria=StoppingCriteriaList([end]))[:, ids.shape[1]:]
            for r, new, length, done in zip(live, sampled.tolist(), end.length, end.done):
                take_turn(r, new[:length], done, tokenizer, cfg)
            asking = [r for r in live if not r.stop]
            found = search.search_many([r.queries[-1] for r in asking], cfg.top_k) if asking else []
            for r, passages in zip(asking, found, strict=True):
                take_results(r, passages, context_length(lm), tokenizer, cfg)
            written = torch.arange(sampled.shape[1], device=lm.device) < torch.tensor(end.length, device=lm.device)[:, None]
            on = [row for row, r in enumerate(live) if not r.stop]
            ended, live = [r for r in live if r.stop], [live[row] for row in on]
            # The last token of the longest turn was not read: generate() had no need to.
            held = torch.cat([mask, written.long()], 1)[:, :-1]
            parts = [(cache, held, torch.tensor(on, device=lm.device))] if on else []
            del cache
            yield from ended
    finally:
        lm.generation_config = checkpoints_defaults


def sampling_config(lm, tokenizer, cfg: Config) -> GenerationConfig:
    """Temperature, or greedy if it is 0, and nothing else.

    All that the checkpoint's own generation defaults hold (top_k, top_p, repetition_penalty ..) would make the sampled
    distribution differ from the scored one, so they are replaced as a whole; top_k = 0 because the library's default is 50.
    """
    eos = lm.generation_config.eos_token_id
    eos = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    shape = {"do_sample": True, "temperature": cfg.temperature, "top_k": 0, "top_p": 1.0} if cfg.temperature > 0 else {"do_sample": False}
    return GenerationConfig(**shape, max_new_tokens=cfg.max_new_tokens, pad_token_id=tokenizer.pad_token_id, eos_token_id=sorted(eos), use_cache=True)


def take_turn(r: Rollout, new: list[int], closed: bool, tokenizer, cfg: Config) -> None:
    """Write down a turn of the policy and what it does: end the rollout (r.stop is set), or ask one more query."""
    turn, action = len(r.boundaries) - 1, parse_turn(tokenizer.decode(new))
    r.write(new, True, turn)
    if action is None:
        r.stop = "format" if closed else "length"
    elif action[0] == "answer":
        r.stop, r.answer = "answer", action[1]
    elif turn == cfg.max_turns - 1:
        r.stop = "turns"
    else:
        r.queries.append(clean_query(action[1]))


def take_results(r: Rollout, found: list[Passage], context: int, tokenizer, cfg: Config) -> None:
    """Write down what the last query brought, which opens the next turn; or end the rollout if the context has no room for one."""
    error = getattr(found, "error", None)
    r.retrieved.append(list(found))
    r.errors.append(error or "")
    block = encode_information(tokenizer, found, error, cfg.max_info_tokens)
    if len(r.ids) + len(block) + max(cfg.max_new_tokens, 2 * MAX_GOLD_TOKENS) > context:
        r.stop = "length"
    else:
        r.write(block, False, len(r.boundaries) - 1)
        r.boundaries.append(len(r.ids))


@lru_cache(maxsize=8)
def closing_tokens(tokenizer) -> set[int]:
    """The only tokens that can finish a tag: those with a > in them."""
    return {i for token, i in tokenizer.get_vocab().items() if ">" in token}


class TurnEnd(StoppingCriteria):
    """Ends a row at </search>, </answer> or the end-of-sequence token, and notes its length: padding is known by length."""

    def __init__(self, tokenizer, start: int, rows: int, eos: set[int]):
        self.tokenizer, self.start, self.eos = tokenizer, start, eos
        self.length = [0] * rows          # tokens written by the row, its stop token included
        self.done = [False] * rows
        self.closers = closing_tokens(tokenizer)

    def __call__(self, input_ids, scores, **kwargs):
        width = input_ids.shape[1] - self.start
        for row, last in enumerate(input_ids[:, -1].tolist()):
            if not self.done[row]:
                self.length[row] = width
                text = self.tokenizer.decode(input_ids[row, -min(width, 16):]) if last in self.closers else ""
                self.done[row] = last in self.eos or "</search>" in text or "</answer>" in text
        return torch.tensor(self.done, device=input_ids.device)


def left_pad(rows: list[list[int]], pad: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), both (B, longest)."""
    width = max(map(len, rows))
    ids = [[pad] * (width - len(r)) + r for r in rows]
    mask = [[0] * (width - len(r)) + [1] * len(r) for r in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, with room to grow: DynamicLayer copies them all for every token that is written."""
    room = None

    def update(self, keys, values, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        n, end = self.get_seq_length(), self.get_seq_length() + keys.shape[2]
        if self.room is None or end > self.room[0].shape[2]:
            self.room = [x.new_empty(*x.shape[:2], end + 128, x.shape[3]) for x in (keys, values)]
            if n:
                self.room[0][:, :, :n], self.room[1][:, :, :n] = self.keys, self.values
        self.room[0][:, :, n:end], self.room[1][:, :, n:end] = keys, values
        self.keys, self.values = (x[:, :, :end] for x in self.room)
        return self.keys, self.values


def read_texts(lm, texts: list[list[int]], pad: int) -> tuple[Cache, torch.Tensor, torch.Tensor]:
    """Read all of each text but its last token, from which generate() starts, and equal texts (the prompts of a group) once.

    Returns what `join_caches` takes: (cache, held, rows).
    """
    row_of: dict = {}
    rows = [row_of.setdefault(tuple(text), len(row_of)) for text in texts]
    ids, held = left_pad([list(text[:-1]) for text in row_of], pad, lm.device)
    cache = Cache(layer_class_to_replicate=RoomyLayer)
    lm.base_model(ids, attention_mask=held, position_ids=(held.cumsum(1) - 1).clamp(min=0), cache=cache, use_cache=True)
    return cache, held, torch.tensor(rows, device=lm.device)


def join_caches(parts: list[tuple[Cache, torch.Tensor, torch.Tensor]]) -> Cache:
    """One cache of the chosen rows of several. Each part is (cache, held, rows); held (B, W) is 1 where a column of its cache
    holds a token of the row's text. Those are moved to the right, side by side, in place of holes and padding. The parts are used up.
    """
    width = max(int(held[rows].sum(1).max()) for _, held, rows in parts)
    orders = []        # of each part, which columns its rows keep, (rows, width); the sort puts the 0s first
    for _, held, rows in parts:
        order = held[rows].argsort(dim=1, stable=True)
        orders.append(F.pad(order, (max(width - held.shape[1], 0), 0))[:, -width:])
    pick = lambda x, rows, order: x[rows[:, None], :, order].transpose(1, 2)
    joined = Cache(layer_class_to_replicate=RoomyLayer)
    for i in range(len(parts[0][0].layers)):
        pieces = [[pick(x, rows, order) for x in (cache.layers[i].keys, cache.layers[i].values)] for (cache, _, rows), order in zip(parts, orders)]
        joined.update(*map(torch.cat, zip(*pieces)), i)
        for cache, _, _ in parts:
            cache.layers[i] = None          # a layer at a time is held twice, not all of them
    return joined


# ---- belief and log-probs --------------------------------------------------------------------------------------------

HEAD_CHUNK = 256    # tokens that pass the LM head at once; of its logits four fp32 copies live at a time


def token_logps(lm, rows: list[dict], temperature: float) -> list[torch.Tensor]:
    """log pi of chosen tokens: the one function for policy, old policy, reference and belief.

    Each row is {"ids", "length", "positions", "limit", "targets"}; the token at index j of "targets" is predicted from the token
    before it. The first "length" ids are a rollout, read under the model's own causal mask. The others are probes, for which
    "positions" and "limit" have an entry per token: a probe's token sees the rollout before limit and its own probe up to itself.
    Returns per row an fp32 tensor (len(targets),). Only the targets pass the LM head, in chunks that are recomputed in the
    backward, so that (length x vocabulary) is never held.

    Two rollout tokens r, and a probe p of two tokens read after the first of them, as `one_pass` lays them out:

        ids        r0 r1 p0 p1          p0 sees r0 and itself, p1 sees r0, p0 and itself
        positions         1  2          as if the probe stood where r1 stands
        limit             1  1
    """
    def column(lists):
        return pad_sequence([torch.tensor(x, dtype=torch.long) for x in lists], batch_first=True).to(lm.device)
    ids, probes = column([r["ids"][:r["length"]] for r in rows]), column([r["ids"][r["length"]:] for r in rows])    # (B, L), (B, P)
    cache = DynamicCache(config=lm.config) if probes.numel() else None
    hidden = lm.base_model(input_ids=ids, cache=cache, use_cache=cache is not None)[0]    # no mask: none looks at padding on the right
    if cache is not None:       # the probes of all turns at once, on the rollout's keys and values
        mask = probe_mask(column([r["limit"] for r in rows]), ids.shape[1], lm.dtype)
        probe_hidden = lm.base_model(input_ids=probes, position_ids=column([r["positions"] for r in rows]), attention_mask=mask,
                                     cache=cache, use_cache=True)[0]
        hidden = torch.cat([hidden, probe_hidden], 1)
    places = [(b, j if j < r["length"] else j - r["length"] + ids.shape[1]) for b, r in enumerate(rows) for j in r["targets"]]
    b, j = torch.tensor(places, device=lm.device).T
    hidden, targets, head = hidden[b, j - 1], torch.cat([ids, probes], 1)[b, j], lm.get_output_embeddings()

    def score_chunk(h, t):
        logits = head(h).float() / (temperature or 1.0)
        return logits.gather(-1, t[:, None])[:, 0] - logits.logsumexp(-1)
    parts = [checkpoint(score_chunk, h, t, use_reentrant=False) if torch.is_grad_enabled() else score_chunk(h, t)
             for h, t in zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK))]
    return list(torch.cat(parts).split([len(r["targets"]) for r in rows]))


def probe_mask(limit: torch.Tensor, length: int, dtype: torch.dtype) -> torch.Tensor:
    """What each probe token may attend to, as an additive mask (B, 1, P, length + P); limit (B, P) is as in `token_logps`."""
    k = torch.arange(max(length, limit.shape[1]), device=limit.device)
    rollout = k[:length] < limit[:, :, None]                                                # before its boundary
    probe = (limit[:, None, :] == limit[:, :, None]) & (k[:limit.shape[1]] <= k[:limit.shape[1], None])    # its own, up to itself
    visible = torch.cat([rollout, probe], 2)
    return torch.zeros(visible.shape, dtype=dtype, device=limit.device).masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


def one_pass(rollout: Rollout, probes: list[list[int]], schema: int) -> dict:
    """Rollout and one probe (schema + gold) per boundary as one row for token_logps (paper, Fig. 3).

    Targets: the policy's tokens, then the gold tokens of each probe. A probe takes the positions that follow its boundary.
    """
    row = {"ids": list(rollout.ids), "length": len(rollout.ids), "positions": [], "limit": [],
           "targets": [j for j, m in enumerate(rollout.mask) if m]}
    for boundary, probe in zip(rollout.boundaries, probes):
        start = len(row["ids"])
        row["ids"] += probe
        row["positions"] += range(boundary, boundary + len(probe))
        row["limit"] += [boundary] * len(probe)
        row["targets"] += range(start + schema, start + len(probe))
    return row


def by_tokens(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices in batches of about the same length whose padded size stays within budget (one row is always let in).

    >>> by_tokens([5, 9, 4, 10], 20)
    [[3, 1], [0, 2]]
    """
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def out_of_memory(error: BaseException) -> bool:
    """torch.OutOfMemoryError is a RuntimeError; a CPU raises no better than that, so it is known by its text."""
    text = str(error) if isinstance(error, RuntimeError) else ""
    return isinstance(error, MemoryError) or bool(re.search("out of memory|not enough memory|can't allocate memory", text))


def in_micro_batches(work, lengths: list[int], model, cfg: Config) -> list[tuple]:
    """[(batch, work(batch)), ..] over the batches of `by_tokens`, whose number changes no result.

    Out of memory: it is said, and all is done again with half of cfg.batch_tokens, from then on. A rollout is not divided: the
    longest comes first, and where it is alone and does not fit, UserError tells what can be lowered.
    """
    while True:
        try:
            return [(batch, work(batch)) for batch in by_tokens(lengths, cfg.batch_tokens)]
        except (RuntimeError, MemoryError) as e:
            if not out_of_memory(e):
                raise
            if cfg.batch_tokens < max(lengths):
                raise UserError(f"out of memory on a single rollout of {max(lengths)} tokens. Lower --max_turns, --max_info_tokens or "
                                "--max_new_tokens, or add --gradient_checkpointing or --dtype bfloat16.") from None
        # Here, not above: while the error lives, so do the tensors of the frames it came through.
        cfg.batch_tokens //= 2
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        tqdm.write(f"out of memory: going on with half the tokens a forward, --batch_tokens {cfg.batch_tokens}", file=sys.stderr)


@torch.no_grad()
def forward_scores(model, tokenizer, rollouts: list[Rollout], golds: list | None, cfg: Config):
    """Log-probs of the sampled tokens and, if golds are given, the beliefs b_0 .. b_{T-1}, by the model as it stands."""
    schema = encode(tokenizer, SCHEMA)
    probes = [[schema + encode_gold(tokenizer, gold)] * len(r.boundaries) for r, gold in zip(rollouts, golds)] if golds else [[]] * len(rollouts)
    rows = [one_pass(r, p, len(schema)) for r, p in zip(rollouts, probes)]
    logps, beliefs = [None] * len(rows), [[] for _ in rows]
    work = lambda batch: token_logps(unwrap(model), [rows[i] for i in batch], cfg.temperature)
    for batch, found in in_micro_batches(work, [len(row["ids"]) for row in rows], model, cfg):
        for i, scores in zip(batch, found):
            sampled = sum(rollouts[i].mask)
            logps[i] = scores[:sampled]
            if golds:
                beliefs[i] = scores[sampled:].view(len(rollouts[i].boundaries), -1).mean(1).tolist()      # Eq. 3
    return logps, beliefs


def score(model, tokenizer, rollouts: list[Rollout], golds: list, cfg: Config) -> tuple[list[torch.Tensor], list[list[float]]]:
    """(logps, beliefs): old log-probs of the sampled tokens (per rollout a tensor, one entry per token with mask 1) and beliefs (Eq. 3).

    golds[i] is the gold answer of rollout i, a text or a list of aliases of which the first is taken. The belief is asked of
    the policy, or with cfg.belief = "reference" of the model with its adapter off.
    """
    if cfg.belief == "policy":
        return forward_scores(model, tokenizer, rollouts, golds, cfg)
    with reference(model):
        _, beliefs = forward_scores(model, tokenizer, rollouts, golds, cfg)
    return forward_scores(model, tokenizer, rollouts, None, cfg)[0], beliefs


# ---- rewards and returns ---------------------------------------------------------------------------------------------

def answer_words(text: str, style: str = "paper") -> list[str]:
    """Words of an answer. paper: lower-case, punctuation to spaces. squad: punctuation dropped, articles dropped (SQuAD v1.1).

    >>> answer_words("The U.S. army"), answer_words("The U.S. army", "squad")
    (['the', 'u', 's', 'army'], ['us', 'army'])
    """
    text = text.lower()
    if style == "paper":
        return "".join(" " if c in string.punctuation or unicodedata.category(c)[0] == "P" else c for c in text).split()
    return re.sub(r"\b(a|an|the)\b", " ", "".join(c for c in text if c not in string.punctuation)).split()


def f1_score(prediction: str | None, golds: list[str] | str, style: str = "paper") -> float:
    """Word F1 with the best gold alias, 0..1 (Eq. 2). paper: sets of words, as the authors score; squad: multisets.

    >>> f1_score("no no no", ["no"]), f1_score("no no no", ["no"], "squad")
    (1.0, 0.5)
    """
    best = 0.0
    for gold in [golds] if isinstance(golds, str) else golds:
        p, g = answer_words(prediction or "", style), answer_words(gold, style)
        if style == "paper":
            p, g = sorted(set(p)), sorted(set(g))
        common = sum(min(p.count(w), g.count(w)) for w in set(p))
        best = max(best, 2 * common / (len(p) + len(g)) if common else 0.0)
    return best


def exact_match(prediction: str | None, golds: list[str] | str, style: str = "paper") -> float:
    """1.0 if the words equal those of a gold alias, else 0.0. paper compares sets of words, squad sequences.

    >>> exact_match("The Fox", "fox"), exact_match("The Fox", "fox", "squad")
    (0.0, 1.0)
    """
    form = (lambda t: set(answer_words(t, style))) if style == "paper" else (lambda t: answer_words(t, style))
    golds = [golds] if isinstance(golds, str) else golds
    return float(bool(prediction) and any(form(prediction) == form(g) and form(g) for g in golds))


def outcome_reward(rollout: Rollout, golds: list[str] | str, format_penalty: float) -> float:
    """Eq. 2: F1 of the answer, or the penalty if the rollout ended any other way."""
    return f1_score(rollout.answer, golds) if rollout.stop == "answer" else format_penalty


def info_gains(beliefs: list[float], gain: str = "logprob") -> list[float]:
    """Eq. 4: what each turn but the last added to the belief. T beliefs (mean log-probs) give T - 1 gains.

    >>> info_gains([-3.0, -2.0, -2.0])
    [1.0, 0.0]
    """
    levels = [math.exp(b) for b in beliefs] if gain == "prob" else beliefs
    return [after - before for before, after in zip(levels, levels[1:])]


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def std(values) -> float:
    """Population standard deviation."""
    values = list(values)
    middle = mean(values)
    return math.sqrt(mean((v - middle) ** 2 for v in values))


STD_FLOOR = 1e-6    # a pool of rewards that spread less than this agrees, and says nothing


def normalise(values: list[float], centre: bool = True, scale: bool = True) -> list[float]:
    """Values less their mean, over their population std, or one of the two; all 0 if they agree."""
    middle, spread = mean(values) * centre, std(values)
    return [(v - middle) / (spread if scale else 1.0) if spread > STD_FLOOR else 0.0 for v in values]


def turn_rewards(gains: list[list[float]], outcomes: list[float], norm: str = "separate",
                 gain_weight: float = 1.0, outcome_weight: float = 1.0) -> list[list[float]]:
    """Eq. 5 for one group: normalised reward of each turn, the outcome on the last. A gain of 0 is a turn like any other.

    separate: gains and outcomes z-normalised in a pool each (paper v2). joint: in one pool (paper v1). scale: as separate, but gains
    not centred. turn: gains pooled by turn index (A2TGPO). centre: as turn, but centred only (as Dr. GRPO does with outcomes,
    arXiv 2503.20783).

    Centring: whatever a search is worth on average also rewards or charges going on. With separate every search pays the group's
    mean gain, with scale it keeps its own, and a poor searcher's may be negative. With turn and centre searches compete with those
    made at the same depth alone, and when to stop is left to the outcome. Dividing: where no rollout of a group succeeds, it blows
    up what is left, the noise of the gains or a format penalty, to the size of a success. Undivided, a gain in probability and an
    F1 are in one unit.

    Raises ValueError if the group has fewer than 2 rollouts or the lists do not match.
    """
    if len(outcomes) < 2:
        raise ValueError(f"a group needs at least 2 rollouts to compare, not {len(outcomes)}: raise --group")
    if len(gains) != len(outcomes):
        raise ValueError(f"{len(gains)} lists of gains for {len(outcomes)} outcomes")
    if not all(map(math.isfinite, [*outcomes, *(g for gs in gains for g in gs)])):
        raise ValueError("a gain or an outcome is not finite")
    if norm not in ("separate", "joint", "turn", "centre", "scale"):
        raise ValueError(f"norm {norm!r} is none of separate, joint, turn, centre, scale")
    pools: dict = {}           # what is normalised together: (rollout, turn, reward)
    for i, (gs, outcome) in enumerate(zip(gains, outcomes)):
        for t, g in enumerate(gs):
            pools.setdefault("all" if norm == "joint" else t if norm in ("turn", "centre") else "gains", []).append((i, t, g))
        pools.setdefault("all" if norm == "joint" else "outcomes", []).append((i, len(gs), outcome))
    rewards = [[0.0] * (len(gs) + 1) for gs in gains]
    for name, pool in pools.items():
        normalised = normalise([r for _, _, r in pool], centre=norm != "scale" or name == "outcomes", scale=norm != "centre")
        for (i, t, _), r in zip(pool, normalised):
            rewards[i][t] = r * (outcome_weight if t == len(gains[i]) else gain_weight)
    return rewards


def turn_returns(gains: list[list[float]], outcomes: list[float], gamma: float = 1.0, norm: str = "separate",
                 gain_weight: float = 1.0, outcome_weight: float = 1.0) -> list[list[float]]:
    """Eq. 5 and 6 for one group of G rollouts: R_t = sum_{k >= t} gamma^(k-t) r~_k for every turn of every rollout.

    The defaults are the paper's; those of Config are ours. gains[i] has one entry fewer than rollout i has turns. Raises
    ValueError as `turn_rewards` does.

    >>> turn_returns([[1.0], [3.0]], [0.0, 1.0])        # gains -> -1, +1; outcomes -> -1, +1
    [[-2.0, -1.0], [2.0, 1.0]]
    """
    return [list(accumulate(reversed(rewards), lambda total, r: r + gamma * total))[::-1]
            for rewards in turn_rewards(gains, outcomes, norm, gain_weight, outcome_weight)]


def credit(steps: list[list[float]], outcomes: list[float], cfg: Config, progress: float = 0.0) -> list[list[float]]:
    """Returns of one group under cfg.credit; progress 0..1 through training drives the curriculum.

    steps: the reward of each turn but the last, information gains or a comparator's. grpo (outcome only: every token of rollout i
    gets its normalised outcome) divides by the spread, as published, unless cfg.norm is centre.
    """
    if cfg.credit == "grpo":
        return turn_returns([[0.0] * len(s) for s in steps], outcomes, norm="centre" if cfg.norm == "centre" else "separate")
    gain_weight, outcome_weight = (1 - progress / 2, .5 + progress / 2) if cfg.curriculum else (1.0, 1.0)
    return turn_returns(steps, outcomes, cfg.gamma, cfg.norm, gain_weight, 0.0 if cfg.credit == "ig" else outcome_weight)


# ---- loss ------------------------------------------------------------------------------------------------------------

def policy_loss(logp, old_logp, ref_logp, returns, mask, clip: float = 0.2, kl_coef: float = 0.001):
    """Eq. 7 as a loss, all tensors (B, L): mean over a rollout's own policy tokens, then over the B rollouts.

    The KL is Schulman's k3 estimator, exp(d) - d - 1 with d = log pi_ref - log pi, and carries a gradient. On policy the
    surrogate's value is only the mean return, about 0: what counts is its gradient.
    Returns (loss, stats), stats being sums over tokens: "tokens", "kl", "clipped", "entropy" (-log pi of what was sampled).
    """
    mask = mask.float()
    ratio = torch.exp(logp - old_logp)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    surrogate = torch.minimum(ratio * returns, clipped * returns)
    d = ref_logp - logp
    kl = torch.exp(d) - d - 1
    per_rollout = ((surrogate - kl_coef * kl) * mask).sum(1) / mask.sum(1).clamp(min=1)
    with torch.no_grad():
        binding = (clipped * returns < ratio * returns).float()
        stats = {"tokens": mask.sum().item(), "kl": (kl * mask).sum().item(), "clipped": (binding * mask).sum().item(),
                 "entropy": -(logp * mask).sum().item()}
    return -per_rollout.mean(), stats


def accumulate_gradient(model, rollouts, old, ref, returns, cfg: Config) -> dict:
    """Gradient of Eq. 7 over these rollouts, in micro-batches that fit: their number does not change it.

    old, ref: per rollout the log-probs of its policy tokens; returns: per rollout one per turn. Returns the stats of
    `policy_loss`, summed, with "loss" and "ratio" (of all tokens, the one farthest from 1).
    """
    def work(batch):
        logps = token_logps(unwrap(model), [one_pass(rollouts[i], [], 0) for i in batch], cfg.temperature)
        by_token = [torch.tensor([returns[i][t] for t in rollouts[i].policy_turns], device=logps[0].device) for i in batch]
        mask = [torch.ones_like(x, dtype=torch.bool) for x in logps]
        logp, old_logp, ref_logp, R, mask = (pad_sequence(x, batch_first=True) for x in (
            logps, [old[i] for i in batch], [ref[i] for i in batch], by_token, mask))
        loss, stats = policy_loss(logp, old_logp, ref_logp, R, mask, cfg.clip, cfg.kl_coef)
        part = loss * (len(batch) / len(rollouts))
        part.backward()
        ratio = torch.exp(logp - old_logp).detach()[mask]
        return {**stats, "loss": part.item(), "ratio": farthest(ratio.tolist())}
    parts = [stats for _, stats in in_micro_batches(work, [len(r.ids) for r in rollouts], model, cfg)]
    total = {key: sum(part[key] for part in parts) for key in ("loss", "tokens", "kl", "clipped", "entropy")}
    return {**total, "ratio": farthest([1.0, *(part["ratio"] for part in parts)])}


def farthest(ratios: list[float]) -> float:
    """The ratio farthest from 1."""
    return max(ratios, key=lambda x: abs(x - 1))


# ---- many processes --------------------------------------------------------------------------------------------------

# Under torchrun every process runs train() on whole groups of its own; what they exchange goes through these functions. Without
# torchrun there is one process, and they change nothing.


def join_processes() -> None:
    """Meet the other processes of torchrun, each with a GPU of its own if there are any: objects by gloo, gradients by NCCL."""
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=1))


def process() -> tuple[int, int]:
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(items: list) -> list:
    """This process's part of a list; the parts of all, one after the other, are the list."""
    rank, n = process()
    return items[len(items) * rank // n:len(items) * (rank + 1) // n]


def gathered(items: list) -> list:
    """The lists of all processes one after the other, to each of them."""
    lists = [items] * process()[1]
    if len(lists) > 1:
        dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def average_gradient(parameters: list, rollouts: int, loss: float) -> float:
    """From gradients of the mean loss over this process's rollouts make those of the mean over all; returns that mean."""
    if process()[1] == 1:
        return loss
    total = sum(gathered([rollouts]))
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad * (rollouts / total)
        dist.all_reduce(p.grad)
    return sum(gathered([loss * rollouts])) / total


# ---- training --------------------------------------------------------------------------------------------------------

class MeteredSearch:
    """Counts queries, failures and seconds of a search back end since the last reset()."""

    def __init__(self, search):
        self.search = search
        self.reset()

    def reset(self) -> None:
        self.queries, self.failed, self.seconds, self.last_error = 0, 0, 0.0, ""

    def search_many(self, queries: list[str], k: int) -> list:
        start = time.perf_counter()
        results = self.search.search_many(queries, k)
        errors = [r.error for r in results if getattr(r, "error", None)]
        self.queries += len(queries)
        self.failed += len(errors)
        self.seconds += time.perf_counter() - start
        self.last_error = errors[-1] if errors else self.last_error
        return results


def record(tokenizer, rollout: Rollout, question: dict, beliefs: list[float], gain: str, returns: list[float] | None = None) -> dict:
    """A rollout as a line of rollouts.jsonl: what a person wants to read, turn by turn."""
    gains = info_gains(beliefs, gain)
    turns = []
    for t in range(len(rollout.boundaries)):
        text = tokenizer.decode([i for i, m, turn in zip(rollout.ids, rollout.mask, rollout.turns) if m and turn == t])
        searched = t < len(rollout.queries)
        passages = rollout.retrieved[t] if searched else []
        turns.append({"text": text, "query": rollout.queries[t] if searched else None, "error": (searched and rollout.errors[t]) or None,
                      "passages": [{k: getattr(p, k) for k in ("id", "title", "text", "score")} for p in passages],
                      "gain": gains[t] if t < len(gains) else None, "return": returns[t] if returns else None})
    kept = {k: question[k] for k in ("id", "question", "answers", "supporting", "hops") if k in question}
    return {**kept, "stop": rollout.stop, "answer": rollout.answer, "f1": f1_score(rollout.answer, question["answers"]),
            "em": exact_match(rollout.answer, question["answers"]), "beliefs": beliefs, "policy_tokens": sum(rollout.mask), "turns": turns}


def transcript(row: dict) -> str:
    """A line of rollouts.jsonl as text for the terminal."""
    def short(text, n=150):
        text = " ".join(text.split())
        return text if len(text) <= n else text[:n - 3] + "..."
    lines = [f"  question  {row['question']}   (gold: {row['answers'][0]})", f"  belief    {row['beliefs'][0]:+.2f}"]
    for t, turn in enumerate(row["turns"], 1):
        lines.append(f"  turn {t}    {short(turn['text'])}")
        for p in turn["passages"]:
            lines.append(f"            [{short(p['title'], 40)}] {short(p['text'], 100)}")
        if turn["error"]:
            lines.append(f"            search failed: {turn['error']}")
        if turn["gain"] is not None:
            lines.append(f"            gain {turn['gain']:+.2f}, belief {row['beliefs'][t]:+.2f}")
    return "\n".join(lines + [f"  stop      {row['stop']}, F1 {row['f1']:.2f}"])


def evaluate(model, tokenizer, questions: list[dict], search, cfg: Config) -> dict:
    """Greedy evaluation: mean F1, exact match and turns. Returns {} and prints a line if too many searches failed."""
    rollouts = gathered(rollout(model, tokenizer, share(questions), search, replace(cfg, group=1, temperature=0.0)))
    errors = [e for r in rollouts for e in r.errors]
    if sum(map(bool, errors)) > cfg.max_failed_searches * len(errors):
        tqdm.write(f"no evaluation: {sum(map(bool, errors))} of {len(errors)} searches failed ({max(errors)})")
        return {}
    return {"eval_f1": mean(f1_score(r.answer, q["answers"]) for r, q in zip(rollouts, questions)),
            "eval_em": mean(exact_match(r.answer, q["answers"]) for r, q in zip(rollouts, questions)),
            "eval_turns": mean(len(r.boundaries) for r in rollouts)}


def step_questions(questions: list[dict], step: int, cfg: Config) -> list[dict]:
    """The questions of a step (from 1). Each epoch is a permutation of its own; the step alone tells where we are."""
    first, last = (step - 1) * cfg.questions, step * cfg.questions
    orders = {epoch: random.Random(f"{cfg.seed}-{epoch}").sample(range(len(questions)), len(questions))
              for epoch in range(first // len(questions), (last - 1) // len(questions) + 1)}
    return [questions[orders[i // len(questions)][i % len(questions)]] for i in range(first, last)]


def train_step(model, tokenizer, optimizer, questions: list[dict], search: MeteredSearch, cfg: Config, progress: float) -> tuple[dict, list[dict]]:
    """One step: rollouts, beliefs, returns, update. questions: this process's. Returns (metrics, records of the rollouts), of all processes."""
    began = time.perf_counter()
    rollouts = rollout(model, tokenizer, questions, search, cfg)
    asked = [q for q in questions for _ in range(cfg.group)]                       # the question of each rollout
    played, searching = time.perf_counter(), search.seconds

    old, beliefs = score(model, tokenizer, rollouts, [q["answers"] for q in asked], cfg)
    ref = old
    if cfg.kl_coef:
        with reference(model):
            ref, _ = forward_scores(model, tokenizer, rollouts, None, cfg)
    scored = time.perf_counter()

    outcomes = [outcome_reward(r, q["answers"], cfg.format_penalty) for r, q in zip(rollouts, asked)]
    gains, extra_tokens = [info_gains(b, cfg.gain) for b in beliefs], 0
    groups = groups_of(rollouts, cfg)
    finite = all(gathered([math.isfinite(b) for bs in beliefs for b in bs]))
    if not finite:
        returns = [[0.0] * len(b) for b in beliefs]                                # and no update is made
    elif cfg.credit in ("igpo", "ig", "grpo"):
        returns = [R for g in groups for R in credit(gains[g], outcomes[g], cfg, progress)]
    else:
        from benchmarks.comparators import comparator_returns                      # here, since it imports this file
        returns, extra_tokens = comparator_returns(model, tokenizer, rollouts, asked, outcomes, search, cfg, progress)
    for r, R in zip(rollouts, returns):
        if len(R) != max(r.turns) + 1 or len(R) != len(r.boundaries):
            raise AssertionError(f"{len(R)} returns and {len(r.boundaries)} boundaries for {max(r.turns) + 1} turns")
    credited = time.perf_counter()

    totals = update(model, optimizer, rollouts, old, ref, returns, cfg) if finite else []
    updated = time.perf_counter()

    # Every process makes the same row, of all rollouts, and so comes to the same decisions.
    skipped, ratios = sum(t["skipped"] for t in totals) + (not finite), gathered([t["ratio"] for t in totals[:1]])
    totals = gathered([t for t in totals if not t["skipped"]])
    rollouts, asked, beliefs, outcomes, gains, returns = zip(*gathered(list(zip(rollouts, asked, beliefs, outcomes, gains, returns))))
    searches, failed, extra_tokens = map(sum, zip(*gathered([(search.queries, search.failed, extra_tokens)])))
    row = {**rollout_metrics(rollouts, asked, beliefs, outcomes, gains, returns, cfg), **update_metrics(totals, cfg),
           "ratio_start": farthest(ratios) if ratios else None, "skipped": skipped, "searches": searches, "failed_searches": failed,
           "seconds": updated - began, "seconds_rollout": played - began - searching, "seconds_search": search.seconds, "seconds_score": scored - played,
           "seconds_credit": credited - scored, "seconds_update": updated - credited, "peak_memory_mb": peak_memory_mb()}
    row["generated_tokens"] = row["policy_tokens"] + extra_tokens
    return row, [record(tokenizer, r, q, b, cfg.gain, R) for r, q, b, R in zip(rollouts, asked, beliefs, returns)]


def update(model, optimizer, rollouts, old, ref, returns, cfg: Config) -> list[dict]:
    """The optimizer's updates of a step; the stats of each, one whose loss or gradient was not finite being "skipped"."""
    parameters, totals = [p for p in model.parameters() if p.requires_grad], []
    model.train()
    for _ in range(cfg.ppo_epochs):
        order = torch.randperm(len(rollouts)).tolist() if cfg.minibatches > 1 else list(range(len(rollouts)))
        for m in range(cfg.minibatches):
            part = order[m::cfg.minibatches]
            pick = lambda values: [values[i] for i in part]
            optimizer.zero_grad(set_to_none=True)
            total = accumulate_gradient(model, pick(rollouts), pick(old), pick(ref), pick(returns), cfg)
            total["loss"] = average_gradient(parameters, len(part), total["loss"])
            total["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm or math.inf).item()
            total["skipped"] = not (math.isfinite(total["loss"]) and math.isfinite(total["grad_norm"]))
            if not total["skipped"]:
                optimizer.step()
            totals.append(total)
    optimizer.zero_grad(set_to_none=True)
    model.eval()
    return totals


def rollout_metrics(rollouts, asked, beliefs, outcomes, gains, returns, cfg: Config) -> dict:
    """What the glossary tells of a step's rollouts."""
    groups = groups_of(rollouts, cfg)
    flat = [g for gs in gains for g in gs]
    silent = [std(outcomes[g]) <= STD_FLOOR for g in groups]
    finite = all(map(math.isfinite, flat))
    all_silent = [not any(map(any, turn_rewards(gains[g], outcomes[g], cfg.norm))) if finite else quiet for g, quiet in zip(groups, silent)]
    return {
        "outcome_f1": mean(f1_score(r.answer, q["answers"]) for r, q in zip(rollouts, asked)),
        "outcome_em": mean(exact_match(r.answer, q["answers"]) for r, q in zip(rollouts, asked)), "outcome_reward": mean(outcomes),
        "belief_first": mean(b[0] for b in beliefs), "belief_last": mean(b[-1] for b in beliefs),
        "gain_mean": mean(flat), "gain_std": std(flat), "gain_positive": mean(g > 0 for g in flat),
        "return_std": std(R[t] for r, R in zip(rollouts, returns) for t in r.policy_turns), "turns": mean(len(b) for b in beliefs),
        **{f"stop_{why}": mean(r.stop == why for r in rollouts) for why in ("answer", "format", "length", "turns")},
        "no_signal_outcome": mean(silent), "no_signal_igpo": mean(all_silent),
        "policy_tokens": sum(sum(r.mask) for r in rollouts)}


def update_metrics(totals: list[dict], cfg: Config) -> dict:
    """What the glossary tells of a step's updates."""
    per_token = lambda key: sum(t[key] for t in totals) / (sum(t["tokens"] for t in totals) or 1)
    return {"clip_fraction": per_token("clipped"), "kl": per_token("kl") if cfg.kl_coef else None, "entropy": per_token("entropy"),
            "loss": mean(t["loss"] for t in totals), "grad_norm": mean(t["grad_norm"] for t in totals)}


def peak_memory_mb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def train(cfg: Config) -> Path:
    """The whole run; returns its folder. Ctrl-C, SIGTERM or an error, of this process or another: the last whole step is saved."""
    from benchmarks.memory import fit, memory_line      # here, since it imports this file
    rank = process()[0]
    if rank:
        gathered([])      # the first process goes first: what it downloads and indexes the others find
    questions, dev = load_train(cfg.train), load_questions(locate(cfg.dev))[:cfg.eval_questions]
    search = MeteredSearch(open_run_search(cfg))
    model, tokenizer = load_model(cfg)
    cfg, requested = fit(model, cfg), cfg
    if not rank:
        gathered([])
    for path, rows in ((cfg.train, questions), (cfg.dev, dev)):
        check_data(tokenizer, rows, path, model, cfg)
    if cfg.credit == "stepsearch":
        from benchmarks.comparators import with_supporting_texts      # here, since it imports this file
        questions = with_supporting_texts(questions, cfg)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=cfg.lr, weight_decay=0.0)
    data = {name: hashlib.sha256(json.dumps(rows).encode()).hexdigest() for name, rows in (("train", questions), ("dev", dev))}
    if cfg.search.startswith("bm25:"):
        data["search"] = checksum(locate(cfg.search[5:]))
    out, done, skipped = Path(cfg.resume or cfg.out), 0, 0
    if not rank:
        out.mkdir(parents=True, exist_ok=True)
        if any(path.is_symlink() for path in out.rglob("*")):
            raise UserError(f"{out}: there is a link in it. A run makes none, and a stranger's may lead to any file, so nothing is written.")
    opened = lambda name: open(os.devnull, "a", encoding="utf-8") if rank else open_alone(out / name)    # the first process writes for all
    with opened("metrics.jsonl") as metrics, opened("rollouts.jsonl") as rollouts:
        if cfg.resume:
            done, skipped = load_checkpoint(out, model, optimizer, data)
        if not rank:
            if not cfg.resume:
                for folder in out.glob("checkpoint*"):                                      # --overwrite: first what could be resumed
                    shutil.rmtree(folder)
            for file in (metrics, rollouts):
                cut_log(file, done)
            write_whole(out / "config.json", json.dumps(asdict(replace(cfg, resume="", out=str(out))), indent=1) + "\n")
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"{cfg.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {trained / 1e6:.2f}M of them LoRA, "
              f"{model.dtype} on {model.device.type}. {len(questions)} questions, {cfg.questions} x {cfg.group} rollouts a step, "
              f"steps {done + 1} to {cfg.steps}. Results go to {out}.\n{memory_line(model, cfg)}", flush=True)
        for name in ("rollout_batch", "batch_tokens"):
            if getattr(cfg, name) < getattr(requested, name):
                print(f"note: --{name} lowered from {getattr(requested, name)} to {getattr(cfg, name)}, to fit the memory")

        def log(file, row):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()

        def save():
            if not rank:
                save_checkpoint(out, model, optimizer, {"step": done, "skipped": skipped, "data": data})

        def stop(number, frame):
            signal.signal(number, signal.SIG_IGN)      # once is enough: what follows is the saving
            raise KeyboardInterrupt
        if not cfg.resume:
            save()                                                                          # a disk that cannot be written shows now
        saved = done
        bar = tqdm(total=cfg.steps, initial=done, unit="step", dynamic_ncols=True, disable=bool(rank) or None)
        handlers = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            if done == 0 and cfg.eval_every:
                row = {"step": 0, **evaluate(model, tokenizer, dev, search, cfg)}
                log(metrics, row)
                if "eval_f1" in row:
                    bar.write(f"before training: dev F1 {row['eval_f1']:.3f}, EM {row['eval_em']:.3f}, {row['eval_turns']:.1f} turns")
            for step in range(done + 1, cfg.steps + 1):
                search.reset()
                torch.manual_seed(random.Random(f"{cfg.seed}-{step}-{rank}").getrandbits(63))     # a resumed run goes on as it would have
                ours, progress = share(step_questions(questions, step, cfg)), (step - 1) / max(cfg.steps - 1, 1)
                row, records = train_step(model, tokenizer, optimizer, ours, search, cfg, progress)
                row = {"step": step, **row, "skipped": skipped + row["skipped"]}
                if row["skipped"] > skipped:
                    bar.write(f"step {step}: a belief, the loss or the gradient was not finite; {row['skipped']} updates skipped so far")
                failed = row["failed_searches"]
                too_many = failed > cfg.max_failed_searches * row["searches"]
                if cfg.eval_every and (step % cfg.eval_every == 0 or step == cfg.steps) and not too_many:
                    row.update(evaluate(model, tokenizer, dev, search, cfg))
                log(metrics, row)
                for r in records:
                    log(rollouts, {"step": step, **r})
                done, skipped = step, row["skipped"]
                save()
                saved = done
                bar.update()
                bar.write(summary(row))
                if cfg.show_every and step % cfg.show_every == 0:
                    bar.write(transcript(max(records, key=lambda r: len(r["turns"]))))
                if too_many:
                    raise UserError(f"step {step}: {failed} of {row['searches']} searches failed ({search.last_error}). Stopped and saved; "
                                    f"when the search works again: python igpo.py --resume {out}")
        except BaseException as e:      # with torchrun an error elsewhere comes as a broken connection, or as SIGTERM
            for s in handlers:
                signal.signal(s, signal.SIG_IGN)
            if saved != done:       # it came during save()
                save()
            interrupted = isinstance(e, KeyboardInterrupt)
            bar.write(f"{'interrupted' if interrupted else 'stopped by an error'}; step {done} is saved. "
                      f"Go on with: python igpo.py --resume {out}")
            if out_of_memory(e):
                raise UserError(f"step {done + 1}: out of memory. With less at a time: --resume {out} "
                                f"--rollout_batch {max(cfg.rollout_batch // 2, 1)}") from None
            if not interrupted:
                raise
        finally:
            bar.close()
            for s, handler in handlers.items():
                signal.signal(s, handler)
    return out


def summary(row: dict) -> str:
    """A step in one line."""
    text = (f"step {row['step']:>4}  F1 {row['outcome_f1']:.2f}  turns {row['turns']:.1f}  belief {row['belief_first']:+.2f} -> "
            f"{row['belief_last']:+.2f}  gain {row['gain_mean']:+.2f} ± {row['gain_std']:.2f}  no signal {row['no_signal_outcome']:.0%} -> "
            f"{row['no_signal_igpo']:.0%}" + ("" if row["kl"] is None else f"  KL {row['kl']:.3f}") + f"  {row['seconds']:.1f} s")
    failed = f"  {row['failed_searches']} searches failed" if row["failed_searches"] else ""
    return text + failed + (f"  dev F1 {row['eval_f1']:.3f}, EM {row['eval_em']:.3f}" if "eval_f1" in row else "")


# ---- checkpoints -----------------------------------------------------------------------------------------------------

def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def open_alone(path: Path):
    """A log to append to, unless another run has it open: two runs in one folder would mix. kill -9 lets go of it too."""
    file = open(path, "a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path.parent}: another run is at work in it. Wait until it has ended, or choose another --out.") from None
    except OSError:     # a file system that knows no locks
        pass
    return file


def cut_log(file, done: int) -> None:
    """Cut a log behind step `done`: what came after the checkpoint is done again; with none done, so is the evaluation before step 1."""
    try:
        with open(file.name, "rb") as lines:      # only here a line ends at \n alone, whatever the text holds
            file.truncate(sum(map(len, takewhile(lambda line: done and line.endswith(b"\n") and json.loads(line)["step"] <= done, lines))))
    except (ValueError, TypeError, KeyError) as e:
        raise UserError(f"{file.name}: damaged ({first_line(e)}). Delete the lines from there on, then --resume again.") from None


def save_checkpoint(out: Path, model, optimizer, state: dict) -> None:
    """out/checkpoint: the adapter in PEFT's format, and all that training changes in state.pt. A new folder takes the old one's place, whole.

    The step among it gives the place in the data and all random numbers.
    """
    new, now, old = (out / name for name in ("checkpoint.new", "checkpoint", "checkpoint.old"))
    shutil.rmtree(new, ignore_errors=True)
    try:
        model.save_pretrained(new, save_embedding_layers=False)     # "auto" would ask the hub, at every step
        adapter = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        torch.save({**state, "adapter": adapter, "optimizer": optimizer.state_dict()}, new / "state.pt")
        if now.exists():
            shutil.rmtree(old, ignore_errors=True)
            now.rename(old)
        new.rename(now)
    except Exception as e:    # OSError, or what safetensors and torch make of it
        raise UserError(f"{now}: could not save step {state['step']} ({first_line(e)}; {shutil.disk_usage(out).free >> 20} MB are free). "
                        f"The checkpoint before it is whole; make room and --resume {out}.") from None
    shutil.rmtree(old, ignore_errors=True)


def find_checkpoint(out: Path, file: str) -> Path:
    """The folder of a run's last whole checkpoint, checkpoint.old if a save was cut between its two renames; or out itself. The file is in it."""
    for folder in (out / "checkpoint", out / "checkpoint.old", out):
        if (folder / file).is_file():
            return folder
    raise UserError(f"{out}: no whole checkpoint in it (no {file}). If it is a run that never got that far, start it again with --overwrite.")


def load_checkpoint(out: Path, model, optimizer, data: dict) -> tuple[int, int]:
    """Restore a run; returns (steps done, updates skipped). state.pt is read with weights_only: it cannot run code."""
    folder = find_checkpoint(out, "state.pt")
    try:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in state["adapter"].items():
                parameters[name].copy_(value)
        optimizer.load_state_dict(state["optimizer"])
        step, skipped, before = int(state["step"]), int(state["skipped"]), dict(state["data"])
    except Exception as e:
        raise UserError(f"{folder}: cannot be read ({first_line(e)}): damaged, or of another model or LoRA rank.") from None
    for name, digest in data.items():
        if before.get(name) != digest:
            raise UserError(f"--{name}: the file is not the one this run was started with. Put it back, or start a new run.")
    return step, skipped


# ---- command line ----------------------------------------------------------------------------------------------------

def open_run_search(cfg: Config):
    """The search back end of a run; the demo's corpus is found from any folder."""
    return open_search("bm25:" + locate(cfg.search[5:]) if cfg.search.startswith("bm25:") else cfg.search, cache=cfg.search_cache)


def check_data(tokenizer, questions: list[dict], path: str, model, cfg: Config) -> None:
    """Questions must leave room for a turn; long golds are counted and said."""
    context, long = context_length(unwrap(model)), 0
    for q in questions:
        length = len(encode_prompt(tokenizer, q["question"])) + cfg.max_new_tokens + MAX_GOLD_TOKENS
        if length > context:
            raise UserError(f"{path}, question {q['id']}: prompt and one turn need {length} tokens, the model's context is {context}. "
                            "Shorten it or leave it out.")
        long += len(encode(tokenizer, q["answers"][0], data=True)) > MAX_GOLD_TOKENS
    if long:
        print(f"{path}: {long} of {len(questions)} gold answers are longer than {MAX_GOLD_TOKENS} tokens: the belief is read on their first ones.")


RESUME_MAY_CHANGE = {"resume", "steps", "eval_every", "show_every",                    # all else would make it another run
                     "rollout_batch", "batch_tokens", "gradient_checkpointing"}           # what the memory allows


def read_config(folder: str) -> Config:
    """The values a run was started with. Raises UserError for what no run has written."""
    try:
        cfg = Config(**json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")))
        for f in fields(Config):
            value, kind = getattr(cfg, f.name), str if isinstance(f.default, str) else (int, float)
            if not isinstance(value, kind) or value not in f.metadata.get("choices", [value]):
                raise ValueError(f"{f.name} cannot be {value!r:.100}")
        return cfg
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise UserError(f"{folder}/config.json: cannot be read ({first_line(e)}). Is it a run folder?") from None


def check_bounds(cfg: Config) -> None:
    """Raise UserError for a number below the least that Config allows, or one that no computer counts to."""
    for f in fields(Config):
        value, least = getattr(cfg, f.name), f.metadata["least"]
        if not isinstance(value, str) and not abs(value) < 2**63:
            raise UserError(f"--{f.name} {value} is out of range.")
        if least is not None and value < least:
            why = ": a group of one has nothing to compare" if f.name == "group" else ""
            raise UserError(f"--{f.name} must be at least {least}{why}.")


def parse_config(argv: list[str] | None = None) -> tuple[Config, argparse.Namespace]:
    """Config from the command line: what is given, over the demo's values (no --model) or the resumed run's, over the defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for f in fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(f.default, bool) else {"type": type(f.default)}
        default = f"{f.default!r}" + (f"; without --model {DEMO[f.name]!r}" if f.name in DEMO else "")
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=f"{f.metadata['help']} ({default})",
                            **kind, **{k: v for k, v in f.metadata.items() if k == "choices"})
    parser.add_argument("--overwrite", action="store_true", help="start anew in a run folder that exists: its logs and checkpoint are deleted")
    parser.add_argument("--explain", action="store_true", help="walk through Eq. 2-7 on one question, then stop")
    parser.add_argument("--check", action="store_true", help="try model, data and search before training, then stop; exit status 1 if a check fails")
    parser.add_argument("--glossary", action="store_true", help="explain every metric, then stop")
    parser.error = lambda message: parser.exit(2, f"igpo: {' '.join(message.split())}; --help lists the options\n")
    args = parser.parse_args(argv)
    given = {f.name: getattr(args, f.name) for f in fields(Config) if hasattr(args, f.name)}
    if given.get("resume"):
        cfg = read_config(given["resume"])
        fixed = set(vars(cfg)) - RESUME_MAY_CHANGE | ({"steps"} if cfg.curriculum else set())
        changed = [k for k, v in given.items() if k in fixed and getattr(cfg, k) != v]
        if changed:
            raise UserError(f"--resume: this run was started with --{changed[0]} {getattr(cfg, changed[0])}. "
                            "Leave the option out, or start a new run.")
        cfg = replace(cfg, **given)
    else:
        cfg = Config(**{**(DEMO if not given.get("model") else {}), **given})
        if 0 < len({"train", "dev", "search"} & set(given)) < 3:
            print(f"note: --train is {cfg.train}, --dev is {cfg.dev} and --search is {cfg.search}; do they belong together?")
        name = f"runs/{Path(cfg.model).name.removesuffix('.gguf')}-{cfg.credit}-seed{cfg.seed}"
        names = (f"{name}-{n}" if n > 1 else name for n in count(1))
        cfg = replace(cfg, out=cfg.out or next(out for out in names if args.overwrite or not Path(out).exists()))
    check_bounds(cfg)
    if cfg.questions < process()[1]:
        raise UserError(f"--questions must be at least {process()[1]}: each process plays whole groups of its own.")
    if cfg.minibatches > cfg.questions // process()[1] * cfg.group:
        raise UserError(f"--minibatches {cfg.minibatches}: there are {cfg.questions // process()[1] * cfg.group} rollouts to divide.")
    if cfg.temperature <= 0:
        raise UserError("--temperature must be above 0: greedy rollouts of a question are all alike.")
    if cfg.gain == "logprob" and cfg.norm in ("joint", "centre") and cfg.credit == "igpo":
        print(f"warning: --gain logprob with --norm {cfg.norm} weighs nats against F1; the paper's v2 is --gain logprob --norm separate, "
              "its v1 --gain prob --norm joint.")
    return cfg, args


def glossary() -> dict[str, str]:
    """What each key of metrics.jsonl means, out of the README's table."""
    section = (HERE / "README.md").read_text(encoding="utf-8").split("\n## Metrics\n")[1]
    return dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", section, re.MULTILINE))


def prepare(argv: list[str] | None) -> Config | int | None:
    """The configuration of a run whose folder may be made; or, if the command line asked for something else, its exit status when done."""
    cfg, args = parse_config(argv)
    if args.glossary:
        return print("\n".join(f"{key:18} {text}" for key, text in glossary().items()))
    if args.explain:
        from benchmarks.explain import explain      # here, since it imports this file
        return explain(cfg)
    if args.check:
        from benchmarks.check import check      # here, since it imports this file
        return check(cfg)
    out = Path(cfg.resume or cfg.out)
    if not cfg.resume and out.exists() and any(out.iterdir()):
        if not args.overwrite:
            raise UserError(f"--out {out}: exists. Go on with it (--resume {out}), choose another, or add --overwrite.")
        if not (out / "metrics.jsonl").is_file():
            raise UserError(f"--overwrite: {out} is no run folder (there is no metrics.jsonl in it), so nothing is done to it.")
    print("\n".join(f"{key:24}{value}" for key, value in asdict(cfg).items() if value != ""))
    return cfg


def main(argv: list[str] | None = None) -> int:
    try:
        join_processes()
        if process()[0]:
            sys.stdout = open(os.devnull, "w")                          # one process speaks ..
        task, = gathered([] if process()[0] else [prepare(argv)])       # .. and sees what was there before any of them wrote
        if isinstance(task, Config):
            train(task)
        if dist.is_initialized():
            dist.destroy_process_group()
    except (UserError, SearchError, OSError) as e:
        print(f"igpo: {first_line(e)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:       # train() catches its own
        print("igpo: interrupted", file=sys.stderr)
        return 130
    return 0 if isinstance(task, Config) else task or 0


if __name__ == "__main__":
    sys.modules["igpo"] = sys.modules["__main__"]      # eval.py imports igpo: let it be this very module, with this UserError
    sys.stdout.reconfigure(errors="replace")           # a transcript in any script, on a terminal that knows one
    sys.exit(main())
