"""tools/data.py: layouts that are read, what is refused and where, the hub (one of our own), folders to train on."""
import doctest
import gzip
import hashlib
import json
import random
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import close_session, constants

import tools.data as data
from igpo import UserError
from search_tool import load_questions, read_passages

ROOT = Path(data.__file__).parent.parent


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(path, rows):
    path.write_bytes(json.dumps(rows, indent=1).encode() if path.suffix == ".json" else jsonl(rows))
    return str(path)


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_docstring_examples():
    results = doctest.testmod(data)
    assert results.attempted >= 8 and results.failed == 0


# ---- layouts ---------------------------------------------------------------------------------------------------------

CONTEXT = {"title": ["Tavo", "Bo Lund"],
           "sentences": [["Tavo is a town."], ["Bo Lund led it.", " He was born in Yardby."]]}
PARAGRAPHS = [{"idx": 0, "title": "Tavo", "paragraph_text": "A town.", "is_supporting": False},
              {"idx": 1, "title": "Bo", "paragraph_text": "Born in Yardby.", "is_supporting": True}]
LAYOUTS = {     # rows as they stand in the file, and as they must be read
    "ours.jsonl": (
        [{"id": "a", "question": " Who? ", "answers": ["Ann"], "supporting": ["p1", "p2"], "hops": 2, "type": "x"},
         {"id": 7, "question": "Who?", "answers": "Ann"}, {"question": "Who?", "answers": ["Ann"], "supporting": []}],
        [{"id": "a", "question": "Who?", "answers": ["Ann"], "supporting": ["p1", "p2"], "hops": 2},
         {"id": "7", "question": "Who?", "answers": ["Ann"]}, {"id": "3", "question": "Who?", "answers": ["Ann"]}]),
    "flashrag.jsonl": (
        [{"id": "test_0", "question": "Who?", "golden_answers": ["Ann"], "metadata": {
            "supporting_facts": {"title": ["T", "T", "U"], "sent_id": [0, 1, 0]}}},
         {"id": "test_1", "question": "When?", "golden_answers": ["1999"], "metadata": {"question_decomposition": [
             {"support_paragraph": {"title": "V"}}, {"support_paragraph": None}, {"id": 3}]}},
         {"id": "test_2", "question": "Where?", "golden_answers": ["Here"], "metadata": {}}],
        [{"id": "test_0", "question": "Who?", "answers": ["Ann"], "supporting": ["T", "U"]},
         {"id": "test_1", "question": "When?", "answers": ["1999"], "supporting": ["V"]},
         {"id": "test_2", "question": "Where?", "answers": ["Here"]}]),
    "hotpot.json": (
        [{"_id": "h1", "question": "Who?", "answer": "Ann Lee", "supporting_facts": [["Ann", 0], ["Bo", 2], ["Ann", 1]],
          "context": [["Ann", ["x"]]], "type": "bridge"}, {"question": "When?", "answers": "1999"}],
        [{"id": "h1", "question": "Who?", "answers": ["Ann Lee"], "supporting": ["Ann", "Bo"]},
         {"id": "2", "question": "When?", "answers": ["1999"]}]),
    "2wiki.json": (      # the hub's copy keeps facts and context as JSON in a text
        [{"id": "w", "question": "Who?", "answer": "Ann", "supporting_facts": '[["T", 0], ["U", 1]]',
          "context": '[["T", ["t"]]]'},
         {"id": "v", "question": "Who?", "answer": "Ann", "supporting_facts": ["T", "U"]}],
        [{"id": "w", "question": "Who?", "answers": ["Ann"], "supporting": ["T", "U"]},
         {"id": "v", "question": "Who?", "answers": ["Ann"], "supporting": ["T", "U"]}]),
    "musique.jsonl": (
        [{"id": "2hop__1", "question": "Where?", "answer": "Yardby", "answer_aliases": ["Yard", "Yardby"],
          "answerable": True, "paragraphs": PARAGRAPHS,
          "question_decomposition": [{"id": 1, "paragraph_support_idx": 1}]},
         {"id": "2hop__2", "question": "Who?", "answer": "Bo", "answerable": False, "paragraphs": []}],
        [{"id": "2hop__1", "question": "Where?", "answers": ["Yardby", "Yard"], "supporting": ["Bo"]}]),
    "official.jsonl": (      # as the parquet, in which IGPO's own data come
        [{"data_source": "nq", "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "Who?"}],
          "reward_model": {"ground_truth": "Ann<|answer_split|>Anna Lee", "style": "rule"}, "extra_info": {"index": 4}}],
        [{"id": "4", "question": "Who?", "answers": ["Ann", "Anna Lee"], "data_source": "nq"}]),
    "searchr1.jsonl": (
        [{"id": "t0", "question": "who leads Tavo?", "golden_answers": ["Mira Oss", "M. Oss"], "data_source": "nq",
          "prompt": [{"role": "user", "content": "Reason in <think> and </think>. Question: who leads Tavo?"}],
          "reward_model": {"style": "rule", "ground_truth": {"target": ["Mira Oss", "M. Oss"]}}, "metadata": None},
         {"id": "t1", "question": "who?", "data_source": "nq", "reward_model": {"ground_truth": {"target": ["Ann"]}}}],
        [{"id": "t0", "question": "who leads Tavo?", "answers": ["Mira Oss", "M. Oss"], "data_source": "nq"},
         {"id": "t1", "question": "who?", "answers": ["Ann"], "data_source": "nq"}]),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("form", ["plain", "byte order mark", "packed"])
def test_reads_layout(tmp_path, name, form):
    rows, expected = LAYOUTS[name]
    path = Path(write(tmp_path / name, rows))
    if form == "byte order mark":
        path.write_bytes(b"\xef\xbb\xbf\n" + path.read_bytes())
    if form == "packed":
        path = path.with_name(f"{name}.gz")
        path.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    assert data.read_questions(path) == data.read_benchmark(str(path)) == expected


@pytest.mark.parametrize("name", ["official.jsonl", "searchr1.jsonl", "2wiki.json"])
def test_reads_parquet(tmp_path, name):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow
    rows, expected = LAYOUTS[name]
    parquet.write_table(pyarrow.Table.from_pylist(rows[:1]), tmp_path / "x.parquet")
    assert data.read_questions(tmp_path / "x.parquet") == expected[:1]
    parquet.write_table(pyarrow.Table.from_pylist([{"question": "Who?", "answers": [1]}]), tmp_path / "y.parquet")
    with pytest.raises(UserError, match=r'y.parquet:1: field "answers" holds 1'):
        data.read_questions(tmp_path / "y.parquet")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        data.read_questions(tmp_path / "x.parquet")
    row = {"question": "Who?", "reward_model": {"ground_truth": {"target": np.array(["Ann", "Bo"], dtype=object)}},
           "supporting_facts": {"title": np.array(["T"], dtype=object), "sent_id": np.array([0])}}      # as pandas has it
    found = {"id": "3", "question": "Who?", "answers": ["Ann", "Bo"], "supporting": ["T"]}
    assert data.plain_question(row, 3) == found


@pytest.mark.parametrize("answers, expected", [
    ("Ann", ["Ann"]), (["Ann", "Bo"], ["Ann", "Bo"]), ({"text": ["Ann"], "answer_start": [3]}, ["Ann"]),
    ({"text": "Ann"}, ["Ann"]),
    ({"value": "Ann", "aliases": ["Anna"], "matched_wiki_entity_name": ""}, ["Ann", "Anna"]),
    ({"value": "Ann", "aliases": []}, ["Ann"]),
    ({"target": ["Ann"]}, ["Ann"]), ('["Ann", "Bo"]', ["Ann", "Bo"]), ('{"target": ["Ann"]}', ["Ann"]),
    ("1984", ["1984"]),
    ("[sic]", ["[sic]"]), ("true", ["true"]), ("null", ["null"]), ("[1984]", ["[1984]"]), ("{x}", ["{x}"]),
    ('"Heroes"', ['"Heroes"']),
    (["Ann", ""], ["Ann"]), (["  Ann ", "Ann"], ["Ann"]), ("a<|answer_split|>b", ["a", "b"])])
def test_answers(tmp_path, answers, expected):
    path = write(tmp_path / "q.jsonl", [{"question": "Who?", "answers": answers}])
    assert data.read_questions(path)[0]["answers"] == expected


@pytest.mark.parametrize("change, message", [       # of {"question": "Who?", "answers": "a"}; None: the field is missing
    ({"answers": None}, '"answers" is missing'), ({"answers": [None]}, '"answers" is missing'),
    ({"answers": float("nan")}, '"answers" holds nan'), ({"answers": 1984}, '"answers" holds 1984 .int.*quotes'),
    ({"answers": ["a", 3]}, '"answers" holds 3'), ({"answers": True}, '"answers" holds True'),
    ({"answers": [["a"]]}, r'"answers" holds \[.a.\]'), ({"answers": [{"text": "a"}]}, '"answers" holds'),
    ({"answers": {"x": "a"}}, '"answers" holds'), ({"answers": {"text": {"text": "a"}}}, '"answers" holds'),
    ({"answers": {"value": 3}}, '"answers.value" holds 3'), ({"answers": "['a', 'b']"}, '"answers" holds a list as a text'),
    ({"answers": ["{'target': array(['a'])}"]}, "write JSON"), ({"answers": '["a", 3]'}, "holds a list as a text"),
    ({"answers": ["", " "]}, '"answers" is empty'), ({"answers": ["\ud800"]}, "surrogate"),
    ({"answer_aliases": [3]}, '"answer_aliases" holds 3'), ({"question": "\udc00?"}, '"question" holds half a surrogate'),
    ({"question": " "}, '"question" is empty'), ({"question": ["Who?"]}, '"question" holds'),
    ({"question": 3}, '"question" holds 3'), ({"question": None}, '"question" is missing'),
    ({"question": None, "prompt": [{"role": "user", "content": "Use <think>. Who?"}]}, 'Add a field "question"'),
    ({"supporting": "p1"}, '"supporting" holds'), ({"supporting": [1]}, '"supporting" holds 1'),
    ({"supporting_facts": [["T", "U"]]}, '"supporting_facts" holds'),
    ({"supporting_facts": {"title": [None]}}, '"supporting_facts" is missing'),
    ({"paragraphs": [{"title": "T", "paragraph_text": "x", "is_supporting": "yes"}]}, '"paragraphs" holds'),
    ({"id": 1.5}, '"id" holds 1.5'), ({"id": True}, '"id" holds True'), ({"hops": "2"}, '"hops" holds'),
    ({"data_source": 3}, '"data_source" holds 3'), (3, "3 is no object"), (["Who?", "a"], "is no object")])
def test_refuses_field_and_line(tmp_path, change, message):
    good = {"question": "Who?", "answers": "a"}
    row = {**good, **change} if isinstance(change, dict) else change
    with pytest.raises(UserError, match=rf"q.jsonl:3: .*{message}") as e:
        data.read_questions(write(tmp_path / "q.jsonl", [good, good, row]))
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match=rf"q.json:[1-9]\d*: question 2: .*{message}"):
        data.read_questions(write(tmp_path / "q.json", [good, row]))


