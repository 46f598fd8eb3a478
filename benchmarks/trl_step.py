"""A training step of igpo.py beside one of TRL's GRPOTrainer (pip install trl): policy tokens per second.

    OMP_NUM_THREADS=1 python -m benchmarks.trl_step       # the two take turns, step by step: trl_step.md

Equal: demo policy in fp32, LoRA rank and layers, learning rate, 2 questions x 8 rollouts, 4 turns of 24
sampled tokens (no end before the 24th, so that both train on 1,536 policy tokens), BM25 over the demo
corpus asked for what was written, a page of at most 100 tokens a search, one outcome reward per rollout,
temperature 1, KL to the adapter-free reference, one update, no gradient checkpointing, CPU, one thread.

Not equal: TRL wraps a search result in a chat message of its own, a few tokens more. It takes the old
log-probs from the update's forward (exact when there is one update), ours are a forward of their own, which
also reads the beliefs. TRL reads the whole text again each turn, and passes every token from the first
completion token on through the LM head, of which the demo has a small one. The policy's format is not
TRL's, so what a turn asks is forced on both sides, and the reward is a random number: it costs the same.
"""
import random
import statistics
import tempfile
import time
from unittest.mock import patch

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl.trainer import grpo_trainer

import igpo
from benchmarks.common import HERE, ROOT, commit, machine, table
from search_tool import load_questions, open_search

QUESTIONS, GROUP, TURNS, NEW, PAGE, STEPS = 2, 8, 4, 24, 100, 6
CFG = igpo.Config(**{**igpo.DEMO, "group": GROUP, "max_turns": TURNS, "max_new_tokens": NEW, "credit": "igpo",
                     "max_info_tokens": PAGE, "format_penalty": 0.0})

def query_of(text: str) -> str:
    return text[:200].strip() or "ship"

def our_steps(search, questions: list[dict]):
    """Yields (seconds, policy tokens) of one step after the other; each turn has NEW tokens and searches."""
    model, tokenizer = igpo.load_model(CFG)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=CFG.lr, weight_decay=0.0)
    sampling_config = igpo.sampling_config

    def no_end(*args):
        config = sampling_config(*args)
        config.min_new_tokens = NEW
        return config
    going_on = lambda ids, scores, **_: torch.zeros(len(ids), dtype=torch.bool)
    forced = {"sampling_config": no_end, "parse_turn": lambda text: ("search", query_of(text)),
              "stop_tags": lambda tokenizer: going_on, "outcome_reward": lambda *_: random.random(),
              "turn_end": lambda turn, tokenizer, eos: (len(turn), True)}
    with patch.multiple(igpo, **forced):
        while True:
            start = time.process_time()
            row, _ = igpo.train_step(model, tokenizer, optimizer, questions, search, CFG)
            yield time.process_time() - start, row["policy_tokens"]

class Turns(TrainerCallback):
    """Times each of TRL's steps, then takes one of ours."""
    def __init__(self, ours):
        self.ours, self.found, self.masks = ours, {"ours": [], "TRL": []}, []

    def on_step_begin(self, *args, **kwargs):
        self.start = time.process_time()

    def on_step_end(self, *args, **kwargs):
        self.found["TRL"].append((time.process_time() - self.start, sum(map(sum, self.masks))))
        with torch.random.fork_rng(), torch.enable_grad():
            self.found["ours"].append(next(self.ours))

def trainer_of(model, tokenizer, questions: list[dict], search, times: Turns, folder: str):
    """TRL's trainer, with a tool that searches and is called at every turn."""
    # TRL wants to know how calls are written. They are forced, so any schema and template of them will do.
    tokenizer.response_schema = {"type": "object"}
    calls = "(message['tool_calls'] | tojson if message['tool_calls'] is defined else '')"
    content = "message['content'] +"
    tokenizer.chat_template = tokenizer.chat_template.replace(content, f"{content} {calls} +")

    def search_pages(query: str) -> str:
        """Search.

        Args:
            query: what to look for
        """
        text = "\n".join(f"({i}) {p.title}: {p.text}" for i, p in enumerate(search.search(query, 1), 1))
        return tokenizer.decode(igpo.encode(tokenizer, text, True)[:PAGE])

    def forced_call(tokenizer, ids, **kwargs):
        text = tokenizer.decode(ids)
        call = {"name": "search_pages", "arguments": {"query": query_of(text)}}
        return {"role": "assistant", "content": text, "tool_calls": [{"type": "function", "function": call}]}
    grpo_trainer.parse_response = forced_call
    rows = [{"prompt": [{"role": "user", "content": q["question"]}]} for q in questions]
    args = trl.GRPOConfig(
        output_dir=folder, per_device_train_batch_size=QUESTIONS * GROUP, num_generations=GROUP,
        max_steps=STEPS, beta=CFG.kl_coef, learning_rate=CFG.lr,
        max_completion_length=TURNS * NEW + TURNS * (PAGE + 50),
        max_tool_calling_iterations=TURNS - 1, temperature=1.0, gradient_checkpointing=False, use_cpu=True,
        bf16=False, save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True)
    rank = CFG.lora_rank
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = grpo_trainer.GRPOTrainer(
        model=model, processing_class=tokenizer, tools=[search_pages], callbacks=[times], args=args,
        reward_funcs=lambda completions, **kwargs: [random.random() for _ in completions],
        train_dataset=Dataset.from_list(rows), peft_config=lora)
    trainer.generation_config.max_new_tokens = trainer.generation_config.min_new_tokens = NEW
    loop = trainer._tool_call_loop

    def noted(*args):
        out = loop(*args)
        times.masks = out[0]        # 1: a token of the policy
        return out
    trainer._tool_call_loop = noted
    return trainer

def main() -> None:
    torch.set_num_threads(1)
    search = open_search(f"bm25:{ROOT}/demo/corpus.jsonl")
    questions = load_questions(ROOT / "demo/train.jsonl")[:QUESTIONS]
    model, tokenizer = igpo.load_model(CFG)
    times = Turns(our_steps(search, questions))
    with tempfile.TemporaryDirectory() as folder:
        trainer_of(model.unload(), tokenizer, questions, search, times, folder).train()
    # The first step warms up.
    rates = {name: [tokens / seconds for seconds, tokens in steps[1:]] for name, steps in times.found.items()}
    ratios = [a / b for a, b in zip(rates["ours"], rates["TRL"])]
    of = lambda values, digits: [f"{f(values):.{digits}f}" for f in (min, statistics.median, max)]
    rows = [*([name, *of(rate, 0)] for name, rate in rates.items()), ["ours / TRL", *of(ratios, 2)]]
    ours, theirs = (f"{times.found[name][-1][1]:,}" for name in ("ours", "TRL"))
    lines = ["# A training step beside TRL's", "",
             f"`OMP_NUM_THREADS=1 python -m benchmarks.trl_step`, commit {commit()}, one thread of",
             f"{machine('trl')}.",
             f"Policy tokens trained per CPU second, {STEPS - 1} steps of {ours} (ours) and {theirs} (TRL).",
             "What is equal and what is not is told at the top of benchmarks/trl_step.py.", "",
             *table(["", "least", "median", "greatest"], rows)]
    (HERE / "trl_step.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))

if __name__ == "__main__":
    main()
