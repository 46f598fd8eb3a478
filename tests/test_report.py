"""tools/report.py: tables, pages, transcripts and curves, worked by hand. In a browser with IGPO_LONG set."""
import base64
import hashlib
import html
import json
import math
import re
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

import tools.report as report
from search_tool import exact_match, f1_score
from tests.common import LONG
from tools.metrics import markdown_table, summarise

EVIL = ("</script><script>document.title='pwned'</script><img src=http://127.0.0.1:9/x "
        "onerror=\"document.title='pwned'\"><svg onload=alert(1)> \u2028 & &lt;b&gt;")


def line(**changes):
    """A rollout with two searches: one finds p1, one fails. Supporting are p1 and the page titled Two."""
    passage = {"id": "p1", "title": "One", "text": "x", "score": 1.0}
    search = {"text": "t </think><search> q </search>", "query": "q", "error": None, "cached": False,
              "passages": [passage], "gain": 0.5, "advantage": None}
    failed = {**search, "passages": [], "error": "down", "gain": -0.25}
    answer = "t </think><answer> red fox </answer>"
    last = {**failed, "text": answer, "query": None, "error": None, "gain": None}
    return {"benchmark": "b", "sample": 0, "id": "1", "question": "Who?", "answers": ["the red fox"],
            "supporting": ["p1", "Two"], "f1": 0.8, "em": 0.0, "answer": "red fox", "stop": "answer",
            "outcome": None, "beliefs": [-2.0, -1.5, -1.75], "policy_tokens": 30,
            "turns": [search, failed, last], **changes}


def many(n):
    """n rollouts, every third one right; gains +0.50 and -0.25; the texts and names are hostile."""
    rows = []
    for k in range(n):
        answer = "the red fox" if k % 3 == 0 else f"cat {EVIL}"
        row = line(id=f"q{k}", question=f"Question {k}? {EVIL}", answer=answer, benchmark=f"b{k % 2}",
                   beliefs=[-2.0, -1.5, math.nan if k == 1 else -1.75])
        row |= {"f1": f1_score(answer, row["answers"]), "em": exact_match(answer, row["answers"])}
        row["turns"][0] |= {"text": f" think {EVIL} </think><search> needle{k} </search>", "cached": True,
                            "passages": [{"id": "p1", "title": f"One {EVIL}", "text": EVIL, "score": 1.0}]}
        row["turns"][1]["error"] = None
        rows.append(row)
    return rows


def write_lines(folder, rows, config=None):
    folder.mkdir(exist_ok=True)
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def run(capsys, *argv):
    code = report.main([str(a) for a in argv])
    out = capsys.readouterr()
    return code, out.out, out.err


def page_data(path):
    page = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


# ---- tables ------------------------------------------------------------------------------------------------

def test_tables_by_hand():
    rows = [line(), line(id="2", answer="cat", f1=0.0)]
    (_, scores), (_, behaviour) = report.tables(summarise(rows))
    assert scores[0] == ["", "Questions", "F1", "EM", "F1 SQuAD", "EM SQuAD", "cover-EM"]
    assert scores[1] == ["b", "2", "40.0 [0.0, 80.0]", "0.0 [0.0, 0.0]", *["50.0 [0.0, 100.0]"] * 3]
    found = dict(zip(*behaviour))
    assert (found["Turns"], found["Tokens"], found["Failed searches"]) == ("3.00", "30", "50.0")
    assert (found["Recall"], found["Belief before"], found["Entropy reduction"]) == ("50.0", "-2.00", "0.25")
    assert "Cached searches" not in found       # none were: nothing to say
    rows[0]["turns"][0]["cached"] = True
    assert dict(zip(*report.tables(summarise(rows))[1][1]))["Cached searches"] == "25.0"
    assert dict(zip(*report.tables(summarise([line(beliefs=[None] * 3)]))[1][1]))["Turns"] == "3.00"


def test_markdown_table_is_even_and_keeps_bars_apart():
    table = markdown_table([["", "F1"], ["a|b", "10.0"]]).split("\n")
    assert table == ["|      |   F1 |", "| ---- | ---: |", "| a\\|b | 10.0 |"]