GOOD = '{"question": "Who?", "answers": "a"}'


@pytest.mark.parametrize("name, text, message", [
    ("x.json", "[{", "x.json:1: not JSON"), ("x.json", "[]", "no questions"), ("x.jsonl", "", "no questions"),
    ("x.jsonl", "\n \n", "no questions"), ("x.json", f"[{GOOD},\n", "x.json:1: not JSON"),
    ("x.json", f'[\n{GOOD},\n{{"question": "Who?"}}\n]', r'x.json:3: question 2: field "answers" is missing'),
    ("x.json", f"[\n{GOOD}\n{GOOD}]", "x.json:2: not JSON .neither a comma"),
    ("x.json", f'[{GOOD},\n\n{{"question" "Who?"}}]', "x.json:3: not JSON .Expecting ':'"),
    ("x.json", f"[{GOOD}] x", "x.json:1: not JSON .more follows"),
    ("x.json", '[\n{"question": "Who?", "answer": "a", "answer": "b"}]', "x.json:2: .*key 'answer' stands twice"),
    ("x.json", "\n" + "[" * 100_000, "x.json:2: not JSON"), ("x.jsonl", '{"a": ' + "[" * 100_000, "x.jsonl:1: not JSON"),
    ("x.jsonl", f'{GOOD}\n{{"question"', "x.jsonl:2: not JSON"), ("x.jsonl", f"{GOOD}\n[{GOOD}]", "x.jsonl:2: .*no object"),
    ("x.jsonl", f'\n{GOOD[:-1]}, "question": "When?"}}', "x.jsonl:2: .*key 'question' stands twice"),
    ("x.jsonl", f'{GOOD[:-1]}, "metadata": {{"a": 1, "a": 2}}}}', "x.jsonl:1: .*key 'a' stands twice"),
    ("x.jsonl", f"{GOOD} {GOOD}", "x.jsonl:1: not JSON .more follows"),
    ("x.jsonl", f'{GOOD[:-1]}, "n": {"9" * 5000}}}', "x.jsonl:1: not JSON"),
    ("x.jsonl", "question,answer\nWho?,a\n", "x.jsonl:1: not JSON"), ("x.jsonl.gz", "not packed", "cannot be read"),
    ("x.parquet", "no parquet", "parquet"), (None, "", "neither a file nor one of demo, nq")])
