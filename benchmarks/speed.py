"""What the tricks of igpo.py are worth: belief, rollout, update and a whole step beside the obvious forms.

    OMP_NUM_THREADS=1 python -m benchmarks.speed         # demo policy and a Qwen2.5-0.5B shape: speed.md
    python -m benchmarks.speed --quick                   # the demo policy alone, nothing written
    python -m benchmarks.speed --old ../earlier          # this code beside that of a folder: speed_old.md

All forms of a thing are timed in one process and take turns. A ratio is that of two neighbours in one
repetition, given as least, median and greatest over the repetitions. Seconds are CPU seconds of one thread,
so that what else the machine does matters little. In float32 the forms must first give the same: numbers to
1e-3, gradients to 1e-5, ids exactly.

  belief    old log-probs and all beliefs of a rollout by igpo.score against
              naive: one forward per boundary, of the text up to it and the probe; the beliefs alone
              plain: one forward of the rollout, for the old log-probs alone
  rollout   igpo.play against reading the whole text again each turn with the same generate(). Greedy.
            parse_turn is replaced on both sides: each turn searches, and gets a passage of 100 tokens
  update    igpo.accumulate_gradient against the log-softmax of all logits in fp32, vocabulary 151,936. Memory
            is the peak resident size of a process of its own, less what it held before the update
  padding   share of padding in the batches of igpo.by_tokens, 64 rollouts of random length, default budget
  step      where the seconds of a whole step go, and how many of them the probes take

--old: rollouts, scoring and update of a step of the demo by the code of a folder (a worktree of another
commit) and by this one. Each lives in a process of its own, and they take turns.

--quick ends with a JSON object: how many times faster belief_vs_naive, rollout_vs_reread_4 and _8 are, how
many times slower belief_vs_plain, and, as shares, update_peak_vs_naive and padding.
"""
import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config

import igpo
from benchmarks.common import HERE, ROOT, commit, machine, table
from igpo import DEMO, Config, Rollout, by_tokens, unwrap
from search_tool import Passage, Results, load_questions, open_search

VOCABULARY = 151_936
# glibc's settings under which a process keeps its memory: page faults would drown what is measured.
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(10**11), "MALLOC_TOP_PAD_": str(2**28)}
PHASES = ("rollout", "score", "update")

# ---- models and rollouts -----------------------------------------------------------------------------------
def make_model(shape: str, dtype: str, checkpointing: bool = False, words: int = 0):
    """(model, the demo's tokenizer): the demo policy, with a vocabulary of `words`, or random Qwen2 weights.

    LoRA starts as the identity, under which gradients of half of it are 0: it is stirred.
    """
    model, tokenizer = igpo.load_model(Config(**{**DEMO, "gradient_checkpointing": checkpointing}))
    torch.manual_seed(0)
    if shape == "0.5B":
        config = Qwen2Config(hidden_size=896, num_hidden_layers=24, num_attention_heads=14,
                             num_key_value_heads=2, intermediate_size=4864, vocab_size=VOCABULARY,
                             tie_word_embeddings=True, max_position_embeddings=32_768)
        lm = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa")
        if checkpointing:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
        model = get_peft_model(lm, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")).eval()
    elif words:
        unwrap(model).resize_token_embeddings(words, mean_resizing=False)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.02)
    return model, tokenizer

def made_rollout(rng: random.Random, turns: int, words: int, own: int = 25, shown: int = 50) -> Rollout:
    """Random ids in the form of a rollout: 1,000 tokens at 10 turns."""
    ids = lambda n: [rng.randrange(words) for _ in range(n)]
    r = Rollout(ids(300), [0] * 300, [300])
    for turn in range(turns):
        r.write(ids(own), True)
        if turn < turns - 1:
            r.write(ids(shown), False)
            r.boundaries.append(len(r.ids))
    return r

class OnePassage:
    """Finds the same passage whatever is asked; max_info_tokens cuts it."""
    def search_many(self, queries: list[str], k: int) -> list[Results]:
        passage = Passage("1", "Tavo", "The town of Tavo lies on the river Mar. " * 40)
        return [Results([passage]) for _ in queries]

def always_search(text: str) -> tuple[str, str]:
    """In the place of igpo.parse_turn."""
    return "search", "q"

