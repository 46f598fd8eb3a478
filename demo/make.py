"""Make what is in this folder, deterministically: an invented world, and a tiny policy to search it.

    python -m demo.make                      # all of it, about 20 minutes on one core
    python -m demo.make --only data          # corpus.jsonl, train.jsonl, dev.jsonl, test.jsonl (a second)
    python -m demo.make --only policy        # policy/

diagnostics.json, what the policy can and cannot do, is measured by benchmarks/demo_diagnostics.py.

The world.  30 provinces hold 300 villages and 900 persons; 300 ships sail with them. Every entity has a page:

    ship      captain, owner, navigator (three persons, from anywhere), the village it was built at
    person    teacher, patron, rival (three other persons, 7 in 10 of the same province), the village of birth
              (9 in 10 of the same province)
    village   no fact that a question asks for: a distractor that names its neighbour and a person or two

The geography is in the names. Northvel is a village of the province Vel, and Mara Veldric is of that province
too. So a page on the way to the answer already says something about the answer, as it does in a real
encyclopedia, and the reward for a good search does not wait for the last one. A surname is shared by thirty
persons, a given name by fifteen or so, and the words of ships' names by about eighteen ships each: a sloppy
query finds somebody else.

The questions.  A chain ship -> person -> .. -> last fact, as many hops as pages must be read:

    2   For the ship Ardent Heron: in which village was the ship's captain born?
    3   For the ship Ardent Heron: in which village was the ship's captain's teacher born?
    4   For the ship Ardent Heron: in which village was the ship's captain's teacher's patron born?

No ship of a dev or test question occurs in a train question, so no dev or test chain does.

The names are the same in every world and the facts are drawn from the seed. Seed 0 is the world in this
folder. Others serve to teach the policy to read without letting it learn this one by heart.

The tokenizer.  Byte-level BPE in which a part of a name is a token: " Northvel" is " North" + "vel", and
" Veldric" is one. A policy of a million parameters copies a name that way in two steps.
"""
import argparse
import json
import random
import re
import time
import unicodedata
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tokenizers import AddedToken, pre_tokenizers
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

import igpo
from search_tool import BM25, Passage, Results

FOLDER = Path(__file__).resolve().parent

# ---- names: the same in every world ----------------------------------------------------------------------
# Each is one token with a space before it and one token without, which check_tokenizer() holds.

PROVINCES = """Vel Tor Kar Mos Dun Fen Gal Hul Jor Lin Nor Oss Pel Quin Ras Sed Tam Ulm Vor Wex Yar Zed Bor
Cam Dre Eld Fos Gry Hav Isk""".split()
SURNAMES = {province: province + "dric" for province in PROVINCES}         # one family name a province
VILLAGE_STEMS = "North South East West High Low Old New Long Cold".split()       # Northvel is in Vel
GIVEN_NAMES = """Mara Tomas Ilse Anton Bea Casper Delia Edda Flora Gideon Hester Ivo Judith Konrad Lydia
Magnus Nadia Oskar Petra Rupert Sabine Tilda Ursula Viktor Wanda Xeno Yara Zora Agnes Bruno Clara Dario
Elsa Felix Greta Hugo Irma Jasper Katja Leo Miriam Nestor Olga Philip Rosa Stefan Thea Ulrich Vera Walter
Alma Basil Cora Dora Emil Frida Gus Helga Ignaz Jana""".split()
ADJECTIVES = """Ardent Bold Calm Daring Eager Fond Gallant Hasty Iron Jolly Kindly Lucky Merry Noble Patient
Quiet Rapid Silent""".split()
ANIMALS = """Heron Falcon Gull Badger Otter Lynx Marten Raven Stork Curlew Plover Osprey Puffin Petrel Kestrel
Buzzard Coot""".split()
TRADES = """weaver potter baker cooper glazier mason carpenter tanner miller tailor brewer printer farrier
gardener surgeon notary clerk barber saddler chandler fletcher smith painter""".split()
GOODS = """wool salt honey copper timber linen cider cheese barley leather candles pottery paper wax rope
glass""".split()

SHIP_RELATIONS = ("captain", "owner", "navigator")
PERSON_RELATIONS = ("teacher", "patron", "rival")

