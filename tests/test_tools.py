"""tools/comparators.py by hand; tools/memory.py against counted tensors and what a GPU saw; tools/explain.py;
tools/check.py, where each thing that can go wrong is broken on purpose."""
import copy
import doctest
import itertools
import json
import math
import random
import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import igpo
from igpo import Config, Rollout, UserError, unwrap
from search_tool import Passage, Results, f1_score
from tests.common import LONG, jsonl
from tools import check as checking
from tools import comparators, explain, memory
from tools.comparators import (CREDITS, a2tgpo, dbelief, dr_venus, dr_venus_scaled, gigpo_advantages,
                               stepsearch_rewards)
from tools.memory import memory_card


def test_docstring_examples():
    results = doctest.testmod(comparators)
    assert results.attempted >= 7 and results.failed == 0


# ---- comparators: the mathematics --------------------------------------------------------------------------

def about(*rows):
    return [pytest.approx(row) for row in rows]


def found(id, text):
    return Passage(id, "", text)


def test_stepsearch_by_hand():
    # Two gold passages without a common word. Each found whole adds 1/2; seen again it only costs.
    fox, sea, tree = found("1", "red fox"), found("2", "blue sea"), found("3", "tall tree")
    rewards = stepsearch_rewards([[fox], [fox, tree], [sea]], [["red fox"], ["blue sea"]])
    assert rewards == pytest.approx([0.5, -0.5, 0.5])
    # Two texts: "red" is in both, "fox" and "sea" in one of them each.
    rare, common = math.log(3 / 2) + 1, math.log(3 / 3) + 1
    cosine = common**2 / (common**2 + rare**2)
    assert stepsearch_rewards([[found("1", "red sea")]], [["red fox"]]) == pytest.approx([cosine])
    # Then comes the passage itself, and only the increase counts. Three texts: "red" in all, "fox" in two.
    red, fox, sea = math.log(4 / 4) + 1, math.log(4 / 3) + 1, math.log(4 / 2) + 1
    first = red**2 / math.sqrt((red**2 + sea**2) * (red**2 + fox**2))
    rewards = stepsearch_rewards([[found("1", "red sea")], [found("2", "red fox")], []], [["red fox"]])
    assert rewards == pytest.approx([first, 1 - first, 0.0])


def test_stepsearch_takes_either_part_of_an_article():
    # One of two parts found whole covers the article, and the other part adds nothing to that.
    retrieved = [[found("1", "blue sea")], [found("2", "red fox")]]
    rewards = stepsearch_rewards(retrieved, [["red fox", "blue sea"]])
    assert rewards == pytest.approx([1.0, 0.0])


def test_gigpo_by_hand():
    # Outcomes 1, 0, 0.5 have z = 1, -1, 0 times sqrt(1.5). All start in "", which repeats that. Two meet "x".
    z = math.sqrt(1.5)
    states, outcomes = [["", "x"], ["", "x", "y"], ["", "z"]], [1.0, 0.0, 0.5]
    assert gigpo_advantages(states, outcomes) == about([2 * z, z + 1], [-2 * z, -z - 1, -z], [0, 0])
    assert gigpo_advantages(states, outcomes, omega=0.0) == about([z, z], [-z] * 3, [0, 0])
    # Discounted by 1/2 a turn to the end, outcomes in "" are 0.5, 0, 0.25: the same z. Those in "x": 1 and 0.
    assert gigpo_advantages(states, outcomes, gamma=0.5)[0] == pytest.approx([2 * z, z + 1])
    # A state met twice by one rollout counts twice: 0.5 and 1 against 0.
    advantages = gigpo_advantages([["", ""], [""]], [1.0, 0.0], gamma=0.5)
    assert advantages[0] == pytest.approx([1 + 0.0, 1 + 0.5 / math.sqrt(1 / 6)])


def test_dr_venus_by_hand():
    # Gains 1, 0, 2 have the variance 2/3, and are not centred. Outcomes are -1 and +1, in every turn.
    s = math.sqrt(2 / 3)
    assert dr_venus([[1.0, 0.0], [2.0]], [0.0, 1.0]) == about([1 / s - 1, -1, -1], [2 / s + 1, 1])
    assert dr_venus([[0.5], [0.5]], [0.0, 1.0]) == [[-1.0, -1.0], [1.0, 1.0]]       # gains that agree


def test_dr_venus_scaled_by_hand():
    # Gains 1, 1, 3 of the first group: mean 5/3, deviation sqrt(8/9). Those of the second are -1 and +1.
    h = math.sqrt(0.5)
    size_of_gains, size_of_outcomes = (h + h + 2 * h + 1 + 1) / 5, (1 + 1 + 0 + 0) / 4
    f = size_of_outcomes / size_of_gains
    step = dr_venus_scaled([[[1.0, 1.0], [3.0]], [[1.0], [3.0]]], [[0.0, 1.0], [0.5, 0.5]])
    assert step[0] == about([f * -2 * h - 1, f * -h - 1, -1], [f * 2 * h + 1, 1])
    assert step[1] == about([-f, 0], [f, 0])
    # Where no outcome differs, gains keep 0.3 of their size.
    assert dr_venus_scaled([[[1.0], [3.0]]], [[0.5, 0.5]])[0] == about([-0.3, 0], [0.3, 0])
    # The mean size of these gains is 1/50, that of the outcomes 1: a factor of 50, cut to 10.
    few = [[[1.0], [1.0]]] * 49 + [[[1.0], [3.0]]]
    assert dr_venus_scaled(few, [[0.0, 1.0]] * 50)[-1] == about([-11, -1], [11, 1])
    assert dr_venus_scaled([[[], []]], [[0.0, 1.0]]) == [[[-1.0], [1.0]]]           # nobody searched