# ---- the obvious forms -------------------------------------------------------------------------------------
@torch.no_grad()
def causal_logps(lm, rows: list[list[int]], targets: list[list[int]], budget: int = 16_384) -> list:
    """log pi of the tokens at targets."""
    found = [None] * len(rows)
    for batch in by_tokens([len(r) for r in rows], budget):
        ids = pad_sequence([torch.tensor(rows[i]) for i in batch], batch_first=True)
        hidden = lm.base_model(input_ids=ids, use_cache=False)[0]
        for k, i in enumerate(batch):
            j = torch.tensor(targets[i])
            logits = lm.get_output_embeddings()(hidden[k, j - 1]).float()
            found[i] = logits.gather(-1, ids[k, j][:, None])[:, 0] - logits.logsumexp(-1)
    return found

def plain(lm, rollouts: list[Rollout]) -> list:
    own = [[j for j, m in enumerate(r.mask) if m] for r in rollouts]
    return causal_logps(lm, [r.ids for r in rollouts], own)

def naive_beliefs(lm, rollouts: list[Rollout], probe: list[int], gold: int) -> list[list[float]]:
    """One forward per boundary, of probes that end in `gold` tokens of the answer."""
    rows = [r.ids[:b] + probe for r in rollouts for b in r.boundaries]
    found = iter(causal_logps(lm, rows, [list(range(len(row) - gold, len(row))) for row in rows]))
    return [[next(found).mean().item() for _ in r.boundaries] for r in rollouts]

@torch.no_grad()
def reread(lm, tokenizer, prompts: list[list[int]], search, cfg: Config) -> list[list[int]]:
    """Rollouts that read all of their text again each turn."""
    rows, eos = [list(p) for p in prompts], [tokenizer.eos_token_id]
    sampling = GenerationConfig(do_sample=False, max_new_tokens=cfg.max_new_tokens, pad_token_id=0,
                                eos_token_id=eos)
    for turn in range(cfg.max_turns):
        ids, seen = (igpo.pad(x, lm.device, "left") for x in (rows, [[1] * len(row) for row in rows]))
        out = lm.generate(ids, attention_mask=seen, generation_config=sampling,
                          stopping_criteria=[igpo.stop_tags(tokenizer)])
        new = out[:, ids.shape[1]:].tolist()
        rows = [row + turn[:igpo.turn_end(turn, tokenizer, eos)[0]] for row, turn in zip(rows, new)]
        if turn < cfg.max_turns - 1:
            rows = [row + igpo.encode_information(tokenizer, found, cfg.max_info_tokens)[0]
                    for row, found in zip(rows, search.search_many(["q"] * len(rows), 1))]
    return rows

def naive_gradient(model, rollouts: list[Rollout], old: list, advantages: list, cfg: Config) -> None:
    """igpo.accumulate_gradient, the reference being the old policy, with all logits in fp32."""
    lm, pad = unwrap(model), lambda tensors: pad_sequence(tensors, batch_first=True)
    for batch in by_tokens([len(r.ids) for r in rollouts], cfg.batch_tokens):
        part = [rollouts[i] for i in batch]
        ids, mask = pad([torch.tensor(r.ids) for r in part]), pad([torch.tensor(r.mask) for r in part])[:, 1:]
        before, A = torch.zeros(mask.shape), torch.zeros(mask.shape)
        before[mask.bool()] = torch.cat([old[i] for i in batch])
        A[mask.bool()] = torch.tensor([advantages[i][t] for i in batch for t in rollouts[i].policy_turns])
        logits = lm(input_ids=ids, use_cache=False).logits.float() / cfg.temperature
        logp = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        loss, _ = igpo.policy_loss(logp, before, before, A, mask, cfg.clip, cfg.kl_coef)
        (loss * len(batch) / len(rollouts)).backward()

# ---- measuring ---------------------------------------------------------------------------------------------
def interleaved(forms: dict, repetitions: int) -> tuple[dict, dict[str, list[float]]]:
    """(what each form gave first, its seconds by repetition). Forms of over a second are not warmed up."""
    seconds, results = {name: [] for name in forms}, {}
    for k in range(repetitions + 1):
        for name, form in forms.items():
            start = time.process_time()
            result = form()
            seconds[name].append(time.process_time() - start)
            results.setdefault(name, result)
        if k == repetitions - 1 and all(s[0] > 1 for s in seconds.values()):
            break
    return results, {name: s[-repetitions:] for name, s in seconds.items()}

