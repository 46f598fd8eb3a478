"""Search for an agent that searches over several turns. One file that stands alone: numpy, requests and tqdm.

    search = open_search("bm25:corpus.jsonl")                     # BM25 over a local file
    search = open_search("http://127.0.0.1:8000/retrieve")        # a retrieval server, Search-R1's protocol
    search = open_search("opensearch+https://host:9200/index")    # OpenSearch or Elasticsearch
    search = open_search("duckduckgo")                            # the web: to try things, not to train on
    for found in search.search_many(["who founded Tavo", "..."], k=3):
        print(found.error or [passage.title for passage in found])

    $ python search_tool.py --search bm25:corpus.jsonl "who founded Tavo"

BM25 is Lucene's variant with eager scores (Lù 2024, "BM25S"). For a query q and a passage d, one of N:

    score(q, d) = sum over tokens t of q of  idf(t) * tf / (tf + k1 (1 - b + b |d| / mean |d|))
    idf(t)      = ln(1 + (N - df(t) + 0.5) / (df(t) + 0.5))

What can work for no query (no corpus, a bad line in it, an unknown form) raises `SearchError` at opening.
After that a query never raises: if it failed, its `Results` are empty and `.error` says why, in one line.
Retrieved text is hostile. Titles and texts come back as one bounded line, without angle brackets or hidden
characters. The `id` is given as it came, for comparing: never show it to a model.
"""
import argparse
import glob
import gzip
import ipaddress
import json
import math
import os
import random
import re
import shutil
import sqlite3
import string
import sys
import tempfile
import threading
import time
import unicodedata
import zlib
from array import array
from bisect import bisect_left
from collections import Counter
from concurrent.futures import Future, wait
from contextlib import closing, suppress
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import parse_qs, urljoin, urlsplit

import numpy as np
import requests
from tqdm import tqdm

CACHE = os.path.join(os.path.expanduser("~"), ".cache", "igpo", "search.sqlite3")
FORMS = "bm25:<corpus.jsonl>, duckduckgo, http(s)://host/retrieve or opensearch+http(s)://host:9200/index"
DUCKDUCKGO = "https://html.duckduckgo.com/html/"
TITLE = 200  # characters of a title that are shown


class UserError(Exception):
    """What the user can mend, in one line. Programs print it and exit with status 2."""


class SearchError(UserError):
    """One line: what is wrong, where, how to mend it. Of a failed request also what may help: "again" (to ask
    less at once, a single query again), "less" (to ask less at once), "later" (to ask the same again), "".
    """
    def __init__(self, text: str, helps: str = "", after: float = 0.0):
        super().__init__(text)
        self.helps, self.after = helps, after  # seconds


@dataclass(frozen=True)
class Passage:
    id: str
    title: str
    text: str
    score: float = 0.0


class Results(list):
    """The passages of one query, best first. error: why the search failed; None if it worked, found or not.
    cached: the answer came from the disk cache."""
    def __init__(self, passages=(), error=None, cached: bool = False):
        super().__init__(passages)
        self.error, self.cached = error and clean_text(error, 300), cached


class Search:
    """A back end behind its disk cache. A subclass says how new queries are asked."""
    cache, name = None, property(lambda self: type(self).__name__)

    def ask(self, queries: list[str], k: int) -> list[Results]:
        return [Results(error="not in the cache") for _ in queries]

    def search(self, query, k: int = 3) -> Results:
        return self.search_many([query], k)[0]

    def search_many(self, queries, k: int = 3) -> list[Results]:
        """One `Results` per query, of at most k passages. Equal queries are asked once."""
        queries = [clean_query(query) for query in queries]
        known = {query: Results() for query in queries if not query or k < 1}
        new = [query for query in dict.fromkeys(queries) if query not in known]
        if new and self.cache:
            known.update(self.cache.get(new, k))
            new = [query for query in new if query not in known]
        if new:
            known.update(zip(new, self.ask(new, k)))
            if self.cache:  # an empty answer is not kept: perhaps the server has not loaded its index yet
                self.cache.put({query: known[query] for query in new if known[query]}, k)
        return [Results(known[query], known[query].error, known[query].cached) for query in queries]

    def results(self, read, *arguments) -> Results:
        """The passages that read(*arguments) brings, cleaned. If it raises, this one query has failed."""
        try:
            return Results(clean_passage(passage) for passage in read(*arguments))
        except SearchError as error:
            return Results(error=error)
        except Exception as error:  # its text may hold an address: only its kind is shown
            return Results(error=f"{self.name} gives no valid answer ({type(error).__name__})")


# Text

# Invisible, though Python calls them printable: joiners, fillers, variation selectors.
HIDDEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0"
                    "\U000e0100-\U000e01ef]")