def test_a2tgpo_by_hand():
    # By turn gains 1 and 3 are -1 and +1, and 5 is alone. From its first turn the first rollout has two to
    # sum, the second one. Outcomes are +1 and -1.
    advantages = a2tgpo([[1.0, 5.0], [3.0]], [1.0, 0.0])
    assert advantages == about([0.3 * -1 / math.sqrt(2) + 1, 0.3 * 0 + 1, 1], [0.3 * 1 - 1, -1])


def test_dbelief_by_hand():
    # Rewards 1 - 0.05 * 3 + 0.1 * (2, 0, 0), for a loss of belief costs nothing; 0 - 0.05 * 2 + 0.1 * (1, 0).
    # So 1.05 against 0 in the first turn, 0.85 against -0.1 in the second, and 0.85 alone in the third.
    assert dbelief([[2.0, -4.0], [1.0]], [1.0, 0.0]) == about([1, 1, 0], [-1, -1])
    # Answered at once, twice rightly: 0.95, 0.95 and -0.05.
    h = math.sqrt(0.5)
    assert dbelief([[], [], []], [1.0, 1.0, 0.0]) == about([h], [h], [-2 * h])
    # A search that gains half a nat pays for its turn: 0.95 against 1 - 0.1 + 0.1 * 0.5.
    assert dbelief([[], [0.5]], [1.0, 1.0]) == [[0.0], [0.0, 0.0]]


def played_step():
    """Two questions of two rollouts each, as train_step() hands them over. The first of each is right."""
    texts = {"a": "red fox", "b": "blue sea", "c": "tall tree"}

    def r(*ids):
        retrieved = [Results([found(i, texts[i])]) for i in ids]
        return Rollout([0], [1], list(range(1, len(ids) + 2)), retrieved=retrieved)
    rollouts = [r("a", "b"), r("c"), r("a"), r("a")]
    beliefs = [[-3.0, -2.0, -1.0], [-3.0, -3.0], [-3.0, -1.0], [-3.0, -2.0]]
    return dict(rollouts=rollouts, beliefs=beliefs, outcomes=[1.0, 0.0, 1.0, 0.0], model=None, tokenizer=None,
                search=None)


def test_credits_of_a_step_by_hand(tmp_path):
    corpus = [{"id": i, "title": title, "text": text} for i, title, text in (
        ("a", "Fox", "red fox"), ("b", "Sea", "blue sea"), ("c", "Tree", "tall tree"))]
    jsonl(tmp_path / "corpus.jsonl", *map(json.dumps, corpus))
    question = {"id": "1", "question": "?", "answers": ["x"], "supporting": ["a", "Sea"]}
    jsonl(tmp_path / "train.jsonl", json.dumps(question))
    cfg = Config(group=2, data=str(tmp_path))
    of = lambda name: CREDITS[name](**played_step(), asked=[question] * 4, cfg=cfg)
    # Outcomes are +1 and -1 in both groups, and so are the starts, one state. The second shares {a} too.
    assert of("gigpo") == [[2.0, 1.0, 1.0], [-2.0, -1.0], [2.0, 2.0], [-2.0, -2.0]]
    # Each of a and b adds half of the coverage: centred by turn 1/2 against 0, then nothing to compare with.
    assert of("stepsearch") == [[0.75, 0.5, 0.5], [-0.75, -0.5], [0.5, 0.5], [-0.5, -0.5]]
    # Log-probability gains of the groups: 1, 1, 0 (deviation sqrt(2)/3) and 2, 1 (1/2).
    s = math.sqrt(2) / 3
    assert of("dr-venus") == about([1 / s + 1, 1 / s + 1, 1], [0 - 1, -1], [4 + 1, 1], [2 - 1, -1])
    # Probability gains by turn: the first rollout of each group gains more in its first.
    w = 0.3 / math.sqrt(2)
    assert of("a2tgpo") == about([w + 1, 1, 1], [-0.3 - 1, -1], [0.3 + 1, 1], [-0.3 - 1, -1])
    # A belief that is no number: no advantage of the step is one, so that update() skips it.
    broken = {**played_step(), "beliefs": [[-1.0, math.nan], [0.0], [0.0], [0.0]]}
    for name in CREDITS:
        step = CREDITS[name](**broken, asked=[question] * 4, cfg=Config(group=2))
        assert [len(row) for row in step] == [2, 1, 1, 1] and all(math.isnan(a) for row in step for a in row)


def test_supporting_passages_are_found_by_id_and_else_by_title(tmp_path):
    corpus = [{"id": "7", "title": "Tavo bridge", "text": "It was built\n by <b>Mira</b>."},
              {"id": "8", "title": "Tavo bridge", "text": "It fell."},
              {"id": "9", "title": "7", "text": "A number."}]
    jsonl(tmp_path / "c.jsonl", *map(json.dumps, corpus))

    def texts(*names):
        question = {"id": "q1", "question": "who?", "answers": ["Mira"], "supporting": names}
        jsonl(tmp_path / "q.jsonl", json.dumps(question))
        comparators.supporting_texts.cache_clear()
        return comparators.supporting_texts(str(tmp_path / "c.jsonl"), str(tmp_path / "q.jsonl"))
    both = ["It was built by ‹b›Mira‹/b›.", "It fell."]                     # as a search brings them
    assert texts("tavo  BRIDGE", "7") == {"tavo bridge": both, "7": both[:1]}
    with pytest.raises(UserError, match="question q1 of .*q.jsonl names passage Oss, which .*c.jsonl lacks"):
        texts("8", "Oss")
    with pytest.raises(UserError, match="names no supporting passages"):
        texts()
    with pytest.raises(UserError, match="corpus"):
        comparators.stepsearch(outcomes=[], rollouts=[], asked=[], cfg=Config(search="http://127.0.0.1/x"))


