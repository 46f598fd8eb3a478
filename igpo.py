"""IGPO in one file: train a language-model agent that searches over several turns.

Information Gain-based Policy Optimization (Wang et al., arXiv 2510.14967 v2, ICLR 2026; equation numbers are
theirs). The policy answers in turns: it thinks and searches, and in the last turn it thinks and answers.

    prompt <think> .. </think> <search> query </search>   <information> passages </information>
           <think> .. </think> <answer> words </answer>

One training step, train_step(), does five things:
  1. rollout()          Sample G rollouts for each question. The rollouts of one question are a group.
  2. score()            Ask the policy itself, by teacher forcing, how likely the gold answer was before the
                        first turn and after each search: the beliefs b_0 .. b_{T-1} (Eq. 3). All are read
                        when a rollout has ended. The same forwards give the old log-probs that PPO needs.
  3. info_gains()       The reward of a turn is what its search added to the belief (Eq. 4), in probability by
                        default. That of the last turn is the F1 of the answer (Eq. 2).
  4. turn_advantages()  Normalise both within the group (Eq. 5), then sum from each turn to the end (Eq. 6).
  5. policy_loss()      PPO-clip with a KL to the reference, on the tokens that the policy wrote (Eq. 7).

Where we depart from the paper on purpose:
  1. The environment opens <think> at every turn, so a belief is read under the form of a turn that answers.
  2. The belief is in the first gold alias, cut at 32 tokens, at the sampling temperature. F1: the best.
  3. LoRA instead of full fine-tuning, so the reference is the same model with its adapter switched off.
  4. A rollout that ends without an answer gets the format penalty on its last turn. Earlier gains stay.
"""
import argparse, contextlib, json, math, os, random, re, signal, sys, time, warnings
from bisect import bisect_left, bisect_right
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial, wraps
from itertools import accumulate
from pathlib import Path
from statistics import fmean, median, pvariance
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig
from transformers.cache_utils import Cache, StaticLayer
from transformers.generation import StopStringCriteria
from transformers.utils.logging import disable_progress_bar
from search_tool import (Results, UserError, clean_query, exact_match, f1_score, first_line, load_questions,
                         open_search)
disable_progress_bar()
warnings.filterwarnings("ignore", category=FutureWarning)      # peft uses names that transformers gives up

# ---- configuration -----------------------------------------------------------------------------------------
def option(default, text: str, least: float = -math.inf):
    """A field of Config: its default, its line of --help, and the least value that it may have."""
    return field(default=default, metadata={"help": text, "least": least})

@dataclass
class Config:
    """Every option. The command line is made from this, and a run saves its values as config.json."""
    model: str = option("", "hub id, name (Qwen2.5-1.5B-Instruct), folder or .gguf file; empty: demo/policy")
    init_adapter: str = option("", "PEFT folder that is merged into the model before training starts")
    data: str = option("demo", "folder of train.jsonl, dev.jsonl, corpus.jsonl, as made by tools/data.py")
    train: str = option("", "training questions, if not <data>/train.jsonl")
    dev: str = option("", "questions of the periodic greedy evaluation, if not <data>/dev.jsonl")
    search: str = option("", "search back end, if not bm25:<data>/corpus.jsonl; see search_tool.py")
    search_cache: str = option("auto", "disk cache of searches: auto (only public addresses), on, off, only")
    out: str = option("", "run folder; empty: runs/<model>-<credit>-seed<seed>")
    resume: str = option("", "run folder to go on with")
    seed: int = option(0, "seed of sampling, data order and LoRA init")
    steps: int = option(200, "training steps", 0)
    eval_every: int = option(10, "steps between evaluations on the dev questions; 0: never", 0)
    questions: int = option(8, "questions per step", 1)
    group: int = option(8, "rollouts per question (G)", 2)
    max_turns: int = option(5, "turns per rollout, the answer included", 1)
    max_new_tokens: int = option(256, "tokens the policy may write in one turn", 1)
    passages: int = option(3, "passages per search", 1)
    max_info_tokens: int = option(500, "tokens of search results per turn, shared among the passages", 0)
    temperature: float = option(1.0, "sampling temperature, also used in scoring", 0.01)
    credit: str = option("igpo", "reward of turns: igpo, igpo-v1, igpo-v2, grpo, dr-grpo, ig; see RECIPES")
    format_penalty: float = option(-0.1, "outcome of a rollout without an answer (lambda_fmt, Eq. 2)")
    lr: float = option(2e-5, "learning rate of AdamW, constant; the gradient's norm is clipped at 1", 0)
    minibatches: int = option(1, "optimizer updates per step, each on its part of the rollouts", 1)
    clip: float = option(0.2, "clip range of the ratio (epsilon, Eq. 7); one minibatch has ratio 1", 0)
    kl_coef: float = option(0.001, "weight of the KL to the reference (beta, Eq. 7)", 0)
    lora_rank: int = option(16, "LoRA rank, on all linear layers; alpha is twice the rank", 1)
    dtype: str = option("auto", "float32, bfloat16, or auto: bfloat16 on CUDA, else float32")
    rollout_batch: int = option(64, "rollouts generated at once", 1)
    batch_tokens: int = option(24576, "padded tokens per forward in scoring and update", 1)
    gradient_checkpointing: bool = option(True, "recompute activations in the update: slower, less memory")

# The embedded policy has 1M parameters and reads a page a turn. Only these values differ from the defaults.
DEMO = dict(model="demo/policy", steps=30, max_turns=6, max_new_tokens=32, passages=1, max_info_tokens=100,
            lr=5e-4, dtype="float32", batch_tokens=2048, gradient_checkpointing=False)
MAX_FAILED_SEARCHES = 0.5       # where a larger share of a step's searches fails, the run stops
MAX_GOLD_TOKENS = 32            # the belief uses at most this many tokens of the gold
HEAD_CHUNK = 256                # tokens sent through the LM head at once: of logits there are fp32 copies
STD_FLOOR = 1e-6                # rewards whose std is not above this count as equal, and say nothing
room = lambda cfg: max(cfg.max_new_tokens, 2 * MAX_GOLD_TOKENS)      # tokens that a turn or a probe may need

# ---- data --------------------------------------------------------------------------------------------------
@dataclass
class Rollout:
    """One trajectory. Turn t is ids[boundaries[t]:boundaries[t + 1]]: what the policy wrote, then what its
    search brought. Belief b_t is read at boundaries[t], behind the <think> that opens the turn."""
    ids: list[int]                  # the prompt, then turn by turn
    mask: list[int]                 # per token 1: written by the policy; 0: forced (prompt, search results)
    boundaries: list[int]           # where turns begin, the first behind the prompt
    answer: str | None = None       # the text inside <answer>, None if there is none
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

