"""Make everything in this folder, deterministically: an invented world, and a tiny policy to search it.

    python demo/make.py                      # all of it, about 20 minutes on one core
    python demo/make.py --only data          # corpus.jsonl, train.jsonl, dev.jsonl, test.jsonl (a second)
    python demo/make.py --only policy        # policy/
    python demo/make.py --only diagnostics   # diagnostics.json: what the warm start can and cannot do (a minute)

The world.  30 provinces hold 300 villages and 900 persons; 300 ships sail with them. Every entity has one page:

    ship      captain, owner, navigator (three persons, from anywhere), the village it was built at
    person    teacher, patron, rival (three other persons, 7 in 10 of the same province), the village of birth (9 in 10)
    village   no fact that a question asks for: a distractor that names its neighbour and a person or two

The geography is in the names. Northvel is a village of the province Vel, and Mara Veldric is of that province too. So a
page on the way to the answer already says something about the answer, as it does in a real encyclopedia, and the reward
for a good search does not wait for the last one. A surname is shared by thirty persons, a given name by fifteen or so, and
the words of ships' names by about eighteen ships each: a sloppy query finds somebody else.

The questions.  A chain ship -> person -> .. -> last fact, as many hops as pages must be read:

    2   For the ship Ardent Heron: in which village was the ship's captain born?
    3   For the ship Ardent Heron: in which village was the ship's captain's teacher born?
    4   For the ship Ardent Heron: in which village was the ship's captain's teacher's patron born?

No ship of a dev or test question occurs in a train question, so no dev or test chain does.

The names are the same in every world and the facts are drawn from the seed. Seed 0 is the world in this folder. Others
serve to teach the policy to read without letting it learn this one by heart.

The tokenizer.  Byte-level BPE in which a part of a name is a token: " Northvel" is " North" + "vel", " Veldric" is one. A
policy of a million parameters copies a name that way in two steps.
"""

import argparse
import collections
import json
import random
import re
import statistics
import sys
import time
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))  # search_tool.py lies one folder up

# ---------------------------------------------------------------------------------------------------------------------
# Names: the same in every world. Each is one token with a space before it and one token without (check_tokenizer).

PROVINCES = """Vel Tor Kar Mos Dun Fen Gal Hul Jor Lin Nor Oss Pel Quin Ras Sed Tam Ulm Vor Wex Yar Zed Bor Cam Dre Eld
Fos Gry Hav Isk""".split()
SURNAMES = {province: province + "dric" for province in PROVINCES}         # one family name a province
VILLAGE_STEMS = "North South East West High Low Old New Long Cold".split()  # a village is a stem and its province: Northvel
GIVEN_NAMES = """Mara Tomas Ilse Anton Bea Casper Delia Edda Flora Gideon Hester Ivo Judith Konrad Lydia Magnus
Nadia Oskar Petra Rupert Sabine Tilda Ursula Viktor Wanda Xeno Yara Zora Agnes Bruno Clara Dario Elsa Felix Greta
Hugo Irma Jasper Katja Leo Miriam Nestor Olga Philip Rosa Stefan Thea Ulrich Vera Walter Alma Basil Cora Dora Emil
Frida Gus Helga Ignaz Jana""".split()
ADJECTIVES = """Ardent Bold Calm Daring Eager Fond Gallant Hasty Iron Jolly Kindly Lucky Merry Noble Patient Quiet
Rapid Silent""".split()
ANIMALS = """Heron Falcon Gull Badger Otter Lynx Marten Raven Stork Curlew Plover Osprey Puffin Petrel Kestrel Buzzard
Coot""".split()
TRADES = """weaver potter baker cooper glazier mason carpenter tanner miller tailor brewer printer farrier gardener
surgeon notary clerk barber saddler chandler fletcher smith painter""".split()
GOODS = "wool salt honey copper timber linen cider cheese barley leather candles pottery paper wax rope glass".split()

SHIP_RELATIONS = ("captain", "owner", "navigator")
PERSON_RELATIONS = ("teacher", "patron", "rival")