# ---- comparators: with forwards and rollouts of their own --------------------------------------------------

@pytest.fixture(scope="module")
def step(demo, played):
    """Two groups of three rollouts of the demo, as train_step() hands them over."""
    rollouts, golds = copy.deepcopy(played[0][:6]), played[1][:6]
    _, beliefs = igpo.score(demo.model, demo.tokenizer, rollouts, golds, demo.cfg)
    outcomes = [igpo.outcome_reward(r, g, -0.1) for r, g in zip(rollouts, golds)]
    asked = [q for q in demo.questions[:2] for _ in range(3)]
    return dict(model=demo.model, tokenizer=demo.tokenizer, search=demo.search, rollouts=rollouts,
                beliefs=beliefs, outcomes=outcomes, asked=asked, cfg=demo.cfg)


def test_values_by_monte_carlo(demo, step, monkeypatch):
    """Each value is the mean of F1 * 0.9^turns over rollouts that begin as this one up to the boundary."""
    taken, honest = [], igpo.play

    def watched(model, tokenizer, live, search, cfg):
        taken.extend((list(s.ids), s) for s in live)
        return honest(model, tokenizer, live, search, cfg)
    monkeypatch.setattr(igpo, "play", watched)
    rollouts, asked, cfg = step["rollouts"][:3], step["asked"][:3], replace(demo.cfg, rollout_batch=7)
    values, tokens = comparators.mc_values(demo.model, demo.tokenizer, rollouts, asked, demo.search, cfg, 2)
    assert len(taken) == 2 * sum(len(r.boundaries) for r in rollouts)
    generated, starts = 0, []
    for r, q, vs in zip(rollouts, asked, values, strict=True):
        for t, (b, v) in enumerate(zip(r.boundaries, vs, strict=True)):
            mine = [s for ids, s in taken if ids == r.ids[:b]]      # with those of equal prefixes
            generated += sum(sum(s.mask[b:]) for s in mine) / len(mine) * 2
            assert all(s.stop and len(s.boundaries) > t and len(s.ids) == len(s.mask) for s in mine)
            worth = [f1_score(s.answer, q["answers"]) * 0.9 ** len(s.boundaries) for s in mine]
            if len(mine) == 2:
                assert v == pytest.approx(sum(worth) / 2)
            elif t == 0:
                starts.append((v, sum(worth) / 6))                  # 3 rollouts of the group, 2 tries each
    assert len(starts) == 3 and all(v == pytest.approx(worth) for v, worth in starts)
    assert tokens == pytest.approx(generated) and tokens > 0


def test_random_baseline_against_one_forward_per_text(demo, step):
    """Of each search: exp(b) less exp of the belief after other passages, in a text put together here."""
    rollouts, asked = step["rollouts"], step["asked"]
    seen, honest = [], igpo.score

    def watched(model, tokenizer, swapped, golds, cfg):
        seen.extend(zip(swapped, golds))
        return honest(model, tokenizer, swapped, golds, cfg)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(igpo, "score", watched)
        torch.manual_seed(5)
        advantages = comparators.random_baseline(**step)
    swapped, schema, gains = iter(seen), igpo.encode(demo.tokenizer, igpo.SCHEMA), []
    for r, q, beliefs in zip(rollouts, asked, step["beliefs"]):
        gains.append([])
        for t, after in enumerate(beliefs[1:]):
            other, gold = next(swapped)
            own = r.mask.index(0, r.boundaries[t])
            assert other.ids[:own] == r.ids[:own] and gold == q["answers"]      # the same turns and query
            assert own < len(other.ids) <= r.boundaries[t + 1] and other.boundaries == [len(other.ids)]
            shown = demo.tokenizer.decode(other.ids[own:])
            assert shown.startswith("\n<information>\n(1) ") and shown.endswith("</information>\n<think>")
            others = [s for s, a in zip(rollouts, asked) if a is not q]         # of the other question
            titles = {p.title for s in others for some in s.retrieved for p in some}
            assert re.search(r"\(1\) (.*?):", shown)[1] in titles
            probe = other.ids + schema + igpo.encode_gold(demo.tokenizer, gold)
            with torch.no_grad():
                logp = demo.lm(torch.tensor([probe], device=demo.lm.device)).logits[0].log_softmax(-1)
            places = range(len(other.ids) + len(schema) - 1, len(probe) - 1)
            belief = sum(logp[j, probe[j + 1]].item() for j in places) / len(places)
            gains[-1].append(math.exp(after) - math.exp(belief))
    assert next(swapped, None) is None and sum(map(len, gains)) > 6
    outcomes = step["outcomes"]
    expected = [row for i in (0, 3) for row in igpo.turn_advantages(gains[i:i + 3], outcomes[i:i + 3])]
    assert [len(row) for row in advantages] == [len(row) for row in expected]
    assert all(a == pytest.approx(e, abs=1e-4) for a, e in zip(advantages, expected))
    torch.manual_seed(5)
    assert comparators.random_baseline(**step) == advantages        # a step that is done again draws the same
    with pytest.raises(UserError, match="--questions"):
        comparators.random_baseline(**{**step, "cfg": replace(demo.cfg, questions=1)})


