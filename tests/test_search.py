"""search_tool.py: text, corpora, BM25, the saved index, servers and their faults (real ones, on this machine), the cache.

Numbers are worked out by hand, or by a slow and obvious form beside the fast one. IGPO_LONG=1: more kills, more fuzz, the
benchmark in small.
"""
import doctest
import gzip
import json
import math
import os
import random
import re
import shutil
import signal
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
import unicodedata
import urllib.parse
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

import search_tool
from search_tool import (BM25, DiskCache, Passage, Results, SearchError, clean_query, clean_text, fingerprint, is_local,
                         normalise, open_bm25, open_search, read_passages, read_rows, split_title, tokenize)

ROOT = Path(search_tool.__file__).resolve().parent
LONG = bool(os.environ.get("IGPO_LONG"))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Nothing is written to the real home, and nothing of the environment matters."""
    monkeypatch.setattr(search_tool, "CACHE", str(tmp_path / "home" / "c.sqlite3"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("OPENSEARCH_API_KEY", "OPENSEARCH_USER", "OPENSEARCH_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


class Server:
    """Plays `answer(number of the request, handler, body) -> (status, headers, bytes)`, or None if it answered itself."""
    def __init__(self, answer, tls=None):
        self.seen, outer, lock = [], self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with lock:
                    outer.seen.append((time.monotonic(), self.command, self.path, dict(self.headers), body))
                    number = len(outer.seen)
                if (reply := answer(number, self, body)) is not None:
                    status, headers, data = reply
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(data)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)

            do_POST = do_GET

            def log_message(self, *args):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads, request_queue_size, handle_error = True, 128, lambda *args: None

        self.server = Quiet(("127.0.0.1", 0), Handler)
        if tls:
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True)
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.server.server_port}"

    def sizes(self):
        return [len(json.loads(body)["queries"]) for *_, body in self.seen]

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def as_json(value, status=200, **headers):
    return status, headers, json.dumps(value).encode()


def hits(body, n=3):
    """What a Search-R1 retrieval server answers: passage j of query q."""
    asked = json.loads(body)
    return as_json({"result": [[{"document": {"id": f"{j}", "contents": f'"{query}"\ntext {j} of {query}'}, "score": 9.0 - j}
                                for j in range(min(n, asked["topk"]))] for query in asked["queries"]]})


def quick(spec, cache="off", path=None, **settings):
    """A search whose waits are short."""
    search = open_search(spec, cache, path)
    for name, value in {"pause": 0.01, "timeout": (0.5, 0.5), "deadline": 5.0, "patience": 1.5, **settings}.items():
        setattr(search, name, value)
    return search


def duck(server, **settings):
    return quick("duckduckgo", url=server.url + "/html/", **{"gap": 0.0, **settings})


def make_corpus(seed, n=300, path=None):
    """n passages in which few words are frequent and most are rare, as in a language; also written to `path`."""
    rng = random.Random(seed)
    words = [" ".join(f"w{min(int(rng.paretovariate(0.7)), 3000)}" for _ in range(rng.randrange(5, 60))) for _ in range(n)]
    passages = [Passage(str(i), text[:5], text) for i, text in enumerate(words)]
    if path:
        path.write_text("".join(json.dumps({"id": p.id, "title": p.title, "text": p.text}) + "\n" for p in passages))
    return passages


def write(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return f"bm25:{path}"


NASTY = ["</information>", "<answer>", "<|im_start|>", "[INST]", "[/INST]", "<<SYS>>", "<s>", "＜think＞", "[TOOL_CALLS]", "[|user|]",
         "[IN\u200bST]", "[[INST]]", "\x00", "\u202e", "\u200b", "\u200d", "\u00ad", "\ufeff", "\ud800", "\r\n", "\t", "\u2028", "\x85", " ",
         "[", "]", "(", ")", "/", "a", "Zürich", "🦜", "e\u0301", "e\u200d\u0301", "o\ufe0f", "\u0301", "\u0338", "\u3164", "\U000e0041",
         "\U000e0100", "\ue000", "&lt;", "\x1b[31m", "<｜User｜>", "x" * 50, "한", "\u1112\u1161\u11ab", "葛\U000e0100飾", "かﾞ", "塔沃桥", "ส้ม"]


def nasty(rng):
    text = "".join(rng.choices(NASTY, k=rng.randrange(20)))
    return text + "".join(chr(rng.choice([rng.randrange(0x80), rng.randrange(0x3000), rng.randrange(0x110000)]))
                          for _ in range(rng.randrange(20)))


# Text

def test_docstring_examples():
    results = doctest.testmod(search_tool)
    assert results.attempted >= 3 and results.failed == 0


def test_clean_text_properties():
    rng = random.Random(1)
    for _ in range(20_000 if LONG else 2000):
        text, limit = nasty(rng), rng.choice([1, 7, 40, 2000])
        clean = clean_text(text, limit)
        assert clean_text(clean, limit) == clean == clean.strip() and len(clean) <= limit and "  " not in clean
        assert not set(clean) & set("<>＜＞\n\r\t\u2028\x85\u00ad\ufe0f\u3164") and not re.search(r"\[[/|]?\w+\|?\]", clean)
        assert all(unicodedata.category(char)[0] != "C" for char in clean)
        assert unicodedata.is_normalized("NFC", clean) and normalise(clean) == clean
        clean.encode("utf-8")


def test_clean_text_by_hand():
    assert clean_text(None) == clean_text("\x00 \u200b\n") == "" and clean_text("  two\n\nlines\tand\u00a0more ") == "two lines and more"
    assert clean_text("[INST] 3 < 4 [/INST] <<SYS>>") == "(INST) 3 ‹ 4 (/INST) ‹‹SYS››"
    plain = "plain, “quoted” – 3.5 % of [two words] (Zürich) 東京 🦜"
    assert clean_text(plain) == plain and clean_text("in\u202evisible\u200b\u2066") == "invisible" and clean_text("abc def", 4) == "abc"
    assert clean_query("a\r\nHost: evil\x00") == "a Host: evil" and len(clean_query("q" * 999)) == 300
    with pytest.raises(SearchError, match="no passages"):
        BM25([])
    for text in ("[" * 1_000_000, "[a" * 500_000, "<" * 1_000_000, " " * 1_000_000, "\u200b" * 1_000_000, "x" * 1_000_000):
        assert len(clean_text(text)) <= 2000  # quadratic in any of them would take minutes


def test_normalise_by_hand():
    assert normalise("Zoe\u0301") == normalise("Zoé") == "Zoé" and len(normalise("e\u200d\u0301")) == 1
    assert normalise("Brücken\u00adbau") == normalise("Brücken\u200bbau") == "Brückenbau"
    assert normalise("\u1112\u1161\u11ab") == "한" and normalise("葛\U000e0100飾") == "葛飾" and normalise("❤\ufe0f") == "❤"
    assert normalise("10² ﬁ Ａ ①") == "10² ﬁ Ａ ①", "NFC, not NFKC"


@pytest.mark.parametrize("asked", ["Brückenbau", "Bru\u0308ckenbau", "Brücken\u00adbau", "Brücken\u200bbau", "BRÜCKEN\u200dBAU", "\ufeffbrückenbau"])
@pytest.mark.parametrize("stored", ["Brückenbau", "Bru\u0308ckenbau", "Brücken\u00adbau", "Brücken\u200bbau", "Bru\u200d\u0308ckenbau"])
def test_what_is_indexed_asked_and_shown_is_one_text(stored, asked):
    found = BM25([Passage("1", "", f"Der {stored} von Tavo."), Passage("2", stored, "x"), Passage("3", "", "Brücken, Bau")]).search(asked)
    assert [(p.id, p.title, p.text) for p in found] == [("2", "Brückenbau", "x"), ("1", "", "Der Brückenbau von Tavo.")]


def test_the_tokens_of_a_text_are_those_of_the_text_shown():
    rng = random.Random(2)
    for _ in range(20_000 if LONG else 2000):
        text = nasty(rng)
        assert tokenize(text) == tokenize(clean_text(text, 10**6)) == tokenize(unicodedata.normalize("NFD", text))


def test_tokens_of_scripts_with_spaces_are_words():
    for text in ("The Tavo bridge, built in 1932!", "Où est né l'œuvre d'Ångström?", "Кто построил мост?", "Ποιος έχτισε τη γέφυρα;",
                 "من بنى الجسر؟", "누가 다리를 지었나요?", "ድልድዩን ማን ሠራው?", "ϕ_1 = x² ① 3.5e-6", "İstanbul"):
        assert tokenize(text) == re.findall(r"\w+", unicodedata.normalize("NFC", text).lower())


@pytest.mark.parametrize("text, tokens", [
    ("塔沃桥由米拉·奥斯于1932年建造", "塔沃 沃桥 桥由 由米 米拉 奥斯 斯于 1932 年建 建造"), ("iPhone手机", "iphone 手机"), ("河", "河"), ("我 是", "我 是"),
    ("東京タワーは高い。", "東京 京タ タワ ワー ーは は高 高い"), ("ﾀｳﾞｫ", "ﾀｳ ｳﾞ ﾞｫ"), ("人々・葛\U000e0100飾", "人々 葛飾"), ("𠀀𠀁𠀂", "𠀀𠀁 𠀁𠀂"),
    ("สะพานนี้ 1932", "สะ ะพ พา าน นน นี ี้ 1932"), ("ວຽງຈັນ", "ວຽ ຽງ ງຈ ຈັ ັນ"), ("ស្ពាន។", "ស្ ្ព ពា ាន"), ("တံတား၊", "တံ ံတ တာ ား"), ("ㄅㄆ", "ㄅㄆ"), ("ꀀꀁ", "ꀀꀁ")])
def test_tokens_of_scripts_without_spaces_are_pairs(text, tokens):
    assert tokenize(text) == tokens.split()


@pytest.mark.parametrize("rows, queries", [
    (["塔沃桥由米拉·奥斯于1932年建造，位于亚德比镇。", "博·伦德出生在亚德比镇，是一名理发师。"], ["塔沃桥", "谁建造了塔沃桥", "米拉·奥斯", "1932"]),
    (["タヴォ橋はミラ・オスが建てた。", "長い川が三つの村を流れる。"], ["タヴォ橋", "橋を建てたのは誰？", "ミラ"]),
    (["สะพานนี้สร้างโดยมีราในปี1932", "แม่น้ำยาว"], ["สะพาน", "มีรา", "ใครสร้างสะพาน"]),
    (["ស្ពាននេះសាងសង់ដោយមីរ៉ា", "ទន្លេវែង"], ["ស្ពាន", "មីរ៉ា"]), (["ຂົວນີ້ສ້າງໂດຍມີຣາ", "ແມ່ນ້ຳຍາວ"], ["ຂົວ", "ມີຣາ"]),
    (["ဤတံတားကို မီရာ ဆောက်သည်", "မြစ်ရှည်"], ["တံတား", "မီရာ"])])
def test_bm25_finds_words_where_there_are_no_spaces(rows, queries):
    search = BM25([Passage(str(i), "", text) for i, text in enumerate(rows)])
    for query in queries:
        assert search.search(query)[0].id == "0", query


# Corpora

LONG_LINE = "The bridge over the river was planned for many years, and many people spoke about it. " * 4 + "Its builder was Mira Oss."


@pytest.mark.parametrize("contents, title, text", [
    ('"Tavo bridge"\nBuilt in 1932.', "Tavo bridge", "Built in 1932."), ('""Weird Al" Yankovic"\nA singer.', '"Weird Al" Yankovic', "A singer."),
    ("River\nA long river.", "River", "A long river."), (" River \n\n A long river.\nIt is long.", "River", "A long river.\nIt is long."),
    (f"{LONG_LINE}\nIt was opened in 1932.", "", None), (f'"{LONG_LINE}"\nsaid the paper.', "", None), ("Its builder was Mira Oss.\nIt is long.", "", None),
    ("He said: “No.”\nShe left.", "", None), ("The bridge over the river was\nplanned for years.", "", None), ("桥由米拉建造。\n位于亚德比镇。", "", None),
    ("塔沃桥\n由米拉建造。", "塔沃桥", "由米拉建造。"), ("one line", "", None), ('"Tavo bridge"', "", None), ("\n", "", None), ("", "", None), ('""\nx', "", "x")])
def test_a_title_line_is_told_from_text(contents, title, text):
    assert split_title(contents) == (title, contents if text is None else text)


def test_contents_with_and_without_titles(home):
    spec = write(home / "c.jsonl", {"id": "1", "contents": f"{LONG_LINE}\nSecond paragraph: it was opened in 1932."},
                 {"id": "2", "title": "Tavo hall", "contents": "It was built by Ilse Maar."}, {"id": "3", "title": "Mill", "contents": '"Mill"\nIt grinds.'},
                 {"id": "4", "title": "", "contents": "River\nA long one."}, {"id": "5", "title": "t" * 150 + " " + "u" * 150, "contents": "Long."})
    search = open_search(spec)
    assert search.search("builder of the bridge")[0] == Passage("1", "", f"{LONG_LINE} Second paragraph: it was opened in 1932.", pytest.approx(3, abs=3))
    assert [(p.title, p.text) for q in ("hall", "maar", "mill", "river", "u" * 150) for p in search.search(q, 1)] == [
        *[("Tavo hall", "It was built by Ilse Maar.")] * 2, ("Mill", "It grinds."), ("River", "A long one."), ("", "t" * 150 + " " + "u" * 150 + " Long.")]


def test_nothing_that_is_indexed_goes_unseen():
    rng, parts = random.Random(3), ["River", '"', "\n", " ", ". ", "long " * 30, "Tavo\n", '"Mill"\n', "塔沃桥", "e\u0301", "\u00ad"]
    for i in range(1000):
        row = {"id": i, "contents": "".join(rng.choices(parts, k=rng.randrange(1, 12)))[:1500]}
        if i % 3 == 0:
            row["title"] = rng.choice(["River", "Mill", "x" * 150 + " y" * 60, ""])
        passage = search_tool.make_passage(row)
        shown = search_tool.clean_passage(passage)
        assert Counter(tokenize(f"{shown.title} {shown.text}")) == Counter(tokenize(f"{passage.title} {passage.text}"))
        seen = set(tokenize(f"{shown.title} {shown.text}"))
        assert set(tokenize(row.get("title", ""))) <= seen and set(tokenize(row["contents"])) <= seen


def test_both_layouts_and_packing(home):
    plain, r1 = home / "a.jsonl", home / "b.jsonl.gz"
    plain.write_bytes(b'\xef\xbb\xbf{"id": 1, "title": "T", "text": "x y"}\r\n\r\n{"id": "2", "title": null, "text": "\xc3\xa9"}')
    r1.write_bytes(gzip.compress(b'{"id": "1", "contents": "\\"T\\"\\nx y"}\n{"id": "2", "contents": "no title"}\n'))
    assert list(read_rows(plain)) == [(f"{plain}:1", {"id": 1, "title": "T", "text": "x y"}), (f"{plain}:3", {"id": "2", "title": None, "text": "é"})]
    assert list(read_passages(plain)) == [Passage("1", "T", "x y"), Passage("2", "", "é")]
    assert list(read_passages(r1)) == [Passage("1", "T", "x y"), Passage("2", "", "no title")]
    for path in (plain, r1, r1):
        assert [(p.id, p.text) for p in open_search(f"bm25:{path}").search("X")] == [("1", "x y")]


@pytest.mark.parametrize("line", ["{", "[1]", "7", "null", '{"id": "1"}', '{"id": "1", "text": 5}', '{"text": "x"}', '{"id": null, "text": "x"}',
                                  '{"id": "1", "title": [1], "text": "x"}', '{"id": "1", "contents": 3}', "[" * 100_000, '{"a": ' * 100_000])
def test_a_bad_line_is_named(home, line):
    (home / "bad.jsonl").write_text('{"id": "1", "text": "fine"}\n\n' + line + "\n")
    with pytest.raises(SearchError, match=r"bad\.jsonl:3: ") as caught:
        open_search(f"bm25:{home}/bad.jsonl")
    assert "\n" not in str(caught.value) and os.listdir(home) == ["bad.jsonl"]


@pytest.mark.parametrize("code, line, advice", [("latin-1", 2, "LATIN1"), ("cp1252", 2, "LATIN1"), ("gbk", 3, "GBK"), ("shift-jis", 3, "GBK"),
                                                ("utf-16", 1, "UTF-16"), ("utf-16-le", 1, "UTF-16"), ("utf-16-be", 1, "UTF-16"), ("utf-32", 1, "UTF-16")])
@pytest.mark.parametrize("packed", [False, True])
def test_a_corpus_that_is_not_utf8_is_refused_by_line(home, code, line, advice, packed):
    path = home / ("c.jsonl" + ".gz" * packed)
    rows = ['{"id": "1", "text": "plain"}', '{"id": "2", "text": "Zoé Müller"}'] + ['{"id": "3", "text": "塔沃桥"}']
    data = "\n".join(row for row in rows if code not in ("latin-1", "cp1252") or row.isascii() or "é" in row)
    if code in ("gbk", "shift-jis"):
        data = data.replace("é", "e").replace("ü", "u").replace("塔沃桥", "日本")
    data = data.encode(code)
    path.write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(SearchError, match=rf"c\.jsonl(\.gz)?:{line}: not UTF-8; .*iconv -f {advice if advice != 'GBK' else '.*GBK'}"):
        open_search(f"bm25:{path}")
    (home / "new.jsonl").write_bytes(data.decode(code).encode())
    assert open_search(f"bm25:{home}/new.jsonl").search("plain")[0].id == "1", "and converted it is read"


def test_what_cannot_be_opened_is_said_in_one_line(home):
    (home / "empty.jsonl").write_text("\n\n")
    (home / "torn.jsonl.gz").write_bytes(gzip.compress(b'{"id": "1", "text": "fine"}\n' * 1000)[:-20])
    (home / "no.jsonl.gz").write_text('{"id": "1", "text": "fine"}\n')
    for spec, words in [("", ""), ("bm25", ""), ("bm25:", "no corpus"), ("google", "'google'"), ("ftp://host/x", ""), ("http://", ""),
                        ("http:///retrieve", ""), ("http://:8000/x", ""), ("http://host:80000/x", ""), ("http://host:x/", ""), ("http://[::1/x", ""),
                        ("opensearch+http://host:9200/", ""), ("opensearch://h/i", ""), ("bm25:/no/such.jsonl", "there is no corpus /no/such.jsonl"),
                        (f"bm25:{home}", "there is no corpus"), (f"bm25:{home}/empty.jsonl", "empty.jsonl holds no passage"),
                        (f"bm25:{home}/torn.jsonl.gz", "cannot be read beyond line "), (f"bm25:{home}/no.jsonl.gz", "gzip"),
                        ("http://me:hunter2@host/retrieve", "environment"), ("opensearch+https://me:hunter2@host:9200/i", "environment")]:
        with pytest.raises(SearchError, match=re.escape(words) or None) as caught:
            open_search(spec)
        assert "\n" not in str(caught.value) and "hunter2" not in str(caught.value)
    with pytest.raises(SearchError, match="sometimes"):
        open_search("duckduckgo", cache="sometimes")
    with pytest.raises(SearchError, match="^there is no file /no/such$"):
        list(read_rows("/no/such"))
    with pytest.raises(SearchError, match="[Dd]irectory"):
        list(read_rows(home))


# BM25

def slow_bm25(passages, query, k1=1.5, b=0.75):
    """BM25 (Lucene) as the formula is read, one passage and token after the other; in float32 where the fast one is."""
    documents = [re.findall(r"\w+", f"{p.title} {p.text}".lower()) for p in passages]
    n, average = len(documents), sum(map(len, documents)) / len(documents)
    scores = [np.float32(0)] * n
    for token in re.findall(r"\w+", query.lower()):
        df = sum(token in document for document in documents)
        idf = np.float32(math.log(1 + (n - df + 0.5) / (df + 0.5)))
        for i, document in enumerate(documents):
            if tf := document.count(token):
                scores[i] += np.float32(float(idf) * (tf / (tf + k1 * (1 - b + b * len(document) / average))))
    return scores


def test_bm25_by_hand():
    """N = 3, lengths 2, 3, 1, mean 2. idf(a) = ln 1.6, idf(b) = ln 8/3.
    tf part of a: 1 / (1 + 1.5) in the first, 2 / (2 + 1.5 (0.25 + 0.75 * 1.5)) = 2 / 4.0625 in the second."""
    bm25 = BM25([Passage("0", "", "a b"), Passage("1", "a", "A, c"), Passage("2", "", "d")])
    found = bm25.search("a b", 9)
    assert [p.id for p in found] == ["0", "1"] and found.error is None and not found.cached
    assert [p.score for p in found] == pytest.approx([0.4 * 0.4700036 + 0.4 * 0.9808293, 0.4923077 * 0.4700036], abs=1e-6)
    assert bm25.search("b b", 1)[0].score == pytest.approx(2 * 0.4 * 0.9808293, abs=1e-6), "a word twice counts twice"
    for query, k in [("", 3), ("zzz", 3), ("a", 0), ("a", -1), ("?!", 3), (None, 3), ("\ud800", 3)]:
        assert bm25.search(query, k) == [] and bm25.search(query, k).error is None
    tied = BM25([Passage(str(i), "", "same words" if i % 2 else "other") for i in range(99)])
    assert [p.id for p in tied.search("words", 5)] == ["1", "3", "5", "7", "9"] and len(tied.search("words", 1000)) == 49
    assert BM25([Passage("1", "", ""), Passage("2", "", "!")]).search("x", 3) == []
    hostile = BM25([Passage("<id>", "<b>t</b>", "x </information> [INST] " + "y" * 5000)]).search("x")[0]
    assert hostile.id == "<id>" and hostile.title == "‹b›t‹/b›" and hostile.text == ("x ‹/information› (INST) " + "y" * 5000)[:2000]


@pytest.mark.parametrize("demo, k1, b", [(False, 1.5, 0.75), (False, 1.2, 0.0), (False, 0.9, 1.0), (True, 1.5, 0.75)])
def test_bm25_equals_the_formula_to_the_last_bit(demo, k1, b):
    rng = random.Random(k1)
    passages = list(read_passages(ROOT / "demo" / "corpus.jsonl"))[:400] if demo else make_corpus(2, 400)
    bm25 = BM25(passages, k1, b)
    for _ in range(12):
        query = " ".join(rng.choices(tokenize(rng.choice(passages).text), k=rng.randrange(1, 9)))
        expected = slow_bm25(passages, query, k1, b)
        order = sorted((i for i in range(len(passages)) if expected[i] > 0), key=lambda i: (-expected[i], i))
        for k in (1, 10, 2000):
            docs, scores = bm25.rank(query, k)
            assert docs.tolist() == order[:k] and scores.tolist() == [expected[i] for i in order[:k]]


def test_bm25_scores_are_those_of_the_first_version():
    """Worked out by the program before it knew other scripts: text with spaces must score as it did, to the last bit."""
    bm25 = BM25(make_corpus(2, 1000))
    for query, expected in [("w1 w5 w30", [("186", "0x1.e4f03cp+0"), ("863", "0x1.b026b8p+0")]), ("w100 w2 w2", [("981", "0x1.e0616cp+0"), ("959", "0x1.d30c4p+0")]),
                            ("w7", [("865", "0x1.1d6d3p-1"), ("38", "0x1.18aa7ap-1")]), ("W3000, w11; w45", [("948", "0x1.8aa4dcp+1"), ("887", "0x1.86ccf4p+1")])]:
        assert [(p.id, p.score) for p in bm25.search(query, 2)] == [(name, float.fromhex(score)) for name, score in expected]


@pytest.mark.parametrize("demo", [False, True])
def test_bm25_equals_bm25s(demo):
    """Scores equal to the last bit, ranks equal, ties by position."""
    bm25s = pytest.importorskip("bm25s")
    rng = random.Random(6)
    passages = list(read_passages(ROOT / "demo" / "corpus.jsonl")) if demo else make_corpus(3, 3000)
    ours, theirs = BM25(passages), bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    theirs.index([tokenize(f"{p.title} {p.text}") for p in passages], show_progress=False)
    for _ in range(100):
        words = tokenize(rng.choice(passages).text) + ["w1", "w2", "the", "of"]
        query = rng.choices(words, k=rng.randrange(1, 15)) + words[:1]
        scores = theirs.get_scores([word for word in query if word in theirs.vocab_dict])
        order = np.argsort(-scores, kind="stable")[:10]
        docs, got = ours.rank(" ".join(query), 10)
        assert docs.tolist() == order[scores[order] > 0].tolist() and got.tolist() == scores[docs].tolist()


def test_every_term_is_found_and_no_other():
    words = sorted({"a", "aa", "ab", "b", "é", "z", "zz", "塔沃", "\U00020000", "0", "_", "ÿ".lower()})
    bm25 = BM25([Passage(str(i), "", word) for i, word in enumerate(words)])
    assert [bm25.find(word) for word in words] == list(range(len(words)))
    assert [bm25.find(word) for word in ("", "aaa", "az", "zzz", "\U00030000", "塔", "-")] == [None] * 7


# The saved index

@pytest.mark.parametrize("packed", [False, True])
def test_index_is_saved_mapped_and_reused(home, monkeypatch, capfd, packed):
    path, bars = home / ("c.jsonl.gz" if packed else "c.jsonl"), []
    passages = make_corpus(10, path=path)
    if packed:
        path.write_bytes(gzip.compress(path.read_bytes()))
    monkeypatch.setattr(search_tool, "tqdm", lambda real=search_tool.tqdm, **options: bars.append(real(**options)) or bars[-1])
    queries, expected = ["w1 w5 w30", "w2 w9", "w100"], BM25(passages).search_many(["w1 w5 w30", "w2 w9", "w100"], 7)
    assert open_search(f"bm25:{path}").search_many(queries, 7) == expected
    assert len(bars) == 1 and bars[0].n > 10_000, "a progress bar"
    again = open_search(f"bm25:{path}")
    assert again.search_many(queries, 7) == expected and len(bars) == 1 and capfd.readouterr().err == "", "read once, used twice"
    assert all(isinstance(values.base, np.memmap) for values in again.index.values()) and vars(again).keys() == {"index"}, "all of it mapped"
    assert sorted(os.listdir(home)) == [path.name, f"{path.name}.bm25"], "nothing else is left"


def test_fingerprint_reads_little_of_a_large_file(home):
    path = home / "large"
    path.write_bytes(b"x")
    os.truncate(path, 10**11)  # 100 GB of nothing, which takes no room
    before = fingerprint(path)
    with open(path, "r+b") as file:
        file.seek(10**11 - 1)
        file.write(b"y")
    assert fingerprint(path) != before and before.startswith("100000000000-")
    for data in (b"", b"a", b"b", b"a" * 20_000, b"a" * 19_999 + b"b", b"a" * 5_000_000, b"a" * 4_999_999 + b"b", b"b" + b"a" * 4_999_999):
        path.write_bytes(data)
        assert fingerprint(path) not in (seen := locals().setdefault("seen", set())) and not seen.add(fingerprint(path))


def test_index_of_a_changed_corpus_is_rebuilt(home, capfd):
    path = home / "c.jsonl"
    for text, time_ns, said in [("apple pear", 5, False), ("grape pear", 5, True), ("grape pear", 5, False), ("grape pear", 6, True), ("apple and grape", 6, True)]:
        path.write_text(json.dumps({"id": "1", "text": text}) + "\n")
        os.utime(path, ns=(time_ns, time_ns))
        found = open_search(f"bm25:{path}")
        assert [bool(found.search(word)) for word in ("apple", "grape")] == ["apple" in text, "grape" in text]
        assert ("building it again" in capfd.readouterr().err) == said, (text, time_ns)
    assert open_bm25(str(path), k1=2.0).search("grape")[0].score != found.search("grape")[0].score, "other settings, other index"


def test_damaged_index_is_rebuilt(home, capfd):
    path = home / "c.jsonl"
    expected = BM25(make_corpus(11, 60, path)).search("w1 w7", 5)
    open_search(f"bm25:{path}")
    for file in sorted(Path(f"{path}.bm25").iterdir()):
        whole = file.read_bytes()
        for broken in [b"", b"x", whole[:50], whole[:-1], bytes(len(whole)), None]:
            file.unlink() if broken is None else file.write_bytes(broken)
            assert open_search(f"bm25:{path}").search("w1 w7", 5) == expected
            assert "building it again" in capfd.readouterr().err, (file, broken)
            assert open_search(f"bm25:{path}").search("w1 w7", 5) == expected and capfd.readouterr().err == ""


def test_index_of_an_older_format_is_rebuilt(home, capfd):
    path, folder = home / "c.jsonl", home / "c.jsonl.bm25"
    expected = BM25(make_corpus(11, 60, path)).search("w1 w7", 5)
    open_search(f"bm25:{path}")
    state = json.loads((folder / "index.json").read_text())
    assert state["format"] == 2
    (folder / "index.json").write_text(json.dumps({**state, "format": 1}))
    assert open_search(f"bm25:{path}").search("w1 w7", 5) == expected and "building it again" in capfd.readouterr().err


def test_index_where_nothing_can_be_written(home, capfd, monkeypatch):
    make_corpus(13, 50, path := home / "c.jsonl")
    monkeypatch.setattr(os, "mkdir", lambda *args: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    assert open_search(f"bm25:{path}").search("w1") and "cannot be saved (Permission denied)" in capfd.readouterr().err


def kill(code, *arguments):
    """Runs the code until it prints a line, and a moment longer; then kill -9. -> what it printed."""
    child = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    first = child.stdout.readline()
    time.sleep(random.random() * 0.1)
    child.send_signal(signal.SIGKILL)
    child.wait()
    return first + child.stdout.read()


HANG = """import numpy, os, sys, time, search_tool
def hang(*args):
    print("here", flush=True)
    time.sleep(60)
{} = hang
search_tool.open_search("bm25:" + sys.argv[1])"""


@pytest.mark.parametrize("moment", ["numpy.save", "os.replace"])
def test_kill_while_the_index_is_written(home, moment):
    """kill -9 at chosen moments of the writing, of a first and of a second index: the next start works, and cleans up."""
    path = home / "c [1]*.jsonl"
    for seed in (14, 15):
        passages = make_corpus(seed, path=path)
        assert kill(HANG.format(moment), path) == "here\n"
        left, = [name for name in os.listdir(home) if re.fullmatch(r"c \[1\]\*\.jsonl\.bm25\..{8}\.bm25", name)]
        os.utime(home / left, (0, time.time() - 3700))
        assert open_search(f"bm25:{path}").search("w1 w7", 5) == BM25(passages).search("w1 w7", 5)
        assert sorted(os.listdir(home)) == [path.name, f"{path.name}.bm25"], "what was left is gone"


def test_what_a_living_process_writes_is_left_alone(home):
    make_corpus(16, path=(path := home / "c.jsonl"))
    child = subprocess.Popen([sys.executable, "-c", HANG.format("os.replace"), path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "here\n"
        assert open_search(f"bm25:{path}").search("w1") and len(os.listdir(home)) == 3, "its folder, the index, the corpus"
    finally:
        child.kill()
        child.communicate()


# A retrieval server and its faults

def test_retrieval_asks_once_per_batch():
    with Server(lambda n, handler, body: hits(body)) as server:
        search = quick(server.url + "/retrieve")
        queries = [f"q{i % 40}" for i in range(64)] + ["", None, " \x00 "]
        found = search.search_many(queries, 2)
        assert len(server.seen) == 1 and server.seen[0][1:3] == ("POST", "/retrieve")
        assert json.loads(server.seen[0][4]) == {"queries": [f"q{i}" for i in range(40)], "topk": 2, "return_scores": True}
        assert [[p.title for p in passages] for passages in found] == [[f"q{i % 40}"] * 2 for i in range(64)] + [[]] * 3
        assert found[3][1] == Passage("1", "q3", "text 1 of q3", 8.0) and not any(passages.error or passages.cached for passages in found)
        found[3].clear()
        assert found[43], "no list is shared"
        assert search.search_many([], 2) == [] and search.search_many(["q"], 0) == [[]] and len(server.seen) == 1


@pytest.mark.parametrize("hit, passage", [
    ({"id": 7, "title": "T", "text": "<b> [INST]"}, Passage("7", "T", "‹b› (INST)")), ({"document": {"contents": "only text"}}, Passage("", "", "only text")),
    ({"document": {"id": None, "text": "x"}, "score": None}, Passage("", "", "x")), ({"document": {"id": 7.5, "text": "x"}}, Passage("7.5", "", "x")),
    ({"document": {"id": 0, "text": "x"}, "score": float("nan")}, Passage("0", "", "x")), ({"document": {"id": ["a"], "text": "x"}}, Passage("['a']", "", "x")),
    ({"document": {"text": "x"}, "score": float("inf")}, Passage("", "", "x")), ({"document": {"text": "x"}, "score": "-Infinity"}, Passage("", "", "x")),
    ({"document": {"text": "x"}, "score": "high"}, Passage("", "", "x")), ({"document": {"text": "x"}, "score": "0.5"}, Passage("", "", "x", 0.5)),
    ({"document": {"text": "x"}, "score": [1]}, Passage("", "", "x")), ({"document": {"text": "x"}, "score": 10**400}, Passage("", "", "x")),
    ({"document": {"text": "x", "title": 5}, "score": -1}, Passage("", "", "x", -1.0)), ({"document": {"text": "x", "title": "t" * 300}}, Passage("", "", "t" * 300 + " x")),
    ({"document": {"contents": "River\nIt is long.", "title": None}}, Passage("", "River", "It is long.")),
    ({"document": {"id": "1"}}, None), ({"document": {"id": "1", "title": "T", "text": None}}, None), ({"document": {"text": 5}}, None),
    ({"document": {"text": ["x"]}}, None), ({"document": None}, None), ({"document": "x"}, None), ({}, None), (None, None), ("x", None), (5, None), ([], None)])
def test_a_bad_passage_is_mended_or_left_out(hit, passage):
    good = {"document": {"id": "g", "contents": '"G"\ngood'}, "score": 2.0}
    with Server(lambda *_: as_json({"result": [[good, hit, good], [hit]]})) as server:
        mixed, alone = quick(server.url).search_many(["a", "b"])
        assert mixed.error is None and mixed == [p for p in (Passage("g", "G", "good", 2.0), passage, Passage("g", "G", "good", 2.0)) if p]
        assert (alone == [passage] and alone.error is None) if passage else (alone == [] and "none of the 1 passages" in alone.error)


def test_more_than_asked_nothing_and_a_bad_row():
    rows = [[{"text": "x"}] * 9, [], 5, None, "abc", {"a": 1}]
    with Server(lambda *_: as_json({"result": rows})) as server:
        many, nothing, *bad = quick(server.url).search_many("abcdef", 4)
        assert len(many) == 4 and many.error is nothing.error is None and nothing == []
        assert all(results == [] and results.error for results in bad), "a bad row fails alone"


def test_bytes_of_an_answer_that_are_not_utf8_spoil_one_passage():
    answer = b'\xef\xbb\xbf{"result": [[{"document": {"id": "1", "text": "Zo\xe9"}}, {"document": {"id": "2", "text": "Zo\xc3\xa9 \\ud800"}}]]}'
    with Server(lambda *_: (200, {}, answer)) as server:
        assert quick(server.url).search("q") == [Passage("1", "", "Zo\ufffd"), Passage("2", "", "Zoé")]


def test_an_id_that_could_not_be_written_down():
    answer = b'{"result": [[{"document": {"id": "a\\ud800", "text": "Zed"}}]]}'
    with Server(lambda *_: (200, {}, answer)) as server:
        assert quick(server.url).search("q") == [Passage("a?", "", "Zed")]


@pytest.mark.parametrize("status, body", [(status, b"") for status in (202, 204, 301, 400, 401, 403, 404, 413, 422)] + [(200, body) for body in (
    b"", b"<html>", b"\xff\xfe", b"[" * 200_000, b"[]", b"{}", b"null", b'{"result": null}', b'{"result": []}', b'{"result": [[], []]}',
    b'{"result": [["a"]]}', b'{"result": [[{"document": null}]]}', b'{"result": ["abc"]}', b'{"result": [5]}')])
def test_what_will_not_change_is_asked_once(status, body):
    with Server(lambda n, *_: (status, {}, body) if n == 1 else hits(_[1])) as server:
        search = quick(server.url, pause=60.0)
        found = search.search("q")
        assert found == [] and found.error and not set(found.error) & set("\n<>") and len(server.seen) == 1
        assert status == 200 or str(status) in found.error
        assert len(search.search("q")) == 3, "and others need not wait"


def test_500_then_200_and_500_for_ever():
    with Server(lambda n, handler, body: hits(body) if n in (3, 8) else (500, {}, b"")) as server:
        search = quick(server.url, "on")
        assert len(search.search("q")) == 3 and len(server.seen) == 3
        assert server.seen[1][0] - server.seen[0][0] >= 0.005 and server.seen[2][0] - server.seen[1][0] >= 0.01, "growing pauses"
        assert "500" in search.search("other").error and len(server.seen) == 7, "4 tries"
        assert len(search.search("other")) == 3 and len(server.seen) == 8, "a failure is not kept"
        assert len(search.search("q")) == 3 and len(server.seen) == 8, "an answer is"


def test_429_honours_retry_after():
    with Server(lambda n, handler, body: (429, {"Retry-After": "1"}, b"") if n == 1 else hits(body)) as server:
        assert all(quick(server.url).search_many("abc")) and server.sizes() == [3, 3], "the same again: it is not divided"
        assert server.seen[1][0] - server.seen[0][0] >= 0.99
    for status in (429, 503):
        with Server(lambda *_: (status, {"Retry-After": "3000"}, b"")) as server:
            search = quick(server.url)
            assert all(search.search(f"q{i}").error for i in range(20)) and len(server.seen) == 1, "at once, for all"
            assert re.search(r"another (2\d\d\d|3000) s", search.search("again").error)


def test_outage_of_a_batch_is_soon_given_up():
    with Server(lambda *_: (500, {}, b"")) as server:
        search = quick(server.url)
        found = search.search_many([f"q{i}" for i in range(64)])
        assert all(results == [] and "500" in results.error for results in found)
        assert server.sizes() == [64, 32, 16, 8, 4, 2, 1, 1, 1, 1]
        assert search.search_many(["a", "b"])[1].error and server.sizes()[10:12] == [2, 1], "it was not the size"


def test_time_out_cut_and_nobody_there():
    def cut(n, handler, body):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b'{"result": [[]]}')
        handler.close_connection = True

    for answer, words in ((lambda *_: time.sleep(2), "--rollout_batch"), (cut, "cannot be reached"),
                          (lambda n, handler, body: handler.connection.shutdown(2), "cannot be reached")):
        with Server(answer) as server:
            found = quick(server.url, tries=2, timeout=(0.2, 0.2)).search("q")
            assert found == [] and words in found.error and "127.0.0.1" not in found.error and len(server.seen) == 2
    assert "cannot be reached" in quick(server.url, tries=2).search("q").error


def test_a_batch_too_large_for_a_slow_server_is_divided_and_the_size_kept():
    def slow(n, handler, body):
        time.sleep(0.12 if len(json.loads(body)["queries"]) <= 4 else 1)
        with suppress(OSError):
            return hits(body)

    with Server(slow) as server:
        search = quick(server.url, timeout=(0.4, 0.4))
        for first in ([16, 8], [], []):
            before = len(server.seen)
            found = search.search_many([f"q{i}" for i in range(16)])
            assert [results[0].title for results in found] == [f"q{i}" for i in range(16)] and not any(results.error for results in found)
            assert server.sizes()[before:] == first + [4] * 4


def test_the_size_grows_again_when_the_server_is_quick():
    with Server(lambda n, handler, body: hits(body) if n > 1 else (500, {}, b"")) as server:
        search = quick(server.url)
        for i in range(10):
            assert all(search.search_many([f"q{j}" for j in range(4)]))
        assert server.sizes()[:3] == [4, 2, 2] and server.sizes()[-1] == 4


def test_a_server_too_slow_for_one_query_says_what_helps():
    with Server(lambda *_: time.sleep(1)) as server:
        found = quick(server.url, timeout=(0.1, 0.1), tries=2).search_many(["a", "b"])
        assert all(results == [] for results in found)
        assert all("takes over 0.1 s" in results.error and "--rollout_batch" in results.error and "faster server" in results.error for results in found)


KINDS, BAD = [500, 400, 422, 413, "cut", "html", "rows"], [[0], [31], [63], [0, 1, 2, 3, 4], [5, 17, 40], [62, 63], list(range(20, 36))]


@pytest.mark.parametrize("kind, bad", [(kind, bad) for kind in KINDS for bad in BAD] if LONG else list(zip(KINDS, reversed(BAD))) + [(500, BAD[3])])
def test_a_poisoned_query_fails_alone(kind, bad):
    def answer(n, handler, body):
        asked = json.loads(body)["queries"]
        if not any(f"q{i}" in asked for i in bad):
            return hits(body)
        if kind == "cut":
            return handler.connection.shutdown(2)
        return (200, {}, b"<html>") if kind == "html" else as_json({"result": [[]] * (len(asked) + 1)}) if kind == "rows" else (kind, {}, b"")

    with Server(answer) as server:
        search = quick(server.url, pause=0.001)
        found = search.search_many([f"q{i}" for i in range(64)])
        assert [i for i, results in enumerate(found) if results.error] == bad
        assert all(results and results[0].title == f"q{i}" for i, results in enumerate(found) if i not in bad)
        assert len(server.seen) <= 20 + 12 * len(bad)
        before = len(server.seen)
        assert all(search.search_many([f"p{i}" for i in range(64)])) and len(server.seen) - before <= 64 and not search.closed_until


@pytest.mark.parametrize("where", ["status", "headers", "body"])
def test_one_byte_now_and_then_does_not_hold_a_query_for_ever(where):
    def drip(n, handler, body):
        start = {"status": b"", "headers": b"HTTP/1.1 200 OK\r\nX-Name: ", "body": b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"}[where]
        with suppress(OSError):
            handler.wfile.write(start)
            for _ in range(300):
                handler.wfile.write(b" ")
                time.sleep(0.1)

    with Server(drip) as server:
        start, search = time.monotonic(), quick(server.url, tries=2, timeout=(0.5, 0.5), deadline=0.7)
        assert "takes over 0.5 s" in search.search("q").error and len(server.seen) == 2 and time.monotonic() - start < 15


def test_50_mb_are_not_read():
    sent = []

    def huge(n, handler, body):
        handler.send_response(200)
        handler.send_header("Content-Length", str(50_000_000))
        handler.end_headers()
        with suppress(OSError):
            for _ in range(500):
                handler.wfile.write(b"x" * 100_000)
                sent.append(100_000)

    bomb = gzip.compress(b" " * 50_000_000)
    for answer in (huge, lambda *_: (200, {"Content-Encoding": "gzip"}, bomb)):
        with Server(answer) as server:
            assert "more than 1000000 bytes" in quick(server.url, max_bytes=1_000_000).search("q").error and len(server.seen) == 1
    assert sum(sent) < 25_000_000


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_refused_and_named(monkeypatch, status):
    monkeypatch.setenv("OPENSEARCH_API_KEY", "s3cret")
    with Server(lambda n, handler, body: hits(body)) as away:
        for place in (away.url + "/x", "/there", "file:///etc/passwd", "http://[", "//x\ty"):
            with Server(lambda *_: (status, {"Location": place}, b"")) as server:
                for spec in (server.url, f"opensearch+{server.url}/i"):
                    error = quick(spec).search("q").error
                    assert str(status) in error and clean_text(place) in error
                assert len(server.seen) == 2
        assert away.seen == []


@pytest.mark.parametrize("secret", [{"OPENSEARCH_API_KEY": "s3cret"}, {"OPENSEARCH_USER": "me", "OPENSEARCH_PASSWORD": "s3cret"}])
def test_credentials_are_sent_and_kept_out_of_sight(home, monkeypatch, capfd, secret):
    for name, value in secret.items():
        monkeypatch.setenv(name, value)
    (home / ".netrc").write_text("machine 127.0.0.1 login other password netrcsecret\n")
    with Server(lambda n, *_: as_json({"responses": [{"hits": {"hits": []}}]}) if n == 1 else (500, {}, b"")) as server:
        search = quick(f"opensearch+{server.url}/i", tries=1)
        assert search.search("q").error is None
        assert server.seen[0][3]["Authorization"] == ("ApiKey s3cret" if len(secret) == 1 else "Basic bWU6czNjcmV0")
        error = search.search("r").error
        assert "500" in error and "s3cret" not in error + repr(vars(search)) + "".join(capfd.readouterr())
        quick(server.url, tries=1).search("q")
        assert "Authorization" not in server.seen[-1][3], "no back end but this one has credentials, not even those of ~/.netrc"


def test_tls_is_verified_and_asked_once(home, monkeypatch):
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a certificate with")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1", "-addext",
                    "subjectAltName=IP:127.0.0.1", "-keyout", home / "key", "-out", home / "cert"], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(home / "cert", home / "key")
    with Server(lambda n, handler, body: hits(body), tls=context) as server:
        search, asked = quick(server.url, pause=60.0), []
        monkeypatch.setattr(search.session, "request", lambda *a, real=search.session.request, **k: asked.append(1) or real(*a, **k))
        assert all("SSLError" in results.error for results in search.search_many("abc")) and server.seen == [] and len(asked) == 1
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(home / "no such file"))
        assert "cannot be reached (OSError)" in search.search("q").error
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(home / "cert"))
        assert len(search.search("q")) == 3, "at once"


def test_a_proxy_does_not_stand_before_this_machine(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with Server(lambda n, handler, body: hits(body)) as server:
        for host in ("127.0.0.1", "localhost"):
            assert len(quick(server.url.replace("127.0.0.1", host)).search("q")) == 3
    assert "ProxyError" in quick("http://search.example/x", tries=1).search("q").error


# OpenSearch

def test_opensearch_speaks_msearch():
    def answer(n, handler, body):
        lines = [json.loads(line) for line in body.splitlines()]
        assert handler.path == "/wiki/_msearch" and body.endswith(b"\n") and lines[::2] == [{}] * (len(lines) // 2)
        assert handler.headers["Content-Type"] == "application/x-ndjson"
        responses = []
        for line in lines[1::2]:
            query = line["query"]["bool"]["should"][0]["match"]["title"]
            assert line["query"]["bool"]["should"][1:] == [{"match": {"text": query}}, {"match": {"contents": query}}]
            found = [{"_id": f"{query}{j}", "_score": 5.5 - j, "_source": {"title": "T", "text": f"<b> {query}"}} for j in range(line["size"])]
            responses.append({"hits": {"hits": found}, "status": 200} if query != "bad" else {"error": {"type": "</a>parse_error\n"}, "status": 400})
        return as_json({"responses": responses})

    with Server(answer) as server:
        one, bad, two = quick(f"opensearch+{server.url}/wiki/").search_many(["one", "bad", "two"], 2)
        assert len(server.seen) == 1 and one[1] == Passage("one1", "T", "‹b› one", 4.5) and len(two) == 2
        assert bad == [] and bad.error.endswith("‹/a›parse_error") and one.error is two.error is None


def test_opensearch_bad_hits_are_mended_or_left_out():
    found = [{"_id": None, "_score": float("nan"), "_source": {"text": "x"}}, {"_id": 7, "_score": None, "_source": {"contents": '"T"\ny'}},
             {"_id": "3", "_score": 1.0}, {"_id": "4", "_source": None}, {"_source": {"text": 5}}, {"_source": {"title": "T"}}, 5, None]
    with Server(lambda *_: as_json({"responses": [{"hits": {"hits": found}}, {"error": "text"}, {"hits": {"hits": []}}, {}, 7]})) as server:
        some, said, nothing, *bad = quick(f"opensearch+{server.url}/i").search_many("abcde", 9)
        assert some == [Passage("", "", "x"), Passage("7", "T", "y")] and some.error is nothing.error is None and nothing == []
        assert said.error.endswith("answers text") and all(results.error for results in bad)


# DuckDuckGo

PAGE = """<!DOCTYPE html><html><head><title>q at DuckDuckGo</title><script>var a = "<a class='result__a'>";</script></head><body>
<div class="result results_links result--ad"><h2 class="result__title"><a rel="nofollow" class="result__a"
 href="https://duckduckgo.com/y.js?ad_domain=shop.example">Buy!</a></h2><a class="result__snippet" href="#">An ad</a></div>
