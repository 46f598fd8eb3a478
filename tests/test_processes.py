"""Real processes: killed at random moments, interrupted, and two that train together."""
import json
import os
import random
import runpy
import signal
import sys
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch

import igpo
from igpo import DEMO, Config, rollout, step_questions, train_step
from tests.common import (HERE, LONG, adapter_of, program, rows_of, same_run, saved_step, small_options,
                          state_of, timeless)

approx = pytest.approx


# ---- forks of a process that has imported all and used nothing: to import takes longer than such a life ----

def fork(argv, said) -> int:
    """A child that is `python igpo.py argv`, with its output in `said`."""
    if child := os.fork():
        return child
    with open(said, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)           # which a shell may have switched off
    sys.argv, status = ["igpo.py", *map(str, argv)], 70
    try:
        runpy.run_path(str(HERE / "igpo.py"), run_name="__main__")
    except SystemExit as e:
        status = e.code
    finally:
        sys.stdout.flush()
        os._exit(status)


def wait_for(child) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def lives(data, folder, kills, seed) -> None:
    """Runs of four steps, killed at random moments as often as asked for, each going on where the last was.
    After each kill the checkpoint is whole; a run that comes to its end is the run that nobody has killed."""
    rng, said, moments, runs = random.Random(seed), folder / "said", Counter(), iter(range(10**6))
    fresh, start = [*small_options(data), "--steps", "4", "--out"], time.monotonic()
    assert wait_for(fork([*fresh, folder / "whole"], said)) == 0, said.read_text()
    whole, out = time.monotonic() - start, folder / f"run{next(runs)}"
    while True:
        child = fork(["--resume", out] if out.exists() else [*fresh, out], said)
        if kills:
            time.sleep(rng.random() * 0.8 * whole)
            os.kill(child, signal.SIGKILL)
        status = wait_for(child)
        assert status == 0 or status == -signal.SIGKILL and kills, said.read_text()
        if status == 0:
            same_run(folder / "whole", out)
            moments["ended"] += 1
            if not kills:
                return print(dict(moments))
        else:
            kills -= 1
            moments[check_whole(out)] += 1
        if status == 0 or not (out / "checkpoint" / "state.pt").exists():
            out = folder / f"run{next(runs)}"


def check_whole(out) -> str:
    """What a kill has left: nothing that was said to be saved, or a whole step, in the logs one more."""
    if not (out / "checkpoint" / "state.pt").exists():
        return "nothing"
    step, own = saved_step(out), {n.replace(".default", ""): p for n, p in state_of(out)["adapter"].items()}
    assert {n: p.shape for n, p in own.items()} == {n: p.shape for n, p in adapter_of(out).items()}
    lines = (out / "metrics.jsonl").read_bytes().split(b"\n")[:-1]      # behind the last line end one was cut
    assert json.loads(lines[step])["step"] == step and len(lines) in (step + 1, step + 2)
    return f"step {step}"


def interrupted(data, folder) -> None:
    """SIGTERM, as a scheduler sends it, and Ctrl-C, in the middle of a run: 143 and 130, and it can go on."""
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        out, said = folder / f"cut{status}", folder / "said"
        child = fork([*small_options(data), "--steps", "400", "--eval_every", "200", "--out", out], said)
        while not (out / "checkpoint" / "state.pt").exists():
            assert os.waitpid(child, os.WNOHANG) == (0, 0), said.read_text()
            time.sleep(0.05)
        time.sleep(0.3)
        os.kill(child, number)
        assert wait_for(child) == status
        assert f"--resume {out}" in said.read_text() and "Traceback" not in said.read_text(), said.read_text()
    step = saved_step(out)
    assert wait_for(fork(["--resume", out, "--steps", step + 1], said)) == 0, said.read_text()
    assert [row["step"] for row in rows_of(out)] == list(range(step + 2))


def alone(code) -> str:
    """In a process of its own, on CPU: a process that has used a GPU cannot be forked."""
    code = f"from pathlib import Path; from tests.test_processes import *; {code}"
    ran = program("-c", code, env={"CUDA_VISIBLE_DEVICES": ""})
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_killed_and_interrupted_runs_go_on(small, tmp_path):
    """IGPO_KILLS random kill -9, IGPO_SEED for others."""
    kills, seed = os.environ.get("IGPO_KILLS", 30 if LONG else 3), os.environ.get("IGPO_SEED", 0)
    folder = f"Path({str(tmp_path)!r})"
    print(alone(f"lives({str(small)!r}, {folder}, {kills}, {seed}); interrupted({str(small)!r}, {folder})"))


# ---- two processes that train together ----