def test_comparators_as_a_program(options, tmp_path, capsys):
    """It trains, resumes, keeps the number of Monte Carlo rollouts, and tells what they cost."""
    out, short = tmp_path / "run", [*options, "--max_turns", "2", "--eval_every", "0"]
    reasonrag = ["--credit", "reasonrag", "--mc_rollouts", "1"]
    assert comparators.main([*short, *reasonrag, "--steps", "1", "--out", str(out)]) == 0
    assert re.search(r"reasonrag: \d+ tokens generated for its values, besides \d+ of the rollouts",
                     capsys.readouterr().out)
    assert comparators.main(["--resume", str(out), "--steps", "2"]) == 2
    assert "started with --mc_rollouts 1" in capsys.readouterr().err
    assert igpo.main(["--resume", str(out), "--steps", "2"]) == 2
    assert "tools/comparators.py" in capsys.readouterr().err
    assert comparators.main(["--resume", str(out), "--steps", "2", "--mc_rollouts", "1"]) == 0
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2]
    with pytest.raises(SystemExit):
        comparators.main(["--help"])
    assert "--mc_rollouts" in (said := capsys.readouterr().out) and "--batch_tokens" in said


@pytest.mark.parametrize("credit", CREDITS if LONG else ["dr-venus-scaled"])
def test_each_comparator_trains(credit, options, tmp_path):
    short = [*options, "--max_turns", "2", "--eval_every", "0", "--steps", "1"]
    assert comparators.main([*short, "--credit", credit, "--out", str(tmp_path / "run")]) == 0


# ---- memory ------------------------------------------------------------------------------------------------

def test_memory_card_by_hand(capsys):
    """2 layers of width 8, 16 in the MLP, 2 heads of 4 with 1 for keys, 10 words; LoRA of rank 1."""
    shape = Qwen2Config(vocab_size=10, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
                        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
                        max_position_embeddings=1000)
    model = get_peft_model(Qwen2ForCausalLM(shape), LoraConfig(r=1, target_modules="all-linear"))
    cfg = Config(max_turns=2, max_new_tokens=10, max_info_tokens=20, rollout_batch=3, batch_tokens=500,
                 questions=2, group=2, gradient_checkpointing=False)
    card = memory_card(model, cfg)
    # q 64 + 8, k and v 32 + 4 each, o 64, MLP 3 * 128, norms 16: 608 a layer. Words 80, the last norm 8.
    assert card["weights"] == 4 * (2 * 608 + 80 + 8)
    assert card["adapter"] == 4 * 4 * 2 * (16 + 12 + 12 + 16 + 24 + 24 + 24)
    # The longest rollout: 300 + 2 * 10 + (20 + 20) = 360. Keys and values of 4 in 2 layers: 64 bytes each.
    # Results of 40 tokens pass the MLP, 16 * 24 bytes each; for all heads keys and values are 64 bytes each.
    assert card["rollouts"] == 3 * (64 * 360 + max(16 * 24 * 40, 64 * 360))
    assert card["scoring"] == 500 * (64 + 16 * 24)
    # 4 rollouts are all there is: 1,440 tokens, less than these.
    assert memory_card(model, replace(cfg, batch_tokens=2000))["scoring"] == 1440 * (64 + 16 * 24)
    assert card["update"] == 2 * 500 * (18 * 8 + 16 * 16) + max(500 * (14 * 8 + 8 * 16), 16 * 256 * 10)
    assert card["peak"] == card["weights"] + card["adapter"] + card["update"]
    again = memory_card(model, replace(cfg, gradient_checkpointing=True))
    assert again["update"] == 2 * 500 * 8 * 4 + 500 * (32 * 8 + 24 * 16)
    # Of 100 tokens: the cache has room for a turn more, results are a turn's share, batches are 4 rollouts.
    seen = memory_card(model, cfg, 100)
    assert seen["rollouts"] == 3 * (64 * 110 + max(16 * 24 * 40, 64 * 110))
    assert seen["scoring"] == 400 * (64 + 16 * 24)
    table = memory.memory_table(model, cfg, card["peak"], 100)
    assert "100 tokens" in table and max(map(len, table.splitlines())) <= 100


def shape_of_1_5b():
    """Qwen2.5-1.5B without its weights."""
    with torch.device("meta"):
        lm = Qwen2ForCausalLM(Qwen2Config(
            vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
            num_attention_heads=12, num_key_value_heads=2, max_position_embeddings=32_768,
            tie_word_embeddings=True))
        return get_peft_model(lm.to(torch.bfloat16), LoraConfig(r=16, target_modules="all-linear"))


def test_memory_is_what_a_gpu_saw():
    """Peaks of Qwen2.5-1.5B's shape on an H200, docs/gpu.md: of the update, and of a whole step."""
    model, cfg, gib = shape_of_1_5b(), Config(), 2**30
    for tokens, update, step in ((8192, 5.26, None), (16_384, 7.21, 7.21), (24_576, 9.17, None)):
        card = memory_card(model, replace(cfg, batch_tokens=tokens), 1554)
        assert card["weights"] + card["adapter"] + card["update"] == pytest.approx(update * gib, rel=0.1)
        assert step is None or card["peak"] == pytest.approx(step * gib, rel=0.25)
    at_most = memory_card(model, cfg)
    assert card["rollouts"] < at_most["rollouts"] and card["peak"] < 10 * gib < at_most["peak"]


