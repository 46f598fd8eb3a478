"""eval.py and tools/metrics.py: scores and figures by hand, and whole evaluations of the demo policy."""
import doctest
import json
import math
import random
import re
import string
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants

import eval as evaluation
import igpo
import tools.metrics as metrics
from search_tool import Passage, Results, f1_score
from tests.common import LONG, program, rows_of
from tests.test_report import line
from tools.data import load_benchmark
from tools.metrics import bootstrap, compare, measure, scores, summarise

ROOT = Path(igpo.__file__).parent
TINY = ["--max_turns", "2", "--max_new_tokens", "24"]


def read_lines(path):
    return rows_of(Path(path).parent, Path(path).name)


def run(capsys, *argv):
    """(exit status, stdout, stderr) of eval.py, in this process."""
    code = evaluation.main([str(a) for a in argv])
    out = capsys.readouterr()
    return code, out.out, "".join(line for line in out.err.splitlines(True) if line.startswith("eval"))


def test_docstring_examples():
    for module in (metrics, evaluation):
        assert doctest.testmod(module).failed == 0


# ---- scores ------------------------------------------------------------------------------------------------

SCORED = [   # answer, golds, then F1 and EM of the paper, F1 and EM of SQuAD, cover-EM
    ("the Fox", ["Fox"], 2 / 3, 0, 1, 1, 1),                # {the, fox} against {fox}; SQuAD drops "the"
    ("U.S.", ["US"], 0, 0, 1, 1, 1),                        # {u, s} against {us}; SQuAD: "us"
    ("2,000", ["2000"], 0, 0, 1, 1, 1),                     # {2, 000}; SQuAD: "2000"
    ("yes, it is", ["yes"], 1 / 2, 0, 1 / 2, 0, 1),         # one of three words: P 1/3, R 1
    ("no no no", ["no"], 1, 0, 1 / 2, 0, 1),                # sets have one word, the others three
    ("fox red", ["red fox"], 1, 0, 1, 0, 0),                # order counts in exact match, in both
    ("red fox", ["wolf", "the red fox", "fox"], 4 / 5, 0, 1, 1, 1),     # the best alias
    ("in New York City", ["New York"], 2 / 3, 0, 2 / 3, 0, 1),          # P 2/4, R 1
    ("party", ["art"], 0, 0, 0, 0, 0),                      # cover-EM looks for words, not for letters
    ("Beyoncé", ["Beyonce"], 0, 0, 0, 0, 0),                # accents are not folded
    ("\uff26\uff2f\uff38", ["FOX"], 0, 0, 0, 0, 0),         # full-width letters are other letters
    ("东京", ["东京都"], 0, 0, 0, 0, 0),                      # without spaces one word, and another
    ("东京。", ["东京"], 0, 0, 0, 0, 0),                      # 。 is no ASCII punctuation: it stays, in both
    ("Москва!", ["москва"], 1, 1, 1, 1, 1),
    (unicodedata.normalize("NFD", "Zoé"), ["Zoé"], 1, 1, 1, 1, 1),
    ("Zoé", [unicodedata.normalize("NFD", "Zoé")], 1, 1, 1, 1, 1),
    ("A", ["A"], 1, 1, 1, 1, 1),                            # to SQuAD nothing is left of either
    ("The The", ["The The"], 1, 1, 1, 1, 1),
    ("blood type A", ["A"], 1 / 2, 0, 0, 0, 1),             # one of three words; SQuAD: two words and none
    ("a dog", ["A"], 2 / 3, 0, 0, 0, 0),                    # an article is no such answer
    ("B", ["A"], 0, 0, 0, 0, 0),
    ("", ["Fox"], 0, 0, 0, 0, 0),
    (None, ["A"], 0, 0, 0, 0, 0),                           # no answer is not "nothing left of the answer"
    (" ", ["A"], 0, 0, 0, 0, 0),
]


@pytest.mark.parametrize("answer, golds, f1_paper, em_paper, f1_squad, em_squad, cover", SCORED)
def test_scores_by_hand(answer, golds, f1_paper, em_paper, f1_squad, em_squad, cover):
    found = scores(answer, golds)
    assert (found["f1_paper"], found["f1_squad"]) == pytest.approx((f1_paper, f1_squad))
    assert (found["em_paper"], found["em_squad"], found["cover_em"]) == (em_paper, em_squad, cover)


