"""What the tricks of igpo.py are worth: belief, rollout, update and a whole step beside the obvious forms of the same.

    OMP_NUM_THREADS=1 python benchmarks/speed.py       the demo policy and a Qwen2.5-0.5B shape: writes speed.md and speed.json
    python benchmarks/speed.py --quick                 the demo policy alone, nothing written; the last line is one JSON object
    python benchmarks/speed.py --memory                what fits 8, 16, 24 and 80 GB, computed by benchmarks/memory.py: the README's table

All forms of a thing are timed in one process and take turns. A ratio is that of two neighbours in one repetition, given as least,
median and greatest over the repetitions. Seconds are CPU seconds of one thread, so that what else the machine does matters little.
In float32 the forms must first give the same: numbers to 1e-3, gradients to 1e-5, ids exactly.

  belief    old log-probs and all beliefs of a rollout by igpo.forward_scores against
              naive: one forward per boundary, of the text up to it and the probe. Only the beliefs: the old log-probs would be one more
              plain: one forward of the rollout for the old log-probs alone
              append: plain, and the probe read on the rollout's own cache at each boundary and cropped off (append, read, crop)
              mask: rollout and probes as one row in one forward, under a mask of its own (igpo.py did so at first)
  rollout   igpo.finish against reading the whole text again each turn with the same generate(). Greedy. parse_turn is replaced on
            both sides: each turn searches and gets a passage of 100 tokens, whatever the policy wrote. And a rollout that ends makes
            room for the next, against one batch after the other
  update    igpo.accumulate_gradient against the log-softmax of all logits in fp32, vocabulary 151,936. Memory is the peak resident
            size of a process of its own, less what it held before the update
  padding   share of padding in the batches of igpo.by_tokens, 64 rollouts of random length at the default budget
  step      where the seconds of a whole step go, and how many of them the probes take

In the JSON object belief_vs_naive, rollout_vs_reread_4 and _8 say how many times faster, belief_vs_plain how many times slower;
update_peak_vs_naive is our share of the naive peak; padding is a share.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, Qwen2Config, StoppingCriteriaList

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import igpo  # noqa: E402
from benchmarks.memory import memory_card  # noqa: E402
from igpo import DEMO, SCHEMA, Config, Rollout, by_tokens, encode, encode_information, forward_scores, left_pad, unwrap  # noqa: E402
from search_tool import Passage, open_search  # noqa: E402

VOCABULARY = 151_936
QWEN = {  # hidden, layers, heads, key heads, MLP, vocabulary, head tied to the embedding
    "0.5B": (896, 24, 14, 2, 4864, 151_936, True), "1.5B": (1536, 28, 12, 2, 8960, 151_936, True),
    "3B": (2048, 36, 16, 2, 11_008, 151_936, True), "7B": (3584, 28, 28, 4, 18_944, 152_064, False)}
# glibc's settings under which the process keeps its memory, as CUDA's allocator does: page faults would drown what is measured.
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(10**11), "MALLOC_TOP_PAD_": str(2**28)}
PHASES = ("rollout", "search", "score", "update")


# ---- models and rollouts ---------------------------------------------------------------------------------------------

def qwen(shape: tuple, dtype: torch.dtype, checkpointing: bool = False, device: str = "cpu"):
    """Qwen2 of this shape with random weights and a LoRA adapter as igpo.load_model gives it."""
    hidden, layers, heads, keys, mlp, words, tied = shape
    config = Qwen2Config(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=keys, intermediate_size=mlp,
                         vocab_size=words, tie_word_embeddings=tied, max_position_embeddings=32_768)
    torch.manual_seed(0)
    with torch.device(device):
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        if checkpointing:
            lm.activation_checkpointing_enable({"use_reentrant": False})
        return get_peft_model(lm, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")).eval()


def make_model(shape: str, dtype: str, checkpointing: bool = False, words: int = 0):
    """(model, the demo's tokenizer); words: the demo policy with a vocabulary of that size, the new words random. LoRA starts as the
    identity, under which gradients of half of it are 0: it is stirred."""
    model, tokenizer = igpo.load_model(Config(**{**DEMO, "gradient_checkpointing": checkpointing}))
    if shape != "demo":
        model = qwen(QWEN[shape], getattr(torch, dtype), checkpointing)
    elif words:
        torch.manual_seed(0)
        unwrap(model).resize_token_embeddings(words, mean_resizing=False)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.02)
    return model, tokenizer


def made_rollout(rng: random.Random, turns: int, words: int, prompt: int = 300, own: int = 25, shown: int = 50) -> Rollout:
    """Random ids in the form of a rollout: 1,000 tokens at 10 turns."""
    ids = lambda n: [rng.randrange(words) for _ in range(n)]
    r = Rollout([], [], [], [prompt])
    r.write(ids(prompt), False, -1)
    for turn in range(turns):
        r.write(ids(own), True, turn)
        if turn < turns - 1:
            r.write(ids(shown), False, turn)
            r.boundaries.append(len(r.ids))
    return r


class OnePassage:
    """Finds the same passage whatever is asked; max_info_tokens cuts it."""

    def search_many(self, queries: list[str], k: int) -> list[list[Passage]]:
        return [[Passage("1", "Tavo", "The town of Tavo lies on the river Mar. " * 40)] for _ in queries]


# ---- the obvious forms -----------------------------------------------------------------------------------------------

def head_logps(lm, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = lm.get_output_embeddings()(hidden).float()
    return logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)


@torch.no_grad()
def causal_logps(lm, rows: list[list[int]], targets: list[list[int]], budget: int = 16_384) -> list[torch.Tensor]:
    """log pi of the tokens at targets."""
    found = [None] * len(rows)
    for batch in by_tokens([len(r) for r in rows], budget):
        ids = pad_sequence([torch.tensor(rows[i]) for i in batch], batch_first=True)
        hidden = lm.base_model(input_ids=ids, use_cache=False)[0]
        for k, i in enumerate(batch):
            j = torch.tensor(targets[i])
            found[i] = head_logps(lm, hidden[k, j - 1], ids[k, j])
    return found


def plain(lm, rollouts: list[Rollout]) -> list[torch.Tensor]:
    return causal_logps(lm, [r.ids for r in rollouts], [[j for j, m in enumerate(r.mask) if m] for r in rollouts])


def naive_beliefs(lm, rollouts: list[Rollout], probe: list[int], gold: int) -> list[list[float]]:
    """One forward per boundary, of probes that end in gold tokens of the answer."""
    rows = [r.ids[:b] + probe for r in rollouts for b in r.boundaries]
    found = iter(causal_logps(lm, rows, [list(range(len(row) - gold, len(row))) for row in rows]))
    return [[next(found).mean().item() for _ in r.boundaries] for r in rollouts]


@torch.no_grad()
def appended_beliefs(lm, rollouts: list[Rollout], probe: list[int], gold: int) -> list[list[float]]:
    """Append, read, crop. Reading the rollout's text, in pieces, takes the place of plain(). The rollouts are of one length."""
    ids, probes = torch.tensor([r.ids for r in rollouts]), torch.tensor([probe] * len(rollouts))
    cache, at, beliefs = DynamicCache(config=lm.config), 0, []
    for boundary in rollouts[0].boundaries:
        lm.base_model(input_ids=ids[:, at:boundary], cache=cache, use_cache=True)
        hidden, at = lm.base_model(input_ids=probes, cache=cache, use_cache=True)[0], boundary
        beliefs.append(head_logps(lm, hidden[:, -gold - 1:-1], probes[:, -gold:]).mean(1).tolist())
        cache.crop(-len(probe))
    own = [j for j, m in enumerate(rollouts[0].mask) if m]
    head_logps(lm, lm.base_model(input_ids=ids[:, at:], cache=cache, use_cache=True)[0][:, :1].expand(-1, len(own), -1), ids[:, own])   # its price alone
    return [list(b) for b in zip(*beliefs)]


@torch.no_grad()
def masked_scores(lm, rollouts: list[Rollout], probe: list[int], gold: int) -> tuple[list[torch.Tensor], list[list[float]]]:
    """(old log-probs, beliefs): rollout and probes as one row, in one forward. The rollouts are of one length and form."""
    b, P, L, rows = torch.tensor(rollouts[0].boundaries), len(probe), len(rollouts[0].ids), len(rollouts)
    limit = torch.cat([torch.full((L,), L), b.repeat_interleave(P)])                       # how much of the rollout a token sees
    segment = torch.cat([torch.zeros(L), torch.arange(1, len(b) + 1).repeat_interleave(P)])
    positions = torch.cat([torch.arange(L), limit[L:] + torch.arange(P).repeat(len(b))])
    ids = torch.tensor([r.ids + probe * len(b) for r in rollouts])
    k = torch.arange(len(limit))
    visible = (k <= k[:, None]) & ((segment == segment[:, None]) | (k < limit[:, None].clamp(max=L)))
    mask = torch.zeros(visible.shape, dtype=lm.dtype).masked_fill_(~visible, torch.finfo(lm.dtype).min).expand(rows, 1, -1, -1)
    hidden = lm.base_model(input_ids=ids, position_ids=positions.expand(rows, -1), attention_mask=mask, use_cache=False)[0]
    own = torch.tensor([j for j, m in enumerate(rollouts[0].mask) if m])
    asked = (L + torch.arange(len(b))[:, None] * P + torch.arange(P - gold, P)).flatten()
    return list(head_logps(lm, hidden[:, own - 1], ids[:, own])), head_logps(lm, hidden[:, asked - 1], ids[:, asked]).view(rows, len(b), gold).mean(2).tolist()


@torch.no_grad()
def reread(lm, tokenizer, prompts: list[list[int]], search, cfg: Config) -> list[list[int]]:
    """Rollouts that read all of their text again each turn. Each turn searches."""
    rows, eos = [list(p) for p in prompts], {tokenizer.eos_token_id}
    sampling = GenerationConfig(do_sample=False, max_new_tokens=cfg.max_new_tokens, pad_token_id=tokenizer.pad_token_id, eos_token_id=sorted(eos))
    for turn in range(cfg.max_turns):
        ids, seen = left_pad(rows, tokenizer.pad_token_id, lm.device)
        end = igpo.TurnEnd(tokenizer, ids.shape[1], len(rows), eos)
        out = lm.generate(ids, attention_mask=seen, generation_config=sampling, stopping_criteria=StoppingCriteriaList([end]))
        rows = [row + new[:n] for row, new, n in zip(rows, out[:, ids.shape[1]:].tolist(), end.length)]
        if turn < cfg.max_turns - 1:
            rows = [row + encode_information(tokenizer, found, None, cfg.max_info_tokens) for row, found in zip(rows, search.search_many(["q"] * len(rows), 1))]
    return rows


def naive_gradient(model, rollouts: list[Rollout], old: list[torch.Tensor], returns: list[list[float]], cfg: Config) -> None:
    """igpo.accumulate_gradient, the reference being the old policy, with all logits in fp32."""
    lm, pad = unwrap(model), lambda tensors: pad_sequence(tensors, batch_first=True)
    for batch in by_tokens([len(r.ids) for r in rollouts], cfg.batch_tokens):
        part = [rollouts[i] for i in batch]
        ids, mask = pad([torch.tensor(r.ids) for r in part]), pad([torch.tensor(r.mask) for r in part])[:, 1:]
        before, spread = torch.zeros(mask.shape), torch.zeros(mask.shape)
        before[mask.bool()] = torch.cat([old[i] for i in batch])
        spread[mask.bool()] = torch.tensor([returns[i][t] for i in batch for t in rollouts[i].policy_turns])
        logits = lm(input_ids=ids, use_cache=False).logits.float() / cfg.temperature
        logp = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        loss, _ = igpo.policy_loss(logp, before, before, spread, mask, cfg.clip, cfg.kl_coef)
        (loss * len(batch) / len(rollouts)).backward()


# ---- measuring -------------------------------------------------------------------------------------------------------

def interleaved(forms: dict, repetitions: int) -> tuple[dict, dict[str, list[float]]]:
    """(what each form gave the first time, its seconds in each repetition); the forms take turns. Dearer than a second: no warm-up."""
    seconds, results = {name: [] for name in forms}, {}
    for k in range(repetitions + 1):
        for name, form in forms.items():
            start = time.process_time()
            result = form()
            seconds[name].append(time.process_time() - start)
            results.setdefault(name, result)
        if k == repetitions - 1 and seconds[name][0] > 1:
            break
    return results, {name: s[-repetitions:] for name, s in seconds.items()}


def ratio(a: list[float], b: list[float]) -> list[float]:
    """[least, median, greatest] of a / b over the repetitions."""
    values = [x / y for x, y in zip(a, b)]
    return [min(values), statistics.median(values), max(values)]


def measure_belief(model, tokenizer, turns: int, rows: int, repetitions: int, own: int = 25, shown: int = 50) -> dict:
    lm, rng, answers = unwrap(model), random.Random(turns), ["Tavo Velmar"] * rows
    rollouts, cfg = [made_rollout(rng, turns, 1000, own=own, shown=shown) for _ in range(rows)], Config(batch_tokens=16_384)
    gold = len(igpo.encode_gold(tokenizer, answers[0]))
    probe = encode(tokenizer, SCHEMA) + igpo.encode_gold(tokenizer, answers[0])
    found, seconds = interleaved({"ours": lambda: forward_scores(model, tokenizer, rollouts, answers, cfg), "plain": lambda: plain(lm, rollouts),
                                  "mask": lambda: masked_scores(lm, rollouts, probe, gold), "append": lambda: appended_beliefs(lm, rollouts, probe, gold),
                                  "naive": lambda: naive_beliefs(lm, rollouts, probe, gold)}, repetitions)
    if lm.dtype == torch.float32:
        logps, beliefs = found["ours"]
        assert all(torch.allclose(a, b, atol=1e-3) for other in (found["plain"], found["mask"][0]) for a, b in zip(logps, other))
        assert all(abs(x - y) < 1e-3 for other in (found["naive"], found["append"], found["mask"][1]) for a, b in zip(beliefs, other) for x, y in zip(a, b))
    return {"turns": turns, "tokens": len(rollouts[0].ids), "probe tokens": turns * len(probe), "rollouts": rows, "seconds": seconds["ours"],
            "ours / plain": ratio(seconds["ours"], seconds["plain"]), **{f"{k} / ours": ratio(seconds[k], seconds["ours"]) for k in ("naive", "append", "mask")}}


def measure_rollout(model, tokenizer, turns: int, questions: int, group: int, repetitions: int) -> dict:
    """Groups of prompts, each of a length of its own about 250."""
    rng, lm = random.Random(turns), unwrap(model)
    cfg = Config(max_turns=turns, max_new_tokens=24, max_info_tokens=100, temperature=0.0)
    prompts = [p for p in ([rng.randrange(1000) for _ in range(rng.randrange(200, 300))] for _ in range(questions)) for _ in range(group)]

    def ours():
        rollouts = [Rollout(list(p), [0] * len(p), [-1] * len(p), [len(p)]) for p in prompts]
        list(igpo.finish(model, tokenizer, rollouts, OnePassage(), cfg))
        return [r.ids for r in rollouts]
    kept, igpo.parse_turn = igpo.parse_turn, lambda text: ("search", "q")
    try:
        found, seconds = interleaved({"ours": ours, "reread": lambda: reread(lm, tokenizer, prompts, OnePassage(), cfg)}, repetitions)
    finally:
        igpo.parse_turn = kept
    same = sum(a == b for a, b in zip(found["ours"], found["reread"])) / len(prompts)
    assert same == 1 or lm.dtype != torch.float32, f"only {same:.0%} of the rollouts have the same ids"
    return {"turns": turns, "rollouts": len(prompts), "group": group, "tokens": max(map(len, found["ours"])), "seconds": seconds["ours"], "same ids": same,
            "reread / ours": ratio(seconds["reread"], seconds["ours"])}


def measure_refill(model, tokenizer, rollouts: int, at_once: int, repetitions: int) -> dict:
    """Rollouts of 1 to 6 turns, by what they wrote: one that ends makes room for the next, against one batch after the other."""
    rng, lm, forwards = random.Random(0), unwrap(model), {}
    cfg = Config(max_turns=6, max_new_tokens=24, max_info_tokens=100, temperature=0.0, rollout_batch=at_once)
    prompts = [[rng.randrange(1000) for _ in range(rng.randrange(200, 300))] for _ in range(rollouts)]

    def play(form, size):
        begun = [Rollout(list(p), [0] * len(p), [-1] * len(p), [len(p)]) for p in prompts]
        seen = []
        hook = lm.base_model.register_forward_pre_hook(lambda *a: seen.append(1))
        for first in range(0, rollouts, size):
            list(igpo.finish(model, tokenizer, begun[first:first + size], OnePassage(), cfg))
        hook.remove()
        forwards[form] = len(seen)
        return [r.ids for r in begun], statistics.mean(len(r.boundaries) for r in begun)
    kept, igpo.parse_turn = igpo.parse_turn, lambda text: ("answer", "a") if zlib.crc32(text.encode()) % 4 == 0 else ("search", "q")
    try:
        found, seconds = interleaved({"ours": lambda: play("ours", rollouts), "batches": lambda: play("batches", at_once)}, repetitions)
    finally:
        igpo.parse_turn = kept
    assert found["ours"] == found["batches"] or lm.dtype != torch.float32
    return {"rollouts": rollouts, "at once": at_once, "turns": found["ours"][1], "seconds": seconds["ours"], "batches / ours": ratio(seconds["batches"], seconds["ours"]),
            "forwards, batches / ours": forwards["batches"] / forwards["ours"]}


def update_case(shape: str, dtype: str, checkpointing: bool) -> tuple:
    """(model, rollouts, old log-probs, returns, config) of an update, the same in every process."""
    model, tokenizer = make_model(shape, dtype, checkpointing, VOCABULARY)
    rng, cfg = random.Random(0), Config(batch_tokens=4096, gradient_checkpointing=checkpointing)
    rollouts = [made_rollout(rng, turns, VOCABULARY) for turns in ((10, 8) if shape == "demo" else (10,))]
    old = forward_scores(model, tokenizer, rollouts, None, cfg)[0]
    return model.train(), rollouts, old, [[1.0 + t for t in range(len(r.boundaries))] for r in rollouts], cfg


def update(form: str, case: tuple) -> dict[str, torch.Tensor]:
    model, rollouts, old, returns, cfg = case
    model.zero_grad(set_to_none=True)
    naive_gradient(model, rollouts, old, returns, cfg) if form == "naive" else igpo.accumulate_gradient(model, rollouts, old, old, returns, cfg)
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def peak_of_update(form: str, shape: str, dtype: str, checkpointing: str) -> float:
    """MB above what is held before, in this process; measure_update() starts one for each form. Linux alone tells and forgets a peak."""
    peak = lambda: int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) / 2**10
    case = update_case(shape, dtype, checkpointing == "True")
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    update(form, case)
    return peak() - before