class Live(TorchDispatchMode):
    """The most bytes of tensors that lived at once within this context, of those that were made in it."""

    def __init__(self):
        super().__init__()
        self.known, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.known[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.known = {key: value for key, value in self.known.items() if not value[0].expired()}
        self.most = max(self.most, sum(n for _, n in self.known.values()))
        return out


def counted_model(recomputing):
    lm = Qwen2ForCausalLM(Qwen2Config(vocab_size=1000, hidden_size=192, intermediate_size=1120,
                                      num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=1))
    if recomputing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    return get_peft_model(lm, LoraConfig(r=4, target_modules="all-linear")).eval()


@pytest.mark.parametrize("recomputing", [True, False])
def test_memory_card_against_tensors_that_lived(recomputing):
    """Update and scoring of 8 rollouts of 256 tokens, on a model small enough to count."""
    model, draw = counted_model(recomputing), random.Random(0)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    rollouts = []
    for _ in range(8):
        r = Rollout([draw.randrange(1000) for _ in range(56)], [0] * 56, [56])
        for _ in range(4):
            r.write([draw.randrange(1000) for _ in range(25)], True)
            r.write([draw.randrange(1000) for _ in range(25)], False)
            r.boundaries.append(len(r.ids))
        rollouts.append(r)
    cfg = Config(batch_tokens=2048, questions=1, group=8, gradient_checkpointing=recomputing)
    card = memory_card(model, cfg, 256)
    zeros, still = [torch.zeros(100)] * 8, torch.optim.SGD(model.parameters(), lr=0.0)
    with Live() as live:        # it sees the weights too, as the views that matrix products take of them
        igpo.update(model, still, rollouts, zeros, zeros, [[1.0] * 5] * 8, cfg)
    assert live.most == pytest.approx(card["update"] + weights, rel=0.25)
    with torch.no_grad(), Live() as live:
        igpo.token_logps(unwrap(model), rollouts, 1.0, [1, 2, 3], [[4, 5]] * 8)
    assert live.most == pytest.approx(card["scoring"] + weights, rel=0.25)


def write_group(folder, names, limit, used, cached):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip((*names, "memory.stat"), (limit, used, f"anon 5\n{cached[0]} {cached[1]}")):
        (folder / name).write_text(f"{text}\n")


def test_memory_of_a_container(tmp_path, monkeypatch):
    root, own = tmp_path / "cgroup", tmp_path / "own"
    assert memory.cgroup_room(str(root), str(own)) == math.inf             # no control groups here
    two, one = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
    own.write_text("0::/jobs/7\n")
    write_group(root, two, "max", 900, ("inactive_file", 0))
    write_group(root / "jobs", two, 1000, 600, ("inactive_file", 100))
    write_group(root / "jobs/7", two, 2000, 300, ("inactive_file", 0))
    assert memory.cgroup_room(str(root), str(own)) == 500                   # the group around it decides
    own.write_text("12:cpu,cpuacct:/x\n5:memory:/docker/abc\n0::/\n")       # version 1, seen from outside
    (root / "jobs/memory.max").write_text("max\n")
    write_group(root / "memory", one, 700, 300, ("total_inactive_file", 50))
    assert memory.cgroup_room(str(root), str(own)) == 450

    monkeypatch.setattr(memory, "cgroup_room", lambda: 1200)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert memory.free_memory() == 1200
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")                             # processes of one host share it
    assert memory.free_memory() == 400
    held = torch.nn.Linear(10, 10, bias=False)                              # what it has already is not lost
    assert memory.free_memory(held) == 400 + 400
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)           # a GPU's: free, and held by torch
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (50, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 7)
    assert memory.free_memory(held) == 57


def test_the_largest_sizes_fit_and_twice_of_them_do_not():
    model, cfg = shape_of_1_5b(), Config(questions=64, group=16)
    for gb in (8, 80):
        sizes = memory.largest_sizes(model, cfg, gb * 10**9)
        for name, phases in memory.PHASES.items():
            peak = lambda n: max(memory_card(model, replace(cfg, **{name: n}))[phase] for phase in phases)
            base = memory_card(model, cfg)["weights"] + memory_card(model, cfg)["adapter"]
            assert base + peak(sizes[name]) <= gb * 10**9 and sizes[name] >= 1
            assert sizes[name] == 2**20 or base + peak(2 * sizes[name]) > gb * 10**9
    assert set(memory.largest_sizes(model, cfg, 10**9).values()) == {0}
    assert "no batch" in memory.memory_table(model, cfg, 10**9)


def test_memory_as_a_program(monkeypatch, capsys, tmp_path):
    assert memory.main(["--longest", "400", "--group", "4"]) == 0
    said = capsys.readouterr().out
    assert "1M parameters" in said and "400 tokens" in said and "--rollout_batch up to" in said
    monkeypatch.setattr(memory, "free_memory", lambda model=None: 10**6)
    assert memory.main([]) == 1
    capsys.readouterr()
    for argv, text in ((["--resume", "x"], "nothing to resume"), (["--resume=x"], "nothing to resume"),
                       (["--model", str(tmp_path)], str(tmp_path))):
        assert memory.main(argv) == 2
        err = capsys.readouterr().err
        assert text in err and err.count("\n") == 1


# ---- explain -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("credit", ["igpo", "igpo-v2", "grpo"] if LONG else ["igpo-v2"])
def test_explain_walks_through_the_equations(credit, options, capsys):
    assert explain.main([*options, "--credit", credit]) == 0
    said = capsys.readouterr().out
    for what in (*(f"Eq. {n}" for n in range(2, 8)), "Rollout A", "Rollout B", "masked", "ratio"):
        assert what in said
    assert len(said.splitlines()) < 90
    turns = 0
    for part in re.split(r"Rollout [AB]:", said)[1:]:           # Eq. 6 sums what is printed for Eq. 5
        shown = re.findall(r"normalised \(Eq. 5\) (\S+);  advantage \(Eq. 6\) (\S+)", part)
        rewards, advantages = ([float(x) for x in column] for column in zip(*shown))
        sums = list(itertools.accumulate(reversed(rewards)))[::-1]
        assert advantages == pytest.approx(sums, abs=0.002 * len(sums))
        turns += len(shown)
    assert turns >= 2
    last = re.search(r"loss (\S+) before the update, (\S+) after", said)
    assert float(last[2]) < float(last[1])                      # Eq. 7 is a loss that the update lowers
    assert explain.main([*options, "--resume", "x"]) == explain.main([*options, "--train", "none.jsonl"]) == 2


