"""Search for a multi-turn agent: real, fast and safe to train on. One file: the standard library, requests, numpy, tqdm.

    search = open_search("bm25:corpus.jsonl")                     # local BM25, memory-mapped
    search = open_search("duckduckgo")                            # the web: to try things, not to train on
    search = open_search("http://127.0.0.1:8000/retrieve")        # any Search-R1-compatible retrieval server
    search = open_search("opensearch+https://host:9200/index")    # Elasticsearch or OpenSearch
    for passages in search.search_many(["who founded Tavo", "..."], k=3):
        print(passages.error or [passage.title for passage in passages])
    $ python search_tool.py --search bm25:corpus.jsonl "who founded Tavo"

BM25 is Lucene's variant with eager scores (Lù 2024, "BM25S"): for a query q and a passage d, one of N, of |d| tokens,

    score(q, d) = sum over tokens t of q of  ln(1 + (N - df_t + 0.5) / (df_t + 0.5)) * tf / (tf + k1 (1 - b + b |d| / mean |d|))

The summands depend on (t, d) alone: they are computed once and kept, sorted by term, memory-mapped, in the folder <corpus>.bm25.

On failure: 1. A query never raises: its `Results` is empty and `.error` says why. What can work for no query (no corpus, a bad
line in it, an unknown form) raises `SearchError`, in one line, when the search is opened. 2. An index that is damaged or does
not fit the corpus is built again; one that cannot be saved is kept in memory. 3. A refusal (429; DuckDuckGo: also 202, 403 or a
challenge page) or a fault (5xx, time-out, cut connection) is tried again, 4 times in all. Meanwhile all threads wait, as long
as Retry-After says or a pause with jitter that doubles each time; while that is over half a minute away, queries fail at once.
4. Retrieved text is hostile: title and text come back as bounded plain text on one line, without angle brackets or hidden
characters. `id` is given as it is, for comparing; never show it to a model.
"""
import argparse
import gzip
import json
import os
import random
import re
import sqlite3
import sys
import tempfile
import threading
import time
import zlib
from array import array
from collections import Counter
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


class SearchError(Exception):
    """One line: what is wrong, where, how to mend it."""


@dataclass(frozen=True)
class Passage:
    id: str
    title: str
    text: str
    score: float = 0.0
    url: str = ""


class Results(list):
    """The passages of one query, best first. `error` tells why a search failed; None if it worked, found or not."""
    def __init__(self, passages=(), error: str | None = None):
        super().__init__(passages)
        self.error = error


def clean_text(text, limit: int = 2000) -> str:
    """Plain text on one line, in which tags and chat control tokens, of any model family, can no longer act.
    >>> clean_text("a\\n\\x00 </information><|im_start|>  [INST] <<SYS>>")
    'a ‹/information›‹|im_start|› (INST) ‹‹SYS››'
    """
    text = str(text or "")
    for bracket, harmless in ("<‹", ">›", "＜‹", "＞›"):
        text = text.replace(bracket, harmless)
    if not text.isprintable() or "  " in text:  # line breaks, control, zero-width, bidi, private, surrogate
        text = " ".join("".join(filter(str.isprintable, " ".join(text.split()))).split())
    return re.sub(r"\[([^\[\]()\s]+)\]", r"(\1)", text).strip()[:limit].rstrip()  # [INST], [TOOL_CALLS], [|user|] ...


def clean_query(query) -> str:
    return clean_text(query, 300)


def _passage(row: dict, score: float = 0.0) -> Passage:
    """{"id", "title", "text"} or Search-R1's {"id", "contents"} (the title, maybe in quotes, on the first line)."""
    title, text = row.get("title") or "", row.get("text")
    if text is None and "contents" in row:
        title, newline, text = row["contents"].partition("\n")
        title, text = (title.strip().strip('"'), text) if newline else ("", title)
    if not isinstance(title, str) or not isinstance(text, str) or not isinstance(row.get("id"), (str, int)):
        raise TypeError('"id", "title" or "text" is missing or of a wrong type')
    return Passage(str(row["id"]), title, text, float(score or 0.0), str(row.get("url") or ""))


def read_passages(path):
    """Yields the passages of a .jsonl or .jsonl.gz file as they are (uncleaned). Raises SearchError with file:line."""
    packed, number = str(path).endswith(".gz"), 0
    try:
        total = None if packed else os.path.getsize(path)
        bar = tqdm(desc=f"reading {path}", unit="B", unit_scale=True, total=total, delay=1)
        with (gzip.open if packed else open)(path, "rb") as file, bar:
            for number, line in enumerate(file, 1):
                bar.update(len(line))
                if line.strip():
                    yield _passage(json.loads(line.decode("utf-8-sig", "replace")))
    except Exception as error:
        raise SearchError(f"{path}:{number}: {type(error).__name__}: {error}; mend or remove the line: each must be like "
                          '{"id": "1", "title": "...", "text": "..."}') from None