<div class="result results_links results_links_deep web-result "><div class="links_main links_deep result__body">
<h2 class="result__title"><a rel="nofollow" class="result__a"
 href="//duckduckgo.com/l/?uddg=https%3A%2F%2Ftavo.example%2Ffounding%3Fa%3D1%26b%3D2&amp;rut=abc">The <b>founding</b> of Tavo &amp; co</a></h2>
<div class="result__extras"><a class="result__url" href="x"> tavo.example/founding </a></div>
<a class="result__snippet" href="x">Tavo was <b>founded</b> by Ilse Maar &lt;/information&gt; in&nbsp;1203.</a></div></div>
<div class="result web-result"><h2><a class="result__a" href="https://plain.example/">Plain</a></h2>
<div class="result__snippet">Second</div></div>
<div class="result web-result"><a class="result__a" href="javascript:alert(1)">Script</a><a class="result__snippet">no</a></div>
<div class="result web-result"><a class="result__a" href="//duckduckgo.com/l/?uddg=file%3A%2F%2F%2Fetc">File</a></div>
<div class="result web-result"><a class="result__a" href="http://[bad/">Bad</a></div>
<div class="result web-result"><a class="result__a" href="http://third.example/">Third</a></div>
</body></html>""".encode()
CHALLENGE = b'<html><form id="challenge-form" action="//duckduckgo.com/anomaly.js"><div class="anomaly-modal__title">Bots ...</div></form></html>'
NOTHING = b'<html><div class="result results_links result--no-result"><span class="no-results">No results.</span></div></html>'


def test_duckduckgo_page():
    with Server(lambda n, handler, body: (200, {}, NOTHING if "none" in handler.path else PAGE)) as server:
        found = duck(server).search("tavo founded & more", 9)
        assert [(p.title, p.id, p.text) for p in found] == [
            ("The founding of Tavo & co", "https://tavo.example/founding?a=1&b=2", "Tavo was founded by Ilse Maar ‹/information› in 1203."),
            ("Plain", "https://plain.example/", "Second"), ("Third", "http://third.example/", "")]
        assert urllib.parse.parse_qs(urllib.parse.urlsplit(server.seen[0][2]).query) == {"q": ["tavo founded & more"]}
        assert len(duck(server).search("q", 2)) == 2
        nothing = duck(server).search("none")
        assert nothing == [] and nothing.error is None and len(server.seen) == 3
        assert all(duck(server, gap=0.1).search_many([f"q{i}" for i in range(5)])) and search_tool.DuckDuckGo.gap >= 1
        assert server.seen[7][0] - server.seen[3][0] >= 0.39, "a minimum gap"


@pytest.mark.parametrize("status, body", [(202, PAGE), (200, CHALLENGE), (400, b""), (403, b""), (429, b""), (200, b"")])
def test_duckduckgo_refusals(status, body):
    with Server(lambda n, *_: (status, {}, body) if n < 4 else (200, {}, PAGE)) as server:
        assert len(duck(server).search("q")) == 3 and len(server.seen) == 4
        gaps = [b[0] - a[0] for a, b in zip(server.seen, server.seen[1:])]
        assert gaps[0] >= 0.005 and gaps[1] >= 0.01 and gaps[2] >= 0.02, "growing pauses"
    with Server(lambda *_: (status, {}, body)) as server:
        search = duck(server)
        assert all("DuckDuckGo" in results.error for results in search.search_many("abc")) and len(server.seen) == 4
        assert "left alone" in search.search("d").error and len(server.seen) == 4


@pytest.mark.parametrize("is_duck", [True, False])
def test_one_refusal_does_not_become_a_hundred(is_duck):
    refusing = [True]
    good = (200, {}, PAGE) if is_duck else as_json({"result": [[{"text": "x"}] * 3]})
    with Server(lambda *_: (429, {}, b"") if refusing[0] else good) as server:
        search = (duck if is_duck else lambda server, **settings: quick(server.url, **settings))(server, patience=30.0)
        with ThreadPoolExecutor(100) as pool:
            found = list(pool.map(lambda i: search.search(f"q{i}"), range(100)))
        assert all(results == [] and results.error for results in found) and len(server.seen) == 4
        refusing[0], search.closed_until = False, 0.0
        assert len(search.search("q")) == 3 and search.search("p").error is None, "open again"


# The cache on disk

def test_local_addresses_have_no_cache_unless_it_is_asked_for(home):
    for host in ("127.0.0.1", "127.8.9.1", "localhost", "LOCALHOST", "[::1]", "10.1.2.3", "172.16.0.1", "172.31.255.1", "192.168.1.7", "169.254.1.1",
                 "100.64.0.1", "0.0.0.0", "[fe80::1]", "[fc00::1]", "[fd12::1]", "[::ffff:10.0.0.1]", "printer.local", "a.b.local", "node17", "node17.",
                 "retriever.internal", "x.localhost", "r.default.svc", "r.default.svc.cluster.local"):
        for spec in (f"http://{host}:8000/retrieve", f"opensearch+https://{host}:9200/i"):
            assert open_search(spec).cache is open_search(spec, "off").cache is None and open_search(spec, "on").cache, spec
    for host in ("8.8.8.8", "172.32.0.1", "172.15.0.1", "192.169.0.1", "11.0.0.1", "search.example.org", "local.example.org", "[2001:4860::1]", "x.locally"):
        for spec in (f"http://{host}:8000/retrieve", f"opensearch+https://{host}:9200/i"):
            assert open_search(spec).cache and open_search(spec, "off").cache is None, spec
    assert open_search("duckduckgo").cache and not open_search("duckduckgo", "off").cache
    assert not is_local("example.org.") and is_local("Node.LOCAL.") and not open_search(write(home / "c.jsonl", {"id": 1, "text": "x"}), "on").cache


def test_another_corpus_at_the_same_local_address_is_asked():
    corpus = [[]]
    with Server(lambda n, handler, body: as_json({"result": [[{"text": text} for text in corpus[0]]]})) as server:
        for texts in ([], ["A"], ["B"]):
            corpus[0] = texts
            assert [p.text for p in quick(server.url, "auto").search("Tavo")] == texts
        corpus[0] = []
        asked = quick(server.url, "on")
        assert asked.search("Tavo") == [] and not asked.search("Tavo").cached and len(server.seen) == 5, "nothing found is not kept"
        corpus[0] = ["C"]
        assert not asked.search("Tavo").cached and quick(server.url, "on").search("Tavo").cached and len(server.seen) == 6
    assert [p.text for p in quick(server.url, "only").search("Tavo")] == ["C"]


def test_cache_answers_again_offline_and_for_a_while(home, monkeypatch):
    with Server(lambda n, handler, body: hits(body) if n == 1 else (404, {}, b"")) as server:
        first = quick(server.url, "on").search_many(["a", "b"], 3)
        assert os.path.exists(home / "home" / "c.sqlite3") and not any(results.cached for results in first)
        second = quick(server.url, "on")
        again = second.search_many(["a", "b", "a"], 3)
        assert again == [*first, first[0]] and all(results.cached for results in again) and len(server.seen) == 1
        assert second.search("a", 2).error and second.search("c").error and len(server.seen) == 3, "another k or query is another question"
        assert quick(server.url + "/other", "on").search("a").error, "another back end too"
    offline = quick(server.url, "only")
    assert offline.search_many(["a", "zzz"], 3) == [first[0], []] and offline.search("zzz").error == "not in the cache" and offline.search("a").cached
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 86400)
    assert quick(server.url, "on").search("a") == first[0], "a clock that was put back"
    monkeypatch.setattr(time, "time", lambda: now() + 31 * 86400)
    assert quick(server.url, "only").search("a") == first[0], "a replay takes any age"
    assert quick(server.url, "on", tries=1).search("a").error, "too old, and the server is gone"
    with closing(sqlite3.connect(home / "home" / "c.sqlite3")) as db:
        assert db.execute("SELECT count(*) FROM answers").fetchone() == (0,), "what is too old is deleted"


@pytest.mark.parametrize("content", [None, b"", b"this is no database " * 500, "folder", "table"])
def test_cache_only_with_a_file_that_cannot_be_used(home, capfd, content):
    path = home / "c.sqlite3"
    if content == "folder":
        path.mkdir()
    elif content == "table":
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("CREATE TABLE answers (key TEXT)")
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(SearchError, match=r"the cache .*c\.sqlite3 cannot be used \("):
        open_search("duckduckgo", "only", str(path))
    assert content is not None or not path.exists(), "and none is made"
    assert capfd.readouterr().err == ""


def test_cache_only_that_is_damaged_while_it_is_used(home):
    path = home / "c.sqlite3"
    DiskCache(str(path), "duckduckgo").put({"q": Results([Passage("1", "t", "x")])}, 3)
    search = open_search("duckduckgo", "only", str(path))
    assert len(search.search("q")) == 1
    path.write_bytes(b"this is no database " * 500)
    assert search.search("q") == [] and "cannot be used" in search.search("q").error


def test_damaged_cache_is_said_once(home, capfd):
    (home / "c.sqlite3").write_bytes(b"this is no database " * 500)
    with Server(lambda n, handler, body: hits(body)) as server:
        for path in (home / "c.sqlite3", home):
            search = quick(server.url, "on", str(path))
            assert len(search.search("q")) == len(search.search("r")) == 3 and capfd.readouterr().err.count("cannot be used") == 1


def test_rows_of_an_older_cache_or_that_cannot_be_read(home):
    path = str(home / "c.sqlite3")
    cache, now = DiskCache(path, "s"), time.time()
    good = '[{"id": "1", "title": "T", "text": "Zoe\\u0301 <b>", "score": 1.0, "url": ""}]'  # the first version wrote a url, and no NFC
    with closing(sqlite3.connect(path)) as db, db:
        db.executemany("INSERT INTO answers VALUES (?, ?, ?)", [(f"s\n3\n{i}", now, text) for i, text in enumerate(
            [good, "[]", "", "{}", "[1]", "null", '[{"id": "1"}]', b"\xff", good[:-5]])])
    assert cache.get([str(i) for i in range(9)], 3) == {"0": [Passage("1", "T", "Zoé ‹b›", 1.0)]}


def test_cache_many_threads_on_one_file(home):
    path, n = str(home / "c.sqlite3"), 100 if LONG else 30
    barrier = threading.Barrier(n)
    with Server(lambda n, handler, body: hits(body)) as server:
        def work(i):
            barrier.wait()
            search = quick(server.url, "on", path, timeout=(20, 20), deadline=60)
            return [search.search(f"q{i}"), search.search("shared")]

        with ThreadPoolExecutor(n) as pool:
            found = list(pool.map(work, range(n)))
    replay = quick(server.url, "only", path)
    assert [replay.search(f"q{i}") for i in range(n)] == [mine for mine, _ in found] and all(mine for mine, _ in found)
    assert replay.search("shared") == found[0][1]
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",) and db.execute("SELECT count(*) FROM answers").fetchone() == (n + 1,)


def test_kill_while_the_cache_is_written(home):
    path = str(home / "c.sqlite3")
    code = """import sys
