"""Evaluate a search agent on benchmarks.

    python eval.py                                         the embedded demo: 200 test questions, offline
    python eval.py --adapter runs/x                        after training: model, episode and data of the run
    python eval.py --adapter runs/x/best                   the adapter that was best on the dev questions
    python eval.py --adapter runs/x --no_search            closed book: made to answer at once
    python eval.py --model Qwen2.5-3B-Instruct --data data/hotpotqa
                                                           dev.jsonl of a folder of tools.data, and its corpus
    python eval.py --adapter runs/x --benchmark all --limit 500 --search http://127.0.0.1:8000/retrieve
    torchrun --nproc_per_node 4 -- eval.py ..              four GPUs: each takes its share of the questions

An evaluation fills a folder, results/<name>: rollouts.jsonl (what happened), results.json and results.md (the
figures) and report.html (a page to read it all). The same command goes on where it was stopped. If settings,
questions, weights or corpus have changed, it starts a folder of its own.

    python -m tools.metrics results/a results/b            is b better than a?
    python -m tools.report results/a --show 3              three rollouts in the terminal

How an answer is found and scored; published figures differ because these rules do (docs/evaluation.md):
  1. The answer is what the policy wrote between <answer> and </answer>, in a turn of the right form. A turn
     ends at its first closing tag, so a rollout has one answer at most.
  2. Only what the policy wrote is parsed: no answer can come out of a search result.
  3. A rollout without an answer scores 0 and stays in every mean.
  4. F1 and exact match in two conventions: that of the IGPO authors, and SQuAD's. The best gold alias counts.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
from contextlib import suppress
from dataclasses import fields, replace
from itertools import chain, count
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from tqdm import tqdm

from igpo import (DEMO, MAX_FAILED_SEARCHES, RANK, SCHEMA, TAG, WORLD, Config, Rollout, all_gather,
                  begin, check_questions, encode, load_model, locate, mean, play, read_config, record, score,
                  unwrap)
from search_tool import UserError, fingerprint, first_line, open_search
from tools.data import BENCHMARKS, read_benchmark, sample
from tools.metrics import read_jsonl, write_whole
from tools.report import write_results

# What an evaluation takes of igpo.Config, and of that what it takes over from the run of an adapter.
EPISODE = ("model", "init_adapter", "data", "search", "search_cache", "seed", "max_turns", "max_new_tokens",
           "passages", "max_info_tokens", "temperature", "dtype", "rollout_batch", "batch_tokens")
INHERITED = ("model", "init_adapter", "data", "dev", "search", "max_turns", "max_new_tokens", "passages",
             "max_info_tokens", "dtype")
# These change no figure, or are told by a checksum, so that an evaluation may go on with others.
NO_SETTING = ("data", "search_cache", "rollout_batch", "batch_tokens")
FEWEST_SEARCHES = 10            # so many are looked at, at least, before the search is said to be down
PROBES = 4                      # questions that are asked to tell whether it is the same server as before


# ---- configuration and questions ---------------------------------------------------------------------------

def find_adapter(folder: str) -> tuple[str, Config | None]:
    """(PEFT folder, configuration of its run or None). Of a run folder its checkpoint/. UserError."""
    places = [Path(folder), Path(folder) / "checkpoint"]
    peft = next((place for place in places if (place / "adapter_config.json").is_file()), None)
    if peft is None:
        raise UserError(f"--adapter {folder}: no adapter_config.json there, nor in its checkpoint/")
    for place in (peft, peft.parent):       # a PEFT folder of another make may have a config.json of its own
        try:
            return str(peft), read_config(str(place))
        except UserError:
            pass
    return str(peft), None


def load_config(args: argparse.Namespace) -> tuple[Config, str, list[str]]:
    """(configuration, PEFT folder or "", benchmarks). UserError.

    The command line comes first, then the adapter's run (the demo, if no model is named), then the defaults.
    """
    given = {name: getattr(args, name) for name in EPISODE if hasattr(args, name)}
    peft, run = find_adapter(args.adapter) if args.adapter else ("", None)
    if peft and not run and "model" not in given:
        raise UserError(f"--adapter {args.adapter}: no config.json of a run beside it, so give --model too")
    base = vars(run) if run else {} if "model" in given else DEMO
    base = {name: base[name] for name in INHERITED if name in base}
    if "data" in given:     # a folder brings its questions and its corpus
        base.update(dev="", search="")
    temperature = 0.0 if args.n == 1 else 1.0
    cfg = Config(**{"temperature": temperature, "gradient_checkpointing": False, **base, **given})
    check_bounds(cfg, args.n)
    strange = [name for name in args.benchmark if name != "demo"]
    if strange and cfg.data == "demo" and not ("data" in given or cfg.search or args.no_search):
        raise UserError(f"--search: the demo's corpus knows nothing of {strange[0]}. Say where to search, as "
                        "search_tool.py tells, or --no_search")
    cfg.search = cfg.search or "bm25:" + locate(f"{cfg.data}/corpus.jsonl")
    return cfg, peft, args.benchmark or [own_questions(cfg)]


def check_bounds(cfg: Config, n: int) -> None:
    """UserError for a number out of bounds. Unlike in training, the temperature may be 0: greedy."""
    for f in fields(Config):
        value, least = getattr(cfg, f.name), f.metadata["least"]
        if f.name not in EPISODE or isinstance(value, str) or (f.name == "temperature" and value == 0):
            continue
        if not max(least, -2**63) <= value < 2**63:
            greedy = ", or 0, which is greedy" * (f.name == "temperature")
            raise UserError(f"--{f.name} {value}: must be at least {least}{greedy}, and finite")
    if n > 1 and cfg.temperature == 0:
        raise UserError("--n: samples of a greedy rollout are all alike, so give a --temperature above 0")


def own_questions(cfg: Config) -> str:
    """The questions if no benchmark is named: the --dev of the run, or the data folder's test or else dev."""
    if cfg.data == "demo" and not cfg.dev:
        return "demo"
    places = [cfg.dev] if cfg.dev else [f"{cfg.data}/{split}.jsonl" for split in ("test", "dev")]
    return next((place for place in map(locate, places) if Path(place).is_file()), locate(places[-1]))


