"""python igpo.py --check [--model ..] [--train ..] [--search ..]: does what training assumes hold for this model, data and search?

A few rollouts of the policy as it stands, then one function per check. What the fast code computes is computed again in a slow
and obvious way: one forward of one unpadded text, nothing shared, nothing cached. Each check gives (status, figure, mend):

  pass   as it should be
  warn   may well be meant, but look at it before you spend hours
  fail   training would be wrong, or would learn nothing; the exit status is 1
"""
import contextlib
import io
import os
import random
import statistics
import sys
import unicodedata
from dataclasses import replace
from functools import cached_property, partial

import torch
from tqdm import tqdm

import igpo
from benchmarks import memory as sizes
from eval import cover_em

QUESTIONS, GROUP, PROBES = 4, 4, 50      # questions rolled out, rollouts of each, questions given to the search as they are
DRAWS = 512                              # single tokens drawn at one place
# Mean and largest deviation of a log-probability from the slow form's. bfloat16 has 8 bits: a logit of 20 is off by 0.06.
TOLERANCE = {torch.float32: (1e-4, 1e-2), torch.bfloat16: (0.05, 2.0)}
WARM_START = ("warm-start first: fine-tune on a few hundred transcripts of the format (demo/make.py does it for the demo's policy) "
              "and give that folder as --model; or take a larger instruct model")


class Trial:
    """What the checks look at. All of it is made when first asked for, so that a fault shows in the checks it concerns."""

    def __init__(self, cfg):
        self.cfg, self.group = cfg, min(cfg.group, GROUP)
        self.questions = igpo.load_train(cfg.train)
        self.search = igpo.MeteredSearch(igpo.open_run_search(cfg))
        self.model, self.tokenizer = igpo.load_model(cfg)
        self.lm = igpo.unwrap(self.model)
        some = 5 if cfg.search == "duckduckgo" else PROBES
        self.probes = random.Random(cfg.seed).sample(self.questions, min(len(self.questions), some))
        self.few = self.probes[:min(cfg.questions, QUESTIONS)]
        self.asked = [q for q in self.few for _ in range(self.group)]                         # the question of each rollout
        self.groups = [range(i, i + self.group) for i in range(0, len(self.asked), self.group)]

    @cached_property
    def found(self):
        """What the search returns for each probe's own words."""
        return self.search.search_many([q["question"] for q in self.probes], self.cfg.top_k)

    @cached_property
    def rollouts(self):
        return igpo.rollout(self.model, self.tokenizer, self.few, self.search, replace(self.cfg, group=self.group))

    @cached_property
    def scored(self):
        return igpo.score(self.model, self.tokenizer, self.rollouts, [q["answers"] for q in self.asked], self.cfg)

    @cached_property
    def longest(self):
        """Of each question, the index of the rollout with the most turns."""
        return [max(group, key=lambda i: len(self.rollouts[i].boundaries)) for group in self.groups]

    @torch.no_grad()
    def plain(self, ids, targets):
        """log pi at these indices of a text, (len(targets), vocabulary), from one forward of the text alone."""
        logits = self.lm(torch.tensor([ids], device=self.lm.device)).logits[0, torch.tensor(targets) - 1]
        return (logits.float() / self.cfg.temperature).log_softmax(-1)

    @cached_property
    def oracle(self):
        """Of each rollout: log pi of its policy tokens, and the mean and variance that a sample's log pi has at each of them."""
        rows = []
        for r in self.rollouts:
            own = [j for j, m in enumerate(r.mask) if m]
            all_logp = self.plain(r.ids, own)
            ids = torch.tensor(r.ids, device=all_logp.device)[own]
            rows.append((all_logp.gather(-1, ids[:, None])[:, 0], *moments(all_logp)))
        return rows


def moments(logp):
    """Mean and variance that log p has where tokens are drawn from p: (.., vocabulary) -> (..), (..)."""
    middle = (logp.exp() * logp).nan_to_num().sum(-1)
    return middle, (logp.exp() * (logp - middle[..., None]) ** 2).nan_to_num().sum(-1)


# ---- tokens ----------------------------------------------------------------------------------------------------------

