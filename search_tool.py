"""Search for a multi-turn agent: real, fast and safe to train on. One file: the standard library, requests, numpy, tqdm.

    search = open_search("bm25:corpus.jsonl")                             local BM25, memory-mapped
    search = open_search("duckduckgo")                                    the web; to try things, not to train on
    search = open_search("http://127.0.0.1:8000/retrieve")                any Search-R1-compatible retrieval server
    search = open_search("opensearch+https://host:9200/index")            Elasticsearch or OpenSearch
    for passages in search.search_many(["who founded Tavo", "..."], k=3):  # list[Results]
        print(passages.error or [passage.title for passage in passages])

    python search_tool.py --search bm25:corpus.jsonl "who founded Tavo"

What holds for every back end:
1. Failure is an answer. A query never raises: its `Results` is empty and `.error` says why. What cannot work for any
   query (no corpus, an unknown form, a bad jsonl line) raises `SearchError` when the search is opened, in one line.
2. Retrieved text is hostile. Title and text have been through `clean_text`: bounded plain text on one line, without
   angle brackets, control, zero-width or bidi characters. `id` is given as it is, for comparing; never show it to a model.
3. A question seen again costs nothing: an LRU in front of all, and for the network a disk cache that also replays a run
   offline (`cache="only"`).
"""
from __future__ import annotations

import argparse
import base64
import contextlib
import email.utils
import glob
import gzip
import hashlib
import json
import math
import os
import random
import re
import sqlite3
import sys
import threading
import time
import unicodedata
import zlib
from array import array
from collections import Counter, OrderedDict, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass, replace
from html.parser import HTMLParser
from urllib.parse import parse_qs, urljoin, urlsplit

import numpy as np
import requests
from tqdm import tqdm

CACHE = os.path.join(os.path.expanduser("~"), ".cache", "igpo")  # the disk cache, and indexes that cannot be saved elsewhere
SAVE_FROM = 4_000_000  # bytes of corpus, about 5,000 passages: a smaller one is indexed in a second and leaves no file behind
INDEX_FORMAT = "igpo-bm25-1"
FORMS = "bm25:<corpus.jsonl>, duckduckgo, http(s)://host/retrieve or opensearch+http(s)://host:9200/index"


class SearchError(Exception):
    """One line: what is wrong, where, how to mend it."""


@dataclass
class Passage:
    id: str
    title: str
    text: str
    score: float = 0.0
    url: str = ""


class Results(list):
    """The passages of one query, best first. `error` tells why a search failed; None if it worked, found or not."""

    error: str | None = None

    @classmethod
    def failed(cls, error) -> Results:
        results = cls()
        results.error = clean_text(error, 300) or "unknown error"
        return results


def say(line: str) -> None:
    print(f"search: {line}", file=sys.stderr, flush=True)


# No NFKC of any tokenizer turns ‹ or › back into an angle bracket, as it does with ＜, ﹤ and (taken apart) ≮.
_ALIKE = str.maketrans("<＜﹤≮>＞﹥≯［﹇］﹈", "‹‹‹‹››››[[]]")
_INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")


class _Plain(dict):
    """Translation table for `str.translate`, filled as characters are met."""

    def __missing__(self, code: int):
        char = chr(code)
        hidden = unicodedata.category(char)[0] == "C" or _INVISIBLE.match(char)  # C: control, bidi, zero width, surrogate ...
        self[code] = " " if char.isspace() else None if hidden else _ALIKE.get(code, char)
        return self[code]


_PLAIN = _Plain()


def clean_text(text, limit: int = 2000) -> str:
    """Plain text of at most `limit` characters, on one line. Cleaning twice changes nothing.

    Tags and chat control tokens, of our format and of any model family, stay readable but can no longer act:

    >>> clean_text("a\\n\\x00 </information><|im_start|>  [INST] <<SYS>>")
    'a ‹/information›‹|im_start|› (INST) ‹‹SYS››'
    """
    text = str(text or "").translate(_PLAIN)
    if "  " in text:
        text = " ".join(text.split())
    if "[" in text:  # [INST], [/INST], [TOOL_CALLS], [|user|] ...
        text = re.sub(r"\[([^\[\]()\s]+)\]", r"(\1)", text)
    return text.strip()[:limit].rstrip()


def clean_query(query) -> str:
    """A query as every back end gets it: plain text of at most 300 characters, on one line."""
    return clean_text(query, 300)


def _clean(passage: Passage, score) -> Passage:
    score = float(score) if math.isfinite(float(score)) else 0.0
    return Passage(passage.id, clean_text(passage.title, 200), clean_text(passage.text), score, clean_text(passage.url))