def read_chosen(names: list[str], limit: int, seed: int) -> tuple[dict[str, list[dict]], dict[str, dict]]:
    """({benchmark: questions}, {benchmark: how many of how many, and a checksum of these}). UserError."""
    chosen, notes = {}, {}
    for name in names:
        label = name if name in BENCHMARKS else Path(name.removesuffix(".gz")).stem
        sources: dict[str, list] = {}
        for row in read_benchmark(name):        # a file may hold several benchmarks, and say so
            sources.setdefault(row.get("data_source", label), []).append(row)
        for source, rows in sources.items():
            while source in chosen:
                source += "'"
            chosen[source] = part = sample(rows, limit, seed)
            text = json.dumps([[q["id"], q["question"], q["answers"]] for q in part])
            taken = f"{len(part):,} of {len(rows):,}, drawn with seed {seed}"
            notes[source] = {"questions": taken if len(part) < len(rows) else f"all {len(rows):,}",
                             "sha256": hashlib.sha256(text.encode()).hexdigest()[:16]}
    return chosen, notes


# ---- the folder of the results -----------------------------------------------------------------------------

def weights_print(name: str, repo: str = "") -> str:
    """What tells one version of weights from another: a checksum of local files, or the commit of the hub's.

    name: as the user gave it. repo: what it is called on the hub, if it differs.
    """
    path = Path(locate(name))
    if path.is_file():
        return fingerprint(path)
    kinds = (".safetensors", ".bin", ".json", ".model", ".jinja", ".txt")
    files = [f for f in sorted(path.glob("*")) if f.suffix in kinds]
    text = "\n".join(f"{file.name} {fingerprint(file)}" for file in files)
    if files:
        return hashlib.sha256(text.encode()).hexdigest()[:16]
    for file in ("config.json", "adapter_config.json", path.name):
        with suppress(HFValidationError):       # a name that none on the hub can have
            cached = try_to_load_from_cache(repo or name, file)
            if isinstance(cached, str):         # <cache>/models--owner--name/snapshots/<commit>/<file>
                return Path(cached).parent.name
    return "unknown"