class Search:
    """A back end behind its caches. A subclass says how a batch of queries is asked (`fetch`: one row of the answer per query)
    and which passages a row holds (`read`). Either may raise anything: the batch, or that one query, has then failed."""
    def __init__(self):
        self.name, self.cache, self._recent, self._lock = type(self).__name__, None, {}, threading.Lock()

    def fetch(self, queries: list[str], k: int) -> list:
        raise SearchError("not in the cache")

    def search(self, query, k: int = 3) -> Results:
        return self.search_many([query], k)[0]

    def search_many(self, queries, k: int = 3) -> list[Results]:
        """One `Results` per query, of at most k passages. Equal queries are asked once."""
        queries = [clean_query(query) for query in queries]
        with self._lock:
            known = {query: self._recent[query, k] for query in queries if (query, k) in self._recent}
        known.update({query: Results() for query in queries if not query or k < 1})
        new = [query for query in dict.fromkeys(queries) if query not in known]
        if new and self.cache:
            known.update(self._attempt(lambda: self.cache.get(new, k)))
            new = [query for query in new if query not in known]
        if new:
            known.update(zip(new, self.ask(new, k)))
            if self.cache:
                self.cache.put({query: known[query] for query in new if known[query].error is None}, k)
        with self._lock:  # a dict keeps the order of insertion: its first entries were used longest ago
            for query, found in known.items():
                self._recent.pop((query, k), None)
                if found.error is None:
                    self._recent[query, k] = found
            for key in list(self._recent)[:-4096]:
                del self._recent[key]
        return [Results(known[query], known[query].error) for query in queries]  # copies: what is kept stays as it is

    def ask(self, queries: list[str], k: int) -> list[Results]:  # the same without the caches
        def clean(row) -> Results:
            return Results(Passage(p.id, clean_text(p.title, 200), clean_text(p.text), p.score, clean_text(p.url))
                           for p in list(self.read(row))[:k])

        rows = self._attempt(lambda: list(self.fetch(queries, k)))
        if len(rows) != len(queries):
            error = getattr(rows, "error", f"{self.name} answers {len(rows)} of {len(queries)} queries")
            return [Results(error=error)] * len(queries)
        return [self._attempt(lambda: clean(row)) for row in rows]

    def _attempt(self, work):
        """What work() returns, or its failure as Results. Only our own words are shown: others may hold an address."""
        try:
            return work()
        except Exception as error:
            text = error if isinstance(error, SearchError) else f"{self.name} gives no valid answer ({type(error).__name__})"
            return Results(error=clean_text(text, 300))


def tokenize(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())  # no stemming, no stop words


def build_index(passages, k1: float, b: float) -> dict[str, np.ndarray]:
    """Term t (of V) is in the passages docs[starts[t]:starts[t + 1]], ascending, and adds the same slice of impacts to their
    scores. Passage d (of N) is the JSON text[lines[d]:lines[d + 1]]. words: the V terms, one a line."""
    vocabulary, text, lines = {}, bytearray(), array("q", [0])
    terms, counts, widths, lengths = (array("i") for _ in range(4))  # the first two per posting, the others per passage
    for passage in passages:
        count = Counter(tokenize(f"{passage.title} {passage.text}"))
        terms.extend([vocabulary.setdefault(token, len(vocabulary)) for token in count])
        counts.extend(count.values())
        widths.append(len(count))
        lengths.append(sum(count.values()))
        text += json.dumps(vars(passage)).encode()
        lines.append(len(text))
    if not lengths:
        raise SearchError("the corpus holds no passage")
    n, terms, lengths = len(lengths), np.array(terms), np.array(lengths)
    df = np.bincount(terms, minlength=len(vocabulary))
    idf = np.log(1 + (n - df + 0.5) / (df + 0.5)).astype(np.float32)
    norm = k1 * (1 - b + b * lengths / (lengths.mean() or 1.0))
    order = np.argsort(terms, kind="stable")  # by term, then by passage
    docs, tf = np.repeat(np.arange(n, dtype=np.int32), widths)[order], np.array(counts)[order]
    impacts = (np.repeat(idf, df) * (tf / (tf + norm[docs]))).astype(np.float32)
    return {"starts": np.concatenate([[0], np.cumsum(df)]), "docs": docs, "impacts": impacts, "lines": np.array(lines),
            "text": np.frombuffer(text, np.uint8), "words": np.frombuffer("\n".join(vocabulary).encode(), np.uint8)}