# ---- transcripts -------------------------------------------------------------------------------------------

def test_transcript_by_hand():
    row = line(step=3, beliefs=[-2.0, -1.5, None])
    for turn, advantage in zip(row["turns"], (1.5, -0.5, 0.25)):
        turn["advantage"] = advantage
    assert report.transcript(row) == """\
step 3, question 1
        question  Who?
        gold      the red fox
turn 1  thinks    t
        searches  q
        found     [One] x
        belief    -2.00 -> -1.50, gain +0.500
        advantage +1.500
turn 2  thinks    t
        searches  q
        failed    down
        belief    -1.50 -> +nan, gain -0.250
        advantage -0.500
turn 3  thinks    t
        answers   red fox
        advantage +0.250
end               answered, F1 0.80"""
    broken = {**row["turns"][0], "text": "no\n\n form " + "x" * 500, "query": None, "passages": []}
    text = report.transcript(line(turns=[broken]), width=60)
    assert "writes    no form" in text and "x .." in text and max(map(len, text.split("\n"))) <= 60


def test_show_prints_rollouts_from_all_over_the_file(tmp_path, capsys):
    folder = write_lines(tmp_path, [line(step=step, id=f"s{step}") for step in range(1, 11)])
    for n, ids in ((1, ["s10"]), (2, ["s5", "s10"]), (99, [f"s{k}" for k in range(1, 11)])):
        code, out, _ = run(capsys, folder, "--show", n)
        assert code == 0 and re.findall(r"question (\w+)\n", out) == ids
    assert not (tmp_path / "report.html").exists()


# ---- pages -------------------------------------------------------------------------------------------------

def test_the_page_allows_only_itself(tmp_path):
    report.write_report(tmp_path / "report.html", f"a {EVIL}", {"Model": EVIL}, many(5), summarise(many(5)))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page and "unsafe" not in page.split("</head>")[0]
    assert page.count("<script") == page.count("</script") == 2 and "<img" not in page and "<svg" not in page
    assert not re.search(r"<[^>]*\b(src|href)\s*=", page.split("<style>")[0])
    for tag in ("style", "script"):         # each hash is that of what stands there
        body = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
        assert base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() in page
    data = page_data(tmp_path / "report.html")
    assert data["rows"][1]["beliefs"] == [-2.0, -1.5, None]
    assert data["rows"][0]["question"].endswith("&lt;b&gt;")
    assert len(data["passages"]) == 1 and data["rows"][0]["turns"][0]["found"] == [[0, 1.0, 1]]


def test_pages_of_a_run_an_evaluation_and_older_files(tmp_path, capsys):
    rows = [line(step=step) for step in range(1, 25)]
    for row in rows:
        del row["benchmark"], row["sample"]
        row["turns"][0]["advantage"] = 1.5
        row["turns"][1] = {k: v for k, v in row["turns"][1].items() if k not in ("advantage", "cached")}
        row["turns"][1]["return"] = -0.5        # what it was called before
    folder = write_lines(tmp_path / "run", rows, {"model": "demo/policy", "credit": "igpo", "search": ""})
    code, out, err = run(capsys, folder)
    assert code == 0 and out == f"written: {folder}/report.html\n", err
    data = page_data(tmp_path / "run/report.html")
    assert [turn["advantage"] for turn in data["rows"][0]["turns"]] == [1.5, -0.5, None]
    labels = [cells[0] for cells in data["tables"][0][1]]
    assert labels == ["", *(f"steps {k}–{k + 2}" for k in range(1, 25, 3))]      # a tenth of 24, rounded up
    assert data["facts"] == {"Steps": "24", "Model": "demo/policy", "Credit": "igpo"}
    # Of an evaluation: its settings, and the order of its benchmarks.
    settings = {"model": "m", "adapter": "", "search": "bm25:c.jsonl", "passages": 3, "n": 1,
                "no_search": False, "max_turns": 4, "max_new_tokens": 32, "temperature": 0.0,
                "benchmarks": {"z": {"questions": "all 1"}, "b": {"questions": "1 of 2, drawn with seed 0"}}}
    folder = write_lines(tmp_path / "results", [line(), line(benchmark="z")], settings)
    assert run(capsys, folder)[0] == 0
    data = page_data(tmp_path / "results/report.html")
    assert [row["benchmark"] for row in data["rows"]] == ["z", "b"]
    assert data["facts"]["Episode"] == "up to 4 turns of 32 tokens" and data["facts"]["Decoding"] == "greedy"
    assert data["facts"]["Questions"] == "z: all 1; b: 1 of 2, drawn with seed 0"