def measure_update(shape: str, dtype: str, checkpointing: bool, repetitions: int) -> dict:
    peaks = {}
    for form in ("naive", "ours"):
        # Above 64 KB memory is taken from the system and given back when it is free, so that the resident size is what is in use.
        ran = subprocess.run([sys.executable, __file__, "--peak", form, shape, dtype, str(checkpointing)], capture_output=True, text=True, check=True,
                             env={**os.environ, **dict.fromkeys([*KEEP, "MALLOC_MMAP_THRESHOLD_"], "65536")})
        peaks[form] = float(ran.stdout.splitlines()[-1])
    case = update_case(shape, dtype, checkpointing)
    gradients, seconds = interleaved({form: lambda form=form: update(form, case) for form in ("naive", "ours")}, repetitions)
    apart = max((gradients["ours"][n] - g).abs().max().item() for n, g in gradients["naive"].items())
    assert apart < 1e-5 or dtype != "float32", f"gradients differ by {apart}"
    rollouts = case[1]
    return {"checkpointing": "on" if checkpointing else "off", "tokens": sum(len(r.ids) for r in rollouts), "policy tokens": sum(sum(r.mask) for r in rollouts),
            "gradients apart": f"{apart:.0e}", "seconds": seconds["ours"], "naive / ours, seconds": ratio(seconds["naive"], seconds["ours"]),
            "peak MB": peaks["ours"], "naive peak MB": peaks["naive"], "ours / naive, peak": peaks["ours"] / peaks["naive"]}


