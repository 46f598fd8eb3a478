"""Other ways to reward turns. Rollouts, loss and training loop are igpo.py's for all of them.

    python -m tools.comparators --credit gigpo [options of igpo.py]
    python -m tools.comparators --credit reasonrag [--mc_rollouts 4] ..
    python -m tools.comparators --resume runs/policy-gigpo-seed0

    stepsearch        what each search adds to the coverage of the supporting passages, less its repeats
    reasonrag         by how much each turn raises the value of the state, by Monte Carlo
    gigpo             the outcome, compared in the group and again among turns that start in the same state
    dr-venus          gains by their spread, not centred, and the outcome, added to every turn
    dr-venus-scaled   gains and outcomes normalised apart, gains then brought to the size of the outcomes
    a2tgpo            gains normalised by turn, their sum divided by the root of their number, and the outcome
    dbelief           outcome, positive gain and a cost per turn, compared among turns of the same index
    random-baseline   what each search's passages are worth, compared with random passages in their place

A credit function gets all groups of a step: the beliefs and outcomes of its rollouts (cfg.group in a row
are a group) and what they were made from. It returns the advantage of each turn of each rollout. The
mathematics of each is a pure function: of one group, unless its docstring says otherwise.
"""
import argparse
import json
import math
import random
import signal
import sys
from collections import Counter
from functools import lru_cache, partial
from pathlib import Path

import torch
from tqdm import tqdm

import igpo
from igpo import (RANK, STD_FLOOR, Config, Rollout, UserError, all_gather, encode_information, info_gains,
                  locate, mean, std, turn_advantages)
from search_tool import Passage, Results, answer_words, clean_text, f1_score, load_questions, read_passages
from tools.metrics import name_key


def z_scores(values: list[float]) -> list[float]:
    """Values by mean and population standard deviation; all 0 if they agree."""
    middle, spread = mean(values), std(values)
    return [(v - middle) / spread if spread > STD_FLOOR else 0.0 for v in values]


def groups_of(items: list, cfg: Config) -> list[list]:
    """The items of each group."""
    return [items[i:i + cfg.group] for i in range(0, len(items), cfg.group)]


def flat(groups) -> list:
    """What groups_of() parts."""
    return [item for group in groups for item in group]


# ---- from beliefs and outcomes alone -----------------------------------------------------------------------

def dr_venus(gains: list[list[float]], outcomes: list[float]) -> list[list[float]]:
    """DR-Venus (arXiv 2604.19859), "raw_ig" in its code, recommended there because turns do not become fewer.

    A gain is divided by the std of the group's gains and not centred, so that a search which helps is
    rewarded also where others helped more. The z-score of the outcome is added to every turn, and nothing is
    summed. Gains are differences of log-probabilities. What remains: theirs are given only to turns that open
    a page, and a turn of broken format costs something; gains that all agree are 0 here, where theirs are
    divided by 1e-4, or by 1 if there is one alone.

    >>> dr_venus([[1.0], [3.0]], [0.0, 1.0])
    [[0.0, -1.0], [4.0, 1.0]]
    """
    spread = std(g for gs in gains for g in gs)
    return [[(g / spread if spread > STD_FLOOR else 0.0) + z for g in gs] + [z]
            for gs, z in zip(gains, z_scores(outcomes))]


def dr_venus_scaled(gains: list[list[list[float]]], outcomes: list[list[float]]) -> list[list[list[float]]]:
    """DR-Venus by its default ("scaled_separate"), for all groups of a step: gains[group][rollout][turn].

    As igpo-v2, but before they are summed the z-scores of the gains are multiplied by one number for the
    whole step: the mean size of the outcomes' z-scores (at least 0.3) over that of the gains', at most 10.
    It is less than 1 where outcomes agree in most groups. What remains is told at dr_venus().

    >>> dr_venus_scaled([[[1.0], [3.0]], [[1.0], [3.0]]], [[0.0, 1.0], [0.5, 0.5]])
    [[[-1.5, -1.0], [1.5, 1.0]], [[-0.5, 0.0], [0.5, 0.0]]]
    """
    rewards = [turn_advantages(*of, "group", scale=True, gamma=0.0) for of in zip(gains, outcomes)]
    size = lambda values: mean(all_gather([abs(v) for v in values]))      # over the groups of all processes
    outcome_size = max(size(row[-1] for rows in rewards for row in rows), 0.3)
    gain_size = size(r for rows in rewards for row in rows for r in row[:-1]) or 1.0
    factor = min(outcome_size / gain_size, 10.0)
    return [[[factor * sum(row[t:-1]) + row[-1] for t in range(len(row))] for row in rows]
            for rows in rewards]