def locate(path: str) -> str:
    """A path as given, or beside this file if nothing is there: the demo is found from any folder."""
    beside = Path(__file__).resolve().parent / path
    return str(beside) if beside.exists() and not Path(path).exists() else path

# ---- tokens ------------------------------------------------------------------------------------------------
# Prompt and probe show an answer in one form. The metric answer_form tells how often the policy takes it.
SCHEMA = "\nNow there's enough information to answer.\n</think>\n<answer>\n"      # then the gold, section 3.2
INSTRUCTION = (
    "Answer the question. You can search as often as you need to. A turn has one of two forms. To search:\n\n"
    "<think>\n(what you need to find next)\n</think>\n<search>\n(what to look for)\n</search>\n\n"
    "The results come back between <information> and </information>, and your next turn begins. "
    f"To answer, which ends the task:\n\n<think>{SCHEMA}(your answer, in a few words)\n</answer>")
TURN = re.compile(r"\s*(<think>)?(?P<why>.*?)</think>\s*<(?P<do>search|answer)>(?P<what>.*?)</(?P=do)>", re.S)
TAG = re.compile(r"</?(think|search|answer|information)>")

def encode(tokenizer, text: str, data: bool = False) -> list[int]:
    """Token ids. data=True: whatever the text holds, it becomes no control token of the chat template."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=data)
def encode_prompt(tokenizer, question: str) -> list[int]:
    """Instruction and question as the user's message of the chat template, the assistant's think tag opened.
    No system message: some templates refuse it (Gemma), some drop it without a word (early Phi-3). If the
    template holds the comment {# knows_format #}, as the demo's does, the prompt is the question alone."""
    slot, known = "@QUESTION@", "{# knows_format #}" in str(tokenizer.chat_template)
    text = message = slot if known else f"{INSTRUCTION}\n\nQuestion: {slot}\n"
    if tokenizer.chat_template:
        chat, text = [{"role": "user", "content": message}], ""
        with contextlib.suppress(Exception):       # each template raises in its own way
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    if text.count(message.strip()) != 1:
        raise UserError("this model's chat template does not show a user's message once, as it is")
    # Later turns open with the bare tag, so the first does too, whatever a template writes behind it.
    text = text.rstrip() if text.rstrip().endswith("<think>") else text + "<think>"
    before, after = (encode(tokenizer, part) for part in text.split(slot))
    bos = [] if tokenizer.chat_template else tokenizer.encode("")[:1]      # what a base model begins with
    return bos + before + encode(tokenizer, question, True) + after

def encode_information(tokenizer, found: Results, max_tokens: int) -> tuple[list[int], Results]:
    """(what the environment writes after a search, up to the next open think tag; the passages shown in it).
    Where they do not fit, texts are cut to one length and end in "..": what is shown is what is recorded."""
    texts, body = [encode(tokenizer, p.text, True) for p in found], None
    cap = max(c for c in range(max_tokens + 1) if sum(min(len(ids), c) for ids in texts) <= max_tokens)
    cut = lambda ids: tokenizer.decode(ids[:cap]).rstrip("\ufffd ") + " .."
    while body is None or (len(body) > max_tokens and cap):
        cap -= 0 if body is None else math.ceil(cap / 10)
        shown = [p if len(ids) <= cap else replace(p, text=cut(ids)) for p, ids in zip(found, texts) if cap]
        text = "\n".join(f"({i}) {p.title}: {p.text}" for i, p in enumerate(shown, 1)) or "nothing found"
        body = encode(tokenizer, f"search failed: {found.error}" if found.error else text, True)
    start, end = encode(tokenizer, "\n<information>\n"), encode(tokenizer, "\n</information>\n<think>")
    return start + body[:max_tokens] + end, Results(shown, error=found.error, cached=found.cached)

def encode_gold(tokenizer, aliases: list[str]) -> list[int]:
    """Tokens of the first gold alias, cut at MAX_GOLD_TOKENS."""
    return encode(tokenizer, aliases[0].strip(), True)[:MAX_GOLD_TOKENS]
def parse_turn(text: str) -> tuple[str, str] | None:
    """The action of a turn's text, ("search", query) or ("answer", words); None if the format is broken."""
    m = TURN.match(text)      # the token that finished the closing tag may hold more, as ">." does: no matter
    broken = not m or TAG.search(m["why"]) or TAG.search(m["what"]) or not m["what"].strip()
    return None if broken else (m["do"], m["what"].strip())

# ---- model -------------------------------------------------------------------------------------------------
def load_model(cfg: Config, adapter: str = ""):
    """(model, tokenizer) on the best device, with a fresh LoRA adapter or that of the PEFT folder given."""
    name, options = locate(cfg.model), {}
    if name.endswith(".gguf"):
        name, options = str(Path(name).parent), {"gguf_file": Path(name).name}
    elif name.startswith("Qwen") and "/" not in name and not Path(name).is_dir(): name = f"Qwen/{name}"
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    dtype = ("bfloat16" if device == "cuda" else "float32") if cfg.dtype == "auto" else cfg.dtype
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation="sdpa", **options)
        if options: del model.hf_quantizer, model.config.quantization_config      # the weights are floats now
        make_exact(model, cfg)
        model = model.to(device)
        for name in filter(None, (cfg.init_adapter, adapter)):      # an error below names it
            model = PeftModel.from_pretrained(model, name)
            loaded = model.load_adapter(name, "default")      # again: only this call reports other layers
            if loaded.missing_keys or loaded.unexpected_keys: raise ValueError("an adapter of another model")
            model = model if name == adapter else model.merge_and_unload()
    except Exception as e:      # each library fails in its own way
        if isinstance(e, torch.OutOfMemoryError): raise
        raise UserError(f"{name}: {first_line(e)}. A model is a hub id (owner/name), a .gguf file, or a "
                        "folder of config.json, weights, tokenizer; an adapter is a PEFT folder.") from None
    if not adapter:
        torch.manual_seed(cfg.seed)
        lora = LoraConfig(r=cfg.lora_rank, lora_alpha=2 * cfg.lora_rank, target_modules="all-linear")
        model = get_peft_model(model, lora)
    return model.eval(), tokenizer      # for good: with dropout the update would not see what score() saw