# The letters of scripts without spaces between words: Thai, Lao, Myanmar, Khmer and the Tai scripts; kana,
# Chinese characters, Bopomofo and Yi. Without their punctuation.
SPACELESS = (
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e50-\u0e59\u0e81-\u0eff\u1000-\u1049\u1050-\u109d\ua9e0-\ua9fe\uaa60-\uaa7f"
    "\u1780-\u17d3\u17d7\u17dc\u17dd\u17e0-\u17e9\u1950-\u19df\u1a20-\u1a99\uaa80-\uaadd"
    "\u3005-\u3007\u3021-\u3029\u3031-\u3035\u3038-\u303c\u3041-\u3096\u3099\u309a\u309d-\u309f\u30a1-\u30fa"
    "\u30fc-\u30ff\u3105-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua48c\uf900-\ufaff"
    "\uff66-\uff9f\U0001aff0-\U0001b16f\U00020000-\U0003ffff")
RUN_OR_WORD = re.compile(f"([{SPACELESS}]+)|([^\\W{SPACELESS}]+)")


def normalise(text: str) -> str:
    """Text as it is indexed, asked, shown and compared: one line, without what nobody sees (soft hyphens,
    joiners, zero-width and bidi characters), in NFC: one code for é, however it was typed. Not in NFKC, which
    changes what is read: 10² would become 102.
    >>> normalise("Zoe\\u0301\\n Brücken\\u00adbau\\u200b")
    'Zoé Brückenbau'
    """
    text = " ".join(text.split())  # line breaks, and spaces of every width
    if text.isascii() and text.isprintable():
        return text
    text = HIDDEN.sub("", "".join(filter(str.isprintable, text)))  # first: they may part e from its accent
    return " ".join(unicodedata.normalize("NFC", text).split())


def clean_text(text, limit: int = 2000) -> str:
    """Normalised text in which tags and chat control tokens, of any model family, can no longer act.
    >>> clean_text("a\\n\\x00 </information><|im_start|>  [INST] <<SYS>>")
    'a ‹/information›‹|im_start|› (INST) ‹‹SYS››'
    """
    text = normalise(str(text or "")).translate(str.maketrans("<>＜＞", "‹›‹›"))
    return re.sub(r"\[([^\[\]()\s]+)\]", r"(\1)", text)[:limit].rstrip()  # [INST], [TOOL_CALLS], [|user|] ...


def clean_query(query) -> str:
    return clean_text(query, 300)


def clean_passage(passage: Passage) -> Passage:
    name = passage.id.encode(errors="replace").decode()  # half of a surrogate pair cannot be written to a file
    return Passage(name, clean_text(passage.title, TITLE), clean_text(passage.text), passage.score)


def tokenize(text: str) -> list[str]:
    """Words in lower case, without stemming or stop words; where a script has no spaces, pairs of neighbours.
    >>> tokenize("Tavo's bridge"), tokenize("塔沃桥1932"), tokenize("河")
    (['tavo', 's', 'bridge'], ['塔沃', '沃桥', '1932'], ['河'])
    """
    text = normalise(text).lower()
    if text.isascii():
        return re.findall(r"\w+", text)
    tokens = []
    for run, word in RUN_OR_WORD.findall(text):
        tokens += [word] if word else [run[i:i + 2] for i in range(len(run) - 1)] or [run]
    return tokens


def split_title(contents: str) -> tuple[str, str]:
    """(title, text) of contents. Search-R1 writes the title in double quotes on the first line. A first line
    without quotes is a title if it is short, does not end like a sentence, and the next one does not go on in
    lower case. All else is text, a long first line too: as a title it would be cut."""
    first, _, rest = (part.strip() for part in contents.strip().partition("\n"))
    if rest and len(first) <= TITLE and re.fullmatch('".*"', first):
        return first[1:-1], rest
    sentence = re.search(r"[.!?…:;,。！？：；，、][\"”’')\]]*$", first) or rest[:1].islower()
    return ("", contents) if sentence or len(first) > TITLE / 2 or not rest else (first, rest)


def make_passage(row: dict, score: float = 0.0) -> Passage:
    """From {"id", "title", "text"} or {"id", "contents"}, beside which a "title" may stand."""
    title, text = row.get("title") or "", row.get("text")
    if text is None and isinstance(text := row.get("contents"), str):
        first, rest = split_title(text)
        if not title or title == first:
            title, text = first, rest
    name = row.get("id")
    if not (isinstance(title, str) and isinstance(text, str) and isinstance(name, (str, int, float))):
        raise TypeError('"id", "title" or "text" is missing or of a wrong type')
    if len(title) > TITLE:  # it would be cut, and what the index finds in it never be shown
        title, text = "", f"{title}\n{text}"
    return Passage(str(name), title, text, score)


