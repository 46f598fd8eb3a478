"""Faults: whatever happens in a step, those before it are safe, and a run goes on as if it had not been."""
import math
import os
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError

import igpo
from igpo import save_step
from search_tool import Results, open_search
from tests.common import LONG, adapter_of, copy_of, one_line, rows_of, same_run, saved_step


# ---- a save that does not come to its end ----

class Killed(BaseException):
    """kill -9, as far as one process can tell: no `except Exception` sees it."""


class HalfALog:
    """A file that takes half of what is written into it, and then fails."""
    def __init__(self, file, error):
        self.file, self.error = file, error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, text):
        self.file.write(text[:len(text) // 2])
        self.file.flush()
        raise self.error

    def writelines(self, lines):
        self.write("".join(lines))


@contextmanager
def file_operations(model, at=None, error=None):
    """Lists the file operations of a save. The one at `at`, a number or a name, is done by half and fails."""
    done, honest_open = [], open

    def fails(name):
        done.append(name)
        return at in (len(done) - 1, name)

    def half_an_adapter(folder):
        os.makedirs(folder, exist_ok=True)
        (folder / "adapter_model.safetensors").write_bytes(b"torn")

    def watch(patch, owner, name, half):
        honest = getattr(owner, name)

        def operation(*args, **options):
            if fails(name):
                half(*args)
                raise error
            return honest(*args, **options)
        patch.setattr(owner, name, operation)

    def watched_open(path, mode="r", *args, **options):
        file = honest_open(path, mode, *args, **options)
        return HalfALog(file, error) if "a" in mode and fails("log") else file
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(igpo, "open", watched_open, raising=False)
        watch(patch, os, "replace", lambda *args: None)
        watch(patch, torch, "save", lambda state, path: honest_open(path, "wb").write(b"PK torn"))
        watch(patch, type(model), "save_pretrained", lambda self, folder, **_: half_an_adapter(folder))
        yield done


def test_a_save_killed_at_every_file_operation(demo, tmp_path):
    """Twice in a row, at pairs of moments: what a resume finds is a whole step, the last or that before."""
    model = demo.model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    mark = next(p for name, p in model.named_parameters() if "lora_A" in name)
    kept = mark.detach().clone()

    def save(out, step, history, at=None):
        history = [*history, {"step": step, "eval_f1": step / 10}]
        with file_operations(model, at, Killed()) as done, suppress(Killed), torch.no_grad():
            mark.fill_(step)
            save_step(out, model, optimizer, history, [{"id": f"of {step}"}] if step else [])
        return len(done)

    def found(out, *possible):
        with torch.no_grad():
            mark.fill_(-1)
        history = igpo.load_checkpoint(out, model, optimizer)
        step = history[-1]["step"]
        assert step in possible and (mark == step).all()
        assert [row["step"] for row in history] == list(range(step + 1))
        assert [row["step"] for row in rows_of(out)] == list(range(step + 1))
        assert [r["id"] for r in rows_of(out, "rollouts.jsonl")] == [f"of {n}" for n in range(1, step + 1)]
        for name in ("checkpoint", "best"):
            assert any(len(set(value.flatten().tolist())) == 1 for value in adapter_of(out, name).values())
        return step, history
    try:
        whole = tmp_path / "whole"
        whole.mkdir()
        save(whole, 0, [])
        moments = save(whole, 1, [{"step": 0, "eval_f1": 0.0}])
        assert moments >= 7 and found(whole, 1)
        seen = set()
        for first in range(moments):
            once = copy_of(whole, tmp_path / f"once{first}")
            save(once, 2, found(once, 1)[1], first)
            step, history = found(once, 1, 2)
            seen.add(step)
            for second in range(moments) if LONG else {0, first, moments - 1}:
                twice = copy_of(once, tmp_path / f"twice{first}-{second}")
                save(twice, step + 1, history, second)
                again, rows = found(twice, step, step + 1)
            save(twice, again + 1, rows)
            assert found(twice, again + 1)
        assert seen == {1}              # state.pt comes last, in one move: until then the step is not done
    finally:
        with torch.no_grad():
            mark.copy_(kept)


@pytest.mark.parametrize("operation, error", [
    ("log", OSError(28, "No space left on device")),
    ("save", RuntimeError("[enforce fail at inline_container.cc:659] . No space left on device")),
    ("save_pretrained", SafetensorError("I/O error: No space left on device (os error 28)"))])
def test_a_full_disk_leaves_the_step_before(operation, error, run, half, demo, tmp_path, capsys):
    """As each library tells it. With room again the step is made again."""
    out = copy_of(half, tmp_path / "x")
    with file_operations(demo.model, operation, error):
        assert igpo.main(["--resume", str(out), "--steps", "4"]) == 2
    one_line(capsys, "No space left on device")
    assert saved_step(out) == 2
    if LONG or operation == "log":
        assert igpo.main(["--resume", str(out), "--steps", "4"]) == 0
        same_run(run, out)


# ---- a step that fails ----

def fail_in_step(monkeypatch, number, error):
    """train_step() raises in that step of this process, when its rollouts are done."""
    honest, calls = igpo.score, []

    def score(*args):
        calls.append(1)
        if len(calls) == 2 * number - 1:                # of the policy; the other is of the reference
            raise error
        return honest(*args)
    monkeypatch.setattr(igpo, "score", score)


def test_out_of_memory_says_what_to_lower(run, half, tmp_path, monkeypatch, capsys):
    out = copy_of(half, tmp_path / "x")
    with monkeypatch.context() as patch:
        fail_in_step(patch, 2, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nMore"))
        assert igpo.main(["--resume", str(out), "--steps", "4"]) == 2
    one_line(capsys, "out of memory", "--rollout_batch", "--batch_tokens")
    assert saved_step(out) == rows_of(out)[-1]["step"] == 3
    assert igpo.main(["--resume", str(out), "--steps", "4"]) == 0
    same_run(run, out)


def test_an_error_of_ours_is_not_dressed_up(half, tmp_path, monkeypatch, capsys):
    """It is shown as what it is, behind the line that says how to go on."""
    out = copy_of(half, tmp_path / "x")
    fail_in_step(monkeypatch, 1, RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        igpo.main(["--resume", str(out), "--steps", "4"])
    assert f"--resume {out}" in capsys.readouterr().out and saved_step(out) == 2


@pytest.mark.parametrize("planted", ["loss", "gradient", "belief"])
def test_a_nan_is_skipped_counted_and_learned_nothing_from(planted, options, tmp_path, monkeypatch):
    """In the first step: the weights do not move, and the log stays JSON. The second step learns."""
    calls = []

    def spoil(name, spoiled):
        honest = getattr(igpo, name)

        def once(*args, **kwargs):
            result = honest(*args, **kwargs)
            calls.append(1)
            return spoiled(result, *args) if len(calls) == 1 else result
        monkeypatch.setattr(igpo, name, once)

    def spoil_gradient(stats, model, *_):
        next(p for p in model.parameters() if p.grad is not None).grad[0] = math.nan
        return stats
    if planted == "loss":
        spoil("policy_loss", lambda result, *_: (result[0] * math.nan, result[1]))
    elif planted == "gradient":
        spoil("accumulate_gradient", spoil_gradient)
    else:
        spoil("score", lambda result, *_: (result[0], [[math.nan] * len(b) for b in result[1]]))
    moved, honest = [], igpo.save_step

    def save(out, model, *rest):
        moved.append(any(p.any() for name, p in model.named_parameters() if "lora_B" in name))
        honest(out, model, *rest)
    monkeypatch.setattr(igpo, "save_step", save)
    out = tmp_path / "x"
    assert igpo.main([*options, "--steps", "2", "--eval_every", "0", "--out", str(out)]) == 0
    first, second = rows_of(out)[-2:]
    assert (first["skipped"], second["skipped"]) == (1, 0) and first["kl"] == first["loss"] == 0
    assert (first["belief_first"] is None) == (planted == "belief")
    assert moved[-2:] == [False, True]
    assert all(torch.isfinite(value).all() for value in adapter_of(out).values())
    assert igpo.main(["--resume", str(out), "--steps", "3"]) == 0
    assert not any(b"NaN" in log.read_bytes() for log in out.glob("*.jsonl"))


# ---- the search ----

class Moody:
    """A search of which some calls fail."""
    def __init__(self, data, dead=lambda call: False, slow=0.0):
        self.search, self.dead, self.slow = open_search(f"bm25:{data}/corpus.jsonl"), dead, slow
        self.calls = 0

    def search_many(self, queries, k):
        self.calls += 1
        time.sleep(self.slow)
        found = self.search.search_many(queries, k)
        return [Results(error="connection refused") if self.dead(self.calls) else some for some in found]


def test_a_search_that_is_down_from_the_start(options, small, tmp_path, monkeypatch, capsys):
    """No evaluation is made up."""
    monkeypatch.setattr(igpo, "open_search", lambda *_: Moody(small, lambda call: True))
    assert igpo.main([*options, "--steps", "4", "--out", str(tmp_path / "x")]) == 2
    one_line(capsys, "searches failed", "connection refused")
    assert not (tmp_path / "x" / "metrics.jsonl").exists() and not (tmp_path / "x" / "checkpoint").exists()


def test_a_search_that_dies_in_a_step(run, half, small, tmp_path, monkeypatch, capsys):
    """Nothing of that step is learned, saved or counted; when it is back, it is as if it had been there."""
    out = copy_of(half, tmp_path / "x")
    files = lambda: {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != "config.json"}
    before = files()
    steps, honest = [], torch.optim.AdamW.step
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda self: (steps.append(1), honest(self))[1])
        patch.setattr(igpo, "open_search", lambda *_: Moody(small, lambda call: True))
        assert igpo.main(["--resume", str(out), "--steps", "4"]) == 2
    one_line(capsys, "searches failed", "connection refused")
    assert not steps and before == files()
    assert igpo.main(["--resume", str(out), "--steps", "4"]) == 0
    same_run(run, out)


def test_a_search_that_flaps_and_is_slow(options, small, tmp_path, monkeypatch):
    """Every third request fails: counted, shown to the policy as what it is, timed, and the run goes on."""
    moody = Moody(small, lambda call: call % 3 == 0, slow=0.02)
    monkeypatch.setattr(igpo, "open_search", lambda *_: moody)
    monkeypatch.setattr(igpo, "MAX_FAILED_SEARCHES", 0.9)
    out = tmp_path / "x"
    assert igpo.main([*options, "--steps", "2", "--eval_every", "0", "--out", str(out)]) == 0
    rows, turns = rows_of(out)[-2:], [t for k in rows_of(out, "rollouts.jsonl") for t in k["turns"]]
    failed, total = [t for t in turns if t["error"]], lambda key: sum(row[key] for row in rows)
    assert 0 < len(failed) == total("failed_searches") < total("searches")
    assert {t["error"] for t in failed} == {"connection refused"} and not any(t["passages"] for t in failed)
    assert total("seconds_rollout") >= 0.02 * moody.calls


@pytest.mark.parametrize("failed, goes_on", [(2, True), (3, False)])
def test_how_many_searches_may_fail(failed, goes_on, demo, monkeypatch):
    """Half of them: with more there is nothing to learn from a step, nor to evaluate."""
    def play(model, tokenizer, rollouts, search, cfg):
        for i, r in enumerate(rollouts):
            r.retrieved.append(Results(error="down") if i < failed else Results())
    monkeypatch.setattr(igpo, "play", play)
    with nullcontext() if goes_on else pytest.raises(igpo.UserError, match="3 of 4 searches failed .*down"):
        igpo.rollout(demo.model, demo.tokenizer, demo.questions[:2], None, replace(demo.cfg, group=2))