# The pages. Every fact stands beside the word that a question uses for it, and every name has a space before it.
SHIP_PAGES = (
    "The ship {title} was built at {built} and sails under the captain {captain}. "
    "Its route is for the owner {owner} to choose, and the navigator {navigator} keeps the charts.",
    "The ship {title} belongs to the owner {owner}, who pays the captain {captain} and the navigator {navigator}. "
    "It was built at {built} out of seasoned oak.",
    "The ship {title} finds the way with the help of the navigator {navigator}. "
    "It was built at {built}, paid for by the owner {owner}, and given to the captain {captain}.",
)
PERSON_PAGES = (
    "The {trade} {title} was born in the village {born} and learned the craft from the teacher {teacher}. "
    "The work is paid for by the patron {patron} and mocked by the rival {rival}.",
    "The {trade} {title} has the patron {patron} to thank for the workshop and the teacher {teacher} for the skill. "
    "The records say that the {trade} was born in the village {born}, long before the quarrel with the rival {rival}.",
    "The {trade} {title} keeps an eye on the rival {rival} and on the purse of the patron {patron}. "
    "The {trade} was born in the village {born} and spent seven years with the teacher {teacher}.",
)
VILLAGE_PAGES = (
    "The village {title} lies in the province of {province}, a day by cart from {near}. "
    "The market sells {goods}, and people there speak well of the {trade} {person}.",
    "In the province of {province}, on the road to {near}, lies the village {title}. "
    "It is known for its {goods}, and travellers may meet {person} or {other} at the inn.",
    "The village {title} trades {goods} with {near}. "
    "It is one of the older places in the province of {province}, and the {trade} {person} keeps a house by the river.",
)
QUESTION = "For the ship {ship}: in which village was the ship's {chain} born?"
LOOK_UP = "I look up the {what} {name}."        # the ship Ardent Heron; the ship's captain Mara Veldric
ENOUGH = "Now there's enough information to answer."


# ---------------------------------------------------------------------------------------------------------------------
# The world