@torch.no_grad()
def make_exact(lm, cfg: Config) -> None:
    """Take away what would make scoring differ from sampling. ValueError where that cannot be done."""
    text = lm.config.get_text_config()      # of a multimodal model the part that reads text
    text.max_position_embeddings = context_length(lm)
    if getattr(text, "sliding_window", None): text.sliding_window = 10**9      # rollouts stay within it
    for m in lm.modules():      # some layers would drop out by themselves while they recompute
        vars(m).update({k: 0.0 for k, v in vars(m).items() if "drop" in k and isinstance(v, float)})
    if cfg.gradient_checkpointing: lm.gradient_checkpointing_enable({"use_reentrant": False})
    pair, layer = torch.tensor([[1, 2]], device=lm.device), lambda: StaticLayer(max_cache_len=2)
    # It raises where layers keep anything other than keys and values.
    logits = lm.eval()(pair, cache=Cache(layer_class_to_replicate=layer), use_cache=True).logits
    if torch.dist(logits, lm.get_output_embeddings()(lm.base_model(pair)[0])) > 0.01 * logits.norm():
        raise ValueError("it scales or caps its logits after the LM head, which token_logps does not")
    if experts := sum(p.numel() for name, p in lm.named_parameters() if "experts" in name and p.dim() == 3):
        print(f"note: LoRA does not reach the routed experts ({experts / 1e6:.0f}M weights)")

def context_length(lm) -> int:
    """Tokens that a rollout may have: the model's positions, its sliding window, or its first rotary table:
    beyond it longrope models (Phi-3.5, Phi-4) switch tables for the whole batch, while scoring might not."""
    c = lm.config.get_text_config()
    ropes = getattr(c, "rope_parameters", None) or {}
    ropes = [ropes, *(r for r in ropes.values() if isinstance(r, dict))]      # or one for each kind of layer
    first = [r["original_max_position_embeddings"] for r in ropes if r.get("rope_type") == "longrope"]
    limits = (getattr(c, "max_position_embeddings", None), getattr(c, "sliding_window", None), *first)
    return min((n for n in limits if n), default=10**9)

def unwrap(model):
    """The Hugging Face causal LM inside a PEFT model (LoRA layers stay in it), or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
def reference(model):
    """Within this context the model is the reference: its adapter is off. AttributeError if it has none."""
    return model.disable_adapter()

@contextlib.contextmanager
def arithmetic(lm):
    """The same arithmetic for sampling, scoring, reference and update, so that their numbers agree. On a GPU
    in bf16, PEFT would cast every layer's input to the adapter's fp32. Here autocast uses bf16 for both."""
    on = lm.device.type == "cuda" and lm.dtype == torch.bfloat16
    # No cache of cast weights: a CUDA graph would still use them after the optimizer's next step.
    with torch.autocast("cuda", torch.bfloat16, on, cache_enabled=False), disable_input_dtype_casting(lm, on):
        yield

# ---- rollout -----------------------------------------------------------------------------------------------
# rollout() calls play(). That calls generate() for one turn of all live rollouts, take_turn() for what the
# policy wrote, the search, take_results() for what it brought, and rebuild_cache() for the next turn.
def rollout(model, tokenizer, questions: list[dict], search, cfg: Config) -> list[Rollout]:
    """cfg.group rollouts for each question, group after group. UserError if too many searches failed."""
    rollouts = [begin(tokenizer, q["question"]) for q in questions for _ in range(cfg.group)]
    for i in range(0, len(rollouts), cfg.rollout_batch):
        play(model, tokenizer, rollouts[i:i + cfg.rollout_batch], search, cfg)
    errors = [found.error for r in rollouts for found in r.retrieved]
    if (failed := sum(map(bool, errors))) > MAX_FAILED_SEARCHES * len(errors):
        raise UserError(f"{failed} of {len(errors)} searches failed ({next(filter(None, errors))})")
    return rollouts
def begin(tokenizer, question: str) -> Rollout:
    """A rollout that holds only its prompt."""
    prompt = encode_prompt(tokenizer, question)
    return Rollout(prompt, [0] * len(prompt), [len(prompt)])
def pad(rows, device, side: str = "right") -> torch.Tensor:
    """Lists of numbers as (B, longest), filled up with 0. Any number would do: it is never attended to."""
    rows = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(rows, batch_first=True, padding_side=side).to(device)

@torch.no_grad()
def play(model, tokenizer, live: list[Rollout], search, cfg: Config) -> None:
    """Take these rollouts, all at once and in place, from their last boundaries to their ends."""
    lm, ones = unwrap(model), lambda rows: [[1] * len(row) for row in rows]
    lm.generation_config = sampling = sampling_config(lm, tokenizer, cfg)      # generate() looks at both
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
        # The last token of the longest turn was sampled and not fed back: it is not in the cache yet.
        own = torch.arange(len(written[0]) - 1) < torch.tensor(ends)[:, :1]
        held = torch.cat([mask, own.long().to(lm.device)], 1)
        rows, live = [row for row, r in enumerate(live) if not r.stop], [r for r in live if not r.stop]

def rebuild_cache(cache: Cache, held, rows, free: int) -> tuple[Cache, torch.Tensor]:
    """(cache, held) for the next turn: the chosen rows, tokens side by side, `free` columns behind them.
    Rows that ended are not chosen, a prompt's row is copied for each rollout of its group. Padding and holes
    behind short turns are sorted to the left and cut: a token's position is in its key, not in its column."""
    width = int(held[rows].sum(1).max())
    order = held[rows].argsort(dim=1, stable=True)[:, held.shape[1] - width:]
    pick = lambda x: x[:, :, :held.shape[1]][rows[:, None], :, order].transpose(1, 2)  # (R, heads, width, D)
    new = Cache(layer_class_to_replicate=lambda: StaticLayer(max_cache_len=width + free))
    for i, layer in enumerate(cache.layers):
        new.update(pick(layer.keys), pick(layer.values), i)
        layer.keys = layer.values = None        # so that one layer at a time is held twice, not all of them
    return new, held[rows[:, None], order]

@contextlib.contextmanager
def one_token_graph(lm):
    """Within this context, on CUDA, forwards of one token a row, some thousand kernels that are
    shorter than their launch, are captured as one CUDA graph. It keeps addresses: hence the static cache."""
    forward, kept = lm.forward, {}
    @wraps(forward)
    def step(input_ids=None, position_ids=None, attention_mask=None, **rest):
        kinds = attention_mask if isinstance(attention_mask, dict) else None      # one for each type of layer
        def run(ids, at, *masks):
            mask = dict(zip(kinds, masks)) if kinds else masks[0]
            return forward(ids, position_ids=at, attention_mask=mask, **rest)
        inputs = input_ids, position_ids, *(kinds.values() if kinds else [attention_mask])
        if "graph" in kept:
            for mine, new in zip(kept["inputs"], inputs): mine.copy_(new)
            kept["graph"].replay()
            return kept["out"]
        out = run(*inputs)      # once without a graph: what is set up at a first call cannot be captured
        if input_ids.shape[1] == 1 and not getattr(lm, "no_graph", False):
            kept["inputs"], rng = [x.clone() for x in inputs], torch.cuda.default_generators[lm.device.index]
            graph, spare, stream = torch.cuda.CUDAGraph(), rng.clone_state(), torch.cuda.current_stream()
            try:      # a capture that fails leaves its own stream behind: hence the first context
                with torch.cuda.stream(stream), torch.cuda.graph(graph): kept["out"] = run(*kept["inputs"])
                kept["graph"] = graph
            except Exception as e:
                rng.graphsafe_set_state(spare)      # its state is useless after a capture that failed
                lm.no_graph = True
                tqdm.write(f"note: no CUDA graph of {type(lm).__name__} ({first_line(e)}): sampling is slow")
        return out
    if lm.device.type == "cuda": lm.forward = step
    try: yield
    finally: vars(lm).pop("forward", None)