def test_what_is_no_folder_of_rollouts_is_told_in_one_line(tmp_path, capsys):
    def refused(*argv):
        code, _, err = run(capsys, *argv)
        assert code == 2 and err.startswith("tools.report: ") and err.count("\n") == 1
        return err
    for argv in ([tmp_path / "nowhere"], ["--plot", tmp_path]):
        assert "cannot be read" in refused(*argv)
    (tmp_path / "rollouts.jsonl").write_text('{"question": "Who?", "answers": ["a"]}\n')
    assert "holds no rollouts" in refused(tmp_path)
    write_lines(tmp_path, many(3))
    assert run(capsys, tmp_path)[0] == 0        # without config.json the page is there all the same
    for text in ('{"benchmarks"', "[1]"):
        (tmp_path / "config.json").write_text(text)
        assert "config.json: cannot be read" in refused(tmp_path)
    folder = str(tmp_path)
    for argv in ([], ["--show", "1"], [folder, "--show", "0"], [folder, "--plot", folder]):
        with pytest.raises(SystemExit) as e:
            report.main(argv)
        assert e.value.code == 2


def test_large_pages_keep_whole_questions(tmp_path):
    rows = [line(id=str(k), step=s) for s in (1, 2, 3) for k in range(10)]
    rows += [line(id=f"once{k}", step=4) for k in range(10)]
    report.write_report(tmp_path / "r.html", "t", {}, rows, summarise(rows), limit=25)
    data = page_data(tmp_path / "r.html")
    assert len(data["rows"]) == 25 and "all 40 rollouts" in data["note"]
    assert sum(row["id"].startswith("once") for row in data["rows"]) == 1       # 8 x 3, and 1
    one = [line(id="one", step=s) for s in range(1, 61)]        # one question, too often: every third row
    assert [row["step"] for row in report.whole_questions(one, 25)] == list(range(1, 61, 3))


# ---- training curves ---------------------------------------------------------------------------------------