# ---- check -------------------------------------------------------------------------------------------------

ORDER = ["pass", "warn", "fail"]
POLICYS = {"gold can be found", "format kept", "context", "signal", "answer form"}      # what follows from it


def trial(demo, like=None, keep=(), **changes):
    """A trial of the demo. What is kept of another trial need not be made again."""
    cfg = replace(demo.cfg, **changes)
    t = checking.Trial(cfg, demo.model, demo.tokenizer, demo.questions[:40], demo.search)
    vars(t).update({name: getattr(like, name) for name in keep})
    return t


@pytest.fixture(scope="module")
def healthy(demo):
    """(a trial in which all is well, the status of each check)."""
    torch.manual_seed(3)
    t = trial(demo)
    return t, {name: status for name, (status, _, _) in checking.run_checks(t).items()}


def test_check_of_the_demo(healthy, capsys, monkeypatch):
    """Data and mathematics of the demo are in order; a picture and a table of 100 columns are printed."""
    t, statuses = healthy
    assert {name for name, status in statuses.items() if status != "pass"} <= POLICYS
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr(checking, "run_checks", lambda t: {
        "prompt": ("pass", "fine " * 40, "unseen"), "forced text's gradient": ("fail", "bad", "mend it")})
    assert checking.check(t) == 1
    said = capsys.readouterr().out
    picture, _, table = said.partition("\n\npass  ")
    assert re.search(r"<think>\[[^\]]*</search>", picture) and "\x1b[" not in said      # the turn in brackets
    assert max(map(len, table.splitlines())) <= 100 and "unseen" not in said
    assert "fail  forced text's gradient   bad\n" in table and "-> mend it" in table
    assert "1 pass, 0 warn, 1 fail" in table
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(checking, "run_checks", lambda t: {"prompt": ("pass", "fine", "")})
    assert checking.check(t) == 0
    assert re.search(r"\x1b\[2m<\|im_start\|>[^\x1b]*<think>\x1b\[0m\x1b\[32m", capsys.readouterr().out)


def test_check_as_a_program(options, demo, healthy, monkeypatch, capsys):
    tell = lambda t: {"prompt": ("pass", f"{len(t.questions)} {t.cfg.credit}", "")}
    monkeypatch.setattr(checking, "run_checks", tell)
    monkeypatch.setattr(igpo, "load_model", lambda cfg: (demo.model, demo.tokenizer))
    assert checking.main([*options, "--credit", "gigpo"]) == 0 and "16 gigpo" in capsys.readouterr().out
    for wrong, text in ((["--resume", "x"], "nothing to resume"), (["--train", "none.jsonl"], "none.jsonl"),
                        (["--credit", "none"], "none"), (["--search", "altavista"], "altavista")):
        assert checking.main([*options, *wrong]) == 2
        err = capsys.readouterr().err
        assert text in err and err.count("\n") == 1


class Says:
    """A search that answers each query by answer(query)."""

    def __init__(self, answer):
        self.answer = answer

    def search_many(self, queries, k):
        return [self.answer(query) for query in queries]


def wrapping(name, wrong, module=igpo):
    """The function of this name replaced by one that may use it."""
    def spoil(patch, t):
        patch.setattr(module, name, partial(wrong, getattr(module, name)))
    return spoil


def searching(answer):
    return lambda patch, t: setattr(t, "search", checking.Timed(Says(answer)))


def answers(text):
    def spoil(patch, t):
        t.questions = [{**q, "answers": [text]} for q in t.questions]
        t.asked = [{**q, "answers": [text]} for q in t.asked]
    return spoil


def more_tokens(patch, t):
    t.tokenizer = copy.deepcopy(t.tokenizer)
    t.tokenizer.add_tokens([f"extra{i}" for i in range(9)])


def lost_question(honest, tokenizer, question):
    return honest(tokenizer, "What?")


def results_as_its_own(patch, t):
    honest = Rollout.write
    patch.setattr(Rollout, "write", lambda self, ids, by_policy: honest(self, ids, True))


def shown_and_not_recorded(honest, tokenizer, found, most):
    ids, shown = honest(tokenizer, found, most)
    return ids, Results(shown[1:]) if found else shown


def hotter_scores(honest, model, tokenizer, rollouts, golds, cfg):
    return honest(model, tokenizer, rollouts, golds, replace(cfg, temperature=1.3))


def hotter_log_probs(honest, lm, rollouts, temperature, *probes):
    return honest(lm, rollouts, 1.3, *probes)


def early_probes(honest, lm, rollouts, temperature, schema=(), golds=()):
    early = [replace(r, boundaries=[b - 1 for b in r.boundaries]) for r in rollouts] if golds else rollouts
    return honest(lm, early, temperature, schema, golds)


def with_dropout(honest, model, *rest, **more):
    for layer in unwrap(model).model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    try:
        return honest(model, *rest, **more)
    finally:
        model.eval()
        for layer in unwrap(model).model.layers:
            layer.self_attn.attention_dropout = 0.0


def loss_on_all(honest, model, rollouts, *rest, **more):
    ids = torch.tensor([rollouts[0].ids], device=unwrap(model).device)
    unwrap(model)(ids, labels=ids).loss.backward()
    return {"loss": 0.0, "ratio": 1.0}