def prompt(t):
    question = t.few[0]["question"]
    ids = igpo.encode_prompt(t.tokenizer, question)
    text = t.tokenizer.decode(ids)
    figure = f"{len(ids)} tokens, ends in {text[-24:]!r}" + ("" if igpo.INSTRUCTION in text else "; the chat template drops the instruction")
    nfc = partial(unicodedata.normalize, "NFC")       # some tokenizers compose what was decomposed
    if nfc(question) not in nfc(text) or t.tokenizer.decode(igpo.encode(t.tokenizer, text)) != text:
        return "fail", figure, "question or template do not come back from their tokens: do tokenizer and chat template belong together?"
    if not text.rstrip().endswith("<think>"):
        return "fail", figure, "the prompt must end in <think>, under which the belief is read: change the template's generation prompt"
    bos, opens = t.tokenizer.bos_token_id, t.tokenizer("x").input_ids[0]
    if bos is not None and opens == bos and ids.count(bos) != 1:
        return "warn", figure, f"{t.tokenizer.bos_token!r} should open the prompt once, it is there {ids.count(bos)} times: mend the template"
    return "pass", figure, ""


def stop_tags(t):
    pieces = {tag: [t.tokenizer.decode([i]) for i in igpo.encode(t.tokenizer, tag)] for tag in ("</search>", "</answer>")}
    figure = "; ".join(f"{tag} = {' '.join(map(repr, parts))}" for tag, parts in pieces.items())
    for action in ("search", "answer"):
        ids = igpo.encode(t.tokenizer, f" I need more.\n</think>\n<{action}> Tavo </{action}>")
        end = igpo.TurnEnd(t.tokenizer, 0, 1, set())
        ended = [bool(end(torch.tensor([ids[:n]]), None)[0]) for n in range(1, len(ids) + 1)]
        if ended != [False] * (len(ids) - 1) + [True] or igpo.parse_turn(t.tokenizer.decode(ids)) != (action, "Tavo"):
            return "fail", f"{figure}; a turn does not end at </{action}>", ("this tokenizer does not give our tags back as they are: take "
                                                                            "another model, or add the tags to its vocabulary and warm-start")
    return "pass", figure, ""


def padding(t):
    own = t.lm.generation_config.eos_token_id
    eos, pad = {t.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}, t.tokenizer.pad_token_id
    rows = t.lm.get_input_embeddings().weight.shape[0]
    figure = f"pad {pad}, eos {sorted(eos)}" + ("; the same, harmless here: padding is known by length" if pad in eos else "")
    if len(t.tokenizer) > rows or pad is None or pad >= rows:
        return "fail", f"{figure}; {len(t.tokenizer)} tokens, {rows} embeddings", "model and tokenizer do not belong together"
    return "pass" if eos else "warn", figure, "no end-of-sequence token: a policy that writes no tag goes on to --max_new_tokens"


def defaults(t):
    """Nothing to judge: what is set aside is said, and `sampling` tests that it has no effect."""
    quiet = ("_", "output", "return", "use_cache", "transformers_version", "eos", "bos", "pad", "do_sample", "cache", "max_", "trust")
    shaping = [f"{k} {v}" for k, v in t.lm.generation_config.to_diff_dict().items() if not k.startswith(quiet)]
    had = f"the checkpoint's {', '.join(shaping)} set aside" if shaping else "the checkpoint has none"
    return "pass", f"{had}; sampled at temperature {t.cfg.temperature:g}, nothing else", ""


def mask(t):
    """Prompt and results are put together anew; between them all must be the policy's, and nothing else."""
    wrong = forced = 0
    for r, q in zip(t.rollouts, t.asked):
        ids = igpo.encode_prompt(t.tokenizer, q["question"])
        expected = [0] * len(ids)
        wrong += r.ids[:len(ids)] != ids
        for start, end, found, error in zip(r.boundaries, r.boundaries[1:], r.retrieved, r.errors):
            block = igpo.encode_information(t.tokenizer, found, error, t.cfg.max_info_tokens)
            wrong += r.ids[end - len(block):end] != block
            expected += [1] * (end - start - len(block)) + [0] * len(block)
        expected += [1] * (len(r.ids) - len(expected))
        wrong += sum(a != b for a, b in zip(r.mask, expected)) + abs(len(r.mask) - len(expected))
        forced += expected.count(0)
    figure = f"{forced} forced tokens, {sum(len(r.ids) for r in t.rollouts) - forced} of the policy, {wrong} places wrong"
    return "fail" if wrong else "pass", figure, "the loss would train on text that the policy did not write: rollout() has been changed"


# ---- mathematics -----------------------------------------------------------------------------------------------------

