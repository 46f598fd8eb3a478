"""Questions in every layout that users have, the benchmarks of the hub, and folders to train on.

    python -m tools.data hotpotqa                        makes data/hotpotqa: train, dev and corpus .jsonl
    python -m tools.data hotpotqa musique --limit 8000   8,000 training questions, a corpus of their passages
    python -m tools.data my_hotpot.json --dev 50         the same from a file whose rows carry passages
    python -m tools.data nq --no_corpus                  questions alone, for a corpus or server of your own

The corpus holds the passages that the data set itself carries. So BM25 on this computer is enough to train
with, and no retrieval server is needed. docs/data.md describes the layouts, and what is refused or left out.

What is not a text is refused, by file, line and field. Nothing is made a text that was none: a wrong gold
answer costs a long run and never says so.
"""
from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import random
import re
import reprlib
import shlex
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from huggingface_hub import hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError
from tqdm import tqdm

from search_tool import SPLIT, STRINGIFIED, UserError, first_line, normalise, open_search

BENCHMARKS = ("nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle")
FLASHRAG = "RUC-NLPIR/FlashRAG_datasets"
# Hub data set and file of those whose rows carry passages. FlashRAG's copy of MuSiQue carries none.
CARRYING = {"hotpotqa": (FLASHRAG, "hotpotqa/{}.jsonl"),
            "2wikimultihopqa": (FLASHRAG, "2wikimultihopqa/{}.jsonl"),
            "musique": ("dgslibisey/MuSiQue", "musique_ans_v1.0_{}.jsonl")}
TRAIN = "python igpo.py --model Qwen2.5-1.5B-Instruct"
CORPUS_WANTED = "With a corpus or a server of your own (--search): add --no_corpus"
LONGEST_QUESTION, LONGEST_ANSWER = 1000, 200      # characters
# Scripts written without spaces, Thai to Khmer, kana and Han: each character is taken as a word.
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")


# ---- the rows of a file ------------------------------------------------------------------------------------

def read_rows(path: str) -> Iterator[tuple[str, object]]:
    """The rows of jsonl, parquet or one JSON list as they stand there, each after its place, "file:line"."""
    packed, number = path.endswith(".gz"), 0
    try:
        if path.endswith(".parquet"):
            import pyarrow.parquet      # nothing else needs it
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
                for number, row in enumerate(batch.to_pylist(), number + 1):
                    yield f"{path}:{number}", row
            return
        size = None if packed else os.path.getsize(path)
        bar = tqdm(desc=f"reading {Path(path).name}", total=size, unit="B", unit_scale=True, delay=1)
        with (gzip.open if packed else open)(path, "rb") as file, bar:
            for line, raw in enumerate(file, 1):
                bar.update(len(raw))
                text = decode(raw, path, line).strip()
                number += bool(text)
                if text.startswith("[") and number == 1:
                    rest = decode(file.read(), path, line + 1)
                    yield from list_rows(f"{text}\n{rest}".rstrip(), path, line)
                    return
                if text:
                    row, end = parse(text, 0, path, line)
                    if end < len(text):
                        raise UserError(f"{path}:{line}: not JSON (more follows after column {end}).")
                    yield f"{path}:{line}", row
    except ImportError:
        raise UserError(f"{path}: to read parquet, pip install pyarrow") from None
    except (OSError, EOFError, zlib.error, ValueError, TypeError, NotImplementedError) as e:
        raise UserError(f"{path}: cannot be read ({first_line(e)}).") from None


def list_rows(text: str, path: str, first: int) -> Iterator[tuple[str, object]]:
    """The items of a JSON list that begins in line `first`: one by one, so that errors name the line."""
    skip = re.compile(r"[ \t\r\n]*").match
    at, counted, line, number = skip(text, 1).end(), 0, first, 0
    while not text.startswith("]", at):
        line, counted, number = line + text.count("\n", counted, at), at, number + 1
        row, end = parse(text, at, path, first)
        yield f"{path}:{line}: question {number}", row
        end = skip(text, end).end()
        if not text.startswith((",", "]"), end):
            raise UserError(f"{path}:{line}: not JSON (neither a comma nor ] after question {number}).")
        at = skip(text, end + 1).end() if text[end] == "," else end
    if text[at + 1:].strip():
        raise UserError(f"{path}:{line}: not JSON (more follows after the list).")