def read_rows(path):
    """Yields (file:line, object) of a .jsonl or .jsonl.gz file. SearchError names a line that is none."""
    packed, number, line = str(path).endswith(".gz"), 0, b""
    if str(path).endswith(".parquet"):
        raise SearchError(f"{path}: no jsonl; python -m tools.data {path} makes a folder of it for --data")
    try:
        total = None if packed else os.path.getsize(path)
        bar = tqdm(desc=f"reading {path}", unit="B", unit_scale=True, total=total, delay=1)
        with (gzip.open if packed else open)(path, "rb") as file, bar:
            for number, line in enumerate(file, 1):
                bar.update(len(line))
                if b"\0" in line:  # UTF-16 of plain English would pass for UTF-8
                    raise UnicodeError
                if line.strip():
                    row = json.loads(line.decode("utf-8-sig"))
                    if not isinstance(row, dict):
                        raise TypeError("it is no JSON object")
                    json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text
                    yield f"{path}:{number}", row
    except FileNotFoundError:
        raise SearchError(f"there is no file {path}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise SearchError(f"{path} cannot be read beyond line {number}: {error}") from None
    except UnicodeEncodeError:
        raise SearchError(f"{path}:{number}: half of a surrogate pair, which is no text; mend or remove it") from None
    except UnicodeError:
        code = "UTF-16" if b"\0" in line else "LATIN1 (or GBK, or what it is in)"
        raise SearchError(f"{path}:{number}: not UTF-8; convert the file: iconv -f {code} -t UTF-8") from None
    except Exception as error:
        raise SearchError(f"{path}:{number}: {type(error).__name__}: {error}; mend or remove it") from None


def read_passages(path):
    """Yields the passages of a corpus, uncleaned."""
    where = ""
    for where, row in read_rows(path):
        try:
            passage = make_passage(row)
        except TypeError as error:
            like = '{"id": "1", "title": "...", "text": "..."}'
            raise SearchError(f"{where}: {error}; mend or remove it: each line must be like {like}") from None
        yield passage
    if not where:
        raise SearchError(f"{path} holds no passage")


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# A list or an object that str() made a text of: "['Ann']", "{'target': array(['Ann'])}".
STRINGIFIED = re.compile(r"\s*(?:array\()?[\[{][\[{(\s]*['\"].*[\]})]\s*", re.DOTALL)
SPLIT = "<|answer_split|>"  # joins the aliases in the official parquet


def load_questions(path) -> list[dict]:
    """A jsonl file of {"question", "answers" (or "golden_answers"): [..]}, with "id" and "supporting" (ids or titles
    of passages) if they are known. SearchError names the field and line that is not so."""
    rows = []
    for where, row in read_rows(path):
        answers, supporting = row.get("answers", row.get("golden_answers")), row.get("supporting") or []
        answers = [answers] if isinstance(answers, str) else answers
        fields = {"question": [row.get("question")], "answers": answers, "supporting": supporting}
        for name, texts in fields.items():
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise SearchError(f'{where}: field "{name}" is not text; python -m tools.data reads other layouts')
            if name == "answers" and any(SPLIT in text or STRINGIFIED.fullmatch(text) for text in texts):
                raise SearchError(f'{where}: field "answers" holds a list as a text; write ["one", "two"]')
            if name != "supporting" and not any(text.strip() for text in texts):
                raise SearchError(f'{where}: field "{name}" is empty')
        answers, name = [text for text in answers if text.strip()], row.get("id")
        name = where.rpartition(":")[2] if name is None else str(name)
        rows.append({**row, "id": name, "answers": answers, "supporting": supporting})
    if not rows:
        raise SearchError(f"{path} holds no question")
    return rows


def answer_words(text: str) -> list[str]:
    """Words of an answer as the authors of IGPO score it: lower-case, ASCII punctuation to spaces, articles stay.
    >>> answer_words("The U.S. army")
    ['the', 'u', 's', 'army']
    """
    return "".join(" " if c in string.punctuation else c for c in normalise(text).lower()).split()


def f1_score(prediction: str | None, golds: list[str]) -> float:
    """Word F1 with the best gold alias, 0 to 1, on sets of words as they score. SQuAD's stands in tools/metrics.py.
    >>> f1_score("Mira Oss", ["Oss", "Tavo"]), f1_score("no no no", ["no"])
    (0.6666666666666666, 1.0)
    """
    p, best = set(answer_words(prediction or "")), 0.0
    for gold in golds:
        g = set(answer_words(gold))
        best = max(best, 2 * len(p & g) / (len(p) + len(g) or 1))
    return best


def exact_match(prediction: str | None, golds: list[str]) -> float:
    """1.0 if the words, in their order, are those of a gold alias."""
    return float(bool(prediction) and answer_words(prediction) in [answer_words(gold) for gold in golds])


# BM25

INDEX = ("words", "word_at", "starts", "docs", "impacts", "text", "lines")


def build_index(passages, k1: float, b: float) -> dict[str, np.ndarray]:
    """What a term adds to the score of a passage depends on these two alone, so it is computed once and kept.

    Term t (of V, sorted) is words[word_at[t]:word_at[t + 1]]. It is in the passages
    docs[starts[t]:starts[t + 1]], ascending, and adds the same slice of impacts to their scores.
    Passage d (of N) is text[lines[d]:lines[d + 1]], in JSON."""
    vocabulary, text, lines = {}, bytearray(), array("q", [0])
    terms, counts, widths, lengths = (array("i") for _ in range(4))  # two per posting, then two per passage
    for passage in passages:
        count = Counter(tokenize(f"{passage.title} {passage.text}"))
        terms.extend([vocabulary.setdefault(token, len(vocabulary)) for token in count])
        counts.extend(count.values())
        widths.append(len(count))
        lengths.append(sum(count.values()))
        text += json.dumps(vars(passage)).encode()
        lines.append(len(text))
    if not lengths:
        raise SearchError("there are no passages to search in")
    words, place = sorted(vocabulary), np.zeros(len(vocabulary), np.int32)
    place[[vocabulary[word] for word in words]] = np.arange(len(words))
    n, terms, lengths = len(lengths), place[np.array(terms)], np.array(lengths)
    df = np.bincount(terms, minlength=len(words))
    idf = np.log(1 + (n - df + 0.5) / (df + 0.5)).astype(np.float32)
    norm = k1 * (1 - b + b * lengths / (lengths.mean() or 1.0))
    order = np.argsort(terms, kind="stable")  # by term, then by passage
    docs, tf = np.repeat(np.arange(n, dtype=np.int32), widths)[order], np.array(counts)[order]
    impacts = (np.repeat(idf, df) * (tf / (tf + norm[docs]))).astype(np.float32)
    words = [word.encode() for word in words]
    letters, text = np.frombuffer(b"".join(words), np.uint8), np.frombuffer(text, np.uint8)
    word_at, starts = np.cumsum([0, *map(len, words)]), np.concatenate([[0], np.cumsum(df)])
    return dict(zip(INDEX, (letters, word_at, starts, docs, impacts, text, np.array(lines))))


class BM25(Search):
    """BM25 over an index: of these passages, or a saved one. Ties are broken by position in the corpus."""
    def __init__(self, passages=(), k1: float = 1.5, b: float = 0.75, index: dict | None = None):
        self.index = index or build_index(passages, k1, b)

    def find(self, token: str) -> int | None:
        """The number of a term. Binary search: of a mapped index only the pages that it touches are read."""
        word, words, at = token.encode(), self.index["words"], self.index["word_at"]
        term = bisect_left(range(len(at) - 1), word, key=lambda t: words[at[t]:at[t + 1]].tobytes())
        return term if term < len(at) - 1 and words[at[term]:at[term + 1]].tobytes() == word else None

    def rank(self, query: str, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions and scores (float32) of the best k passages with a score above 0."""
        starts, docs, impacts = self.index["starts"], self.index["docs"], self.index["impacts"]
        scores = np.zeros(len(self.index["lines"]) - 1, np.float32)
        for token in tokenize(query):
            if (term := self.find(token)) is not None:
                postings = slice(starts[term], starts[term + 1])
                np.add.at(scores, docs[postings], impacts[postings])
        # Rather than sort all N: if k blocks of 64 have such a peak, none of the best k scores is below it.
        peaks = np.maximum.reduceat(scores, np.arange(0, len(scores), 64))
        floor = np.partition(peaks, -k)[-k] if k <= len(peaks) else 0.0
        best = np.flatnonzero(scores >= floor if floor > 0 else scores)  # with all ties: position decides
        best = best[np.argsort(-scores[best], kind="stable")[:k]]
        return best, scores[best]

    def read(self, query: str, k: int) -> list[Passage]:
        text, lines = self.index["text"], self.index["lines"]
        return [Passage(**{**json.loads(text[lines[doc]:lines[doc + 1]].tobytes()), "score": float(score)})
                for doc, score in zip(*self.rank(query, k))]

    def ask(self, queries: list[str], k: int) -> list[Results]:
        return [self.results(self.read, query, k) for query in queries]


def fingerprint(path, block: int = 16384) -> str:
    """Size and checksum of a file: of all of it up to 4 MiB, of 256 blocks all over it if it is larger."""
    size, crc = os.path.getsize(path), 0
    with open(path, "rb") as file:
        for start in [*range(0, size, max(size // 256, block)), max(size - block, 0)]:
            file.seek(start)
            crc = zlib.crc32(file.read(block), crc)
    return f"{size}-{crc:08x}"


def open_bm25(corpus: str, k1: float = 1.5, b: float = 0.75) -> BM25:
    """BM25 over a jsonl file, by the index beside it: built if it is missing, damaged or out of date."""
    if not os.path.isfile(corpus):
        raise SearchError(f"there is no corpus {corpus}")
    folder, time_ns = os.path.abspath(corpus) + ".bm25", os.stat(corpus).st_mtime_ns
    state = {"format": 2, "k1": k1, "b": b, "corpus": fingerprint(corpus), "modified": time_ns}
    for left in glob.glob(glob.escape(folder) + ".????????.bm25"):  # by a process killed while it saved
        with suppress(OSError):
            if time.time() - os.path.getmtime(left) > 3600:  # no process saves for so long
                shutil.rmtree(left)
    if os.path.lexists(folder):
        with suppress(Exception):  # a damaged file can make json and numpy raise anything
            if json.loads(Path(f"{folder}/index.json").read_text()) == state:
                arrays = [np.load(f"{folder}/{name}.npy", "r").view(np.ndarray) for name in INDEX]
                return BM25(index=dict(zip(INDEX, arrays)))
        print(f"search: {folder} is damaged or out of date: building it again", file=sys.stderr)
    index = build_index(read_passages(corpus), k1, b)
    try:
        save_index(index, state, folder)
    except OSError as error:
        print(f"search: {folder} cannot be saved ({error.strerror}): it is kept in memory", file=sys.stderr)
    return BM25(index=index)


def save_index(index: dict[str, np.ndarray], state: dict, folder: str) -> None:
    """Writes under another name, and renames: it is whole or not there, even after kill -9 or a power cut."""
    where, name = os.path.split(folder)
    with tempfile.TemporaryDirectory(prefix=f"{name}.", suffix=".bm25", dir=where) as parent:
        os.mkdir(new := f"{parent}/new")
        for key, values in index.items():
            with open(f"{new}/{key}.npy", "wb") as file:
                np.save(file, values)
                os.fsync(file.fileno())
        Path(f"{new}/index.json").write_text(json.dumps(state))
        if os.path.lexists(folder):
            os.replace(folder, f"{parent}/old")
        os.replace(new, folder)


# HTTP

def within(seconds: float, work):
    """What work() returns or raises, or TimeoutError. A socket's own time-out begins anew with every byte, so
    that a server could hold us for ever. The thread that waits for it is left behind."""
    future = Future()

    def run():
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    if not wait([future], seconds).done:
        raise TimeoutError
    return future.result()


class Remote(Search):
    """What the network back ends share. A subclass says how a batch is asked (`fetch`: one row per query),
    which hits are in a row (`hits`), and what is in a hit (`unpack`: fields as in a corpus, and a score)."""
    refusals = {429}  # HTTP statuses that ask for patience
    timeout, deadline = (5.0, 30.0), 60.0  # seconds: to connect, between two bytes; for a whole request
    max_bytes = 32_000_000  # of one answer
    tries, pause = 4, 1.0  # of a single query; seconds to the second try, doubled for each further one
    patience = 30.0  # seconds that a query waits at most between two tries
    gap, most = 0.0, 1_000_000  # seconds between two requests; queries in one, at most
    authorize = staticmethod(lambda request: request)  # None: requests would look for a password in ~/.netrc

    def __init__(self, url: str):
        self.url, self.session, self.lock = url, requests.Session(), threading.Lock()
        self.session.resolve_redirects = lambda *_, **__: iter(())  # it would read their bodies to the end
        self.session.headers["User-Agent"] = "Mozilla/5.0 (compatible; igpo-search/2.0)"
        self.batch, self.smooth, self.closed_until = self.most, 0, 0.0

    def ask(self, queries: list[str], k: int) -> list[Results]:
        """A request fails because it is too large for a slow server, because a query in it makes the server
        fall over, or because of an outage. So a batch that failed is halved, and the size that works is kept.
        A single query that failed is asked again at the end. When `tries` of these failed in a row, all that
        are left have failed."""
        found, todo, suspects, error = {}, list(queries), [], None
        failed, blamed, smooth, size = 0, False, len(queries) >= self.batch, self.batch
        with self.lock:
            if (left := self.closed_until - time.monotonic()) > 0:
                return [Results(error=f"{self.name} is left alone for another {left:.0f} s") for _ in queries]
            while line := todo or suspects:
                batch, begun = line[:size if todo else 1], time.monotonic()
                try:
                    rows = list(self.fetch(batch, k))
                    if len(rows) != len(batch):
                        raise SearchError(f"{self.name} answers {len(rows)} of {len(batch)} queries", "less")
                except Exception as failure:
                    took, smooth = time.monotonic() - begun, False
                    error = self.explain(failure, len(batch), took)
                    if len(batch) > 1 and error.helps in ("again", "less"):
                        size = (len(batch) + 1) // 2
                    elif error.helps == "less":
                        found[line.pop(0)] = Results(error=error)
                    elif error.helps == "again":
                        suspects.append(line.pop(0))
                    if len(batch) == 1:
                        todo.reverse()  # from the other end: bad queries often stand side by side
                        blamed = took < self.timeout[1]  # perhaps this query is to blame, not the size
                    failed += len(batch) == 1 or error.helps == "later"
                    if not error.helps or self.rest(error, failed):
                        break
                else:
                    found.update((query, self.results(self.read, row, k)) for query, row in zip(batch, rows))
                    del line[:len(batch)]
                    smooth = smooth and time.monotonic() - begun < self.timeout[1] / 4
                    size = self.batch if blamed else size
                    failed, blamed = 0, False
                time.sleep(self.gap)
            self.batch = self.batch if blamed else size
            self.smooth = self.smooth + 1 if smooth else 0
            if self.smooth == 4:  # the server was slow, or down, and is no more
                self.batch, self.smooth = min(2 * self.batch, self.most), 0
        return [found[query] if query in found else Results(error=error) for query in queries]

    def rest(self, error: SearchError, failed: int) -> bool:
        """Waits before the next try, or says that there is none. A server that asked for patience gets it."""
        seconds = max(error.after, self.pause * 2.0 ** max(failed - 1, 0) * random.uniform(0.5, 1.0))
        if failed < self.tries and seconds <= self.patience:
            time.sleep(seconds if error.helps != "less" else 0.0)
            return False
        if error.helps == "later" or error.after:
            self.closed_until = time.monotonic() + min(max(seconds, 2 * self.patience), 3600.0)
        return True

    def explain(self, error: Exception, count: int, seconds: float) -> SearchError:
        """The failure in our own words: those of others may hold an address."""
        kind, known = type(error).__name__, requests.exceptions
        passing = (known.ConnectionError, known.Timeout, known.ChunkedEncodingError, TimeoutError)
        if isinstance(error, OSError):  # as all exceptions of requests are
            again = isinstance(error, passing) and not isinstance(error, known.SSLError)
            error = SearchError(f"{self.name} cannot be reached ({kind})", "again" if again else "")
        elif not isinstance(error, SearchError):
            error = SearchError(f"{self.name} gives no valid answer ({kind})", "less")
        if error.helps == "again" and seconds >= self.timeout[1]:
            text = f"{self.name} takes over {self.timeout[1]:g} s, with {count} queries in a request"
            cure = "a faster server helps, or a smaller --rollout_batch of igpo.py"
            error = SearchError(f"{text}: {cure}", "again")
        return error

    def request(self, method: str, url: str, **body):
        """The parsed answer to one request."""
        host = urlsplit(url).hostname  # at 127.0.0.1 a proxy would find itself
        proxies = {"no_proxy": host} if re.fullmatch(r"localhost|127\.[\d.]+|::1", host) else None

        def exchange():
            data = bytearray()
            with self.session.request(method, url, auth=self.authorize, timeout=self.timeout, proxies=proxies,
                                      stream=True, **body) as reply:
                self.check(reply)
                for piece in reply.iter_content(65536):
                    data += piece
                    if len(data) > self.max_bytes:
                        raise SearchError(f"{self.name} sends more than {self.max_bytes} bytes", "less")
            return self.parse(bytes(data))

        return within(self.deadline, exchange)

    def check(self, reply) -> None:
        status, after = reply.status_code, reply.headers.get("Retry-After", "")
        if status in self.refusals or status >= 500:
            helps = "later" if status in self.refusals else "again"
            raise SearchError(f"{self.name} refuses for now (HTTP {status})", helps,
                              float(after) if after.isdecimal() else 0.0)
        if reply.is_redirect:  # not followed: it may lead anywhere
            place = reply.headers["Location"]
            raise SearchError(f"{self.name} redirects (HTTP {status}); give the address it leads to: {place}")
        if status != 200:
            helps = "less" if status in (400, 413, 422) else ""  # one of the queries, or their number
            raise SearchError(f"{self.name} answers HTTP {status}", helps)

    def parse(self, body: bytes):
        return json.loads(body.decode("utf-8-sig", "replace"))  # a bad byte spoils one passage, not all

    def hits(self, row) -> list:
        return row

    def unpack(self, hit: dict) -> tuple:
        return hit.get("document", hit), hit.get("score")

    def read(self, row, k: int) -> list[Passage]:
        """The passages of a row. What is wrong in one is mended, or it is left out: the others are good."""
        hits, passages = self.hits(row), []
        for hit in hits:
            with suppress(Exception):
                fields, score = self.unpack(hit)
                name, title = fields.get("id"), fields.get("title")
                fields = {**fields, "id": "" if name is None else str(name)}
                fields["title"] = title if isinstance(title, str) else ""
                passages.append(make_passage(fields, finite(score)))
        if hits and not passages:
            raise SearchError(f"{self.name}: none of the {len(hits)} passages can be read")
        return passages[:k]


def finite(score) -> float:
    with suppress(TypeError, ValueError, OverflowError):
        return float(score) if math.isfinite(float(score)) else 0.0
    return 0.0


# Back ends

class RetrievalServer(Remote):
    """Search-R1's protocol: {"queries", "topk", "return_scores"} -> {"result": [[{"document", "score"}]]}."""
    def fetch(self, queries: list[str], k: int) -> list:
        question = {"queries": queries, "topk": k, "return_scores": True}
        return self.request("POST", self.url, json=question)["result"]


class OpenSearch(Remote):
    """`_msearch` of OpenSearch and Elasticsearch. Credentials come from the environment."""
    def authorize(self, request):
        names = ("OPENSEARCH_API_KEY", "OPENSEARCH_USER", "OPENSEARCH_PASSWORD")
        key, user, password = (os.environ.get(name, "").strip() for name in names)
        if key:
            request.headers["Authorization"] = f"ApiKey {key}"
        elif user:
            requests.auth.HTTPBasicAuth(user.encode(), password.encode())(request)
        return request

    def fetch(self, queries: list[str], k: int) -> list:
        fields, lines = ["title", "text", "contents"], []
        for query in queries:
            should = [{"match": {field: query}} for field in fields]
            lines += [{}, {"size": k, "_source": fields, "query": {"bool": {"should": should}}}]
        return self.request("POST", f"{self.url.rstrip('/')}/_msearch",
                            headers={"Content-Type": "application/x-ndjson"},
                            data="".join(json.dumps(line) + "\n" for line in lines))["responses"]

    def hits(self, row: dict) -> list:
        if error := row.get("error"):
            raise SearchError(f"{self.name} answers {error['type'] if isinstance(error, dict) else error}")
        return row["hits"]["hits"]

    def unpack(self, hit: dict) -> tuple:
        return {**hit["_source"], "id": hit.get("_id")}, hit.get("_score")


class ResultPage(HTMLParser):
    """The result page of DuckDuckGo's HTML endpoint -> rows of [address, title, snippet]."""
    def __init__(self, html: str):
        super().__init__()
        self.rows, self.field = [], 0
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        classes = (dict(attributes).get("class") or "").split()
        if "result__a" in classes:
            self.rows.append([dict(attributes).get("href") or "", "", ""])
            self.field = 1
        elif "result__snippet" in classes and self.rows:
            self.field = 2

    def handle_endtag(self, tag):
        if tag in ("a", "div"):
            self.field = 0

    def handle_data(self, data):
        if self.field:
            self.rows[-1][self.field] += data


class DuckDuckGo(Remote):
    """The HTML endpoint, which is meant for people: it refuses programs after a handful of queries."""
    refusals, gap, most = {202, 400, 403, 429}, 1.0, 1

    def fetch(self, queries: list[str], k: int) -> list:
        return [self.request("GET", self.url, params={"q": query}) for query in queries]

    def parse(self, body: bytes) -> list[dict]:
        page, found = ResultPage(body.decode("utf-8", "replace")), []
        if not page.rows and b"no-results" not in body:
            raise SearchError("DuckDuckGo sends a challenge, or an unknown page, not results", "later")
        for address, title, snippet in page.rows:
            with suppress(ValueError):
                url = urljoin(self.url, address)
                url = parse_qs(urlsplit(url).query).get("uddg", [url])[0]  # where their redirect leads to
                if re.match(r"https?://(?!([^/]*\.)?duckduckgo\.com/)", url):  # else: an advertisement
                    found.append({"id": url, "title": title, "text": snippet})
        return found


# Cache

class DiskCache:
    """Answers in sqlite by address, k and query, for 30 days. A transaction each way and no connection held:
    threads, forks and processes can share the file. only: nothing is written, and any age will do."""
    def __init__(self, path: str, spec: str, only: bool = False):
        self.path, self.spec, self.only, self.max_age, self.problem = path, spec, only, 30 * 86400.0, ""
        if only:
            self.max_age = math.inf
            self.run("SELECT key, at, passages FROM answers LIMIT 1")
            if self.problem:
                raise SearchError(self.problem)
        else:
            self.run("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, at REAL, passages TEXT)")
            self.run("CREATE INDEX IF NOT EXISTS answers_at ON answers (at)")
            self.run("DELETE FROM answers WHERE at < ?", [(time.time() - self.max_age,)])

    def run(self, sql: str, rows: list[tuple] = [()]) -> list:
        """The statement for each row of arguments, in one transaction."""
        if self.problem:
            return []
        try:
            path = Path(os.path.abspath(self.path))
            if not self.only:
                path.parent.mkdir(parents=True, exist_ok=True)
            uri = f"{path.as_uri()}?mode={'rw' if self.only else 'rwc'}"  # c: to be created
            with closing(sqlite3.connect(uri, timeout=60, uri=True)) as db, db:
                return [db.execute(sql, row).fetchone() for row in rows]
        except (sqlite3.Error, OSError) as error:
            self.problem = f"the cache {self.path} cannot be used ({error})"
            if not self.only:
                print(f"search: {self.problem}: going on without", file=sys.stderr)
            return []

    def get(self, queries: list[str], k: int) -> dict[str, Results]:
        known, since = {}, time.time() - self.max_age
        rows = self.run("SELECT passages FROM answers WHERE key = ? AND at > ?",
                        [(f"{self.spec}\n{k}\n{query}", since) for query in queries])
        if self.only and self.problem:
            return {query: Results(error=self.problem) for query in queries}
        for query, row in zip(queries, rows):
            with suppress(Exception):  # what is not there or cannot be read is not known
                passages = [Passage(p["id"], p["title"], p["text"], p["score"]) for p in json.loads(row[0])]
                if passages:
                    known[query] = Results(map(clean_passage, passages), cached=True)
        return known

    def put(self, answers: dict[str, Results], k: int) -> None:
        self.run("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)",
                 [(f"{self.spec}\n{k}\n{query}", time.time(), json.dumps([vars(p) for p in found]))
                  for query, found in answers.items()])


def is_local(host: str) -> bool:
    """Is this an address of this machine or its network, where another server may answer tomorrow? Of names
    those without a dot are, and those in domains that the internet does not have; no name is looked up."""
    host = host.rstrip(".").lower()
    try:
        address = ipaddress.ip_address(host)
        return not (getattr(address, "ipv4_mapped", None) or address).is_global
    except ValueError:
        domains = ("local", "localhost", "internal", "intranet", "lan", "home", "corp", "private", "svc")
        return host.rpartition(".")[2] in (host, *domains)


def open_search(spec: str, cache: str = "auto", cache_path: str | None = None) -> Search:
    """The one way to get a search; for `spec` see the top of this file. `cache` is the disk cache of the
    network back ends: "auto" (for public addresses: at 127.0.0.1:8000 there may be another corpus tomorrow),
    "on", "off" or "only" (answer from it alone, at any age)."""
    if cache not in ("auto", "on", "off", "only"):
        raise SearchError(f"unknown cache mode {cache!r}: use auto, on, off or only")
    if spec.startswith("bm25:"):
        return open_bm25(spec.removeprefix("bm25:"))
    search = None
    with suppress(ValueError):  # of a bad port or a bad IPv6 address
        url = DUCKDUCKGO if spec == "duckduckgo" else spec.removeprefix("opensearch+")
        host, _ = urlsplit(url).hostname, urlsplit(url).port
        if spec == "duckduckgo":
            search = DuckDuckGo(url)
        elif host and re.fullmatch(r"https?://[^/@\s]+(/\S*)?", spec):
            search = RetrievalServer(url)
        elif host and re.fullmatch(r"opensearch\+https?://[^/@\s]+/[^/\s]\S*", spec):
            search = OpenSearch(url)
    if not search:  # what stands before an @ may be a password
        raise SearchError(f"unknown search {spec.rpartition('@')[2]!r}: use {FORMS}; "
                          "user and password come from the environment")
    if cache == "only":
        search = Search()
    if cache in ("on", "only") or cache == "auto" and not is_local(host):
        search.cache = DiskCache(cache_path or CACHE, spec, cache == "only")
    return search


def main() -> int:
    """Exit status: 0 found, 1 nothing found, 2 error."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal may know only ASCII
    parser = argparse.ArgumentParser(description="Try a search back end before training on it.")
    parser.add_argument("query")
    parser.add_argument("--search", required=True, help=FORMS)
    parser.add_argument("-k", type=int, default=3, help="passages to show")
    parser.add_argument("--search_cache", choices=("auto", "on", "off", "only"), default="auto",
                        help="disk cache of the network back ends; auto: for public addresses")
    args = parser.parse_args()
    try:
        found = open_search(args.search, args.search_cache).search(args.query, args.k)
        if found.error:
            raise SearchError(found.error)
    except SearchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for rank, p in enumerate(found, 1):
        print(f"{rank}. {p.title}  [{clean_text(p.id, 200)}]  {p.score:.3f}\n   {p.text}")
    if not found or found.cached:
        print("from the disk cache" if found else "nothing found", file=sys.stderr)
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