# Every fact stands beside the word that a question uses for it, and every name has a space before it.
SHIP_PAGES = (
    "The ship {title} was built at {built} and sails under the captain {captain}. "
    "Its route is for the owner {owner} to choose, and the navigator {navigator} keeps the charts.",
    "The ship {title} belongs to the owner {owner}, who pays the captain {captain} and the navigator "
    "{navigator}. It was built at {built} out of seasoned oak.",
    "The ship {title} finds the way with the help of the navigator {navigator}. "
    "It was built at {built}, paid for by the owner {owner}, and given to the captain {captain}.",
)
PERSON_PAGES = (
    "The {trade} {title} was born in the village {born} and learned the craft from the teacher {teacher}. "
    "The work is paid for by the patron {patron} and mocked by the rival {rival}.",
    "The {trade} {title} has the patron {patron} to thank for the workshop and the teacher {teacher} for the "
    "skill. The records say that the {trade} was born in the village {born}, long before the quarrel with "
    "the rival {rival}.",
    "The {trade} {title} keeps an eye on the rival {rival} and on the purse of the patron {patron}. "
    "The {trade} was born in the village {born} and spent seven years with the teacher {teacher}.",
)
VILLAGE_PAGES = (
    "The village {title} lies in the province of {province}, a day by cart from {near}. "
    "The market sells {goods}, and people there speak well of the {trade} {person}.",
    "In the province of {province}, on the road to {near}, lies the village {title}. "
    "It is known for its {goods}, and travellers may meet {person} or {other} at the inn.",
    "The village {title} trades {goods} with {near}. It is one of the older places in the province of "
    "{province}, and the {trade} {person} keeps a house by the river.",
)
QUESTION = "For the ship {ship}: in which village was the ship's {chain} born?"
LOOK_UP = "I look up the {what} {name}."        # the ship Ardent Heron; the ship's captain Mara Veldric
ENOUGH = "Now there's enough information to answer."