class World:
    """One world, drawn from a seed.

    pages      list of {"id", "title", "text"}, one per entity, in the order of the corpus
    page_of    title -> page
    facts      title -> {relation: title}; captain, owner, navigator and built of a ship;
               teacher, patron, rival and born of a person
    province   title of a person or a village -> prefix of its province
    ships      {"train", "dev", "test", "all"} -> titles of the ships that the questions of that split may start from
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
            self.facts[person] = dict(zip(PERSON_RELATIONS, near_ones), born=born)
            texts[person] = rng.choice(PERSON_PAGES).format(title=person, trade=trade[person], **self.facts[person])
        for ship in all_ships:
            crew = dict(zip(SHIP_RELATIONS, rng.sample(all_persons, 3)))
            self.facts[ship] = dict(crew, built=rng.choice(all_villages))
            texts[ship] = rng.choice(SHIP_PAGES).format(title=ship, **self.facts[ship])
        for village in all_villages:
            prefix = self.province[village]
            person, other = rng.sample(persons[prefix], 2)
            texts[village] = rng.choice(VILLAGE_PAGES).format(
                title=village, province=prefix, near=rng.choice([v for v in villages[prefix] if v != village]),
                goods=rng.choice(GOODS), trade=trade[person], person=person, other=other)

        titles = list(texts)
        rng.shuffle(titles)  # so that an id says nothing about the kind of page
        self.pages = [{"id": f"p{i:04d}", "title": title, "text": texts[title]} for i, title in enumerate(titles)]
        self.page_of = {page["title"]: page for page in self.pages}
        self.ships = {"train": all_ships[:240], "dev": all_ships[240:270], "test": all_ships[270:], "all": all_ships}

    def question(self, ship: str, hops: int, rng: random.Random) -> dict | None:
        """A random question of `hops` pages from this ship; None where it meets a page twice.

        Besides the fields that are written to disk: "chain", the titles of the supporting pages in hop order, and
        "relations", the fact to look up on each of them, the last of which is the answer.
        """
        relations = [rng.choice(SHIP_RELATIONS)] + [rng.choice(PERSON_RELATIONS) for _ in range(hops - 2)]
        walk = [ship]
        for relation in relations:
            walk.append(self.facts[walk[-1]][relation])
        if len(set(walk)) < len(walk):
            return None
        return {
            "question": QUESTION.format(chain="'s ".join(relations), ship=ship), "answers": [self.facts[walk[-1]]["born"]],
            "supporting": [self.page_of[title]["id"] for title in walk], "hops": hops,
            "chain": walk, "relations": relations + ["born"],
        }

    def questions(self, split: str, count: int, seed: int = 0) -> list[dict]:
        """`count` different questions, shuffled: 2, 3 and 4 hops in equal parts.

        No answer is right more often than once in a hundred questions. `seed` draws others from the same world.
        """
        rng = random.Random(f"{self.seed} {split} {seed}")  # a str seeds by its sha512, the same on every machine
        found: dict[str, dict] = {}
        often, limit = collections.Counter(), max(1, count // 100)
        for i in range(count):
            for _ in range(10_000):
                question = self.question(rng.choice(self.ships[split]), 2 + i % 3, rng)
                if question and question["question"] not in found and often[question["answers"][0]] < limit:
                    break
            else:
                raise ValueError(f"the {split} ships of one world do not have {count} different questions")
            found[question["question"]] = question
            often[question["answers"][0]] += 1
        order = list(found.values())
        rng.shuffle(order)
        return [{"id": f"{split}-{i:04d}", **question} for i, question in enumerate(order)]


def write_jsonl(path: Path, rows: list[dict], fields: tuple[str, ...]):
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps({field: row[field] for field in fields}, ensure_ascii=False) + "\n")


SIZES = {"train": 2100, "dev": 200, "test": 200}


def make_data(folder: Path = FOLDER, seed: int = 0) -> tuple[World, dict[str, list[dict]]]:
    """Write corpus.jsonl and the three question files; return the world and the questions by split."""
    world = World(seed)
    splits = {split: world.questions(split, count) for split, count in SIZES.items()}
    write_jsonl(folder / "corpus.jsonl", world.pages, ("id", "title", "text"))
    for split, rows in splits.items():
        write_jsonl(folder / f"{split}.jsonl", rows, ("id", "question", "answers", "supporting", "hops"))
    return world, splits


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer

TAGS = [f"<{slash}{tag}>" for tag in ("think", "search", "information", "answer") for slash in ("", "/")]
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
# The system message holds long instructions, of no use to a policy that has learned the format by imitation: left out.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def names() -> list[str]:
    """Every part of a name that is to be one token after a space ("in Velmar") and at the start of a text alike."""
    return VILLAGE_STEMS + PROVINCES + list(SURNAMES.values()) + GIVEN_NAMES + ADJECTIVES + ANIMALS


def template_words() -> list[str]:
    """Every other word of pages, questions and thoughts, as the pre-tokenizer cuts it: with the space before it."""
    texts = [re.sub(r"\{\w+\}", "", text) for text in SHIP_PAGES + PERSON_PAGES + VILLAGE_PAGES
             + (QUESTION, LOOK_UP, ENOUGH)]
    texts += [f"user assistant ship {word} " for word in SHIP_RELATIONS + PERSON_RELATIONS]
    texts += [" " + word for word in TRADES + GOODS]
    return list(dict.fromkeys(word for text in texts for word in re.findall(r"'s| ?[A-Za-z]+", text)))


def syllable_merges() -> list[tuple[str, str]]:
    """BPE merges, written down instead of counted, so that no merge ever crosses from one syllable into the next.

    Each word is cut by the merges so far, and what is left of it is merged from the left: "Vel" adds (V, e), (Ve, l).
    Prefixes come first, then suffixes, and the space last: within " Velmar", "Vel" and "mar" are whole before any later
    merge gets its turn, and none joins the two.
    """
    merges: dict[tuple[str, str], int] = {}

    def add(word: str):
        pieces = list(word.replace(" ", "Ġ"))  # Ġ is a space in the alphabet of byte-level BPE
        while len(pieces) > 1:
            known = [pair for pair in zip(pieces, pieces[1:]) if pair in merges]
            pair = min(known, key=merges.get) if known else (pieces[0], pieces[1])
            merges.setdefault(pair, len(merges))
            at = next(i for i in range(len(pieces)) if tuple(pieces[i:i + 2]) == pair)
            pieces[at:at + 2] = ["".join(pair)]

    bare = names() + [province.lower() for province in PROVINCES]
    for word in names() + [" " + name for name in names()] + [province.lower() for province in PROVINCES] + template_words():
        add(word)
    return list(merges)


def make_tokenizer():
    """The policy's tokenizer: any text can be encoded (all 256 bytes are there), a word of the world is one token.

    Qwen2's class, because AutoTokenizer takes that one for a folder with a Qwen2 model, whatever the folder asks for.
    Its NFC normalisation and its <|endoftext|> come with it; the latter pads, as in Qwen2.5, and <|im_end|> stops.
    """
    from tokenizers import AddedToken, pre_tokenizers
    from transformers import Qwen2Tokenizer

    merges = syllable_merges()
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"], clean_up_tokenization_spaces=False)
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def check_tokenizer(tokenizer):
    """Raise unless every name a world can hold is cut as intended, and every (NFC) text comes back as it went in."""
    def pieces(text):
        return [tokenizer.decode([i]) for i in tokenizer.encode(text, add_special_tokens=False)]

    def expect(text, parts):
        if pieces(text) != parts:
            raise ValueError(f"{text!r} is cut into {pieces(text)}, not {parts}")

    for space in ("", " "):
        for name in names():
            expect(space + name, [space + name])
        for stem in VILLAGE_STEMS:
            for province in PROVINCES:
                expect(space + stem + province.lower(), [space + stem, province.lower()])
    for word in template_words() + TAGS + CHAT_TOKENS:
        expect(word, [word])
    expect("\nNow there's enough information to answer.\n</think>\n<answer>\nNorthvel\n</answer>",
           ["\n", "Now", " there", "'s", " enough", " information", " to", " answer", ".", "\n", "</think>", "\n",
            "<answer>", "\n", "North", "vel", "\n", "</answer>"])
    many = unicodedata.normalize("NFC", "".join(map(chr, range(1, 0x3000, 9))))
    for text in ("", " ", "a  b \n\n c\t", "Zoë Åström, 42 km; naïve \u200d 你好 🙂🏴‍☠️ \x00\x7f",
                 "<think>x</think >  <|im_end|>", "don't , stop . it 's", many):
        if tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) != text:
            raise ValueError(f"does not round-trip: {text!r}")


# ---------------------------------------------------------------------------------------------------------------------
# The warm start: a good reader and a poor searcher
#
# Scripted searchers, in worlds drawn afresh so that no fact of the committed one is ever seen, write trajectories with
# igpo.py's own tokens. A turn says what it looks up, in the words of question and page: "I look up the ship's captain Mara
# Veldric." Each of these has a mean of its own, and the losses are summed:
#   searcher   the policy's own text
#   reader     the gold answer under igpo.py's probe at *every* boundary, on ones that follow the chain and on poor ones (so
#              that the reader meets wrong pages as often as the searcher errs, and is calibrated on them)
#   plan       the words for whom to look up, which the question alone decides
# The policy is made a good searcher first and then, briefly, taught the habits of a poor one. So what training with rewards
# has to do here is to unlearn habits and bring back a skill that lies below them; it cannot be said to find one.


@dataclass(frozen=True)
class Habits:
    """How a poor searcher errs. Probabilities."""
    ship: float          # to look up the ship by its whole name; else by half of it, which finds another ship
    right: float         # to look up the person whom the question needs
    named_first: float   # else: the person named first on the page, and anyone on it otherwise
    done: float          # to answer after a search, once the whole chain was read


WANDERER = Habits(ship=0.4, right=0.45, named_first=0.75, done=0.8)     # meets wrong pages of many kinds; never imitated
POOR = Habits(ship=0.0, right=0.25, named_first=0.9, done=0.95)
STOP = 0.1               # how often either answers after a search before that
LINGER = 0.3             # `done` where the gold path is only read: what was found must still be known some pages later
MAX_TURNS = 6


def next_lookup(world, question: dict, read: list[str], last: str, rng: random.Random, gold_path: bool,
                habits: Habits) -> tuple[str, str, str]:
    """(whose, relation, name) that a searcher looks up next, having read these pages, the last as somebody's `last`."""
    chain, relations = question["chain"], ["", "ship"] + question["relations"]    # relations[i + 1] leads to chain[i]
    at = next((i for i, title in enumerate(chain) if title not in read), len(chain))
    here = world.facts.get(read[-1], {}) if read else {}
    # What it sees is the page before it; the ship of the question and its crew have words of their own and can be gone back to.
    if at < len(chain) and (at < 2 or chain[at] in here.values()) and (gold_path or rng.random() < (habits.right if at else habits.ship)):
        return relations[at], relations[at + 1], chain[at]
    text = world.page_of[read[-1]]["text"] if here else ""
    persons = sorted((r for r in here if r in SHIP_RELATIONS + PERSON_RELATIONS), key=lambda r: text.index(f"the {r} "))
    if not persons:
        return "", "ship", chain[0].split()[1]                                    # half of the name: finds another ship
    relation = persons[0] if rng.random() < habits.named_first else rng.choice(persons)
    return last, relation, here[relation]


