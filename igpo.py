"""IGPO in one file: train a language-model agent that searches over several turns.

Information Gain-based Policy Optimization (Wang et al., arXiv 2510.14967 v2, ICLR 2026); equation numbers are
theirs. The policy answers a question in turns. It thinks and searches, and in the last turn thinks and answers:

    prompt <think> .. </think> <search> query </search>   <information> passages </information>
           <think> .. </think> <answer> words </answer>

One training step, train_step(), does five things:
  1. rollout()          Sample G rollouts for each question. The rollouts of one question are a group.
  2. score()            Ask the policy itself, by teacher forcing, how likely the gold answer was before the
                        first turn and after each search: the beliefs b_0 .. b_{T-1} (Eq. 3). All are read when
                        the rollout has ended. The same forwards give the old log-probs that PPO needs.
  3. info_gains()       The reward of a turn is what its search added to the belief (Eq. 4), by default in
                        probability. The reward of the last turn is the F1 of the answer (Eq. 2).
  4. turn_advantages()  Normalise both within the group (Eq. 5), then sum from each turn to the end (Eq. 6).
  5. policy_loss()      PPO-clip with a KL to the reference, on the tokens that the policy wrote (Eq. 7).

Where we depart from the paper on purpose:
  1. The environment opens <think> at every turn, so a belief is read under the very form of a turn that answers.
  2. The belief is in the first gold alias, cut at 32 tokens. F1 takes the best alias.
  3. LoRA instead of full fine-tuning, so the reference is the same model with its adapter switched off.
  4. A rollout without an answer (format broken, cut short, out of turns) gets the format penalty as the reward
     of its last turn. If the format breaks at turn 3, turns 1 and 2 keep their gains.
  5. The belief is read at the sampling temperature, and its probe ends with the last token of the gold.
  6. --credit igpo, the default, is a normalisation of our own. The paper's are igpo-v2 and igpo-v1: see RECIPES.
"""
from __future__ import annotations

import argparse, contextlib, json, math, os, random, re, signal, string, sys, time
from bisect import bisect_left, bisect_right
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial, wraps
from itertools import accumulate
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig
from transformers.cache_utils import Cache, StaticLayer
from transformers.generation import StopStringCriteria
from transformers.utils.logging import disable_progress_bar

from search_tool import Results, SearchError, clean_query, normalise, open_search, read_rows

HERE = Path(__file__).resolve().parent
disable_progress_bar()

# ---- configuration -----------------------------------------------------------------------------------------
def option(default, text: str, least: float | None = None, choices: tuple = ()):
    """A field of Config: its default, its line of --help, and the least value, or all values, it may have."""
    return field(default=default, metadata={"help": text, "least": least, "choices": choices})

@dataclass
class Config:
    """Every option. The command line is made from this, and a run saves the values in force as config.json."""
    # data and run
    model: str = option("", "hub id, bare name (Qwen2.5-1.5B-Instruct), folder or .gguf; empty: demo/policy")
    init_adapter: str = option("", "PEFT folder that is merged into the model before training starts")
    data: str = option("demo", "folder of train.jsonl, dev.jsonl, corpus.jsonl; python -m tools.data makes one")
    train: str = option("", "training questions, if not <data>/train.jsonl")
    dev: str = option("", "questions of the periodic greedy evaluation, if not <data>/dev.jsonl")
    search: str = option("", "search back end, if not bm25:<data>/corpus.jsonl; see search_tool.py")
    search_cache: str = option("auto", "disk cache of searches; auto: of public addresses; only: no network",
                               choices=("auto", "on", "off", "only"))
    out: str = option("", "run folder; empty: runs/<model>-<credit>-seed<seed>")
    resume: str = option("", "run folder to go on with")
    seed: int = option(0, "seed of sampling, data order and LoRA init")
    steps: int = option(200, "training steps", 0)
    eval_every: int = option(10, "steps between evaluations on the dev questions; 0: never", 0)
    # episode
    questions: int = option(8, "questions per step", 1)
    group: int = option(8, "rollouts per question (G)", 2)
    max_turns: int = option(5, "turns per rollout, the answer included", 1)
    max_new_tokens: int = option(256, "tokens the policy may write in one turn", 1)
    passages: int = option(3, "passages per search", 1)
    max_info_tokens: int = option(500, "tokens of search results per turn, shared among the passages", 0)
    temperature: float = option(1.0, "sampling temperature, also used in scoring", 0.01)
    # learning
    credit: str = option("igpo", "how turns are rewarded; what each name means stands in RECIPES")
    format_penalty: float = option(-0.1, "outcome of a rollout without an answer (lambda_fmt, Eq. 2)")
    lr: float = option(2e-5, "learning rate of AdamW", 0)
    minibatches: int = option(1, "optimizer updates per step, each on its part of the rollouts", 1)
    clip: float = option(0.2, "clip range of the ratio (epsilon, Eq. 7)", 0)
    kl_coef: float = option(0.001, "weight of the KL to the reference (beta, Eq. 7)", 0)
    lora_rank: int = option(16, "LoRA rank, on all linear layers; alpha is twice the rank", 1)
    # machine
    dtype: str = option("auto", "auto: bfloat16 on CUDA, else float32", choices=("auto", "float32", "bfloat16"))
    rollout_batch: int = option(64, "rollouts generated at once", 1)
    batch_tokens: int = option(8192, "padded tokens per forward in the update; scoring takes 4 times as many", 1)
    gradient_checkpointing: bool = option(True, "recompute activations in the update: slower, less memory")

# The embedded policy has 1M parameters and reads a page a turn. What it needs otherwise stands only here.
DEMO = dict(model="demo/policy", steps=30, max_turns=6, max_new_tokens=32, passages=1, max_info_tokens=100,
            lr=5e-4, dtype="float32", batch_tokens=2048, gradient_checkpointing=False)
MAX_GRAD_NORM = 1.0             # gradients are clipped to this norm
MAX_FAILED_SEARCHES = 0.5       # a step in which a larger share of the searches failed is not trained on
MAX_GOLD_TOKENS = 32            # the belief is read on so many tokens of the gold at most
HEAD_CHUNK = 256                # tokens that pass the LM head at once: their logits live in four fp32 copies
STD_FLOOR = 1e-6                # rewards that spread less than this agree, and say nothing

# ---- data --------------------------------------------------------------------------------------------------
class UserError(SearchError):
    """Something the user can mend. main() prints its one line and exits with status 2."""

@dataclass
class Rollout:
    """One trajectory. ids and mask have an entry per token; a rollout of T turns has T boundaries.

    Turn t goes from boundaries[t] to boundaries[t + 1]: what the policy wrote, then what its search brought. b_t
    is read at boundaries[t], behind the <think> that opens turn t; b_0 is that of the bare prompt.
    """
    ids: list[int]                  # the prompt, then turn by turn
    mask: list[int]                 # 1: written by the policy; 0: forced (prompt, search results)
    boundaries: list[int]           # where turns begin
    answer: str | None = None       # what stands in <answer>, None if there is none
    stop: str = ""                  # why it ended: answer | format | length | turns; "" while it goes on
    queries: list[str] = field(default_factory=list)            # one per search
    retrieved: list[Results] = field(default_factory=list)      # what each search brought, as it was shown

    def write(self, ids: list[int], by_policy: bool) -> None:
        """Append tokens. The mask is written with them and never recovered from the text."""
        self.ids += ids
        self.mask += [int(by_policy)] * len(ids)

    @property
    def policy_turns(self) -> list[int]:
        """The turn, from 0, of each token that the policy wrote."""
        return [bisect_right(self.boundaries, j) - 1 for j, m in enumerate(self.mask) if m]