def test_refuses_file_in_one_line(tmp_path, name, text, message):
    if name:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as e:
        data.read_benchmark(str(tmp_path / (name or "nothing.jsonl")))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("encoding, text", [
    ("latin1", "Zoé Müller"), ("gbk", "塔沃桥"), ("utf-16", "Zoe"), ("utf-16-le", "Zoe"), ("utf-32", "Zoe")])
@pytest.mark.parametrize("name", ["q.jsonl", "q.json", "q.jsonl.gz"])
def test_refuses_what_is_not_utf8(tmp_path, encoding, text, name):
    rows = ['{"question": "Who?", "answers": ["Ann"]}', f'{{"question": "Who?", "answers": ["{text}"]}}']
    text = "[\n" + ",\n".join(rows) + "]" if name == "q.json" else "\n".join(rows)
    raw = text.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    line = 1 if encoding.startswith("utf") else 3 if name == "q.json" else 2
    with pytest.raises(UserError, match=rf"{name}:{line}: not UTF-8.*iconv -f LATIN1 -t UTF-8 \S*{name}"):
        data.read_questions(tmp_path / name)


def test_whatever_stands_in_a_field_is_texts_or_refused():
    rng, refused = random.Random(0), 0
    keys = ["title", "text", "value", "aliases", "target", "sentences", "content", "support_paragraph", "is_supporting",
            "role", "index"]
    fields = ["id", "question", "answers", "answer", "golden_answers", "answer_aliases", "supporting", "supporting_facts",
              "metadata", "hops", "paragraphs", "context", "question_decomposition", "prompt", "reward_model",
              "extra_info", "data_source"]

    def anything(depth):
        plain = ["a", "", "[", '["a"]', '{"title": ["a"]}', "user", 0, 1, -2.5, True, None, float("nan"), [], {}]
        if depth == 0 or rng.random() < 0.4:
            return rng.choice(plain)
        if rng.random() < 0.5:
            return [anything(depth - 1) for _ in range(rng.randint(0, 2))]
        return {rng.choice(keys + fields): anything(depth - 1) for _ in range(2)}

    for _ in range(1500):
        row = {"question": "Who?", "answers": ["a"], **{rng.choice(fields): anything(3) for _ in range(3)}}
        for read in (lambda: data.plain_question(row, 1), lambda: data.passages_of(row)):
            try:
                found = read()
            except ValueError as e:
                assert str(e).startswith('field "') and "\n" not in str(e)
                refused += 1
                continue
            if isinstance(found, dict):
                assert all(isinstance(found[name], str) for name in ("id", "question")) and any(found["answers"])
                assert all(isinstance(text, str) for text in found["answers"] + found.get("supporting", []))
            else:
                assert all(isinstance(part, str) for title, text, _ in found for part in (title, text))
    assert 500 < refused < 1500


