"""The FlashRAG files of the benchmarks, from the hub into a cache: eval.py --benchmark and igpo.py --train take them by name."""
from __future__ import annotations

import os
import time
from pathlib import Path

import requests
from tqdm import tqdm

from igpo import UserError, first_line

CACHE = Path.home() / ".cache" / "igpo" / "benchmarks"
WAIT = 1.0      # seconds before the first retry of a download, doubled each time


def download(url: str, path: Path, tries: int = 6) -> None:
    """Fetch url into path, whole or not at all; what was cut goes on where it was cut. Raises FileNotFoundError on 404, else UserError."""
    part, tag = path.with_name(path.name + ".part"), path.with_name(path.name + ".etag")
    path.parent.mkdir(parents=True, exist_ok=True)
    # identity: the size of a compressed answer would say nothing about the file. requests drops the token on a redirect to another host.
    headers = {"Accept-Encoding": "identity"}
    if os.environ.get("HF_TOKEN"):
        headers["Authorization"] = f"Bearer {os.environ['HF_TOKEN']}"
    for attempt in range(tries):
        have, wait = (part.stat().st_size if part.exists() and tag.exists() else 0), WAIT * 2 ** attempt
        going_on = {"Range": f"bytes={have}-", "If-Range": tag.read_text()} if have else {}      # the rest, if it is still the same file
        try:
            with requests.get(url, headers={**headers, **going_on}, stream=True, timeout=30) as answer:
                code, problem = answer.status_code, f"HTTP {answer.status_code}"
                if code in (200, 206):
                    size, wanted = receive(answer, part, tag)
                    if wanted in (None, size):
                        tag.unlink(missing_ok=True)
                        os.replace(part, path)
                        return
                    problem = f"{size} bytes came, not {wanted}"
                if code == 404:
                    raise FileNotFoundError(url)
                if code in (401, 403):
                    raise UserError(f"{url}: HTTP {code}. Set HF_TOKEN to a token that may read it.")
                if code == 416 or code in (200, 206) and size > wanted:      # what is there cannot be a part of the file
                    part.unlink(missing_ok=True)
                elif 400 <= code < 500 and code not in (408, 429):
                    break
                asked = answer.headers.get("Retry-After", "")
                wait = min(float(asked), 120.0) if asked.isdigit() else wait
        except requests.RequestException as e:
            problem = first_line(e)
        if attempt < tries - 1:
            time.sleep(wait)
    raise UserError(f"{url}: could not be downloaded ({problem}). Run again to go on, or put the file at {path} yourself.")


def receive(answer: requests.Response, part: Path, tag: Path) -> tuple[int, int | None]:
    """Write what came to part (200: the file, 206: its rest) and its version to tag; (size now, size of the whole if told)."""
    version = answer.headers.get("ETag", "").removeprefix("W/") or answer.headers.get("Last-Modified", "")
    tag.write_text(version) if version else tag.unlink(missing_ok=True)
    total = answer.headers.get("Content-Range", "").rpartition("/")[2] or answer.headers.get("Content-Length", "")
    wanted = int(total) if total.isdigit() else None
    with open(part, "ab" if answer.status_code == 206 else "wb") as file:
        with tqdm(total=wanted, initial=file.tell(), unit="B", unit_scale=True, desc=f"{part.parent.name}/{part.stem}", leave=False) as bar:
            for block in answer.iter_content(1 << 16):
                bar.update(file.write(block))
    return part.stat().st_size, wanted


def fetch(name: str, split: str) -> Path:
    """The FlashRAG file of a benchmark, from the cache or the hub. Not every benchmark has a test split: "test" then takes dev."""
    host = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    paths = [CACHE / name / f"{s}.jsonl" for s in (("test", "dev") if split == "test" else (split,))]
    for path in [path for path in paths if path.exists()] or paths:
        try:
            if not path.exists():
                download(f"{host}/datasets/RUC-NLPIR/FlashRAG_datasets/resolve/main/{name}/{path.name}", path)
            return path
        except FileNotFoundError:
            continue
    raise UserError(f"{name} has no {' or '.join(path.stem for path in paths)} split at {host}.")