def ratio(a: list[float], b: list[float]) -> list[float]:
    """[least, median, greatest] of a / b over the repetitions."""
    values = [x / y for x, y in zip(a, b)]
    return [min(values), statistics.median(values), max(values)]

def measure_belief(model, tokenizer, size: tuple[int, int, int], rows: int, repetitions: int) -> dict:
    """size: turns, tokens of the policy in a turn, and tokens of what is found."""
    lm, rng, answers = unwrap(model), random.Random(size[0]), [["Tavo Velmar"]] * rows
    turns, own, shown = size
    rollouts = [made_rollout(rng, turns, 1000, own, shown) for _ in range(rows)]
    cfg = Config(batch_tokens=16_384)
    gold = igpo.encode_gold(tokenizer, answers[0])
    probe = igpo.encode(tokenizer, igpo.SCHEMA) + gold
    forms = {"ours": lambda: igpo.score(model, tokenizer, rollouts, answers, cfg),
             "plain": lambda: plain(lm, rollouts),
             "naive": lambda: naive_beliefs(lm, rollouts, probe, len(gold))}
    found, seconds = interleaved(forms, repetitions)
    if lm.dtype == torch.float32:
        logps, beliefs = found["ours"]
        assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(logps, found["plain"]))
        assert all(abs(x - y) < 1e-3 for a, b in zip(beliefs, found["naive"]) for x, y in zip(a, b))
    return {"turns": turns, "tokens": len(rollouts[0].ids), "probe tokens": turns * len(probe),
            "rollouts": rows, "seconds": seconds["ours"],
            "naive / ours": ratio(seconds["naive"], seconds["ours"]),
            "ours / plain": ratio(seconds["ours"], seconds["plain"])}

def measure_rollout(model, tokenizer, turns: int, questions: int, group: int, repetitions: int) -> dict:
    """Groups of prompts, each of a length of its own about 250."""
    rng, lm = random.Random(turns), unwrap(model)
    cfg = Config(max_turns=turns, max_new_tokens=24, max_info_tokens=100, temperature=0.0)
    prompts = [[rng.randrange(1000) for _ in range(rng.randrange(200, 300))] for _ in range(questions)]
    prompts = [p for p in prompts for _ in range(group)]

    def ours():
        rollouts = [Rollout(list(p), [0] * len(p), [len(p)]) for p in prompts]
        igpo.play(model, tokenizer, rollouts, OnePassage(), cfg)
        return [r.ids for r in rollouts]
    with patch.object(igpo, "parse_turn", always_search):
        found, seconds = interleaved(
            {"ours": ours, "reread": lambda: reread(lm, tokenizer, prompts, OnePassage(), cfg)}, repetitions)
    same = sum(a == b for a, b in zip(found["ours"], found["reread"])) / len(prompts)
    assert same == 1 or lm.dtype != torch.float32, f"only {same:.0%} of the rollouts have the same ids"
    return {"turns": turns, "tokens": max(map(len, found["ours"])), "rollouts": len(prompts), "group": group,
            "seconds": seconds["ours"], "same ids": f"{same:.0%}",
            "reread / ours": ratio(seconds["reread"], seconds["ours"])}

def update_case(shape: str, dtype: str, checkpointing: bool) -> tuple:
    """(model, rollouts, old log-probs, advantages, config) of an update, the same in every process."""
    model, tokenizer = make_model(shape, dtype, checkpointing, VOCABULARY)
    rng, cfg = random.Random(0), Config(batch_tokens=4096, gradient_checkpointing=checkpointing)
    rollouts = [made_rollout(rng, turns, VOCABULARY) for turns in ((10, 8) if shape == "demo" else (10,))]
    old, _ = igpo.score(model, tokenizer, rollouts, None, cfg)
    for module in model.modules():      # as igpo.update() does: only then do layers recompute
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
    return model, rollouts, old, [[1.0 + t for t in range(len(r.boundaries))] for r in rollouts], cfg

def gradient(form: str, case: tuple) -> dict[str, torch.Tensor]:
    model, rollouts, old, advantages, cfg = case
    model.zero_grad(set_to_none=True)
    if form == "naive":
        naive_gradient(model, rollouts, old, advantages, cfg)
    else:
        igpo.accumulate_gradient(model, rollouts, old, old, advantages, cfg)
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

def peak_of_update(form: str, shape: str, dtype: str, checkpointing: str) -> float:
    """MB above what is held before, in this process. Only Linux tells a peak, and forgets it when asked."""
    def peak() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10
    case = update_case(shape, dtype, checkpointing == "True")
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    gradient(form, case)
    return peak() - before