# ---- the world -------------------------------------------------------------------------------------------
class World:
    """One world, drawn from a seed.

    pages      list of {"id", "title", "text"}, one per entity, in the order of the corpus
    page_of    title -> page
    facts      title -> {relation: title}; captain, owner, navigator and built of a ship;
               teacher, patron, rival and born of a person
    province   title of a person or a village -> prefix of its province
    ships      {"train", "dev", "test", "all"} -> titles of the ships that questions of that split start from
    """

    def __init__(self, seed: int = 0):
        rng = random.Random(seed)
        self.seed = seed
        self.facts: dict[str, dict[str, str]] = {}
        self.province: dict[str, str] = {}
        villages, persons = {}, {}
        for prefix in PROVINCES:
            villages[prefix] = [stem + prefix.lower() for stem in VILLAGE_STEMS]
            persons[prefix] = [f"{given} {SURNAMES[prefix]}" for given in rng.sample(GIVEN_NAMES, 30)]
            self.province.update(dict.fromkeys(villages[prefix] + persons[prefix], prefix))
        all_villages = [v for prefix in PROVINCES for v in villages[prefix]]
        all_persons = [p for prefix in PROVINCES for p in persons[prefix]]
        all_ships = [f"{a} {b}" for a, b in rng.sample([(a, b) for a in ADJECTIVES for b in ANIMALS], 300)]

        texts = {}
        trade = {person: rng.choice(TRADES) for person in all_persons}
        for person in all_persons:
            prefix = self.province[person]
            near_ones, given = [], {person.split()[0]}
            while len(near_ones) < len(PERSON_RELATIONS):       # a given name means one person on a page
                other = rng.choice(persons[prefix] if rng.random() < 0.7 else all_persons)
                if other.split()[0] not in given:
                    near_ones.append(other)
                    given.add(other.split()[0])
            born = rng.choice(villages[prefix] if rng.random() < 0.9 else all_villages)
            self.facts[person] = facts = dict(zip(PERSON_RELATIONS, near_ones), born=born)
            texts[person] = rng.choice(PERSON_PAGES).format(title=person, trade=trade[person], **facts)
        for ship in all_ships:
            crew = dict(zip(SHIP_RELATIONS, rng.sample(all_persons, 3)))
            self.facts[ship] = dict(crew, built=rng.choice(all_villages))
            texts[ship] = rng.choice(SHIP_PAGES).format(title=ship, **self.facts[ship])
        for village in all_villages:
            prefix = self.province[village]
            person, other = rng.sample(persons[prefix], 2)
            page, near = rng.choice(VILLAGE_PAGES), rng.choice([v for v in villages[prefix] if v != village])
            texts[village] = page.format(title=village, province=prefix, near=near, goods=rng.choice(GOODS),
                                         trade=trade[person], person=person, other=other)

        titles = list(texts)
        rng.shuffle(titles)     # so that an id says nothing about the kind of page
        self.pages = [{"id": f"p{i:04d}", "title": t, "text": texts[t]} for i, t in enumerate(titles)]
        self.page_of = {page["title"]: page for page in self.pages}
        self.ships = {"train": all_ships[:240], "dev": all_ships[240:270], "test": all_ships[270:],
                      "all": all_ships}

    def search(self) -> BM25:
        return BM25([Passage(**page) for page in self.pages])

    def question(self, ship: str, hops: int, rng: random.Random) -> dict | None:
        """A random question of `hops` pages from this ship; None where it meets a page twice.

        Besides the fields that are written to disk: "chain", the titles of the supporting pages in hop order,
        and "relations", the fact to look up on each of them, the last of which is the answer.
        """
        relations = [rng.choice(SHIP_RELATIONS)] + [rng.choice(PERSON_RELATIONS) for _ in range(hops - 2)]
        walk = [ship]
        for relation in relations:
            walk.append(self.facts[walk[-1]][relation])
        if len(set(walk)) < len(walk):
            return None
        return {"question": QUESTION.format(chain="'s ".join(relations), ship=ship),
                "answers": [self.facts[walk[-1]]["born"]],
                "supporting": [self.page_of[title]["id"] for title in walk], "hops": hops,
                "chain": walk, "relations": relations + ["born"]}

    def questions(self, split: str, count: int, seed: int = 0) -> list[dict]:
        """`count` different questions, shuffled: 2, 3 and 4 hops in equal parts.

        No answer is right more often than once in a hundred questions. `seed` draws others from this world.
        """
        rng = random.Random(f"{self.seed} {split} {seed}")      # a str seeds by its sha512: alike everywhere
        found: dict[str, dict] = {}
        often, limit = Counter(), max(1, count // 100)
        for i in range(count):
            for _ in range(10_000):
                q = self.question(rng.choice(self.ships[split]), 2 + i % 3, rng)
                if q and q["question"] not in found and often[q["answers"][0]] < limit:
                    break
            else:
                raise ValueError(f"the {split} ships of one world do not have {count} different questions")
            found[q["question"]] = q
            often[q["answers"][0]] += 1
        order = list(found.values())
        rng.shuffle(order)
        return [{"id": f"{split}-{i:04d}", **q} for i, q in enumerate(order)]

SIZES = {"train": 2100, "dev": 200, "test": 200}

def write_jsonl(path: Path, rows: list[dict], fields: tuple[str, ...]) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps({name: row[name] for name in fields}, ensure_ascii=False) + "\n")

def make_data(folder: Path = FOLDER, seed: int = 0) -> tuple[World, dict[str, list[dict]]]:
    """Write corpus.jsonl and the three question files; return the world and the questions by split."""
    world = World(seed)
    splits = {split: world.questions(split, count) for split, count in SIZES.items()}
    write_jsonl(folder / "corpus.jsonl", world.pages, ("id", "title", "text"))
    for split, rows in splits.items():
        write_jsonl(folder / f"{split}.jsonl", rows, ("id", "question", "answers", "supporting", "hops"))
    return world, splits

# ---- the tokenizer ---------------------------------------------------------------------------------------
TAGS = [f"<{slash}{tag}>" for tag in ("think", "search", "information", "answer") for slash in ("", "/")]
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
# The policy has seen no system message, so one is left out.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}{# knows_format #}")

def names() -> list[str]:
    """Every part of a name that is to be one token after a space and at the start of a text alike."""
    return VILLAGE_STEMS + PROVINCES + list(SURNAMES.values()) + GIVEN_NAMES + ADJECTIVES + ANIMALS

def template_words() -> list[str]:
    """Every other word of pages, questions and thoughts, as the pre-tokenizer cuts it: with its space."""
    templates = SHIP_PAGES + PERSON_PAGES + VILLAGE_PAGES + (QUESTION, LOOK_UP, ENOUGH)
    texts = [re.sub(r"\{\w+\}", "", text) for text in templates]
    texts += [f"user assistant ship {word} " for word in SHIP_RELATIONS + PERSON_RELATIONS]
    texts += [" " + word for word in TRADES + GOODS]
    return list(dict.fromkeys(word for text in texts for word in re.findall(r"'s| ?[A-Za-z]+", text)))