def a2tgpo(gains: list[list[float]], outcomes: list[float], weight: float = 0.3) -> list[list[float]]:
    """A2TGPO (arXiv 2605.06200): gains are compared with those of the same turn, and their sum does not grow.

    The z-scores of the n gains from a turn to the end are summed and divided by sqrt(n), which is the std
    of such a sum. This times `weight` (its code has 0.3), plus the z-score of the outcome, is the advantage;
    gamma is 1. What remains: their ratio is one of whole turns, and its clip range depends on the gain, which
    matters only with several updates per step (--minibatches); a gain that is alone at its turn is 0 here.

    >>> a2tgpo([[1.0, 1.0], [3.0, 3.0]], [0.5, 0.5], weight=1.0)[1]
    [1.414213562373095, 1.0, 0.0]
    """
    rewards = turn_advantages(gains, outcomes, "turn", scale=True, gamma=0.0)
    return [[weight * sum(row[t:-1]) / math.sqrt(len(row) - 1 - t) + row[-1] for t in range(len(row) - 1)]
            + [row[-1]] for row in rewards]


def dbelief(gains: list[list[float]], outcomes: list[float], weight: float = 0.1,
            cost: float = 0.05) -> list[list[float]]:
    """Delta-Belief RL (arXiv 2602.12342): the z-score, among the turns of the same index, of each turn's
    reward

        outcome - cost * turns of the rollout + weight * max(gain, 0)

    and nothing is summed. Gains are differences of log-probabilities; the last turn has none. What remains:
    theirs are summed over the tokens of the answer, ours a mean; their questions are not searches, and those
    that are repeated or invalid cost more, for which there is only --format_penalty here; their std is the
    sample's.

    >>> dbelief([[1.0], []], [1.0, 1.0])       # rewards 1 - 0.1 + 0.1 and 1 - 0.1, against 1 - 0.05
    [[1.0, 0.0], [-1.0]]
    """
    rewards = [[o - cost * (len(gs) + 1) + weight * max(g, 0.0) for g in [*gs, 0.0]]
               for gs, o in zip(gains, outcomes)]
    advantages = [[] for _ in rewards]
    for t in range(max(map(len, rewards))):
        there = [i for i, row in enumerate(rewards) if t < len(row)]
        for i, z in zip(there, z_scores([rewards[i][t] for i in there])):
            advantages[i].append(z)
    return advantages


def credit_of(rule, whole_step: bool = False, gain: str = "logprob"):
    """The credit function of a rule that takes the gains and outcomes of a group, or those of all groups."""
    def credit(*, beliefs, outcomes, cfg, **_):
        gains = groups_of([info_gains(b, gain) for b in beliefs], cfg)
        outcomes = groups_of(outcomes, cfg)
        return flat(rule(gains, outcomes) if whole_step else map(rule, gains, outcomes))
    return credit


# ---- from what was found -----------------------------------------------------------------------------------