def measure_padding(budget: int = 8192, rollouts: int = 64, seeds: int = 20) -> list[float]:
    """[least, median, greatest] share of padding over seeds. 1 to 5 turns of 60 to 250 tokens, results of 200 to 500, prompts of 250 to 350."""
    shares = []
    for seed in range(seeds):
        rng = random.Random(seed)
        lengths = [rng.randint(250, 350) + sum(rng.randint(60, 250) + rng.randint(200, 500) for _ in range(rng.randint(0, 4))) + rng.randint(60, 250)
                   for _ in range(rollouts)]
        shares.append(1 - sum(lengths) / sum(len(batch) * max(lengths[i] for i in batch) for batch in by_tokens(lengths, budget)))
    return [min(shares), statistics.median(shares), max(shares)]


def measure_step(model, tokenizer, search, questions: list[dict], cfg: Config, repetitions: int, scripted: bool) -> dict:
    """Medians over steps, after one that is not counted. scripted: each turn searches, as in measure_rollout."""
    optimizer, rows = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5), []
    kept, scores, probed = igpo.parse_turn, igpo.forward_scores, {}

    def timed(model, tokenizer, rollouts, golds, cfg):      # the same rollouts are read with probes (old policy) and without (reference)
        start = time.process_time()
        try:
            return scores(model, tokenizer, rollouts, golds, cfg)
        finally:
            probed[golds is not None] = time.process_time() - start
    igpo.parse_turn, igpo.forward_scores = (lambda text: ("search", "q")) if scripted else kept, timed
    igpo.time = SimpleNamespace(perf_counter=time.process_time)
    try:
        for _ in range(repetitions + 1):
            row, _ = igpo.train_step(model, tokenizer, optimizer, questions, igpo.MeteredSearch(search), cfg, 0.0)
            rows.append({**{name: row[f"seconds_{name}"] / row["seconds"] for name in PHASES}, "probes": (probed[True] - probed[False]) / row["seconds"],
                         **{key: row[key] for key in ("policy_tokens", "turns", "seconds")}})
    finally:
        igpo.parse_turn, igpo.forward_scores, igpo.time = kept, scores, time
    return {"rollouts": len(questions) * cfg.group, **{key: statistics.median(row[key] for row in rows[1:]) for key in rows[0]}}