def look_up(tokenizer, whose: str, relation: str, name: str) -> list[int]:
    """The policy's own tokens of a turn that searches."""
    import igpo
    thought = LOOK_UP.format(what=f"{whose}'s {relation}" if whose else relation, name=name)
    return igpo.encode(tokenizer, f"\n{thought}\n</think>\n<search> {name} </search>")


def scripted_rollout(tokenizer, world, search, question: dict, rng: random.Random, gold_path: bool, habits: Habits = POOR):
    """A trajectory as igpo.rollout would have written it, by a searcher that follows the chain or by a poor one."""
    import igpo

    prompt = igpo.encode_prompt(tokenizer, question["question"])
    r = igpo.Rollout(list(prompt), [0] * len(prompt), [-1] * len(prompt), [len(prompt)])
    read, relation = [], ""
    for turn in range(MAX_TURNS):
        done = set(question["chain"]) <= set(read)
        stop = turn > 0 and rng.random() < (habits.done if done else 0 if gold_path else STOP)
        if stop or turn == MAX_TURNS - 1:
            r.write(igpo.encode(tokenizer, f"\n{ENOUGH}\n</think>\n<answer>\n{question['answers'][0]}\n</answer>"), True, turn)
            r.answer, r.stop = question["answers"][0], "answer"
            return r
        whose, relation, name = next_lookup(world, question, read, relation, rng, gold_path, habits)
        r.write(look_up(tokenizer, whose, relation, name), True, turn)
        found = search.search(name, 1)
        r.queries.append(name)
        r.retrieved.append(list(found))
        r.write(igpo.encode_information(tokenizer, found, None, 100), False, turn)
        r.boundaries.append(len(r.ids))
        read += [passage.title for passage in found]
    raise AssertionError("unreachable")