def decode(raw: bytes, path: str, line: int) -> str:
    """The text of a file from this line on. An encoding guessed wrong would make wrong gold answers."""
    try:
        if b"\0" not in raw:    # UTF-16 is full of zero bytes, JSON has none
            return raw.decode("utf-8-sig")
        line += raw[:raw.index(b"\0")].count(b"\n")
    except UnicodeDecodeError as e:
        line += e.object[:e.start].count(b"\n")
    raise UserError(f"{path}:{line}: not UTF-8. Convert it from what it is in, LATIN1, GBK, UTF-16 ..: "
                    f"iconv -f LATIN1 -t UTF-8 {shlex.quote(path)} > utf8.jsonl")


def once(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object, unless a key stands in it twice: Python would keep the last and say nothing."""
    if len(row := dict(pairs)) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {ascii(twice)} stands twice in an object")
    return row


def parse(text: str, at: int, path: str, first: int) -> tuple[object, int]:
    """The JSON value at this place of a text that begins in line `first` of a file, and where it ends."""
    try:
        return json.JSONDecoder(object_pairs_hook=once).raw_decode(text, at)
    except json.JSONDecodeError as e:
        at, why = e.pos, f"{e.msg} at column {e.colno}"
    except (ValueError, RecursionError) as e:
        why = first_line(e)
    line = first + text.count("\n", 0, at)
    raise UserError(f"{path}:{line}: not JSON ({why}). Write one object a line, or one list of objects.")


# ---- the fields of a row: a ValueError names the field, whoever calls knows file and line ------------------

def opened(value):
    """A value as plain Python: an array of numpy as a list, JSON that stands in a text as what it holds.

    >>> opened('["Ann", "Bo"]'), opened("[sic]"), opened("1984"), opened("true")
    (['Ann', 'Bo'], '[sic]', '1984', 'true')
    """
    if isinstance(value, np.ndarray):
        return [opened(item) if isinstance(item, np.ndarray) else item for item in value.tolist()]
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            pass
    return value


def pick(row: dict, *fields: str) -> tuple[str, object]:
    """(field, value) of the first of these fields that is not empty; "a.b" is the field b of the object a."""
    for field in fields:
        outer, _, inner = field.rpartition(".")
        holder = opened(row.get(outer)) if outer else row
        value = holder.get(inner) if isinstance(holder, dict) else None
        if value is not None and not (hasattr(value, "__len__") and len(value) == 0):
            return field, value
    return fields[0], None


def text_of(value, field: str) -> str:
    """A value that must be a text, and one that can be written down: half a surrogate pair cannot."""
    if not isinstance(value, str):
        shown = "is missing" if value is None else f"holds {reprlib.repr(value)} ({type(value).__name__})"
        raise ValueError(f'field "{field}" {shown} where there must be a text. Write texts in quotes.')
    if re.search("[\ud800-\udfff]", value):
        raise ValueError(f'field "{field}" holds half a surrogate pair: {ascii(value[:40])}.')
    return value


def list_of(value, field: str) -> list:
    if not isinstance(items := opened(value), (list, tuple)):
        raise ValueError(f'field "{field}" holds {reprlib.repr(value)} where there must be a list.')
    return list(items)


def texts(value, field: str) -> list[str]:
    """The texts of a field: a text, a list, SQuAD's, TriviaQA's or Search-R1's object, or these as JSON text.

    >>> texts("Ann<|answer_split|>Anna", "answer"), texts({"text": ["Ann"], "answer_start": [3]}, "answers")
    (['Ann', 'Anna'], ['Ann'])
    >>> texts({"value": "Ann", "aliases": ["Anna"]}, "answer"), texts('{"target": ["Ann", "Anna"]}', "answer")
    (['Ann', 'Anna'], ['Ann', 'Anna'])
    >>> texts(["Ann", 7], "answers")
    Traceback (most recent call last):
    ValueError: field "answers" holds 7 (int) where there must be a text. Write texts in quotes.
    """
    inner = opened(value)
    if isinstance(value, str) and inner is not value:
        try:
            return texts(inner, field)
        except ValueError:      # "[1984]" is JSON, but no list of texts: it is a text
            inner = value
    if isinstance(inner, dict):
        name, part = pick(inner, "text", "value", "target")
        if part is None or isinstance(opened(part), dict):
            raise ValueError(f'field "{field}" holds {reprlib.repr(inner)}: no "text", "value", "target".')
        return texts(part, f"{field}.{name}") + texts(opened(inner.get("aliases")) or [], f"{field}.aliases")
    found = []
    for item in inner if isinstance(inner, (list, tuple)) else [inner]:
        if STRINGIFIED.fullmatch(text_of(item, field)):
            raise ValueError(f'field "{field}" holds a list as a text, {ascii(item[:60])}: write JSON.')
        found += item.split(SPLIT)
    return found


def passages_of(row: dict, *fields: str) -> list[tuple[str, str, bool | None]]:
    """(title, text, supporting?) of the passages that a row itself carries. None: its supporting titles tell.

    >>> passages_of({"context": {"title": ["Ann"], "sentences": [["Ann is a cat.", " She naps."]]}})
    [('Ann', 'Ann is a cat. She naps.', None)]
    """
    found = []
    field, value = pick(row, *fields or ("paragraphs", "metadata.paragraphs", "context", "metadata.context"))
    if isinstance(value := opened(value), str):         # SQuAD: one paragraph, its title beside it
        value = [{"title": row.get("title") or "", "text": value}]
    elif isinstance(value, dict):                       # HotpotQA, 2Wiki: titles, and the sentences of each
        titles, lists = value.get("title"), pick(value, "sentences", "content", "text")[1]
        if len(list_of(titles, f"{field}.title")) != len(list_of(lists, f"{field}.sentences")):
            raise ValueError(f'field "{field}" holds more titles than texts, or fewer.')
        value = list(zip(list_of(titles, field), list_of(lists, field)))
    for item in list_of(value or [], field):
        if isinstance(item, (list, tuple)) and len(item) == 2:
            item = {"title": item[0], "text": item[1]}
        if not isinstance(item, dict) or not isinstance(item.get("is_supporting"), (bool, type(None))):
            raise ValueError(f'field "{field}" holds {reprlib.repr(item)}, which is no passage.')
        text = pick(item, "paragraph_text", "text")[1] or ""
        sentences = [text] if isinstance(text, str) else list_of(text, f"{field}.text")
        text = " ".join(text_of(sentence, f"{field}.text").strip() for sentence in sentences).strip()
        found.append((text_of(item.get("title"), f"{field}.title").strip(), text, item.get("is_supporting")))
    return found


def supporting_of(row: dict) -> list[str]:
    """Ids or titles of the passages that support the answer, each once; [] if the row does not say.

    >>> supporting_of({"supporting_facts": [["Ann", 0], ["Bo", 2], ["Ann", 1]]})
    ['Ann', 'Bo']
    """
    field, value = pick(row, "supporting", "supporting_facts", "metadata.supporting_facts")
    value = opened(value)
    value = value.get("title") if isinstance(value, dict) else value
    items = [] if value is None else list_of(value, field)
    if not items:       # MuSiQue: all paragraphs, the supporting ones marked
        items = [title for title, _, marks in passages_of(row, "paragraphs", "metadata.paragraphs") if marks]
    if not items:       # FlashRAG's MuSiQue: a step may name its paragraph
        field, steps = pick(row, "question_decomposition", "metadata.question_decomposition")
        steps = [step for step in list_of(opened(steps) or [], field) if isinstance(step, dict)]
        items = [step["support_paragraph"] for step in steps if step.get("support_paragraph")]
    for i, item in enumerate(items):
        if isinstance(item, (list, tuple)) and len(item) == 2 and re.fullmatch(r"\d+", str(item[1])):
            items[i] = item[0]      # [title, number of the sentence]
        elif isinstance(item, dict):
            items[i] = item.get("title")
    return list(dict.fromkeys(filter(None, (text_of(item, field) for item in items))))


def plain_question(row: dict, number: int) -> dict:
    """A question of any layout in ours; `number` is its id if it has none. Empty answers may be among others.

    >>> plain_question({"_id": "x", "question": "Who?", "answer": "Ann", "supporting_facts": [["Bo", 1]]}, 1)
    {'id': 'x', 'question': 'Who?', 'answers': ['Ann'], 'supporting': ['Bo']}
    """
    if not isinstance(row, dict):
        raise ValueError(f'{reprlib.repr(row)} is no object like {{"question": "..", "answers": [".."]}}.')
    if isinstance(prompt := opened(row.get("prompt")), list):       # what the user says last
        spoken = [turn for turn in prompt if isinstance(turn, dict) and turn.get("role") == "user"]
        row = {**row, "prompt": spoken[-1].get("content") if spoken else None}
    field, question = pick(row, "question", "extra_info.question", "prompt")
    if field == "prompt" and re.search("</?(think|search|answer)>", text_of(question, field)):
        raise ValueError('field "prompt" holds instructions around the question. Add a field "question".')
    source, answers = pick(row, "answers", "golden_answers", "answer", "possible_answers",
                           "reward_model.ground_truth")
    answers = texts(answers, source) + texts(opened(row.get("answer_aliases")) or [], "answer_aliases")
    answers = list(dict.fromkeys(answer.strip() for answer in answers))
    if not text_of(question, field).strip() or not any(answers):
        raise ValueError(f'field "{source if question.strip() else field}" is empty.')
    name_field, name = pick(row, "id", "_id", "extra_info.index")
    name = str(name) if type(name) is int else str(number) if name is None else text_of(name, name_field)
    hops, source = row.get("hops"), row.get("data_source")
    if type(hops) not in (int, type(None)):
        raise ValueError(f'field "hops" holds {reprlib.repr(hops)} where there must be a whole number.')
    known = {"supporting": supporting_of(row), "hops": hops,
             "data_source": source and text_of(source, "data_source")}
    return {"id": name, "question": question.strip(), "answers": answers,
            **{field: value for field, value in known.items() if value}}


# ---- questions ---------------------------------------------------------------------------------------------

def question_rows(path: str, seen: Counter) -> Iterator[tuple[str, dict, dict]]:
    """(place, row as it stands there, question in our layout) of what can be answered; `seen`: ids."""
    number = unanswerable = empty = 0
    for number, (place, row) in enumerate(read_rows(path), 1):
        if isinstance(row, dict) and row.get("answerable") is False:
            unanswerable += 1
            continue
        try:
            question = plain_question(row, number)
        except ValueError as e:
            raise UserError(f"{place}: {e}") from None
        empty += "" in question["answers"]
        question["answers"] = [answer for answer in question["answers"] if answer]
        name = question["id"]
        while question["id"] in seen:       # an id names one question
            seen[name] += 1
            question["id"] = f"{name}#{seen[name]}"
        seen[question["id"]] = 1
        yield place, row, question
    if unanswerable:
        print(f"{path}: {unanswerable} questions marked unanswerable are left out.")
    if empty:
        print(f"{path}: {empty} empty answers that stood beside others are left out.")
    if number == unanswerable:
        raise UserError(f"{path}: no questions in it.")


def read_questions(path: str | Path) -> list[dict]:
    """All questions of a file as {"id", "question", "answers"}, if known "supporting", "hops", "data_source".

    Raises UserError, one line with file, line and field, for what cannot be used.
    """
    return [question for _, _, question in question_rows(str(path), Counter())]


def read_benchmark(name: str, split: str = "test") -> list[dict]:
    """All questions of a benchmark (nq .. bamboogle, demo) or of a file in any layout."""
    path = fetch(name, split) if name in BENCHMARKS else Path(name)
    if name == "demo":
        path = Path(__file__).resolve().parent.parent / "demo" / f"{split}.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: neither a file nor one of demo, {', '.join(BENCHMARKS)}.")
    return read_questions(path)


def sample(rows: list, limit: int, seed: int) -> list:
    """`limit` rows drawn by seed, in the order of the file; all if limit is 0 or too large."""
    if not 0 < limit < len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), limit))]


def load_benchmark(name: str, split: str = "test", limit: int = 0, seed: int = 0) -> list[dict]:
    """`limit` questions, drawn by seed, of a benchmark or file (see `read_benchmark`); 0: all."""
    return sample(read_benchmark(name, split), limit, seed)


# ---- the hub -----------------------------------------------------------------------------------------------

def fetch(name: str, split: str) -> Path:
    """FlashRAG's file of a benchmark. Not every benchmark has a test split: "test" then takes dev."""
    splits = ("test", "dev") if split == "test" else (split,)
    for candidate in splits:
        if path := download(FLASHRAG, f"{name}/{candidate}.jsonl"):
            return path
    raise UserError(f"{name} has no {' or '.join(splits)} split in the hub's data set {FLASHRAG}.")


def download(repo: str, file: str) -> Path | None:
    """A file of a hub data set, from the hub's cache or the hub; None if the data set has no such file.

    The hub's library resumes a cut download, checks the size, and knows HF_ENDPOINT, HF_TOKEN and HF_HOME.
    """
    cached = try_to_load_from_cache(repo, file, repo_type="dataset")
    if cached is not None:      # a path, or a mark: the hub has said before that there is no such file
        return Path(cached) if isinstance(cached, str) else None
    try:
        return Path(hf_hub_download(repo, file, repo_type="dataset"))
    except Exception as e:      # of the network, the hub and the disk: these have no class in common
        cause = e.__cause__ if isinstance(e, FileNotFoundError) and e.__cause__ else e    # it hides the cause
        code = getattr(getattr(cause, "response", None), "status_code", None)
        if code == 404 and not isinstance(cause, RepositoryNotFoundError):
            return None
        why, mend = f"HTTP {code}" if code else first_line(cause), "Run again"
        if code in (401, 403):
            mend = "Set HF_TOKEN to a token that may read it"
        if isinstance(cause, OfflineModeIsEnabled):
            why, mend = "HF_HUB_OFFLINE is set and the file is not in the cache", "Unset it"
        url = hf_hub_url(repo, file, repo_type="dataset")
        raise UserError(f"{url}: could not be downloaded ({why}). {mend}, or get the file by other means and "
                        "give its path.") from None


# ---- folders to train on -----------------------------------------------------------------------------------

def key(text: str) -> str:
    """What is the same in texts that differ in case, in spaces or in the form of their accents only."""
    return normalise(text).casefold()


def holds(text: str, answers: list[str]) -> bool:
    """Do the words of one of the answers stand in a text, one after the other?

    >>> holds("a party in Paris", ["art"]), holds("modern art, in Paris", ["Art"]), holds("东京都", ["东京"])
    (False, True, True)
    """
    words = [re.findall(r"\w+", UNSPACED.sub(r" \g<0> ", key(t))) for t in (text, *answers)]
    text, *answers = (f" {' '.join(found)} " for found in words)
    return any(answer.strip() and answer in text for answer in answers)


def yes_or_no(question: dict) -> bool:
    return key(question["answers"][0]) in ("yes", "no")


def collect(path: str, source: str, corpus: dict | None, seen: Counter, left_out: Counter) -> list[dict]:
    """The questions of a file that can be trained on; their passages join the corpus, if any."""
    questions = []
    for place, row, question in question_rows(path, seen):
        long = (len(question["question"]) > LONGEST_QUESTION
                or min(map(len, question["answers"])) > LONGEST_ANSWER)
        if corpus is None:
            left_out["question or answer too long"] += long
            questions += [] if long else [{"data_source": source, **question}]
            continue
        try:
            passages = passages_of(row)
        except ValueError as e:
            raise UserError(f"{place}: {e}") from None
        named, ids = {key(title) for title in question.get("supporting", [])}, {}
        for title, text, supporting in passages:
            if not text:
                left_out["passages without text"] += 1
                continue
            digest = hashlib.blake2b(f"{key(title)}\n{key(text)}".encode(), digest_size=16).digest()
            passage = corpus.setdefault(digest, {"id": f"p{len(corpus) + 1}", "title": title, "text": text})
            ids[passage["id"]] = key(title) in named if supporting is None else supporting
        left_out["supporting titles without passage"] += len(named - {key(title) for title, _, _ in passages})
        answers = question["answers"]
        if not ids:
            left_out["questions without passages"] += 1
        elif long:
            left_out["question or answer too long"] += 1
        elif not yes_or_no(question) and not any(holds(f"{p[0]} {p[1]}", answers) for p in passages):
            left_out["no answer in the passages"] += 1
        else:
            question["supporting"] = [name for name, supporting in ids.items() if supporting]
            question.setdefault("data_source", source)
            questions.append({**question, "passages": list(ids)})
    return questions


def draw(splits: list[list], limit: int, dev_size: int, seed: int, left_out: Counter) -> tuple[list, list]:
    """Train and dev questions of [[train, dev] of each data set]; without a dev split, dev comes from train.

    No question stands twice: the same is what has the same `key`, "?" aside. What is in a dev split stays out
    of train, drawn or not, so that the whole split can serve as a test.
    """
    def new(questions: list[dict], seen: set, reason: str) -> list[dict]:
        fresh = []
        for question in questions:
            name = key(question["question"]).rstrip(" ?.")
            fresh += [question] if name not in seen else []
            seen.add(name)
        left_out[reason] += len(questions) - len(fresh)
        return fresh

    train, dev, in_train, in_dev = [], [], set(), set()
    for number, (own_train, own_dev) in enumerate(splits):
        quota = (dev_size + number) // len(splits)          # the quotas add up to dev_size
        own_train = new(own_train, in_train, "asked twice")
        if not own_dev:
            own_dev = sample(own_train, min(quota, len(own_train) // 2), seed) if len(own_train) > 1 else []
            taken = set(map(id, own_dev))
            own_train = [question for question in own_train if id(question) not in taken]
        dev += sample(new(own_dev, in_dev, "asked twice"), quota, seed)
        train += own_train
    return sample(new(train, in_dev, "also a dev question"), limit, seed), dev


def make(sources: dict[str, str], out: Path, limit: int, dev_size: int, seed: int, no_corpus=False) -> None:
    """Write train.jsonl, dev.jsonl and corpus.jsonl of {name or file: label}, and say what is in them."""
    corpus, seen, left_out, splits = None if no_corpus else {}, Counter(), Counter(), []
    for name, label in sources.items():
        repo, file = CARRYING.get(name, (FLASHRAG, f"{name}/{{}}.jsonl") if name in BENCHMARKS else ("", ""))
        paths = [download(repo, file.format(split)) for split in ("train", "dev")] if repo else [name, None]
        splits.append([collect(str(path), label, corpus, seen, left_out) if path else [] for path in paths])
    train, dev = draw(splits, limit, dev_size, seed, left_out)
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in left_out.items() if count) or "nothing"
    if not train or not dev:
        raise UserError(f"{' '.join(sources)}: too few questions for train and dev. Left out: {reasons}. "
                        f"{CORPUS_WANTED if left_out['questions without passages'] else ''}")
    used = {name for question in train + dev for name in question.get("passages", ())}
    passages = [passage for passage in (corpus or {}).values() if not limit or passage["id"] in used]
    questions = [[{k: v for k, v in q.items() if k != "passages"} for q in rows] for rows in (train, dev)]
    files = dict(zip(("train.jsonl", "dev.jsonl", "corpus.jsonl"), (*questions, passages)))
    if no_corpus:
        del files["corpus.jsonl"]
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        with open(out / f"{name}.part", "w", encoding="utf-8") as file:
            for row in tqdm(rows, f"writing {name}", delay=1):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    for name in files:      # all or, after an error, what was there before
        os.replace(out / f"{name}.part", out / name)
    train_it = f"Train: {TRAIN} --data {shlex.quote(str(out))}"
    if no_corpus:
        print(f"{out}: {len(train):,} training questions, {len(dev):,} dev questions.\nLeft out: {reasons}.\n"
              f"{train_it} --search bm25:CORPUS.jsonl (or a server: docs/search.md)")
        return
    print(f"{out}: {len(train):,} training questions, {len(dev):,} dev questions, {len(passages):,} passages"
          f"{', those of the questions drawn alone' if limit else ''}.\nLeft out: {reasons}.\n"
          f"Yes/no questions, which no passage need answer: {sum(map(yes_or_no, train + dev)):,}.")
    show_recall(dev, out / "corpus.jsonl")
    print(train_it)


def show_recall(dev: list[dict], corpus: Path) -> None:
    """How often BM25 finds an answer to the bare question: what search brings without a policy."""
    asked = [question for question in dev if not yes_or_no(question)][:1000]
    found = open_search(f"bm25:{corpus}").search_many([question["question"] for question in asked], 10)
    right = [[holds(f"{p.title} {p.text}", question["answers"]) for p in passages]
             for question, passages in zip(asked, found)]
    for k in (3, 10) if asked else ():
        hits = sum(any(row[:k]) for row in right)
        print(f"BM25, asked the bare question: an answer is in its first {k} passages for {hits} of "
              f"{len(asked)} dev questions ({hits / len(asked):.0%}), yes/no questions aside.")


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 2 for what the user can mend (told in one line), 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="tools.data", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"tools.data: {message}; --help lists the options\n")
    add = parser.add_argument
    add("names", nargs="+", metavar="NAME", help=f"{', '.join(CARRYING)}, or a file whose rows hold passages")
    add("--out", default="", help="folder to write; empty: data/<names joined by +>")
    add("--overwrite", action="store_true", help="write into a folder that is there already")
    add("--no_corpus", action="store_true", help="questions alone, also of other data sets")
    add("--limit", type=int, default=0, help="training questions drawn, with their passages alone; 0: all")
    add("--dev", type=int, default=200, help="dev questions drawn, as many of each data set")
    add("--seed", type=int, default=0, help="seed of what is drawn")
    args = parser.parse_args(argv)
    try:
        for name in args.names:
            known = BENCHMARKS if args.no_corpus else CARRYING
            if name not in known and not Path(name).is_file():
                raise UserError(f"{name} carries no passages. {CORPUS_WANTED}" if name in BENCHMARKS else
                                f"{name}: neither a file nor one of {', '.join(CARRYING)}.")
        sources = {name: name if name in known else Path(name).name.split(".")[0] for name in args.names}
        out = Path(args.out or Path("data", "+".join(sources.values())))
        if out.exists() and not args.overwrite:
            raise UserError(f"{out}: exists. Choose another --out, or add --overwrite.")
        if args.limit < 0 or args.dev < len(sources):
            raise UserError(f"--limit must be 0 or more, --dev {len(sources)} or more: one of each data set.")
        make(sources, out, args.limit, args.dev, args.seed, args.no_corpus)
    except (UserError, OSError) as e:
        print(f"tools.data: {first_line(e)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tools.data: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")       # a file name in any script, on a terminal that knows one
    sys.exit(main())
