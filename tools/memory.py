"""What a run needs in memory, computed from shapes, and the batch sizes that fit what is free.

    python -m tools.memory [options of igpo.py] [--longest 1500]

Of the model its config alone is read. --longest is the longest rollout of a run, in tokens, if you know it;
without it the longest that the options allow is taken, which few rollouts reach.

With L layers of width H, D of it for keys, I in the MLP, a vocabulary of V, s bytes a number, and rollouts of
at most T tokens:

    weights    each at its own size
    adapter    4 times the LoRA parameters: they, their gradient, two moments of AdamW
    rollouts   rollout_batch (2 L D s C + max(4 s (H + I) X, 2 s H C))
    scoring    N (2 L D s + 4 s (H + I))
    update     N L s H + max(N (K + P), 16 HEAD_CHUNK V)    with gradient checkpointing
               N L K + max(N P, 16 HEAD_CHUNK V)            without it
    peak       weights + adapter + the largest of the three

Rollouts: C columns of the cache hold a rollout and a turn to come. X tokens of search results are read at
once; largest then is the MLP, or the attention, for which keys and values are repeated for all heads.
Scoring: the keys and values of its N = batch_tokens stay for the probes, and one layer is at work.
Update: each of its N tokens leaves K = 18 H + 4 s I bytes in a layer for the backward, and another
P = 14 H + (4 + s) I come and go while the backward is in that layer.

The numbers in it were counted tensor by tensor, on Qwen2 layers with LoRA in float32 and in bfloat16; docs/
gpu.md has what an H200 saw beside what is computed. What is small or passes at once is left out, and so is
what Python and CUDA take for themselves (about 0.5 GB).
"""
import argparse
import math
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import psutil       # comes with peft
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from igpo import HEAD_CHUNK, Config, context_length, locate, parse_config, unwrap
from search_tool import UserError, first_line

PROMPT = 300        # tokens of a prompt: the instruction, the chat template, a question
BLOCK = 20          # tokens around search results: their tags and the next <think>
PHASES = {"rollout_batch": ["rollouts"], "batch_tokens": ["scoring", "update"]}      # what each size decides


def tool_config(argv: list[str] | None, credits: dict = {}) -> Config:
    """The options of igpo.py for a program that trains nothing. UserError for --resume."""
    argv = sys.argv[1:] if argv is None else argv
    if any(word.split("=")[0] == "--resume" for word in argv):
        raise UserError("this program does not train, so there is nothing to resume. "
                        "Give it the options of that run, which are in its config.json.")
    # Nothing is written there. Without it, the folder of an earlier run would be in the way.
    nowhere = os.path.join(tempfile.gettempdir(), f"igpo-no-run-{os.getpid()}")
    return parse_config([*argv, "--out", nowhere], credits)


def model_config(cfg: Config):
    """The config of the run's model, as transformers reads it. UserError."""
    name, options = locate(cfg.model), {}
    if name.endswith(".gguf"):
        name, options = str(Path(name).parent), {"gguf_file": Path(name).name}
    elif name.startswith("Qwen") and "/" not in name and not Path(name).is_dir():
        name = f"Qwen/{name}"
    try:
        return AutoConfig.from_pretrained(name, **options)
    except Exception as e:      # each library fails in its own way
        raise UserError(f"{name}: {first_line(e)}") from None


def skeleton(cfg: Config):
    """The model of a run with its adapter on the meta device: all shapes, and no weights. UserError."""
    dtype = ("bfloat16" if torch.cuda.is_available() else "float32") if cfg.dtype == "auto" else cfg.dtype
    config = model_config(cfg)
    try:
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
            return get_peft_model(lm, LoraConfig(r=cfg.lora_rank, target_modules="all-linear"))
    except Exception as e:      # no causal language model, or one without linear layers
        raise UserError(f"{cfg.model}: {first_line(e)}") from None


