"""The comparators of --credit: other ways to reward turns. Rollouts, Eq. 5-7 and the training loop are igpo.py's for all of them.

    stepsearch    what each search adds to the coverage of the supporting passages, less its repeats
    reasonrag     how much each turn raises the value of the state, by Monte Carlo
    gigpo         the outcome, compared within the group and once more among turns that start in the same state
"""
import math
from collections import Counter

import igpo
from igpo import Config, Rollout, UserError, answer_words, credit, f1_score, groups_of, info_gains, locate, mean, normalise
from search_tool import Passage, clean_text, read_passages


def comparator_returns(model, tokenizer, rollouts: list[Rollout], asked: list[dict], outcomes: list[float], search, cfg: Config,
                       progress: float) -> tuple[list[list[float]], int]:
    """(returns of each turn of each rollout under cfg.credit, tokens generated for them besides the rollouts).

    asked[i] is the question of rollout i; every cfg.group rollouts in a row are a group.
    """
    extra_tokens, groups = 0, groups_of(rollouts, cfg)
    if cfg.credit == "gigpo":
        states = [[frozenset(p.id for found in r.retrieved[:t] for p in found) for t in range(len(r.boundaries))] for r in rollouts]
        return [R for g in groups for R in gigpo_returns(states[g], outcomes[g], cfg.gamma)], extra_tokens
    if cfg.credit == "stepsearch":
        steps = [stepsearch_rewards(r.retrieved[:len(r.boundaries) - 1], q["supporting_texts"]) for r, q in zip(rollouts, asked)]
    else:
        values, extra_tokens = mc_values(model, tokenizer, rollouts, asked, search, cfg)
        steps = [info_gains(v) for v in values]
    return [R for g in groups for R in credit(steps[g], outcomes[g], cfg, progress)], extra_tokens


def stepsearch_rewards(retrieved: list[list[Passage]], gold: list[str]) -> list[float]:
    """StepSearch (arXiv 2505.15107): what each search adds to the coverage of the gold passages, less its share of repeats.

    Coverage of a gold passage is the best TF-IDF cosine of anything retrieved so far. Here idf counts the passages of this
    rollout and the gold ones; the paper's search-key reward needs keys that our data have not, and is left out; the paper
    trains by PPO with a critic.

    >>> a, b = Passage("1", "", "red fox", 0.0), Passage("2", "", "blue sea", 0.0)
    >>> [round(r, 6) for r in stepsearch_rewards([[b], [a], [a, b]], ["red fox"])]
    [0.0, 1.0, -1.0]
    """
    texts = [answer_words(text) for text in gold + [p.text for found in retrieved for p in found]]
    df = Counter(word for words in texts for word in set(words))

    def vector(words):
        v = {w: n * (math.log((1 + len(texts)) / (1 + df[w])) + 1) for w, n in Counter(words).items()}
        length = math.sqrt(sum(x * x for x in v.values()))
        return {w: x / length for w, x in v.items()}
    vectors = [vector(words) for words in texts]
    targets, found_vectors = vectors[:len(gold)], iter(vectors[len(gold):])
    best, seen, rewards = [0.0] * len(gold), set(), []
    for found in retrieved:
        now = [next(found_vectors) for _ in found]
        after = [max([b] + [sum(x * v.get(w, 0.0) for w, x in g.items()) for v in now]) for g, b in zip(targets, best)]
        rewards.append(mean(x - b for x, b in zip(after, best)) - mean(p.id in seen for p in found))
        best, seen = after, seen | {p.id for p in found}
    return rewards


def gigpo_returns(states: list[list], outcomes: list[float], gamma: float = 1.0, omega: float = 1.0) -> list[list[float]]:
    """GiGPO (arXiv 2505.10978): A_episode + omega * A_step for every turn of every rollout of a group.

    states[i][t] is the state in which rollout i takes turn t: here the set of passages retrieved before it. A_step compares
    the discounted outcomes of the turns taken in one state; a state met once compares with nothing and adds 0.

    >>> gigpo_returns([["", "x"], ["", "x"], ["", "y"]], [1.0, 0.0, 0.5])[0]
    [2.449489742783178, 2.224744871391589]
    """
    pools: dict = {}
    for i, path in enumerate(states):
        for t, state in enumerate(path):
            pools.setdefault(state, []).append((i, t, gamma ** (len(path) - 1 - t) * outcomes[i]))
    returns = [[a] * len(path) for a, path in zip(normalise(outcomes), states)]
    for pool in pools.values():
        for (i, t, _), a in zip(pool, normalise([value for _, _, value in pool])):
            returns[i][t] += omega * a
    return returns


def mc_values(model, tokenizer, rollouts: list[Rollout], asked: list[dict], search, cfg: Config, alpha: float = 0.9) -> tuple[list[list[float]], int]:
    """ReasonRAG (arXiv 2505.14069): the value of the state at each boundary, mean F1 * alpha^turns of cfg.mc_rollouts rollouts
    from there; the increase is the turn's reward. Returns (values per rollout, tokens generated for them).

    The paper finds states by tree search (MCTS) and trains DPO on pairs of them; here the states are those of the rollouts,
    and the rewards go through Eq. 5-7 like all others. The start, which a group shares, is valued by the rollouts from all of its copies.
    """
    starts = [Rollout(r.ids[:b], r.mask[:b], r.turns[:b], r.boundaries[:t + 1], queries=r.queries[:t], retrieved=r.retrieved[:t], errors=r.errors[:t])
              for r in rollouts for t, b in enumerate(r.boundaries) for _ in range(cfg.mc_rollouts)]
    before = sum(sum(s.mask) for s in starts)
    list(igpo.finish(model, tokenizer, starts, search, cfg))
    ends, values = iter(starts), []
    for r, q in zip(rollouts, asked):
        values.append([])
        for _ in r.boundaries:
            some = [next(ends) for _ in range(cfg.mc_rollouts)]
            values[-1].append(mean(f1_score(s.answer, q["answers"]) * alpha ** len(s.boundaries) for s in some))
    for g in groups_of(rollouts, cfg):
        root = mean(v[0] for v in values[g])
        for v in values[g]:
            v[0] = root
    return values, sum(sum(s.mask) for s in starts) - before


def with_supporting_texts(questions: list[dict], cfg: Config) -> list[dict]:
    """The questions with the texts of their supporting passages, out of the BM25 corpus, as --credit stepsearch needs them."""
    if not cfg.search.startswith("bm25:"):
        raise UserError("--credit stepsearch looks supporting passages up in the corpus: it needs --search bm25:<corpus.jsonl>.")
    wanted = {i for q in questions for i in q.get("supporting") or []}
    texts = {key: clean_text(p.text) for p in read_passages(locate(cfg.search[5:])) for key in (p.title, p.id) if key in wanted}      # benchmarks name titles
    for q in questions:
        lacking = [i for i in q.get("supporting") or [] if i not in texts]
        if lacking or not q.get("supporting"):
            raise UserError(f"--credit stepsearch: question {q['id']} of {cfg.train} " + (f"names passage {lacking[0]}, which the corpus lacks." if lacking else "names no supporting passages."))
    return [{**q, "supporting_texts": [texts[i] for i in q["supporting"]]} for q in questions]