def _passage(row) -> Passage:
    """{"id", "title", "text"} or Search-R1's {"id", "contents"} (the title, maybe in quotes, on the first line)."""
    if not isinstance(row, dict):
        raise ValueError("a line must hold a JSON object")
    if "text" not in row and isinstance(row.get("contents"), str):
        title, newline, text = row["contents"].partition("\n")
        row = {**row, "title": title.strip().strip('"') if newline else "", "text": text if newline else title}
    if not isinstance(row.get("text"), str) or not isinstance(row.get("title", ""), (str, type(None))):
        raise ValueError('"text" (or "contents") is missing, or it or "title" is not a string')
    if not isinstance(row.get("id"), (str, int)):
        raise ValueError('"id" is missing or neither a string nor a whole number')
    return Passage(str(row["id"]), row.get("title") or "", row["text"], url=str(row.get("url") or ""))


def _lines(path):
    """Yields (offset, line, Passage) for each line that is not blank; `offset` in bytes of the unpacked file."""
    offset = 0
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                    line, offset = line[3:], 3
                if line.strip():
                    try:
                        yield offset, line, _passage(json.loads(line.decode("utf-8", "replace")))
                    except (ValueError, RecursionError) as error:
                        raise SearchError(f"{path}:{number}: not a passage ({error}); mend or remove the line: each must be "
                                          'like {"id": "1", "title": "...", "text": "..."}') from None
                offset += len(line)
    except (OSError, EOFError, zlib.error) as error:
        raise SearchError(f"cannot read the corpus {path}: {getattr(error, 'strerror', None) or error}") from None


def read_passages(path):
    """Yields the passages of a .jsonl or .jsonl.gz file as they are (uncleaned). Raises SearchError with file:line."""
    return (passage for _, _, passage in _lines(path))


def tokenize(text: str) -> list[str]:
    """Lower-case runs of unicode word characters, no stemming, no stop words."""
    return re.findall(r"\w+", text.lower())


def _hash(token: str) -> bytes:
    """A term is known by 8 bytes of BLAKE2b: a million terms share one with a chance of 3e-8, and no text is kept."""
    return hashlib.blake2b(token.encode(), digest_size=8).digest()


def _postings(documents, k1: float, b: float) -> dict[str, np.ndarray]:
    """Token lists -> the sparse index. Term t (of V, ascending by `hashes`) is in the passages docs[starts[t]:starts[t+1]],
    ascending, and adds the same slice of `impacts` to their scores; peaks[t] is the largest of these."""
    vocabulary = defaultdict()
    vocabulary.default_factory = vocabulary.__len__  # a new term gets the next number
    terms, counts, widths, lengths = (array("I") for _ in range(4))  # the first two per posting, the others per passage
    for tokens in documents:
        count = Counter(tokens)
        terms.extend(map(vocabulary.__getitem__, count))
        counts.extend(count.values())
        widths.append(len(count))
        lengths.append(len(tokens))
    n, total = len(lengths), len(terms)
    if not n:
        raise SearchError("the corpus holds no passage")
    if total >= 2**32:
        raise SearchError(f"{total} postings are too many for this index: use opensearch+http(s)://host:9200/index")
    hashes = np.frombuffer(b"".join(map(_hash, vocabulary)), ">u8").astype(np.uint64)
    order = np.argsort(hashes)
    rank = np.empty(len(order), np.uint64)
    rank[order] = np.arange(len(order), dtype=np.uint64)
    key = rank[np.array(terms)]
    df = np.bincount(key.view(np.int64), minlength=len(order))
    starts = np.concatenate([[0], np.cumsum(df)])
    key <<= np.uint64(32)
    key |= np.arange(total, dtype=np.uint64)
    key.sort()  # by term, then by passage
    idf = np.log(1 + (n - df + 0.5) / (df + 0.5)).astype(np.float32)
    lengths, counts, owner = np.array(lengths, np.float64), np.array(counts), np.repeat(np.arange(n, dtype=np.int32), widths)
    norm = k1 * (1 - b + b * lengths / (lengths.mean() or 1.0))
    docs, impacts = np.empty(total, np.int32), np.empty(total, np.float32)
    for at in range(0, total, 1 << 20):  # in blocks, so that what is in between stays small
        block = slice(at, min(at + (1 << 20), total))
        term = np.searchsorted(starts, np.arange(block.start, block.stop), "right") - 1
        where = key[block] & np.uint64(2**32 - 1)
        docs[block], tf = owner[where], counts[where].astype(np.float64)
        impacts[block] = idf[term] * (tf / (tf + norm[docs[block]]))
    peaks = np.maximum.reduceat(impacts, starts[:-1]) if total else np.empty(0, np.float32)
    return {"hashes": hashes[order], "starts": starts, "docs": docs, "impacts": impacts, "peaks": peaks}


def _kth_best(scores: np.ndarray, k: int) -> float:
    return float(np.partition(scores, len(scores) - k)[len(scores) - k]) if len(scores) >= k else 0.0


def _impacts_of(wanted: np.ndarray, docs: np.ndarray, impacts: np.ndarray) -> np.ndarray:
    at = np.minimum(docs.searchsorted(wanted), len(docs) - 1)
    return impacts.take(at) * (docs.take(at) == wanted)