def load_questions(path: str) -> list[dict]:
    """Read jsonl: {"question", "answers": [..]} a line, and "id" and "supporting": [..] if there are any.

    FlashRAG's "golden_answers" will do too. UserError or SearchError name file and line of anything else.
    """
    rows = []
    for where, row in read_rows(path):
        answers, supporting = row.get("answers", row.get("golden_answers")), row.get("supporting", [])
        answers = [answers] if isinstance(answers, str) else answers
        checked = {"question": [row.get("question")], "answers": answers, "supporting": supporting}
        for name, texts in checked.items():
            if not isinstance(texts, list) or not all(isinstance(t, str) and t.strip() for t in texts):
                raise UserError(f'{where}: field "{name}" is not text. python -m tools.data reads other layouts.')
        number = where.rpartition(":")[2]
        rows.append({**row, "id": str(row.get("id", number)), "answers": answers, "supporting": supporting})
    return rows

def locate(path: str) -> str:
    """A path as given, or beside this file if there is nothing at it: the demo is found from any folder."""
    return path if Path(path).exists() or not (HERE / path).exists() else str(HERE / path)

def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

# ---- tokens ------------------------------------------------------------------------------------------------
# The belief is one in what the policy would say, so prompt and probe show an answer in one and the same form.
# The metric answer_form tells how many answers begin as the probe does.
SCHEMA = "\nNow there's enough information to answer.\n</think>\n<answer>\n"        # before the gold, section 3.2
INSTRUCTION = (
    "Answer the question. You can search as often as you need to. Each turn has one of two forms. To search:\n\n"
    "<think>\nwhat you know, and what you need to find next\n</think>\n<search>\nwhat to look for\n</search>\n\n"
    "The results come back between <information> and </information>, and your next turn begins. "
    f"To answer, which ends the task:\n\n<think>{SCHEMA}the answer in a few words, nothing else\n</answer>")
TURN = re.compile(r"\s*(<think>)?(?P<think>.*?)</think>\s*<(?P<act>search|answer)>(?P<what>.*?)</(?P=act)>", re.S)
TAG = re.compile(r"</?(think|search|answer|information)>")

def encode(tokenizer, text: str, data: bool = False) -> list[int]:
    """Token ids. data=True: whatever the text holds, it cannot become a control token of the chat template."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=data)

def encode_prompt(tokenizer, question: str) -> list[int]:
    """Instruction and question as the user's message of the chat template, the assistant's think tag opened.

    Not as a system message, which some templates refuse (Gemma) or drop without a word (early Phi-3). A policy
    that was trained on the format, as the demo's, has "knows_format" in its tokenizer_config.json and sees the
    question alone. UserError if the template does not show the message once.
    """
    slot = "@QUESTION@"
    text = message = slot if tokenizer.init_kwargs.get("knows_format") else f"{INSTRUCTION}\n\nQuestion: {slot}\n"
    if tokenizer.chat_template:
        try:
            messages = [{"role": "user", "content": message}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as e:      # each template raises in its own way
            raise UserError(f"this model's chat template takes no plain user's message ({first_line(e)})") from None
    if text.count(message.strip()) != 1:
        raise UserError("this model's chat template does not show the user's message once, as it must")
    before, after = (text if text.rstrip().endswith("<think>") else text + "<think>").split(slot)
    return encode(tokenizer, before) + encode(tokenizer, question, True) + encode(tokenizer, after)

def encode_information(tokenizer, found: Results, max_tokens: int) -> tuple[list[int], Results]:
    """(what the environment writes after a search, up to the next open think tag; the passages shown in it).

    Passages come cleaned, so that no tag of ours survives in them. Where they do not fit, all texts are cut to
    one length and end in "..": what is recorded as found is what the policy could read.
    """
    texts, cap, body = [encode(tokenizer, p.text, True) for p in found], max_tokens, None
    while body is None or (len(body) > max_tokens and cap):
        cap -= 0 if body is None else math.ceil(cap / 10)
        shown = [p if len(ids) <= cap else replace(p, text=tokenizer.decode(ids[:cap]).rstrip("\ufffd ") + " ..")
                 for p, ids in zip(found, texts) if cap]
        text = "\n".join(f"({i}) {p.title}: {p.text}" for i, p in enumerate(shown, 1)) or "nothing found"
        body = encode(tokenizer, f"search failed: {found.error}" if found.error else text, True)
    opening, end = encode(tokenizer, "\n<information>\n"), encode(tokenizer, "\n</information>\n<think>")
    return opening + body[:max_tokens] + end, Results(shown, error=found.error, cached=found.cached)

def encode_gold(tokenizer, gold: str | list[str]) -> list[int]:
    """Tokens of the first gold alias, cut at MAX_GOLD_TOKENS."""
    return encode(tokenizer, (gold if isinstance(gold, str) else gold[0]).strip(), True)[:MAX_GOLD_TOKENS]

def parse_turn(text: str) -> tuple[str, str] | None:
    """The action of a turn's text, ("search", query) or ("answer", words), or None if the format is broken.

    A turn ends at its first closing tag. The token that finished the tag may hold more, as ">." does: no matter.

    >>> parse_turn(" I know.</think><answer> Tavo </answer>."), parse_turn(" a </think> b <search> c </search>")
    (('answer', 'Tavo'), None)
    """
    m = TURN.match(text)
    broken = not m or TAG.search(m["think"]) or TAG.search(m["what"]) or not m["what"].strip()
    return None if broken else (m["act"], m["what"].strip())

# ---- model -------------------------------------------------------------------------------------------------
def load_model(cfg: Config, adapter: str = ""):
    """(model, tokenizer) on the best device, with a fresh LoRA adapter or that of the folder `adapter`. UserError."""
    name, options = locate(cfg.model), {}
    if name.endswith(".gguf"):
        name, options = str(Path(name).parent), {"gguf_file": Path(name).name}
    elif name.startswith("Qwen") and "/" not in name and not Path(name).is_dir():
        name = f"Qwen/{name}"
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    dtype = ("bfloat16" if device == "cuda" else "float32") if cfg.dtype == "auto" else cfg.dtype
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation="sdpa", **options)
        if options:         # the weights are plain floats now, and the label of the file would mislead PEFT
            del model.hf_quantizer, model.config.quantization_config
        make_exact(model, cfg)
        model = model.to(device)
        for name in filter(None, (cfg.init_adapter, adapter)):
            model = PeftModel.from_pretrained(model, name)
            loaded = model.load_adapter(name, "default")      # again: only this call tells of other layers
            if loaded.missing_keys or loaded.unexpected_keys:
                raise ValueError(f"an adapter for another model than {cfg.model}")
            model = model if name == adapter else model.merge_and_unload()
    except Exception as e:      # each library fails in its own way
        raise UserError(f"{name}: {first_line(e)}. A model is a hub id (owner/name), a folder with config.json, "
                        "safetensors and tokenizer, or a .gguf file; an adapter is a PEFT folder.") from None
    if not adapter:
        torch.manual_seed(cfg.seed)
        lora = LoraConfig(r=cfg.lora_rank, lora_alpha=2 * cfg.lora_rank, target_modules="all-linear")
        model = get_peft_model(model, lora)
    return model.eval(), tokenizer      # and it stays so: under dropout the update would not see what score() saw

@torch.no_grad()
def make_exact(lm, cfg: Config) -> None:
    """Keep away what would make scoring differ from sampling; ValueError where that cannot be done."""
    text = lm.config.get_text_config()      # of a multimodal model the part that reads text
    text.max_position_embeddings = context_length(lm)
    if getattr(text, "sliding_window", None):       # within it, where rollouts stay, all is full attention
        text.sliding_window = 10**9
    if cfg.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    pair, cache = torch.tensor([[1, 2]]), Cache(layer_class_to_replicate=lambda: StaticLayer(max_cache_len=2))
    logits = lm.eval()(pair, cache=cache, use_cache=True).logits      # raises if a layer keeps more than keys, values
    if torch.dist(logits, lm.get_output_embeddings()(lm.base_model(pair)[0])) > 0.01 * logits.norm():
        raise ValueError("it scales or caps its logits after the LM head, which token_logps does not")
    if experts := sum(p.numel() for p in lm.parameters() if p.dim() == 3):
        print(f"note: LoRA does not reach the routed experts, {experts / 1e6:.0f}M weights: they stay as they are")

def context_length(lm) -> int:
    """Tokens that a rollout may have: the model's positions, its sliding window, or its first rotary table.

    Past that longrope models (Phi-3.5, Phi-4) take another table for the whole batch: a short rollout would be
    sampled under one and scored under the other.
    """
    c = lm.config.get_text_config()
    ropes = getattr(c, "rope_parameters", None) or {}
    ropes = [ropes, *(rope for rope in ropes.values() if isinstance(rope, dict))]      # or one per kind of layer
    first = [rope["original_max_position_embeddings"] for rope in ropes if rope.get("rope_type") == "longrope"]
    limits = (getattr(c, "max_position_embeddings", None), getattr(c, "sliding_window", None), *first)
    return min((n for n in limits if n), default=10**9)

def unwrap(model):
    """The Hugging Face causal LM inside a PEFT model (LoRA layers stay in it), or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model