def write_run(folder, seed, credit="igpo", lift=0.0):
    folder.mkdir()
    config = {"credit": credit, "seed": seed, "out": str(folder), "lr": 1e-3}
    (folder / "config.json").write_text(json.dumps(config))
    rows = [{"step": 0, "eval_f1": 0.1 + lift}]
    for step in (1, 2):
        rows.append({"step": step, "policy_tokens": 100 * step + 10 * seed, "no_signal_outcome": 0.5 + lift,
                     "no_signal": 0.25, "belief_first": -3.0, "belief_last": -2.0 + lift})
    rows[-1]["eval_f1"] = 0.3 + lift
    rows.append({"step": 3, "policy_tokens": 0, "no_signal": None, "belief_first": None, "belief_last": None})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_curves_by_hand(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    runs = [write_run(tmp_path / "a", 0), write_run(tmp_path / "b", 1, lift=0.2),
            write_run(tmp_path / "c", 0, credit="grpo")]
    series, near = report.curves([report.read_run(run) for run in runs]), pytest.approx
    assert list(series) == ["igpo", "grpo"] and series["igpo"]["seeds"] == 2 and series["grpo"]["seeds"] == 1
    # Tokens: 100 + 200 and 110 + 210, mean 310. F1: .1 and .3 at step 0, then .3 and .5.
    assert series["igpo"]["eval_f1"] == [(0, 0, near(0.2), 0.1, near(0.3)), (2, 310, near(0.4), 0.3, 0.5)]
    assert series["igpo"]["belief_gain"] == [(1, 105, near(1.1), 1.0, near(1.2)),
                                             (2, 310, near(1.1), 1.0, near(1.2))]
    figure = report.plot(runs, str(tmp_path / "curves.png"))
    steps, tokens, signal, gain = figure.axes
    assert [list(l.get_xdata()) for l in steps.lines] == [[0, 2], [0, 2]]
    assert [list(l.get_xdata()) for l in tokens.lines] == [[0, 310], [0, 300]]
    assert list(steps.lines[0].get_ydata()) == near([0.2, 0.4])
    assert len(steps.collections) == 1      # a band, where there are two seeds
    assert [l.get_label() for l in signal.lines] == ["igpo, by outcomes alone", "igpo, as trained on",
                                                     "grpo, by outcomes alone", "grpo, as trained on"]
    assert list(signal.lines[0].get_ydata()) == near([0.6, 0.6])
    assert list(gain.lines[1].get_ydata()) == near([1.0, 1.0])
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["igpo (2 seeds, band: least to greatest)", "grpo"]
    configs = [{"credit": "igpo", "data": f"/some/where/{name}", "rollout_batch": size}
               for name, size in (("a", 64), ("b", 8), ("a", 8))]
    found = report.curves([(config, []) for config in configs])
    assert {label: row["seeds"] for label, row in found.items()} == {"data a": 2, "data b": 1}
    assert run(capsys, "--plot", *runs, "-o", tmp_path / "c.png")[0] == 0
    assert (tmp_path / "c.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# ---- in a browser ------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_a_browser = pytest.mark.skipif(not LONG or not CHROMIUM,
                                  reason="set IGPO_LONG, and install chromium, to look at pages in a browser")


def browse(url, folder, *options):
    """The page's DOM after its script has run, and what the browser had to say."""
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                           f"--user-data-dir={folder}/profile", "--window-size=1300,1000", *options,
                           "--enable-logging=stderr", "--log-level=0", url],
                          capture_output=True, text=True, timeout=120)
    return done.stdout, done.stderr


