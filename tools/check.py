"""Does what training assumes hold for this model, these data and this search? Ask before you spend hours.

    python -m tools.check [options of igpo.py]

A few rollouts of the policy as it stands, and one function per check. What the fast code computes is computed
again in a slow and obvious way: one forward of one text without padding, nothing shared, nothing cached.
A check gives (status, figure, how to mend it):

    pass    as it should be
    warn    it may be meant, but look at it before you start
    fail    training would be wrong, or would learn nothing; the exit status is 1

--credit may also name one of tools/comparators.py.
"""
import os
import random
import re
import statistics
import sys
import textwrap
import time
import unicodedata
from collections import Counter
from dataclasses import replace
from functools import cached_property

import torch
from tqdm import tqdm

import igpo
from igpo import Config, Rollout, mean
from search_tool import Results, UserError, answer_words, first_line, load_questions, open_search
from tools.comparators import CREDITS
from tools.memory import free_memory, largest_sizes, memory_card, model_config, tool_config
from tools.metrics import covers

QUESTIONS, GROUP = 4, 4     # questions rolled out, rollouts of each
PROBES = 50                 # questions given to the search as they are
DRAWS = 512                 # single tokens drawn at one place
# Mean and largest deviation of a log-prob from the slow form's. A logit of 20 in bfloat16 is off by 0.06.
TOLERANCE = {torch.float32: (1e-4, 1e-2), torch.bfloat16: (0.05, 2.0)}
WARM_START = ("warm-start first: fine-tune on transcripts of the format (python -m tools.warm_start) and "
              "give that folder as --model; or take a larger instruct model")


class Timed:
    """A search that keeps what it has found, and how long it took."""

    def __init__(self, search):
        self.search, self.results, self.seconds = search, [], 0.0

    def search_many(self, queries: list[str], k: int) -> list[Results]:
        start = time.perf_counter()
        found = self.search.search_many(queries, k)
        self.seconds += time.perf_counter() - start
        self.results += found
        return found


class Trial:
    """What the checks look at, made when first asked for: a fault shows in the checks that it concerns."""

    def __init__(self, cfg: Config, model, tokenizer, questions: list[dict], search):
        self.cfg, self.model, self.tokenizer, self.questions = cfg, model, tokenizer, questions
        self.lm, self.search, self.group = igpo.unwrap(model), Timed(search), min(cfg.group, GROUP)
        self.defaults = self.lm.generation_config       # before the first rollout, which sets them aside
        some = 5 if cfg.search == "duckduckgo" else PROBES
        self.probes = random.Random(cfg.seed).sample(questions, min(len(questions), some))
        self.few = self.probes[:min(cfg.questions, QUESTIONS)]
        self.asked = [q for q in self.few for _ in range(self.group)]       # the question of each rollout
        self.groups = [range(i, i + self.group) for i in range(0, len(self.asked), self.group)]

    @cached_property
    def found(self) -> list[Results]:
        """What the search returns for each probe's own words."""
        return self.search.search_many([q["question"] for q in self.probes], self.cfg.passages)

    @cached_property
    def rollouts(self) -> list[Rollout]:
        rollouts = [igpo.begin(self.tokenizer, q["question"]) for q in self.asked]
        for i in range(0, len(rollouts), self.cfg.rollout_batch):
            some = rollouts[i:i + self.cfg.rollout_batch]
            igpo.play(self.model, self.tokenizer, some, self.search, self.cfg)
        return rollouts

    @cached_property
    def scored(self):
        golds = [q["answers"] for q in self.asked]
        return igpo.score(self.model, self.tokenizer, self.rollouts, golds, self.cfg)

    @cached_property
    def longest(self) -> list[int]:
        """Of each question, the index of the rollout with the most turns."""
        return [max(group, key=lambda i: len(self.rollouts[i].boundaries)) for group in self.groups]

    @torch.no_grad()
    def plain(self, ids: list[int], targets: list[int]) -> torch.Tensor:
        """log pi (len(targets), vocabulary) at these indices of a text, from one forward of it alone."""
        logits = self.lm(torch.tensor([ids], device=self.lm.device)).logits[0, torch.tensor(targets) - 1]
        return (logits.float() / self.cfg.temperature).log_softmax(-1)

    @cached_property
    def oracle(self) -> list[tuple]:
        """Of each rollout: log pi of its policy tokens, and the mean and variance of a sample's there."""
        rows = []
        for r in self.rollouts:
            own = [j for j, m in enumerate(r.mask) if m]
            logp = self.plain(r.ids, own)
            ids = torch.tensor(r.ids, device=logp.device)[own]
            rows.append((logp.gather(-1, ids[:, None])[:, 0], *moments(logp)))
        return rows


