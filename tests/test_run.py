"""A run from its command line: what it leaves, what is written down, evaluation, resuming."""
import json
import math
import os
from dataclasses import fields, replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import igpo
from igpo import (DEMO, RECIPES, Config, encode_prompt, f1_score, info_gains, parse_config, recipe_credit,
                  rollout, save_step, score, warning)
from test_igpo import own_tokens
from tests.common import (EXACT, HERE, adapter_of, copy_of, one_line, rows_of, same_run, saved_step, state_of,
                          timeless)

approx, ln = pytest.approx, math.log


# ---- what a run leaves ----

def test_a_run_leaves_what_the_readme_says(run):
    assert {p.name for p in run.iterdir() if not p.name.endswith(".part")} \
        == {"config.json", "metrics.jsonl", "rollouts.jsonl", "checkpoint", "best"}
    config = json.loads((run / "config.json").read_text())
    assert set(config) == {f.name for f in fields(Config)}
    assert config["lr"] == DEMO["lr"] and config["questions"] == 2
    metrics, kept = rows_of(run), rows_of(run, "rollouts.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2, 3, 4]
    assert ["eval_f1" in row for row in metrics] == [True, False, True, False, True]
    assert len(kept) == 4 * 2 * 3
    for row in metrics[1:]:
        mine = [k for k in kept if k["step"] == row["step"]]
        assert abs(row["ratio_start"] - 1) < 1e-4 and math.isfinite(row["loss"]) and row["skipped"] == 0
        assert sum(row[f"stop_{why}"] for why in ("answer", "format", "length", "turns")) == approx(1)
        assert row["policy_tokens"] == sum(k["policy_tokens"] for k in mine)
        assert row["searches"] == sum(t["query"] is not None for k in mine for t in k["turns"])
        assert row["outcome_f1"] == approx(sum(k["f1"] for k in mine) / 6)
        assert row["turns"] == approx(sum(len(k["turns"]) for k in mine) / 6)
        parts = row["seconds_rollout"] + row["seconds_score"] + row["seconds_update"]
        assert row["seconds"] == approx(parts) and min(parts, row["seconds_rollout"]) >= 0
    for k in kept:
        assert len(k["turns"]) == len(k["beliefs"])
        gains = info_gains(k["beliefs"], RECIPES[config["credit"]][0])
        assert [t["gain"] for t in k["turns"]] == [*gains, None]
        assert (k["stop"] == "answer") == (k["answer"] is not None)
        assert k["outcome"] == (k["f1"] if k["stop"] == "answer" else config["format_penalty"])


def test_advantages_are_those_of_each_question_s_group(run):
    kept, cfg = rows_of(run, "rollouts.jsonl"), Config(group=3)
    for first in range(0, len(kept), 3):
        group = kept[first:first + 3]
        assert len({k["id"] for k in group}) == 1
        expected = recipe_credit([k["beliefs"] for k in group], [k["outcome"] for k in group], cfg)
        assert [[t["advantage"] for t in k["turns"]] for k in group] == [approx(row) for row in expected]
    assert any(t["advantage"] for k in kept for t in k["turns"])


def test_evaluation_is_greedy_and_of_the_dev_questions(run, small):
    cfg = replace(Config(**DEMO), max_turns=3, max_new_tokens=24, group=1, temperature=0.0)
    model, tokenizer = igpo.load_model(cfg)
    dev, row = igpo.load_questions(f"{small}/dev.jsonl"), rows_of(run)[0]
    rollouts = rollout(model, tokenizer, dev, igpo.open_search(f"bm25:{small}/corpus.jsonl"), cfg)
    assert row["eval_f1"] == approx(sum(f1_score(r.answer, q["answers"]) for r, q in zip(rollouts, dev)) / 4)
    assert row["eval_turns"] == approx(sum(len(r.boundaries) for r in rollouts) / 4)
    assert set(row) == {"step", "eval_f1", "eval_em", "eval_turns"}


def test_the_adapter_is_peft_s_own(run, demo):
    """As it is, merged, and read by load_model()."""
    ids = torch.tensor([encode_prompt(demo.tokenizer, "Who founded Tavo?")])
    base = AutoModelForCausalLM.from_pretrained(HERE / "demo/policy")
    again = AutoModelForCausalLM.from_pretrained(HERE / "demo/policy")
    ours = igpo.load_model(Config(**DEMO), str(run / "checkpoint"))[0]
    with torch.no_grad():
        before = base(ids).logits
        tuned = PeftModel.from_pretrained(base, run / "checkpoint").eval()(ids).logits
        merged = PeftModel.from_pretrained(again, run / "checkpoint").merge_and_unload()(ids).logits
        read = ours(ids.to(ours.device)).logits.cpu()
    assert (before - tuned).abs().max() > 1e-4
    assert torch.allclose(tuned, merged, atol=1e-4) and torch.allclose(tuned, read, atol=1e-3)
    saved = {name.replace(".default", ""): p.cpu() for name, p in state_of(run)["adapter"].items()}
    adapter = adapter_of(run)
    assert set(saved) == set(adapter) and all(torch.equal(adapter[name], saved[name]) for name in saved)


def test_best_holds_the_adapter_that_was_best_on_dev(demo, tmp_path):
    model, optimizer = demo.model, torch.optim.SGD([p for p in demo.model.parameters() if p.requires_grad])
    mark = next(p for name, p in model.named_parameters() if "lora_A" in name)
    kept, history = mark.detach().clone(), []
    try:
        for step, f1 in enumerate([0.0, None, 0.3, 0.3, 0.2, 0.4, 0.1]):
            history.append({"step": step, **({} if f1 is None else {"eval_f1": f1})})
            with torch.no_grad():
                mark.fill_(step)
            save_step(tmp_path, model, optimizer, history, [])
            best = [0, 0, 2, 2, 2, 5, 5][step]
            for name, expected in (("checkpoint", step), ("best", best)):
                assert any((value == expected).all() for value in adapter_of(tmp_path, name).values())
    finally:
        with torch.no_grad():
            mark.copy_(kept)


def test_without_evaluation_and_without_a_reference(options, tmp_path):
    out = tmp_path / "x"
    argv = [*options, "--steps", "1", "--eval_every", "0", "--kl_coef", "0", "--out", str(out)]
    assert igpo.main(argv) == 0
    row = rows_of(out)[-1]
    assert row["step"] == 1 and row["kl"] == approx(0, abs=1e-6) and "eval_f1" not in row
    assert abs(row["ratio_start"] - 1) < 1e-4 and not (out / "best").exists()


def test_evaluation_alone(options, tmp_path):
    assert igpo.main([*options, "--steps", "0", "--out", str(tmp_path / "x")]) == 0
    assert [row["step"] for row in rows_of(tmp_path / "x")] == [0] and saved_step(tmp_path / "x") == 0


def test_a_credit_of_one_s_own(options, tmp_path, capsys):
    """It gets what train_step() knows, and what it returns is what is trained on and written down."""
    given = {}

    def mine(beliefs, outcomes, cfg, **of_step):
        given.update(of_step, cfg=cfg)
        return [[float(len(b) - t) for t in range(len(b))] for b in beliefs]
    argv = [*options, "--credit", "mine", "--steps", "1", "--eval_every", "0", "--out", str(tmp_path / "x")]
    assert igpo.main(argv, credits={"mine": mine}) == 0
    kept = rows_of(tmp_path / "x", "rollouts.jsonl")
    for k in kept:
        assert [t["advantage"] for t in k["turns"]] == [float(n) for n in range(len(k["turns"]), 0, -1)]
    assert len(given["rollouts"]) == len(given["asked"]) == 6 and given["cfg"].credit == "mine"
    assert set(given) == {"model", "tokenizer", "rollouts", "asked", "search", "cfg"}
    capsys.readouterr()
    assert igpo.main(["--resume", str(tmp_path / "x"), "--steps", "2"]) == 2           # unknown without it
    one_line(capsys, "mine")


# ---- what is written down ----

def test_record_of_a_rollout(demo, played):
    rollouts, _ = played
    _, beliefs = score(demo.model, demo.tokenizer, *played, demo.cfg)
    for i, (r, b) in enumerate(zip(rollouts, beliefs)):
        question, advantages = demo.questions[i // 3], [float(t) for t in range(len(b))]
        line = igpo.record(demo.tokenizer, r, question, b, 0.5, advantages, demo.cfg)
        turns = line["turns"]
        assert all(line[key] == question[key] for key in ("id", "question", "answers", "supporting", "hops"))
        assert (line["beliefs"], line["outcome"], line["stop"], line["answer"]) == (b, 0.5, r.stop, r.answer)
        assert [t["gain"] for t in turns] == info_gains(b) + [None] and line["policy_tokens"] == sum(r.mask)
        assert [t["advantage"] for t in turns] == advantages and len(turns) == len(r.boundaries)
        for t, turn in enumerate(turns):
            assert turn["text"] == demo.tokenizer.decode([r.ids[j] for j in own_tokens(r, t)])
            asked = t < len(r.queries)
            assert turn["query"] == (r.queries[t] if asked else None) and turn["error"] is None
            shown = [p.text for p in r.retrieved[t]] if asked else []
            assert [p["text"] for p in turn["passages"]] == shown


def metrics_of(*records, skipped=False):
    update = dict(tokens=4, kl=2.0, entropy=1.0, clipped=1.0, loss=0.5, grad_norm=3.0, ratio=1.0)
    return igpo.step_metrics(list(records), [{**update, "skipped": skipped}], Config(group=2))


def a_record(stop="answer", beliefs=(-1.0,), advantages=(0.0,), f1=0.0, outcome=0.0, text=""):
    turns = [{"text": text, "query": None if gain is None else "q", "error": None, "cached": False,
              "gain": gain, "advantage": advantage}
             for gain, advantage in zip([*info_gains(beliefs), None], advantages)]
    return {"f1": f1, "em": 0.0, "outcome": outcome, "beliefs": list(beliefs), "stop": stop, "turns": turns,
            "policy_tokens": 4}


def test_metrics_by_hand():
    form = " I.</think>\n<answer>\nTavo</answer>"
    row = metrics_of(
        a_record(f1=1.0, outcome=1.0, beliefs=(ln(0.1), ln(0.4)), advantages=(0.5, 0.5), text="x" + form),
        a_record("format", outcome=-0.1, beliefs=(ln(0.1), ln(0.2), ln(0.2)), advantages=(0.1, 0.0, 0.0)))
    # gains .3; .1, 0: mean .4 / 3, mean square .1 / 3
    expected = dict(
        outcome_f1=0.5, outcome_reward=approx(0.45), turns=2.5, searches=3, policy_tokens=8,
        gain_mean=approx(0.4 / 3), gain_std=approx(math.sqrt(0.14 / 9)), gain_positive=approx(2 / 3),
        belief_first=approx(ln(0.1)),
        belief_last=approx((ln(0.4) + ln(0.2)) / 2), stop_answer=0.5, stop_format=0.5, stop_turns=0.0, kl=0.5,
        entropy=0.25, clip_fraction=0.25, loss=0.5, grad_norm=3.0, skipped=0,
        answer_form=1.0, failed_searches=0)
    assert row == {**row, **expected}
    other = a_record(text=" I.</think><answer> Tavo</answer>")
    assert metrics_of(other, other)["answer_form"] == 0.0
    assert metrics_of(a_record(), a_record(), skipped=True)["skipped"] == 1


def test_what_a_group_can_teach_is_counted_after_normalising():
    """no_signal_outcome: outcomes agree. no_signal: all advantages of the credit in use are 0."""
    silent, loud = a_record(advantages=(0.0, 0.0), beliefs=(-1, -2)), a_record(advantages=(0.5,), outcome=1.0)
    share = lambda *records: [metrics_of(*records)[key] for key in ("no_signal_outcome", "no_signal")]
    assert share(silent, silent) == [1.0, 1.0] and share(silent, loud) == [0.0, 0.0]
    assert share(silent, a_record(advantages=(0.5,))) == [1.0, 0.0]             # outcomes agree, gains do not
    assert share(silent, silent, silent, loud) == [0.5, 0.5]                        # group by group


def history(**last):
    """Twelve quiet steps, and then this one."""
    quiet = dict(stop_format=0.1, stop_length=0.0, kl=0.01, grad_norm=1.0, skipped=0)
    return [{"step": 0, "eval_f1": 0.3}, *({"step": n, **quiet} for n in range(1, 13)),
            {"step": 13, **quiet, **last}]


@pytest.mark.parametrize("last, said", [
    ({}, ""), (dict(stop_format=0.3, stop_length=0.3), "format"), (dict(kl=0.11), "kl"),
    (dict(grad_norm=11.0), "grad_norm"), (dict(grad_norm=9.0, kl=0.09), ""),
    (dict(eval_f1=0.14), "dev F1"), (dict(eval_f1=0.16), ""), (dict(skipped=1), "not finite")])
def test_warnings_by_hand(last, said):
    text = warning(history(**last))
    assert said in text and bool(text) == bool(said) == text.endswith("best/ has the adapter of step 0")
    assert text.count("\n") == bool(said)
    if said:                                             # said once, not at each step that is as bad
        assert warning([*history(**last), {**history(**last)[-1], "step": 14}]) == ""
        assert warning([*history(**last), *history()[-1:]]) == ""


def test_no_warning_without_a_history():
    assert warning([{"step": 0, "eval_f1": 0.0}]) == "" == warning(history()[:1] + history(kl=9.0)[-1:])
    always = {"step": 1, "stop_format": 0.9, "stop_length": 0.0, "kl": 0.0, "grad_norm": 0.0, "skipped": 0}
    assert warning([always, {**always, "step": 2}]) == ""                     # it never knew the format


# ---- resuming ----

def test_the_same_seed_is_the_same_run_and_another_is_not(run, half, options, tmp_path):
    if EXACT:
        assert timeless(rows_of(half)) == timeless(rows_of(run))[:3]
        assert rows_of(half, "rollouts.jsonl") == rows_of(run, "rollouts.jsonl")[:12]
    argv = [*options, "--steps", "1", "--eval_every", "0", "--seed", "1", "--out", str(tmp_path / "x")]
    assert igpo.main(argv) == 0
    other = [(k["id"], k["turns"][0]["text"]) for k in rows_of(tmp_path / "x", "rollouts.jsonl")]
    assert other != [(k["id"], k["turns"][0]["text"]) for k in rows_of(run, "rollouts.jsonl")[:6]]


def test_resumed_equals_uninterrupted(run, half, tmp_path):
    """And what a kill has left behind the saved step is cut off."""
    out = copy_of(half, tmp_path / "resumed")
    with open(out / "metrics.jsonl", "a") as metrics, open(out / "rollouts.jsonl", "a") as rollouts:
        metrics.write('{"step": 3, "of": "a step that was cut"}\n{"step": 4, "to')
        rollouts.write('{"step": 3, "turns": []}\n{"step": 3')
    (out / "checkpoint" / "state.pt.part").write_bytes(b"torn")
    (out / "checkpoint.part").mkdir(exist_ok=True)
    (out / "checkpoint.part" / "adapter_model.safetensors").write_bytes(b"torn")
    assert igpo.main(["--resume", str(out), "--steps", "4"]) == 0
    same_run(run, out)
    before = {p.name: p.read_bytes() for p in out.glob("*.jsonl")}
    assert igpo.main(["--resume", str(out), "--steps", "4"]) == 0                   # nothing is left to do
    assert before == {p.name: p.read_bytes() for p in out.glob("*.jsonl")}


def test_resume_may_change_the_batch_sizes(run, tmp_path):
    """As one must after running out of memory, or on another machine."""
    out = copy_of(run, tmp_path / "smaller")
    argv = ["--steps", "5", "--rollout_batch", "2", "--batch_tokens", "600", "--gradient_checkpointing"]
    assert igpo.main(["--resume", str(out), *argv]) == 0
    assert [row["step"] for row in rows_of(out)] == [0, 1, 2, 3, 4, 5] and rows_of(out)[:5] == rows_of(run)
    assert abs(rows_of(out)[5]["ratio_start"] - 1) < 1e-4


@pytest.mark.parametrize("argv", [["--lr", "0.5"], ["--seed", "3"], ["--group", "2"], ["--credit", "grpo"],
                                  ["--data", "elsewhere"], ["--model", "other"], ["--search", "bm25:x"]])
def test_resume_refuses_what_would_be_another_run(argv, half, capsys):
    before = {p: p.stat().st_mtime_ns for p in half.rglob("*")}
    assert igpo.main(["--resume", str(half), "--steps", "4", *argv]) == 2
    one_line(capsys, argv[0])
    assert before == {p: p.stat().st_mtime_ns for p in half.rglob("*")}


SPOILT = {
    "no state": lambda out: (out / "checkpoint/state.pt").unlink(),
    "a torn state": lambda out: (out / "checkpoint/state.pt").write_bytes(b"PK torn"),
    "no metrics": lambda out: (out / "metrics.jsonl").unlink(),
    "half of the metrics": lambda out: os.truncate(out / "metrics.jsonl", 300),
    "no config": lambda out: (out / "config.json").unlink(),
    "half a config": lambda out: (out / "config.json").write_text("{"),
    "a config that is a list": lambda out: (out / "config.json").write_text("[1]"),
    "a config of other options": lambda out: (out / "config.json").write_text('{"curriculum": true}'),
    "a state of another model": lambda out: spoil_state(
        out, adapter={name: p[:1] for name, p in state_of(out)["adapter"].items()}),
    "a state of other layers": lambda out: spoil_state(
        out, adapter={name.replace("layers.", "blocks."): p for name, p in state_of(out)["adapter"].items()}),
    "a state of no model": lambda out: torch.save({"history": []}, out / "checkpoint/state.pt")}


def spoil_state(out, **changes):
    torch.save({**state_of(out), **changes}, out / "checkpoint/state.pt")


@pytest.mark.parametrize("what", SPOILT)
def test_a_damaged_run_is_refused_in_one_line(what, half, tmp_path, capsys):
    out = copy_of(half, tmp_path / "x")
    SPOILT[what](out)
    assert igpo.main(["--resume", str(out), "--steps", "4"]) == 2
    one_line(capsys, str(out))


def test_a_run_never_writes_into_a_folder_that_holds_something(half, options, tmp_path, capsys):
    before = {p: p.read_bytes() for p in half.rglob("*") if p.is_file()}
    assert igpo.main([*options, "--steps", "1", "--out", str(half)]) == 2
    one_line(capsys, "--resume")
    assert before == {p: p.read_bytes() for p in half.rglob("*") if p.is_file()}
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1").write_text("years of work")
    assert igpo.main([*options, "--steps", "1", "--out", str(tmp_path / "thesis")]) == 2
    one_line(capsys)
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter1"]


def test_models_that_differ_behind_a_dot_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)      # beside a runs/ of the user's own a run may be refused
    out = lambda *argv: parse_config([*argv]).out
    assert out("--model", "Qwen2.5-3B-Instruct") == "runs/Qwen2.5-3B-Instruct-igpo-seed0"
    name = out("--model", "some/where/Qwen2.5-7B.Q4_1.gguf", "--credit", "grpo", "--seed", "3")
    assert name == "runs/Qwen2.5-7B.Q4_1-grpo-seed3"
    assert out() == "runs/policy-igpo-seed0" and out("--out", "x") == "x"