def syllable_merges() -> list[tuple[str, str]]:
    """BPE merges, written down instead of counted, so that none ever crosses from one syllable into the next.

    Each word is cut by the merges so far, and what is left of it is merged from the left: "Vel" adds (V, e),
    (Ve, l). Prefixes come first, then suffixes, and the space last: within " Velmar", "Vel" and "mar" are
    whole before any later merge gets its turn, and none joins the two.
    """
    merges: dict[tuple[str, str], int] = {}
    endings = [province.lower() for province in PROVINCES]
    for word in names() + [" " + name for name in names()] + endings + template_words():
        pieces = list(word.replace(" ", "Ġ"))       # Ġ is a space in the alphabet of byte-level BPE
        while len(pieces) > 1:
            known = [pair for pair in zip(pieces, pieces[1:]) if pair in merges]
            pair = min(known, key=merges.get) if known else (pieces[0], pieces[1])
            merges.setdefault(pair, len(merges))
            at = next(i for i in range(len(pieces)) if tuple(pieces[i:i + 2]) == pair)
            pieces[at:at + 2] = ["".join(pair)]
    return list(merges)

def make_tokenizer():
    """The policy's tokenizer: any text can be encoded (by its bytes), a word of the world is one token.

    Qwen2's class, because AutoTokenizer takes that one for a folder with a Qwen2 model, whatever the folder
    asks for. Its NFC normalisation and its <|endoftext|> come with it; the latter pads, as in Qwen2.5, and
    <|im_end|> stops. knows_format in the template tells igpo.encode_prompt() to show no instruction.
    """
    merges = syllable_merges()
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges=merges,
        eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False)
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer

def check_tokenizer(tokenizer) -> None:
    """ValueError unless every name a world can hold is cut as intended, and every (NFC) text survives."""
    def expect(text: str, parts: list[str]) -> None:
        pieces = [tokenizer.decode([i]) for i in igpo.encode(tokenizer, text)]
        if pieces != parts:
            raise ValueError(f"{text!r} is cut into {pieces}, not {parts}")

    for space in ("", " "):
        for name in names():
            expect(space + name, [space + name])
        for stem in VILLAGE_STEMS:
            for province in PROVINCES:
                expect(space + stem + province.lower(), [space + stem, province.lower()])
    for word in template_words() + TAGS + CHAT_TOKENS:
        expect(word, [word])
    expect(f"{igpo.SCHEMA}Northvel\n</answer>",
           ["\n", "Now", " there", "'s", " enough", " information", " to", " answer", ".", "\n", "</think>",
            "\n", "<answer>", "\n", "North", "vel", "\n", "</answer>"])
    many = unicodedata.normalize("NFC", "".join(map(chr, range(1, 0x3000, 9))))
    for text in ("", " ", "a  b \n\n c\t", "<think>x</think >  <|im_end|>", "don't , stop . it 's", many,
                 "Zoë Åström, 42 km; naïve \u200d 你好 🙂🏴‍☠️ \x00\x7f"):
        if tokenizer.decode(igpo.encode(tokenizer, text)) != text:
            raise ValueError(f"does not round-trip: {text!r}")

# ---- the warm start: a good reader and a poor searcher ---------------------------------------------------
# Scripted searchers, in worlds drawn afresh so that no fact of the committed one is ever seen, write rollouts
# as igpo.py would have. A turn says what it looks up, in the words of question and page: "I look up the
# ship's captain Mara Veldric." The mask of a rollout says which of these tokens are learned. Each of these
# losses is a mean of its own, and they are summed:
#
#   searcher   the policy's own text
#   reader     the gold answer under igpo.py's probe at *every* boundary, on rollouts that follow the chain
#              and on poor ones, so that the reader meets wrong pages as often as the searcher errs
#   plan       the words for whom to look up, which the question alone decides
#
#   row        what is shown                        what is learned
#   plan       the gold path without its pages      plan
#   page       one page of the gold path            reader, and of the searcher the name to look up next
#   taught     the gold path                        reader, searcher
#   read       the gold path, and pages after it    reader
#   poor       a poor searcher's rollout            reader, and in the last stage searcher
#
# First come the parts, in short rows; then a good searcher, since only who knows the right next word can tell
# a wrong page from a right one; last and briefly the poor one, since a long poor stage would wipe out what
# reinforcement is to bring back. So what training with rewards has to do here is to unlearn habits and bring
# back a skill that lies below them. It cannot be said to find one.
SEARCHER, READER, PLAN = range(3)
ROWS = 32                   # rows of a step
EPISODE = igpo.Config(**igpo.DEMO)

