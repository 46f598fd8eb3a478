"""Other models, tiny and random, with the demo's tokenizer: sampled as scored, or refused. Adapters."""
import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import igpo
from igpo import (DEMO, Config, UserError, context_length, encode_prompt, load_model, rollout, score, unwrap,
                  update)
from test_igpo import check_scores, own_tokens, slow_logits, stir
from tests.common import HERE, LONG, MODELS, adapter_of, rows_of, tiny_model

WINDOW = ("qwen2", "mistral", "gemma3", "gemma3_text", "phi3")          # 300 tokens, which a rollout may have
SHORT = ("gpt2", "llama", "qwen2", "mistral", "phi3", "gemma3")


@pytest.fixture
def cfg(demo):
    return replace(demo.cfg, max_turns=6, max_new_tokens=48, group=2, gradient_checkpointing=False)


@pytest.mark.parametrize("kind", [kind for kind in MODELS if LONG or kind in SHORT])
def test_other_models_are_sampled_and_scored_alike(kind, cfg, demo, tmp_path, monkeypatch):
    """Learned, rotary and partly rotary positions, windows, two rotary tables: cached rollouts with ragged
    turns against reading them again."""
    model, tokenizer = load_model(replace(cfg, model=tiny_model(tmp_path, kind)))
    stir(model)
    lm, few = unwrap(model), demo.questions[:4]
    lm.generation_config.eos_token_id = list(range(0, 1400, 9))         # a ninth of all tokens end a turn,
    search = lambda text: ("search", few[len(text) % 4]["question"])    # and every turn searches
    monkeypatch.setattr(igpo, "parse_turn", search)
    torch.manual_seed(1)
    greedy = rollout(model, tokenizer, few[:2], demo.search, replace(cfg, temperature=0.0))
    sampled = rollout(model, tokenizer, few, demo.search, cfg)
    for r in greedy:
        best = slow_logits(lm, r.ids).argmax(-1).tolist()
        assert [r.ids[j] for j in own_tokens(r)] == [best[j - 1] for j in own_tokens(r)]
    assert len({b - a for r in sampled for a, b in zip(r.boundaries, r.boundaries[1:])}) > 8
    if kind in WINDOW:              # it is the end of the context: within it nothing slides, no table changes
        assert context_length(lm) == 300 and {r.stop for r in sampled} == {"length"}
        assert 200 < max(len(r.ids) for r in sampled) <= 300
    else:
        assert {r.stop for r in sampled} == {"turns"} and max(len(r.ids) for r in sampled) > 300
    check_scores(model, tokenizer, sampled, [["Tavo Velmar"]] * len(sampled), cfg)


def test_a_question_longer_than_the_window_is_refused(cfg, demo, tmp_path):
    model, tokenizer = load_model(replace(cfg, model=tiny_model(tmp_path, "gemma3")))
    question = {"id": "long", "question": "who " * 300, "answers": ["x"]}
    with pytest.raises(UserError, match="question long .* 300"):
        igpo.check_questions(model, tokenizer, [question], cfg)


LINEAR = dict(layer_types=["linear_attention", "full_attention"], linear_num_value_heads=2,
              linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=2,
              num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16)


@pytest.mark.parametrize("kind, changes", [
    ("granite", dict(logits_scaling=3.0)), ("cohere", dict(logit_scale=0.5)),
    ("gemma2", dict(final_logit_softcapping=3.0)),
    ("lfm2", dict(layer_types=["conv", "full_attention"])), ("mamba", dict(state_size=4)),
    ("qwen3_next", LINEAR)])
def test_models_that_cannot_be_scored_as_they_are_sampled_are_refused(kind, changes, tmp_path):
    """Logits that are scaled or capped behind the head; states that are no keys and values."""
    with pytest.raises(UserError) as e:
        load_model(Config(model=tiny_model(tmp_path, kind, **changes)))
    assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)


def test_a_mixture_of_experts_is_told_what_lora_does_not_reach(tmp_path, capsys):
    experts = dict(num_local_experts=2, num_experts_per_tok=1, sliding_window=None)
    load_model(Config(model=tiny_model(tmp_path, "mixtral", **experts), dtype="float32"))
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "experts" in said


# ---- the update sees what was scored ----

@pytest.mark.parametrize("kind, changes", [
    ("gpt2", {}), ("qwen2", dict(attention_dropout=0.5)), ("gemma3", {}),
    ("opt", dict(dropout=0.5, attention_dropout=0.5, layerdrop=0.5))])