def measure_update(shape: str, dtype: str, checkpointing: bool, repetitions: int) -> dict:
    peaks = {}
    for form in ("naive", "ours"):
        # Above 64 KB memory comes from the system and goes back when it is free: what is resident is in use.
        command = [sys.executable, "-m", "benchmarks.speed", "--peak", form, shape, dtype, str(checkpointing)]
        env = {**os.environ, **dict.fromkeys([*KEEP, "MALLOC_MMAP_THRESHOLD_"], "65536")}
        ran = subprocess.run(command, capture_output=True, text=True, check=True, env=env, cwd=ROOT)
        peaks[form] = float(ran.stdout.splitlines()[-1])
    case = update_case(shape, dtype, checkpointing)
    forms = {form: lambda form=form: gradient(form, case) for form in ("naive", "ours")}
    gradients, seconds = interleaved(forms, repetitions)
    apart = max((gradients["ours"][n] - g).abs().max().item() for n, g in gradients["naive"].items())
    assert apart < 1e-5 or dtype != "float32", f"gradients differ by {apart}"
    return {"checkpointing": "on" if checkpointing else "off", "tokens": sum(len(r.ids) for r in case[1]),
            "seconds": seconds["ours"], "naive / ours, seconds": ratio(seconds["naive"], seconds["ours"]),
            "peak MB": peaks["ours"], "naive peak MB": peaks["naive"],
            "ours / naive, peak": peaks["ours"] / peaks["naive"], "gradients apart": f"{apart:.0e}"}

def measure_padding(budget: int = 8192, rollouts: int = 64, seeds: int = 20) -> list[float]:
    """[least, median, greatest] share of padding: 1 to 5 turns of 60 to 250 tokens, results of 200 to 500."""
    shares = []
    for seed in range(seeds):
        rng = random.Random(seed)
        length = lambda: (rng.randint(250, 350) + rng.randint(60, 250) + sum(
            rng.randint(60, 250) + rng.randint(200, 500) for _ in range(rng.randint(0, 4))))
        lengths = [length() for _ in range(rollouts)]
        padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in by_tokens(lengths, budget))
        shares.append(1 - sum(lengths) / padded)
    return [min(shares), statistics.median(shares), max(shares)]