def no_memory(honest, *rest):
    raise torch.OutOfMemoryError("CUDA out of memory")


def shaped(how):
    return wrapping("GenerationConfig", lambda honest, **given: honest(**{**given, **how}))


NEW, ROLLOUTS = (), ("rollouts", "oracle", "found")
ALL = (*ROLLOUTS, "scored")
BREAKS = {      # what is broken: (how, options, what is kept of the healthy trial, {check: what it must say})
    "a prompt without its think tag": (
        wrapping("encode_prompt", lambda honest, *a: honest(*a)[:-1]), {}, NEW, {"prompt": "fail"}),
    "a question that is lost": (wrapping("encode_prompt", lost_question), {}, NEW, {"prompt": "fail"}),
    "tokens without embeddings": (more_tokens, {}, ALL, {"pad and eos": "fail"}),
    "results taken for the policy's": (
        results_as_its_own, {}, NEW, {"mask": "fail", "drawn as scored": "fail"}),
    "results shown and not recorded": (
        wrapping("encode_information", shown_and_not_recorded), {}, NEW, {"mask": "fail"}),
    "scoring at another temperature": (
        wrapping("score", hotter_scores), {}, ROLLOUTS,
        {"sampled = scored": "fail", "ratio before updates": "fail", "belief in one pass": "fail"}),
    "score and update at another temperature": (
        wrapping("token_logps", hotter_log_probs), {}, ROLLOUTS,
        {"sampled = scored": "fail", "belief in one pass": "fail"}),
    **{f"sampled with {how}": (shaped(how), {}, NEW, {"drawn as scored": "fail"}) for how in
       [{"temperature": 1.5}, {"top_p": 0.8}] + [{"top_k": 2}, {"top_k": 20}, {"top_p": 0.95}] * LONG},
    "dropout in the update": (
        wrapping("accumulate_gradient", with_dropout), {}, ALL, {"ratio before updates": "fail"}),
    "a probe one token early": (
        wrapping("token_logps", early_probes), {}, ROLLOUTS, {"belief in one pass": "fail"}),
    "a loss over all tokens": (
        wrapping("accumulate_gradient", loss_on_all), {}, ALL, {"forced text's gradient": "fail"}),
    "golds without a word": (answers("?!"), {}, ROLLOUTS, {"gold answers": "fail"}),
    "golds over the cap": (answers("word " * 40), {}, ROLLOUTS, {"gold answers": "warn"}),
    "no room for a turn": (lambda patch, t: None, dict(max_new_tokens=3000), ALL, {"context": "fail"}),
    "a search that is down": (
        searching(lambda query: Results(error="connection refused")), {}, NEW, {"searches": "fail"}),
    "a search that is down now and then": (
        searching(lambda query: Results([found("1", "x")], "refused" if len(query) % 5 == 0 else None)),
        {}, NEW, {"searches": "warn"}),
    "a search that finds nothing": (searching(lambda query: Results()), {}, NEW, {"searches": "fail"}),
    "more than the machine holds": (
        wrapping("free_memory", lambda honest, model: 2**20, checking), {}, ALL, {"memory": "fail"}),
    "more at most than the machine holds": (
        wrapping("free_memory", lambda honest, model: 10**9, checking), dict(rollout_batch=256), ALL,
        {"memory": "warn"}),
    "out of memory while scoring": (
        wrapping("score", no_memory), {}, ROLLOUTS, {name: "fail" for name in (
            "sampled = scored", "ratio before updates", "belief in one pass", "signal")}),
}
COSTLY = {"drawn as scored", "ratio before updates", "belief in one pass", "forced text's gradient"}


@pytest.mark.parametrize("what", BREAKS)
def test_check_finds(what, demo, healthy, monkeypatch):
    """It finds what is broken, says how to mend it, and finds nothing else."""
    spoil, options, keep, expected = BREAKS[what]
    torch.manual_seed(4)
    short = {} if keep else {"max_turns": 2}
    t = trial(demo, healthy[0], keep, **{**short, **options})
    spoil(monkeypatch, t)
    left_out = COSTLY - set(expected) if set(ALL) <= set(keep) and not LONG else set()
    monkeypatch.setattr(checking, "CHECKS", {n: f for n, f in checking.CHECKS.items() if n not in left_out})
    rows = checking.run_checks(t)
    worse = {name: status for name, (status, _, _) in rows.items()
             if ORDER.index(status) > ORDER.index(healthy[1][name])}
    assert {name: s for name, s in worse.items() if name not in POLICYS - set(expected)} == expected, rows
    assert all(rows[name][2] for name in expected)
    assert not demo.model.training and all(p.grad is None for p in demo.model.parameters())


def judged(beliefs, outcomes, credit, monkeypatch):
    """`signal` of one group with these beliefs and outcomes."""
    rollouts = [Rollout([0], [1], list(range(len(b)))) for b in beliefs]
    monkeypatch.setattr(igpo, "outcome_reward", lambda r, golds, penalty: outcomes[rollouts.index(r)])
    for i, r in enumerate(rollouts):
        r.answer = str(i)                                       # so that no two are equal
    return checking.signal(SimpleNamespace(
        cfg=Config(credit=credit), group=len(beliefs), groups=[range(len(beliefs))], rollouts=rollouts,
        asked=[{"answers": []}] * len(beliefs), scored=([], beliefs), model=None, tokenizer=None,
        search=None))