def test_dropout_is_off_and_recomputing_changes_nothing(kind, changes, cfg, demo, tmp_path):
    """GPT-2 comes with dropouts of 0.1; OPT drops in the layers that recompute; of Gemma-3 a part learns
    nothing, the one that sees. The ratio is 1, the gradient that of an update that keeps all."""
    folder, found, forwards = tiny_model(tmp_path, kind, **changes), [], []
    for recompute in (False, True):
        cfg = replace(cfg, model=folder, gradient_checkpointing=recompute, kl_coef=0.0, max_turns=2)
        model, tokenizer = load_model(cfg)
        stir(model)
        torch.manual_seed(3)
        rollouts = found[0][0] if found else rollout(model, tokenizer, demo.questions[:2], demo.search, cfg)
        old, _ = score(model, tokenizer, rollouts, None, cfg)
        optimizer, calls = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0), []
        advantages = [[1.0] * len(r.boundaries) for r in rollouts]
        mlp, = [m for name, m in unwrap(model).named_modules() if name.endswith(("h.1.mlp", "layers.1.mlp", "layers.1.fc1"))]
        hook = mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        stats, = update(model, optimizer, rollouts, old, old, advantages, cfg)
        hook.remove()
        assert abs(stats["ratio"] - 1) < 1e-4 and not any(module.training for module in model.modules())
        forwards.append(len(calls))
        found.append((rollouts, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert forwards[1] == 2 * forwards[0]
    (_, kept), (_, recomputed) = found
    assert set(kept) == set(recomputed) and max(g.abs().max() for g in kept.values()) > 1e-4
    assert all(torch.allclose(kept[name], recomputed[name], atol=1e-6, rtol=1e-3) for name in kept)


# ---- adapters ----

def logits_of(model, tokenizer, text="Who founded Tavo?"):
    ids = torch.tensor([encode_prompt(tokenizer, text)], device=model.device)
    with torch.no_grad():
        return model(ids).logits.cpu()


def test_an_adapter_is_merged_at_the_start(run, options, tmp_path):
    """The reference of a run with --init_adapter is the model with that adapter in it, as is its start."""
    adapter, cfg = str(run / "checkpoint"), Config(**DEMO)
    tuned, tokenizer = load_model(cfg, adapter)
    merged, _ = load_model(replace(cfg, init_adapter=adapter))
    stir(merged, 0.0)
    expected = logits_of(tuned, tokenizer)
    assert torch.allclose(expected, logits_of(merged, tokenizer), atol=1e-4)
    stir(merged)
    assert not torch.allclose(expected, logits_of(merged, tokenizer), atol=1e-3)
    with igpo.reference(merged):
        assert torch.allclose(expected, logits_of(merged, tokenizer), atol=1e-4)
    out = tmp_path / "x"
    argv = [*options, "--init_adapter", adapter, "--eval_every", "0", "--out", str(out)]
    assert igpo.main([*argv, "--steps", "1"]) == 0
    assert rows_of(out)[-1]["step"] == 1 and abs(rows_of(out)[-1]["ratio_start"] - 1) < 1e-4
    # the adapter that such a run leaves belongs to the merged model: both are loaded one after the other
    both, _ = load_model(replace(cfg, init_adapter=adapter), str(out / "checkpoint"))
    base = AutoModelForCausalLM.from_pretrained(HERE / "demo/policy", dtype="float32")
    by_hand = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    by_hand = PeftModel.from_pretrained(by_hand, out / "checkpoint").eval()
    assert torch.allclose(logits_of(both, tokenizer), logits_of(by_hand, tokenizer), atol=1e-4)
    assert any(p.any() for name, p in adapter_of(out).items() if "lora_B" in name)


OWN = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers",
       "head_dim", "tie_word_embeddings")


@pytest.mark.parametrize("kind, changes", [
    ("gpt2", {}), ("qwen2", {}), ("same", dict(hidden_size=64)), ("same", dict(num_hidden_layers=6)),
    ("same", dict(num_hidden_layers=2))])
def test_an_adapter_of_another_model_is_refused(kind, changes, run, tmp_path):
    """Other layers, another width, and what PEFT itself lets pass: more layers or fewer."""
    if kind == "same":
        own = json.loads((HERE / "demo/policy/config.json").read_text())
        window = dict(use_sliding_window=False, sliding_window=None, max_window_layers=28)
        kind, changes = "qwen2", {**{key: own[key] for key in OWN}, **window, **changes}
    cfg = Config(model=tiny_model(tmp_path / "base", kind, **changes))
    for arguments in ((cfg, str(run / "checkpoint")), (replace(cfg, init_adapter=str(run / "checkpoint")),)):
        with pytest.raises(UserError) as e:
            load_model(*arguments)
        assert "\n" not in str(e.value)