def deviation(t, pairs, what, mend):
    """The verdict on pairs (fast, slow) of numbers; a little over the tolerance may be rounding."""
    apart = [abs(a - b) for a, b in pairs]
    middle, most = statistics.fmean(apart), max(apart)
    over = max(middle / TOLERANCE[t.lm.dtype][0], most / TOLERANCE[t.lm.dtype][1])
    status = "pass" if over <= 1 else "warn" if over <= 3 else "fail"                         # not finite: neither of the first two
    return status, f"{len(apart)} {what}, apart by {middle:.1e} in the mean, {most:.1e} at most ({t.lm.dtype})", mend


def sampled_is_scored(t):
    pairs = [pair for fast, (slow, _, _) in zip(t.scored[0], t.oracle) for pair in zip(fast.tolist(), slow.tolist(), strict=True)]
    return deviation(t, pairs, "sampled tokens against a plain forward", "score() does not give this model's log pi at --temperature: "
                     "its attention or its head is of a kind that token_logps does not know")


def sampling(t):
    """Are tokens drawn from the pi that is scored? Then the sum of their log pi has a known mean and variance, and the rare ones come.

    A nearly deterministic policy gives itself away only where it is least sure of itself: there DRAWS single tokens are drawn
    besides. That all of them are among the likeliest tokens, which hold C of the mass, has the probability C ** DRAWS.
    """
    logp, middle, spread = (torch.cat(column).double() for column in zip(*t.oracle))
    r, j = [(r, j) for r in t.rollouts for j, own in enumerate(r.mask) if own][middle.argmin()]      # minus the mean of log pi is the entropy
    starts = [igpo.Rollout(r.ids[:j], [0] * j, [-1] * j, [j]) for _ in range(DRAWS)]
    list(igpo.finish(t.model, t.tokenizer, starts, t.search, replace(t.cfg, max_turns=1, max_new_tokens=1)))
    here = t.plain(r.ids, [j])[0].double()
    drawn = torch.tensor([start.ids[j] for start in starts], device=here.device)
    p, likeliest = here.exp().sort(descending=True)
    held = min(p.cumsum(0)[likeliest.argsort()[drawn]].max().item(), 1.0)

    logp = torch.cat([logp, here[drawn]])
    middle, spread = (torch.cat([known, value.expand(DRAWS)]) for known, value in zip((middle, spread), moments(here)))
    z = ((logp - middle).sum() / spread.sum().clamp(min=1e-3).sqrt()).item()
    figure = (f"log pi of {len(logp)} sampled tokens is {z:+.1f} sigma from its expectation; "
              f"where the policy is least sure, {DRAWS} draws are among tokens that hold {held:.1%}")
    mend = "a generation default of the checkpoint, or another temperature, shapes the sampling"
    return "pass" if abs(z) < 5 and held ** DRAWS > 1e-6 else "fail", figure, mend


def ratio(t):
    t.model.train()
    try:
        returns = [[1.0] * len(r.boundaries) for r in t.rollouts]
        far = igpo.accumulate_gradient(t.model, t.rollouts, t.scored[0], t.scored[0], returns, t.cfg)["ratio"]
    finally:
        t.model.eval()
        t.model.zero_grad(set_to_none=True)
    figure = f"new / old farthest from 1: {far:.6f}"
    if t.lm.dtype == torch.float32:
        mend = "the update scores other than score() does: dropout, or a layer that tells training from evaluation?"
        return "pass" if abs(far - 1) < 1e-2 else "fail", figure, mend
    return "pass" if abs(far - 1) < t.cfg.clip else "warn" if far < 8 else "fail", figure, "rounding alone would be clipped: try --dtype float32"


def belief(t):
    schema, pairs = igpo.encode(t.tokenizer, igpo.SCHEMA), []
    for i in t.longest:
        r, gold = t.rollouts[i], igpo.encode_gold(t.tokenizer, t.asked[i]["answers"])
        for b, fast in zip(r.boundaries, t.scored[1][i], strict=True):
            probe = r.ids[:b] + schema + gold
            logp = t.plain(probe, list(range(len(probe) - len(gold), len(probe))))
            pairs.append((fast, logp[range(len(gold)), gold].mean().item()))
    return deviation(t, pairs, "beliefs against one forward per boundary", "the mask of the one pass does not act on this model's attention")