def reference(model):
    """Within this context the model is the reference policy: its adapter is off."""
    if not isinstance(model, PeftModel):
        raise ValueError("the reference is the model with its adapter off, and this model has no adapter")
    return model.disable_adapter()

@contextlib.contextmanager
def arithmetic(lm):
    """The arithmetic of sampling, scoring, reference and update, the same so that their numbers agree.

    PEFT keeps the adapter of a bf16 model in fp32, as AdamW needs it, and casts the input of every layer, which
    is slow. Under autocast the adapter is used in bf16. Elsewhere than on a GPU in bf16 nothing changes.
    """
    on = lm.device.type == "cuda" and lm.dtype == torch.bfloat16
    # No cache of cast weights: a CUDA graph would still use them after the optimizer's next step.
    with torch.autocast("cuda", torch.bfloat16, on, cache_enabled=False), disable_input_dtype_casting(lm, on):
        yield

# ---- rollout -----------------------------------------------------------------------------------------------
# rollout() calls play(). That calls generate() for one turn of all live rollouts, take_turn() for what the
# policy wrote, the search, take_results() for what it brought, and rebuild_cache() for the next turn.

def rollout(model, tokenizer, questions: list[dict], search, cfg: Config) -> list[Rollout]:
    """cfg.group rollouts for each question, to their ends. Question-major: group i is [i * G : (i + 1) * G]."""
    rollouts = [begin(tokenizer, q["question"]) for q in questions for _ in range(cfg.group)]
    for i in range(0, len(rollouts), cfg.rollout_batch):
        play(model, tokenizer, rollouts[i:i + cfg.rollout_batch], search, cfg)
    return rollouts

def begin(tokenizer, question: str) -> Rollout:
    """A rollout of which there is the prompt alone."""
    prompt = encode_prompt(tokenizer, question)
    return Rollout(prompt, [0] * len(prompt), [len(prompt)])

def pad(rows, device, side: str = "right") -> torch.Tensor:
    """Lists of numbers as (B, longest), filled up with 0, which is as good as any number: nobody looks at it."""
    rows = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(rows, batch_first=True, padding_side=side).to(device)

@torch.no_grad()
def play(model, tokenizer, live: list[Rollout], search, cfg: Config) -> None:
    """Take these rollouts, all at once and in place, from their last boundaries to their ends."""
    lm, ones = unwrap(model), lambda rows: [[1] * len(row) for row in rows]
    lm.generation_config = sampling = sampling_config(lm, tokenizer, cfg)
    left = partial(pad, device=lm.device, side="left")
    # All of a prompt but its last token, from which generate() goes on, is read once for its group.
    prompts: dict[tuple, int] = {}
    rows = [prompts.setdefault(tuple(r.ids[:-1]), len(prompts)) for r in live]
    held, cache = left(ones(prompts)), DynamicCache()
    with arithmetic(lm):
        positions = (held.cumsum(1) - 1).clamp(min=0)
        lm.base_model(left(prompts), attention_mask=held, position_ids=positions, cache=cache, use_cache=True)
    while live:
        # held (B, W) is 1 where a column of the cache holds a token of the row. The rest of it is unread.
        rows = torch.tensor(rows, device=lm.device)
        unread = [r.ids[n:] for r, n in zip(live, held[rows].sum(1).tolist())]
        cache, held = rebuild_cache(cache, held, rows, max(map(len, unread)) + cfg.max_new_tokens)
        ids, mask = torch.cat([0 * held, left(unread)], 1), torch.cat([held, left(ones(unread))], 1)
        with arithmetic(lm), one_token_graph(lm):      # generate() does not look at ids that the cache holds
            written = lm.generate(ids, attention_mask=mask, cache=cache, generation_config=sampling,
                                  stopping_criteria=[stop_tags(tokenizer)])[:, ids.shape[1]:].tolist()
        ends = [turn_end(turn, tokenizer, sampling.eos_token_id or []) for turn in written]
        for r, turn, (length, closed) in zip(live, written, ends):
            take_turn(r, turn[:length], closed, tokenizer, cfg)
        asking = [r for r in live if not r.stop]
        found = search.search_many([r.queries[-1] for r in asking], cfg.passages) if asking else []
        for r, results in zip(asking, found, strict=True):
            take_results(r, results, context_length(lm), tokenizer, cfg)
        # generate() has no need to read the last token of the longest turn: the cache ends before it.
        own = torch.arange(len(written[0]) - 1) < torch.tensor(ends)[:, :1]
        held = torch.cat([mask, own.long().to(lm.device)], 1)
        rows = [row for row, r in enumerate(live) if not r.stop]
        live = [r for r in live if not r.stop]

def rebuild_cache(cache: Cache, held, rows, room: int) -> tuple[Cache, torch.Tensor]:
    """(cache, held) for the next turn: the chosen rows, tokens side by side, `room` free columns behind them.

    Rows that ended are not chosen; the row of a prompt is chosen once for each rollout of its group. Padding, and
    the holes behind turns shorter than the longest, are moved to the left by the sort and cut off. A token may
    change its column: its position is in its key, not in the place where that is kept.
    """
    width = int(held[rows].sum(1).max())
    order = held[rows].argsort(dim=1, stable=True)[:, held.shape[1] - width:]
    pick = lambda x: x[:, :, :held.shape[1]][rows[:, None], :, order].transpose(1, 2)
    new = Cache(layer_class_to_replicate=lambda: StaticLayer(max_cache_len=width + room))
    for i, layer in enumerate(cache.layers):
        new.update(pick(layer.keys), pick(layer.values), i)
        layer.keys = layer.values = None        # so that one layer at a time is held twice, not all of them
    return new, held[rows[:, None], order]