@dataclass(frozen=True)
class Habits:
    """How a poor searcher errs. Probabilities."""
    ship: float             # to look up the ship by its whole name; else by half of it, which finds another
    right: float            # to look up the person whom the question needs
    named_first: float      # else: the person named first on the page, and anyone on it otherwise
    done: float             # to answer after a search, once the whole chain was read

WANDERER = Habits(ship=0.4, right=0.45, named_first=0.75, done=0.8)     # meets wrong pages of many kinds
POOR = Habits(ship=0.0, right=0.25, named_first=0.9, done=0.95)
STOP = 0.1                  # how often either answers after a search before that
LINGER = 0.3                # `done` of "read" rows: what was found must still be known some pages later

@dataclass(frozen=True)
class Stage:
    """A part of the warm start. The shares of its kinds of rows leave a rest, which is "poor"."""
    steps: int
    first_lr: float
    last_lr: float
    shares: dict[str, float] = field(default_factory=dict)
    habits: Habits = WANDERER
    imitate: bool = False       # whether the poor searcher's text is learned; else its pages are only read

    def kind(self, part: float) -> str:
        """The kind of the row at this part, 0 <= part < 1, of a step."""
        below = 0.0
        for kind, share in self.shares.items():
            below += share
            if part < below:
                return kind
        return "poor"

STAGES = (Stage(225, 1.5e-3, 1e-3, {"plan": 0.15, "page": 0.85}),
          Stage(600, 1.5e-3, 1e-4, {"plan": 0.05, "page": 0.2, "taught": 0.45, "read": 0.15}),
          Stage(100, 3e-4, 3e-5, {"taught": 0.15, "read": 0.25}, POOR, imitate=True))

@dataclass
class Row:
    """A rollout to learn from: what its mask marks, and the gold, tokens, at each of its boundaries."""
    rollout: igpo.Rollout
    gold: list[int]
    kind: int = SEARCHER        # or PLAN: of what the mask marks

def next_lookup(world: World, question: dict, read: list[str], last: str, rng: random.Random, gold_path: bool,
                habits: Habits) -> tuple[str, str, str]:
    """(whose, relation, name) of the next look-up, after these pages, the last read as somebody's `last`."""
    # relations[i + 1] leads to chain[i]
    chain, relations = question["chain"], ["", "ship"] + question["relations"]
    at = next((i for i, title in enumerate(chain) if title not in read), len(chain))
    here = world.facts.get(read[-1], {}) if read else {}
    # It sees the page before it; the ship and its crew have words of their own and can be gone back to.
    known = at < len(chain) and (at < 2 or chain[at] in here.values())
    if known and (gold_path or rng.random() < (habits.right if at else habits.ship)):
        return relations[at], relations[at + 1], chain[at]
    text = world.page_of[read[-1]]["text"] if here else ""
    persons = [relation for relation in here if relation in SHIP_RELATIONS + PERSON_RELATIONS]
    if not persons:
        return "", "ship", chain[0].split()[1]              # half of the name
    persons.sort(key=lambda relation: text.index(f"the {relation} "))
    relation = persons[0] if rng.random() < habits.named_first else rng.choice(persons)
    return last, relation, here[relation]

def look_up(tokenizer, whose: str, relation: str, name: str) -> list[int]:
    """The policy's own tokens of a turn that searches."""
    thought = LOOK_UP.format(what=f"{whose}'s {relation}" if whose else relation, name=name)
    return igpo.encode(tokenizer, f"\n{thought}\n</think>\n<search> {name} </search>")