def measure_step(model, tokenizer, search, questions: list[dict], cfg: Config, repetitions: int) -> dict:
    """Medians over steps, after one that is not counted. Phases and probes are shares of a step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    score, probed, rows = igpo.score, {}, []

    def timed(model, tokenizer, rollouts, golds, cfg):      # with probes (policy) and without (reference)
        start = time.process_time()
        found = score(model, tokenizer, rollouts, golds, cfg)
        probed[golds is not None] = time.process_time() - start
        return found
    clock = SimpleNamespace(perf_counter=time.process_time)
    with patch.object(igpo, "score", timed), patch.object(igpo, "time", clock):
        for _ in range(repetitions + 1):
            row, _ = igpo.train_step(model, tokenizer, optimizer, questions, search, cfg)
            rows.append({**{name: row[f"seconds_{name}"] / row["seconds"] for name in PHASES},
                         "probes": (probed[True] - probed[False]) / row["seconds"],
                         **{key: row[key] for key in ("policy_tokens", "turns", "seconds")}})
    return {"rollouts": len(questions) * cfg.group,
            **{key: statistics.median(row[key] for row in rows[1:]) for key in rows[0]}}

def measure(shape: str, dtype: str, quick: bool, repetitions: int) -> dict:
    """Everything of one shape; of the Qwen shape in fp32 not what would take an hour."""
    def say(what: str) -> None:
        print(f"{time.strftime('%H:%M:%S')}  {shape} {dtype}: {what}", file=sys.stderr, flush=True)
    demo, found = shape == "demo", {"repetitions": repetitions, "belief": [], "rollout": [], "update": []}
    all_of_it, (model, tokenizer) = demo or dtype != "float32", make_model(shape, dtype)
    say("belief")
    sizes = [(turns, 25, 50) for turns in ((2, 4, 8, 10, 16) if demo and not quick else (10,))]
    for size in sizes + [(10, 50, 120)] * (all_of_it and not quick):
        found["belief"].append(measure_belief(model, tokenizer, size, 2 if demo else 1, repetitions))
    say("rollout")
    for turns in (4, 8) if all_of_it else ():
        groups = (2, 8) if demo else (1, 4)
        found["rollout"].append(measure_rollout(model, tokenizer, turns, *groups, repetitions))
    say("a whole step")
    if demo:
        questions = load_questions(ROOT / "demo/train.jsonl")
        search = open_search(f"bm25:{ROOT}/demo/corpus.jsonl")
        cfg = Config(**DEMO, group=4 if quick else 8)
        found["step"] = measure_step(model, tokenizer, search, questions[:8], cfg, repetitions)
    elif all_of_it:
        questions = [{"id": "1", "question": "Who founded Tavo?", "answers": ["Mira Oss"]}]
        cfg = Config(group=4, max_turns=4, max_new_tokens=24, max_info_tokens=100, batch_tokens=4096,
                     gradient_checkpointing=False)
        with patch.object(igpo, "parse_turn", always_search):
            found["step"] = measure_step(model, tokenizer, OnePassage(), questions, cfg, 1)
    del model
    for checkpointing in (True, False) if demo and not quick else (True,):
        say(f"update, gradient checkpointing {'on' if checkpointing else 'off'}")
        found["update"].append(measure_update(shape, dtype, checkpointing, repetitions))
    return found

# ---- beside other code -------------------------------------------------------------------------------------
# Runs in the other folder too, so only what both know is used. A line of stdin is a repetition.
WORKER = """
import json, sys, time, torch, igpo
torch.set_num_threads(1)
cfg = igpo.Config(**igpo.DEMO)
model, tokenizer = igpo.load_model(cfg)
search = igpo.open_search("bm25:demo/corpus.jsonl")
questions = igpo.load_questions("demo/train.jsonl")[:8]
golds = [q["answers"] for q in questions for _ in range(cfg.group)]
print("ready", flush=True)
for line in sys.stdin:
    torch.manual_seed(int(line))
    times = [time.process_time()]
    rollouts = igpo.rollout(model, tokenizer, questions, search, cfg)
    times.append(time.process_time())
    old, beliefs = igpo.score(model, tokenizer, rollouts, golds, cfg)
    times.append(time.process_time())
    igpo.accumulate_gradient(model, rollouts, old, old, [[1.0] * len(b) for b in beliefs], cfg)
    times.append(time.process_time())
    model.zero_grad()
    seconds = dict(zip(("rollout", "score", "update"), (b - a for a, b in zip(times, times[1:]))))
    tokens = sum(sum(r.mask) for r in rollouts)
    print(json.dumps({**seconds, "tokens": tokens, "belief": sum(b[-1] for b in beliefs)}), flush=True)