def step_on(rollouts, questions, start):
    """train_step() on given rollouts. By SGD: Adam makes as much of rounding errors as of any gradient."""
    cfg = replace(Config(**DEMO), questions=len(questions), group=3, max_turns=3, max_new_tokens=24)
    model, tokenizer = igpo.load_model(cfg)
    model.load_state_dict(start, strict=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(igpo, "rollout", lambda _, __, mine, *rest: sum((rollouts[q["id"]] for q in mine), []))
        mine = questions[igpo.RANK::igpo.WORLD]
        row, records = train_step(model, tokenizer, optimizer, mine, None, cfg)
    return row, records, adapter_on_cpu(model)


def adapter_on_cpu(model):
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}


def worker(folder) -> int:
    """What each of two processes does: that step, and then a run in whose third step the second one dies."""
    torch.distributed.init_process_group("gloo")
    given = torch.load(f"{folder}/given.pt", weights_only=False)
    torch.save(step_on(*given), f"{folder}/{igpo.RANK}.pt")
    igpo.dist.init_process_group = lambda *_: None             # main() would do so
    honest, calls = igpo.train_step, []

    def dies(*args):
        calls.append(1)
        if igpo.RANK == 1 and len(calls) == 3:
            while saved_step(f"{folder}/run") < 2:              # the other one saves, and may still be at it
                time.sleep(0.05)
            os._exit(1)
        return honest(*args)
    igpo.train_step = dies
    return igpo.main([*small_options(f"{folder}/data"), "--steps", "4", "--out", f"{folder}/run"])


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, demo, small):
    folder = tmp_path_factory.mktemp("two")
    cfg = replace(demo.cfg, max_turns=3)
    torch.manual_seed(7)
    given = {q["id"]: rollout(demo.model, demo.tokenizer, [q], demo.search, cfg) for q in demo.questions[:3]}
    torch.save((given, demo.questions[:3], adapter_on_cpu(demo.model)), folder / "given.pt")
    (folder / "data").symlink_to(small)
    code = "import sys\nfrom tests.test_processes import worker\nsys.exit(worker(sys.argv[1]))\n"
    (folder / "worker.py").write_text(code)
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"
    return folder, program(*torchrun, folder / "worker.py", folder, env={"CUDA_VISIBLE_DEVICES": ""})


def test_two_processes_make_the_update_of_one(two_processes):
    """One has two groups, the other one: each rollout counts alike all the same."""
    folder, ran = two_processes
    *given, start = torch.load(folder / "given.pt", weights_only=False)
    row, records, adapter = step_on(*given, start)
    assert row["outcome_f1"] > 0 or row["no_signal"] < 1
    for rank in range(2):
        its_row, its_records, its_adapter = torch.load(folder / f"{rank}.pt", weights_only=False)
        its_row, of_one = timeless([its_row, row])
        said = lambda r: (r["id"], r["stop"], r["turns"][0]["text"])
        assert its_row == {key: approx(value, rel=1e-3, abs=1e-5) for key, value in of_one.items()}
        assert sorted(map(said, its_records)) == sorted(map(said, records))
        far = max((p - its_adapter[name]).abs().max() for name, p in adapter.items())
        assert far < 5e-5 < 1e-3 < max((p - start[name]).abs().max() for name, p in adapter.items())


def test_a_process_that_dies_ends_the_run_and_one_process_goes_on(two_processes, small):
    folder, ran = two_processes
    out = folder / "run"
    assert ran.returncode != 0 and saved_step(out) == 2, ran.stderr
    assert ran.stdout.count("step    1") == ran.stdout.count("step    2") == 1         # one of them speaks
    assert igpo.main(["--resume", str(out), "--steps", "4"]) == 0
    rows, kept = rows_of(out), rows_of(out, "rollouts.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert Counter(k["step"] for k in kept) == {step: 6 for step in range(1, 5)}
    questions = igpo.load_questions(f"{small}/train.jsonl")
    for row in rows[1:]:
        mine = [k for k in kept if k["step"] == row["step"]]
        asked = step_questions(questions, row["step"], Config(questions=2))
        assert [k["id"] for k in mine] == [q["id"] for q in asked for _ in range(3)]
        assert row["policy_tokens"] == sum(k["policy_tokens"] for k in mine)
        assert row["searches"] == sum(t["query"] is not None for k in mine for t in k["turns"])
        assert abs(row["ratio_start"] - 1) < 1e-4
    texts = [[t["text"] for t in k["turns"]] for k in kept if k["step"] == 1]
    assert texts[:3] != texts[3:]                                   # the two did not draw the same numbers