def forced_gradient(t):
    """The state at j predicts token j + 1: a gradient may reach it only if the policy wrote that."""
    r, states = t.rollouts[max(t.longest, key=lambda i: len(t.rollouts[i].boundaries))], []

    def keep(module, args, kwargs, out):
        out[0].retain_grad()
        states.append(out[0])
    hook = t.lm.base_model.register_forward_hook(keep, with_kwargs=True)
    try:
        zeros = [torch.zeros(sum(r.mask), device=t.lm.device)]
        igpo.accumulate_gradient(t.model, [r], zeros, zeros, [[1.0] * len(r.boundaries)], replace(t.cfg, clip=1e9, kl_coef=0.0))
    finally:
        hook.remove()
        t.model.zero_grad(set_to_none=True)
    touched = {j + 1 for j in torch.nonzero(states[0].grad[0].abs().sum(-1)).flatten().tolist()}
    forced = {j for j in touched if j >= len(r.mask) or not r.mask[j]}
    figure = f"reached: {len(touched - forced)} of {sum(r.mask)} policy tokens, {len(forced)} of {r.mask.count(0)} forced tokens"
    return "fail" if forced or not touched else "pass", figure, "the loss reaches text that the policy did not write"


# ---- data and search -------------------------------------------------------------------------------------------------

def golds(t):
    lengths = [len(igpo.encode(t.tokenizer, q["answers"][0], data=True)) for q in t.questions]
    long = igpo.mean(n > igpo.MAX_GOLD_TOKENS for n in lengths)
    wordless = igpo.mean(not any(igpo.answer_words(a) for a in q["answers"]) for q in t.questions)
    figure = (f"{statistics.median(lengths):g} tokens in the middle, {max(lengths)} at most, {long:.1%} over the cap of {igpo.MAX_GOLD_TOKENS}; "
              f"{igpo.mean(len(q['answers']) for q in t.questions):.1f} aliases; {wordless:.1%} without a word")
    if wordless:
        status = "fail" if wordless > 0.1 or not min(lengths) else "warn"
        return status, figure, "no answer can be right where the gold has no word (F1 compares words): leave these questions out"
    return "warn" if long > 0.1 else "pass", figure, "the belief reads the first tokens of the first alias alone: put a short alias first"


def context(t):
    with contextlib.redirect_stdout(io.StringIO()):      # of golds we speak ourselves
        try:
            igpo.check_data(t.tokenizer, t.questions, t.cfg.train, t.model, t.cfg)
        except igpo.UserError as e:
            return "fail", igpo.first_line(e), "leave it out, lower --max_new_tokens, or take a model of longer context"
    cut = igpo.mean(r.stop == "length" for r in t.rollouts)
    figure = f"all {len(t.questions)} questions leave room for a turn; {cut:.0%} of {len(t.rollouts)} rollouts were cut"
    return "pass" if cut < 0.5 else "warn", figure, "raise --max_new_tokens; or --max_turns times --max_info_tokens is more than the model can read"


def searches(t):
    results = [(found, getattr(found, "error", None)) for found in t.found]
    results += [pair for r in t.rollouts for pair in zip(r.retrieved, r.errors)]
    empty = [not found for found, error in results if not error]
    n, failed = t.search.queries, t.search.failed
    figure = f"{n - failed} of {n} answered, {1000 * t.search.seconds / max(n, 1):.0f} ms each, {igpo.mean(empty):.0%} of the answers empty"
    if failed:
        status = "fail" if failed > t.cfg.max_failed_searches * n else "warn"
        return status, f"{figure}; {t.search.last_error}", 'try it alone: python search_tool.py --search .. "a question"'
    status = "pass" if igpo.mean(empty) < 0.5 else "fail" if all(empty) else "warn"
    return status, figure, "hardly anything is found: is it the right corpus or index?"


def findable(t):
    """Golds that no page need hold word for word (yes, no) do not count."""
    def share(pairs):
        pairs = [(found, answers) for found, answers in pairs if not {"yes", "no"} & {a.lower() for a in answers}]
        hits = [any(cover_em(f"{p.title} {p.text}", answers) for p in found) for found, answers in pairs]
        return igpo.mean(hits), f"{igpo.mean(hits):.0%} of {len(hits)}"
    alone, a = share([(found, q["answers"]) for found, q in zip(t.found, t.probes)])
    met, b = share([(sum(r.retrieved, []), q["answers"]) for r, q in zip(t.rollouts, t.asked)])
    figure = f"the gold stands in what the question itself brings for {a}, in what the rollouts found for {b}"
    return "pass" if max(alone, met) >= 0.02 else "warn", figure, ("training may have nothing to work with: do --train and --search belong "
                                                                   "together? (questions of several hops are low on the first by nature)")


# ---- the machine, and what there is to learn -------------------------------------------------------------------------

def memory(t):
    cfg = sizes.fit(t.model, t.cfg)
    peak, have = sizes.memory_card(t.model, cfg)["peak"], sizes.device_memory()
    figure = sizes.memory_line(t.model, cfg).removeprefix("Memory at most, computed: ")
    mend = "a run lowers the two batch sizes until it fits; for more room a smaller model, --dtype bfloat16, --gradient_checkpointing"
    return "fail" if peak > have else "warn" if cfg != t.cfg or peak > 0.8 * have else "pass", figure, mend