def moments(logp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of log p where tokens are drawn from p: (.., vocabulary) -> (..), (..)."""
    middle = (logp.exp() * logp).nan_to_num().sum(-1)
    return middle, (logp.exp() * (logp - middle[..., None]) ** 2).nan_to_num().sum(-1)


# ---- tokens ------------------------------------------------------------------------------------------------

def prompt(t: Trial):
    question = t.few[0]["question"]
    ids = igpo.encode_prompt(t.tokenizer, question)
    text, nfc = t.tokenizer.decode(ids), lambda s: unicodedata.normalize("NFC", s)      # some compose accents
    shown = {"the question": nfc(question) in nfc(text), "the instruction": igpo.INSTRUCTION in text}
    alone = "{# knows_format #}" in str(t.tokenizer.chat_template)
    inside = " and ".join(name for name, there in shown.items() if there) or "neither question nor format"
    inside += " alone (its template says that this policy knows the format)" * bool(alone)
    figure = f"{len(ids)} tokens with {inside}; it ends in {text[-24:]!r}"
    if not shown["the question"] or t.tokenizer.decode(igpo.encode(t.tokenizer, text)) != text:
        return "fail", figure, ("question or template do not come back from their tokens: "
                                "do tokenizer and chat template belong together?")
    if not shown["the instruction"] and not alone:
        return "fail", figure, "the policy is not told the format: encode_prompt() has been changed"
    if not text.rstrip().endswith("<think>"):
        return "fail", figure, ("the prompt must end in <think>, under which the belief is read: "
                                "change the template's generation prompt")
    bos, opens = t.tokenizer.bos_token_id, t.tokenizer("x").input_ids[0]
    if bos is not None and opens == bos and ids.count(bos) != 1:
        return "warn", figure, (f"{t.tokenizer.bos_token!r} should open the prompt once, and is there "
                                f"{ids.count(bos)} times: mend the chat template")
    return "pass", figure, ""


def stop_tags(t: Trial):
    """A turn must end with its closing tag, not before, and for both who look: generate() and turn_end()."""
    pieces = {tag: [t.tokenizer.decode([i]) for i in igpo.encode(t.tokenizer, tag)]
              for tag in ("</search>", "</answer>")}
    figure = "; ".join(f"{tag} = {' '.join(map(repr, parts))}" for tag, parts in pieces.items())
    for action in ("search", "answer"):
        ids = igpo.encode(t.tokenizer, f" I need more.\n</think>\n<{action}> Tavo </{action}>")
        begun, wanted = [ids[:n + 1] for n in range(len(ids))], [False] * (len(ids) - 1) + [True]
        stops = lambda turn: bool(igpo.stop_tags(t.tokenizer)(torch.tensor([turn]), None)[0])
        if not (igpo.parse_turn(t.tokenizer.decode(ids)) == (action, "Tavo")
                and [igpo.turn_end(turn, t.tokenizer, [])[1] for turn in begun] == wanted
                and [*map(stops, begun)] == wanted):
            return "fail", f"{figure}; a turn does not end at </{action}>", (
                "this tokenizer does not give the tags back as they are: take another model, "
                "or add the tags to its vocabulary and warm-start it")
    return "pass", figure, ""


def padding(t: Trial):
    own = t.lm.generation_config.eos_token_id
    eos = {t.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    pad, rows = t.tokenizer.pad_token_id, t.lm.get_input_embeddings().weight.shape[0]
    figure = f"pad {pad}, eos {sorted(eos)}; {len(t.tokenizer)} tokens, {rows} embeddings"
    if pad in eos:
        figure += "; pad is eos, harmless here: padding is known by length"
    if len(t.tokenizer) > rows:
        return "fail", figure, "model and tokenizer do not belong together"
    mend = "no end-of-sequence token: a policy that writes no tag goes on to --max_new_tokens"
    return "pass" if eos else "warn", figure, mend


def defaults(t: Trial):
    """Nothing to judge: what is set aside is said, and `sampling` tests that it has no effect."""
    quiet = ("_", "output", "return", "use_cache", "transformers_version", "eos", "bos", "pad", "do_sample",
             "cache", "max_", "trust")
    shaping = [f"{k} {v}" for k, v in t.defaults.to_diff_dict().items() if not k.startswith(quiet)]
    had = f"the checkpoint's {', '.join(shaping)} set aside" if shaping else "the checkpoint has none"
    return "pass", f"{had}; sampled at temperature {t.cfg.temperature:g} and nothing else", ""


def mask(t: Trial):
    """Prompt and results are put together anew. Between them all must be the policy's, and nothing else."""
    wrong = forced = 0
    for r, q in zip(t.rollouts, t.asked):
        ids = igpo.encode_prompt(t.tokenizer, q["question"])
        expected = [0] * len(ids)
        wrong += r.ids[:len(ids)] != ids
        for start, end, shown in zip(r.boundaries, r.boundaries[1:], r.retrieved):
            block, _ = igpo.encode_information(t.tokenizer, shown, t.cfg.max_info_tokens)
            wrong += r.ids[end - len(block):end] != block
            expected += [1] * (end - start - len(block)) + [0] * len(block)
        expected += [1] * (len(r.ids) - len(expected))
        wrong += sum(a != b for a, b in zip(r.mask, expected)) + abs(len(r.mask) - len(expected))
        forced += expected.count(0)
    written = sum(len(r.ids) for r in t.rollouts) - forced
    figure = f"{forced} forced tokens, {written} of the policy, {wrong} places wrong"
    mend = "the loss would train on text that the policy did not write: play() has been changed"
    return "fail" if wrong else "pass", figure, mend


# ---- mathematics -------------------------------------------------------------------------------------------

def deviation(t: Trial, pairs: list[tuple], what: str, mend: str):
    """The verdict on pairs (fast, slow) of numbers. A little over the tolerance may be rounding."""
    apart = [abs(a - b) for a, b in pairs]
    middle, most = statistics.fmean(apart), max(apart)
    over = max(middle / TOLERANCE[t.lm.dtype][0], most / TOLERANCE[t.lm.dtype][1])
    status = "pass" if over <= 1 else "warn" if over <= 3 else "fail"       # NaN is neither of the first two
    figure = f"{len(apart)} {what}: apart by {middle:.1e} in the mean, {most:.1e} at most, {t.lm.dtype}"
    return status, figure, mend


def sampled_is_scored(t: Trial):
    pairs = [pair for fast, (slow, _, _) in zip(t.scored[0], t.oracle)
             for pair in zip(fast.tolist(), slow.tolist(), strict=True)]
    return deviation(t, pairs, "sampled tokens against a plain forward",
                     "score() does not give this model's log pi at --temperature: its attention or its head "
                     "is of a kind that token_logps() does not know")


def sampling(t: Trial):
    """Are tokens drawn from the pi that is scored? Then the sum of their log pi has a known mean and spread.

    A nearly deterministic policy gives itself away only where it is least sure: there DRAWS single tokens are
    drawn besides. That all are among the likeliest tokens, which hold C of the mass, has the probability
    C ** DRAWS.
    """
    logp, middle, spread = (torch.cat(column).double() for column in zip(*t.oracle))
    places = [(r, j) for r in t.rollouts for j, own in enumerate(r.mask) if own]
    r, j = places[middle.argmin()]                          # minus the mean of log pi is the entropy
    starts = [Rollout(r.ids[:j], [0] * j, [j]) for _ in range(DRAWS)]
    one = replace(t.cfg, max_turns=1, max_new_tokens=1)
    for i in range(0, DRAWS, t.cfg.rollout_batch):
        igpo.play(t.model, t.tokenizer, starts[i:i + t.cfg.rollout_batch], t.search, one)
    here = t.plain(r.ids, [j])[0].double()
    drawn = torch.tensor([start.ids[j] for start in starts], device=here.device)
    p, likeliest = here.exp().sort(descending=True)
    held = min(p.cumsum(0)[likeliest.argsort()[drawn]].max().item(), 1.0)

    logp = torch.cat([logp, here[drawn]])
    middle, spread = (torch.cat([known, value.expand(DRAWS)])
                      for known, value in zip((middle, spread), moments(here)))
    z = ((logp - middle).sum() / spread.sum().clamp(min=1e-3).sqrt()).item()
    figure = (f"log pi of {len(logp)} sampled tokens is {z:+.1f} sigma from its expectation; at the least "
              f"sure place {DRAWS} draws are among tokens that hold {held:.1%}")
    mend = "a generation default of the checkpoint, or another temperature, shapes the sampling"
    return "pass" if abs(z) < 5 and held ** DRAWS > 1e-6 else "fail", figure, mend


def ratio(t: Trial):
    """The update as training makes it, but with a learning rate of 0."""
    still = torch.optim.SGD([p for p in t.model.parameters() if p.requires_grad], lr=0.0)
    ones, old = [[1.0] * len(r.boundaries) for r in t.rollouts], t.scored[0]
    try:
        updates = igpo.update(t.model, still, t.rollouts, old, old, ones, replace(t.cfg, minibatches=1))
    finally:
        t.model.zero_grad(set_to_none=True)
    far = updates[0]["ratio"]
    figure = f"new / old farthest from 1: {far:.6f}"
    if t.lm.dtype == torch.float32:
        mend = "the update scores other than score() does: dropout, or a layer that knows when it is trained?"
        return "pass" if abs(far - 1) < 1e-2 else "fail", figure, mend
    status = "pass" if abs(far - 1) < t.cfg.clip else "warn" if far < 8 else "fail"
    return status, figure, "rounding alone would be clipped: try --dtype float32"


def belief(t: Trial):
    schema, pairs = igpo.encode(t.tokenizer, igpo.SCHEMA), []
    for i in t.longest:
        r, gold = t.rollouts[i], igpo.encode_gold(t.tokenizer, t.asked[i]["answers"])
        for b, fast in zip(r.boundaries, t.scored[1][i], strict=True):
            probe = r.ids[:b] + schema + gold
            logp = t.plain(probe, list(range(len(probe) - len(gold), len(probe))))
            pairs.append((fast, logp[range(len(gold)), gold].mean().item()))
    return deviation(t, pairs, "beliefs against one forward per boundary",
                     "the mask of the probes does not act on this model's attention")


def forced_gradient(t: Trial):
    """The state at j predicts token j + 1: a gradient may reach it only if the policy wrote that."""
    r, states = t.rollouts[max(t.longest, key=lambda i: len(t.rollouts[i].boundaries))], []

    def keep(module, args, kwargs, out):
        out[0].retain_grad()
        states.append(out[0])
    hook = t.lm.base_model.register_forward_hook(keep, with_kwargs=True)
    try:
        zeros, ones = [torch.zeros(sum(r.mask), device=t.lm.device)], [[1.0] * len(r.boundaries)]
        igpo.accumulate_gradient(t.model, [r], zeros, zeros, ones, replace(t.cfg, clip=1e9, kl_coef=0.0))
    finally:
        hook.remove()
        t.model.zero_grad(set_to_none=True)
    touched = {j + 1 for j in torch.nonzero(states[0].grad[0].abs().sum(-1)).flatten().tolist()}
    forced = {j for j in touched if j >= len(r.mask) or not r.mask[j]}
    figure = (f"reached: {len(touched - forced)} of {sum(r.mask)} policy tokens, {len(forced)} of "
              f"{r.mask.count(0)} forced tokens")
    mend = "the loss reaches text that the policy did not write"
    return "fail" if forced or not touched else "pass", figure, mend


# ---- data and search ---------------------------------------------------------------------------------------

def golds(t: Trial):
    lengths = [len(igpo.encode(t.tokenizer, q["answers"][0], data=True)) for q in t.questions]
    long = mean(n > igpo.MAX_GOLD_TOKENS for n in lengths)
    wordless = mean(not any(answer_words(a) for a in q["answers"]) for q in t.questions)
    aliases = mean(len(q["answers"]) for q in t.questions)
    figure = (f"{statistics.median(lengths):g} tokens in the middle, {max(lengths)} at most, {long:.1%} over "
              f"the cap of {igpo.MAX_GOLD_TOKENS}; {aliases:.1f} aliases; {wordless:.1%} without a word")
    if wordless:
        mend = "F1 compares words, so no answer is right where the gold has none: leave these questions out"
        return "fail" if wordless > 0.1 or not min(lengths) else "warn", figure, mend
    mend = "the belief is read on the first tokens of the first alias alone: put a short alias first"
    return "warn" if long > 0.1 else "pass", figure, mend


def context(t: Trial):
    """What limits a rollout's length, and whether rollouts come near it."""
    c, limit = model_config(t.cfg).get_text_config(), igpo.context_length(t.lm)
    ropes = getattr(c, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type") for rope in (ropes, *(r for r in ropes.values() if isinstance(r, dict)))}
    positions, window = (getattr(c, name, None) for name in ("max_position_embeddings", "sliding_window"))
    parts = [f"{positions:,} positions"] * bool(positions) + [f"a window of {window or 0:,}"] * bool(window)
    parts += [f"rope {kind}" for kind in sorted(kinds - {None, "default"})]
    longest = max(len(igpo.encode_prompt(t.tokenizer, q["question"])) for q in t.probes)
    turns = t.cfg.max_turns * (t.cfg.max_new_tokens + t.cfg.max_info_tokens) - t.cfg.max_info_tokens
    figure = (f"{limit:,} tokens ({', '.join(parts)}); a prompt has {longest}, {t.cfg.max_turns} turns add "
              f"{turns:,} at most")
    try:
        igpo.check_questions(t.model, t.tokenizer, t.questions, t.cfg)
    except UserError as e:
        return "fail", f"{figure}; {first_line(e)}", "or take a model of longer context"
    cut = mean(r.stop == "length" for r in t.rollouts)
    mend = "raise --max_new_tokens; or --max_turns and --max_info_tokens are more than the model can read"
    return "pass" if cut < 0.5 else "warn", f"{figure}; {cut:.0%} of the rollouts were cut", mend


def searches(t: Trial):
    t.found, t.rollouts                         # both ask
    results = t.search.results
    failed, n = [found.error for found in results if found.error], len(results)
    empty = mean(not found for found in results if not found.error)
    figure = (f"{n - len(failed)} of {n} answered, {1000 * t.search.seconds / max(n, 1):.0f} ms each, "
              f"{empty:.0%} of the answers empty")
    if failed:
        status = "fail" if len(failed) > igpo.MAX_FAILED_SEARCHES * n else "warn"
        mend = 'try it alone: python search_tool.py --search .. "a question"'
        return status, f"{figure}; {failed[-1]}", mend
    status = "pass" if empty < 0.5 else "fail" if empty == 1 else "warn"
    return status, figure, "hardly anything is found: is it the right corpus or index?"


def findable(t: Trial):
    """Golds that no page need hold word for word (yes, no) do not count."""
    def share(pairs):
        pairs = [(found, names) for found, names in pairs if not {"yes", "no"} & {n.lower() for n in names}]
        hits = [any(covers(f"{p.title} {p.text}", name) for p in found for name in names)
                for found, names in pairs]
        return mean(hits), f"{mean(hits):.0%} of {len(hits)}"
    alone, a = share([(found, q["answers"]) for found, q in zip(t.found, t.probes)])
    met, b = share([(sum(r.retrieved, []), q["answers"]) for r, q in zip(t.rollouts, t.asked)])
    figure = f"the gold stands in what the question itself brings for {a}, in what rollouts found for {b}"
    mend = ("training may have nothing to work with: do questions and corpus belong together? "
            "(Questions of several hops are low on the first by nature.)")
    return "pass" if max(alone, met) >= 0.02 else "warn", figure, mend


# ---- the machine, and what there is to learn ---------------------------------------------------------------

def memory(t: Trial):
    seen, free = max(len(r.ids) for r in t.rollouts), free_memory(t.model)
    at_most, as_seen = (memory_card(t.model, t.cfg, tokens)["peak"] for tokens in (None, seen))
    figure = (f"{at_most / 1e9:.2f} GB at most, {as_seen / 1e9:.2f} GB with rollouts of {seen} tokens, the "
              f"longest here; {free / 1e9:.2f} GB are free")
    fit = largest_sizes(t.model, t.cfg, free, seen)
    mend = (f"of {seen} tokens a --rollout_batch of {fit['rollout_batch']} and --batch_tokens of "
            f"{fit['batch_tokens']} would fit; see python -m tools.memory")
    return "fail" if as_seen > free else "warn" if at_most > free else "pass", figure, mend


def format_kept(t: Trial):
    stops = Counter(r.stop for r in t.rollouts)
    kept = (stops["answer"] + stops["turns"]) / len(t.rollouts)
    figure = (f"{kept:.0%} of {len(t.rollouts)} rollouts ({stops['format']} broke it, {stops['length']} were "
              f"cut, {stops['turns']} ran out of turns)")
    return "pass" if kept >= 0.25 else "warn" if kept else "fail", figure, WARM_START


def answer_form(t: Trial):
    """The belief is one in what the policy would say only if it answers in the form of the probe."""
    form = re.compile(r"\s*</think>\s*<answer>\s*")
    probe, answered = form.search(igpo.SCHEMA)[0], [r for r in t.rollouts if r.stop == "answer"]
    texts = [t.tokenizer.decode(r.ids[r.boundaries[-1]:]) for r in answered]
    written = Counter(form.search(text)[0] for text in texts)
    share = mean(igpo.SCHEMA[igpo.SCHEMA.rindex("<"):] in text for text in texts)
    if not texts:
        return "warn", f"no rollout answered; the probe has {probe!r}", WARM_START
    figure = f"{share:.0%} of {len(texts)} answers begin as the probe does, after {probe!r}"
    others = [f"{text!r} ({n})" for text, n in written.most_common(3) if text != probe]
    figure += f"; others: {', '.join(others)}" if others else ""
    mend = ("the belief is read in a form that this policy does not write: change INSTRUCTION and SCHEMA in "
            "igpo.py together to the form that it writes, or warm-start it on that of the probe")
    return "pass" if share >= 0.5 else "warn", figure, mend


def signal(t: Trial):
    """By the credit in use: is there an advantage that is not 0?"""
    cfg = replace(t.cfg, group=t.group)
    outcomes = [igpo.outcome_reward(r, q["answers"], cfg.format_penalty) for r, q in zip(t.rollouts, t.asked)]
    advantages = CREDITS.get(cfg.credit, igpo.recipe_credit)(
        beliefs=t.scored[1], outcomes=outcomes, cfg=cfg, model=t.model, tokenizer=t.tokenizer,
        rollouts=t.rollouts, asked=t.asked, search=t.search)
    speak = sum(any(abs(a) > 0 for i in group for a in advantages[i]) for group in t.groups)    # not NaN
    differ = sum(igpo.std(outcomes[i] for i in group) > igpo.STD_FLOOR for group in t.groups)
    figure = (f"by --credit {cfg.credit} {speak} of {len(t.groups)} groups have something to learn from; "
              f"in {differ} the outcomes differ")
    mend = f"rollouts that earn the same teach nothing: raise --group, take easier questions, or {WARM_START}"
    return "pass" if speak else "fail", figure, mend


CHECKS = {"prompt": prompt, "stop tags": stop_tags, "pad and eos": padding, "generation defaults": defaults,
          "mask": mask, "sampled = scored": sampled_is_scored, "drawn as scored": sampling,
          "ratio before updates": ratio, "belief in one pass": belief,
          "forced text's gradient": forced_gradient, "gold answers": golds, "context": context,
          "searches": searches, "gold can be found": findable, "memory": memory,
          "format kept": format_kept, "answer form": answer_form, "signal": signal}


def run_checks(t: Trial) -> dict[str, tuple[str, str, str]]:
    """Name -> (status, figure, mend). A check that raises has failed, and the others go on."""
    rows, bar = {}, tqdm(CHECKS.items(), unit="check", leave=False, disable=None)
    for name, one in bar:
        bar.set_description(name)
        try:
            rows[name] = one(t)
        except Exception as e:
            rows[name] = "fail", f"{type(e).__name__}: {first_line(e)}", "it could not even be tried"
    return rows


def picture(t: Trial, colour: bool) -> str:
    """A rollout: what the policy wrote green or [in brackets], forced text dim, long forced text cut."""
    r, parts = t.rollouts[t.longest[0]], []
    starts = [j for j in range(len(r.ids)) if j == 0 or r.mask[j] != r.mask[j - 1]] + [len(r.ids)]
    for start, end in zip(starts, starts[1:]):
        text, own = t.tokenizer.decode(r.ids[start:end]), r.mask[start]
        text = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
        if not own and len(text) > 400:
            text = f"{text[:120]} ... {text[-240:]}"
        before, after = ("[", "]") if own else ("", "")
        if colour:
            before, after = "\x1b[32m" if own else "\x1b[2m", "\x1b[0m"
        parts.append(before + text + after)
    return "".join(parts)


def table(rows: dict, colour: bool, width: int = 100) -> str:
    """A line or more for each check: status, name, figure, and how to mend it unless it passed."""
    lines, shades = [], {"pass": 32, "warn": 33, "fail": 31}
    for name, (status, figure, mend) in rows.items():
        texts = [figure] if status == "pass" else [figure, f"-> {mend}"]
        wrapped = [line for text in texts for line in textwrap.wrap(text, width - 31)]
        shown = f"\x1b[{shades[status]}m{status}\x1b[0m" if colour else status
        lines += [f"{shown}  {name:24} {wrapped[0]}", *(f"{'':31}{line}" for line in wrapped[1:])]
    return "\n".join(lines)


def check(t: Trial) -> int:
    """Print one rollout and the table; 1 if a check fails, else 0."""
    rows, colour = run_checks(t), "FORCE_COLOR" in os.environ or sys.stdout.isatty()
    if "rollouts" in vars(t):
        mark = "green" if colour else "[in brackets]"
        print(f"One rollout; what the policy wrote, and is trained on, is {mark}:\n\n{picture(t, colour)}\n")
    print(table(rows, colour))
    counts = Counter(status for status, _, _ in rows.values())
    said = ", ".join(f"{counts[status]} {status}" for status in ("pass", "warn", "fail"))
    print(f"\n{t.cfg.model}, {t.cfg.data}: {said}")
    return int(counts["fail"] > 0)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0; 1 if a check fails; 2 for what the user can mend."""
    try:
        cfg = tool_config(argv, CREDITS)
        questions = load_questions(igpo.locate(cfg.train or f"{cfg.data}/train.jsonl"))
        corpus = cfg.search or "bm25:" + igpo.locate(f"{cfg.data}/corpus.jsonl")
        search = open_search(corpus, cfg.search_cache)
        return check(Trial(cfg, *igpo.load_model(cfg), questions, search))
    except (UserError, torch.OutOfMemoryError) as e:
        print(f"check: {first_line(e)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")           # any script, on a terminal that knows one
    sys.exit(main())