SEARCHER, READER, PLAN = range(3)


def training_row(tokenizer, rollout, gold: str, learn_searching: bool) -> tuple[dict, list[int]]:
    """(row for igpo.token_logps, kind of each of its targets)."""
    import igpo

    schema = igpo.encode(tokenizer, igpo.SCHEMA)
    probe = schema + igpo.encode_gold(tokenizer, gold)
    row = igpo.one_pass(rollout, [probe] * len(rollout.boundaries), len(schema))
    if not learn_searching:          # the gold path teaches to read, not where to go
        row["targets"] = [j for j in row["targets"] if j >= len(rollout.ids)]
    return row, [SEARCHER if j < len(rollout.ids) else READER for j in row["targets"]]


def page_row(tokenizer, world, question: dict, at: int) -> tuple[dict, list[int]]:
    """Page `at` of the gold path alone, as if those before were known. Targets: what is looked up next, and the answer."""
    import igpo
    from search_tool import Passage

    relations, chain = ["", "ship", *question["relations"]], question["chain"]
    prompt, page = igpo.encode_prompt(tokenizer, question["question"]), Passage(**world.page_of[chain[at]])
    r = igpo.Rollout(list(prompt), [0] * len(prompt), [-1] * len(prompt), [], retrieved=[[page]])
    r.write(look_up(tokenizer, relations[at], relations[at + 1], page.title) + igpo.encode_information(tokenizer, [page], None, 100), False, 0)
    r.boundaries.append(len(r.ids))
    if at + 1 < len(chain):     # relation, given name, surname
        turn = look_up(tokenizer, relations[at + 1], relations[at + 2], chain[at + 1])
        where = turn.index(tokenizer.encode(f" {chain[at + 1]}")[0])
        for i, token in enumerate(turn):
            r.write([token], where - 1 <= i <= where + 1, 1)
    return training_row(tokenizer, r, question["answers"][0], True)


def plan_row(tokenizer, question: dict) -> tuple[dict, list[int]]:
    """The gold path without its pages; targets are the words for what is looked up, which the question alone decides."""
    import igpo

    prompt = igpo.encode_prompt(tokenizer, question["question"])
    r = igpo.Rollout(list(prompt), [0] * len(prompt), [-1] * len(prompt), [])
    relations = ["", "ship", *question["relations"]]
    for turn, title in enumerate(question["chain"]):
        r.write(look_up(tokenizer, relations[turn], relations[turn + 1], title) + igpo.encode_information(tokenizer, [], None, 100), True, turn)
    row = igpo.one_pass(r, [], 0)
    words = {tokenizer.encode(" " + word)[0] for word in ("ship", *SHIP_RELATIONS, *PERSON_RELATIONS)}
    targets = [j for j in row["targets"] if r.ids[j] in words]
    return {**row, "targets": targets}, [PLAN] * len(targets)


@dataclass
class Stage:
    """A part of the warm start. Shares are of the rows of a step; what they leave are a poor searcher's rollouts."""
    steps: int
    first_lr: float
    last_lr: float
    plans: float = 0.0      # the words of the question, pages left out
    pages: float = 0.0      # one page, two times in three the last
    taught: float = 0.0     # the gold path, to read and to search
    read: float = 0.0       # the gold path, to read only
    habits: Habits = WANDERER
    poor: bool = False      # whether the poor searcher is imitated; else its pages are only read


ROWS = 32
# First the parts, in short rows; then a good searcher, since only who knows the right next word can tell a wrong page from a
# right one; last and briefly the poor one. A long poor stage would wipe out what reinforcement is to bring back.
STAGES = (Stage(225, 1.5e-3, 1e-3, plans=0.15, pages=0.85),
          Stage(600, 1.5e-3, 1e-4, plans=0.05, pages=0.2, taught=0.45, read=0.15),
          Stage(100, 3e-4, 3e-5, taught=0.15, read=0.25, habits=POOR, poor=True))