def sampling_config(lm, tokenizer, cfg: Config) -> GenerationConfig:
    """Temperature, or greedy if it is 0, and nothing else: this makes sampling = scoring. What a
    checkpoint has as its defaults (top_k, top_p, repetition_penalty ..) would shape the sampled distribution
    and not the scored one, so all is replaced. top_k is 0 because the library's default is 50."""
    eos = lm.generation_config.eos_token_id
    eos = sorted({tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None})
    shape = dict(temperature=cfg.temperature, top_k=0, top_p=1.0) if cfg.temperature else {}
    return GenerationConfig(**shape, do_sample=bool(shape), max_new_tokens=cfg.max_new_tokens, pad_token_id=0,
                            eos_token_id=eos or None, use_cache=True, disable_compile=True)

# Ends a row of generate() at the first closing tag, also if that ends inside a token. It is costly to make.
stop_tags = lru_cache(lambda tokenizer: StopStringCriteria(tokenizer, ["</search>", "</answer>"]))
def turn_end(turn: list[int], tokenizer, eos: list[int]) -> tuple[int, bool]:
    """(tokens up to the first closing tag or EOS, which is trained too; was there one?). The rest is not."""
    ended = lambda n: re.search("</(search|answer)>", tokenizer.decode(turn[:n])) or {*eos} & {*turn[:n]}
    length = bisect_left(range(len(turn) + 1), True, key=lambda n: bool(ended(n)))
    return min(length, len(turn)), length <= len(turn)

def take_turn(r: Rollout, turn: list[int], closed: bool, tokenizer, cfg: Config) -> None:
    """Write down a turn of the policy and what it does: end the rollout (r.stop is set) or ask a query."""
    action = parse_turn(tokenizer.decode(turn))
    r.write(turn, True)
    if action is None: r.stop = "format" if closed else "length"
    elif action[0] == "answer": r.stop, r.answer = action
    elif len(r.boundaries) == cfg.max_turns: r.stop = "turns"
    else: r.queries.append(clean_query(action[1]))
def take_results(r: Rollout, found: Results, context: int, tokenizer, cfg: Config) -> None:
    """Write down what a query brought, which opens the next turn; or end the rollout if that has no room."""
    block, shown = encode_information(tokenizer, found, cfg.max_info_tokens)
    if len(r.ids) + len(block) + room(cfg) > context:
        r.stop, shown = "length", Results(error=found.error, cached=found.cached)
    else:
        r.write(block, False)
        r.boundaries.append(len(r.ids))
    r.retrieved.append(shown)

# ---- belief and log-probs ----------------------------------------------------------------------------------
def token_logps(lm, rollouts: list[Rollout], temperature: float, schema: list = (), golds: list = ()):
    """log pi of what the policy wrote and, if there are golds, of a rollout's gold at each of its boundaries.
    The one function for policy, old policy, reference and belief. schema + golds[i], tokens, is the probe of
    rollout i. Returns fp32 tensors in two lists, per rollout (policy tokens,) and (T, gold tokens). A forward
    reads rollouts, another all probes on the keys and values of the first (paper, Fig. 3). For a rollout of
    two tokens r, and a probe of two tokens p behind the first of them:

        token       r0 r1   p0 p1       p0 sees r0 and itself, p1 sees r0, p0 and itself
        position     0  1    1  2       as if the probe stood where r1 stands
    Why that is exact: a key depends on no later token, so up to a boundary the keys of the whole rollout are
    those of its prefix alone. A probe that sees just these stands where the next turn would begin."""
    right = partial(pad, device=lm.device)      # padding behind, where causal attention never looks: no mask
    ids, mask = right(r.ids for r in rollouts), right(r.mask for r in rollouts).bool()             # (B, L)
    with arithmetic(lm):
        cache = DynamicCache() if golds else None
        hidden = lm.base_model(input_ids=ids, cache=cache, use_cache=bool(golds))[0]               # (B, L, H)
        pairs = [(hidden[:, :-1][mask[:, 1:]], ids[mask])]      # a token is predicted from the one before it
        if golds:
            each = [(r.boundaries, [*schema, *gold]) for r, gold in zip(rollouts, golds)]
            probes = right(probe * len(boundaries) for boundaries, probe in each)                  # (B, P)
            start = right([b for b in boundaries for _ in probe] for boundaries, probe in each)
            offset = right([*range(len(probe))] * len(boundaries) for boundaries, probe in each)
            before = torch.arange(ids.shape[1], device=lm.device) < start[:, :, None]              # (B, P, L)
            own = (start[:, None, :] == start[:, :, None]).tril()      # its probe, up to itself: (B, P, P)
            more = lm.base_model(input_ids=probes, position_ids=start + offset, cache=cache, use_cache=True,
                                 attention_mask=torch.cat([before, own], 2)[:, None])[0]
            asked = (offset >= len(schema)) & (start > 0)              # padding starts nowhere
            pairs += [(more[:, :-1][asked[:, 1:]], probes[asked])]
        def of_chunk(h, t):
            logits = lm.get_output_embeddings()(h).float() / (temperature or 1.0)
            return logits.gather(-1, t[:, None])[:, 0] - logits.logsumexp(-1)
        # Only targets pass the head, in chunks that the backward recomputes: (L, vocabulary) never exists.
        call = partial(checkpoint, of_chunk, use_reentrant=False) if torch.is_grad_enabled() else of_chunk
        logps = torch.cat([call(*c) for pair in pairs for c in zip(*(x.split(HEAD_CHUNK) for x in pair))])
    sizes = [sum(r.mask) for r in rollouts] + [len(r.boundaries) * len(g) for r, g in zip(rollouts, golds)]
    parts = list(logps.split(sizes))
    return parts[:len(rollouts)], [x.view(-1, len(gold)) for x, gold in zip(parts[len(rollouts):], golds)]