def stepsearch_rewards(retrieved: list[list[Passage]], gold: list[list[str]]) -> list[float]:
    """StepSearch (arXiv 2505.15107): what each search of a rollout adds to the coverage of the gold passages,
    less its share of passages that were found before.

    gold: of each gold passage the texts that count as it (an article may stand in the corpus in several
    parts). Its coverage is the best TF-IDF cosine between one of them and anything found so far. Here idf
    counts the passages of this rollout and the gold ones. The paper's reward for search keys needs keys
    that our data have not, and is left out; the paper trains by PPO with a critic, and here rewards pass
    Eq. 5-7 as gains do.

    >>> a, b = Passage("1", "", "red fox"), Passage("2", "", "blue sea")
    >>> [round(r, 6) for r in stepsearch_rewards([[b], [a], [a, b]], [["red fox"]])]
    [0.0, 1.0, -1.0]
    """
    found_words = [[answer_words(p.text) for p in found] for found in retrieved]
    gold_words = [[answer_words(text) for text in texts] for texts in gold]
    all_words = [words for part in (*found_words, *gold_words) for words in part]
    df = Counter(word for words in all_words for word in set(words))

    def vector(words):
        v = {w: n * (math.log((1 + len(all_words)) / (1 + df[w])) + 1) for w, n in Counter(words).items()}
        length = math.sqrt(sum(x * x for x in v.values()))
        return {w: x / length for w, x in v.items()}

    def cosine(a, b):
        return sum(x * b.get(w, 0.0) for w, x in a.items())
    targets = [[vector(words) for words in texts] for texts in gold_words]
    best, seen, rewards = [0.0] * len(gold), set(), []
    for found, words in zip(retrieved, found_words):
        now = [vector(w) for w in words]
        after = [max([b, *(cosine(v, target) for v in now for target in texts)])
                 for b, texts in zip(best, targets)]
        rewards.append(mean(x - b for x, b in zip(after, best)) - mean(p.id in seen for p in found))
        best, seen = after, seen | {p.id for p in found}
    return rewards


@lru_cache(maxsize=1)
def supporting_texts(corpus: str, train: str) -> dict[str, list[str]]:
    """The texts that are meant by each name in the "supporting" of a training question, by name_key().

    A name is the id of a passage, or else the title of one or several: an article may stand in the corpus in
    parts. UserError for a question that names no passage, or one that the corpus lacks.
    """
    questions, ids, titles = load_questions(train), {}, {}
    wanted = {name_key(name) for q in questions for name in q["supporting"]}
    for p in read_passages(corpus):
        if (key := name_key(p.id)) in wanted:
            ids[key] = [clean_text(p.text)]
        if (key := name_key(p.title)) in wanted:
            titles.setdefault(key, []).append(clean_text(p.text))
    texts = {**titles, **ids}
    for q in questions:
        lacking = [name for name in q["supporting"] if name_key(name) not in texts]
        if lacking or not q["supporting"]:
            what = f"passage {lacking[0]}, which {corpus} lacks" if lacking else "no supporting passages"
            raise UserError(f"--credit stepsearch: question {q['id']} of {train} names {what}")
    return texts


def stepsearch(*, outcomes, cfg, rollouts, asked, **_) -> list[list[float]]:
    """stepsearch_rewards() in the place of gains, in igpo's own normalisation."""
    where = cfg.search or f"bm25:{cfg.data}/corpus.jsonl"
    if not where.startswith("bm25:"):
        raise UserError("--credit stepsearch reads supporting passages from the corpus: it needs one of bm25")
    texts = supporting_texts(locate(where[5:]), locate(cfg.train or f"{cfg.data}/train.jsonl"))
    gold = [[texts[name_key(name)] for name in q["supporting"]] for q in asked]
    steps = [stepsearch_rewards(r.retrieved[:len(r.boundaries) - 1], g) for r, g in zip(rollouts, gold)]
    return flat(map(turn_advantages, groups_of(steps, cfg), groups_of(outcomes, cfg)))


def gigpo_advantages(states: list[list], outcomes: list[float], gamma: float = 1.0,
                     omega: float = 1.0) -> list[list[float]]:
    """GiGPO (arXiv 2505.10978): A_episode + omega * A_step for every turn of every rollout of a group.

    states[i][t] is the state in which rollout i takes turn t; here the set of passages found before it.
    A_step compares the discounted outcomes of the turns taken in one state; a state met once compares with
    nothing.

    >>> gigpo_advantages([["", "x"], ["", "x"], ["", "y"]], [1.0, 0.0, 0.5])[0]
    [2.449489742783178, 2.224744871391589]
    """
    pools: dict = {}
    for i, path in enumerate(states):
        for t, state in enumerate(path):
            pools.setdefault(state, []).append((i, t, gamma ** (len(path) - 1 - t) * outcomes[i]))
    advantages = [[z] * len(path) for z, path in zip(z_scores(outcomes), states)]
    for pool in pools.values():
        for (i, t, _), z in zip(pool, z_scores([value for _, _, value in pool])):
            advantages[i][t] += omega * z
    return advantages