def format_kept(t):
    stops = [r.stop for r in t.rollouts]
    kept = igpo.mean(s in ("answer", "turns") for s in stops)
    figure = f"{kept:.0%} of {len(stops)} rollouts ({stops.count('format')} broke it, {stops.count('length')} were cut)"
    dropped = igpo.INSTRUCTION not in t.tokenizer.decode(igpo.encode_prompt(t.tokenizer, t.few[0]["question"]))
    hint = ". The chat template drops the instruction: that alone may be the cause" if dropped else ""
    return "pass" if kept >= 0.25 else "warn" if kept else "fail", figure, WARM_START + hint


def signal(t):
    outcomes = [igpo.outcome_reward(r, q["answers"], t.cfg.format_penalty) for r, q in zip(t.rollouts, t.asked)]
    gains = [igpo.info_gains(b, t.cfg.gain) for b in t.scored[1]]
    by_outcome = [igpo.std(outcomes[i] for i in g) > igpo.STD_FLOOR for g in t.groups]
    by_gain = [igpo.std(x for i in g for x in gains[i]) > igpo.STD_FLOOR for g in t.groups]
    figure = f"of {len(t.groups)} groups {sum(by_outcome)} differ in outcome, {sum(by_gain)} in gain"
    enough = any(by_outcome) or any(by_gain) and t.cfg.credit != "grpo"
    mend = f"rollouts that all earn the same teach nothing: raise --group, take easier questions, or {WARM_START}"
    return "pass" if enough else "fail", figure, mend


CHECKS = {"prompt": prompt, "stop tags": stop_tags, "pad and eos": padding, "generation defaults": defaults, "mask": mask,
          "sampled = scored": sampled_is_scored, "drawn as scored": sampling, "ratio before updates": ratio, "belief in one pass": belief,
          "forced text's gradient": forced_gradient, "gold answers": golds, "context": context, "searches": searches,
          "gold can be found": findable, "memory": memory, "format kept": format_kept, "signal": signal}


def run_checks(t) -> dict[str, tuple[str, str, str]]:
    """Name -> (status, figure, mend). A check that raises has failed, and the others go on."""
    rows, bar = {}, tqdm(CHECKS.items(), unit="check", leave=False, disable=None)
    for name, one in bar:
        bar.set_description(name)
        try:
            rows[name] = one(t)
        except Exception as e:
            rows[name] = "fail", f"{type(e).__name__}: {igpo.first_line(e)}", "it could not even be tried"
    return rows


def picture(t, colour: bool) -> str:
    """A rollout: what the policy wrote green or [in brackets], forced text dim, long forced text cut."""
    r, parts = t.rollouts[t.longest[0]], []
    starts = [j for j in range(len(r.ids)) if j == 0 or r.mask[j] != r.mask[j - 1]] + [len(r.ids)]
    for start, end in zip(starts, starts[1:]):
        text = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in t.tokenizer.decode(r.ids[start:end]))
        if not r.mask[start] and len(text) > 400:
            text = f"{text[:120]} ... {text[-240:]}"
        before, after = (("\x1b[32m", "\x1b[0m") if r.mask[start] else ("\x1b[2m", "\x1b[0m")) if colour else "[]" if r.mask[start] else ("", "")
        parts.append(before + text + after)
    return "".join(parts)


def check(cfg) -> int:
    """Print one rollout and the table; 1 if a check fails, else 0."""
    t = Trial(cfg)
    rows = run_checks(t)
    colour = "FORCE_COLOR" in os.environ or sys.stdout.isatty()
    if "rollouts" in vars(t):
        print(f"One rollout; what the policy wrote, and is trained on, is {'green' if colour else '[in brackets]'}:\n\n{picture(t, colour)}\n")
    shades = {"pass": 32, "warn": 33, "fail": 31}
    for name, (status, figure, mend) in rows.items():
        print(f"\x1b[{shades[status]}m{status}\x1b[0m" if colour else status, f" {name:24}{figure}")
        if status != "pass":
            print(f"      {'':24}-> {mend}")
    counts = {s: sum(row[0] == s for row in rows.values()) for s in shades}
    print(f"\n{cfg.model}, {cfg.train}, {cfg.search}: " + ", ".join(f"{n} {s}" for s, n in counts.items()))
    return int(counts["fail"] > 0)