def measure(shape: str, dtype: str, quick: bool, repetitions: int) -> dict:
    """Everything of one shape; of the Qwen shape in fp32 not what would take an hour."""
    def say(what):
        print(f"{time.strftime('%H:%M:%S')}  {shape} {dtype}: {what}", file=sys.stderr, flush=True)
    demo, found = shape == "demo", {"repetitions": repetitions, "belief": [], "rollout": [], "update": []}
    model, tokenizer = make_model(shape, dtype)
    for turns in (2, 4, 8, 10, 16) if demo and not quick else (10,):
        say(f"belief, {turns} turns")
        found["belief"].append(measure_belief(model, tokenizer, turns, 2 if demo else 1, repetitions))
    if not quick and (demo or dtype != "float32"):
        say("belief, 10 turns of more tokens")
        found["belief"].append(measure_belief(model, tokenizer, 10, 2 if demo else 1, repetitions, own=50, shown=120))
    for turns in (4, 8) if demo or dtype != "float32" else ():
        say(f"rollout, {turns} turns")
        found["rollout"].append(measure_rollout(model, tokenizer, turns, 2 if demo else 1, 8 if demo else 4, repetitions))
    if demo and not quick:
        say("refill")
        found["refill"] = [measure_refill(model, tokenizer, 64, size, repetitions) for size in (8, 16)]
    if demo:
        say("a whole step")
        questions, cfg = igpo.load_questions(str(HERE.parent / "demo/train.jsonl"))[:8], Config(**DEMO, group=4 if quick else 8)
        found["step"] = measure_step(model, tokenizer, open_search(f"bm25:{HERE.parent}/demo/corpus.jsonl"), questions, cfg, repetitions, False)
    elif dtype != "float32":
        say("a whole step")
        questions = [{"id": "1", "question": "Who founded Tavo?", "answers": ["Mira Oss"]}]
        cfg = Config(group=4, max_turns=4, max_new_tokens=24, max_info_tokens=100, gradient_checkpointing=False, batch_tokens=4096)
        found["step"] = measure_step(model, tokenizer, OnePassage(), questions, cfg, 1, True)
    del model
    for checkpointing in (True, False) if demo and not quick else (True,):
        say(f"update, gradient checkpointing {'on' if checkpointing else 'off'}")
        found["update"].append(measure_update(shape, dtype, checkpointing, repetitions))
    return found