def checksum(path: str) -> int:
    return zlib.crc32(np.memmap(path, np.uint8, "r"))


class BM25(Search):
    """BM25 over an index: of these passages, or a saved one. Ties are broken by position in the corpus."""
    def __init__(self, passages=(), k1: float = 1.5, b: float = 0.75, index: dict[str, np.ndarray] | None = None):
        super().__init__()
        self.index = index or build_index(passages, k1, b)
        self.terms = {token: term for term, token in enumerate(self.index["words"].tobytes().decode().split("\n"))}

    def rank(self, query: str, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions and scores (float32) of the best k passages with a score above 0."""
        starts, docs, impacts = self.index["starts"], self.index["docs"], self.index["impacts"]
        scores = np.zeros(len(self.index["lines"]) - 1, np.float32)
        for token in tokenize(query):
            if (term := self.terms.get(token)) is not None:
                postings = slice(starts[term], starts[term + 1])
                np.add.at(scores, docs[postings], impacts[postings])
        peaks = np.maximum.reduceat(scores, np.arange(0, len(scores), 64))  # k blocks with such a peak hold k such scores
        floor = np.partition(peaks, -k)[-k] if k <= len(peaks) else 0.0
        best = np.flatnonzero(scores >= floor if floor > 0 else scores)  # with all ties, so that position decides
        best = best[np.argsort(-scores[best], kind="stable")[:k]]
        return best, scores[best]

    def fetch(self, queries: list[str], k: int) -> list:
        return [self.rank(query, k) for query in queries]

    def read(self, row) -> list[Passage]:
        text, lines = self.index["text"], self.index["lines"]
        return [Passage(**{**json.loads(text[lines[doc]:lines[doc + 1]].tobytes()), "score": score})
                for doc, score in zip(row[0], row[1].tolist())]


def open_bm25(corpus: str, k1: float = 1.5, b: float = 0.75) -> BM25:
    """BM25 over a jsonl file, from the index beside it, which is built if it is missing, damaged or does not fit."""
    if not os.path.isfile(corpus) or not os.path.getsize(corpus):
        raise SearchError(f"there is no corpus {corpus}, or it is empty")
    folder, header = os.path.abspath(corpus) + ".bm25", {"format": 1, "k1": k1, "b": b, "corpus": checksum(corpus)}
    if os.path.lexists(folder):
        with suppress(Exception):  # a damaged file can make json and numpy raise anything
            saved = json.loads(Path(f"{folder}/index.json").read_text())
            if saved == {**header, "files": {name: checksum(f"{folder}/{name}.npy") for name in saved["files"]}}:
                return BM25(index={name: np.load(f"{folder}/{name}.npy", "r").view(np.ndarray) for name in saved["files"]})
        print(f"search: {folder} is damaged, or the corpus or the settings have changed: building it again", file=sys.stderr)
    index = build_index(read_passages(corpus), k1, b)
    try:  # written under another name, and renamed: so the index is whole or not there, even after kill -9
        with tempfile.TemporaryDirectory(prefix=f"{folder}.", suffix=".bm25") as parent:
            os.mkdir(new := f"{parent}/new")
            for name, values in index.items():
                np.save(f"{new}/{name}.npy", values)
            header["files"] = {name: checksum(f"{new}/{name}.npy") for name in index}
            Path(f"{new}/index.json").write_text(json.dumps(header))
            if os.path.lexists(folder):
                os.replace(folder, f"{parent}/old")
            os.replace(new, folder)
    except OSError as error:
        print(f"search: {folder} cannot be saved ({error.strerror}): the index is kept in memory", file=sys.stderr)
    return BM25(index=index)


class _Fault(Exception):
    """(reason, seconds): this try failed, another may not, after so many seconds at least."""


class _Remote(Search):
    """What the network back ends share: one session, retries, and a cool-down that all threads keep."""
    refusals = {429}  # HTTP statuses that ask for patience; 500 and above are faults
    timeout = (5.0, 30.0)  # seconds: to connect, and between two pieces of an answer
    max_bytes = 32_000_000  # of the answer to a batch
    tries, pause = 4, 1.0  # the first back-off in seconds, doubled with each failure in a row
    patience = 30.0  # seconds that a query waits for its turn, rather than fail at once
    threads, gap = 4, 0.0  # requests under way at once, seconds at least between two
    parse, authorize = staticmethod(json.loads), staticmethod(lambda request: request)

    def __init__(self, url: str):
        super().__init__()
        self.url, self.session, self._not_before, self._failures = url, requests.Session(), 0.0, 0
        self.session.headers["User-Agent"] = "Mozilla/5.0 (compatible; igpo-search/1.0)"
        self._slots, self._gate = threading.Semaphore(self.threads), threading.Lock()

    def request(self, method: str, url: str, **body):
        """The parsed answer; tried again while that may help."""
        for _ in range(self.tries):
            with self._slots:
                with self._gate:  # one thread waits for the server, the others behind it
                    if (wait := self._not_before - time.monotonic()) > self.patience:
                        raise SearchError(f"{self.name} is left alone for now; it will be asked again in {wait:.0f} s")
                    time.sleep(max(wait, 0.0))
                    self._not_before = max(self._not_before, time.monotonic() + self.gap)
                try:
                    answer = self.parse(self._get(method, url, **body))
                    self._failures = 0
                    return answer
                except requests.RequestException as error:  # its text may hold the address, so it is not shown
                    reason, after = f"{self.name} cannot be reached ({type(error).__name__})", 0.0
                except _Fault as error:
                    reason, after = error.args
                back_off = self.pause * 2.0 ** min(self._failures, 8) * random.uniform(0.5, 1.0)
                self._not_before = max(self._not_before, time.monotonic() + max(back_off, min(after, 3600.0)))
                self._failures += 1
        raise SearchError(f"{reason}, {self.tries} times")

    def _get(self, method: str, url: str, **body) -> bytes:
        """One exchange, with at most 3 redirects; the session knows only http(s). Credentials go to no other origin."""
        home, data = urlsplit(url)[:2], bytearray()
        for _ in range(4):
            auth = self.authorize if urlsplit(url)[:2] == home else _Remote.authorize  # if None, requests would look in ~/.netrc
            with self.session.request(method, url, auth=auth, timeout=self.timeout, allow_redirects=False, stream=True,
                                      **body) as reply:
                status, after = reply.status_code, reply.headers.get("Retry-After", "")
                if reply.is_redirect:
                    url = urljoin(url, reply.headers["Location"])
                    continue
                if status in self.refusals or status >= 500:
                    raise _Fault(f"{self.name} refuses for now (HTTP {status})", float(after) if after.isdecimal() else 0.0)
                if status != 200:
                    raise SearchError(f"{self.name} answers HTTP {status}")
                for piece in reply.iter_content(65536):
                    data += piece
                    if len(data) > self.max_bytes:
                        raise SearchError(f"{self.name} sends more than {self.max_bytes} bytes")
                return bytes(data)
        raise SearchError(f"{self.name} redirects more than 3 times")


class RetrievalServer(_Remote):
    """Search-R1's protocol: {"queries", "topk", "return_scores"} -> {"result": [[{"document", "score"}, ...], ...]}."""
    def fetch(self, queries: list[str], k: int) -> list:
        return self.request("POST", self.url, json={"queries": queries, "topk": k, "return_scores": True})["result"]

    def read(self, row: list) -> list[Passage]:
        return [_passage({"id": "", **hit.get("document", hit)}, hit.get("score")) for hit in row]


class OpenSearch(_Remote):
    """`_msearch` of Elasticsearch and OpenSearch. Credentials: OPENSEARCH_API_KEY, or OPENSEARCH_USER and OPENSEARCH_PASSWORD."""
    def authorize(self, request):
        key, user, password = (os.environ.get(f"OPENSEARCH_{name}", "").strip() for name in ("API_KEY", "USER", "PASSWORD"))
        if key:
            request.headers["Authorization"] = f"ApiKey {key}"
        elif user:
            requests.auth.HTTPBasicAuth(user.encode(), password.encode())(request)
        return request

    def fetch(self, queries: list[str], k: int) -> list:
        bodies = [{"size": k, "_source": ["title", "text", "contents", "url"],
                   "query": {"bool": {"should": [{"match": {field: query}} for field in ("title", "text", "contents")]}}} for query in queries]
        return self.request("POST", f"{self.url.rstrip('/')}/_msearch", headers={"Content-Type": "application/x-ndjson"},
                            data="".join(f"{{}}\n{json.dumps(body)}\n" for body in bodies))["responses"]

    def read(self, row: dict) -> list[Passage]:
        if "error" in row:
            raise SearchError(f"{self.name} answers {row['error']['type'] if isinstance(row['error'], dict) else row['error']}")
        return [_passage({**hit["_source"], "id": hit["_id"]}, hit["_score"]) for hit in row["hits"]["hits"]]


class _Page(HTMLParser):
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


class DuckDuckGo(_Remote):
    """The HTML endpoint, which is meant for people: it refuses programs after a handful of queries."""
    gap, refusals = 1.0, {202, 403, 429}

    def ask(self, queries: list[str], k: int) -> list[Results]:
        return [_Remote.ask(self, [query], k)[0] for query in queries]  # one a second is all it takes; and no thread outlives a signal

    def fetch(self, queries: list[str], k: int) -> list:
        return [self.request("GET", self.url, params={"q": query}) for query in queries]

    def parse(self, body: bytes) -> list[list[str]]:
        rows = _Page(body.decode("utf-8", "replace")).rows
        if not rows and b"no-results" not in body:
            raise _Fault("DuckDuckGo sends a challenge, or a page that cannot be understood, in place of results", 0.0)
        return rows

    def read(self, row: list):
        for address, title, snippet in row:
            url = urljoin(self.url, address)
            url = parse_qs(urlsplit(url).query).get("uddg", [url])[0]  # their redirects tell where they lead to
            if re.match(r"https?://(?!([^/]*\.)?duckduckgo\.com/)", url):  # else: an advertisement
                yield Passage(url, title, snippet, url=url)


class DiskCache:
    """Answers in sqlite: a transaction each way and no connection held, so threads, forks and processes share the file."""
    def __init__(self, path: str, spec: str, max_age: float):
        self.path, self.spec, self.max_age = path, spec, max_age

    def _run(self, sql: str, rows: list[tuple]) -> list:
        try:
            os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=60)) as db, db:
                db.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, at REAL NOT NULL, passages TEXT NOT NULL)")
                return [db.execute(sql, row).fetchone() for row in rows]
        except (sqlite3.Error, OSError) as error:
            print(f"search: the cache {self.path} cannot be used ({error}): going on without it", file=sys.stderr)
            self.path = ":memory:"  # empty each time it is opened
            return []

    def get(self, queries: list[str], k: int) -> dict[str, Results]:
        keys = [(f"{self.spec}\n{k}\n{query}", time.time() - self.max_age) for query in queries]
        rows = self._run("SELECT passages FROM answers WHERE key = ? AND at > ?", keys)
        return {query: Results(Passage(**p) for p in json.loads(row[0])) for query, row in zip(queries, rows) if row}

    def put(self, answers: dict[str, Results], k: int) -> None:
        rows = [(f"{self.spec}\n{k}\n{query}", time.time(), json.dumps([vars(p) for p in f])) for query, f in answers.items()]
        self._run("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", rows)


