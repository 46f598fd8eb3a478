"""What a step of a 1.5B model costs on one GPU, and where the time goes. Under four minutes on a GPU.

    python -m benchmarks.gpu        Qwen2.5-1.5B's shape on CUDA; without CUDA a tiny shape, as a smoke test
    python -m benchmarks.gpu --compare igpo,dr-grpo --seeds 2 --minutes 12 --model FOLDER --data FOLDER ..

The first measures the code as it is: random weights of that shape, the defaults of igpo.py (8 questions x 8
rollouts, 5 turns, LoRA 16, bf16). A random model closes no tag, so each turn is ended after 60 to 140 tokens,
drawn by a seed, and counts as a search that brings 150 tokens; a prompt has 300. Nothing is downloaded. In one
run, one after the other:

  step      igpo.train_step, three times; the first warms up. Seconds by phase, policy tokens a second, peak
  decode    milliseconds per decoding step of one turn of all rows, all included (reading the prompt,
            capturing), beside the same by `generate` as it comes: a cache that grows, no graph, the adapter as
            PEFT keeps it
  parts     of that decoding step: the replay of the graph alone, and what is left around it
  score     with the beliefs and without them, and the update, at several --batch_tokens
  ids       with the graph and without it, same seed: the share of rollouts that are equal
  memory    the peak beside what tools/memory.py computes for this run
  capture   a model whose forward cannot be captured goes on without a graph

The last line is one JSON object. With --compare it trains the named recipes one after the other, seed by seed,
until the minutes are over; the same command goes on from there. All curves go to one CSV, OUT/curves.csv.
Other options are igpo.py's.
"""

import argparse
import csv
import gc
import json
import platform
import random
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2Config, StoppingCriteria

import igpo
from benchmarks.common import rounded
from search_tool import Passage, Results
from tools.comparators import CREDITS
from tools.memory import memory_card

SHAPES = {  # hidden, layers, heads, key heads, MLP, vocabulary
    "qwen2.5-1.5b": (1536, 28, 12, 2, 8960, 151_936),
    "tiny": (64, 2, 4, 2, 128, 1503),
}
CUDA = torch.cuda.is_available()
BATCHES = (8192, 16_384, 24_576) if CUDA else ()

def clock() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()

def timed(work) -> tuple[float, object]:
    start = clock()
    result = work()
    return clock() - start, result

def make_model(shape: str, cfg: igpo.Config):
    """(model, tokenizer) as igpo.load_model gives them, of random weights, with an adapter that counts."""
    hidden, layers, heads, keys, mlp, words = SHAPES[shape]
    config = Qwen2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        intermediate_size=mlp,
        vocab_size=words,
        tie_word_embeddings=True,
        max_position_embeddings=32_768,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if CUDA else "cpu"):
        lm = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16 if CUDA else torch.float32, attn_implementation="sdpa"
        )
        igpo.make_exact(lm, cfg)
        model = get_peft_model(
            lm, LoraConfig(r=cfg.lora_rank, lora_alpha=2 * cfg.lora_rank, target_modules="all-linear")
        )
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.01)
    tokenizer = AutoTokenizer.from_pretrained(igpo.locate("demo/policy"))
    return model.eval(), tokenizer

class ForcedLength(StoppingCriteria):
    """Ends each row of a turn at a length of its own."""

    def __init__(self, lengths: torch.Tensor):
        self.lengths, self.start = lengths, None

    def __call__(self, input_ids, scores, **kwargs):
        self.start = self.start or input_ids.shape[1] - 1
        return input_ids.shape[1] - self.start >= self.lengths

