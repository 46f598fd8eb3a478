"""python igpo.py --explain: Eq. 2-7 on one question and two of its rollouts, with the numbers that occur.

Nothing is computed here that training computes otherwise: every number comes from igpo.py's own functions.
"""
import math
from dataclasses import replace

import torch

import igpo


def explain(cfg: igpo.Config) -> None:
    """Of the questions of a run's first step the one whose outcomes differ most; its best and its worst rollout; an update on its group."""
    cfg = replace(cfg, group=max(cfg.group, 2), credit="igpo", curriculum=False, ppo_epochs=1, minibatches=1)
    questions = igpo.step_questions(igpo.load_train(cfg.train), 1, cfg)
    search = igpo.open_run_search(cfg)
    model, tokenizer = igpo.load_model(cfg)
    rollouts = igpo.rollout(model, tokenizer, questions, search, cfg)
    groups = [rollouts[g] for g in igpo.groups_of(rollouts, cfg)]
    spread = [igpo.std(igpo.outcome_reward(r, q["answers"], cfg.format_penalty) for r in g) for g, q in zip(groups, questions)]
    question, rollouts = questions[spread.index(max(spread))], groups[spread.index(max(spread))]

    old, beliefs = igpo.score(model, tokenizer, rollouts, [question["answers"]] * len(rollouts), cfg)
    outcomes = [igpo.outcome_reward(r, question["answers"], cfg.format_penalty) for r in rollouts]
    gains = [igpo.info_gains(b, cfg.gain) for b in beliefs]
    rewards = igpo.turn_rewards(gains, outcomes, cfg.norm)
    returns = igpo.credit(gains, outcomes, cfg)
    order = sorted(range(len(rollouts)), key=lambda i: (outcomes[i], len(beliefs[i])))
    two = {"A": order[-1], "B": order[0]}
    gold = [tokenizer.decode(i) for i in igpo.encode_gold(tokenizer, question["answers"])]
    print(f"Question: {question['question']}\nGold: {question['answers'][0]!r}, tokens {gold}\n"
          f"Of the {len(questions)} questions of the first step (seed {cfg.seed}), the one whose outcomes differ most.\n"
          f"Of its G = {len(rollouts)} rollouts the best and the worst are shown; policy text [in brackets], forced text not.\n")
    for name, i in two.items():
        show_rollout(name, rollouts[i], beliefs[i], gains[i], outcomes[i], rewards[i], returns[i], tokenizer, cfg)
    flat = [g for gs in gains for g in gs]
    print(f"Over the group: gains {igpo.mean(flat):+.3f} ± {igpo.std(flat):.3f}, outcomes {igpo.mean(outcomes):+.3f} ± {igpo.std(outcomes):.3f} "
          f"(norm = {cfg.norm}, gamma = {cfg.gamma}, credit = igpo)\n")

    # An update on this group alone, so that the ratio has moved from 1: the loss is shown before it and after it.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=cfg.lr, weight_decay=0.0)
    before, = igpo.update(model, optimizer, rollouts, old, old, returns, cfg)
    new, _ = igpo.forward_scores(model, tokenizer, rollouts, None, cfg)
    print("Eq. 7 for the tokens that the policy was least sure of, after one update on this group (before it every ratio is 1 and every KL 0):")
    print("  rollout turn  token            log pi_old  log pi   ratio  clipped   return  surrogate   KL (k3)")
    for name, i in two.items():
        show_tokens(name, rollouts[i], old[i].tolist(), new[i].tolist(), returns[i], tokenizer, cfg)
    after = igpo.accumulate_gradient(model, rollouts, old, old, returns, cfg)
    print(f"  loss {before['loss']:+.4f} before the update, {after['loss']:+.4f} after; "
          f"ratio farthest from 1: {before['ratio']:.6f} -> {after['ratio']:.3f}")


def show_rollout(name, r, beliefs, gains, outcome, rewards, returns, tokenizer, cfg) -> None:
    """Eq. 2-6 turn by turn, and the tokens that each number falls on."""
    print(f"Rollout {name}: {len(r.ids)} tokens, {sum(r.mask)} of them the policy's; stop = {r.stop}, answer = {r.answer!r}")
    print(f"  b_0 = {beliefs[0]:+.3f}   (Eq. 3, read at token {r.boundaries[0]}: mean log-prob of the gold tokens)")
    for t, (reward, R) in enumerate(zip(rewards, returns)):
        own, forced = ([j for j in range(len(r.ids)) if r.turns[j] == t and r.mask[j] == by_policy] for by_policy in (1, 0))
        print(f"  turn {t + 1}, tokens {own[0]}-{own[-1]}: [{' '.join(tokenizer.decode(r.ids[own[0]:own[-1] + 1]).split())}]")
        if forced:
            shown = " ".join(tokenizer.decode(r.ids[forced[0]:forced[-1] + 1]).split())
            print(f"    tokens {forced[0]}-{forced[-1]}, masked: {shown[:110]}{'...' if len(shown) > 110 else ''}")
        if t < len(gains):
            levels = "{:+.3f} - {:+.3f}" if cfg.gain == "logprob" else "exp({:+.3f}) - exp({:+.3f})"
            earned = f"gain (Eq. 4) = {levels.format(beliefs[t + 1], beliefs[t])} = {gains[t]:+.3f}"
        else:
            earned = f"outcome (Eq. 2) = {outcome:+.3f}"
        print(f"    {earned};  normalised (Eq. 5) {reward:+.3f};  return (Eq. 6) {R:+.3f}")
    print()


def show_tokens(name, r, old, new, returns, tokenizer, cfg, most: int = 5) -> None:
    """Eq. 7 token by token."""
    own = [j for j, m in enumerate(r.mask) if m]
    for k in sorted(sorted(range(len(own)), key=old.__getitem__)[:most]):
        turn, ratio, d = r.turns[own[k]], math.exp(new[k] - old[k]), old[k] - new[k]
        R, clipped = returns[turn], min(max(ratio, 1 - cfg.clip), 1 + cfg.clip)
        print(f"  {name:>7} {turn + 1:>4}  {tokenizer.decode(r.ids[own[k]])!r:<16} {old[k]:>10.3f} {new[k]:>7.3f} {ratio:>7.3f}  {clipped:>7.3f}  "
              f"{R:>+7.3f}  {min(ratio * R, clipped * R):>+9.3f}  {math.exp(d) - d - 1:>8.5f}")