@contextlib.contextmanager
def one_token_graph(lm):
    """Within this context, on CUDA, forwards of one token a row are captured once as a CUDA graph and replayed.

    A decoding step is some thousand kernels, most of them shorter than the host needs to launch them. A replay
    launches all at once, at the addresses of the capture: so the cache is static. The first step is as generate()
    prepares it. In the next there are just new tokens, positions one further on, and one more visible column.
    """
    forward, prepare, held = lm.forward, lm.prepare_inputs_for_generation, {}

    def capture(input_ids, position_ids, attention_mask, cache, **rest):
        run = lambda ids, positions, mask: forward(ids, position_ids=positions, attention_mask=mask, cache=cache,
                                                   **rest).logits
        held.update(positions=position_ids.clone(), mask=attention_mask.clone(), column=int(cache.get_seq_length()))
        inputs = (input_ids.clone(), held["positions"], held["mask"])
        held["graph"] = torch.cuda.make_graphed_callables(run, inputs, num_warmup_iters=1)
        for layer in cache.layers:      # the tokens that capturing has counted are still to come
            layer.cumulative_length.fill_(held["column"])

    @wraps(forward)
    def step(input_ids=None, **inputs):
        if "graph" in held:
            held["positions"] += 1
            held["mask"][..., held["column"]] = True
            held["column"] += 1
            held["out"].logits = held["graph"](input_ids, held["positions"], held["mask"])
            return held["out"]
        out = held["out"] = forward(input_ids, **inputs)
        if input_ids.shape[1] == 1 and not getattr(lm, "no_graph", False):
            try:
                capture(input_ids, **inputs)
            except Exception as e:
                lm.no_graph = True
                tqdm.write(f"note: no CUDA graph of {type(lm).__name__} ({first_line(e)}): sampling is slower")
        return out

    if lm.device.type == "cuda":
        light = lambda ids, **inputs: {"input_ids": ids[:, -1:]} if "graph" in held else prepare(ids, **inputs)
        lm.forward, lm.prepare_inputs_for_generation = step, wraps(prepare)(light)
    try:
        yield
    finally:
        for name in ("forward", "prepare_inputs_for_generation"):
            vars(lm).pop(name, None)

def sampling_config(lm, tokenizer, cfg: Config) -> GenerationConfig:
    """Temperature, or greedy if it is 0, and nothing else. This is where sampling = scoring is secured.

    What a checkpoint brings as its own defaults (top_k, top_p, repetition_penalty ..) would make the sampled
    distribution differ from the scored one, so all is replaced. top_k is 0 because the library's default is 50.
    """
    eos = lm.generation_config.eos_token_id
    eos = sorted({tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None})
    shape = dict(temperature=cfg.temperature, top_k=0, top_p=1.0) if cfg.temperature else {}
    return GenerationConfig(**shape, do_sample=bool(shape), max_new_tokens=cfg.max_new_tokens, pad_token_id=0,
                            eos_token_id=eos or None, use_cache=True, disable_compile=True)

@lru_cache(maxsize=8)
def stop_tags(tokenizer) -> StopStringCriteria:
    """Ends a row of generate() at the first closing tag, also if that ends inside a token."""
    return StopStringCriteria(tokenizer, ["</search>", "</answer>"])

def turn_end(turn: list[int], tokenizer, eos: list[int]) -> tuple[int, bool]:
    """(length, closed) of a turn up to its stop token, which is trained too. Behind it generate() has padded:
    padding is known by this length and never by its id."""
    def ended(n):
        text = tokenizer.decode(turn[:n])
        return "</search>" in text or "</answer>" in text or not set(eos).isdisjoint(turn[:n])
    length = bisect_left(range(len(turn) + 1), True, key=ended)
    return min(length, len(turn)), length <= len(turn)

def take_turn(r: Rollout, turn: list[int], closed: bool, tokenizer, cfg: Config) -> None:
    """Write down a turn of the policy and what it does: end the rollout (r.stop is set) or ask a query."""
    action = parse_turn(tokenizer.decode(turn))
    r.write(turn, True)
    if action is None:
        r.stop = "format" if closed else "length"
    elif action[0] == "answer":
        r.stop, r.answer = "answer", action[1]
    elif len(r.boundaries) == cfg.max_turns:
        r.stop = "turns"
    else:
        r.queries.append(clean_query(action[1]))

def take_results(r: Rollout, found: Results, context: int, tokenizer, cfg: Config) -> None:
    """Write down what a query brought, which opens the next turn; or end the rollout if that has no room."""
    block, shown = encode_information(tokenizer, found, cfg.max_info_tokens)
    if len(r.ids) + len(block) + turn_room(cfg) > context:
        r.stop, shown = "length", Results(error=found.error, cached=found.cached)
    else:
        r.write(block, False)
        r.boundaries.append(len(r.ids))
    r.retrieved.append(shown)

def turn_room(cfg: Config) -> int:
    """Tokens that a turn may need, or the probe in its place."""
    return max(cfg.max_new_tokens, 2 * MAX_GOLD_TOKENS)

# ---- belief and log-probs ----------------------------------------------------------------------------------
def token_logps(lm, rollouts: list[Rollout], temperature: float, schema: list[int] = (), golds: list = ()):
    """log pi of what the policy wrote and, if there are golds, of each rollout's gold at each of its boundaries.

    The one function for policy, old policy, reference and belief. schema + golds[i], tokens, is the probe of
    rollout i. Returns two lists of fp32 tensors: per rollout (policy tokens,), and (T, gold tokens).

    The first forward reads the rollouts, the second all probes on its keys and values (paper, Fig. 3). Of a
    rollout of two tokens r, and a probe of two tokens p that is read behind the first r:

        token       r0 r1   p0 p1       p0 sees r0 and itself, p1 sees r0, p0 and itself
        position     0  1    1  2       as if the probe stood where r1 stands

    Why that is exact: a key depends on no later token, so up to a boundary the keys of the whole rollout are those
    of its prefix alone. A probe that sees just these stands where the next turn would begin.
    """
    right = partial(pad, device=lm.device)      # where no token of a rollout looks: so no mask is needed
    ids, mask = right(r.ids for r in rollouts), right(r.mask for r in rollouts).bool()             # (B, L)
    with arithmetic(lm):
        cache = DynamicCache() if golds else None
        hidden = lm.base_model(input_ids=ids, cache=cache, use_cache=bool(golds))[0]               # (B, L, H)
        hidden, targets = hidden[:, :-1][mask[:, 1:]], ids[mask]      # a token is predicted from the one before
        if golds:
            each = [(r.boundaries, [*schema, *gold]) for r, gold in zip(rollouts, golds)]
            probes = right(probe * len(boundaries) for boundaries, probe in each)                  # (B, P)
            start = right([b for b in boundaries for _ in probe] for boundaries, probe in each)
            offset = right([*range(len(probe))] * len(boundaries) for boundaries, probe in each)
            asked = (offset >= len(schema)) & (start > 0)                  # padding starts nowhere
            more = lm.base_model(input_ids=probes, position_ids=start + offset, cache=cache, use_cache=True,
                                 attention_mask=probe_mask(start, ids.shape[1], lm.dtype))[0]
            hidden = torch.cat([hidden, more[:, :-1][asked[:, 1:]]])
            targets = torch.cat([targets, probes[asked]])

        def score_chunk(h, t):
            logits = lm.get_output_embeddings()(h).float() / (temperature or 1.0)
            return logits.gather(-1, t[:, None])[:, 0] - logits.logsumexp(-1)
        # Only targets pass the head, in chunks that the backward computes again: (L, vocabulary) is never held.
        run = partial(checkpoint, score_chunk, use_reentrant=False) if torch.is_grad_enabled() else score_chunk
        logps = torch.cat([*map(run, hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK))])
    sizes = [sum(r.mask) for r in rollouts] + [len(r.boundaries) * len(g) for r, g in zip(rollouts, golds)]
    parts = list(logps.split(sizes))
    return parts[:len(rollouts)], [x.view(-1, len(gold)) for x, gold in zip(parts[len(rollouts):], golds)]