class Forced:
    """Stands in for what a random model cannot do: turns of a drawn length, each a search that finds."""

    def __init__(self, cfg: igpo.Config, prompt: int, shown: int, turn: tuple[int, int], vocabulary: int):
        self.rng, self.turn, self.prompt, self.shown, self.queue = random.Random(0), turn, prompt, shown, []
        self.ids = lambda n: [self.rng.randrange(3, vocabulary) for _ in range(n)]
        igpo.encode_prompt = lambda tokenizer, question: list(
            self.prompts.setdefault(question, self.ids(prompt))
        )
        igpo.encode_information = lambda tokenizer, found, most: (self.ids(shown), found)
        igpo.parse_turn = lambda text: ("search", "Tavo")
        igpo.stop_tags, igpo.turn_end = (
            self.stop_tags,
            lambda written, tokenizer, eos: (self.queue.pop(0), True),
        )
        self.prompts: dict[str, list[int]] = {}
        self.rows = cfg.questions * cfg.group

    def stop_tags(self, tokenizer):
        self.queue = [self.rng.randint(*self.turn) for _ in range(self.rows)]
        return ForcedLength(torch.tensor(self.queue, device="cuda" if CUDA else "cpu"))

    def search_many(self, queries: list[str], k: int) -> list[Results]:
        return [Results([Passage("1", "Tavo", "The town of Tavo.")]) for _ in queries]

def new_turn(
    model, tokenizer, forced: Forced, cfg: igpo.Config, length: int, seed: int = 0
) -> list[igpo.Rollout]:
    """One turn of all rows, each of `length` tokens."""
    forced.turn, forced.rng = (length, length), random.Random(seed)
    torch.manual_seed(seed)
    rollouts = [igpo.begin(tokenizer, str(q)) for q in range(cfg.questions) for _ in range(cfg.group)]
    igpo.play(model, tokenizer, rollouts, forced, replace(cfg, max_turns=1, max_new_tokens=length))
    return rollouts

def plain_generate(lm, rollouts: list[igpo.Rollout], length: int) -> None:
    ids = torch.tensor([r.ids[: r.boundaries[0]] for r in rollouts], device=lm.device)
    how = GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, max_new_tokens=length, min_new_tokens=length, pad_token_id=0
    )
    lm.generate(ids, attention_mask=torch.ones_like(ids), generation_config=how)

def replay_ms(lm, rollouts: list[igpo.Rollout], room: int, times: int = 50) -> float:
    """Milliseconds of one replay of the graph: forward of one token a row, and nothing around it."""
    if not CUDA:
        return float("nan")
    ids = torch.tensor([r.ids[: r.boundaries[0]] for r in rollouts], device=lm.device)
    with torch.no_grad(), igpo.arithmetic(lm):
        cache = igpo.DynamicCache()
        lm.base_model(ids, cache=cache, use_cache=True)
        held = torch.ones_like(ids)
        cache, held = igpo.rebuild_cache(cache, held, torch.arange(len(rollouts), device=lm.device), room)
        with igpo.one_token_graph(lm):
            mask = torch.cat([held, held.new_ones(len(held), room)], 1)[:, None, None].bool()
            call = dict(
                input_ids=ids[:, -1:],
                position_ids=held.sum(1, keepdim=True),
                attention_mask=mask,
                cache=cache,
                use_cache=True,
            )
            lm(**call)
            start = clock()
            for _ in range(times):
                lm(**call)
            return (clock() - start) / times * 1000