from search_tool import DiskCache, Results, Passage
cache, i = DiskCache(sys.argv[1], "spec"), int(sys.argv[2])
while True:
    cache.put({f"{i}-{j}": Results([Passage(str(i), "t", "x" * 3000)]) for j in range(20)}, 3)
    print(i, flush=True)
    i += 1"""
    last = [int(kill(code, path, 1_000_000 * attempt).split()[-1]) for attempt in range(30 if LONG else 3)]
    cache = DiskCache(path, "spec")
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        batches = Counter(key.split("\n")[2].split("-")[0] for key, in db.execute("SELECT key FROM answers"))
    assert set(batches.values()) == {20}, "a batch is there or not, never in part"
    for value in last:
        assert cache.get([f"{value}-7"], 3)[f"{value}-7"][0].text == "x" * 2000, "what was said to be written is there, and cleaned"


# A query never raises; the command line; the benchmark

def test_search_many_never_raises():
    rng, broken = random.Random(4), BM25([Passage("1", "t", "x")])
    broken.index = {**broken.index, "text": None}
    found = broken.search_many(["x", "y"])
    assert found[0] == [] and found[0].error and found[1].error is None, "a bad query fails alone"
    queries = ["".join(rng.choices(NASTY, k=rng.randrange(30))) for _ in range(300)] + [None, 5, b"bytes", "x" * 10**6, object()]
    bm25 = BM25(make_corpus(5, 50))
    assert len(bm25.search_many(queries)) == len(queries) and bm25.search_many([]) == []
    with Server(lambda n, handler, body: hits(body)) as server:
        assert all(results.error is None for results in quick(server.url, timeout=(5, 5)).search_many(queries))
    with Server(lambda *_: (200, {}, PAGE)) as server:
        assert all(results.error is None for results in duck(server).search_many(queries[:20]))
    with ThreadPoolExecutor(8) as pool:
        asked = [p.title for p in make_corpus(5, 50)] * 5
        assert list(pool.map(lambda q: BM25.search(bm25, q, 5), asked)) == BM25(make_corpus(5, 50)).search_many(asked, 5), "from many threads"


def test_command_line(home):
    spec = write(home / "c.jsonl", {"id": "1", "title": "Tavo", "text": "founded by Zoé 塔"}, {"id": "2", "title": "Other", "text": "text"})

    def run(*arguments, **environment):
        return subprocess.run([sys.executable, ROOT / "search_tool.py", *map(str, arguments)], capture_output=True, env={**os.environ, **environment})

    found = run("--search", spec, "who founded Tavo", PYTHONIOENCODING="utf-8")
    assert found.returncode == 0 and found.stdout.decode().startswith("1. Tavo  [1]") and "founded by Zoé 塔".encode() in found.stdout
    ascii_only = run("--search", spec, "who founded Tavo", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert ascii_only.returncode == 0 and b"founded by Zo? ?" in ascii_only.stdout
    assert run("--search", spec, "zzz").returncode == 1
    for arguments in (("--search", "bm25:/no/such", "q"), ("--search", "http://127.0.0.1:9/x", "--search_cache", "only", "q"), ("q",)):
        failed = run(*arguments)
        assert failed.returncode == 2 and failed.stderr.strip() and b"Traceback" not in failed.stderr


@pytest.mark.skipif(not LONG, reason="IGPO_LONG is not set")
@pytest.mark.parametrize("start", [["-m", "benchmarks.search"], ["benchmarks/search.py"]])
def test_the_benchmark_in_small(home, start):
    subprocess.run([sys.executable, *start, "--passages", "300", "--queries", "100", "--turns", "1", "--out", home / "b.md"], cwd=ROOT, check=True)
    assert "| rank QPS |" in (home / "b.md").read_text() and sorted(path.name for path in home.iterdir()) == ["b.md"]