# ---- what is written -------------------------------------------------------------------------------------------------

def figures(found: dict, padding: list[float]) -> dict[str, tuple]:
    """{key: ([least, median, greatest], goal, is it met)} of one shape."""
    belief = next(b for b in found["belief"] if b["turns"] == 10)
    rows = {"belief_vs_naive": (belief["naive / ours"], "at least 5", lambda x: x >= 5), "belief_vs_plain": (belief["ours / plain"], "at most 1.10", lambda x: x <= 1.1),
            **{f"rollout_vs_reread_{r['turns']}": (r["reread / ours"], f"at least {n}", lambda x, n=n: x >= n) for r, n in zip(found["rollout"], (2, 3))},
            **{"update_peak_vs_naive": ([u["ours / naive, peak"]] * 3, "at most 1/3", lambda x: x <= 1 / 3) for u in found["update"][:1]}, "padding": (padding, "at most 0.10", lambda x: x <= 0.1)}
    return {key: (values, goal, met(values[1])) for key, (values, goal, met) in rows.items()}


def table(heading: list[str], rows: list[list]) -> list[str]:
    def text(x):
        if isinstance(x, list):
            return f"{x[0]:.2f} – **{x[1]:.2f}** – {x[2]:.2f}" if x[0] < x[2] else f"**{x[1]:.2f}**"
        return x if isinstance(x, str) else f"{x:,.2f}" if isinstance(x, float) and x < 100 else f"{x:,.0f}"
    return ["| " + " | ".join(heading) + " |", "|---|" + "---:|" * (len(heading) - 1), *("| " + " | ".join(map(text, row)) + " |" for row in rows), ""]