def squad_script(prediction, gold):
    """(F1, exact match) as evaluate-v2.0.py of SQuAD computes them."""
    def tokens(text):
        text = "".join(ch for ch in text.lower() if ch not in set(string.punctuation))
        return " ".join(re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", text).split()).split()
    p, g = tokens(prediction), tokens(gold)
    same = sum(min(p.count(word), g.count(word)) for word in set(p))
    if not p or not g:
        return float(p == g), float(p == g)
    if not same:
        return 0.0, float(p == g)
    precision, recall = same / len(p), same / len(g)
    return 2 * precision * recall / (precision + recall), float(p == g)


def test_scores_agree_with_squads_script():
    rng = random.Random(0)
    words = ["a", "the", "An", "fox", "Fox", "red", "U.S.", "it's", "2,000", "é", "东京", "-", "!", "the-end"]
    for _ in range(2000):
        answer, gold = (" ".join(rng.choices(words, k=rng.randint(1, 4))) for _ in range(2))
        found = scores(answer, [gold])
        theirs = pytest.approx(squad_script(answer, gold))
        assert (found["f1_squad"], found["em_squad"]) == theirs, (answer, gold)
        assert found["cover_em"] >= found["em_squad"]


# ---- figures -----------------------------------------------------------------------------------------------

def test_a_rollout_is_measured_by_hand():
    assert measure(line()) == {
        "f1_paper": (pytest.approx(0.8), 1), "em_paper": (0.0, 1), "f1_squad": (1.0, 1), "em_squad": (1.0, 1),
        "cover_em": (1.0, 1), "turns": (3, 1), "searches": (2, 1), "tokens": (30, 1),
        "failed_searches": (1, 2), "cached_searches": (0, 2), "recall": (1, 2),
        "belief_first": (-2.0, 1), "belief_last": (-1.75, 1),
        "entropy_reduction": (0.25, 1), "gain_positive": (1, 1), "stop_answer": (1, 1), "stop_format": (0, 1),
        "stop_length": (0, 1), "stop_turns": (0, 1)}
    assert measure(line(supporting=["ONE"]))["recall"] == (1, 1)        # by title, in any case
    for missing in (math.nan, None):
        assert measure(line(beliefs=[-1.0, missing, -1.0]))["gain_positive"] == (False, False)
    cut = measure(line(stop="format", answer=None, supporting=[]))
    assert cut["f1_paper"] == (0.0, 1) and cut["stop_format"] == (1, 1) and cut["recall"] == (0, 0)
    cached = line()
    cached["turns"][0]["cached"] = True
    assert measure(cached)["cached_searches"] == (1, 2)
    del cached["turns"][0]["cached"]        # older files do not say
    assert measure(cached)["cached_searches"] == (0, 2)


def test_summary_and_samples_by_hand():
    """Question 1: F1 .8 and 0 of two samples; question 2: 0 and 0. Benchmark c has one question, right."""
    wrong = {"answer": "cat", "beliefs": [-1.0, -2.0]}
    rows = [line(), line(sample=1, **wrong), line(id="2", **wrong), line(id="2", sample=1, **wrong)]
    rows += [line(benchmark="c", sample=k, answer="the red fox", turns=[], supporting=[]) for k in range(2)]
    s = summarise(rows)
    value = lambda benchmark, name: s[benchmark][name]["value"]
    assert list(s) == ["b", "c", "macro average"] and s["b"]["questions"] == 2 and s["b"]["rollouts"] == 4
    assert value("b", "f1_paper") == pytest.approx(0.2) and value("b", "pass_f1") == pytest.approx(0.4)
    assert value("b", "pass_em") == 0.0 and value("c", "pass_em") == 1.0
    assert value("b", "entropy_reduction") == pytest.approx((0.25 - 3) / 4)
    assert value("b", "gain_positive") == 0.25
    assert value("b", "failed_searches") == 0.5 and s["c"]["failed_searches"] is None
    assert value("macro average", "failed_searches") == 0.5         # over the benchmarks where it is known
    assert value("macro average", "f1_paper") == pytest.approx((0.2 + 1) / 2)
    assert value("b", "recall") == 0.5 and s["c"]["recall"] is None
    f1 = s["b"]["f1_paper"]         # a resample may hold one of the two questions twice
    assert (f1["low"], f1["high"]) == (0.0, pytest.approx(0.4))


def test_bootstrap_on_known_cases():
    same = bootstrap(np.full((7, 1), 0.3), np.ones((7, 1)))
    assert same.shape == (2000, 1) and np.allclose(same, 0.3)
    # Two questions, 0 and 1: the mean of a resample is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4.
    two = bootstrap(np.array([[0.0], [1.0]]), np.ones((2, 1)), 4000)[:, 0]
    assert [np.mean(two == v) for v in (0, 0.5, 1)] == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
    # 100 questions, half of them right: binomial(100, 1/2) / 100; 2.5 % and 97.5 % points are .40 and .60.
    coin = bootstrap(np.arange(100)[:, None] % 2, np.ones((100, 1)), 4000)[:, 0]
    assert np.percentile(coin, [2.5, 97.5]) == pytest.approx([0.40, 0.60], abs=0.011)
    # A share of searches: 1 of 1 and 0 of 3 failed. Resamples give 1 / 1, 1 / 4 or 0 / 3.
    share = bootstrap(np.array([[1.0], [0.0]]), np.array([[1.0], [3.0]]), 4000)[:, 0]
    assert [np.mean(np.isclose(share, v)) for v in (1, 0.25, 0)] == pytest.approx([0.25, 0.5, 0.25], abs=0.03)


def outcomes(right, benchmark="x"):
    """A row per question, answered right or wrong."""
    return [line(benchmark=benchmark, id=str(k), answers=["fox"], answer="fox" if ok else "cat")
            for k, ok in enumerate(right)]


def test_compare_by_hand():
    """b is better on two of three questions and worse on one. The mean difference of a resample is not above
    0 if at most one of its three draws is a gain: (1/3)^3 + 3 (2/3) (1/3)^2 = 7/27, so p = 14/27."""
    row, = compare(outcomes([0, 0, 1]), outcomes([1, 1, 0]) + [line(benchmark="x", id="only b")])
    assert (row["questions"], row["win"], row["tie"], row["loss"]) == (3, 2, 0, 1)
    assert (row["a"], row["b"], row["difference"]) == pytest.approx((1 / 3, 2 / 3, 1 / 3))
    assert row["p"] == pytest.approx(14 / 27, abs=0.03) and (row["low"], row["high"]) == (-1, 1)
    clear, = compare(outcomes([0] * 20), outcomes([1] * 20))        # never the other way in 10,000 resamples
    assert clear["p"] == pytest.approx(1e-4) and clear["low"] == clear["high"] == 1
    equal, = compare(outcomes([1, 0]), outcomes([1, 0]))
    assert equal["p"] == 1 and (equal["win"], equal["tie"], equal["loss"]) == (0, 2, 0)
    both = compare(outcomes([0, 0]) + outcomes([1, 1, 1], "y"), outcomes([1, 1]) + outcomes([1, 1, 0], "y"))
    assert [r["benchmark"] for r in both] == ["x", "y", "macro average"]
    assert both[2]["difference"] == pytest.approx((1 - 1 / 3) / 2)
    assert (both[2]["win"], both[2]["tie"], both[2]["loss"]) == (2, 2, 1)
    for other in ([line(benchmark="z")], [{**outcomes([1])[0], "question": "Another?"}]):
        with pytest.raises(igpo.UserError, match="no question in common"):
            compare(outcomes([1]), other)


def test_compare_as_a_command(tmp_path, capsys):
    for name, rows in (("a", outcomes([0, 0, 1])), ("b", outcomes([1, 1, 0]) + [line(id="only b")])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rollouts.jsonl").write_text("".join(map(evaluation.one_line, rows)))
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert metrics.main([a, b, "--metric", "em_squad"]) == 0
    out = capsys.readouterr().out
    assert "EM SQuAD in %" in out and "1 only in B" in out and "only in A" not in out
    cells = ("x", "3", "33.33", "66.67", "+33.33", "[-100.00, +100.00]", r"0\.\d+", "2 / 0 / 1")
    assert re.search(r" +\| +".join(c if "\\" in c else re.escape(c) for c in cells) + r" +\|", out)
    (tmp_path / "a/rollouts.jsonl").write_text('{"question": "Who?", "answers": ["a"]}\n')
    for left, why in ((a, "holds no rollouts"), (str(tmp_path / "none"), "cannot be read")):
        assert metrics.main([left, b]) == 2
        err = capsys.readouterr().err
        assert why in err and err.startswith("tools.metrics: ") and err.count("\n") == 1


# ---- whole evaluations -------------------------------------------------------------------------------------

def test_an_evaluation_whole_and_gone_on_with(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["--limit", 4, "--rollout_batch", 2, "--out", "a", *TINY]
    code, out, err = run(capsys, *command)
    assert code == 0, err
    assert "4 of 200, drawn with seed 0" in out and re.search(r"\| Questions \| +4 \|", out)
    whole = (tmp_path / "a/rollouts.jsonl").read_text()
    rows = read_lines("a/rollouts.jsonl")
    assert [r["id"] for r in rows] == [q["id"] for q in load_benchmark("demo", limit=4, seed=0)]
    assert all(len(r["beliefs"]) == len(r["turns"]) <= 2 and r["stop"] in metrics.STOPS for r in rows)
    results = json.loads((tmp_path / "a/results.json").read_text())
    f1 = sum(f1_score(r["answer"], r["answers"]) for r in rows) / 4
    assert results["results"]["demo"]["f1_paper"]["value"] == pytest.approx(f1)
    assert "torch" in results["versions"]
    settings = results["settings"]
    assert settings["temperature"] == 0 and set(settings["fingerprints"]) == {"model", "search"}
    assert (tmp_path / "a/report.html").exists() and "F1" in (tmp_path / "a/results.md").read_text()
    # Cut in the middle of a line: the whole lines are kept, the rest is played again, and ends as before.
    cut = whole.splitlines(True)
    (tmp_path / "a/rollouts.jsonl").write_text("".join(cut[:3]) + cut[3][:40])
    code, out, _ = run(capsys, *command)
    assert code == 0 and "3 of them are there already" in out
    again = read_lines("a/rollouts.jsonl")
    assert again[:3] == rows[:3] and again[3]["turns"][0]["text"] == rows[3]["turns"][0]["text"]
    assert again[3]["beliefs"] == pytest.approx(rows[3]["beliefs"], abs=1e-4)
    # All is there: nothing is played.
    monkeypatch.setattr(evaluation, "play", lambda *a: pytest.fail("it was played for nothing"))
    assert run(capsys, *command)[0] == 0
    # Other settings, and a folder of something else.
    code, _, err = run(capsys, *command, "--max_turns", 1)
    assert code == 2 and "max_turns" in err and err.count("\n") == 1
    (tmp_path / "a/config.json").write_text("[]")
    code, _, err = run(capsys, *command)
    assert code == 2 and "holds something else" in err and err.count("\n") == 1


def test_samples_of_a_question_and_an_interruption(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["--limit", 2, "--n", 2, "--rollout_batch", 2, *TINY]
    score, chunks = evaluation.score, []
    def interrupted(*args):
        chunks.append(args)
        if len(chunks) == 2:
            raise KeyboardInterrupt
        return score(*args)
    monkeypatch.setattr(evaluation, "score", interrupted)
    code, _, err = run(capsys, *command)
    assert code == 130 and "same command goes on" in err
    kept = read_lines("results/policy-n2/rollouts.jsonl")
    assert [r["sample"] for r in kept] == [0, 1]
    code, out, err = run(capsys, *command)
    assert code == 0 and "2 of them are there already" in out and "temperature 1, 2 samples" in out, err
    rows = read_lines("results/policy-n2/rollouts.jsonl")
    assert rows[:2] == kept and [r["sample"] for r in rows] == [0, 1, 0, 1] and rows[2]["id"] == rows[3]["id"]
    assert "pass@n" in out


def test_a_closed_book(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "--limit", 4, "--no_search", "--max_new_tokens", 8)
    assert code == 0, err
    rows = read_lines("results/policy-closed-book/rollouts.jsonl")
    assert all(len(r["turns"]) == len(r["beliefs"]) == 1 and not r["turns"][0]["passages"] for r in rows)
    assert all((r["stop"] == "answer") == (r["answer"] is not None) for r in rows)
    answered = [r for r in rows if r["answer"]]
    assert answered and all(r["turns"][0]["text"].strip() == f"{r['answer']}\n</answer>" for r in answered)


def test_what_counts_as_an_answer_in_a_closed_book(monkeypatch):
    """The policy's words stand behind an open <answer>: up to </answer> they are the answer, without tags."""
    model, tokenizer = igpo.load_model(igpo.Config(**igpo.DEMO))
    written = iter([("Ann </answer>", "format"), ("</answer>", "format"), ("Ann <search></answer>", "format"),
                    ("Ann", "length"), ("Ann </think><search> q </search>", "turns")])
    def play(model, tokenizer, rollouts, search, cfg):
        assert cfg.max_turns == 1 and search is None
        for r in rollouts:
            assert tokenizer.decode(r.ids).endswith(igpo.SCHEMA) and not any(r.mask)
            text, r.stop = next(written)
            r.write(igpo.encode(tokenizer, text), by_policy=True)
    monkeypatch.setattr(evaluation, "play", play)
    rollouts = [igpo.begin(tokenizer, "Who?") for _ in range(5)]
    evaluation.answer_at_once(model, tokenizer, rollouts, igpo.Config())
    assert [(r.stop, r.answer) for r in rollouts] == [("answer", "Ann"), ("format", None), ("format", None),
                                                      ("length", None), ("format", None)]


def test_adapters_bring_the_episode_of_their_run(tmp_path, capsys, monkeypatch):
    """checkpoint/ of a run folder, best/ if it is named, a PEFT folder with a config.json of another make."""
    monkeypatch.chdir(tmp_path)
    cfg = igpo.Config(**{**igpo.DEMO, "max_turns": 2, "max_new_tokens": 24})
    model, _ = igpo.load_model(cfg)
    torch.manual_seed(1)
    for folder in ("checkpoint", "best"):
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(0, 0.05)
        igpo.save_adapter(model, tmp_path / folder)
    (tmp_path / "runs/x").mkdir(parents=True)
    for folder in ("checkpoint", "best"):
        (tmp_path / folder).rename(f"runs/x/{folder}")
    Path("runs/x/config.json").write_text(json.dumps(vars(cfg)))
    rows = {}
    for name in ("runs/x", "runs/x/best"):
        code, out, err = run(capsys, "--limit", 2, "--adapter", name)
        assert code == 0 and ("runs/x/checkpoint: 2" in out) == (name == "runs/x"), (out, err)
        folder = Path("results", {"runs/x": "x", "runs/x/best": "x-best"}[name])
        rows[name] = read_lines(folder / "rollouts.jsonl")
        settings = json.loads((folder / "config.json").read_text())
        assert settings["max_turns"] == 2 and settings["model"] == "demo/policy"
        assert settings["fingerprints"]["adapter"]
    first = [rows[name][0]["beliefs"][0] for name in rows]
    assert abs(first[0] - first[1]) > 1e-3
    Path("runs/x/config.json").write_text('{"architectures": ["Qwen2ForCausalLM"]}')
    code, _, err = run(capsys, "--limit", 2, "--adapter", "runs/x/best")
    assert code == 2 and "give --model too" in err and err.count("\n") == 1
    args = evaluation.parse_args(["--adapter", "runs/x/best", "--model", "demo/policy"])
    assert evaluation.load_config(args)[0].max_turns == igpo.Config().max_turns


def data_folder(folder, k=1, text="A short text."):
    """dev.jsonl with the first k demo questions, and a corpus of three passages that support each."""
    folder.mkdir()
    questions = load_benchmark("demo")[:k]
    rows = [{**q, "supporting": ["p1", "p2", "p3"], "data_source": "mine"} for q in questions]
    (folder / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = " ".join(q["question"] for q in questions)
    passages = [{"id": f"p{i}", "title": f"{words[:80]} {i}", "text": f"{words} {text}"} for i in (1, 2, 3)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(p) + "\n" for p in passages))
    return folder


def test_a_folder_of_data_brings_questions_and_corpus(tmp_path, capsys, monkeypatch):
    """Of long passages that counts, and is kept, which the policy was shown: each in part, or none."""
    monkeypatch.chdir(tmp_path)
    data_folder(tmp_path / "d", text="The sea is wide. " * 60)
    code, out, err = run(capsys, "--data", "d", "--passages", 3, "--max_info_tokens", 150, *TINY)
    assert code == 0 and "mine (all 1)" in out and "bm25:d/corpus.jsonl, 3 passages" in out, err
    row, = read_lines("results/policy/rollouts.jsonl")
    shown = [p for turn in row["turns"] for p in turn["passages"]]
    assert len(shown) == 3 and all(len(p["text"]) < 300 and p["text"].endswith(" ..") for p in shown)
    assert re.search(r"\| Recall +\| +100.0 \|", out)
    code, out, err = run(capsys, "--data", "d", "--passages", 3, "--max_info_tokens", 0, *TINY)
    assert code == 0 and re.search(r"\| Recall +\| +0.0 \|", out), err
    assert (tmp_path / "results/policy-2").exists()


def configuration(*argv):
    cfg, peft, names = evaluation.load_config(evaluation.parse_args([str(a) for a in argv]))
    return cfg.search, names


def test_which_questions_and_which_corpus(tmp_path, monkeypatch):
    """The command line comes before the run of the adapter, and a folder that is named brings both."""
    monkeypatch.chdir(tmp_path)
    data_folder(tmp_path / "d")
    data_folder(tmp_path / "e")
    run_folder = tmp_path / "x/checkpoint"
    run_folder.mkdir(parents=True)
    (run_folder / "adapter_config.json").write_text("{}")
    set_run = lambda **kw: Path("x/config.json").write_text(json.dumps(vars(igpo.Config(model="m", **kw))))
    set_run(data="d")
    assert configuration("--adapter", "x") == ("bm25:d/corpus.jsonl", ["d/dev.jsonl"])
    assert configuration("--adapter", "x", "--data", "e") == ("bm25:e/corpus.jsonl", ["e/dev.jsonl"])
    assert configuration("--adapter", "x", "--benchmark", "nq") == ("bm25:d/corpus.jsonl", ["nq"])
    set_run(dev="d/dev.jsonl", search="http://127.0.0.1:1/r")
    assert configuration("--adapter", "x") == ("http://127.0.0.1:1/r", ["d/dev.jsonl"])
    assert configuration("--adapter", "x", "--data", "e") == ("bm25:e/corpus.jsonl", ["e/dev.jsonl"])
    assert configuration("--adapter", "x", "--data", "e", "--search", "duckduckgo")[0] == "duckduckgo"
    (tmp_path / "e/test.jsonl").write_text((tmp_path / "e/dev.jsonl").read_text())
    assert configuration("--data", "e")[1] == ["e/test.jsonl"]
    assert configuration() == (f"bm25:{ROOT}/demo/corpus.jsonl", ["demo"])
    assert len(configuration("--benchmark", "all", "nq", "--no_search")[1]) == 7


# ---- what is refused ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, message", [
    (["--benchmark", "nq"], "--search"), (["--n", "2", "--temperature", "0"], "--n: samples"),
    (["--adapter", "nowhere", "--model", "x"], "adapter_config"), (["--max_turns", "0"], "at least 1"),
    (["--temperature", "nan"], "--temperature"), (["--temperature", "-1"], "at least 0.01, or 0"),
    (["--benchmark", "nosuch", "--search", "bm25:x"], "nosuch"), (["--data", "nosuch"], "nosuch/dev.jsonl"),
    (["--model", "nosuch"], "nosuch"), (["--search", "bm25:nosuch"], "no corpus nosuch")])
def test_mistakes_are_told_in_one_line(tmp_path, capsys, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, err = run(capsys, *argv)
    assert code == 2 and message in err and err.startswith("eval: ") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())         # no empty folder is left behind


def test_a_question_beyond_the_models_context_is_refused(tmp_path, capsys, monkeypatch):
    """And before anything is played."""
    monkeypatch.chdir(tmp_path)
    rows = [{"id": "short", "question": "Who?", "answers": ["Ann"]},
            {"id": "long", "question": "For the ship Merry Lynx, " * 400, "answers": ["Ann"]}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(evaluation, "play", lambda *a: pytest.fail("it was played"))
    code, _, err = run(capsys, "--benchmark", "q.jsonl", "--data", "demo", *TINY)
    assert code == 2 and "question long" in err and "2048" in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["q.jsonl"]
    # 24 tokens are left behind the prompt, and a closed book puts its own words before them.
    model, tokenizer = igpo.load_model(igpo.Config(**igpo.DEMO))
    words = 2048 - len(igpo.encode_prompt(tokenizer, "a")) - 64
    fits = {"id": "fits", "question": "a" + " a" * words, "answers": ["Ann"]}
    assert len(igpo.encode_prompt(tokenizer, fits["question"])) == 2048 - 64
    (tmp_path / "q.jsonl").write_text(json.dumps(fits) + "\n")
    code, _, err = run(capsys, "--benchmark", "q.jsonl", "--no_search", "--max_new_tokens", 64)
    assert code == 2 and "question fits" in err


def test_out_of_memory_is_told_in_one_line(tmp_path, capsys, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate ..")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "play", full)
    code, _, err = run(capsys, "--limit", 1, *TINY)
    assert code == 2 and "--rollout_batch" in err and err.count("\n") == 1


# ---- searches that fail, and corpora that change -----------------------------------------------------------

class Server:
    """What open_search gives: a corpus that finds itself in every query, or says why not."""
    corpus, error, asked = "A", None, 0

    def search_many(self, queries, k):
        Server.asked += 1
        found = [] if self.error else [Passage("1", "Tavo", f"From corpus {self.corpus}.")]
        return [Results(found, self.error) for _ in queries]


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "open_search", lambda *a: Server())
    monkeypatch.setattr(Server, "corpus", "A")
    monkeypatch.setattr(Server, "error", None)
    monkeypatch.setattr(Server, "asked", 0)
    return Server


def test_a_server_that_is_down_or_has_another_corpus(server, tmp_path, capsys, monkeypatch):
    command = ["--limit", 2, "--search", "http://127.0.0.1:8000/retrieve", *TINY]
    monkeypatch.setattr(server, "error", "HTTP 503")
    code, _, err = run(capsys, *command)
    assert code == 2 and "HTTP 503" in err and err.count("\n") == 1 and not list(tmp_path.iterdir())
    monkeypatch.setattr(server, "error", None)
    play = evaluation.play
    def dies(model, tokenizer, rollouts, search, cfg):      # after the probes
        server.error = "HTTP 503"
        play(model, tokenizer, rollouts, search, cfg)
    monkeypatch.setattr(evaluation, "play", dies)
    code, _, err = run(capsys, *command)
    assert code == 2 and "2 of the last 2 searches failed (HTTP 503)" in err and err.count("\n") == 1
    assert not read_lines("results/policy/rollouts.jsonl")
    monkeypatch.setattr(server, "error", None)
    monkeypatch.setattr(evaluation, "play", play)
    assert run(capsys, *command)[0] == 0 and len(read_lines("results/policy/rollouts.jsonl")) == 2
    # Another corpus at the same address: what was found in the first must not count for it.
    monkeypatch.setattr(server, "corpus", "B")
    assert run(capsys, *command)[0] == 0
    rows = read_lines("results/policy-2/rollouts.jsonl")
    assert len(rows) == 2 and "corpus B" in json.dumps(rows) and "corpus A" not in json.dumps(rows)


def test_fingerprints_of_searches(server, monkeypatch):
    questions = [{"question": f"q{k}"} for k in range(11)]
    prints = lambda **kw: evaluation.search_print(igpo.Config(**kw), questions)
    first = prints(search="http://127.0.0.1:8000/retrieve")
    assert first == prints(search="http://127.0.0.1:8000/retrieve") != "unknown" and server.asked == 2
    server.corpus = "B"
    assert prints(search="http://127.0.0.1:8000/retrieve") != first
    assert prints(search="duckduckgo") == "unknown"
    server.error = "not in the cache"       # with the cache alone no server is needed
    assert prints(search="http://127.0.0.1:8000/retrieve", search_cache="only") != first
    with pytest.raises(igpo.UserError, match="not in the cache"):
        prints(search="http://127.0.0.1:8000/retrieve")


def test_fingerprints_of_weights(tmp_path, monkeypatch):
    commit, repo = "0123456789abcdef0123456789abcdef01234567", tmp_path / "models--owner--name"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert evaluation.weights_print("owner/name") == evaluation.weights_print("no/such/name") == "unknown"
    for name, text in ((f"snapshots/{commit}/config.json", "{}"), ("refs/main", commit)):
        (repo / name).parent.mkdir(parents=True)
        (repo / name).write_text(text)
    assert evaluation.weights_print("owner/name") == evaluation.weights_print("name", "owner/name") == commit
    (tmp_path / "m").mkdir()
    (tmp_path / "m/model.safetensors").write_bytes(b"1" * 100)
    (tmp_path / "m/README.md").write_text("x")
    first = evaluation.weights_print(str(tmp_path / "m"), "owner/name")
    (tmp_path / "m/README.md").write_text("y")
    assert evaluation.weights_print(str(tmp_path / "m")) == first
    (tmp_path / "m/model.safetensors").write_bytes(b"1" * 99 + b"2")
    second = evaluation.weights_print(str(tmp_path / "m"))
    (tmp_path / "m/chat_template.jinja").write_text("{{ messages }}")
    assert len({first, second, evaluation.weights_print(str(tmp_path / "m"))}) == 3


def searching(*failed):
    """A row with a search for each flag."""
    turn = line()["turns"][0]
    return line(turns=[{**turn, "error": "down" if fails else None} for fails in failed])


def test_when_the_search_counts_as_down():
    check = lambda rows, new, last=False: evaluation.stop_if_search_is_down(rows, new, last)
    good, bad = [searching(False)] * 20, [searching(True)]
    check(good, bad, last=True)             # a failure in a small last chunk
    check([], bad * 9)                      # too few to say
    for rows, new, last, told in (
            ([], bad * 10, False, "10 of the last 10"), ([], bad * 2, True, "2 of the last 2"),
            (good, bad * 6, False, "6 of the last 10"), (good, bad * 12, False, "12 of the last 12")):
        with pytest.raises(igpo.UserError, match=told):
            check(rows, new, last)
    check(good, bad * 5)                    # half of the last ten
    check(good, [line(turns=[])], last=True)


def test_json_has_no_nan():
    assert json.loads(evaluation.one_line({"beliefs": [math.nan, -math.inf, 1.5], "text": "Zoé\u2028"})) == {
        "beliefs": [None, None, 1.5], "text": "Zoé\u2028"}
    assert evaluation.one_line({"text": "Zoé\u2028"}).count("\n") == 1


# ---- as a program ------------------------------------------------------------------------------------------

def test_an_ascii_terminal(tmp_path):
    data_folder(tmp_path / "Zoé")
    done = program(ROOT / "eval.py", "--data", tmp_path / "Zoé", "--no_search", "--max_new_tokens", 4,
                   "--out", tmp_path / "r", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "| F1" in done.stdout, done.stderr


@pytest.mark.skipif(not LONG, reason="set IGPO_LONG to start several processes")
def test_two_processes_share_the_questions(tmp_path):
    argv = (ROOT / "eval.py", "--limit", 3, "--rollout_batch", 1, *TINY, "--out")
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29517", "--")
    for command in ((*torchrun, *argv, tmp_path / "two"), (*argv, tmp_path / "one")):
        done = program(*command)
        assert done.returncode == 0 and done.stdout.count("3 rollouts on demo") == 1, done.stderr
        assert "destroy_process_group" not in done.stderr and "Traceback" not in done.stderr
    one, two = (read_lines(tmp_path / name / "rollouts.jsonl") for name in ("one", "two"))
    ends = lambda rows: [(r["id"], r["stop"], r["answer"], [t["text"] for t in r["turns"]]) for r in rows]
    assert ends(one) == ends(two)
    # What the first process refuses is told once, and ends the other.
    done = program(*torchrun, *argv, tmp_path / "two", "--seed", 1)
    assert done.returncode and done.stderr.count("eval: --out") == 1
    assert "Connection closed" not in done.stderr