"""

class Worker:
    """WORKER in a folder, which waits for repetitions."""
    def __init__(self, folder: Path):
        self.process = subprocess.Popen([sys.executable, "-c", WORKER], cwd=folder, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.rows: list[dict] = []
        self.read("ready")

    def read(self, start: str) -> str:
        return next(line for line in self.process.stdout if line.startswith(start))

    def step(self, seed: int) -> None:
        print(seed, file=self.process.stdin, flush=True)
        self.rows.append(json.loads(self.read("{")))

def beside(old: Path, repetitions: int) -> list[str]:
    """Lines of a report: the seconds of each phase by both codes, and their ratio."""
    workers = [Worker(old), Worker(ROOT)]
    try:
        for k in range(repetitions + 1):
            for worker in workers[::1 - 2 * (k % 2)]:
                worker.step(k)
            print(*(worker.rows[-1] for worker in workers), sep="\n", file=sys.stderr, flush=True)
    finally:
        for worker in workers:
            worker.process.stdin.close()
            worker.process.wait()
    rows, of = [], lambda row, phase: sum(row[p] for p in (PHASES if phase == "all" else [phase]))
    for phase in (*PHASES, "all"):
        a, b = ([of(row, phase) for row in worker.rows[1:]] for worker in workers)       # the first warms up
        rows.append([phase, statistics.median(a), statistics.median(b), ratio(a, b)])
    pairs = list(zip(*(worker.rows for worker in workers)))
    same = all(a["tokens"] == b["tokens"] and abs(a["belief"] - b["belief"]) < 1e-2 for a, b in pairs)
    tokens = [f"{statistics.median(row['tokens'] for row in worker.rows):,.0f}" for worker in workers]
    played = "the same rollouts on both sides" if same else "not the same rollouts"
    then, now = commit(old), commit()
    return ["# This code beside that of another commit", "",
            f"`python -m benchmarks.speed --old FOLDER`, commit {then} beside {now}. CPU seconds of 64",
            f"rollouts of the demo, median of {repetitions} repetitions in turns, each code in a process",
            f"of its own, one thread; {played}, {' and '.join(tokens)} policy tokens.",
            f"Ratio old / now: least – **median** – greatest. {machine()}.",
            "", *written(["", then, now, "old / now"], rows)]

# ---- what is written ---------------------------------------------------------------------------------------
def written(head: list[str], rows: list[list]) -> list[str]:
    def text(x):
        if isinstance(x, list):
            return f"{x[0]:.2f} – **{x[1]:.2f}** – {x[2]:.2f}" if x[0] < x[2] else f"**{x[1]:.2f}**"
        return x if isinstance(x, str) else f"{x:,.2f}" if isinstance(x, float) and x < 100 else f"{x:,.0f}"
    return table(head, [[text(x) for x in row] for row in rows])

def columns(rows: list[dict]) -> list[str]:
    flat = [{key: statistics.median(v) if key == "seconds" else v for key, v in row.items()} for row in rows]
    return [*written(list(flat[0]), [list(row.values()) for row in flat]), ""] if flat else []

def markdown(results: dict, padding: list[float]) -> list[str]:
    lines = ["# Speed and memory of igpo.py", "",
             f"`OMP_NUM_THREADS=1 python -m benchmarks.speed`, commit {commit()}. What is measured is",
             "told at the top of benchmarks/speed.py. CPU seconds of one thread, median; ratios: least –",
             f"**median** – greatest over the repetitions. {machine()}.", "",
             f"Padding: {padding[0]:.0%} to {padding[2]:.0%}.", ""]
    for shape, found in results.items():
        lines += [f"## {shape}, {found['repetitions']} repetitions", "", "Belief and old log-probs:", "",
                  *columns(found["belief"])]
        if found["rollout"]:
            lines += ["Rollouts; tokens of the longest:", "", *columns(found["rollout"])]
        lines += ["Update; a quarter of the tokens is the policy's, and it knows 151,936 words:", "",
                  *columns(found["update"])]
        if s := found.get("step"):
            shares = ", ".join(f"{name} {s[name]:.0%}" for name in PHASES)
            size = f"{s['rollouts']} rollouts of {s['turns']:.1f} turns, {s['policy_tokens']:,.0f} tokens"
            lines += [f"A step of {size}: {s['seconds']:.1f} s, of which {shares}.",
                      f"The probes of the beliefs take {s['probes']:.1%} of the step.", ""]
    return lines

def summary(found: dict, padding: list[float]) -> dict:
    """The medians of one shape."""
    belief = next(row for row in found["belief"] if row["turns"] == 10)
    return {"belief_vs_naive": belief["naive / ours"][1], "belief_vs_plain": belief["ours / plain"][1],
            **{f"rollout_vs_reread_{row['turns']}": row["reread / ours"][1] for row in found["rollout"]},
            "update_peak_vs_naive": found["update"][0]["ours / naive, peak"], "padding": padding[1]}

def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--quick", action="store_true", help="the demo policy alone, nothing written")
    parser.add_argument("--old", type=Path, help="folder with other code to time beside this one")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        return print(peak_of_update(*args.peak))
    if KEEP.items() - os.environ.items():       # again, with these settings
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **KEEP})
    if args.old:
        lines = beside(args.old.resolve(), args.repetitions)
        (args.out / "speed_old.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return print("\n".join(lines))
    shapes = [("demo", "float32")] + [("0.5B", "bfloat16"), ("0.5B", "float32")] * (not args.quick)
    padding, results = measure_padding(), {}
    for shape, dtype in shapes:
        name = "demo policy" if shape == "demo" else f"Qwen2.5-0.5B shape, {dtype}"
        few = args.quick or shape != "demo"
        results[name] = measure(shape, dtype, args.quick, 2 if few else args.repetitions)
        if not args.quick:
            (args.out / "speed.md").write_text("\n".join(markdown(results, padding)), encoding="utf-8")
    print("\n".join(markdown(results, padding)))
    print(json.dumps({key: round(v, 3) for key, v in summary(results["demo policy"], padding).items()}))

if __name__ == "__main__":
    main()