def columns(rows: list[dict], names: list[str]) -> list[str]:
    return table(names, [[statistics.median(r[n]) if n == "seconds" else f"{r[n]:.0%}" if n == "same ids" else r[n] for n in names] for r in rows])


def markdown(setting: dict, results: dict, padding: list[float]) -> str:
    lines = ["# Speed and memory of igpo.py", "", "`OMP_NUM_THREADS=1 python benchmarks/speed.py`; what is measured is told at the top of that file. Ratios: least – **median** "
             "– greatest over the repetitions. " + ", ".join(f"{key} {value}" for key, value in setting.items()) + ".", ""]
    goals = [(shape, key, *figure) for shape, found in results.items() for key, figure in figures(found, padding).items()]
    lines += table(["against the goals", "shape", "measured", "goal", "met"], [[key, shape if key != "padding" else "any", values, goal, "yes" if met else "**no**"]
                                                                               for shape, key, values, goal, met in goals if key != "padding" or shape == next(iter(results))])
    for shape, found in results.items():
        lines += [f"## {shape}, {found['repetitions']} repetitions", "", "Belief and old log-probs:", ""]
        lines += columns(found["belief"], ["turns", "tokens", "probe tokens", "rollouts", "seconds", "naive / ours", "ours / plain", "append / ours", "mask / ours"])
        if found["rollout"]:
            lines += ["Rollouts; tokens of the longest:", "", *columns(found["rollout"], ["turns", "tokens", "rollouts", "group", "seconds", "same ids", "reread / ours"])]
        if "refill" in found:
            lines += ["Rollouts of 1 to 6 turns, a place that is free being filled at once, against one batch after the other:", ""]
            lines += columns(found["refill"], ["rollouts", "at once", "turns", "seconds", "batches / ours", "forwards, batches / ours"])
        for u in found["update"][:1]:
            lines += [f"Update, {u['tokens']:,} tokens, {u['policy tokens']:,} of them the policy's, vocabulary 151,936:", ""]
            lines += columns(found["update"], ["checkpointing", "seconds", "naive / ours, seconds", "peak MB", "naive peak MB", "ours / naive, peak", "gradients apart"])
        if s := found.get("step"):
            lines += [f"A step of {s['rollouts']} rollouts of {s['turns']:.1f} turns, {s['policy_tokens']:,.0f} policy tokens: {s['seconds']:.1f} s, of which "
                      + ", ".join(f"{name} {s[name]:.0%}" for name in PHASES) + f". The probes of the beliefs take {s['probes']:.1%} of the step.", ""]
    return "\n".join(lines)