def test_what_is_left_out_is_counted(tmp_path, capsys):
    rows = [{"question": "Who?", "answers": ["Ann", ""]}, {"question": "Who?", "answers": "a", "answerable": False}] * 2
    assert len(data.read_questions(write(tmp_path / "q.jsonl", rows))) == 2
    out = capsys.readouterr().out
    assert "2 questions marked unanswerable" in out and "2 empty answers" in out


def test_ids_name_one_question_and_the_sample_is_reproducible(tmp_path):
    path = write(tmp_path / "q.jsonl", [{"id": k % 40, "question": f"q{k}", "answers": ["a"]} for k in range(50)])
    rows = data.read_benchmark(path)
    assert len({row["id"] for row in rows}) == 50 and rows[40]["id"] == "0#2"
    clash = [{"id": name, "question": "q", "answers": "a"} for name in ("0", "0#2", "0", "0")]
    assert [row["id"] for row in data.read_questions(write(tmp_path / "c.jsonl", clash))] == ["0", "0#2", "0#3", "0#4"]
    some = data.load_benchmark(path, limit=10, seed=0)
    assert len(some) == 10 and some == data.load_benchmark(path, limit=10, seed=0)
    assert some != data.load_benchmark(path, limit=10, seed=1)
    assert [rows.index(row) for row in some] == sorted(rows.index(row) for row in some)
    assert data.load_benchmark(path, limit=99) == rows == data.load_benchmark(path)


