"""Eq. 2-7 on one question and two of its rollouts, with the numbers that occur.

    python -m tools.explain [options of igpo.py]

Nothing is computed here in a way of its own: each number comes from the functions of igpo.py that train.
"""
import math
import sys
from dataclasses import replace

import torch

import igpo
from igpo import RECIPES, Config, Rollout, info_gains, mean, outcome_reward, std
from search_tool import UserError, first_line, load_questions, open_search
from tools.memory import tool_config


def explain(cfg: Config, model, tokenizer, questions: list[dict], search) -> None:
    """Of the question whose outcomes differ most, the best and the worst rollout; then an update on them
    all."""
    cfg, (kind, recipe) = replace(cfg, minibatches=1), RECIPES[cfg.credit]
    rollouts = igpo.rollout(model, tokenizer, questions, search, cfg)
    groups = [rollouts[i:i + cfg.group] for i in range(0, len(rollouts), cfg.group)]
    outcomes = [[outcome_reward(r, q["answers"], cfg.format_penalty) for r in group]
                for group, q in zip(groups, questions)]
    best = max(range(len(groups)), key=lambda i: std(outcomes[i]))
    question, rollouts, outcomes = questions[best], groups[best], outcomes[best]

    old, beliefs = igpo.score(model, tokenizer, rollouts, [question["answers"]] * len(rollouts), cfg)
    gains = [info_gains(b, kind) if kind else [0.0] * (len(b) - 1) for b in beliefs]
    rewards = igpo.turn_advantages(gains, outcomes, **recipe, gamma=0.0)        # Eq. 5 without Eq. 6
    advantages = igpo.turn_advantages(gains, outcomes, **recipe)
    order = sorted(range(len(rollouts)), key=lambda i: (outcomes[i], len(beliefs[i])))
    gold = [tokenizer.decode(i) for i in igpo.encode_gold(tokenizer, question["answers"])]
    print(f"Question: {question['question']}\nGold: {question['answers'][0]!r}, in tokens {gold}\n"
          f"Of {len(questions)} questions the one whose outcomes differ most; of its G = {len(rollouts)} "
          "rollouts the best and the worst.\nWhat the policy wrote stands [in brackets].\n")
    two = {"A": order[-1], "B": order[0]}
    for name, i in two.items():
        of = (beliefs[i], gains[i], outcomes[i], rewards[i], advantages[i])
        show_rollout(name, rollouts[i], *of, kind, tokenizer)
    flat = [g for gs in gains for g in gs]
    print(f"Over the group gains are {mean(flat):+.3f} ± {std(flat):.3f}, outcomes {mean(outcomes):+.3f} ± "
          f"{std(outcomes):.3f}.\n--credit {cfg.credit}: gain {kind}, {recipe}\n")
    show_update(model, tokenizer, rollouts, old, advantages, two, cfg)


def show_rollout(name, r: Rollout, beliefs, gains, outcome, rewards, advantages, kind, tokenizer) -> None:
    """Eq. 2-6 turn by turn, and the tokens that each number falls on."""
    short = lambda start, end: " ".join(tokenizer.decode(r.ids[start:end]).split())
    print(f"Rollout {name}: {len(r.ids)} tokens, {sum(r.mask)} of them the policy's; stop = {r.stop}, "
          f"answer = {r.answer!r}")
    print(f"  b_0 = {beliefs[0]:+.3f}   (Eq. 3, the mean log pi of the gold; read before token "
          f"{r.boundaries[0]})")
    for t, (start, end) in enumerate(zip(r.boundaries, [*r.boundaries[1:], len(r.ids)])):
        own = start + sum(r.mask[start:end])        # the policy's tokens come first
        print(f"  turn {t + 1}, tokens {start}-{own - 1}: [{short(start, own)}]")
        if own < end:
            forced = short(own, end)
            print(f"    tokens {own}-{end - 1}, masked: {forced[:110]}{'...' if len(forced) > 110 else ''}")
        earned = f"outcome (Eq. 2) = {outcome:+.3f}"
        if t < len(gains):
            levels = {"prob": "exp({:+.3f}) - exp({:+.3f})", "logprob": "{:+.3f} - ({:+.3f})"}.get(kind)
            levels = levels.format(beliefs[t + 1], beliefs[t]) if levels else "not used:"
            earned = f"gain (Eq. 4) = {levels} = {gains[t]:+.3f}"
        print(f"    {earned};  normalised (Eq. 5) {rewards[t]:+.3f};  advantage (Eq. 6) "
              f"{advantages[t]:+.3f}")
    print()


def show_update(model, tokenizer, rollouts, old, advantages, two, cfg: Config, most: int = 5) -> None:
    """Eq. 7 after an update on this group alone, so that ratios have moved from 1."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=0.0)
    before, = igpo.update(model, optimizer, rollouts, old, old, advantages, cfg)
    new, _ = igpo.score(model, tokenizer, rollouts, None, cfg)
    print("Eq. 7 at the tokens that the policy was least sure of, after one update on this group.\n"
          "Before it each ratio is 1 and each KL is 0.\n  rollout turn  token            "
          "log pi_old  log pi   ratio  clipped  advantage surrogate       KL")
    for name, i in two.items():
        r, was, now = rollouts[i], old[i].tolist(), new[i].tolist()
        own = [token for token, m in zip(r.ids, r.mask) if m]
        for k in sorted(sorted(range(len(own)), key=was.__getitem__)[:most]):
            turn, d = r.policy_turns[k], was[k] - now[k]
            ratio, A = math.exp(-d), advantages[i][turn]
            clipped = min(max(ratio, 1 - cfg.clip), 1 + cfg.clip)
            token = repr(tokenizer.decode(own[k]))
            print(f"  {name:>7} {turn + 1:>4}  {token:<16} {was[k]:>10.3f} {now[k]:>7.3f} {ratio:>7.3f} "
                  f"{clipped:>8.3f}  {A:>+9.3f} {min(ratio * A, clipped * A):>+9.3f} "
                  f"{math.exp(d) - d - 1:>8.5f}")
    after = igpo.accumulate_gradient(model, rollouts, old, old, advantages, cfg)
    print(f"  loss {before['loss']:+.4f} before the update, {after['loss']:+.4f} after it; "
          f"ratio farthest from 1: {before['ratio']:.6f} -> {after['ratio']:.3f}")


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 for what the user can mend."""
    try:
        cfg = tool_config(argv)
        train = load_questions(igpo.locate(cfg.train or f"{cfg.data}/train.jsonl"))
        corpus = cfg.search or "bm25:" + igpo.locate(f"{cfg.data}/corpus.jsonl")
        search = open_search(corpus, cfg.search_cache)
        model, tokenizer = igpo.load_model(cfg)
        questions = igpo.step_questions(train, 1, cfg)
        igpo.check_questions(model, tokenizer, questions, cfg)
        explain(cfg, model, tokenizer, questions, search)
    except (UserError, torch.OutOfMemoryError) as e:
        print(f"explain: {first_line(e)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    sys.exit(main())