def serve(folder, seen):
    class Files(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(urlsplit(self.path).path)
            path = folder / seen[-1].lstrip("/")
            self.send_response(200 if path.is_file() else 404)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(path.read_bytes() if path.is_file() else b"")

        def log_message(self, *args):
            pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


PERSON = """<!doctype html><body><iframe id=f src="report.html" width=1300 height=1000></iframe><script>
const log = {};
document.getElementById("f").onload = () => {
  const w = document.getElementById("f").contentWindow, d = w.document, q = s => d.querySelector(s);
  const all = s => [...d.querySelectorAll(s)], text = s => q(s).textContent, count = () => text("#count");
  const press = (key, at = w) => at.dispatchEvent(new w.KeyboardEvent("keydown", {key, bubbles: true}));
  const set = (id, value, type) => {
    q("#" + id).value = value;
    q("#" + id).dispatchEvent(new w.Event(type));
  };
  log.title = d.title; log.heading = text("h1"); log.count = count(); log.question = text("h2");
  log.items = all(".item").length; log.nodes = all("*").length;
  log.images = all("img, svg[onload], iframe").length;
  log.pills = all("#show .pill").map(e => e.textContent);
  log.tones = all("#show .pill").map(e => e.className);
  log.folded = all("#show details[open]").length; log.points = all("#show svg.chart circle").length;
  log.summary = text("#show summary"); log.acts = all("#show .act").map(e => e.textContent);
  press("p"); log.passage = text(".passage p"); log.supporting = text(".passage em"); press("p");
  press("ArrowRight"); log.next = text("h2"); press("j"); press("k"); press("k"); log.back = text("h2");
  set("result", "right", "change"); log.right = count();
  set("benchmark", "b1", "change"); log.both = count(); log.first = text("h2");
  set("result", "", "change"); set("benchmark", "", "change");
  set("q", "NEEDLE1234", "input"); log.found = count(); log.hash = w.location.hash;
  set("q", "", "input"); set("stop", "answer", "change");
  q("#stop").focus(); press("j", q("#stop")); log.chosen = text("h2"); press("k");
  for (let i = 0; i < 50; i++) press("j");
  log.far = text("h2"); log.current = text(".item[aria-current=true] b"); log.nodesAfter = all("*").length;
  document.body.replaceChildren(JSON.stringify(log));
};</script>"""


@in_a_browser
def test_a_page_in_a_browser(tmp_path):
    """2,000 rollouts that try to be script. A page around the report presses keys, and filters."""
    summary = summarise(many(60))
    report.write_report(tmp_path / "report.html", f"a {EVIL}", {"Model": EVIL}, many(2000), summary)
    (tmp_path / "person.html").write_text(PERSON)
    seen = []
    server = serve(tmp_path, seen)
    try:
        dom, said = browse(f"http://127.0.0.1:{server.server_port}/person.html", tmp_path, "--dump-dom")
    finally:
        server.shutdown()
        server.server_close()
    assert set(seen) <= {"/person.html", "/report.html", "/favicon.ico"}        # nothing else was asked for
    assert "Refused" not in said and "Uncaught" not in said
    log = json.loads(html.unescape(re.search(r"<body>(\{.*\})</body>", dom, re.DOTALL)[1]))
    flat = lambda text: " ".join(text.split())
    assert flat(log["title"]) == flat(log["heading"]) == flat(f"a {EVIL}")
    assert log["images"] == 0 and "onerror" in log["question"] and "onerror" in log["passage"]
    assert log["count"] == "2,000 of 2,000 rollouts" and log["items"] < 40
    assert log["nodes"] < 2000 and log["nodesAfter"] < 2000         # of the list only what is in sight exists
    assert log["pills"] == ["gain +0.50", "gain \u22120.25"] and log["folded"] == 0
    assert ["up" in tone.split() for tone in log["tones"]] == [True, False]
    assert log["summary"] == "1 passage found, supporting, from the disk cache"
    assert log["supporting"].strip() == "supporting" and log["points"] == 3
    assert log["acts"] == ["searches forneedle0", "searches forq", "answersred fox"]
    assert log["next"].startswith("Question 1?") and log["back"].startswith("Question 0?")
    assert log["chosen"].startswith("Question 1?")      # keys work while a filter has the focus
    assert log["right"] == "667 of 2,000 rollouts"      # 0, 3, 6 ..
    assert log["both"] == "333 of 2,000 rollouts"       # 3, 9, 15 ..
    assert log["first"].startswith("Question 3?")
    assert log["found"] == "1 of 2,000 rollouts" and "q=NEEDLE1234" in log["hash"]
    assert log["far"].startswith("Question 50?") and log["current"].startswith("Question 50?")


@in_a_browser
def test_the_page_of_a_training_run_in_a_browser(tmp_path):
    """Twelve steps. One question comes back at steps 1, 7 and 12, so that it can be read side by side."""
    rows = []
    for step in range(1, 13):
        for _ in range(2):
            row = line(id="again" if step in (1, 7, 12) else f"s{step}", step=step)
            for turn, advantage in zip(row["turns"], (1.5, -0.5, 0.25)):
                turn["advantage"] = advantage
            rows.append(row)
    report.report(write_lines(tmp_path, rows, {"model": "demo/policy", "credit": "igpo"}))
    dom, _ = browse(f"file://{tmp_path}/report.html#side=1", tmp_path, "--dump-dom")
    body = dom[dom.index("<header"):]           # what the script made, behind the data
    assert body.count("<section>") == 3 and all(f">step {s}</p>" in body for s in (1, 7, 12))
    assert "steps 1–2" in body
    assert body.count("advantage <b>+1.50</b>") == 3 and body.count("advantage <b>−0.50</b>") == 3
    assert ">igpo</dd>" in body
    # A question of one step alone: its rollouts side by side, under the names that tell them apart.
    at = next(i for i, row in enumerate(rows) if row["id"] == "s11")
    alone = browse(f"file://{tmp_path}/report.html#side=1&at={at}", tmp_path, "--dump-dom")[0]
    alone = alone[alone.index("<header"):]
    assert alone.count("<section>") == 2 and all(f">step 11, rollout {k}</p>" in alone for k in (1, 2))
    assert alone.count('aria-current="true"') == 1      # the list was scrolled there