def wire_induction_head(model, tokenizer):
    """Start from what such models take long to find (induction heads: Olsson et al., 2022), to be made in minutes on a laptop.

    A head of the first layer looks one token back (position alone decides, by its biases) and writes what it sees, turned
    into a space of its own. A head of the second looks there for the token it stands on, so that it finds what followed
    this token before. From the second layer on heads write what they read. Two such steps copy a name from a page.
    """
    import torch
    layers, hidden = model.model.layers, model.config.hidden_size
    first, second, size = layers[0].self_attn, layers[1].self_attn, model.config.head_dim
    vectors, frequencies = model.get_input_embeddings().weight, model.model.rotary_emb.inv_freq
    turn = torch.linalg.qr(torch.randn(hidden, hidden))[0]
    with torch.no_grad():
        vectors *= 2
        for name in names():   # with and without a space before it
            vectors[tokenizer.encode(" " + name)] = vectors[tokenizer.encode(name)]
        for layer in layers:
            layer.mlp.down_proj.weight *= 0.35
        first.o_proj.weight *= 0.35
        for layer in layers[1:]:
            layer.self_attn.o_proj.weight.copy_(2 * layer.self_attn.v_proj.weight.T)
        first.q_proj.bias[:size] = 8 * torch.cat([torch.ones(size // 2), torch.zeros(size // 2)])
        first.k_proj.bias[:size] = 8 * torch.cat([frequencies.cos(), frequencies.sin()])    # rotary positions turn it onto the query one token on
        first.o_proj.weight[:, :size] = 0.6 * turn @ first.v_proj.weight[:size].T
        second.q_proj.weight[:size] = 5 * first.v_proj.weight[:size]
        second.k_proj.weight[:size] = second.q_proj.weight[:size] @ turn.T


def make_policy(folder: Path, tokenizer, hidden: int = 128, layers: int = 4):
    """Train the policy from nothing (about 20 minutes on one core) and save it as an ordinary Hugging Face model folder."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    import igpo
    from search_tool import BM25, Passage

    torch.manual_seed(0)
    torch.set_num_threads(1)     # the same sums on any machine with the same instructions
    rng = random.Random("warm start")
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32, head_dim=32, max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=True, initializer_range=0.04,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    wire_induction_head(model, tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    start, worlds = time.time(), 0
    for number, stage in enumerate(STAGES, 1):
        optimizer = torch.optim.AdamW(model.parameters(), lr=stage.first_lr, betas=(0.9, 0.98), weight_decay=0.01)
        slope = stage.last_lr / stage.first_lr - 1
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 30, 1) * (1 + slope * i / stage.steps))
        sums = torch.zeros(2, 3)
        for step in range(stage.steps):
            if step % 10 == 0:
                worlds += 1
                world = World(worlds)
                search = BM25([Passage(**page) for page in world.pages])
                questions = world.questions("all", 10 * ROWS)
            rows, kinds = [], []
            for i in range(ROWS):
                question = questions[step % 10 * ROWS + i]
                part, gold = i / ROWS, question["answers"][0]
                if part < stage.plans:
                    row, kind = plan_row(tokenizer, question)
                elif part < stage.plans + stage.pages:
                    last = question["hops"] - 1
                    row, kind = page_row(tokenizer, world, question, last if rng.random() < 0.6 else rng.randint(0, last))
                elif part < stage.plans + stage.pages + stage.taught:
                    rollout = scripted_rollout(tokenizer, world, search, question, rng, True, stage.habits)
                    row, kind = training_row(tokenizer, rollout, gold, True)
                elif part < stage.plans + stage.pages + stage.taught + stage.read:
                    rollout = scripted_rollout(tokenizer, world, search, question, rng, True, replace(stage.habits, done=LINGER))
                    row, kind = training_row(tokenizer, rollout, gold, False)
                else:
                    rollout = scripted_rollout(tokenizer, world, search, question, rng, False, stage.habits)
                    row, kind = training_row(tokenizer, rollout, gold, stage.poor)
                rows.append(row)
                kinds.append(torch.tensor(kind))
            counts = torch.bincount(torch.cat(kinds), minlength=3).clamp(min=1)
            for batch in igpo.by_tokens([len(row["ids"]) for row in rows], 2048):
                scores = torch.cat(igpo.token_logps(model, [rows[i] for i in batch], 1.0))
                kind = torch.cat([kinds[i] for i in batch])
                losses = torch.stack([-scores[kind == k].sum() for k in range(3)])
                (losses / counts).sum().backward()
                sums[0] += losses.detach()
            sums[1] += torch.bincount(torch.cat(kinds), minlength=3)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            if (step + 1) % 25 == 0:
                searcher, reader, plan = (sums[0] / sums[1].clamp(min=1)).tolist()
                print(f"stage {number} step {step + 1:4}  nats a token: searcher {searcher:.3f}  reader {reader:.3f}  plan {plan:.3f}  {time.time() - start:.0f} s", flush=True)
                sums.zero_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------------
# What the warm start is like, measured on the committed world


def diagnose(folder: Path, world: World, questions: list[dict], samples: int = 4) -> dict:
    """Is it a calibrated reader and a poor searcher? Every number comes from igpo.py's own rollout and score.

    gold_path      by hops: mean belief (log-prob per gold token) at b_0 .. b_hops of trajectories that follow the chain
    wrong_path     by hops: the same where every page read is of an entity off the chain
    gains          on the policy's own sampled rollouts, by turn: mean gain in probability, and of right searches (the page
                   belongs to the chain and is new) and wrong ones, in probability and in log-probability, and how many
    guess          share of right answers when it must answer at once
    f1             by hops: F1 of sampled and of greedy rollouts, exact match, turns
    """
    import torch
    import igpo
    from search_tool import BM25, Passage

    cfg = igpo.Config(**{**igpo.DEMO, "model": str(folder / "policy"), "group": samples})
    torch.manual_seed(0)
    model, tokenizer = igpo.load_model(cfg)
    search = BM25([Passage(**page) for page in world.pages])
    rng = random.Random("diagnose")
    mean = lambda values: round(statistics.mean(values), 4) if values else None
    out = {"gold_path": {}, "wrong_path": {}, "gains": {}, "f1": {}}

    class Only:
        """A search that finds nothing but pages off the chain."""
        def __init__(self, chain):
            self.chain = chain

        def search(self, query, k):
            others = list(search.search(query, 10)) + [Passage(**page) for page in rng.sample(world.pages, 20)]
            return next([p] for p in others if p.title not in self.chain)

    for hops in (2, 3, 4):
        some = [q for q in questions if q["hops"] == hops]
        gold = [scripted_rollout(tokenizer, world, search, q, rng, True) for q in some]
        wrong = [scripted_rollout(tokenizer, world, Only(q["chain"]), q, rng, False) for q in some]
        for name, rollouts in (("gold_path", gold), ("wrong_path", wrong)):
            _, beliefs = igpo.score(model, tokenizer, rollouts, [q["answers"] for q in some], cfg)
            out[name][hops] = [mean([b[t] for b in beliefs if len(b) > t]) for t in range(hops + 1)]

    rollouts = igpo.rollout(model, tokenizer, questions, search, cfg)
    asked = [q for q in questions for _ in range(samples)]
    _, beliefs = igpo.score(model, tokenizer, rollouts, [q["answers"] for q in asked], cfg)
    gains = collections.defaultdict(list)
    for r, q, b in zip(rollouts, asked, beliefs):
        read = set()
        for t, (in_log, in_prob) in enumerate(zip(igpo.info_gains(b), igpo.info_gains(b, "prob")), 1):
            new = {p.id for p in r.retrieved[t - 1]} - read
            gains[t].append((bool(new & set(q["supporting"])), in_prob, in_log))
            read |= new
    for t, rows in sorted(gains.items()):
        out["gains"][t] = {"searches": len(rows), "right_share": mean([r for r, _, _ in rows]), "prob": mean([p for _, p, _ in rows]),
                           "prob_right": mean([p for r, p, _ in rows if r]), "prob_wrong": mean([p for r, p, _ in rows if not r]),
                           "logprob": mean([g for _, _, g in rows]),
                           "logprob_right": mean([g for r, _, g in rows if r]), "logprob_wrong": mean([g for r, _, g in rows if not r])}
    at_once = igpo.rollout(model, tokenizer, questions, search, replace(cfg, max_turns=1, group=1, temperature=0.0))
    answers = [r.answer or "" for r in at_once]
    usual = collections.Counter(q["answers"][0] for q in questions).most_common(1)[0][1]
    out["guess"] = {"answered_at_once": mean([r.stop == "answer" for r in at_once]), "em_at_once": mean([igpo.exact_match(a, q["answers"]) for a, q in zip(answers, questions)]),
                    "most_common_answer": round(usual / len(questions), 4)}
    greedy = igpo.rollout(model, tokenizer, questions, search, replace(cfg, group=1, temperature=0.0))
    for hops in (2, 3, 4, "all"):
        def pick(rs, qs):
            return [(r, q["answers"]) for r, q in zip(rs, qs) if hops in ("all", q["hops"])]
        sampled, best = pick(rollouts, asked), pick(greedy, questions)
        out["f1"][hops] = {"sampled": mean([igpo.f1_score(r.answer, a) for r, a in sampled]), "greedy": mean([igpo.f1_score(r.answer, a) for r, a in best]),
                           "em_sampled": mean([igpo.exact_match(r.answer, a) for r, a in sampled]), "em_greedy": mean([igpo.exact_match(r.answer, a) for r, a in best]),
                           "turns": mean([len(r.boundaries) for r, _ in sampled])}
    out["stop"] = dict(collections.Counter(r.stop for r in rollouts))
    return out


# ---------------------------------------------------------------------------------------------------------------------
# What is true of the data, counted


def check_data(world: World, splits: dict[str, list[dict]], tokenizer) -> dict:
    """Raise where the data breaks a promise of this file's docstring; return the numbers worth knowing."""
    from search_tool import BM25, Passage

    entities = list(world.page_of)
    assert len(entities) == len(world.pages) == 1500
    for page in world.pages:
        words = page["text"].split()
        assert 25 <= len(words) <= 70, page
        for fact in [page["title"], *world.facts.get(page["title"], {}).values()]:
            assert f" {fact}" in page["text"], (fact, page)
    for split, rows in splits.items():
        assert len({row["question"] for row in rows}) == len(rows)
        for row in rows:
            answer = row["answers"][0]
            assert answer not in row["question"] and answer not in row["chain"], row
            assert len(row["supporting"]) == row["hops"] == len(row["chain"]), row
    first_pages = {split: {row["supporting"][0] for row in rows} for split, rows in splits.items()}
    assert len(set().union(*first_pages.values())) == sum(map(len, first_pages.values()))  # no ship in two splits

    def most(values):
        return collections.Counter(values).most_common(1)[0]

    words = [len(page["text"].split()) for page in world.pages]
    tokens = [len(tokenizer.encode(page["text"])) for page in world.pages]
    search = BM25([Passage(id=page["id"], title=page["title"], text=page["text"]) for page in world.pages])
    kinds = collections.defaultdict(list)
    surname_hits = []
    for page in world.pages:
        title = page["title"]
        kind = "ship" if "built" in world.facts.get(title, {}) else "person" if title in world.facts else "village"
        kinds[kind].append(search.search(title, 1)[0].id == page["id"])
        if kind == "person":
            surname_hits.append(search.search(title.split()[1], 1)[0].id == page["id"])
    near = collections.defaultdict(list)
    for row in splits["train"]:
        near[row["hops"]].append(world.province[row["answers"][0]] == world.province[row["chain"][1]])
    answers = {split: [row["answers"][0] for row in rows] for split, rows in splits.items()}
    questions = [row["question"] for rows in splits.values() for row in rows]
    bearers = collections.Counter(title.split()[1] for title in world.facts if title in world.province)
    mentions = collections.Counter(word for page in world.pages for word in set(re.findall(r"\w+", page["text"])))
    return {
        "pages": len(world.pages),
        "questions": {split: dict(sorted(collections.Counter(row["hops"] for row in rows).items()))
                      for split, rows in splits.items()},
        "words per page (min, mean, max)": [min(words), round(statistics.mean(words), 1), max(words)],
        "tokens per page (mean, max)": [round(statistics.mean(tokens), 1), max(tokens)],
        "tokens per question (max)": max(len(tokenizer.encode(question)) for question in questions),
        "vocabulary": len(tokenizer),
        "share of the most common answer": {
            split: round(most(golds)[1] / len(golds), 4) for split, golds in answers.items()},
        "dev right by the most common train answer":
            answers["dev"].count(most(answers["train"])[0]) / len(answers["dev"]),
        "answer of the first person's province, by hops": {
            hops: round(statistics.mean(hits), 3) for hops, hits in sorted(near.items())},
        "different answers in train": len(set(answers["train"])),
        "BM25 finds a page by its full title": {
            kind: round(statistics.mean(hits), 3) for kind, hits in sorted(kinds.items())},
        "BM25 finds the ship by the whole question": round(statistics.mean(
            search.search(row["question"], 1)[0].title == row["chain"][0] for row in splits["dev"]), 3),
        "BM25 finds a person's page by the surname": round(statistics.mean(surname_hits), 3),
        "persons of one surname (mean, max)": [round(statistics.mean(bearers.values()), 1), max(bearers.values())],
        "pages that hold one surname (mean)": round(statistics.mean(mentions[surname] for surname in bearers), 1),
    }


def main():
    parser = argparse.ArgumentParser(description="Make the demo: its world, its questions, its policy.")
    parser.add_argument("--only", choices=("data", "policy", "diagnostics"), help="make this part alone")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to (default: this one)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    check_tokenizer(tokenizer)
    if args.only in (None, "data"):
        world, splits = make_data(args.out)
        for what, number in check_data(world, splits, tokenizer).items():
            print(f"{what:48} {number}")
    if args.only in (None, "policy"):
        make_policy(args.out / "policy", tokenizer)
    if args.only in (None, "diagnostics"):
        world = World(0)
        text = json.dumps(diagnose(args.out, world, world.questions("dev", SIZES["dev"])), indent=1)
        (args.out / "diagnostics.json").write_text(text + "\n", encoding="utf-8")
        print(text)


if __name__ == "__main__":
    main()