def open_search(spec: str, cache: str = "on", cache_path: str | None = None, max_age_days: float = 30.0) -> Search:
    """The one way to get a search: see the opening docstring for `spec`. `cache` concerns the network: "on", "off", or "only"
    (answer from the disk cache alone, whatever its age: a run repeated offline)."""
    if cache not in ("on", "off", "only"):
        raise SearchError(f"unknown cache mode {cache!r}: use on, off or only")
    if spec.startswith("bm25:"):
        return open_bm25(spec.removeprefix("bm25:"))
    if spec == "duckduckgo":
        search = DuckDuckGo("https://html.duckduckgo.com/html/")
    elif re.fullmatch(r"https?://[^/@\s]+(/\S*)?", spec):
        search = RetrievalServer(spec)
    elif re.fullmatch(r"opensearch\+https?://[^/@\s]+/[^/\s]\S*", spec):
        search = OpenSearch(spec.removeprefix("opensearch+"))
    else:  # what stands before an @ may be a password
        raise SearchError(f"unknown search {spec.rpartition('@')[2]!r}: use {FORMS}; user and password come from the environment")
    if cache == "only":
        search, max_age_days = Search(), 1e6
    if cache != "off":
        search.cache = DiskCache(cache_path or CACHE, spec, max_age_days * 86400)
    return search


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
        found = open_search(args.search, args.search_cache).search(args.query, args.k)
    except SearchError as error:
        found = Results(error=str(error))
    if args.json:
        print(json.dumps({"query": clean_query(args.query), "error": found.error, "passages": [vars(p) for p in found]}))
    for rank, p in enumerate([] if args.json else found, 1):
        print(f"{rank}. {p.title}  [{clean_text(p.id, 200)}]  {p.score:.3f}\n   {p.text}")
    if not found:
        print(f"error: {found.error}" if found.error else "nothing found", file=sys.stderr)
    return 2 if found.error else 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