def probe_mask(start: torch.Tensor, length: int, dtype: torch.dtype) -> torch.Tensor:
    """What probe tokens may attend to, an additive mask (B, 1, P, length + P); start (B, P): their boundaries."""
    j, p = torch.arange(length, device=start.device), torch.arange(start.shape[1], device=start.device)
    own = (start[:, None, :] == start[:, :, None]) & (p <= p[:, None])      # its own probe, up to itself
    hidden = ~torch.cat([j < start[:, :, None], own], 2)[:, None]           # and the rollout before its boundary
    return torch.zeros(hidden.shape, dtype=dtype, device=start.device).masked_fill_(hidden, torch.finfo(dtype).min)

def by_tokens(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices in batches of about the same length whose padded size is within budget (one row is always let in).

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

@torch.no_grad()
def score(model, tokenizer, rollouts: list[Rollout], golds: list | None, cfg: Config):
    """(logps, beliefs) by the model as it stands; within `reference(model)`, by the reference.

    logps: per rollout log pi of the tokens that the policy wrote, a tensor. beliefs: per rollout b_0 .. b_{T-1},
    the mean log pi of the tokens of golds[i] (Eq. 3), a text or a list of aliases of which the first is taken.
    """
    schema, gold_ids = encode(tokenizer, SCHEMA), [encode_gold(tokenizer, gold) for gold in golds or []]
    logps, beliefs = [None] * len(rollouts), [[] for _ in rollouts]
    # Nothing is kept for a backward, so there is room for more tokens at once than in the update.
    for batch in by_tokens([len(r.ids) for r in rollouts], 4 * cfg.batch_tokens):
        asked = [gold_ids[i] for i in batch] if golds else []
        found = token_logps(unwrap(model), [rollouts[i] for i in batch], cfg.temperature, schema, asked)
        for k, i in enumerate(batch):
            logps[i], beliefs[i] = found[0][k], found[1][k].mean(1).tolist() if golds else []
    return logps, beliefs

# ---- rewards and advantages --------------------------------------------------------------------------------
def answer_words(text: str) -> list[str]:
    """Words of an answer as the authors' scorer has them: lower-case, ASCII punctuation to spaces."""
    return "".join(" " if c in string.punctuation else c for c in normalise(text).lower()).split()

def f1_score(prediction: str | None, golds: list[str] | str) -> float:
    """Word F1 with the best gold alias, 0..1 (Eq. 2), on sets of words as the authors score.

    >>> f1_score("Mira Oss", ["Oss", "Tavo"]), f1_score("no no no", "no")
    (0.6666666666666666, 1.0)
    """
    p, best = set(answer_words(prediction or "")), 0.0
    for gold in [golds] if isinstance(golds, str) else golds:
        g = set(answer_words(gold))
        best = max(best, 2 * len(p & g) / (len(p) + len(g)) if p & g else 0.0)
    return best

def exact_match(prediction: str | None, golds: list[str] | str) -> float:
    """1.0 if the words, in their order, are those of a gold alias."""
    golds = [golds] if isinstance(golds, str) else golds
    return float(bool(prediction) and answer_words(prediction) in [answer_words(gold) for gold in golds])

def outcome_reward(rollout: Rollout, golds: list[str] | str, format_penalty: float) -> float:
    """Eq. 2: F1 of the answer, or the penalty if the rollout ended in any other way."""
    return f1_score(rollout.answer, golds) if rollout.stop == "answer" else format_penalty

def info_gains(beliefs: list[float], gain: str = "prob") -> list[float]:
    """Eq. 4: what each turn but the last added to the belief. T beliefs (mean log-probs) give T - 1 gains.

    gain: "prob" for exp(b_t) - exp(b_{t-1}), "logprob" for b_t - b_{t-1}.

    >>> info_gains([-3.0, -2.0, -2.0], "logprob")
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

# What counts, what is normalised together, and whether it is divided by its std and not only centred. Pooled over
# all turns, what a search is worth on average also rewards or charges going on; pooled by turn, searches compete
# with those at the same depth, and when to stop is left to the outcome. Divided by the std, noise or a format
# penalty gets the size of a success in a group where nobody succeeds.
RECIPES = {
    "igpo": dict(gain="prob", pool="turn", scale=False),                # ours
    "igpo-v2": dict(gain="logprob", pool="group", scale=True),          # the paper, v2
    "igpo-v1": dict(gain="prob", pool="joint", scale=True),             # the paper, v1: with the outcomes
    "grpo": dict(gain=None, scale=True),                                # DeepSeekMath, arXiv 2402.03300
    "dr-grpo": dict(gain=None, scale=False),                            # arXiv 2503.20783
    "ig": dict(gain="prob", pool="turn", scale=False, outcome=False),   # the paper's ablation, table 3
}

def turn_advantages(gains: list[list[float]], outcomes: list[float], pool: str = "turn", scale: bool = False,
                    outcome: bool = True, gamma: float = 1.0) -> list[list[float]]:
    """Eq. 5 and 6 for one group of G rollouts: the advantage of every turn of every rollout.

    gains[i] has one entry fewer than rollout i has turns, and a gain of 0 is one like any other. pool: gains are
    normalised per "turn", per "group", or "joint"ly with the outcomes. outcome=False: the outcomes do not count.
    Raises ValueError for a group of fewer than 2, lists that do not match, or numbers that are not finite.

    >>> turn_advantages([[1.0], [3.0]], [0.0, 1.0], "group", scale=True)       # gains: -1, +1; outcomes: -1, +1
    [[-2.0, -1.0], [2.0, 1.0]]
    """
    if len(outcomes) < 2 or len(gains) != len(outcomes):
        raise ValueError(f"{len(gains)} lists of gains, {len(outcomes)} outcomes: a group has 2 or more of both")
    if not all(map(math.isfinite, [*outcomes, *(g for gs in gains for g in gs)])):
        raise ValueError("a gain or an outcome is not finite")
    pools: dict = {}           # what is normalised together: {pool: [(rollout, turn, reward), ..]}
    for i, gs in enumerate(gains):
        for t, gain in enumerate(gs):
            pools.setdefault({"turn": t, "group": "gains", "joint": "outcomes"}[pool], []).append((i, t, gain))
        pools.setdefault("outcomes", []).append((i, len(gs), outcomes[i] * outcome))
    rewards = [[0.0] * (len(gs) + 1) for gs in gains]
    for rows in pools.values():                                                                     # Eq. 5
        middle, spread = mean(r for _, _, r in rows), std(r for _, _, r in rows)
        for i, t, r in rows:
            rewards[i][t] = (r - middle) / (spread if scale else 1.0) if spread > STD_FLOOR else 0.0
    to_end = lambda row: accumulate(reversed(row), lambda later, r: r + gamma * later)              # Eq. 6
    return [list(to_end(row))[::-1] for row in rewards]

def recipe_credit(beliefs: list[list[float]], outcomes: list[float], cfg: Config, **_) -> list[list[float]]:
    """The advantages of all groups of a step, by the recipe that --credit names."""
    gain, how = RECIPES[cfg.credit]["gain"], {k: v for k, v in RECIPES[cfg.credit].items() if k != "gain"}
    gains = [info_gains(b, gain) if gain else [0.0] * (len(b) - 1) for b in beliefs]
    groups = [slice(i, i + cfg.group) for i in range(0, len(outcomes), cfg.group)]
    return [row for g in groups for row in turn_advantages(gains[g], outcomes[g], **how)]

# ---- loss --------------------------------------------------------------------------------------------------
def policy_loss(logp, old_logp, ref_logp, advantages, mask, clip: float = 0.2, kl_coef: float = 0.001):
    """Eq. 7 as a loss, all tensors (B, L): mean over a rollout's own policy tokens, then over the B rollouts.

    The KL is Schulman's k3 estimator, exp(d) - d - 1 with d = log pi_ref - log pi, and carries a gradient. On
    policy the surrogate's value is only the mean advantage, about 0: what counts is its gradient. Returns (loss,
    stats), stats being sums over tokens: "tokens", "kl", "clipped", "entropy" (-log pi of what was sampled).
    """
    mask = mask.float()
    ratio = torch.exp(logp - old_logp)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    d = ref_logp - logp
    kl = torch.exp(d) - d - 1
    per_rollout = ((surrogate - kl_coef * kl) * mask).sum(1) / mask.sum(1).clamp(min=1)
    with torch.no_grad():
        binding = (clipped * advantages < ratio * advantages).float()
        stats = {"tokens": mask, "kl": kl * mask, "clipped": binding * mask, "entropy": -logp * mask}
    return -per_rollout.mean(), {name: values.sum().item() for name, values in stats.items()}

def accumulate_gradient(model, rollouts, old, ref, advantages, cfg: Config) -> dict:
    """Gradient of Eq. 7 over these rollouts, in micro-batches that fit: their number does not change it.

    old, ref: per rollout the log-probs of its policy tokens; advantages: per rollout one per turn, for all tokens
    of the turn. Returns the stats of policy_loss, summed, "loss", and "ratio", that of all tokens farthest from 1.
    """
    total = {"loss": 0.0, "tokens": 0.0, "kl": 0.0, "clipped": 0.0, "entropy": 0.0, "ratio": 1.0}
    for batch in by_tokens([len(r.ids) for r in rollouts], cfg.batch_tokens):
        logps, _ = token_logps(unwrap(model), [rollouts[i] for i in batch], cfg.temperature)
        by_token = [x.new_tensor([advantages[i][t] for t in rollouts[i].policy_turns]) for i, x in zip(batch, logps)]
        rows = (logps, [old[i] for i in batch], [ref[i] for i in batch], by_token, [torch.ones_like(x) for x in logps])
        logp, old_logp, ref_logp, A, mask = (pad_sequence(x, batch_first=True) for x in rows)
        loss, stats = policy_loss(logp, old_logp, ref_logp, A, mask, cfg.clip, cfg.kl_coef)
        loss = loss * (len(batch) / len(rollouts))
        loss.backward()
        for key, value in {**stats, "loss": loss.item()}.items():
            total[key] += value
        ratios = torch.exp(logp - old_logp).detach()[mask.bool()].tolist()
        total["ratio"] = max([total["ratio"], *ratios], key=lambda ratio: abs(ratio - 1))
    return total

# ---- training ----------------------------------------------------------------------------------------------
# Under torchrun each process plays, scores and learns from whole groups of its own; gradients are summed.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

def all_gather(items: list) -> list:
    """The lists of all processes, one behind the other."""
    lists = [items] * WORLD
    if WORLD > 1:
        dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]

def train_step(model, tokenizer, optimizer, questions: list[dict], search, cfg: Config, credit=recipe_credit):
    """One step on this process's questions. Returns (metrics, records of the rollouts), both of all processes."""
    times = [time.perf_counter()]
    rollouts = rollout(model, tokenizer, questions, search, cfg)                                        # 1
    stop_if_search_is_down(rollouts)
    times.append(time.perf_counter())
    asked = [q for q in questions for _ in range(cfg.group)]
    old, beliefs = score(model, tokenizer, rollouts, [q["answers"] for q in asked], cfg)                # 2
    with reference(model):
        ref = score(model, tokenizer, rollouts, None, cfg)[0] if cfg.kl_coef else old
    times.append(time.perf_counter())
    finite = all(all_gather([math.isfinite(b) for bs in beliefs for b in bs]))
    outcomes = [outcome_reward(r, q["answers"], cfg.format_penalty) for r, q in zip(rollouts, asked)]
    of_step = dict(model=model, tokenizer=tokenizer, rollouts=rollouts, asked=asked, search=search)      # for comparators
    advantages = (credit(beliefs=beliefs, outcomes=outcomes, cfg=cfg, **of_step) if finite else             # 3, 4
                  [[math.nan] * len(b) for b in beliefs])
    updates = update(model, optimizer, rollouts, old, ref, advantages, cfg)                             # 5
    times.append(time.perf_counter())
    records = all_gather([record(tokenizer, *of, cfg) for of in zip(rollouts, asked, beliefs, outcomes, advantages)])
    seconds = [end - start for start, end in zip(times, times[1:])]
    seconds = dict(zip(("seconds_rollout", "seconds_score", "seconds_update"), seconds), seconds=sum(seconds))
    return {**step_metrics(records, all_gather(updates), cfg), **seconds}, records

