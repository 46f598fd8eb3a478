"""How much memory a run needs, by arithmetic on shapes, and which batch sizes fit. igpo.py asks at its start; speed.py --memory makes the README's table.

With L layers of width H, D of it for keys, I in the MLP, vocabulary V, s bytes a weight, and rollouts of T tokens, at most, with a prompt of 300:

    weights   each at its own size
    adapter   4 times the LoRA parameters: they, their gradient, two moments of AdamW
    rollouts  rollout_batch (2 L D s T + 16 I max_info_tokens)        keys and values, and the reading of search results
    update    L N (H s, or W without gradient checkpointing) + max(N (8 (H + I) + W with it), 16 HEAD_CHUNK V)
    peak      weights + adapter + the larger of rollouts and update

N = max(batch_tokens, T); W = 40 H + (4 + 3 s) I bytes that a token leaves in a layer for the backward. The numbers in W and the factors 8
and 16 were measured, on Qwen2 layers with LoRA. Small and passing things are left out.
"""
import os
from dataclasses import replace

import torch

from igpo import HEAD_CHUNK, Config, context_length, unwrap


def memory_card(model, cfg: Config) -> dict[str, int]:
    """Bytes a run needs at most: {"weights", "adapter", "rollouts", "update", "peak"}."""
    c = unwrap(model).config.get_text_config()
    L, H, V, heads = c.num_hidden_layers, c.hidden_size, c.vocab_size, c.num_attention_heads
    I = getattr(c, "intermediate_size", None) or 4 * H
    D = (getattr(c, "num_key_value_heads", None) or heads) * (getattr(c, "head_dim", None) or H // heads)
    s = unwrap(model).dtype.itemsize
    T = min(300 + cfg.max_turns * cfg.max_new_tokens + (cfg.max_turns - 1) * cfg.max_info_tokens, context_length(unwrap(model)))
    N, W = max(cfg.batch_tokens, T), 40 * H + (4 + 3 * s) * I
    kept, again = (H * s, W) if cfg.gradient_checkpointing else (W, 0)
    size = {on: sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad == on) for on in (True, False)}
    card = {"weights": size[False], "adapter": 4 * size[True],
            "rollouts": cfg.rollout_batch * (2 * L * D * s * T + 16 * I * cfg.max_info_tokens),
            "update": L * N * kept + max(N * (8 * (H + I) + again), 16 * HEAD_CHUNK * V)}
    return {**card, "peak": card["weights"] + card["adapter"] + max(card["rollouts"], card["update"])}


def device_memory() -> int:
    """Bytes that the GPU has, if there is one, else the machine."""
    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def fit(model, cfg: Config) -> Config:
    """cfg with rollout_batch and batch_tokens halved until the estimate is within nine tenths of the device, as far as that helps."""
    card = memory_card(model, cfg)
    while card["peak"] > 0.9 * device_memory():
        name = "rollout_batch" if card["rollouts"] > card["update"] else "batch_tokens"
        less = replace(cfg, **{name: max(getattr(cfg, name) // 2, 1)})
        before, card = card, memory_card(model, less)
        if card["peak"] == before["peak"]:
            break
        cfg = less
    return cfg


def memory_line(model, cfg: Config) -> str:
    """memory_card() in one line, with what the device has."""
    card, there = memory_card(model, cfg), device_memory()
    mb = {key: f"{value / 2**20:,.0f}" for key, value in {**card, "there": there}.items()}
    return (f"Memory at most, computed: weights {mb['weights']} MB + adapter and optimizer {mb['adapter']} + the larger of rollouts {mb['rollouts']} "
            f"(--rollout_batch {cfg.rollout_batch}) and update {mb['update']} (--batch_tokens {cfg.batch_tokens}) = {mb['peak']} MB of {mb['there']}."
            + " That may not fit." * (card["peak"] > there))