def gigpo(*, outcomes, cfg, rollouts, **_) -> list[list[float]]:
    """gigpo_advantages() of each group."""
    states = [[frozenset(p.id for found in r.retrieved[:t] for p in found) for t in range(len(r.boundaries))]
              for r in rollouts]
    return flat(map(gigpo_advantages, groups_of(states, cfg), groups_of(outcomes, cfg)))


# ---- with forwards or rollouts of their own ----------------------------------------------------------------

def with_random_passages(r: Rollout, t: int, pool: list[Passage], draw: random.Random, tokenizer) -> Rollout:
    """Rollout r up to the boundary behind search t, but with as many passages of the pool as the search
    brought, in no more tokens."""
    end, tags = r.mask.index(0, r.boundaries[t]), len(encode_information(tokenizer, Results(), 0)[0])
    passages = draw.sample(pool, min(len(r.retrieved[t]), len(pool)))
    block, _ = encode_information(tokenizer, Results(passages), r.boundaries[t + 1] - end - tags)
    return Rollout(r.ids[:end] + block, r.mask[:end] + [0] * len(block), [end + len(block)])


def random_baseline(*, beliefs, outcomes, cfg, model, tokenizer, rollouts, asked, **_) -> list[list[float]]:
    """IG-Search (arXiv 2604.15148): the gain of a search is the belief after its passages less the belief
    after random passages in their place, behind the same turns and the same query.

    Random passages are, as in its code, what searches of the step brought; here those of other questions,
    one draw for each search (theirs: 3). It costs one forward of all that stands before each boundary. What
    remains: the paper changes the advantage of the query's tokens alone, by differences of log-probabilities
    of which it drops the small ones and shrinks the negative ones. Here gains are differences of
    probabilities, in igpo's own normalisation, and fall on the whole turn.
    """
    if cfg.questions < 2:
        raise UserError("--credit random-baseline takes passages from other questions: raise --questions")
    draw = random.Random(torch.initial_seed())      # igpo.py sets it for each step, also after a resume
    found = all_gather([(q["id"], p) for r, q in zip(rollouts, asked) for some in r.retrieved for p in some])
    others = {q["id"]: list({p.id: p for i, p in found if i != q["id"]}.values()) for q in asked}
    swapped = [(with_random_passages(r, t, others[q["id"]], draw, tokenizer), q["answers"])
               for r, q in zip(rollouts, asked) for t in range(len(r.boundaries) - 1)]
    _, without = igpo.score(model, tokenizer, [r for r, _ in swapped], [gold for _, gold in swapped], cfg)
    without = iter(without)
    gains = [[math.exp(b) - math.exp(next(without)[0]) for b in after] for _, *after in beliefs]
    return flat(map(turn_advantages, groups_of(gains, cfg), groups_of(outcomes, cfg)))