def memory_table() -> str:
    """For each size and memory the largest --rollout_batch and --batch_tokens that fit in nine tenths of it, bf16, all else as by default."""
    rows = []
    for size, shape in QWEN.items():
        model = qwen(shape, torch.bfloat16, checkpointing=True, device="meta")
        card = memory_card(model, Config())
        rows.append([size] + [f"{card[key] / 2**30:.1f}" for key in ("weights", "adapter", "rollouts", "update", "peak")])
        for memory in (8, 16, 24, 80):
            batch, tokens = (max((v for v in values if memory_card(model, Config(**{"rollout_batch": 1, "batch_tokens": 1, option: v}))["peak"] <= 0.9 * memory * 2**30),
                                 default=0) for option, values in (("rollout_batch", [2**k for k in range(9)]), ("batch_tokens", [2**k for k in range(12, 17)])))
            rows[-1].append(f"{batch} / {tokens:,}" if batch and tokens else "no")
    return "\n".join(table(["Qwen2.5", "weights", "adapter", "rollouts", "update", "peak", "8 GB", "16 GB", "24 GB", "80 GB"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the demo policy alone, nothing written")
    parser.add_argument("--memory", action="store_true", help="print the README's table of what fits, computed, and stop")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak or args.memory:
        return print(peak_of_update(*args.peak) if args.peak else memory_table())
    if KEEP.items() - os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP})
    setting = {"machine": f"{os.cpu_count()} cores, {platform.machine()}, no GPU", "threads": "one", "python": platform.python_version(),
               **{m.__name__: m.__version__ for m in (torch, transformers, peft)}}
    padding, results = measure_padding(), {}
    for shape, dtype, repetitions in [("demo", "float32", 2)] if args.quick else [("demo", "float32", 3), ("0.5B", "bfloat16", 2), ("0.5B", "float32", 2)]:
        results["demo policy" if shape == "demo" else f"Qwen2.5-0.5B shape, {dtype}"] = measure(shape, dtype, args.quick, repetitions)
        if not args.quick:
            (HERE / "speed.json").write_text(json.dumps({"setting": setting, "padding": padding, "results": results}, indent=1) + "\n")
            (HERE / "speed.md").write_text(markdown(setting, results, padding))
    print(markdown(setting, results, padding))
    print(json.dumps({key: round(values[1], 3) for key, (values, _, _) in figures(results["demo policy"], padding).items()}))


if __name__ == "__main__":
    main()