def stop_if_search_is_down(rollouts: list[Rollout]) -> None:
    """UserError, in all processes, if too many searches failed: there is nothing to learn from such a step."""
    errors = all_gather([found.error for r in rollouts for found in r.retrieved])
    failed = [error for error in errors if error]
    if len(failed) > MAX_FAILED_SEARCHES * len(errors):
        raise UserError(f"{len(failed)} of {len(errors)} searches failed ({failed[-1]})")

def update(model, optimizer, rollouts, old, ref, advantages, cfg: Config) -> list[dict]:
    """The optimizer's updates of a step. One whose loss or gradient is not finite is not made, but "skipped"."""
    parameters, updates = [p for p in model.parameters() if p.requires_grad], []
    order = torch.randperm(len(rollouts)).tolist() if cfg.minibatches > 1 else range(len(rollouts))
    recomputing = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    for m in range(cfg.minibatches):
        part = [[values[i] for i in order[m::cfg.minibatches]] for values in (rollouts, old, ref, advantages)]
        optimizer.zero_grad(set_to_none=True)
        for module in recomputing:      # a layer recomputes only if it thinks that it is trained; dropout stays off
            module.training = True
        stats = accumulate_gradient(model, *part, cfg)
        for module in recomputing:
            module.training = False
        share = len(part[0]) / sum(all_gather([len(part[0])]))      # of the rollouts of all processes
        for p in parameters if WORLD > 1 else []:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad * share
            dist.all_reduce(p.grad)
        loss = sum(all_gather([stats["loss"] * share]))
        norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM).item()
        updates.append({**stats, "loss": loss, "grad_norm": norm, "skipped": not math.isfinite(loss + norm)})
        if not updates[-1]["skipped"]:
            optimizer.step()
    return updates