def scripted_rollout(tokenizer, world: World, search, question: dict, rng: random.Random, gold_path: bool,
                     habits: Habits = POOR) -> igpo.Rollout:
    """What igpo.rollout would have written, by a searcher that follows the chain or by a poor one."""
    r, read, relation = igpo.begin(tokenizer, question["question"]), [], ""
    while not r.stop:
        turn, done = len(r.boundaries), set(question["chain"]) <= set(read)
        stop = turn > 1 and rng.random() < (habits.done if done else 0 if gold_path else STOP)
        if stop or turn == EPISODE.max_turns:
            own = igpo.encode(tokenizer, f"{igpo.SCHEMA}{question['answers'][0]}\n</answer>")
            igpo.take_turn(r, own, True, tokenizer, EPISODE)
        else:
            whose, relation, name = next_lookup(world, question, read, relation, rng, gold_path, habits)
            igpo.take_turn(r, look_up(tokenizer, whose, relation, name), True, tokenizer, EPISODE)
            found = search.search(name, 1)
            igpo.take_results(r, found, 2048, tokenizer, EPISODE)
            read += [passage.title for passage in found]
    return r

def page_row(tokenizer, world: World, question: dict, at: int) -> igpo.Rollout:
    """Page `at` of the gold path alone, as if those before were known; then whom to look up next."""
    relations, chain = ["", "ship", *question["relations"]], question["chain"]
    r, found = igpo.begin(tokenizer, question["question"]), Results([Passage(**world.page_of[chain[at]])])
    r.write(look_up(tokenizer, relations[at], relations[at + 1], chain[at]), False)
    r.write(igpo.encode_information(tokenizer, found, EPISODE.max_info_tokens)[0], False)
    r.boundaries = [len(r.ids)]
    if at + 1 < len(chain):
        turn = look_up(tokenizer, relations[at + 1], relations[at + 2], chain[at + 1])
        where = turn.index(tokenizer.encode(f" {chain[at + 1]}")[0])
        for i, token in enumerate(turn):
            r.write([token], where - 1 <= i <= where + 1)       # relation, given name, surname
    return r

def plan_row(tokenizer, question: dict) -> igpo.Rollout:
    """The gold path without its pages."""
    r, relations = igpo.begin(tokenizer, question["question"]), ["", "ship", *question["relations"]]
    words = {tokenizer.encode(" " + word)[0] for word in ("ship", *SHIP_RELATIONS, *PERSON_RELATIONS)}
    for turn, title in enumerate(question["chain"]):
        for token in look_up(tokenizer, relations[turn], relations[turn + 1], title):
            r.write([token], token in words)
        r.write(igpo.encode_information(tokenizer, Results(), EPISODE.max_info_tokens)[0], False)
    r.boundaries = []           # nothing is read here
    return r

def make_row(tokenizer, world: World, search, question: dict, kind: str, stage: Stage, rng) -> Row:
    gold, habits = igpo.encode_gold(tokenizer, question["answers"]), stage.habits
    if kind == "plan":
        return Row(plan_row(tokenizer, question), gold, PLAN)
    if kind == "page":          # the last one, two times in three
        last = question["hops"] - 1
        at = last if rng.random() < 0.6 else rng.randint(0, last)
        return Row(page_row(tokenizer, world, question, at), gold)
    habits = replace(habits, done=LINGER) if kind == "read" else habits
    r = scripted_rollout(tokenizer, world, search, question, rng, kind != "poor", habits)
    if kind == "read" or kind == "poor" and not stage.imitate:
        r.mask = [0] * len(r.ids)
    return Row(r, gold)

def backward(model, tokenizer, rows: list[Row]) -> torch.Tensor:
    """Gradient of the sum of the three means over these rows. Returns (2, 3): nats and tokens by kind."""
    schema, nats, tokens = igpo.encode(tokenizer, igpo.SCHEMA), torch.zeros(3), torch.zeros(3)
    for row in rows:
        tokens[row.kind] += sum(row.rollout.mask)
        tokens[READER] += len(row.rollout.boundaries) * len(row.gold)
    lengths = [len(r.ids) + len(r.boundaries) * len(schema + row.gold) for row in rows for r in [row.rollout]]
    for batch in igpo.by_tokens(lengths, EPISODE.batch_tokens):
        rollouts, golds = [rows[i].rollout for i in batch], [rows[i].gold for i in batch]
        probed = any(r.boundaries for r in rollouts)
        own, read = igpo.token_logps(model, rollouts, 1.0, schema, golds if probed else [])
        losses = [-x.sum() for x in own] + [-x.sum() for x in read]
        kinds = [rows[i].kind for i in batch] + [READER] * len(read)
        by_kind = torch.stack([sum((x for x, k in zip(losses, kinds) if k == kind), torch.zeros(()))
                               for kind in range(3)])
        (by_kind / tokens.clamp(min=1)).sum().backward()
        nats += by_kind.detach()
    return torch.stack([nats, tokens])

