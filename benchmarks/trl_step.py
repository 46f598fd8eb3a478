"""A training step of igpo.py beside one of TRL's GRPOTrainer (pip install trl): policy tokens trained per second.

    OMP_NUM_THREADS=1 python benchmarks/trl_step.py       the two take turns, step by step, in one process; writes trl_step.json

Equal: demo policy in fp32, LoRA rank and layers, learning rate, 2 questions x 8 rollouts, 4 turns of 24 sampled tokens (no end before the
24th, so that both train on 1,536 policy tokens), BM25 over the demo corpus asked for what was written, 1 page of at most 100 tokens a search,
one outcome reward per rollout, temperature 1, KL to the adapter-free reference, one update, no gradient checkpointing, CPU, one thread.
Not equal: TRL wraps a search result in a chat message of its own, a few tokens more; it takes the old log-probs from the update's forward
(exact when there is one update), ours are a forward of their own, which also reads the beliefs. TRL reads the whole text again each
turn, and passes every token from the first completion token on through the LM head, of which the demo has a small one.
The policy's format is not TRL's, so what a turn asks is forced on both sides, and the reward is a random number: it costs the same.
"""
from __future__ import annotations

import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset
from transformers import TrainerCallback
from trl.trainer import grpo_trainer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import igpo  # noqa: E402
from search_tool import open_search  # noqa: E402

QUESTIONS, GROUP, TURNS, NEW, PAGE, STEPS = 2, 8, 4, 24, 100, 6
CFG = igpo.Config(**{**igpo.DEMO, "group": GROUP, "max_turns": TURNS, "max_new_tokens": NEW, "max_info_tokens": PAGE, "format_penalty": 0.0})
QUERY = lambda text: text[:200].strip() or "ship"


def our_steps(backend, questions: list[dict]):
    """Yields (seconds, policy tokens) of one step after the other."""
    class NoEnd(igpo.TurnEnd):
        def __call__(self, input_ids, scores, **kwargs):
            super().__call__(input_ids, scores)
            self.length, self.done = [input_ids.shape[1] - self.start] * len(self.done), [False] * len(self.done)
            return torch.tensor(self.done)
    honest = igpo.GenerationConfig
    igpo.TurnEnd, igpo.GenerationConfig = NoEnd, lambda **k: honest(**k, min_new_tokens=NEW)
    igpo.parse_turn, igpo.outcome_reward = lambda text: ("search", QUERY(text)), lambda *a: random.random()
    model, tokenizer = igpo.load_model(CFG)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=CFG.lr, weight_decay=0.0)
    while True:
        start = time.process_time()
        row, _ = igpo.train_step(model, tokenizer, optimizer, questions, igpo.MeteredSearch(backend), CFG, 0.0)
        yield time.process_time() - start, row["policy_tokens"]


class Turns(TrainerCallback):
    """Times each of TRL's steps, then takes one of ours."""

    def __init__(self, ours):
        self.ours, self.found = ours, {"ours": [], "trl": []}

    def on_step_begin(self, *args, **kwargs):
        self.start = time.process_time()

    def on_step_end(self, *args, **kwargs):
        self.found["trl"].append((time.process_time() - self.start, sum(map(sum, self.masks))))
        with torch.random.fork_rng(), torch.enable_grad():
            self.found["ours"].append(next(self.ours))


def main() -> None:
    torch.set_num_threads(1)
    backend = open_search(f"bm25:{HERE.parent}/demo/corpus.jsonl")
    questions = igpo.load_questions(str(HERE.parent / "demo/train.jsonl"))[:QUESTIONS]
    model, tokenizer = igpo.load_model(CFG)
    model = igpo.unwrap(model.unload())
    tokenizer.response_schema = {"type": "object"}      # TRL wants to know how calls are written; they are forced, so any will do
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content'] +", "message['content'] + (message['tool_calls'] | tojson if message['tool_calls'] is defined else '') +")

    def search(query: str) -> str:
        """Search.

        Args:
            query: what to look for
        """
        page = backend.search_many([query], 1)[0]
        return tokenizer.decode(igpo.encode(tokenizer, "\n".join(f"({i}) {p.title}: {p.text}" for i, p in enumerate(page, 1)), data=True)[:PAGE])

    def forced_call(tokenizer, ids, **kwargs):
        text = tokenizer.decode(ids)
        return {"role": "assistant", "content": text, "tool_calls": [{"type": "function", "function": {"name": "search", "arguments": {"query": QUERY(text)}}}]}
    grpo_trainer.parse_response = forced_call
    times = Turns(our_steps(backend, questions))
    with tempfile.TemporaryDirectory() as folder:
        trainer = grpo_trainer.GRPOTrainer(
            model=model, processing_class=tokenizer, tools=[search], callbacks=[times],
            reward_funcs=lambda completions, **kwargs: [random.random() for _ in completions],
            train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": q["question"]}]} for q in questions]),
            peft_config=igpo.LoraConfig(r=CFG.lora_rank, lora_alpha=CFG.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"),
            args=trl.GRPOConfig(output_dir=folder, per_device_train_batch_size=QUESTIONS * GROUP, num_generations=GROUP, max_steps=STEPS, beta=CFG.kl_coef,
                                max_completion_length=TURNS * NEW + TURNS * (PAGE + 50), max_tool_calling_iterations=TURNS - 1, learning_rate=CFG.lr, temperature=1.0,
                                gradient_checkpointing=False, use_cpu=True, bf16=False, save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True))
        trainer.generation_config.max_new_tokens = trainer.generation_config.min_new_tokens = NEW
        loop = trainer._tool_call_loop

        def noted(*args):
            out = loop(*args)
            times.masks = out[0]        # 1: a token of the policy
            return out
        trainer._tool_call_loop = noted
        trainer.train()
    rates = {name: [tokens / seconds for seconds, tokens in steps[1:]] for name, steps in times.found.items()}      # the first warms up
    ratios = [a / b for a, b in zip(rates["ours"], rates["trl"])]
    result = {"machine": f"{os.cpu_count()} cores, {platform.machine()}, one thread, no GPU", **{m.__name__: m.__version__ for m in (torch, transformers, trl)},
              "policy tokens a step": {name: steps[-1][1] for name, steps in times.found.items()},
              "policy tokens per CPU second": {name: [round(f(r), 1) for f in (min, statistics.median, max)] for name, r in rates.items()},
              "ours / trl": [round(f(ratios), 3) for f in (min, statistics.median, max)]}
    (HERE / "trl_step.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