def test_demo_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(data.load_benchmark("demo", limit=3)) == 3


@pytest.mark.parametrize("row, expected", [
    ({"context": [["Ann", ["A cat. ", "Naps."]], ["Bo", "A dog."]]}, [("Ann", "A cat. Naps.", None),
    ("Bo", "A dog.", None)]),
    ({"metadata": {"context": CONTEXT}}, [("Tavo", "Tavo is a town.", None),
    ("Bo Lund", "Bo Lund led it. He was born in Yardby.", None)]),
    ({"metadata": {"context": {"title": ["T"], "content": [["x.", "y."]]}}}, [("T", "x. y.", None)]),
    ({"context": '[["T", ["x."]]]'}, [("T", "x.", None)]),
    ({"paragraphs": PARAGRAPHS}, [("Tavo", "A town.", False), ("Bo", "Born in Yardby.", True)]),
    ({"title": "T", "context": "One paragraph."}, [("T", "One paragraph.", None)]),
    ({"question": "Who?", "metadata": None}, [])])
def test_passages_of_a_row(row, expected):
    assert data.passages_of(row) == expected


@pytest.mark.parametrize("row, message", [
    ({"context": {"title": ["T", "U"], "sentences": [["x"]]}}, "more titles"),
    ({"context": [["T", [3]]]}, '"context.text" holds 3'),
    ({"context": [[None, ["x"]]]}, '"context.title" is missing'),
    ({"paragraphs": ["x"]}, '"paragraphs" holds'), ({"context": 3}, '"context" holds 3'),
    ({"context": {"title": ["T"]}}, '"context.sentences" holds')])
def test_passages_are_refused_by_field(row, message):
    with pytest.raises(ValueError, match=message):
        data.passages_of(row)


# ---- the hub ---------------------------------------------------------------------------------------------------------

