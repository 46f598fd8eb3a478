"""search_tool.BM25 against bm25s on 100,000 passages, in one run.

    pip install bm25s numba && python -m benchmarks.search      (without numba its column is left out)

Each engine runs in a process of its own, on one thread, with its default settings and method "lucene". All
start from the same jsonl file and the same strings, with search_tool's tokens. They take turns, and the best of
all turns is kept. Seconds are those of the processor, so that other programs on the machine count little; time
spent waiting for the disk is left out. The passages are made here: words by a Zipf law from a vocabulary of
200,000, 30 to 119 words each, fixed seed; queries are 4 to 12 words by the same law.

  build   jsonl file -> index saved on disk (reading, tokenising, indexing, saving)
  load    saved index, memory-mapped, in a fresh process -> ready for the first query
  QPS     queries per second from strings to passages (text read from disk): one call per query, and calls of 64
  rank    the same without the passages: from strings to positions and scores, one call per query
  memory  peak resident size of the process while it builds, and of the one that loads and answers the queries
"""
import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # before numpy comes

import numpy as np  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # search_tool.py lies one folder up

from search_tool import open_search, tokenize  # noqa: E402

K, BATCH, VOCABULARY = 10, 64, 200_000


def make(folder: Path, passages: int, queries: int) -> None:
    rng = np.random.default_rng(0)
    law = np.cumsum(1 / np.arange(1, VOCABULARY + 1))
    syllables = [a + b for a in "bcdfghjklmnprstvz" for b in "aeiou"]

    def word(i: int) -> str:
        return syllables[i % 85] + (word(i // 85) if i >= 85 else "")

    words = np.array([word(i) for i in range(VOCABULARY)], object)

    def draw(n: int) -> list[str]:
        return words[np.searchsorted(law, rng.random(n) * law[-1])].tolist()

    with open(folder / "corpus.jsonl", "w") as file:
        for i in range(passages):
            drawn = draw(rng.integers(30, 120))
            row = {"id": str(i), "title": " ".join(drawn[:2]), "text": " ".join(drawn[2:])}
            file.write(json.dumps(row) + "\n")
    asked = [" ".join(draw(rng.integers(4, 13))) for _ in range(queries)]
    (folder / "queries.json").write_text(json.dumps(asked))


class Ours:
    name = "search_tool"

    def build(self, folder):
        open_search(f"bm25:{folder}/corpus.jsonl")

    def load(self, folder):
        self.engine = open_search(f"bm25:{folder}/corpus.jsonl")

    def rank(self, query):
        return self.engine.rank(query, K)

    def passages(self, queries):
        return [[passage.text for passage in found] for found in self.engine.search_many(queries, K)]


class Theirs:
    """bm25s as its documentation uses it: index, save with the corpus, load memory-mapped, retrieve from it."""
    name, backend = "bm25s", "numpy"

    def build(self, folder):
        import bm25s
        with open(folder / "corpus.jsonl") as file:
            corpus = [json.loads(line) for line in file]
        retriever = bm25s.BM25(method="lucene", backend=self.backend)
        retriever.index([tokenize(f"{row['title']} {row['text']}") for row in corpus], show_progress=False)
        retriever.save(str(folder / self.name), corpus=corpus)

    def load(self, folder):
        import bm25s
        self.engine = bm25s.BM25.load(str(folder / self.name), load_corpus=True, mmap=True)
        self.engine.backend = self.backend
        if self.backend == "numba":
            self.engine.activate_numba_scorer()
            self.engine.retrieve([list(self.engine.vocab_dict)[:3]], k=K, show_progress=False)  # compile
        self.corpus, self.engine.corpus = self.engine.corpus, None

    def tokens(self, query):
        return [token for token in tokenize(query) if token in self.engine.vocab_dict]

    def rank(self, query):
        documents, scores = self.engine.retrieve([self.tokens(query)], k=K, show_progress=False)
        return documents[0], scores[0]

    def passages(self, queries):
        found, _ = self.engine.retrieve([self.tokens(query) for query in queries], k=K, show_progress=False)
        return [[self.corpus[int(document)]["text"] for document in row] for row in found]


class TheirsCompiled(Theirs):
    name, backend = "bm25s with numba", "numba"


ENGINES = {engine.name: engine for engine in (Ours, Theirs, TheirsCompiled)}


def measure(name: str, phase: str, folder: Path) -> dict:
    """Runs inside a process of its own."""
    engine, queries = ENGINES[name](), json.loads((folder / "queries.json").read_text())
    if name != Ours.name:
        import bm25s  # noqa: F401  (importing it is not loading an index)
    start = time.process_time()
    getattr(engine, phase)(folder)
    found = {f"{phase} s": time.process_time() - start}
    if phase == "load":
        for query in queries[:BATCH]:
            engine.rank(query)
        batches = [queries[i:i + BATCH] for i in range(0, len(queries), BATCH)]
        for label, work, arguments in (("rank QPS", engine.rank, queries),
                                       ("QPS", engine.passages, [[query] for query in queries]),
                                       (f"QPS in batches of {BATCH}", engine.passages, batches)):
            start = time.process_time()
            for argument in arguments:
                work(argument)
            found[label] = len(queries) / (time.process_time() - start)
        found["ranks"] = [[row.tolist() for row in engine.rank(query)] for query in queries[:500]]
    found[f"{phase} peak MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return found


def same_ranks(ours: list, theirs: list) -> float:
    """Share of queries with equal scores, and equal passages but for the order of ties (bm25s leaves that open).
    """
    equal = 0
    for (docs, scores), (their_docs, their_scores) in zip(ours, theirs):
        found = [(d, s) for d, s in zip(their_docs, their_scores) if s > 0]
        last = scores[-1] if scores else 0
        above = {d for d, s in zip(docs, scores) if s > last}
        equal += scores == [s for _, s in found] and above == {d for d, s in found if s > last}
    return equal / len(ours)


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def run(names: list[str], passages: int, queries: int, turns: int) -> tuple[dict, dict]:
    """What was measured of each engine, and the ranks that each gave."""
    results, ranks = {name: {} for name in names}, {}
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), passages, queries)
        for turn, phase, name in itertools.product(range(turns), ("build", "load"), names):
            print(f"turn {turn + 1}, {phase}: {name}", file=sys.stderr)
            if (phase, name) == ("build", Ours.name):
                shutil.rmtree(Path(folder, "corpus.jsonl.bm25"), ignore_errors=True)  # it would be used again
            command = [sys.executable, str(HERE / "search.py"), "--measure", name, phase, folder]
            quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            done = subprocess.run(command, text=True, check=True, **quiet)
            found = json.loads(done.stdout.splitlines()[-1])
            ranks[name] = found.pop("ranks", None)
            for key, value in found.items():
                results[name][key] = (max if "QPS" in key else min)(value, results[name].get(key, value))
    return results, ranks


def table(results: dict) -> list[str]:
    ours, *others = results
    lines = ["| | " + " | ".join([*results, *(f"ratio to {name}" for name in others)]) + " |",
             "|---|" + "---:|" * (len(results) + len(others))]
    for key in results[ours]:
        values = [found[key] for found in results.values()]
        cells = [f"{value:,.0f}" if value > 100 else f"{value:.3g}" for value in values]
        cells += [f"{values[0] / value:.2g}" for value in values[1:]]
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=2_000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "search.md", help="the table is written here")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure[0], args.measure[1], Path(args.measure[2]))))
        return
    names = [Ours.name, *([Theirs.name] if version("bm25s") else [])]
    names += [TheirsCompiled.name] if version("bm25s") and version("numba") else []
    results, ranks = run(names, args.passages, args.queries, args.turns)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    setting = {"passages": args.passages, "queries": args.queries, "k": K, "turns": args.turns,
               "python": platform.python_version(), "cores": os.cpu_count(), "memory GiB": round(memory),
               **{package: version(package) for package in ("numpy", "bm25s", "numba")}}
    lines = [f"# BM25 on {args.passages:,} passages: search_tool.py against bm25s", "",
             "`python -m benchmarks.search`, one run, one thread, each engine in a process of its own, seconds "
             "of the processor. What is measured is told at the top of search.py.", "",
             ", ".join(f"{key} {value}" for key, value in setting.items() if value) + ".", ""]
    lines += table(results)
    lines += ["", "Higher is better for QPS (a ratio above 1 is ours), lower for seconds and MB (below 1 is ours)."]
    if names[1:]:
        lines += ["Most of bm25s's time per query without numba goes into numpy.argpartition, whose speed differs a "
                  "lot between processors. Most of its load time with numba is compiling. Where numba is ahead: for "
                  "each query numpy makes an array of one score per passage and looks through all of it, and its "
                  "additions are not one compiled loop.", ""]
    for name in names[1:]:
        share = same_ranks(ranks[Ours.name], ranks[name])
        lines.append(f"Scores and ranks equal those of {name} for {share:.1%} of {len(ranks[name])} queries.")
    args.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
