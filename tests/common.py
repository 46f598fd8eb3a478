"""Helpers of the tests in this folder."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import igpo

HERE = Path(igpo.__file__).resolve().parent
LONG = bool(os.environ.get("IGPO_LONG"))                # all of it: more kills, more models, more fuzz
EXACT = not torch.cuda.is_available() and not torch.backends.mps.is_available()     # a seed gives equal bits
GOOD = '{"question": "Who?", "answers": ["Tavo"]}'


def small_options(data) -> list[str]:
    options = dict(data=data, questions=2, group=3, max_turns=3, max_new_tokens=24, eval_every=2)
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def jsonl(path, *lines) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def rows_of(out, name="metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (Path(out) / name).read_bytes().split(b"\n") if line]


def state_of(out) -> dict:
    return torch.load(Path(out) / "checkpoint" / "state.pt", weights_only=True)


def saved_step(out) -> int:
    """The step from which a resume goes on."""
    return state_of(out)["history"][-1]["step"]


def adapter_of(out, name="checkpoint") -> dict:
    return load_file(Path(out) / name / "adapter_model.safetensors")


def copy_of(run, to) -> Path:
    return Path(shutil.copytree(run, to))


def timeless(rows):
    return [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in rows]


def same_run(a, b) -> None:
    """Equal to the last bit; on a GPU, where sums may be taken in any order, equal in what was asked."""
    if EXACT:
        assert timeless(rows_of(a)) == timeless(rows_of(b))
        assert rows_of(a, "rollouts.jsonl") == rows_of(b, "rollouts.jsonl")
        for name in ("checkpoint", "best"):
            left, right = adapter_of(a, name), adapter_of(b, name)
            assert set(left) == set(right) and all(torch.equal(left[key], right[key]) for key in left)
    asked = lambda out: [(row["step"], row["id"]) for row in rows_of(out, "rollouts.jsonl")]
    assert [set(row) for row in rows_of(a)] == [set(row) for row in rows_of(b)] and asked(a) == asked(b)
    assert saved_step(a) == saved_step(b) == rows_of(a)[-1]["step"] == rows_of(b)[-1]["step"]


def one_line(capsys, *said) -> str:
    """The error as a user sees it: one line that names the program."""
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if "%|" not in line]             # but for a progress bar
    assert len(lines) == 1 and lines[0].startswith("igpo: ") and all(text in err for text in said), err
    return err


def program(*arguments, **options):
    """A program of its own, which sees the project wherever it stands."""
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=600,
                          env=environment, **options)


# What an architecture's config needs to be small and, with these weights, sure of itself.
SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3,
             max_position_embeddings=1024)
HEADS = dict(SHAPE, intermediate_size=64, num_key_value_heads=1, head_dim=16)
GEMMA = dict(HEADS, sliding_window=300, layer_types=["sliding_attention", "full_attention"])
MODELS = {
    "gpt2": dict(n_positions=1024, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3),
    "opt": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64, init_std=0.3,
                max_position_embeddings=1024, word_embed_proj_dim=32),
    "gpt_neox": dict(SHAPE, intermediate_size=64), "llama": HEADS, "qwen3": HEADS,
    "mistral": dict(HEADS, sliding_window=300), "gemma3_text": GEMMA,
    "qwen2": dict(SHAPE, intermediate_size=64, num_key_value_heads=1, use_sliding_window=True,
                  sliding_window=300, max_window_layers=1),
    # another rotary table for a batch with a row of more than 300 tokens
    "phi3": dict(SHAPE, intermediate_size=64, num_key_value_heads=1, original_max_position_embeddings=300,
                 rope_parameters=dict(rope_type="longrope", rope_theta=10000.0, short_factor=[1.0] * 8,
                                      long_factor=[4.0 + i for i in range(8)],
                                      original_max_position_embeddings=300)),
    # the part that reads text is one of two, and has the window
    "gemma3": dict(text_config=GEMMA, mm_tokens_per_image=4, image_token_index=1500, boi_token_index=1499,
                   eoi_token_index=1498,
                   vision_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                      num_attention_heads=2, image_size=28, patch_size=14))}


def tiny_model(folder, kind, **changes) -> str:
    """A random model of another architecture with the demo's tokenizer, in a folder."""
    tokenizer = AutoTokenizer.from_pretrained(HERE / "demo/policy")
    options = {**MODELS.get(kind, HEADS), **changes}
    ids = dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
               bos_token_id=tokenizer.eos_token_id, vocab_size=len(tokenizer))
    if "text_config" in options:
        options["text_config"] = {**options["text_config"], **ids}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **ids, **options)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
