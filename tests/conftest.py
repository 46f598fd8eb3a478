"""What tests share: no thread too many, no question to the hub, data of 20 questions, a run of four steps."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")   # before torch comes; programs that tests start inherit both
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
import shutil

import pytest

import igpo
from test_igpo import byte_tokenizer, demo, played                  # noqa: F401, fixtures
from tests.common import HERE, small_options


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A data folder: the demo's corpus, 16 questions to train on and 4 to evaluate, of two searches each."""
    folder = tmp_path_factory.mktemp("small")
    for name, n in (("train", 16), ("dev", 4)):
        questions = [q for q in igpo.load_questions(f"{HERE}/demo/{name}.jsonl") if q["hops"] == 2][:n]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    shutil.copy(HERE / "demo/corpus.jsonl", folder)
    igpo.open_search(f"bm25:{folder}/corpus.jsonl")                 # writes the index
    return folder


@pytest.fixture(scope="session")
def options(small):
    """The command line of a short run: two groups of three, three turns, evaluated at every second step."""
    return small_options(small)


@pytest.fixture(scope="session")
def half(options, tmp_path_factory):
    """Two steps."""
    out = tmp_path_factory.mktemp("runs") / "half"
    assert igpo.main([*options, "--steps", "2", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def run(options, tmp_path_factory):
    """Four steps without a break."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert igpo.main([*options, "--steps", "4", "--out", str(out)]) == 0
    return out