class BM25:
    """BM25 over passages, in the variant of Lucene and of Lù 2024 (BM25S, method "lucene"; Robertson's without k1 + 1):

        score(q, d) = sum over tokens t of q:  ln(1 + (N - df_t + 0.5) / (df_t + 0.5)) * tf / (tf + k1 (1 - b + b |d| / avg|d|))

    Everything but the sum is computed at indexing time. Ties are broken by position in the corpus.
    """

    def __init__(self, passages, k1: float = 1.5, b: float = 0.75, index: dict | None = None):
        self.passages = passages if index else list(passages)
        self.index = index or _postings((tokenize(f"{p.title} {p.text}") for p in self.passages), k1, b)
        self._scratch = threading.local()

    def rank(self, query: str, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions (int32) and scores (float32) of the best k passages with a score above 0.

        Exact, yet long postings are mostly left unread (MaxScore: Turtle and Flood 1995): terms are added from the highest
        peak down until the k-th best sum exceeds what all remaining terms could add. No passage unseen by then can come in.
        The others are looked up in the remaining terms, fewer each time; those left are scored in the order of the query."""
        index, starts = self.index, self.index["starts"]
        wanted = np.array([int.from_bytes(_hash(token), "big") for token in tokenize(query)], np.uint64)
        terms = np.searchsorted(index["hashes"], wanted)
        known = terms < len(index["hashes"])
        terms, wanted = terms[known], wanted[known]
        terms = terms[index["hashes"][terms] == wanted]
        if k < 1 or not len(terms):
            return np.empty(0, np.int32), np.empty(0, np.float32)
        lists = [(index["docs"][a:z], index["impacts"][a:z]) for a, z in zip(starts[terms].tolist(), starts[terms + 1].tolist())]
        peaks = index["peaks"][terms].astype(np.float64)
        slack = 1e-5 * peaks.sum()  # float32 sums depend on their order
        rest, floor, seen, order = peaks.sum() + slack, 0.0, [], np.argsort(-peaks, kind="stable").tolist()
        sums = self._scratch.__dict__.pop("sums", None)  # (N,), one per thread; given back below, when it is all 0 again
        sums = np.zeros(len(self.passages), np.float32) if sums is None else sums
        while order and floor <= rest:
            docs, impacts = lists[i := order.pop(0)]
            seen.append(docs)
            np.add.at(sums, docs, impacts)
            floor = max(floor, _kth_best(sums.take(docs), k))
            rest -= peaks[i]
        best = np.sort(np.concatenate([docs[sums.take(docs) >= floor - rest - slack] for docs in seen]))
        best = best[np.diff(best, prepend=-1) > 0]  # once each
        scores = sums.take(best)
        if sum(map(len, seen)) > len(sums) // 32:
            sums.fill(0)
        else:
            for docs in seen:
                sums[docs] = 0
        self._scratch.sums = sums
        for i in [*order, None]:
            floor = max(floor, _kth_best(scores, k))
            keep = scores >= floor - rest - slack
            best, scores = best[keep], scores[keep]
            if i is not None:
                scores += _impacts_of(best, *lists[i])
                rest -= peaks[i]
        scores = np.zeros(len(best), np.float32)
        for docs, impacts in lists:
            scores += _impacts_of(best, docs, impacts)
        top = np.argsort(-scores, kind="stable")[:k]
        return best[top], scores[top]

    def search(self, query, k: int = 3) -> Results:
        try:
            docs, scores = self.rank(clean_query(query), k)
            found = self.passages.read(docs) if isinstance(self.passages, _Stored) else [self.passages[doc] for doc in docs]
            return Results(map(_clean, found, scores.tolist()))
        except Exception as error:  # the corpus went away or changed under us
            return Results.failed(error)

    def search_many(self, queries, k: int = 3) -> list[Results]:
        return [self.search(query, k) for query in queries]


class _Stored:
    """The passages of a large corpus: not in memory, lines are read when they are asked for."""

    def __init__(self, corpus: str, starts: np.ndarray, unpacked: np.ndarray):
        self.corpus, self.starts, self.unpacked, self.stamp = corpus, starts, unpacked, _stamp(corpus)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def read(self, docs: np.ndarray) -> list[Passage]:
        lines = [slice(start, end) for start, end in zip(self.starts[docs].tolist(), self.starts[docs + 1].tolist())]
        if self.corpus.endswith(".gz"):
            lines = [self.unpacked[line].tobytes() for line in lines]
        else:  # not mapped: a corpus that is cut short while it is mapped would end the process
            with open(self.corpus, "rb", buffering=0) as file:
                if _stamp(file.fileno())[:2] != self.stamp[:2]:
                    raise SearchError(f"{self.corpus} changed while it was open: start again")
                for i, line in enumerate(lines):
                    file.seek(line.start)
                    lines[i] = file.read(line.stop - line.start)
        return [_passage(json.loads(line.decode("utf-8", "replace"))) for line in lines]


def _stamp(path) -> list[int]:
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _digest(path: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _footer(header: bytes, crc: int) -> bytes:
    return b"%08x%08xbm25igpo" % (len(header), crc)


def _build_index(corpus: str, target: str, k1: float, b: float) -> None:
    """Writes one file: [the unpacked lines, of a .gz only] [each array, at a multiple of 64 bytes] [header: JSON] [footer: 24
    bytes, with a checksum of all before it]. It appears by os.replace, so it is whole or not there."""
    stamp, packed, crc, starts = _stamp(corpus), corpus.endswith(".gz"), 0, array("q")
    for old in glob.glob(f"{glob.escape(target)}.*.tmp"):  # what a killed process left; no build takes a day
        with contextlib.suppress(OSError):
            if time.time() - os.path.getmtime(old) > 86400:
                os.remove(old)
    temporary = f"{target}.{os.getpid()}-{threading.get_ident()}.tmp"
    try:
        with open(temporary, "wb") as out, tqdm(desc=f"index of {os.path.basename(corpus)}", unit="B", unit_scale=True,
                                                total=None if packed else stamp[0]) as bar:
            def put(data) -> None:
                nonlocal crc
                crc = zlib.crc32(data, crc)
                out.write(data)

            def documents():
                end = 0
                for offset, line, passage in _lines(corpus):
                    starts.append(end if packed else offset)
                    end = starts[-1] + len(line)
                    if packed:
                        put(line)
                    bar.update(len(line))
                    yield tokenize(f"{passage.title} {passage.text}")
                starts.append(end)

            places, arrays = {}, {**_postings(documents(), k1, b), "lines": np.array(starts)}
            for name, values in arrays.items():
                put(bytes(-out.tell() % 64))
                places[name] = [out.tell(), values.dtype.str, len(values)]
                put(values.tobytes() if values.nbytes < 1 << 20 else values.view(np.uint8))
            header = {"format": INDEX_FORMAT, "k1": k1, "b": b, "stamp": stamp, "digest": _digest(corpus), "arrays": places}
            if _stamp(corpus) != stamp:
                raise SearchError(f"{corpus} changed while it was being indexed: start again when it is complete")
            put(header := json.dumps(header).encode())
            out.write(_footer(header, crc))
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def _load_index(corpus: str, target: str, k1: float, b: float) -> tuple[dict, np.ndarray]:
    """-> (arrays, the whole file as bytes), memory-mapped. ValueError tells why the file must not be used."""
    with open(target, "rb") as file:
        left, crc = os.fstat(file.fileno()).st_size - 24, 0
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            left, crc = left - len(block), zlib.crc32(block, crc)
        footer = file.read()
        size = int(footer[:8], 16) if re.fullmatch(rb"[0-9a-f]{16}bm25igpo", footer) else 0
        raw = np.memmap(file, np.uint8, "r") if size else np.empty(0, np.uint8)
    header = raw[len(raw) - 24 - size:-24].tobytes()
    if not header or footer != _footer(header, crc):
        raise ValueError("the saved index is damaged")
    header, stamp = json.loads(header), _stamp(corpus)
    if [header["format"], header["k1"], header["b"]] != [INDEX_FORMAT, k1, b]:
        raise ValueError("the saved index was made with other settings")
    if header["stamp"] != stamp and (header["stamp"][0] != stamp[0] or header["digest"] != _digest(corpus)):
        raise ValueError("the corpus has changed")
    return {name: np.asarray(raw[at:at + count * np.dtype(kind).itemsize]).view(kind)
            for name, (at, kind, count) in header["arrays"].items()}, raw


def open_bm25(corpus: str, k1: float = 1.5, b: float = 0.75, save_from: int = SAVE_FROM) -> BM25:
    """BM25 over a jsonl file of at least `save_from` bytes: from the index saved beside it, or under ~/.cache if that folder
    cannot be written. A smaller corpus, or if neither can be written, is indexed in memory."""
    try:
        targets = [f"{corpus}.bm25", os.path.join(CACHE, hashlib.sha1(os.path.abspath(corpus).encode()).hexdigest()[:16] + ".bm25")]
        targets = targets if os.path.getsize(corpus) >= save_from else []
    except OSError as error:
        raise SearchError(f"cannot read the corpus {corpus}: {error.strerror}") from None
    for target in targets:
        try:
            try:
                index, raw = _load_index(corpus, target, k1, b)
            except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
                if not isinstance(error, FileNotFoundError):
                    say(f"{error}: building {target} again")
                os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
                _build_index(corpus, target, k1, b)
                index, raw = _load_index(corpus, target, k1, b)
            return BM25(_Stored(corpus, index.pop("lines"), raw), k1, b, index)
        except (OSError, ValueError) as error:
            say(f"the index cannot be kept as {target} ({getattr(error, 'strerror', None) or error})")
    if targets:
        say("the index is kept in memory: it will be built again at the next start")
    return BM25(read_passages(corpus), k1, b)


class _Later(Exception):
    """A try that may go better later. `refused`: the server asks for patience (else: a fault); `after`: seconds it asks for."""

    def __init__(self, reason: str, refused: bool = False, after: float = 0.0):
        super().__init__(reason)
        self.refused, self.after = refused, after


def _retry_after(value: str | None) -> float:
    """Seconds that a Retry-After header asks for (a number or a date), at most an hour; 0 if it cannot be read."""
    try:
        number = re.fullmatch(r"\s*\d{1,9}\s*", value or "")
        seconds = float(value) if number else email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        return min(max(seconds, 0.0), 3600.0)
    except (TypeError, ValueError, OverflowError):
        return 0.0


class _Remote:
    """What the network back ends share; each says in `ask` how a batch of queries is asked, in `_read` what comes back.

    All threads share one cool-down. After a refusal nobody asks until it is over, then one request at a time goes out until
    one succeeds; `tries` refusals in a row shut the door, and queries fail at once while it is shut. So a refusal costs a few
    requests, however many threads wait. A fault (5xx, time-out, cut connection) is tried again by the thread that met it."""

    name, batch, refusals = "the server", 256, {429}
    timeout = (5.0, 30.0)  # seconds: to connect, and between two pieces of an answer (an answer may take twice the sum)
    max_bytes = 8_000_000  # of an answer, unpacked
    tries = 4
    pause, longest = 1.0, 60.0  # seconds: the first back-off (doubled each time, with jitter), and the longest wait
    shut = 60.0  # seconds that the door stays shut
    gap = 0.0  # seconds at least between two requests
    threads = 4  # requests under way at once

    def __init__(self, url: str, **options):
        for name, value in options.items():
            if name not in ("timeout", "max_bytes", "tries", "pause", "longest", "shut", "gap", "threads"):
                raise SearchError(f"{self.name} has no option {name!r}")
            setattr(self, name, value)
        self.url, self.secret, self.stats, self.session = url, {}, Counter(), requests.Session()
        self.session.auth = lambda request: request  # or requests would add what ~/.netrc holds for any host it meets
        self._gate, self._next, self._strikes, self._last = threading.Condition(), 0.0, 0, 0.0

    def _wait(self, strikes: int) -> float:
        return min(self.pause * 2.0 ** min(strikes - 1, 30), self.longest) * random.uniform(0.5, 1.0)

    def _turn(self) -> float:
        """Waits for this thread's turn to ask; the time at which it begins."""
        with self._gate:
            while (wait := self._next - time.monotonic()) > 0:
                if self._strikes >= self.tries:
                    raise SearchError(f"{self.name} refuses for now; it will be asked again in {wait:.0f} s")
                self._gate.wait(wait)
            began = time.monotonic()
            self._next = began + max(self.gap, self._wait(self._strikes) if self._strikes else 0.0)
            self.stats["requests"] += 1
            return began

    def _told(self, began: float, refusal: _Later | None = None) -> None:
        """Notes how the request that began at `began` went. Of refusals that were under way together one counts."""
        with self._gate:
            now, news = time.monotonic(), began >= self._last
            if refusal:
                self.stats["refused"] += 1
                self._strikes, self._last = self._strikes + news, now if news else self._last
                if refusal.after > self.longest:
                    self._strikes = max(self._strikes, self.tries)
                wait = self.shut if self._strikes >= self.tries else self._wait(self._strikes)
                self._next = max(self._next, now + max(wait, refusal.after))
            elif self._strikes and news:
                self._strikes, self._next = 0, now + self.gap
            self._gate.notify_all()

    def _once(self, method: str, url: str, headers: dict, **body) -> bytes:
        """One exchange, with at most 3 redirects, all to http(s); credentials go to no other origin."""
        home, deadline = urlsplit(url)[:2], time.monotonic() + 2 * sum(self.timeout)
        headers = {"User-Agent": "Mozilla/5.0 (compatible; igpo-search/1.0)", **headers}
        for _ in range(4):
            with self.session.request(method, url, headers={**headers, **(self.secret if urlsplit(url)[:2] == home else {})},
                                      timeout=self.timeout, allow_redirects=False, stream=True, **body) as reply:
                status, place = reply.status_code, reply.headers.get("Location")
                if status in (301, 302, 303, 307, 308) and place:
                    url = urljoin(url, place)
                    if urlsplit(url).scheme not in ("http", "https"):
                        raise SearchError(f"{self.name} redirects to something that is not http(s)")
                    continue
                after = _retry_after(reply.headers.get("Retry-After"))
                if status in self.refusals or status == 503 and after:
                    raise _Later(f"{self.name} refuses for now (HTTP {status})", True, after)
                if status >= 500:
                    raise _Later(f"{self.name} has a fault (HTTP {status})", False, after)
                if status != 200:
                    raise SearchError(f"{self.name} answers HTTP {status}")
                read, data = getattr(reply.raw, "read1", reply.raw.read), bytearray()  # read1: each piece as it comes
                while piece := read(65536, decode_content=True):
                    data += piece
                    if len(data) > self.max_bytes:
                        raise SearchError(f"{self.name} sends more than {self.max_bytes} bytes")
                    if time.monotonic() > deadline:
                        raise _Later(f"{self.name} sends too slowly")
                return bytes(data)
        raise SearchError(f"{self.name} redirects more than 3 times")

    def request(self, parse, method: str, url: str, headers: dict | None = None, **body):
        """-> parse(bytes of the answer), tried again while it may help. Raises SearchError."""
        for attempt in range(1, self.tries + 1):
            began = self._turn()
            try:
                result = parse(self._once(method, url, headers or {}, **body))
                self._told(began)
                return result
            except SearchError:
                self._told(began)  # an answer, if a bad one
                raise
            except _Later as error:
                fault = error
            except requests.exceptions.SSLError:
                raise SearchError(f"{self.name} has no TLS certificate that can be verified") from None
            except Exception as error:  # whatever the HTTP library throws; its text may hold the address, so it is not shown
                fault = _Later(f"{self.name} cannot be reached ({type(error).__name__})")
            if fault.refused:
                self._told(began, fault)
            elif attempt < self.tries:
                time.sleep(min(max(self._wait(attempt), fault.after), self.longest))
        raise SearchError(f"{fault}, {self.tries} times")

    def _failed(self, error: Exception) -> Results:
        known = isinstance(error, SearchError)
        return Results.failed(error if known else f"{self.name} sends what cannot be understood ({type(error).__name__})")

    def _each(self, rows: list, k: int) -> list[Results]:
        """One `Results` per row of an answer to several queries. A row that cannot be understood fails alone."""
        found = []
        for row in rows:
            try:
                found.append(Results(self._read(row, k)))
            except Exception as error:
                found.append(self._failed(error))
        return found

    def _part(self, queries: list[str], k: int) -> list[Results]:
        try:
            found = self.ask(queries, k)
            if len(found) != len(queries):
                raise SearchError(f"{self.name} answers {len(found)} of {len(queries)} queries")
            return found
        except Exception as error:
            return [self._failed(error) for _ in queries]

    def search_many(self, queries, k: int = 3) -> list[Results]:
        parts = [queries[i:i + self.batch] for i in range(0, len(queries), self.batch)]
        if len(parts) == 1:
            return self._part(queries, k)
        with ThreadPoolExecutor(self.threads) as pool:
            return [results for found in pool.map(self._part, parts, [k] * len(parts)) for results in found]


def _json(body: bytes):
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise SearchError("the server's answer is not JSON") from None


class RetrievalServer(_Remote):
    """Search-R1's protocol: {"queries", "topk", "return_scores"} -> {"result": [[{"document", "score"}, ...], ...]}."""

    name = "the retrieval server"

    def ask(self, queries: list[str], k: int) -> list[Results]:
        answer = self.request(_json, "POST", self.url, json={"queries": queries, "topk": k, "return_scores": True})
        return self._each(answer["result"], k)

    def _read(self, row: list, k: int) -> list[Passage]:
        return [_clean(_passage({"id": "", **hit.get("document", hit)}), hit.get("score") or 0.0) for hit in row[:k]]


class OpenSearch(_Remote):
    """`_msearch` of Elasticsearch and OpenSearch. Credentials come from the environment: OPENSEARCH_API_KEY, or
    OPENSEARCH_USER and OPENSEARCH_PASSWORD."""

    name = "the search engine"

    def __init__(self, url: str, **options):
        super().__init__(url, **options)
        key, user, password = (os.environ.get(f"OPENSEARCH_{name}", "").strip() for name in ("API_KEY", "USER", "PASSWORD"))
        if key or user:
            basic = base64.b64encode(f"{user}:{password}".encode()).decode()
            self.secret = {"Authorization": f"ApiKey {key}" if key else f"Basic {basic}"}

    def ask(self, queries: list[str], k: int) -> list[Results]:
        lines = []
        for query in queries:
            matches = [{"match": {"title": query}}, {"match": {"text": query}}]
            lines += [{}, {"size": k, "_source": ["title", "text", "contents", "url"], "query": {"bool": {"should": matches}}}]
        answer = self.request(_json, "POST", f"{self.url.rstrip('/')}/_msearch", {"Content-Type": "application/x-ndjson"},
                              data="".join(json.dumps(line) + "\n" for line in lines).encode())
        return self._each(answer["responses"], k)

    def _read(self, row: dict, k: int) -> list[Passage]:
        if "error" in row:
            raise SearchError(f"{self.name} answers {row['error']['type'] if isinstance(row['error'], dict) else row['error']}")
        return [_clean(_passage({**hit["_source"], "id": hit["_id"]}), hit["_score"] or 0.0) for hit in row["hits"]["hits"][:k]]


class _Page(HTMLParser):
    """The result page of DuckDuckGo's HTML endpoint -> rows of [address, title, snippet]."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.rows, self.field, self.tag, self.challenge, self.nothing = [], 0, "", False, False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        classes = (attributes.get("class") or "").split()
        if "result__a" in classes:
            self.rows.append([attributes.get("href") or "", "", ""])
        for field, name in ((1, "result__a"), (2, "result__snippet")):
            if name in classes and self.rows:
                self.field, self.tag = field, tag
        self.challenge |= attributes.get("id") == "challenge-form" or any(name.startswith("anomaly") for name in classes)
        self.nothing |= any("no-result" in name for name in classes)

    def handle_endtag(self, tag):
        if tag == self.tag:
            self.field, self.tag = 0, ""

    def handle_data(self, data):
        if self.field:
            self.rows[-1][self.field] += data


class DuckDuckGo(_Remote):
    """The HTML endpoint, which is meant for people: it refuses programs after a handful of queries."""

    name, batch, gap, refusals = "DuckDuckGo", 1, 1.0, {202, 403, 429}

    def ask(self, queries: list[str], k: int) -> list[Results]:
        return [self.request(lambda body: self._read(body, k), "GET", self.url, params={"q": query}) for query in queries]

    def _read(self, body: bytes, k: int) -> Results:
        page, found = _Page(body.decode("utf-8", "replace")), Results()
        if page.challenge or not page.rows and not page.nothing:
            raise _Later("DuckDuckGo sends a challenge, or a page that cannot be understood, in place of results", True)
        for address, title, snippet in page.rows:
            url = urljoin(self.url, address)
            if "/l/" in urlsplit(url).path and "uddg" in (query := parse_qs(urlsplit(url).query)):
                url = query["uddg"][0]  # their redirect: where it leads to
            parts = urlsplit(url)
            if parts.scheme in ("http", "https") and not (parts.hostname or "duckduckgo.com").endswith("duckduckgo.com"):
                found.append(_clean(Passage(url, title, snippet, url=url), 1 / (len(found) + 1)))  # else: an advertisement
        return Results(found[:k])


class _Cache:
    """Answers on disk, in sqlite: a transaction each way and no connection held, so threads, forks and processes share it.
    What goes wrong is said once, and the search goes on without."""

    def __init__(self, path: str, max_age: float):
        self.path, self.max_age, self.silent = path, max_age, False

    def _run(self, work, again: bool = True):
        try:
            os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
            with contextlib.closing(sqlite3.connect(self.path, timeout=60, isolation_level=None)) as db:
                db.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, at REAL NOT NULL, passages TEXT NOT NULL)")
                return work(db)
        except (sqlite3.Error, OSError) as error:
            if again and type(error) is sqlite3.DatabaseError:  # not a database, or a torn one
                say(f"the cache {self.path} is damaged: kept as {self.path}.damaged, a new one is started")
                with contextlib.suppress(OSError):
                    os.replace(self.path, f"{self.path}.damaged")
                return self._run(work, False)
            if not self.silent:
                say(f"the cache {self.path} cannot be used ({error}): going on without it")
            self.silent = True

    def get(self, keys: list[str]) -> dict[str, Results]:
        since, found = time.time() - self.max_age, {}
        rows = self._run(lambda db: [db.execute("SELECT key, passages FROM answers WHERE key = ? AND at > ?", (key, since)).fetchone()
                                     for key in keys])
        for key, passages in filter(None, rows or ()):
            with contextlib.suppress(ValueError, TypeError):
                found[key] = Results(Passage(*fields) for fields in json.loads(passages))
        return found

    def put(self, answers: dict[str, Results]) -> None:
        rows = [(key, time.time(), json.dumps([astuple(passage) for passage in found])) for key, found in answers.items()]

        def work(db):
            db.execute("BEGIN IMMEDIATE")
            db.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", rows)
            db.execute("COMMIT")

        self._run(work)


class Search:
    """A back end with its caches. `search` and `search_many` never raise for a query. `stats` counts, since the start:
    queries, empty, remembered (LRU), cached (disk), failed, seconds, and for the network requests and refused."""

    def __init__(self, engine, name: str = "", cache: _Cache | None = None, only: bool = False, remember: int = 4096):
        self.engine, self.name, self.cache, self.only, self.remember = engine, name, cache, only, remember
        self.stats, self._recent, self._lock = getattr(engine, "stats", Counter()), OrderedDict(), threading.Lock()

    def search(self, query, k: int = 3) -> Results:
        return self.search_many([query], k)[0]

    def search_many(self, queries, k: int = 3) -> list[Results]:
        """One `Results` per query, of at most k passages. Queries that are alike are asked once."""
        began, queries = time.monotonic(), [clean_query(query) for query in queries]
        keys = {query: f"{self.name}\n{k}\n{query}" for query in queries if query and k > 0}
        counts, answers = Counter(queries=len(queries), empty=len(queries) - sum(query in keys for query in queries)), {}
        with self._lock:
            for query, key in keys.items():
                if key in self._recent:
                    self._recent.move_to_end(key)
                    answers[query] = self._recent[key]
        counts["remembered"] = len(answers)
        if self.cache and len(answers) < len(keys):
            stored = self.cache.get([key for query, key in keys.items() if query not in answers])
            answers.update((query, stored[key]) for query, key in keys.items() if key in stored)
            counts["cached"] = len(stored)
        new = [query for query in keys if query not in answers]
        if new:
            found = [Results.failed("not in the cache") for _ in new] if self.only else self.engine.search_many(new, k)
            answers.update(zip(new, found))
        good = {keys[query]: found for query, found in answers.items() if found.error is None}
        if self.cache and (fresh := {keys[query]: good[keys[query]] for query in new if keys[query] in good}):
            self.cache.put(fresh)
        with self._lock:
            self._recent.update(good)
            while len(self._recent) > self.remember:
                self._recent.popitem(last=False)
            counts.update(failed=sum(query in answers and answers[query].error is not None for query in queries))
            self.stats.update(counts, seconds=time.monotonic() - began)
        return [self._copy(answers.get(query, Results())) for query in queries]

    @staticmethod
    def _copy(found: Results) -> Results:
        copy = Results(replace(passage) for passage in found)
        copy.error = found.error
        return copy


def open_search(spec: str, cache: str = "on", cache_path: str | None = None, max_age_days: float = 30.0, **options) -> Search:
    """The one way to get a search. `spec` is one of the forms in the opening docstring.

    cache: "on", "off", or "only" (answer from the disk cache alone, whatever its age: a run repeated offline). It concerns
    the network back ends; BM25 needs none. options: k1, b, save_from for bm25; those of `_Remote` for the network.
    """
    kind, _, rest = str(spec).partition(":")
    if cache not in ("on", "off", "only"):
        raise SearchError(f"unknown cache mode {cache!r}: use on, off or only")
    if kind == "bm25" and rest:
        return Search(open_bm25(rest, **options))
    if spec == "duckduckgo":
        engine = DuckDuckGo(options.pop("url", "https://html.duckduckgo.com/html/"), **options)
    elif re.fullmatch(r"(opensearch\+)?https?", kind):
        url, index_needed = spec.removeprefix("opensearch+"), kind.startswith("opensearch")
        try:
            parts = urlsplit(url)
            good = parts.hostname and (parts.port or 1) and (parts.path.strip("/") or not index_needed)
        except ValueError:
            good = False
        if "@" in url.split("//", 1)[-1].split("/", 1)[0]:
            raise SearchError("the address holds a user name or password, which would end up in logs: "
                              "take it out, and set OPENSEARCH_USER and OPENSEARCH_PASSWORD")
        if not good:
            raise SearchError(f"{spec!r} is no complete address: use {FORMS}")
        engine = (OpenSearch if index_needed else RetrievalServer)(url, **options)
    else:
        raise SearchError(f"unknown search {spec!r}: use {FORMS}")
    path = cache_path or os.path.join(CACHE, "search.sqlite3")
    if cache == "only" and not os.path.exists(path):
        raise SearchError(f"there is no cache at {path} to answer from: run once with the cache on")
    store = None if cache == "off" else _Cache(path, math.inf if cache == "only" else max_age_days * 86400)
    return Search(engine, spec, store, cache == "only")


def main() -> int:
    """Exit status: 0 found, 1 nothing found, 2 error."""
    parser = argparse.ArgumentParser(description="Try a search back end before training on it.")
    parser.add_argument("query")
    parser.add_argument("--search", required=True, help=FORMS)
    parser.add_argument("-k", type=int, default=3, help="passages to show")
    parser.add_argument("--search_cache", choices=("on", "off", "only"), default="on", help="disk cache of the network back ends")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    try:
        results = open_search(args.search, cache=args.search_cache).search(args.query, args.k)
    except SearchError as error:
        results = Results()
        results.error = str(error)
    if args.json:
        print(json.dumps({"query": clean_query(args.query), "error": results.error, "passages": [asdict(p) for p in results]}))
    for rank, passage in enumerate(() if args.json else results, 1):
        print(f"{rank}. {passage.title}  [{clean_text(passage.id, 200)}]  {passage.score:.3f}\n   {passage.text}")
    if results.error or not results:
        print(f"error: {results.error}" if results.error else "nothing found", file=sys.stderr)
    return 2 if results.error else 0 if results else 1


if __name__ == "__main__":
    sys.exit(main())