def search_print(cfg: Config, questions: list[dict]) -> str:
    """What tells one corpus from another: checksum of a file, or of a server's answers to a few questions.

    All that is known of a server is its address, and there may be another corpus behind it tomorrow. So it is
    asked, and not the disk cache. The web changes all the time: "unknown". UserError if no question works.
    """
    if cfg.search.startswith("bm25:"):
        return fingerprint(cfg.search.removeprefix("bm25:"))
    if cfg.search == "duckduckgo":
        return "unknown"
    only = cfg.search_cache == "only"       # then there is no server, and the cache is the corpus
    probes = [q["question"] for q in questions[::max(len(questions) // PROBES, 1)][:PROBES]]
    found = open_search(cfg.search, "only" if only else "off").search_many(probes, cfg.passages)
    if all(results.error for results in found) and not only:
        raise UserError(f"--search {cfg.search}: {found[0].error}")
    # Sorted, and without scores, which may depend on what else a server computes at the same time.
    texts = [sorted([p.id, p.title, p.text] for p in results) for results in found]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def all_settings(args, cfg: Config, peft: str, chosen: dict, notes: dict, repo: str) -> dict:
    """All that decides on the figures. repo: what the model is called on the hub."""
    prints = {"model": weights_print(cfg.model, repo)}
    for key, path in (("init_adapter", cfg.init_adapter), ("adapter", peft)):
        if path:
            prints[key] = weights_print(path)
    if not args.no_search:
        prints["search"] = search_print(cfg, [*chain(*chosen.values())])
    for key, value in prints.items():
        if value == "unknown":
            print(f"note: it cannot be told which {key} this is. If it changes, going on mixes two of them.")
    return {**{name: getattr(cfg, name) for name in EPISODE if name not in NO_SETTING}, "adapter": peft,
            "no_search": args.no_search, "n": args.n, "benchmarks": notes, "fingerprints": prints}


def begin_folder(wanted: str, settings: dict) -> tuple[Path, list[dict]]:
    """(folder of the results, rows that are there already). wanted: --out. UserError.

    Results of other settings are never mixed: each get a folder of their own, or --out is refused.
    """
    name = Path(settings["model"]).name.removesuffix(".gguf")
    if settings["adapter"]:
        peft = Path(settings["adapter"]).resolve()
        run = peft.parent.name
        name = {"checkpoint": run, "best": f"{run}-best"}.get(peft.name, peft.name)
    name += "-closed-book" * settings["no_search"] + f"-n{settings['n']}" * (settings["n"] > 1)
    names = [wanted] if wanted else (f"results/{name}" + f"-{k}" * (k > 1) for k in count(1))
    for out in map(Path, names):
        try:
            before = dict(json.loads((out / "config.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            before = {}
        if before == settings or not out.exists() or not any(out.iterdir()):
            break
    else:
        changed = next((key for key in settings if before.get(key) != settings[key]), "config.json")
        raise UserError(f"--out {out}: holds something else, or results of other settings ({changed})")
    path = out / "rollouts.jsonl"
    rows = read_jsonl(path) if path.exists() else []
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "config.json", json.dumps(settings, indent=1) + "\n")
    write_whole(path, "".join(map(one_line, rows)))     # anew: a last line may have been cut
    return out, rows


def one_line(row: dict) -> str:
    """A row as JSON, which has no NaN."""
    finite = json.loads(json.dumps(row), parse_constant=lambda nan: None)
    return json.dumps(finite, ensure_ascii=False) + "\n"


# ---- playing -----------------------------------------------------------------------------------------------

def answer_at_once(model, tokenizer, rollouts: list[Rollout], cfg: Config) -> None:
    """Closed book: the policy has to answer, behind the very words under which its belief is read."""
    for r in rollouts:
        r.write(encode(tokenizer, SCHEMA), by_policy=False)
    play(model, tokenizer, rollouts, None, replace(cfg, max_turns=1))
    for r in rollouts:
        # To play() the turn has no thought, and so is broken. All that matters here: was an answer closed?
        text = tokenizer.decode([i for i, by_policy in zip(r.ids, r.mask) if by_policy])
        answer, closed, _ = text.partition("</answer>")
        if closed and answer.strip() and not TAG.search(answer):
            r.stop, r.answer = "answer", answer.strip()
        else:
            r.stop, r.answer = "length" if r.stop == "length" else "format", None


def play_chunk(model, tokenizer, search, tasks: list[tuple], cfg: Config) -> list[dict]:
    """Play tasks (benchmark, question, sample), all at once: lines of rollouts.jsonl. No search: closed book.

    All are played to their ends and then scored, so that only one of the two needs memory at a time.
    """
    if not tasks:           # of the last chunk a process may have no share
        return []
    rollouts = [begin(tokenizer, question["question"]) for _, question, _ in tasks]
    if search is None:
        answer_at_once(model, tokenizer, rollouts, cfg)
    else:
        play(model, tokenizer, rollouts, search, cfg)
    _, beliefs = score(model, tokenizer, rollouts, [question["answers"] for _, question, _ in tasks], cfg)
    return [{"benchmark": name, "sample": k, **record(tokenizer, r, question, b, None, None, cfg)}
            for (name, question, k), r, b in zip(tasks, rollouts, beliefs)]


def stop_if_search_is_down(rows: list[dict], new: list[dict], last: bool) -> None:
    """UserError if over half of the latest searches failed: those of the new rows, and 10 at least.

    So one failure in a small chunk stops nothing. Fewer than 10 are judged only in the last chunk.
    """
    of = lambda rows: [turn for row in rows for turn in row["turns"] if turn["query"] is not None]
    latest = of(rows + new)[-max(FEWEST_SEARCHES, len(of(new))):]
    errors = [turn["error"] for turn in latest if turn["error"]]
    if len(errors) > MAX_FAILED_SEARCHES * len(latest) and (last or len(latest) >= FEWEST_SEARCHES):
        raise UserError(f"{len(errors)} of the last {len(latest)} searches failed ({errors[-1]}). "
                        "When they work again, the same command goes on")


def play_all(model, tokenizer, search, cfg: Config, rows: list[dict], todo: list[tuple], out: Path) -> None:
    """Play what is still to be played. A chunk is added to rows and rollouts.jsonl before the next begins."""
    size = cfg.rollout_batch * WORLD
    bar = tqdm(total=len(rows) + len(todo), initial=len(rows), unit="rollout", dynamic_ncols=True,
               disable=True if RANK else None)
    with bar, open(os.devnull if RANK else out / "rollouts.jsonl", "a", encoding="utf-8") as file:
        for start in range(0, len(todo), size):
            # A chunk draws numbers of its own: not those from before an interruption, nor of another process.
            torch.manual_seed(random.Random(f"{cfg.seed}-{len(rows)}-{RANK}").getrandbits(63))
            mine = todo[start:start + size][RANK::WORLD]
            new = all_gather(play_chunk(model, tokenizer, search, mine, cfg))
            stop_if_search_is_down(rows, new, last=start + size >= len(todo))
            rows += new
            file.writelines(map(one_line, new))
            file.flush()
            f1, em = (100 * mean(row[key] for row in rows) for key in ("f1", "em"))
            bar.set_postfix_str(f"F1 {f1:.1f}, EM {em:.1f}", refresh=False)
            bar.update(len(new))


def first(look):
    """What look() returns in the first process, for all of them. If it raises there, all of them end."""
    try:
        found = [] if RANK else [look()]
    except (UserError, OSError) as e:
        found = [e]
    found, = all_gather(found)
    if isinstance(found, Exception):
        raise found if RANK == 0 else SystemExit(2)     # it is told once
    return found


def evaluate(args: argparse.Namespace) -> Path:
    """The whole evaluation; returns the folder of its results, which is made once nothing was refused."""
    cfg, peft, names = first(lambda: load_config(args))
    chosen, notes = first(lambda: read_chosen(names, args.limit, cfg.seed))
    search = None if args.no_search else open_search(cfg.search, cfg.search_cache)
    model, tokenizer = load_model(cfg, adapter=peft)
    # In a closed book the words that make it answer stand between prompt and turn.
    room = len(encode(tokenizer, SCHEMA)) * args.no_search
    roomy, every = replace(cfg, max_new_tokens=cfg.max_new_tokens + room), [*chain(*chosen.values())]
    first(lambda: check_questions(model, tokenizer, every, roomy))
    settings = first(lambda: all_settings(args, cfg, peft, chosen, notes, unwrap(model).name_or_path))
    out, rows = first(lambda: begin_folder(args.out, settings))
    done = {(row["benchmark"], row["id"], row["sample"]) for row in rows}
    tasks = [(name, q, k) for name, part in chosen.items() for q in part for k in range(args.n)]
    todo = [(name, q, k) for name, q, k in tasks if (name, q["id"], k) not in done]
    questions = ", ".join(f"{name} ({note['questions']})" for name, note in notes.items())
    there = f"; {len(done):,} of them are there already" if done else ""
    print(f"{peft or cfg.model}: {len(tasks):,} rollouts on {questions}{there}.", flush=True)
    print(f"Results go to {out}.", flush=True)
    play_all(model, tokenizer, search, cfg, rows, todo, out)
    if RANK == 0:
        print(f"\n{write_results(out, settings, rows)}\nTo read the rollouts, open {out / 'report.html'}")
    return out


# ---- command line ------------------------------------------------------------------------------------------

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Of igpo's options only those that are given are there: see load_config()."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"eval: {message}; --help lists the options\n")
    add = parser.add_argument
    add("--benchmark", nargs="+", default=[], metavar="NAME",
        help=f"{', '.join(BENCHMARKS)}, all (these), demo, or files; if none: the questions of --data")
    add("--adapter", default="", help="run folder (its checkpoint/), or PEFT folder such as runs/x/best")
    add("--limit", type=int, default=0, help="questions drawn from each benchmark by --seed; 0: all")
    add("--n", type=int, default=1, help="samples a question, for mean and best of n; above 1: temperature 1")
    add("--no_search", action="store_true", help="closed book: the policy is made to answer at once")
    add("--out", default="", help="folder of the results; empty: results/<name>")
    other = {"temperature": "sampling temperature; 0, greedy, unless --n is above 1",
             "seed": "seed of sampling and of the questions drawn",
             "data": "folder: its test.jsonl or else dev.jsonl is asked, its corpus.jsonl searched (demo)"}
    for f in fields(Config):
        if f.name in EPISODE:
            text = other.get(f.name, f"{f.metadata['help']} ({f.default!r})")
            add(f"--{f.name}", type=type(f.default), default=argparse.SUPPRESS, help=text)
    args = parser.parse_args(argv)
    names = [b for name in args.benchmark for b in (BENCHMARKS if name == "all" else (name,))]
    args.benchmark = list(dict.fromkeys(names))
    if args.n < 1 or args.limit < 0:
        parser.error("--n must be at least 1 and --limit at least 0")
    return args


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0; 2 for what the user can mend (told in one line); 130 and 143 for Ctrl-C and SIGTERM."""
    args, told = parse_args(argv), sys.stdout
    try:
        if WORLD > 1:
            cuda = torch.cuda.is_available()
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"])) if cuda else None
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
            sys.stdout = told if RANK == 0 else open(os.devnull, "w")
        evaluate(args)
    except (UserError, OSError) as e:
        print(f"eval: {first_line(e)}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as e:
        print(f"eval: {first_line(e)} Lower --rollout_batch or --batch_tokens: the same command goes on.",
              file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\neval: interrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    finally:
        sys.stdout = told
        if WORLD > 1 and dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.stdout.reconfigure(errors="replace")        # a name in any script, on a terminal that knows one
    sys.exit(main())