def record(tokenizer, r: Rollout, question: dict, beliefs, outcome, advantages, cfg: Config) -> dict:
    """A rollout as a line of rollouts.jsonl, turn by turn."""
    gains, turns = info_gains(beliefs, RECIPES.get(cfg.credit, {}).get("gain") or "prob"), []
    for t, (start, end) in enumerate(zip(r.boundaries, [*r.boundaries[1:], len(r.ids)])):
        found = r.retrieved[t] if t < len(r.retrieved) else Results()
        text = tokenizer.decode([i for i, m in zip(r.ids[start:end], r.mask[start:end]) if m])
        turns.append({"text": text, "query": r.queries[t] if t < len(r.queries) else None, "error": found.error,
                      "cached": found.cached, "passages": [asdict(p) for p in found],
                      "gain": gains[t] if t < len(gains) else None, "advantage": advantages[t] if advantages else None})
    kept = {key: question[key] for key in ("id", "question", "answers", "supporting", "hops") if key in question}
    scores = {"f1": f1_score(r.answer, question["answers"]), "em": exact_match(r.answer, question["answers"])}
    return {**kept, **scores, "answer": r.answer, "stop": r.stop, "outcome": outcome, "beliefs": beliefs,
            "policy_tokens": sum(r.mask), "turns": turns}

def step_metrics(records: list[dict], updates: list[dict], cfg: Config) -> dict:
    """The metrics of a step, which docs/metrics.md explains."""
    turns, groups = [t for r in records for t in r["turns"]], range(0, len(records), cfg.group)
    groups = [records[i:i + cfg.group] for i in groups]
    gains, searches = [t["gain"] for t in turns if t["gain"] is not None], [t for t in turns if t["query"] is not None]
    answers = [r["turns"][-1]["text"] for r in records if r["stop"] == "answer"]
    done = [u for u in updates if not u["skipped"]]
    per_token = lambda key: sum(u[key] for u in done) / max(sum(u["tokens"] for u in done), 1)
    return {
        "outcome_f1": mean(r["f1"] for r in records), "outcome_em": mean(r["em"] for r in records),
        "outcome_reward": mean(r["outcome"] for r in records), "turns": len(turns) / len(records),
        "belief_first": mean(r["beliefs"][0] for r in records), "belief_last": mean(r["beliefs"][-1] for r in records),
        "gain_mean": mean(gains), "gain_std": std(gains), "gain_positive": mean(g > 0 for g in gains),
        "advantage_std": std(t["advantage"] for t in turns),
        "no_signal_outcome": mean(std(r["outcome"] for r in g) <= STD_FLOOR for g in groups),
        "no_signal": mean(not any(t["advantage"] for r in g for t in r["turns"]) for g in groups),
        **{f"stop_{why}": mean(r["stop"] == why for r in records) for why in ("answer", "format", "length", "turns")},
        "answer_form": mean(SCHEMA[SCHEMA.rindex("<"):] in text for text in answers), "searches": len(searches),
        "failed_searches": sum(t["error"] is not None for t in searches),
        "cached_searches": sum(t["cached"] for t in searches), "policy_tokens": sum(r["policy_tokens"] for r in records),
        "kl": per_token("kl"), "entropy": per_token("entropy"), "clip_fraction": per_token("clipped"),
        "loss": mean(u["loss"] for u in done), "grad_norm": mean(u["grad_norm"] for u in done),
        "ratio_start": max((u["ratio"] for u in updates[::cfg.minibatches]), key=lambda x: abs(x - 1)),
        "skipped": sum(u["skipped"] for u in updates)}

def evaluate(model, tokenizer, questions: list[dict], search, cfg: Config) -> dict:
    """Greedy evaluation of all processes: mean F1, exact match and turns."""
    mine = questions[RANK::WORLD]
    rollouts = rollout(model, tokenizer, mine, search, replace(cfg, group=1, temperature=0.0))
    stop_if_search_is_down(rollouts)
    rows = all_gather([(f1_score(r.answer, q["answers"]), exact_match(r.answer, q["answers"]), len(r.boundaries))
                       for r, q in zip(rollouts, mine)])
    return dict(zip(("eval_f1", "eval_em", "eval_turns"), map(mean, zip(*rows))))

def step_questions(questions: list[dict], step: int, cfg: Config) -> list[dict]:
    """The questions of a step (from 1). Each epoch is a permutation of its own; the step alone tells where we are."""
    first, n = (step - 1) * cfg.questions, len(questions)
    order = lru_cache(lambda epoch: random.Random(f"{cfg.seed}-{epoch}").sample(range(n), n))
    return [questions[order(i // n)[i % n]] for i in range(first, first + cfg.questions)]

def check_questions(model, tokenizer, questions: list[dict], cfg: Config) -> None:
    """UserError for a question that leaves no room for a turn. Golds that the belief sees in part are told."""
    context = context_length(unwrap(model))
    for q in questions:
        length = len(encode_prompt(tokenizer, q["question"])) + turn_room(cfg)
        if length > context:
            raise UserError(f"question {q['id']}: prompt and one turn need {length} tokens, and the model has a context "
                            f"or window of {context}. Leave it out, or lower --max_new_tokens.")
    if long := sum(len(encode(tokenizer, q["answers"][0], True)) > MAX_GOLD_TOKENS for q in questions):
        print(f"{long} of {len(questions)} gold answers are longer than {MAX_GOLD_TOKENS} tokens, their belief is in the first")

def train(cfg: Config, credit=recipe_credit) -> Path:
    """The whole run; returns its folder. Each step is on disk before the next begins."""
    out, done, history = Path(cfg.out), 0, []
    read = lambda name: load_questions(locate(getattr(cfg, name) or f"{cfg.data}/{name}.jsonl"))
    questions, dev = read("train"), read("dev") if cfg.eval_every else []
    search = open_search(cfg.search or "bm25:" + locate(f"{cfg.data}/corpus.jsonl"), cfg.search_cache)
    model, tokenizer = load_model(cfg)
    check_questions(model, tokenizer, questions + dev, cfg)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=cfg.lr, weight_decay=0.0)
    if cfg.resume:
        done, history = load_checkpoint(out, model, optimizer)
    elif RANK == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "config.json", json.dumps(asdict(cfg), indent=1) + "\n")
    print(f"{cfg.model}: {model.num_parameters() / 1e6:.1f}M parameters, {model.num_parameters(True) / 1e6:.2f}M of them "
          f"LoRA, {model.dtype} on {model.device.type}. {len(questions)} questions, {cfg.questions} x {cfg.group} rollouts "
          f"a step, steps {done + 1} to {cfg.steps}. Results go to {out}.", flush=True)
    steps = range(done + bool(history), cfg.steps + 1)      # step 0 is the evaluation before training
    try:
        for step in tqdm(steps, unit="step", dynamic_ncols=True, disable=True if RANK else None):
            row, records = {"step": step}, []
            if step:
                torch.manual_seed(random.Random(f"{cfg.seed}-{step}-{RANK}").getrandbits(63))    # also after a resume
                mine = step_questions(questions, step, cfg)[RANK::WORLD]
                metrics, records = train_step(model, tokenizer, optimizer, mine, search, cfg, credit)
                row.update(metrics)
            if cfg.eval_every and (step % cfg.eval_every == 0 or step == cfg.steps):
                row.update(evaluate(model, tokenizer, dev, search, cfg))
            history.append(row)
            if RANK == 0:
                save_step(out, model, optimizer, history, records)
                tqdm.write(summary(row) + warning(history))
            done = step
    except BaseException as e:
        tqdm.write(f"stopped ({first_line(e)}). Step {done} is saved; go on with: python igpo.py --resume {out}")
        raise
    if best := [row for row in history if "eval_f1" in row]:
        print("dev F1 by step: " + ", ".join(f"{row['step']}: {row['eval_f1']:.3f}" for row in best) +
              f"\nThe best adapter is in {out}/best. To evaluate it: python eval.py --adapter {out}/best")
    return out

def summary(row: dict) -> str:
    """A step in one line."""
    text = f"step {row['step']:>4}"
    if row["step"]:
        text += (f"  F1 {row['outcome_f1']:.2f}  turns {row['turns']:.1f}  belief {row['belief_first']:+.2f} -> "
                 f"{row['belief_last']:+.2f}  gain {row['gain_mean']:+.2f} ± {row['gain_std']:.2f}  no signal "
                 f"{row['no_signal_outcome']:.0%} -> {row['no_signal']:.0%}  KL {row['kl']:.3f}  {row['seconds']:.1f} s")
    return text + (f"  dev F1 {row['eval_f1']:.3f}, EM {row['eval_em']:.3f}" if "eval_f1" in row else "")

def warning(history: list[dict]) -> str:
    """What went bad with the last step and was not so in the one before; empty if nothing did."""
    def bad(rows):
        steps, found = [row for row in rows if row["step"]], set()
        lost = lambda row: row["stop_format"] + row["stop_length"]
        if steps and lost(steps[-1]) > 0.5 and min(map(lost, steps)) < 0.2:
            found.add("over half of the rollouts broke the format or were cut")
        for key in ("kl", "grad_norm"):
            if len(steps) > 10 and steps[-1][key] > 10 * median(row[key] for row in steps[:-1]) > 0:
                found.add(f"{key} is ten times its median")
        f1 = [row["eval_f1"] for row in rows if "eval_f1" in row]
        return found | ({"dev F1 is below half of its best"} if f1 and f1[-1] < max(f1) / 2 else set())
    new = bad(history) - bad(history[:-1])
    return f"\nwarning: {'; '.join(sorted(new))}. The best adapter so far is in best/." if new else ""

# ---- save and resume ---------------------------------------------------------------------------------------
def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)