def by_tokens(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices in batches of similar length, padded within budget, or alone: [5, 9, 4], 10: [[1], [0, 2]]."""
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= budget
        batches[-1].append(i) if fits else batches.append([i])
    return batches
@torch.no_grad()
def score(model, tokenizer, rollouts: list[Rollout], golds: list | None, cfg: Config):
    """(logps, beliefs) by the model as it stands, within reference(model) by the reference. Per rollout: log
    pi of what the policy wrote; b_0 .. b_{T-1}, the mean log pi of the tokens of golds[i][0] (Eq. 3)."""
    schema, golds = encode(tokenizer, SCHEMA), [encode_gold(tokenizer, gold) for gold in golds or []]
    logps, beliefs = [None] * len(rollouts), [[] for _ in rollouts]
    # In the batches of the update: in others bf16 rounds differently, and first ratios would not be 1.
    for batch in by_tokens([len(r.ids) for r in rollouts], cfg.batch_tokens):
        found = token_logps(unwrap(model), [rollouts[i] for i in batch], cfg.temperature, schema,
                            [golds[i] for i in batch if golds])
        for i, logp in zip(batch, found[0]): logps[i] = logp
        for i, gold in zip(batch, found[1]): beliefs[i] = gold.mean(1).tolist()
    return logps, beliefs

# ---- rewards and advantages --------------------------------------------------------------------------------
def outcome_reward(rollout: Rollout, golds: list[str], format_penalty: float) -> float:
    """Eq. 2: F1 of the answer, or the penalty if the rollout ended in any other way."""
    return f1_score(rollout.answer, golds) if rollout.stop == "answer" else format_penalty
def info_gains(beliefs: list[float], gain: str = "prob") -> list[float]:
    """Eq. 4: what each search added to the belief, T beliefs giving T - 1 gains; of exp(b), or of b."""
    levels = [math.exp(b) for b in beliefs] if gain == "prob" else beliefs
    return [after - before for before, after in zip(levels, levels[1:])]
mean = lambda values: fmean(list(values) or [0.0])
std = lambda values: math.sqrt(pvariance(list(values) or [0.0]))      # pstdev fails on a NaN

# The gain, and arguments of turn_advantages. Pooled over all turns, the mean gain rewards or charges going
# on; by turn, searches compete at one depth and when to stop is left to the outcome. Divided by the std,
# noise or a format penalty has the size of a success in a group where nobody succeeds.
RECIPES = {
    "igpo": ("prob", dict(pool="turn", scale=False)),                       # ours
    "igpo-v2": ("logprob", dict(pool="group", scale=True)),                 # the paper, v2
    "igpo-v1": ("prob", dict(pool="joint", scale=True)),                    # the paper, v1
    "grpo": (None, dict(scale=True)),                                       # DeepSeekMath, arXiv 2402.03300
    "dr-grpo": (None, dict(scale=False)),                             # arXiv 2503.20783, but for its loss
    "ig": ("prob", dict(pool="turn", scale=False, outcome=False))}          # the paper's ablation, table 3

def turn_advantages(gains: list[list[float]], outcomes: list[float], pool: str = "turn", scale: bool = False,
                    outcome: bool = True, gamma: float = 1.0) -> list[list[float]]:
    """Eq. 5 and 6 for one group of G rollouts: the advantage of every turn of every rollout.
    gains[i] has one entry fewer than rollout i has turns; 0 is a gain like others. All are centred in pools:
    gains per "turn", per "group", or "joint" with the outcomes; scale: and divided by the std of the pool.
    outcome=False: outcomes do not count. ValueError for a group of one, or a number that is not finite.
    >>> turn_advantages([[1.0], [3.0]], [0.0, 1.0], "group", scale=True)     # gains: -1, +1; outcomes: -1, +1
    [[-2.0, -1.0], [2.0, 1.0]]"""
    if len(outcomes) < 2 or len(gains) != len(outcomes):
        raise ValueError(f"{len(gains)} gains, {len(outcomes)} outcomes: a group has 2 of both or more")
    rewards = [[*gs, last * outcome] for gs, last in zip(gains, outcomes)]
    if not all(map(math.isfinite, sum(rewards, []))): raise ValueError("a gain or an outcome is not finite")
    pools: dict = {}           # what is normalised together: {pool: [(rollout, turn), ..]}
    for i, t in ((i, t) for i, row in enumerate(rewards) for t in range(len(row))):
        of_gains = {"turn": t, "group": "gains", "joint": "outcomes"}[pool]
        pools.setdefault("outcomes" if t == len(gains[i]) else of_gains, []).append((i, t))
    for places in pools.values():                                                                   # Eq. 5
        values = [rewards[i][t] for i, t in places]
        middle, spread = mean(values), std(values)
        for (i, t), value in zip(places, values):
            rewards[i][t] = (value - middle) / (spread if scale else 1.0) if spread > STD_FLOOR else 0.0
    to_end = lambda row: accumulate(reversed(row), lambda later, r: r + gamma * later)              # Eq. 6
    return [list(to_end(row))[::-1] for row in rewards]
def recipe_credit(beliefs: list[list[float]], outcomes: list[float], cfg: Config, **_) -> list[list[float]]:
    """Advantages of all groups of a step by --credit. A NaN belief makes all NaN: update() skips the step."""
    if not all(math.isfinite(b) for bs in beliefs for b in bs): return [[math.nan] * len(b) for b in beliefs]
    gain, how = RECIPES[cfg.credit]
    gains = [info_gains(b, gain) if gain else [0.0] * (len(b) - 1) for b in beliefs]
    groups = [slice(i, i + cfg.group) for i in range(0, len(outcomes), cfg.group)]
    return [row for g in groups for row in turn_advantages(gains[g], outcomes[g], **how)]

# ---- loss --------------------------------------------------------------------------------------------------
def policy_loss(logp, old_logp, ref_logp, advantages, mask, clip: float = 0.2, kl_coef: float = 0.001):
    """Eq. 7 as a loss, all tensors (B, L): mean over a rollout's own policy tokens, then over the B rollouts.
    The KL is Schulman's k3 estimator, exp(d) - d - 1 with d = log pi_ref - log pi, and carries a gradient. On
    policy the surrogate is the mean advantage, about 0: what counts is its gradient. Returns (loss, stats),
    stats being sums over tokens: "tokens", "kl", "clipped", "entropy" (-log pi of what was sampled)."""
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

def accumulate_gradient(model, rollouts, old, ref, advantages, cfg: Config, n: int = 0) -> dict:
    """Gradient of Eq. 7 over these rollouts, each weighing 1/n, in micro-batches, which do not change it.
    n: rollouts of this update in all processes (0: these). old, ref: per rollout log-probs of its policy
    tokens. advantages: per rollout one for each turn. Returns the stats of policy_loss, summed, "loss", and
    "ratio": of all tokens, the one farthest from 1."""
    total = {"loss": 0.0, "tokens": 0.0, "kl": 0.0, "clipped": 0.0, "entropy": 0.0, "ratio": 1.0}
    for batch in by_tokens([len(r.ids) for r in rollouts], cfg.batch_tokens):
        part = [rollouts[i] for i in batch]
        logps, _ = token_logps(unwrap(model), part, cfg.temperature)
        A = [x.new_tensor([advantages[i][t] for t in r.policy_turns]) for i, r, x in zip(batch, part, logps)]
        rows = logps, [old[i] for i in batch], [ref[i] for i in batch], A, [torch.ones_like(x) for x in logps]
        logp, old_logp, ref_logp, A, mask = (pad_sequence(x, batch_first=True) for x in rows)
        loss, stats = policy_loss(logp, old_logp, ref_logp, A, mask, cfg.clip, cfg.kl_coef)
        loss = loss * len(batch) / (n or len(rollouts))
        loss.backward()
        ratios = torch.exp(logp - old_logp).detach()[mask.bool()].tolist()
        total |= {key: total[key] + value for key, value in {**stats, "loss": loss.item()}.items()}
        total["ratio"] = max([total["ratio"], *ratios], key=lambda ratio: abs(ratio - 1))
    return total

# ---- training ----------------------------------------------------------------------------------------------
# Under torchrun each process plays, scores and learns from whole groups of its own; gradients are summed.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
def all_gather(items: list) -> list:
    """The lists of all processes, concatenated."""
    lists = [items] * WORLD
    if WORLD > 1: dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]

def train_step(model, tokenizer, optimizer, questions: list[dict], search, cfg: Config, credit=recipe_credit):
    """One step on this process's questions. Returns (metrics, records of rollouts), both of all processes."""
    start = time.perf_counter()
    rollouts = rollout(model, tokenizer, questions, search, cfg)                                     # 1
    asked, played = [q for q in questions for _ in range(cfg.group)], time.perf_counter()
    old, beliefs = score(model, tokenizer, rollouts, [q["answers"] for q in asked], cfg)             # 2
    with reference(model):
        ref = score(model, tokenizer, rollouts, None, cfg)[0] if cfg.kl_coef else old
    scored = time.perf_counter()
    outcomes = [outcome_reward(r, q["answers"], cfg.format_penalty) for r, q in zip(rollouts, asked)]
    of_step = dict(model=model, tokenizer=tokenizer, rollouts=rollouts, asked=asked, search=search)
    advantages = credit(beliefs=beliefs, outcomes=outcomes, cfg=cfg, **of_step)                      # 3 and 4
    updates = update(model, optimizer, rollouts, old, ref, advantages, cfg)                          # 5
    end = time.perf_counter()
    seconds = dict(seconds=end - start, seconds_rollout=played - start, seconds_score=scored - played,
                   seconds_update=end - scored)
    rows = zip(rollouts, asked, beliefs, outcomes, advantages)
    records = all_gather([record(tokenizer, *row, cfg) for row in rows])
    return {**step_metrics(records, all_gather(updates), cfg), **seconds}, records

def update(model, optimizer, rollouts, old, ref, advantages, cfg: Config) -> list[dict]:
    """The optimizer's updates of a step. One whose loss or gradient is not finite is "skipped", not made."""
    parameters, updates = [p for p in model.parameters() if p.requires_grad], []
    recomputing = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    order = torch.randperm(len(rollouts)).tolist() if cfg.minibatches > 1 else range(len(rollouts))
    for m in range(cfg.minibatches):
        part = [[values[i] for i in order[m::cfg.minibatches]] for values in (rollouts, old, ref, advantages)]
        optimizer.zero_grad(set_to_none=True)
        for module in recomputing: module.training = True      # only then do they recompute
        stats = accumulate_gradient(model, *part, cfg, n=sum(all_gather([len(part[0])])))
        for module in recomputing: module.training = False
        for p in parameters if WORLD > 1 else []: p.grad is None or dist.all_reduce(p.grad)
        loss = sum(all_gather([stats["loss"]]))
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
        updates.append({**stats, "loss": loss, "grad_norm": norm, "skipped": not math.isfinite(loss + norm)})
        if not updates[-1]["skipped"]: optimizer.step()
    return updates

def record(tokenizer, r: Rollout, question: dict, beliefs, outcome, advantages, cfg: Config) -> dict:
    """A rollout as a line of rollouts.jsonl, turn by turn."""
    gains, turns = info_gains(beliefs, RECIPES.get(cfg.credit, [""])[0] or "prob"), []
    at = lambda values, t: values[t] if values and t < len(values) else None
    for t, (start, end) in enumerate(zip(r.boundaries, [*r.boundaries[1:], len(r.ids)])):
        text = tokenizer.decode([i for i, m in zip(r.ids[start:end], r.mask[start:end]) if m])
        found = dict(enumerate(r.retrieved)).get(t, Results())      # a failed one is falsy
        turns.append({"text": text, "query": at(r.queries, t), "error": found.error, "cached": found.cached,
                     "passages": [*map(asdict, found)], "gain": at(gains, t), "advantage": at(advantages, t)})
    kept = {k: question[k] for k in ("id", "question", "answers", "supporting", "hops") if k in question}
    return {**kept, "answer": r.answer, "stop": r.stop, "f1": f1_score(r.answer, question["answers"]),
            "em": exact_match(r.answer, question["answers"]), "outcome": outcome, "beliefs": beliefs,
            "policy_tokens": sum(r.mask), "turns": turns}
def step_metrics(records: list[dict], updates: list[dict], cfg: Config) -> dict:
    """The metrics of a step, which docs/metrics.md explains."""
    groups = [records[i:i + cfg.group] for i in range(0, len(records), cfg.group)]
    turns, done = [t for r in records for t in r["turns"]], [u for u in updates if not u["skipped"]]
    gains, searches = [t["gain"] for t in turns if t["gain"] is not None], [t for t in turns if t["query"]]
    answers = [r["turns"][-1]["text"] for r in records if r["stop"] == "answer"]
    of, ended = lambda key: mean(r[key] for r in records), lambda how: mean(r["stop"] == how for r in records)
    per_token = lambda key: sum(u[key] for u in done) / max(sum(u["tokens"] for u in done), 1)
    return {
        "outcome_f1": of("f1"), "outcome_em": of("em"), "outcome_reward": of("outcome"),
        "turns": len(turns) / len(records), "gain_mean": mean(gains), "gain_std": std(gains),
        "belief_first": mean(r["beliefs"][0] for r in records),
        "belief_last": mean(r["beliefs"][-1] for r in records), "gain_positive": mean(g > 0 for g in gains),
        "no_signal_outcome": mean(std(r["outcome"] for r in g) <= STD_FLOOR for g in groups),
        "no_signal": mean(not any(t["advantage"] for r in g for t in r["turns"]) for g in groups),
        **{f"stop_{how}": ended(how) for how in ("answer", "format", "length", "turns")},
        "answer_form": mean(SCHEMA[SCHEMA.rindex("<"):] in text for text in answers),
        "policy_tokens": sum(r["policy_tokens"] for r in records), "searches": len(searches),
        "failed_searches": sum(bool(t["error"]) for t in turns), "loss": mean(u["loss"] for u in done),
        "cached_searches": sum(t["cached"] for t in turns), "skipped": (len(updates) - len(done)) // WORLD,
        "clip_fraction": per_token("clipped"), "kl": per_token("kl"), "entropy": per_token("entropy"),
        "grad_norm": mean(u["grad_norm"] for u in done),
        "ratio_start": max((u["ratio"] for u in updates[::cfg.minibatches]), key=lambda x: abs(x - 1))}

def evaluate(model, tokenizer, questions: list[dict], search, cfg: Config) -> dict:
    """Greedy evaluation by all processes: mean F1, exact match and turns."""
    mine = questions[RANK::WORLD]
    rollouts = rollout(model, tokenizer, mine, search, replace(cfg, group=1, temperature=0.0))
    rows = [(f1_score(r.answer, golds := q["answers"]), exact_match(r.answer, golds), len(r.boundaries))
            for r, q in zip(rollouts, mine)]
    return dict(zip(("eval_f1", "eval_em", "eval_turns"), map(mean, zip(*all_gather(rows)))))

def step_questions(questions: list[dict], step: int, cfg: Config) -> list[dict]:
    """The questions of a step (from 1). Each epoch has its own order; the step alone tells where we are."""
    first, n = (step - 1) * cfg.questions, len(questions)
    order = lru_cache(lambda epoch: random.Random(f"{cfg.seed}-{epoch}").sample(range(n), n))
    return [questions[order(i // n)[i % n]] for i in range(first, first + cfg.questions)]
def check_questions(model, tokenizer, questions: list[dict], cfg: Config) -> None:
    """UserError for a question that leaves no room for a turn."""
    context = context_length(unwrap(model))
    for q in questions:
        if (length := len(encode_prompt(tokenizer, q["question"])) + room(cfg)) > context:
            raise UserError(f"question {q['id']} and a turn are {length} tokens, the model's "
                            f"context or window is {context}: leave it out, or lower --max_new_tokens")

def train(cfg: Config, credit=recipe_credit) -> Path:
    """The whole run; returns its folder. Each step is on disk before the next begins."""
    out, history = Path(cfg.out), []
    read = lambda name: load_questions(locate(getattr(cfg, name) or f"{cfg.data}/{name}.jsonl"))
    questions, dev = read("train"), read("dev") if cfg.eval_every else []
    search = open_search(cfg.search or "bm25:" + locate(f"{cfg.data}/corpus.jsonl"), cfg.search_cache)
    model, tokenizer = load_model(cfg)
    check_questions(model, tokenizer, questions + dev, cfg)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), cfg.lr, weight_decay=0)
    if cfg.resume: history = load_checkpoint(out, model, optimizer)
    if RANK == 0:      # again after --resume, which may change some
        try:
            out.mkdir(parents=True, exist_ok=True)
            (out / "config.json").write_text(json.dumps(asdict(replace(cfg, resume="")), indent=1), "utf-8")
        except OSError as e: raise UserError(f"--out {out}: {first_line(e)}") from None
    print(f"{model.num_parameters(True) / 1e6:.2f}M LoRA parameters, {model.dtype} on {model.device}")
    try:
        for step in tqdm(range(len(history), cfg.steps + 1), unit="step", disable=True if RANK else None):
            row, records = {"step": step}, []
            if step:      # step 0 is the evaluation before training
                torch.manual_seed(random.Random(f"{cfg.seed}-{step}-{RANK}").getrandbits(63))
                mine = step_questions(questions, step, cfg)[RANK::WORLD]
                metrics, records = train_step(model, tokenizer, optimizer, mine, search, cfg, credit)
                row.update(metrics)
            if cfg.eval_every and (step % cfg.eval_every == 0 or step == cfg.steps):
                row.update(evaluate(model, tokenizer, dev, search, cfg))
            if RANK == 0: save_step(out, model, optimizer, [*history, row], records)
            history.append(row)
            tqdm.write(summary(row) + warning(history), sys.stdout)
    except BaseException as e:
        print(f"stopped: {first_line(e)}.", f"Go on: python igpo.py --resume {out}" if history else "")
        raise
    print("Done. Dev F1 by step:", *(f"{r['step']}: {r['eval_f1']:.3f}" for r in history if "eval_f1" in r))
    print(f"Next: python eval.py --adapter {out}/{'best' if (out / 'best').is_dir() else 'checkpoint'}")
    return out

def summary(row: dict) -> str:
    """A step in one line."""
    step = ("  F1 {outcome_f1:.2f}  turns {turns:.1f}  belief {belief_first:+.2f} -> {belief_last:+.2f}  "
            "gain {gain_mean:+.2f} ± {gain_std:.2f}  no signal {no_signal_outcome:.0%} -> {no_signal:.0%}  "
            "KL {kl:.3f}  {seconds:.1f} s") * bool(row["step"])
    dev = "  dev F1 {eval_f1:.3f}, EM {eval_em:.3f}" * ("eval_f1" in row)
    return ("step {step:>4}" + step + dev).format(**row)
def warning(history: list[dict]) -> str:
    """What is wrong since the last step but was not before: runs collapse unnoticed."""
    def bad(rows):
        steps, f1 = [r for r in rows if r["step"]], [r["eval_f1"] for r in rows if "eval_f1" in r] or [0.0]
        lost = [r["stop_format"] + r["stop_length"] for r in steps] or [0.0]
        far = lambda key: len(steps) > 10 and steps[-1][key] > 10 * median(r[key] for r in steps) > 0
        return {"an update was not finite, and skipped": bool(steps) and steps[-1]["skipped"] > 0,
                "most rollouts break the format or are cut": lost[-1] > 0.5 and min(lost) < 0.2,
                "dev F1 is below half of its best": f1[-1] < max(f1) / 2,
                **{f"{key} is ten times its median": far(key) for key in ("kl", "grad_norm")}}
    new = [what for what, is_so in bad(history).items() if is_so and not bad(history[:-1])[what]]
    best = max(history, key=lambda r: r.get("eval_f1", -1))
    kept = f"; best/ has the adapter of step {best['step']}" * ("eval_f1" in best)
    return f"\nwarning: since this step {', '.join(new)}{kept}" if new else ""

# ---- save and resume ---------------------------------------------------------------------------------------
def save_adapter(model, folder: Path) -> None:
    """The adapter in PEFT's format, each file moved into place whole."""
    part = folder.with_name(folder.name + ".part")
    model.save_pretrained(part, save_embedding_layers=False)      # "auto" would ask the hub, at every step
    folder.mkdir(exist_ok=True)
    for file in part.iterdir(): os.replace(file, folder / file.name)
    part.rmdir()
def save_step(out: Path, model, optimizer, history: list[dict], records: list[dict]) -> None:
    """Logs, adapters, and last state.pt, all that --resume reads: a kill before it loses this step alone."""
    step, f1 = history[-1]["step"], [row.get("eval_f1", -1) for row in history]
    logs, best = {"metrics.jsonl": history[-1:], "rollouts.jsonl": records}, f1[-1] > max([-1, *f1[:-1]])
    try:
        for name, rows in logs.items():
            with open(out / name, "a", encoding="utf-8") as file:
                for row in rows:      # JSON has no NaN
                    row = json.loads(json.dumps({"step": step, **row}), parse_constant=lambda nan: None)
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        for name in ("checkpoint", "best")[:1 + best]: save_adapter(model, out / name)
        state = {"history": history, "logs": {name: (out / name).stat().st_size for name in logs},
                 "adapter": {name: p for name, p in model.named_parameters() if p.requires_grad}}
        torch.save({**state, "optimizer": optimizer.state_dict()}, out / "checkpoint" / "state.part")
        os.replace(out / "checkpoint" / "state.part", out / "checkpoint" / "state.pt")
    except Exception as e:      # a full disk, as each library tells it
        raise UserError(f"step {step} cannot be saved in {out}: {first_line(e)}") from None
def load_checkpoint(out: Path, model, optimizer) -> list[dict]:
    """The metrics of the steps done. Later lines of the logs are cut off: those steps are done again."""
    try:
        state = torch.load(out / "checkpoint" / "state.pt", map_location="cpu", weights_only=True)
        sizes = state["logs"].items()
        if any((out / name).stat().st_size < size for name, size in sizes): raise ValueError("a log was cut")
        if set(state["adapter"]) != {name for name, p in model.named_parameters() if p.requires_grad}:
            raise ValueError("it has other layers")
        model.load_state_dict(state["adapter"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        for name, size in sizes: os.truncate(out / name, size)
        return state["history"]
    except Exception as e:
        raise UserError(f"{out}: cannot be resumed ({first_line(e)}): damaged, or of another model") from None

# ---- command line ------------------------------------------------------------------------------------------
GROUPS = {"model": "data and run", "questions": "episode", "credit": "learning", "dtype": "machine"}
MAY_CHANGE = {"resume", "steps", "eval_every", "rollout_batch", "batch_tokens", "gradient_checkpointing"}
def parse_config(argv: list[str] | None = None, credits: dict = {}) -> Config:
    """What is given, over the values of the demo (no --model) or of the resumed run, over the defaults."""
    wide = partial(argparse.HelpFormatter, max_help_position=36)
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", formatter_class=wide, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"igpo: {message}; --help lists the options\n")
    for f in fields(Config):
        group = parser.add_argument_group(GROUPS[f.name]) if f.name in GROUPS else group
        how = {"action": argparse.BooleanOptionalAction} if f.default is True else {"type": type(f.default)}
        values = [str(f.default), f"demo: {DEMO[f.name]}" if f.name in DEMO else ""]
        text = f"{f.metadata['help']} ({'; '.join(filter(None, values))})".removesuffix(" ()")
        group.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=text, **how)
    given = vars(parser.parse_args(argv))
    resume = given.get("resume")
    cfg = read_config(resume) if resume else Config(**{} if given.get("model") else DEMO)
    if changed := [name for name in set(given) - MAY_CHANGE if resume and given[name] != getattr(cfg, name)]:
        raise UserError(f"--{changed[0]}: the run was started with {getattr(cfg, changed[0])!r} and keeps it")
    cfg = replace(cfg, **given)
    model = Path(cfg.model).name.removesuffix(".gguf")
    cfg.out = cfg.resume or cfg.out or f"runs/{model}-{cfg.credit}-seed{cfg.seed}"
    for name, value, least in ((f.name, getattr(cfg, f.name), f.metadata["least"]) for f in fields(Config)):
        if not isinstance(value, str) and not max(least, -2**63) <= value < 2**63:
            raise UserError(f"--{name} {value}: it must be at least {least}, and finite")
    if cfg.credit not in (names := [*RECIPES, *credits]):
        raise UserError(f"--credit {cfg.credit} is none of {', '.join(names)}. tools/comparators.py has more")
    if cfg.dtype not in ("auto", "float32", "bfloat16"): raise UserError("--dtype: float32, bfloat16 or auto")
    if cfg.minibatches > cfg.questions // WORLD * cfg.group: raise UserError("--questions: too few to share")
    if not resume and os.path.isdir(cfg.out) and os.listdir(cfg.out):
        raise UserError(f"{cfg.out} exists: go on (--resume {cfg.out}), delete it, or give another --out")
    return cfg

def read_config(folder: str) -> Config:
    """The values that a run was started with. UserError."""
    try:
        return Config(**json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f"{folder}/config.json: cannot be read ({first_line(e)}): no run folder?") from None

def main(argv: list[str] | None = None, credits: dict = {}) -> int:
    """Exit status: 0; 2 for what the user can mend; 130 after Ctrl-C. credits: more values of --credit."""
    try:
        if WORLD > 1:
            sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")
            if torch.cuda.is_available(): torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        cfg, = all_gather([] if RANK else [parse_config(argv, credits)])      # before any process writes
        print("\n".join(f"{key:24}{value}" for key, value in asdict(cfg).items() if value != ""))
        train(cfg, credits.get(cfg.credit, recipe_credit))
    except (UserError, torch.OutOfMemoryError) as e:
        hint = "" if isinstance(e, UserError) else " Lower --rollout_batch or --batch_tokens and --resume."
        print(f"igpo: {first_line(e)}{hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt: return 130
    return 0

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.stdout.reconfigure(errors="replace")           # any letter, on a terminal that knows few
    sys.exit(main())