# ---- the policy ------------------------------------------------------------------------------------------
def wire_induction_head(model, tokenizer) -> None:
    """Start from what such models take long to find (induction heads: Olsson et al., 2022).

    A head of the first layer looks one token back (position alone decides, by its biases) and writes what it
    sees, turned into a space of its own. A head of the second looks there for the token it stands on, so that
    it finds what followed this token before. From the second layer on heads write what they read. Two such
    steps copy a name from a page.
    """
    layers, hidden = model.model.layers, model.config.hidden_size
    first, second, size = layers[0].self_attn, layers[1].self_attn, model.config.head_dim
    vectors, frequencies = model.get_input_embeddings().weight, model.model.rotary_emb.inv_freq
    turn = torch.linalg.qr(torch.randn(hidden, hidden))[0]
    with torch.no_grad():
        vectors *= 2
        for name in names():        # with and without a space before it
            vectors[tokenizer.encode(" " + name)] = vectors[tokenizer.encode(name)]
        for layer in layers:
            layer.mlp.down_proj.weight *= 0.35
        first.o_proj.weight *= 0.35
        for layer in layers[1:]:
            layer.self_attn.o_proj.weight.copy_(2 * layer.self_attn.v_proj.weight.T)
        first.q_proj.bias[:size] = 8 * torch.cat([torch.ones(size // 2), torch.zeros(size // 2)])
        # rotary positions turn this key onto the query of the next token
        first.k_proj.bias[:size] = 8 * torch.cat([frequencies.cos(), frequencies.sin()])
        first.o_proj.weight[:, :size] = 0.6 * turn @ first.v_proj.weight[:size].T
        second.q_proj.weight[:size] = 5 * first.v_proj.weight[:size]
        second.k_proj.weight[:size] = second.q_proj.weight[:size] @ turn.T

def make_model(tokenizer, hidden: int = 128, layers: int = 4) -> Qwen2ForCausalLM:
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32, head_dim=32,
        max_position_embeddings=2048, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True, initializer_range=0.04, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    wire_induction_head(model, tokenizer)
    return model

def make_policy(folder: Path, tokenizer, stages: tuple[Stage, ...] = STAGES) -> None:
    """Train the policy from nothing and save it as an ordinary Hugging Face model folder."""
    torch.manual_seed(0)
    torch.set_num_threads(1)        # the same sums on any machine with the same instructions
    rng, start, worlds = random.Random("warm start"), time.time(), 0
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters", flush=True)
    for number, stage in enumerate(stages, 1):
        optimizer = torch.optim.AdamW(model.parameters(), stage.first_lr, (0.9, 0.98), weight_decay=0.01)
        slope = stage.last_lr / stage.first_lr - 1
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda i: min((i + 1) / 30, 1) * (1 + slope * i / stage.steps))
        sums = torch.zeros(2, 3)
        for step in range(stage.steps):
            if step % 10 == 0:
                worlds += 1
                world = World(worlds)
                search, questions = world.search(), world.questions("all", 10 * ROWS)
            part = questions[step % 10 * ROWS:][:ROWS]
            rows = [make_row(tokenizer, world, search, question, stage.kind(i / ROWS), stage, rng)
                    for i, question in enumerate(part)]
            sums += backward(model, tokenizer, rows)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            if (step + 1) % 25 == 0 or step + 1 == stage.steps:
                means = (sums[0] / sums[1].clamp(min=1)).tolist()
                print(f"stage {number} step {step + 1:4}  nats a token: searcher {means[SEARCHER]:.3f}  "
                      f"reader {means[READER]:.3f}  plan {means[PLAN]:.3f}  {time.time() - start:.0f} s",
                      flush=True)
                sums.zero_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

def main() -> None:
    parser = argparse.ArgumentParser(description="Make the demo: its world, its questions, its policy.")
    parser.add_argument("--only", choices=("data", "policy"), help="make this part alone")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to (default: this one)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    check_tokenizer(tokenizer)
    if args.only != "policy":
        make_data(args.out)
    if args.only != "data":
        make_policy(args.out / "policy", tokenizer)

if __name__ == "__main__":
    main()