def save_adapter(model, folder: Path) -> None:
    """The adapter in PEFT's format, each file moved into place whole."""
    part = folder.with_name(folder.name + ".part")
    model.save_pretrained(part, save_embedding_layers=False)      # "auto" would ask the hub, at every step
    folder.mkdir(exist_ok=True)
    for file in part.iterdir():
        os.replace(file, folder / file.name)

def save_step(out: Path, model, optimizer, history: list[dict], records: list[dict]) -> None:
    """Logs, adapters, and last state.pt, from which a run goes on: all that training changes is in it."""
    step, f1 = history[-1]["step"], [row.get("eval_f1", -1) for row in history]
    try:
        for name, rows in (("metrics", history[-1:]), ("rollouts", records)):
            finite = [json.loads(json.dumps({"step": step, **row}), parse_constant=lambda nan: None) for row in rows]
            with open(out / f"{name}.jsonl", "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in finite)
        for name in ("checkpoint", "best") if f1[-1] > max(f1[:-1], default=-1) else ("checkpoint",):
            save_adapter(model, out / name)
        adapter, path = {n: p for n, p in model.named_parameters() if p.requires_grad}, out / "checkpoint" / "state.pt"
        torch.save({"step": step, "adapter": adapter, "optimizer": optimizer.state_dict()}, f"{path}.part")
        os.replace(f"{path}.part", path)
    except (OSError, RuntimeError, SafetensorError) as e:      # a full disk, as each library tells it
        raise UserError(f"step {step} cannot be saved in {out}: {first_line(e)}") from None

def load_checkpoint(out: Path, model, optimizer) -> tuple[int, list[dict]]:
    """(steps done, their metrics). What the logs hold behind that step is dropped, since it is done again."""
    try:
        state = torch.load(out / "checkpoint" / "state.pt", map_location="cpu", weights_only=True)
        model.load_state_dict(state["adapter"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        for name in ("rollouts", "metrics"):
            lines = (out / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]      # the last is cut or empty
            rows = [row for row in map(json.loads, lines) if row["step"] <= state["step"]]
            write_whole(out / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return state["step"], rows
    except Exception as e:
        raise UserError(f"{out}: cannot be resumed ({first_line(e)}): damaged, or of another model") from None

# ---- command line ------------------------------------------------------------------------------------------
GROUPS = {"model": "data and run", "questions": "episode", "credit": "learning", "dtype": "machine"}
MAY_CHANGE = {"resume", "steps", "eval_every", "rollout_batch", "batch_tokens", "gradient_checkpointing"}

def parse_config(argv: list[str] | None = None, credits: dict = {}) -> Config:
    """What is given, over the demo's values (no --model) or the resumed run's, over the defaults. UserError."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"igpo: {message}; --help lists the options\n")
    for f in fields(Config):
        group = parser.add_argument_group(GROUPS[f.name]) if f.name in GROUPS else group
        choices = [*RECIPES, *credits] if f.name == "credit" else f.metadata["choices"] or None
        kind = {"action": argparse.BooleanOptionalAction} if f.default is True else {"type": type(f.default), "choices": choices}
        default = f"{f.default}" + (f"; demo: {DEMO[f.name]}" if f.name in DEMO else "")
        group.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=f"{f.metadata['help']} ({default})", **kind)
    given = vars(parser.parse_args(argv))
    if given.get("resume"):
        base = read_config(given["resume"])
        for name in set(given) - MAY_CHANGE:
            if given[name] != getattr(base, name):
                raise UserError(f"--{name}: the run was started with {getattr(base, name)!r}, and goes on with it")
        given["out"] = given["resume"]
    else:
        base = Config(**(DEMO if not given.get("model") else {}))
    cfg = replace(base, **given)
    cfg.out = cfg.out or f"runs/{Path(cfg.model).name.removesuffix('.gguf')}-{cfg.credit}-seed{cfg.seed}"
    for f in fields(Config):
        value, least = getattr(cfg, f.name), f.metadata["least"]
        if not isinstance(value, str) and not (-2**63 if least is None else least) <= value < 2**63:
            raise UserError(f"--{f.name} {value}: must be at least {least}")
    if cfg.questions < WORLD or cfg.minibatches > cfg.questions // WORLD * cfg.group:
        raise UserError("--questions or --minibatches: too few rollouts to divide")
    if not cfg.resume and Path(cfg.out).exists() and any(Path(cfg.out).iterdir()):
        raise UserError(f"{cfg.out} exists. Go on with it (--resume {cfg.out}), delete it, or choose another --out")
    return cfg

def read_config(folder: str) -> Config:
    """The values that a run was started with. UserError."""
    try:
        return Config(**json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f"{folder}/config.json: cannot be read ({first_line(e)}). Is it a run folder?") from None

def main(argv: list[str] | None = None, credits: dict = {}) -> int:
    """Exit status: 0; 2 for what the user can mend; 130 and 143 for Ctrl-C and SIGTERM. credits: more for --credit."""
    try:
        if WORLD > 1:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else None
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
            sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")
        cfg, = all_gather([] if RANK else [parse_config(argv, credits)])      # one process looks before any of them writes
        print("\n".join(f"{key:24}{value}" for key, value in asdict(cfg).items() if value != ""))
        train(cfg, credits.get(cfg.credit, recipe_credit))
    except SearchError as e:
        print(f"igpo: {first_line(e)}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as e:
        print(f"igpo: {first_line(e)} Lower --rollout_batch or --batch_tokens; a resumed run may.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.stdout.reconfigure(errors="replace")           # a transcript in any script, on a terminal that knows one
    sys.exit(main())