def memory_card(model, cfg: Config, tokens: int | None = None) -> dict[str, int]:
    """Bytes that a run needs: weights, adapter, rollouts, scoring, update, peak, as told at the top.

    model: with its adapter; a skeleton() will do. tokens: the longest rollout; None for the longest allowed.
    """
    lm = unwrap(model)
    c, s = lm.config.get_text_config(), lm.dtype.itemsize
    L, H, V, heads = c.num_hidden_layers, c.hidden_size, c.vocab_size, c.num_attention_heads
    I = getattr(c, "intermediate_size", None) or 4 * H
    D = (getattr(c, "num_key_value_heads", None) or heads) * (getattr(c, "head_dim", None) or H // heads)
    searches, block = cfg.max_turns - 1, cfg.max_info_tokens + BLOCK
    longest = PROMPT + cfg.max_turns * cfg.max_new_tokens + searches * block
    T = tokens or min(longest, context_length(lm))
    C = min(T + cfg.max_new_tokens, max(T, longest))
    X = min(block, T // cfg.max_turns) if searches else 0       # a turn cannot have all of a rollout
    in_step = cfg.questions * cfg.group * T                     # nor a batch more than a step
    N = min(max(cfg.batch_tokens, T), in_step)
    K, P, head = 18 * H + 4 * s * I, 14 * H + (4 + s) * I, 16 * HEAD_CHUNK * V
    stays, passes = (s * H, K + P) if cfg.gradient_checkpointing else (K, P)
    size = {True: 0, False: 0}                                  # by whether it is trained
    for p in model.parameters():
        size[p.requires_grad] += p.numel() * p.element_size()
    phases = {"rollouts": cfg.rollout_batch * (2 * L * D * s * C + max(4 * s * (H + I) * X, 2 * s * H * C)),
              "scoring": N * (2 * L * D * s + 4 * s * (H + I)),
              "update": N * L * stays + max(N * passes, head)}
    card = {"weights": size[False], "adapter": 4 * size[True], **phases}
    return {**card, "peak": card["weights"] + card["adapter"] + max(phases.values())}


def cgroup_room(root: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> float:
    """Bytes that the control groups of this process (a container, a batch job) leave; inf without a limit."""
    kinds = {"": ("", "memory.max", "memory.current", "inactive_file"),     # version 2, then version 1
             "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")}
    room = math.inf
    for line in Path(own).read_text().splitlines() if Path(own).exists() else []:
        _, controllers, path = line.split(":", 2)
        for controller in set(controllers.split(",")) & set(kinds):
            folder, limit, used, cached = kinds[controller]
            here = Path(root, folder, path.lstrip("/"))
            for group in (here, *here.parents):     # the groups around it limit it too; not all can be seen
                try:
                    most, now = (group / limit).read_text().strip(), int((group / used).read_text())
                    stat = dict(row.split() for row in (group / "memory.stat").read_text().splitlines())
                except (OSError, ValueError):
                    continue
                if most != "max":       # files that were read stay until their memory is needed: it is free
                    room = min(room, int(most) - now + int(stat.get(cached, 0)))
    return room


def free_memory(model=None) -> int:
    """Bytes that this process can have on its device, counting those that a loaded model has already.

    The processes of torchrun share the memory of a host; each has a GPU of its own.
    """
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    held = [p for p in model.parameters() if p.device.type != "meta"] if model else []
    free = int(min(psutil.virtual_memory().available, cgroup_room()))
    share = free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return share + sum(p.numel() * p.element_size() for p in held)


def largest_sizes(model, cfg: Config, free: int, tokens: int | None = None) -> dict[str, int]:
    """Of rollout_batch and batch_tokens the largest power of two, up to 2^20, that fits; 0 if none does."""
    def fits(name, n):
        card = memory_card(model, replace(cfg, **{name: n}), tokens)
        return card["weights"] + card["adapter"] + max(card[phase] for phase in PHASES[name]) <= free
    return {name: max((2**i for i in range(21) if fits(name, 2**i)), default=0) for name in PHASES}


def memory_table(model, cfg: Config, free: int, tokens: int | None = None) -> str:
    """memory_card() in lines, what is free beside it, and what would fit."""
    columns = {"at most": None} | ({f"{tokens:,} tokens": tokens} if tokens else {})
    cards = [memory_card(model, cfg, longest) for longest in columns.values()]
    notes = {"adapter": "with its gradient and AdamW's moments",
             "rollouts": f"--rollout_batch {cfg.rollout_batch}",
             "scoring": f"--batch_tokens {cfg.batch_tokens}",
             "update": f"--batch_tokens {cfg.batch_tokens}, recomputing" if cfg.gradient_checkpointing else
                       f"--batch_tokens {cfg.batch_tokens}",
             "peak": "weights, adapter, and the largest of the three"}
    gb = lambda n: f"{n / 1e9:12.3f} GB"
    lines = ["rollouts: " + "".join(f"{name:>15}" for name in columns)] if tokens else []
    for part in cards[0]:
        lines.append(f"{part:10}" + "".join(gb(card[part]) for card in cards) + "   " + notes.get(part, ""))
    lines.append(f"{'free':10}" + gb(free) * len(cards))
    for name, longest in columns.items():
        sizes = largest_sizes(model, cfg, free, longest)
        fit = ", ".join(f"--{size} up to {n}" if n < 2**20 else f"any --{size}" for size, n in sizes.items())
        lines.append(f"What fits ({name}): {fit if all(sizes.values()) else 'no batch, however small'}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 if the run fits as it is, 1 if it does not, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--longest", type=int)
    own, options = parser.parse_known_args(argv)
    if {"-h", "--help"} & set(options):
        print(f"{__doc__}\n--longest: tokens of the longest rollout. All other options:\n")
    try:
        cfg = tool_config(options)
        model = skeleton(cfg)
    except UserError as e:
        print(f"memory: {first_line(e)}", file=sys.stderr)
        return 2
    free, longest = free_memory(), own.longest
    print(f"{cfg.model}: {model.num_parameters() / 1e6:,.0f}M parameters, {unwrap(model).dtype}\n")
    print(memory_table(model, cfg, free, longest))
    return int(memory_card(model, cfg, longest)["peak"] > free)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")           # any script, on a terminal that knows one
    sys.exit(main())
