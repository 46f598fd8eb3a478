"""benchmarks/ and tools/warm_start.py: tables worked by hand, small runs; with IGPO_LONG=1 timings too."""
import csv
import doctest
import json
import math
import os
import random
import re
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

import igpo
from benchmarks import bridge, common, demo_diagnostics, evidence, gpu, real_text, speed
from demo import make
from search_tool import BM25, Passage, load_questions
from tools import warm_start
from tools.metrics import read_jsonl

ROOT = common.ROOT
LONG = bool(os.environ.get("IGPO_LONG"))
torch.set_num_threads(1)

def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)

def test_common(tmp_path):
    assert doctest.testmod(common).attempted > 0 and doctest.testmod(common).failed == 0
    mean, low, high = common.mean_and_interval([[1.0, 3.0], [-2.0, 0.0]])
    assert (mean, low, high) == (0.5, -1.0, 2.0)        # the second question alone, the first alone
    assert "torch" in common.machine() and common.commit(tmp_path) == "?"
    assert common.commit().rstrip("+").isalnum()

# ---- evidence --------------------------------------------------------------------------------------------
@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder in the place of the repository, with runs of 2 steps and few questions."""
    for name in ("benchmarks", "runs"):
        (tmp_path / name).mkdir()
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    monkeypatch.setattr(evidence, "HERE", tmp_path / "benchmarks")
    monkeypatch.setattr(evidence, "STEPS", dict.fromkeys(evidence.HOPS, 2))
    monkeypatch.setattr(evidence, "COMMON", dict(questions=1, group=2, eval_every=1))
    return tmp_path

def test_evidence_tables_by_hand(place):
    """F1 .8, .9, 1.0 of igpo: mean .9, std .1, t 4.30, so half is 4.30 * .1 / sqrt(3) = .248. Less .7, .9, .8
    of grpo: .1, .0, .2; without seed 4, on which igpo was chosen: .0, .2."""
    finals, curves = [], []
    for setting, scores in (("igpo", (.8, .9, 1.0)), ("grpo, centred", (.7, .9, .8)), ("gamma 0.9", (.75,))):
        for seed, f1 in enumerate(scores, 4):
            old = {"options": "--gamma 0.9"} if setting == "gamma 0.9" else {}
            finals.append({"regime": "mixed", "setting": setting, "seed": seed, "commit": "e026da0", **old,
                           "test_f1": f1, "area": f1 / 2, "dev_f1": f1, "dev_f1_start": 0.1,
                           "turns_start": 4.0, "turns_end": 3.0, "gain_right_early": 0.5,
                           "gain_wrong_early": -0.25})
            curves += [{"regime": "mixed", "setting": setting, "seed": seed, "step": s, "dev_f1": f1 * s / 2}
                       for s in (0, 1, 2)]
    evidence.write_csv("final", finals)
    evidence.write_csv("curves", curves)
    key = lambda row: (row["setting"], row["seed"])
    assert sorted(evidence.read_csv("final"), key=key) == sorted(finals, key=key)
    evidence.tables(place / "runs", keep=True)
    text = (place / "benchmarks/evidence.md").read_text()
    assert "7 runs by commit e026da0" in text
    assert "| igpo | `--credit igpo` | 0.900 ± 0.248 (3) | 0.450 ± 0.124 (3) |" in text             # main
    assert "| igpo − grpo, centred | 0.100 ± 0.248 (3) | 0.050 ± 0.124 (3) |" in text
    assert "| igpo − grpo, centred | 0.000, 0.200 | 0.000, 0.100 |" in text
    assert "| mixed | grpo, centred | 3 | 0.800 ± 0.248 (3) | 0.400 ± 0.124 (3) | 4.0 -> 3.0 | 0.100 ±" in text
    assert "| seed | step 0 |" in text and "| 5 | 0.000 |" in text
    ablation = "| gamma 0.9 | earlier code: `--gamma 0.9` | 0.750 | 0.375 | 0.050 | 0.025 |  |"
    assert ablation in text
    assert "**mixed** (2 to 4 hops, 2 steps; dev F1 of the warm start 0.100)" in text
    row = "| igpo | 3 | 0.900 ± 0.248 (3) | - | - | - | 4.0 -> 3.0 | +0.50 / -0.25 | - | - |"
    assert row in text and "| gamma 0.9 | 1 |" not in text
    assert (place / "docs/evidence.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="no finished run"):
        evidence.tables(place / "runs", keep=False)

def test_evidence_reads_a_run_by_hand(place):
    out = place / "run"
    out.mkdir()
    turn = lambda *ids: {"passages": [{"id": i, "title": i} for i in ids]}
    rollout = lambda step, f1, beliefs, *turns: {"step": step, "id": "q", "f1": f1, "supporting": ["a", "b"],
                                                 "beliefs": beliefs, "turns": [*turns, turn()]}
    (out / "final.json").write_text(json.dumps({"setting": "igpo", "test_f1": 0.5}))
    (out / "metrics.jsonl").write_text(lines([
        {"step": 0, "eval_f1": 0.0}, {"step": 1, "turns": 4.0, "no_signal_outcome": 1.0},
        {"step": 2, "turns": 3.0, "no_signal_outcome": 0.0, "eval_f1": 1.0}]))
    (out / "rollouts.jsonl").write_text(lines([
        rollout(1, 0.0, [-3.0, -2.0, -2.5], turn("a"), turn("a")),      # right +1.0, wrong -0.5
        rollout(1, 0.0, [-3.0, -3.5], turn("c")),                       # wrong -0.5
        rollout(2, 1.0, [-3.0, -1.0], turn("c", "b")), rollout(2, 0.0, [-3.0], )]))    # right +2.0
    final, curve = evidence.read(out, 2)
    assert curve == [{"step": 0, "dev_f1": 0.0}, {"step": 2, "dev_f1": 1.0}]
    expected = {"test_f1": 0.5, "dev_f1_start": 0.0, "dev_f1": 1.0, "area": 0.5, "no_signal_f1": 0.5,
                "no_signal_outcome": 0.5, "turns_start": 4.0, "turns_end": 3.5, "gain_right_early": 1.5,
                "gain_wrong_early": -0.5}
    assert {key: final[key] for key in expected} == expected
    with pytest.raises(SystemExit, match="ends at step 2, not 3"):
        evidence.read(out, 3)

def test_evidence_runs_and_refuses_other_settings(place, monkeypatch):
    """A run of a comparator from end to end, then the same setting with another learning rate."""
    runs = place / "runs"
    evidence.write_questions(runs)
    assert {q["hops"] for q in load_questions(runs / "sparse-test.jsonl")} == {4}
    for name in ("dense-dev.jsonl", "dense-test.jsonl"):
        (runs / name).write_text("".join((runs / name).read_text().splitlines(True)[:3]))
    job = (runs, "dense", "gigpo", 5)
    assert evidence.run(job).startswith("dense-gigpo-seed5: test F1 ")
    assert evidence.run(job) == "dense-gigpo-seed5: done before"
    assert [row["step"] for row in read_jsonl(runs / "dense-gigpo-seed5/metrics.jsonl")] == [0, 1, 2]
    evidence.tables(runs, keep=False)
    with open(place / "benchmarks/evidence_final.csv", newline="") as file:
        row, = csv.DictReader(file)
    assert (row["regime"], row["setting"], row["seed"]) == ("dense", "gigpo", "5")
    assert row["commit"] != "e026da0"
    monkeypatch.setattr(evidence, "RUN", {**evidence.RUN, "gigpo": {"credit": "gigpo", "lr": 0.1}})
    for work in (lambda: evidence.run(job), lambda: evidence.tables(runs, keep=False)):
        with pytest.raises(SystemExit, match=r"other settings \(lr 0.0005, now 0.1\)"):
            work()

def test_committed_evidence_is_what_its_tables_say(place):
    """evidence.md is made of the CSVs beside it, whose options name earlier code where it is no more."""
    for file in common.HERE.glob("evidence_*.csv"):
        (place / "benchmarks" / file.name).write_bytes(file.read_bytes())
    finals = evidence.read_csv("final")
    assert {f["setting"] for f in finals if "options" not in f} <= set(evidence.RUN)
    known, text = (common.HERE / "evidence.md").read_text().splitlines(), evidence.text(finals)
    steps = lambda rows: [row for row in "\n".join(rows).splitlines() if not row.startswith("**")]
    assert steps(text) == steps(known)

# ---- real text -------------------------------------------------------------------------------------------
def test_real_text_by_hand():
    """Question a gains 1 and 3 where the distractor has -1, b -2 and 0 where it has 0.5."""
    row = lambda i, supporting, gain: {"id": i, "supporting": supporting, "turn": 0, "yes_no": False,
                                       "holds": False, "before": -4.0, "after": gain - 4.0}
    rows = [row("a", True, 1.0), row("a", True, 3.0), row("a", False, -1.0),
            row("b", True, -2.0), row("b", True, 0.0), row("b", False, 0.5)]
    found = {(name, kind): values for name, kind, values in real_text.figures(rows, "logprob")}
    assert found["first search", "supporting"] == [("a", 1.0), ("a", 3.0), ("b", -2.0), ("b", 0.0)]
    assert found["first search", "difference"] == [("a", 2.0), ("a", 4.0), ("b", -2.5), ("b", -0.5)]
    assert ("second search", "supporting") not in found
    table = real_text.gain_table(rows, "logprob", 2)
    assert "| first search | supporting | 2 | 4 | +0.50 [-1.00, +2.00] | +0.50 | 50% [0%, 100%] |" in table
    prob = dict((kind, v) for name, kind, v in real_text.figures(rows, "prob") if name == "all")
    assert prob["distractor"][0] == ("a", pytest.approx(math.exp(-5) - math.exp(-4)))

def test_real_text_from_end_to_end(tmp_path, monkeypatch):
    """On two demo questions. The order of the chain reads the answer last, where the belief rises by much."""
    two = [q for q in load_questions(ROOT / "demo/dev.jsonl") if len(q["supporting"]) == 2][:2]
    (tmp_path / "q.jsonl").write_text(lines(two))
    monkeypatch.setattr(sys, "argv", ["real_text", "--model", "demo/policy", "--data", "demo", "--questions",
                                      str(tmp_path / "q.jsonl"), "--out", str(tmp_path / "r"),
                                      "--figure", str(tmp_path / "r.png")])
    real_text.main()
    rows, setting = real_text.read_csv(tmp_path / "r.csv")
    order = [(True, 0), (True, 1), (True, 0), (True, 1), (False, 0), (False, 1)] * 2
    assert [(row["supporting"], row["turn"]) for row in rows] == order and "--questions" in setting["command"]
    assert rows[1]["holds"] and rows[1]["after"] - rows[1]["before"] > 0.3
    assert (tmp_path / "r.png").stat().st_size > 10_000
    before = (tmp_path / "r.md").read_text()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--tables"])
    real_text.main()
    assert (tmp_path / "r.md").read_text() == before

def test_committed_gains_are_what_the_table_says():
    rows, _ = real_text.read_csv(common.HERE / "real_text.csv")
    text = (common.HERE / "real_text.md").read_text()
    assert "\n".join(real_text.gain_table(rows, "prob", 4)) in text and len(rows) == 600

# ---- warm start ------------------------------------------------------------------------------------------
PAGES = [Passage("1", "Oss (town)", "Oss lies on the river Mar, and Tavo Lund founded it."),
         Passage("2", "Tavo Lund", "Tavo Lund was born in Yardby."), Passage("3", "Mar", "A long river.")]

@pytest.fixture(scope="module")
def policy():
    return igpo.load_model(igpo.Config(**igpo.DEMO))

def script(policy, question, titles, wrong=0.0, **changes):
    """A scripted rollout and the text of it."""
    tokenizer, cfg = policy[1], igpo.Config(**{**igpo.DEMO, "max_new_tokens": 64, **changes})
    q, pages = {"question": question, "answers": ["Yardby"]}, {p.title: p for p in PAGES}
    r = warm_start.scripted_rollout(tokenizer, q, [pages[t] for t in titles], BM25(PAGES), 2048, cfg,
                                    random.Random(0), wrong)
    return r, tokenizer.decode(r.ids)

def test_script_looks_up_what_has_been_named(policy):
    """Oss stands in the question, and Tavo Lund on its page: so in this order, whatever that of the data."""
    r, text = script(policy, "Where was the founder of Oss born?", ["Tavo Lund", "Oss (town)"])
    assert r.queries == ["Oss", "Tavo Lund"] and (r.stop, r.answer) == ("answer", "Yardby")
    first = "<think>\nI need to find out about Oss.\n</think>\n<search>\nOss\n</search>\n<information>\n"
    assert first in text and text.endswith(f"<think>{igpo.SCHEMA}Yardby\n</answer>")
    own = policy[1].decode([i for i, m in zip(r.ids, r.mask) if m])
    assert own.count("</search>") == 2 and "information>" not in own and len(r.boundaries) == 3
    # what is not named is looked up by words of the question, and once they were used, by its title
    r, _ = script(policy, "Where was somebody born?", ["Mar", "Tavo Lund"])
    assert r.queries == ["Where somebody born", "Mar"] and r.retrieved[0][0].title == "Tavo Lund"
    r, _ = script(policy, "Where was the founder of Oss born?", ["Oss (town)", "Tavo Lund"], wrong=1.0)
    assert set(r.queries[0].split()) < {"Where", "founder", "born"} and r.queries[-1] == "Tavo Lund"
    r, _ = script(policy, "Where was the founder of Oss born?", ["Oss (town)", "Tavo Lund"], max_turns=2)
    assert r.stop == "turns"        # two searches and an answer do not fit: not imitated

def test_teachable_questions(tmp_path):
    (tmp_path / "corpus.jsonl").write_text(lines([asdict(replace(p, score=0.0)) for p in PAGES]))
    q = lambda *names: {"supporting": list(names)}
    found = warm_start.teachable([q("1", "Mar"), q("Oss"), q()], str(tmp_path / "corpus.jsonl"))
    assert [[p.title for p in pages] for _, pages in found] == [["Oss (town)", "Mar"]]
    with pytest.raises(igpo.UserError, match="no training question"):
        warm_start.teachable([q("Oss")], str(tmp_path / "corpus.jsonl"))

def test_warm_start_of_the_demo(tmp_path, capsys):
    """The script's likelihood rises; the folder is a model like any other, the adapter gives the same."""
    out, few = tmp_path / "warm", tmp_path / "few.jsonl"
    few.write_text("".join((ROOT / "demo/train.jsonl").read_text().splitlines(True)[:4]))
    steps = 20 if LONG else 4
    options = ["--steps", str(steps), "--questions", "4", "--lr", "3e-3", "--group", "2", "--wrong", "0",
               "--dev_questions", "2", "--train", str(few)]
    assert warm_start.main([*options, "--out", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    nats = [float(line.split()[5]) for line in said if line.startswith("step")]
    assert len(nats) == steps and nats[-1] < nats[0] - 0.3
    said = json.loads((out / "warm_start.json").read_text())
    assert said["steps"] == steps and set(said["before"]) == {"format_kept", "answered", "f1", "searches"}
    kept = json.loads((out / "generation_config.json").read_text())
    assert "max_new_tokens" not in kept and "top_k" not in kept
    config, was = (json.loads((f / "config.json").read_text()) for f in (out, ROOT / "demo/policy"))
    assert config["max_position_embeddings"] == was["max_position_embeddings"]
    question, logps = load_questions(few)[0], []
    for model, adapter in ((str(out), ""), ("demo/policy", str(out / "adapter")), ("demo/policy", "")):
        cfg = igpo.Config(**{**igpo.DEMO, "model": model, "init_adapter": adapter})
        lm, tokenizer = igpo.load_model(cfg)
        r = igpo.begin(tokenizer, question["question"])
        r.write(igpo.encode(tokenizer, warm_start.turn_text("Tavo")), True)
        logps.append(igpo.score(lm, tokenizer, [r], None, cfg)[0][0])
    assert torch.allclose(logps[0], logps[1], atol=1e-4) and not torch.allclose(logps[0], logps[2], atol=0.1)
    assert warm_start.main([*options, "--out", str(out)]) == 2                  # it exists
    assert "exists" in capsys.readouterr().err

# ---- speed -------------------------------------------------------------------------------------------------
def test_obvious_forms_give_the_same(policy):
    """speed.py's belief and rollout, which assert it, in a small size; a ratio by hand."""
    row = speed.measure_belief(*policy, (3, 5, 8), 2, 1)
    assert row["tokens"] == 300 + 3 * 5 + 2 * 8 and len(row["naive / ours"]) == 3
    assert speed.measure_rollout(*policy, 2, 1, 2, 1)["same ids"] == "100%"
    assert speed.ratio([1.0, 6.0, 2.0], [1.0, 2.0, 1.0]) == [1.0, 2.0, 3.0]
    assert speed.written(["a", "b"], [["x", [1.0, 2.0, 3.0]]])[2] == "| x | 1.00 – **2.00** – 3.00 |"

@pytest.mark.skipif(not LONG, reason="IGPO_LONG is not set")
def test_speed_from_end_to_end(tmp_path):
    python = [sys.executable, "-m", "benchmarks.speed"]
    ran = subprocess.run([*python, "--quick"], capture_output=True, text=True, cwd=ROOT, check=True)
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["belief_vs_naive"] > 3 and found["belief_vs_plain"] < 2 and found["rollout_vs_reread_8"] > 1.5
    assert found["update_peak_vs_naive"] < 1 / 3 and found["padding"] < 0.1
    # beside itself: the same rollouts, and about the same time
    ran = subprocess.run([*python, "--old", str(ROOT), "--repetitions", "2", "--out", str(tmp_path)],
                         capture_output=True, text=True, cwd=ROOT, check=True)
    assert "the same rollouts on both sides" in (tmp_path / "speed_old.md").read_text()
    assert 0.7 < float(re.search(r"\| all .*\*\*(.*)\*\*", ran.stdout)[1]) < 1.4

# ---- bridge ----------------------------------------------------------------------------------------------
def test_auc_and_its_table_by_hand():
    """Right 2, 1 against wrong 1, 0: of four pairs three are in order and one is a tie."""
    assert bridge.auc(np.array([2.0, 1.0]), np.array([1.0, 0.0])) == 0.875
    row = lambda i, right, gain: {"id": i, "right": right, "holds": False, "turn": 0, "before": -4.0,
                                  "before_best": -4.0, "after": gain - 4.0, "after_best": -4.0,
                                  "random": -4.0, "random_best": -4.0}
    table = bridge.auc_table([row("a", True, 2.0), row("a", False, 1.0), row("b", True, 1.0),
                              row("b", False, 0.0)], draws=20)
    assert "| right, wrong searches | 2, 2 | 2, 2 |" in "\n".join(table)
    assert any(line.startswith("| logprob | 0.88 [") for line in table)
    assert any(line.startswith("| logprob, best form | 0.50 [") for line in table)
    assert bridge.gold_forms(["a Spirit", "Oss"]) == ["a Spirit", "a spirit", "A Spirit", "Oss", "oss"]

def test_bridge_reads_the_beliefs_that_igpo_scores(tmp_path, monkeypatch):
    """Read from left to right with a cache that is cropped, they are those of one forward (real_text)."""
    two = [q for q in load_questions(ROOT / "demo/dev.jsonl") if len(q["supporting"]) == 2][:2]
    (tmp_path / "q.jsonl").write_text(lines(two))
    options = ["--model", "demo/policy", "--data", "demo", "--questions", str(tmp_path / "q.jsonl")]
    monkeypatch.setattr(sys, "argv", ["bridge", *options, "--out", str(tmp_path / "b")])
    bridge.main()
    monkeypatch.setattr(sys, "argv", ["real_text", *options, "--out", str(tmp_path / "r"),
                                      "--figure", str(tmp_path / "r.png")])
    real_text.main()
    with open(tmp_path / "b.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file.readlines()[1:]))
    for ours, theirs in zip(rows, real_text.read_csv(tmp_path / "r.csv")[0], strict=True):
        for key in ("before", "after"):
            assert float(ours[key]) == pytest.approx(theirs[key], abs=2e-3)
            assert float(ours[f"{key}_best"]) >= float(ours[key])
        assert (ours["right"] == "True") == theirs["supporting"]

@pytest.mark.parametrize("path", sorted(common.HERE.glob("bridge*.csv")), ids=lambda path: path.stem)
def test_committed_signals_are_what_the_table_says(path, tmp_path, monkeypatch):
    (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(sys, "argv", ["bridge", "--tables", "--out", str(tmp_path / path.name)])
    bridge.main()
    assert (tmp_path / path.name).with_suffix(".md").read_text() == path.with_suffix(".md").read_text()

# ---- gpu -------------------------------------------------------------------------------------------------
def test_gpu_in_small():
    """Without CUDA a tiny shape goes the whole way; its last line has what the log of a GPU has."""
    if gpu.CUDA:
        pytest.skip("on a GPU it measures the real shape, for minutes")
    ran = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    found, log = json.loads(ran.stdout.splitlines()[-1]), (common.HERE / "gpu.log").read_text().splitlines()
    logged = next(json.loads(line) for line in log if line.startswith("{"))
    assert found.keys() == logged.keys() and found["ratio_start"] == pytest.approx(1, abs=1e-3)
    assert min(found["step_s"], found["decode_ms"], found["peak_computed_gb"]) > 0

def test_gpu_compares_within_a_time(tmp_path, capsys):
    options = ["--compare", "igpo,dr-venus", "--minutes", "5", "--out", str(tmp_path), "--steps", "1",
               "--questions", "1", "--group", "2", "--max_turns", "2", "--eval_every", "0"]
    for _ in range(2):                                          # the second finds all done
        gpu.main(options)
        with open(tmp_path / "curves.csv") as file:
            rows = list(csv.DictReader(file))
        assert [(r["setting"], r["step"]) for r in rows] == [(name, step) for name in ("dr-venus", "igpo")
                                                             for step in "01"]
    assert capsys.readouterr().out.count("done: ") == 2

@pytest.mark.skipif(not LONG, reason="IGPO_LONG is not set")
def test_diagnostics_of_a_few_questions():
    """What benchmarks.demo_diagnostics finds on the paths is what stands in demo/diagnostics.json."""
    world = make.World(0)
    questions = world.questions("dev", make.SIZES["dev"])
    found = demo_diagnostics.diagnose("demo/policy", questions, world, samples=2)
    known = json.loads((ROOT / "demo/diagnostics.json").read_text())
    for path in ("gold_path", "wrong_path"):
        for hops, beliefs in found[path].items():
            assert beliefs == pytest.approx(known[path][str(hops)], abs=1e-3)
    assert found["guess"] == known["guess"]
    assert all(found["f1"][k]["greedy"] == known["f1"][str(k)]["greedy"] for k in (2, 3, 4, "all"))