def measure(
    shape: str, cfg: igpo.Config, forced_turn: tuple[int, int], prompt: int, shown: int, steps: int
) -> dict:
    forced = Forced(cfg, prompt, shown, forced_turn, SHAPES[shape][-1])
    seconds, (model, tokenizer) = timed(lambda: make_model(shape, cfg))
    lm, found = igpo.unwrap(model), {}
    print(f"{shape}: {sum(p.numel() for p in lm.parameters()) / 1e9:.2f}B parameters made in {seconds:.0f} s")
    questions = [{"id": str(i), "question": str(i), "answers": ["Tavo Velmar"]} for i in range(cfg.questions)]
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=cfg.lr, weight_decay=0.0
    )
    rows = []
    for step in range(1, steps + 1):
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        torch.manual_seed(step)
        before = torch.cuda.memory_allocated() if CUDA else 0
        row, records = igpo.train_step(model, tokenizer, optimizer, questions, forced, cfg)
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0.0
        row["left_mb"] = (torch.cuda.memory_allocated() - before) / 2**20 if CUDA else 0.0
        rows.append(row)
        print(
            f"step {step}: {row['seconds']:.2f} s = rollouts {row['seconds_rollout']:.2f} + score and reference "
            f"{row['seconds_score']:.2f} + update {row['seconds_update']:.2f}; "
            f"{row['policy_tokens']:,} policy tokens, ratio_start {row['ratio_start']:.4f}, "
            f"peak {row['peak_gb']:.2f} GiB, left behind {row['left_mb']:.1f} MB",
            flush=True,
        )
    rest = rows[1:] or rows
    mean = lambda key: sum(row[key] for row in rest) / len(rest)
    found.update(
        step_s=mean("seconds"),
        rollout_s=mean("seconds_rollout"),
        score_s=mean("seconds_score"),
        update_s=mean("seconds_update"),
        policy_tokens_per_s=mean("policy_tokens") / mean("seconds"),
        peak_gb=max(row["peak_gb"] for row in rows),
        ratio_start=max((row["ratio_start"] for row in rows), key=lambda x: abs(x - 1)),
    )

    torch.manual_seed(9)
    rollouts = igpo.rollout(model, tokenizer, questions, forced, cfg)
    longest, golds = max(len(r.ids) for r in rollouts), [["Tavo Velmar"]] * len(rollouts)
    found["peak_computed_gb"] = memory_card(model, cfg, tokens=longest)["peak"] / 2**30
    print(
        f"memory: longest rollout {longest} tokens, {sum(len(r.ids) for r in rollouts):,} in all; "
        f"peak {found['peak_gb']:.2f} GiB, computed {found['peak_computed_gb']:.2f} GiB for this length, "
        f"{memory_card(model, cfg)['peak'] / 2**30:.2f} GiB at most"
    )

    old, _ = igpo.score(model, tokenizer, rollouts, None, cfg)
    advantages = [[0.1] * len(r.boundaries) for r in rollouts]
    for tokens in dict.fromkeys((cfg.batch_tokens, *BATCHES)):
        changed = replace(cfg, batch_tokens=tokens)
        seconds = {
            what: min(
                timed(lambda: igpo.score(model, tokenizer, rollouts, golds_or_none, changed))[0]
                for _ in range(2)
            )
            for what, golds_or_none in (("with", golds), ("without", None))
        }
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        learned = min(
            timed(lambda: igpo.update(model, optimizer, rollouts, old, old, advantages, changed))[0]
            for _ in range(2)
        )
        peak = torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0.0
        share = (seconds["with"] - seconds["without"]) / found["step_s"]
        found.setdefault("belief_share", share)
        print(
            f"{tokens:,} tokens a forward: score {seconds['with']:.2f} s, {seconds['without']:.2f} s without "
            f"beliefs (these are {share:.1%} of a step); update {learned:.2f} s, peak {peak:.2f} GiB",
            flush=True,
        )
    optimizer.zero_grad(set_to_none=True)

    length = 128 if CUDA else 24
    turn = lambda: new_turn(model, tokenizer, forced, cfg, length)
    turn()
    ours, with_graph = timed(turn)
    plain_generate(lm, with_graph, 4)
    plain, _ = timed(lambda: plain_generate(lm, with_graph, length))
    found.update(decode_ms=ours / length * 1000, decode_vs_generate=plain / ours)
    replay = replay_ms(lm, with_graph, length)
    print(
        f"decode, {len(with_graph)} rows, prompt {prompt}, {length} tokens: {found['decode_ms']:.2f} ms a step, "
        f"all included; plain generate {plain / length * 1000:.2f} ms: {found['decode_vs_generate']:.1f} times "
        f"faster. Of it the replay takes {replay:.2f} ms"
    )
    short = max(8, length // 4)
    with_graph = new_turn(model, tokenizer, forced, cfg, short)
    lm.no_graph = True
    without, without_graph = timed(lambda: new_turn(model, tokenizer, forced, cfg, short))
    del lm.no_graph
    equal = sum(a.ids == b.ids for a, b in zip(with_graph, without_graph)) / len(with_graph)
    print(
        f"ids with and without the graph, same seed: {equal:.0%} of {len(with_graph)} rollouts equal; "
        f"without it {without / short * 1000:.1f} ms a step"
    )

    if CUDA:  # a forward that asks the GPU for a number cannot be captured
        asking = lm.model.layers[0].register_forward_hook(
            lambda module, args, out: torch.sum(args[0]).item() and None
        )
        refused = new_turn(model, tokenizer, forced, cfg, 8)
        asking.remove()
        went = "went on without" if vars(lm).pop("no_graph", False) else "was captured"
        print(f"a forward that cannot be captured: {went}")
        again = new_turn(model, tokenizer, forced, cfg, 8)
        equal = sum(a.ids == b.ids for a, b in zip(refused, again))
        print(f"after that a graph again, {equal} of {len(again)} rollouts equal")
    return found

def compare(args, rest: list[str]) -> None:
    """Train the settings until the time is over; curves.csv has what all of them have done so far."""

    def over(*_):
        raise KeyboardInterrupt

    end, names, finished = time.time() + 60 * args.minutes, args.compare.split(","), True
    signal.signal(signal.SIGALRM, over)
    for seed, name in ((seed, name) for seed in range(args.seeds) for name in names):
        out = args.out / f"{name}-seed{seed}"
        left = int(end - time.time())
        if left < 5:
            finished = False
            break
        again = (out / "checkpoint" / "state.pt").is_file()
        argv = (
            ["--resume", str(out)]
            if again
            else ["--out", str(out), "--credit", name, "--seed", str(seed), *rest]
        )
        cfg = igpo.parse_config(argv, CREDITS)
        if again and len((out / "metrics.jsonl").read_text().splitlines()) > cfg.steps:
            continue
        signal.alarm(left)
        try:
            igpo.train(cfg, CREDITS.get(cfg.credit, igpo.recipe_credit))
        except KeyboardInterrupt:
            finished = False
        finally:
            signal.alarm(0)
        gc.collect()
    rows = [
        {
            "setting": run.name.rpartition("-seed")[0],
            "seed": run.name.rpartition("-seed")[2],
            **json.loads(line),
        }
        for run in sorted(args.out.glob("*-seed*"))
        for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    with open(args.out / "curves.csv", "w", newline="") as file:
        writer = csv.DictWriter(
            file, list(dict.fromkeys(key for row in rows for key in row)), restval="", lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(map(rounded, rows))
    print(f"{'done' if finished else 'the time is over; the same command goes on'}: {args.out}/curves.csv")

def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--compare", default="", metavar="NAMES", help="recipes or comparators to train, with commas between"
    )
    parser.add_argument("--seeds", type=int, default=1, help="seeds of each (--compare)")
    parser.add_argument("--minutes", type=float, default=10, help="when to stop (--compare)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/compare"), help="folder of the runs (--compare)"
    )
    args, rest = parser.parse_known_args(argv)
    warm = torch.zeros(1, device="cuda" if CUDA else "cpu")
    launch = timed(lambda: [warm.add_(1) for _ in range(10_000)])[0] * 100
    device = (
        torch.cuda.get_device_name()
        if CUDA
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    print(
        f"{device}; python {platform.python_version()}, "
        + ", ".join(f"{m.__name__} {m.__version__}" for m in (torch, transformers, peft))
        + f"; an operation on one number takes {launch:.1f} µs, launch and all"
    )
    if args.compare:
        return compare(args, rest)
    if rest:
        parser.error(f"unknown: {' '.join(rest)}")
    if CUDA:
        found = measure("qwen2.5-1.5b", igpo.Config(), (60, 140), prompt=300, shown=150, steps=3)
    else:
        cfg = igpo.Config(questions=2, group=2, max_turns=3, max_new_tokens=24, batch_tokens=512)
        found = measure("tiny", cfg, (8, 16), prompt=40, shown=20, steps=2)
    print(json.dumps({key: round(value, 4) for key, value in found.items()}))

if __name__ == "__main__":
    main()