def mc_values(model, tokenizer, rollouts: list[Rollout], asked: list[dict], search, cfg: Config,
              mc_rollouts: int, alpha: float = 0.9) -> tuple[list[list[float]], int]:
    """ReasonRAG (arXiv 2505.14069): the value of the state at each boundary, which is the mean of
    F1 * alpha^turns over mc_rollouts rollouts from there. Returns (values per rollout, tokens generated).

    The rollouts of a group share their start, so it is valued by those from all of its copies. UserError if
    too many searches failed.
    """
    starts = [Rollout(r.ids[:b], r.mask[:b], r.boundaries[:t + 1], queries=r.queries[:t],
                      retrieved=r.retrieved[:t])
              for r in rollouts for t, b in enumerate(r.boundaries) for _ in range(mc_rollouts)]
    before = sum(sum(s.mask) for s in starts)
    in_order = sorted(starts, key=lambda s: len(s.ids))     # little padding
    for i in range(0, len(starts), cfg.rollout_batch):
        igpo.play(model, tokenizer, in_order[i:i + cfg.rollout_batch], search, cfg)
    errors = [found.error for s in starts for found in s.retrieved]
    if (failed := sum(map(bool, errors))) > igpo.MAX_FAILED_SEARCHES * len(errors):
        raise UserError(f"{failed} of {len(errors)} searches failed ({next(filter(None, errors))})")
    ends, values = iter(starts), []
    for r, q in zip(rollouts, asked):
        tries = [[next(ends) for _ in range(mc_rollouts)] for _ in r.boundaries]
        values.append([mean(f1_score(s.answer, q["answers"]) * alpha ** len(s.boundaries) for s in some)
                       for some in tries])
    for group in groups_of(values, cfg):
        start = mean(v[0] for v in group)
        for v in group:
            v[0] = start
    return values, sum(sum(s.mask) for s in starts) - before


def reasonrag(*, outcomes, cfg, model, tokenizer, rollouts, asked, search, mc_rollouts: int = 4,
              **_) -> list[list[float]]:
    """The increase of mc_values() in the place of gains, in igpo's own normalisation.

    The paper finds states by tree search (MCTS) and trains DPO on pairs of them; here they are those of the
    rollouts. A resumed run keeps its mc_rollouts: they are no option of igpo.py, so a file beside config.json
    holds them. UserError for another number.
    """
    kept = Path(cfg.out) / "mc_rollouts.json"
    if cfg.out and kept.exists() and (before := json.loads(kept.read_text())) != mc_rollouts:
        raise UserError(f"the run was started with --mc_rollouts {before}: give it again with --resume")
    if cfg.out and RANK == 0 and kept.parent.is_dir():
        kept.write_text(f"{mc_rollouts}\n")
    values, tokens = mc_values(model, tokenizer, rollouts, asked, search, cfg, mc_rollouts)
    tokens, own = sum(all_gather([tokens])), sum(all_gather([sum(r.mask) for r in rollouts]))
    if RANK == 0:
        tqdm.write(f"reasonrag: {tokens} tokens generated for its values, besides {own} of the rollouts")
    steps = [info_gains(v, "logprob") for v in values]          # plain differences
    return flat(map(turn_advantages, groups_of(steps, cfg), groups_of(outcomes, cfg)))


def skipping_nan(credit):
    """The credit function, but NaN where a belief of any process is not finite: update() skips that step."""
    def credit_or_nan(**step):
        finite = all(all_gather([math.isfinite(b) for bs in step["beliefs"] for b in bs]))
        return credit(**step) if finite else [[math.nan] * len(bs) for bs in step["beliefs"]]
    return credit_or_nan


CREDITS = {"stepsearch": stepsearch, "reasonrag": reasonrag, "gigpo": gigpo, "dr-venus": credit_of(dr_venus),
           "dr-venus-scaled": credit_of(dr_venus_scaled, whole_step=True), "dbelief": credit_of(dbelief),
           "a2tgpo": credit_of(a2tgpo, gain="prob"), "random-baseline": random_baseline}
CREDITS = {name: skipping_nan(credit) for name, credit in CREDITS.items()}


def main(argv: list[str] | None = None) -> int:
    """igpo.main() with these credits."""
    parser = argparse.ArgumentParser(prog="comparators", add_help=False, allow_abbrev=False)
    parser.add_argument("--mc_rollouts", type=int, default=4)
    own, options = parser.parse_known_args(argv)
    if own.mc_rollouts < 1:
        parser.error("--mc_rollouts must be at least 1")
    if {"-h", "--help"} & set(options):
        print(f"{__doc__}\n--mc_rollouts: rollouts from each state, of reasonrag (4). All other options:\n")
    with_number = partial(reasonrag, mc_rollouts=own.mc_rollouts)
    return igpo.main(options, {**CREDITS, "reasonrag": skipping_nan(with_number)})


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.stdout.reconfigure(errors="replace")
    sys.exit(main())