def test_signal_judges_the_credit_in_use(monkeypatch):
    unlike, alike = [[-3.0, -2.0], [-3.0, -1.0]], [[-3.0, -2.0, -1.5], [-3.0, -2.0, -1.5]]
    of = lambda *a: judged(*a, monkeypatch)[0]
    assert of(unlike, [0.5, 0.5], "igpo") == "pass" and of(unlike, [0.5, 0.5], "grpo") == "fail"
    assert of(unlike, [0.5, 0.5], "gigpo") == "fail"            # it never looks at gains
    # Gains that differ only from turn to turn speak in one pool, and not in a pool for each turn.
    assert of(alike, [0.5, 0.5], "igpo-v2") == "pass" and of(alike, [0.5, 0.5], "igpo") == "fail"
    assert of(alike, [0.5, 1.0], "igpo") == of(alike, [0.5, 1.0], "gigpo") == "pass"
    assert of(alike, [0.5, 1.0], "ig") == "fail"                # nor this one at outcomes
    said = judged(alike, [0.5, 0.5], "gigpo", monkeypatch)
    assert "--credit gigpo 0 of 1 groups" in said[1] and "in 0 the outcomes differ" in said[1] and said[2]


def test_answer_form_tells_which_form_was_written(demo):
    def of(*texts):
        rollouts = []
        for text in texts:
            r = Rollout([], [], [0], stop="answer")
            r.write(igpo.encode(demo.tokenizer, text), True)
            rollouts.append(r)
        return checking.answer_form(SimpleNamespace(rollouts=rollouts, tokenizer=demo.tokenizer))
    good, other = "\nI know.\n</think>\n<answer>\nTavo\n</answer>", "\nI know. </think><answer>Tavo</answer>"
    assert of(good, good)[0] == "pass"
    assert of(good, good)[1] == "100% of 2 answers begin as the probe does, after '\\n</think>\\n<answer>\\n'"
    status, figure, mend = of(good, other, other)
    assert status == "warn" and figure.startswith("33% of 3") and mend
    assert re.search(r"others: '\s*</think>\s*<answer>' \(2\)", figure), figure
    assert of()[0] == "warn" and "no rollout answered" in of()[1]


def test_check_of_a_policy_that_cannot_write_the_format(demo, healthy):
    torch.manual_seed(0)
    shape = Qwen2Config(vocab_size=len(demo.tokenizer), hidden_size=16, intermediate_size=32,
                        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                        max_position_embeddings=2048)
    lm = Qwen2ForCausalLM(shape).to(demo.lm.device)
    model = get_peft_model(lm, LoraConfig(r=2, target_modules="all-linear")).eval()
    t = checking.Trial(demo.cfg, model, demo.tokenizer, demo.questions[:4], demo.search)
    rows = checking.run_checks(t)
    assert rows["format kept"][0] == rows["signal"][0] == "fail" and rows["answer form"][0] == "warn"
    assert all("warm-start first" in rows[name][2] for name in ("format kept", "signal", "answer form"))
    assert {rows[name][0] for name in list(checking.CHECKS)[:11]} == {"pass"}       # tokens and mathematics


@pytest.mark.parametrize("text, status", [("The village {} lies there.", "pass"), ("Another page.", "warn")])
def test_check_looks_for_the_gold(text, status, demo):
    golds = {q["question"]: q["answers"][0] for q in demo.questions}
    t = trial(demo)
    t.search, t.rollouts = Says(lambda query: Results([Passage("1", "t", text.format(golds[query]))])), []
    verdict, figure, _ = checking.findable(t)
    assert verdict == status
    share = "100%" if status == "pass" else "0%"
    assert figure.startswith(f"the gold stands in what the question itself brings for {share}")


def test_check_tells_what_limits_the_context(demo, monkeypatch):
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 4096}
    config = Qwen2Config(max_position_embeddings=131_072)
    config.sliding_window, config.rope_parameters = 8192, rope
    monkeypatch.setattr(checking, "model_config", lambda cfg: config)
    t = trial(demo)
    t.rollouts = [Rollout([0], [0], [1], stop="length")] * 2
    status, figure, mend = checking.context(t)
    assert figure.startswith("2,048 tokens (131,072 positions, a window of 8,192, rope longrope)")
    assert status == "warn" and "100% of the rollouts were cut" in figure and mend


def test_check_of_tags_in_pieces(byte_tokenizer):
    """Bytes: each tag is several tokens, and found. Words put together with spaces: no tag comes back."""
    words = "I need more . < > </ think search answer Tavo ?".split()
    in_words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="?"))
    in_words.pre_tokenizer = pre_tokenizers.Whitespace()
    status, figure, _ = checking.stop_tags(SimpleNamespace(tokenizer=byte_tokenizer))
    assert status == "pass" and "'<' '/' 's' 'e' 'a' 'r' 'c' 'h' '>'" in figure
    in_words = PreTrainedTokenizerFast(tokenizer_object=in_words)
    assert checking.stop_tags(SimpleNamespace(tokenizer=in_words))[0] == "fail"


def test_check_names_generation_defaults_and_a_pad_that_is_eos(demo, monkeypatch):
    own = GenerationConfig(do_sample=True, top_k=20, top_p=0.8, repetition_penalty=1.05,
                           eos_token_id=[demo.tokenizer.eos_token_id])
    monkeypatch.setattr(demo.lm, "generation_config", own)
    t = trial(demo)
    t.tokenizer = copy.deepcopy(demo.tokenizer)
    t.tokenizer.pad_token = t.tokenizer.eos_token
    status, figure, _ = checking.defaults(t)
    assert status == "pass"
    assert all(part in figure for part in ("top_k 20", "top_p 0.8", "repetition_penalty 1.05"))
    status, figure, _ = checking.padding(t)
    assert status == "pass" and "pad is eos, harmless here" in figure