class Hub(BaseHTTPRequestHandler):
    """The hub as its library sees it: HEAD tells commit, version and size, GET sends the file or its rest.

    `script` holds one behaviour for each download, then all goes well.
    """
    files: dict = {}
    script: list = []
    log: list = []

    def do_HEAD(self):
        self.do_GET(body_wanted=False)

    def do_GET(self, body_wanted=True):
        body, act = self.files.get(self.path), self.script[0] if self.script else ""
        if body_wanted and self.script:
            self.script.pop(0)
        if self.path.startswith("/datasets/"):
            self.log.append((self.command, self.path, self.headers.get("Range"), self.headers.get("Authorization")))
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        code = act if isinstance(act, int) else 404 if body is None else 206 if start else 200
        self.send_response(code)
        self.send_header("X-Repo-Commit", "c" * 40)
        if code >= 400:
            self.send_header("X-Error-Code", {404: "EntryNotFound"}.get(code, ""))
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_header("ETag", '"' + hashlib.sha256(body).hexdigest() + '"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body) - start + 5 * (act == "wrong size" and not body_wanted)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        if body_wanted:
            self.wfile.write(body[start:start + 5000] if act == "cut" else body[start:])
            self.close_connection = act == "cut"

    def log_message(self, *args):
        pass


def flashrag(split, k):
    """A row of FlashRAG's HotpotQA of our own: the answer is in a passage that its title tells."""
    name = f"{split} {k}"
    return {"id": f"{split}_{k}", "question": f"Who built bridge {name}?", "golden_answers": [f"Mira {name}"], "metadata": {
        "type": "bridge", "supporting_facts": {"title": [f"Bridge {name}"], "sent_id": [0]},
        "context": {"title": [f"Bridge {name}", "River"], "sentences": [
            [f"Bridge {name} was built by Mira {name}.", " It is long."], ["A  river runs here."]]}}}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name, value in {"HF_ENDPOINT": address, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0",
                        "TRANSFORMERS_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_TOKEN": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", address)                 # these were read when the library was imported
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    close_session()
    base = "/datasets/RUC-NLPIR/FlashRAG_datasets/resolve/main"
    lines = {split: jsonl(flashrag(split, k) for k in range(30)) for split in ("train", "dev")}
    Hub.files = {f"{base}/hotpotqa/train.jsonl": lines["train"], f"{base}/hotpotqa/dev.jsonl": lines["dev"],
                 f"{base}/nq/test.jsonl": lines["dev"], f"{base}/nq/dev.jsonl": lines["train"]}
    wiki = [flashrag("wiki", k) for k in range(8)]
    for row in wiki:
        row["metadata"]["context"] = {"title": ["Tavo"], "content": [["Built by", row["golden_answers"][0]]]}
    Hub.files[f"{base}/2wikimultihopqa/train.jsonl"] = jsonl(wiki)
    Hub.script, Hub.log = [], []
    yield Hub
    server.shutdown()
    server.server_close()
    close_session()


def test_download_takes_test_else_dev_and_keeps_it(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert [row["id"] for row in data.load_benchmark("hotpotqa")][:2] == ["dev_0", "dev_1"]
    assert [(method, path.rpartition("/")[2]) for method, path, _, _ in hub.log] == [
        ("HEAD", "test.jsonl"), ("HEAD", "dev.jsonl"), ("GET", "dev.jsonl")]                   # there is no test split: dev
    assert all(token == "Bearer secret" for _, _, _, token in hub.log)
    assert data.load_benchmark("hotpotqa", "train")[5]["id"] == "train_5"
    asked = len(hub.log)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert len(data.load_benchmark("hotpotqa")) == 30 and len(hub.log) == asked      # from the cache alone
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        data.load_benchmark("nq")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert data.fetch("nq", "dev").name == "dev.jsonl"
    assert data.fetch("nq", "test").name == "test.jsonl"    # though dev is at hand
    with pytest.raises(UserError, match="nq has no train split"):
        data.load_benchmark("nq", "train")


def test_a_cut_download_goes_on_where_it_was_cut(hub):
    hub.script[:] = ["cut", "cut"]
    assert data.fetch("nq", "test").read_bytes() == next(body for name, body in hub.files.items() if "nq/test" in name)
    assert [asked for method, _, asked, _ in hub.log if method == "GET"] == [None, "bytes=5000-", "bytes=10000-"]


@pytest.mark.parametrize("script, message", [
    (["wrong size"], "nq/test.jsonl: could not be downloaded .Consistency check failed"),
    ([401] * 3, "HTTP 401.*HF_TOKEN"), ([403] * 3, "HTTP 403.*HF_TOKEN"),
    ([500] * 20, "HTTP 500.*Run again")])
def test_a_failed_download_is_one_line(hub, script, message):
    hub.script[:] = script
    with pytest.raises(UserError, match=message) as e:
        data.load_benchmark("nq")
    assert "\n" not in str(e.value) and "give its path" in str(e.value)
    hub.script[:] = []
    assert len(data.load_benchmark("nq")) == 30         # nothing half done is left


def test_no_hub_is_one_line(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    with pytest.raises(UserError, match="could not be downloaded") as e:
        data.fetch("nq", "test")
    assert "\n" not in str(e.value)


# ---- folders to train on ---------------------------------------------------------------------------------------------

def test_makes_a_folder_from_the_hub(hub, tmp_path, capsys):
    twice = dict(flashrag("dev", 3), id="train_x", question="who built  BRIDGE dev 3")      # a dev question in train
    train = next(name for name in hub.files if "hotpotqa/train" in name)
    hub.files[train] += jsonl([twice])
    out = tmp_path / "made"
    assert data.main(["hotpotqa", "--out", str(out), "--dev", "5"]) == 0
    said = capsys.readouterr().out
    assert f"{out}: 30 training questions, 5 dev questions, 61 passages.\nLeft out: also a dev question: 1.\n" in said
    assert "first 3 passages for 5 of 5 dev questions (100%)" in said
    assert said.endswith(f"Train: python igpo.py --model Qwen2.5-1.5B-Instruct --data {out}\n")
    corpus, rows, dev = (read_lines(out / f"{name}.jsonl") for name in ("corpus", "train", "dev"))
    assert corpus[:2] == [
        {"id": "p1", "title": "Bridge train 0", "text": "Bridge train 0 was built by Mira train 0. It is long."},
        {"id": "p2", "title": "River", "text": "A  river runs here."}]          # the river stands there once
    assert rows[1] == {"id": "train_1", "question": "Who built bridge train 1?", "answers": ["Mira train 1"],
                       "supporting": ["p3"], "data_source": "hotpotqa"}
    assert [q["id"] for q in dev] == [q["id"] for q in data.sample(data.read_benchmark("hotpotqa"), 5, 0)]
    title = {p.id: p.title for p in read_passages(out / "corpus.jsonl")}
    assert [title[q["supporting"][0]] for q in dev] == [f"Bridge dev {q['id'][4:]}" for q in dev]
    assert data.read_questions(out / "train.jsonl") == rows

    assert data.main(["hotpotqa", "--out", str(out)]) == 2 and "exists" in capsys.readouterr().err
    assert data.main(["hotpotqa", "--out", str(out), "--overwrite", "--dev", "5", "--limit", "7"]) == 0
    said = capsys.readouterr().out
    assert "7 training questions, 5 dev questions, 13 passages, those of the questions drawn alone." in said
    assert read_lines(out / "train.jsonl") == data.sample(rows, 7, 0) and len(read_lines(out / "corpus.jsonl")) == 13
    assert not list(out.glob("*.part"))


def test_makes_one_folder_of_several(hub, tmp_path, monkeypatch, capsys):
    for split in ("train", "dev"):
        hub.files[f"/datasets/dgslibisey/MuSiQue/resolve/main/musique_ans_v1.0_{split}.jsonl"] = jsonl(
            {"id": f"train_{k}", "question": f"{split}: where was Bo {k} born?", "answer": "Yardby", "answer_aliases": [],
             "answerable": True, "paragraphs": [
                {"title": "Bo", "paragraph_text": f"Bo {k} lived.", "is_supporting": False},
                {"title": "Bo", "paragraph_text": f"Bo {k}: Yardby.", "is_supporting": True}]} for k in range(6))
    monkeypatch.chdir(tmp_path)
    assert data.main(["musique", "2wikimultihopqa", "--dev", "5"]) == 0
    out = tmp_path / "data" / "musique+2wikimultihopqa"
    train, dev, corpus = (read_lines(out / f"{name}.jsonl") for name in ("train", "dev", "corpus"))
    assert "--data data/musique+2wikimultihopqa" in capsys.readouterr().out
    # 2 of MuSiQue's dev split; 2Wiki here has none: 3 of its 8 training questions
    assert [q["data_source"] for q in dev] == ["musique"] * 2 + ["2wikimultihopqa"] * 3 and len(train) == 6 + 5
    assert len({q["id"] for q in train + dev}) == 16 and len(corpus) == 12 + 8     # train and dev share theirs
    assert train[0]["supporting"] == ["p2"] and corpus[1] == {"id": "p2", "title": "Bo", "text": "Bo 0: Yardby."}
    assert corpus[12]["text"] == "Built by Mira wiki 0"


def local(k, **other):
    return {"_id": f"h{k}", "question": f"Who built bridge {k}?", "answer": f"Mira {k}", "supporting_facts": [["Tavo", 0]],
            "context": [["Tavo", [f"The bridge {k} is by Mira {k}."]], ["River", ["It is long."]]], **other}


def test_what_is_left_out_of_a_folder(tmp_path, capsys):
    rows = [local(0), local(1), local(2), local(3), local(1, _id="again", question="who built  Bridge 1"),
            local(4, answer="Nobody"), local(5, answer="yes"), local(6, question="Who? " * 201),
            local(7, answer="x" * 201), local(8, context=[]),
            local(9, context=[["Tavo", [" "]], ["T", ["Mira 9"]]], supporting_facts=[["Nowhere", 0]])]
    path = write(tmp_path / "my.json", rows)
    assert data.main([path, "--out", str(tmp_path / "o"), "--dev", "2"]) == 0
    said = capsys.readouterr().out
    # kept: 0, 1, 2, 3, 5 and 9; passages: Tavo of 0 to 7, the river, T
    assert "4 training questions, 2 dev questions, 10 passages." in said
    assert "Yes/no questions, which no passage need answer: 1." in said and "also a dev question" not in said
    for reason in ("asked twice: 1", "no answer in the passages: 1", "question or answer too long: 2",
                   "questions without passages: 1", "supporting titles without passage: 2", "passages without text: 1"):
        assert reason in said
    names = [question["id"] for name in ("train", "dev") for question in read_lines(tmp_path / "o" / f"{name}.jsonl")]
    assert sorted(names) == ["h0", "h1", "h2", "h3", "h5", "h9"]


def test_questions_alone(tmp_path, capsys):
    """Search-R1's layout, without passages, becomes a folder for a search of the user's own."""
    rows = [{"id": f"t{k}", "question": f"Who leads town {k}?", "golden_answers": ["Mira Oss"],
             "prompt": [{"role": "user", "content": "Answer the given question."}],
             "reward_model": {"ground_truth": {"target": ["Mira Oss"]}, "style": "rule"}} for k in range(4)]
    path = write(tmp_path / "sr1.jsonl", [*rows, rows[0], {"question": "q" * 2000, "answers": ["a"]}])
    assert data.main([path, "--out", str(tmp_path / "o"), "--dev", "1", "--no_corpus"]) == 0
    said = capsys.readouterr().out
    assert "3 training questions, 1 dev questions" in said and "--search bm25:CORPUS.jsonl" in said
    assert "asked twice: 1" in said and "question or answer too long: 1" in said
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["dev.jsonl", "train.jsonl"]
    some = load_questions(tmp_path / "o/train.jsonl") + load_questions(tmp_path / "o/dev.jsonl")
    assert sorted((q["question"], *q["answers"]) for q in some) == [(r["question"], "Mira Oss") for r in rows]


@pytest.mark.parametrize("arguments, message", [
    (["nq"], "nq carries no passages. .*--search.*--no_corpus"),
    (["nothing.jsonl"], "neither a file nor one of hotpotqa, 2wiki"),
    (["ours.jsonl"], "questions without passages: 4.*--search"), (["one.json"], "too few questions"),
    (["bad.json"], r'bad.json:.*question 2: field "context.text"'),
    (["my.json", "--dev", "0"], "--dev 1 or more"), (["my.json", "--limit", "-1"], "--limit must be"),
    (["my.json", "--out", "."], "exists"),
    (["my.json", "--out", "my.json/x"], "my.json/x")])
def test_a_folder_is_refused_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "ours.jsonl", [{"question": f"q{k}", "answers": ["a"]} for k in range(4)])
    write(tmp_path / "my.json", [local(k) for k in range(4)])
    write(tmp_path / "one.json", [local(0)])
    write(tmp_path / "bad.json", [local(0), local(1, context=[["T", [None]]])])
    before = sorted(tmp_path.iterdir())
    assert data.main(arguments) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1 and sorted(tmp_path.iterdir()) == before


def test_share_of_questions_that_bm25_answers(tmp_path, capsys):
    texts = ["tavo bridge by Mira", *(f"old mill {k}" for k in range(11)), "Zed lives here", *["green door"] * 4,
             "Kay has a green door and " + "much more " * 20]
    write(tmp_path / "corpus.jsonl", [{"id": str(k), "title": "", "text": text} for k, text in enumerate(texts)])
    asked = {"tavo bridge?": "Mira", "old mill?": "Zed", "green door?": "Kay", "is it?": "yes"}     # found first, never, fifth
    data.show_recall([{"question": q, "answers": [a]} for q, a in asked.items()], tmp_path / "corpus.jsonl")
    first, second = capsys.readouterr().out.splitlines()
    assert "first 3 passages for 1 of 3 dev questions (33%)" in first
    assert "first 10 passages for 2 of 3 dev questions (67%)" in second


def test_as_a_program(hub, tmp_path):
    hub.script[:] = ["cut"]
    run = subprocess.run([sys.executable, "-m", "tools.data", "hotpotqa", "--dev", "3", "--out", str(tmp_path / "o")],
                         cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and "30 training questions, 3 dev questions, 61 passages" in run.stdout, run.stderr
    assert "Traceback" not in run.stderr and len(read_lines(tmp_path / "o" / "train.jsonl")) == 30
