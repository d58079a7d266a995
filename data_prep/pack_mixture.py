"""From a mixture file to packed shards in one go: `elastic data_prep pack_mixture mixture/offline --out data/mixture`.
To resume a killed run, repeat the command; memory is bounded by one shard, whatever the size of the corpus.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from elastic.console import Parser
from elastic.data.file_rows import ReadReport
from elastic.data.packing import Sample, best_fit, packed_row, tokenise
from elastic.data.prompts import set_template_kwargs
from elastic.data.records import Record, read_records
from elastic.data.shards import FORMAT, MANIFEST, SPLITS, tokenizer_origin, write_shard
from elastic.files import (
    check_place,
    file_sha256,
    find_config,
    is_foreign,
    new_file,
    put_in_place,
    sealed,
    sole_writer,
    unsealed,
    write_atomic,
)
from elastic.model.loading import load_tokenizer

from .draw import token_count
from .fill import FULL, fill_up
from .generators import generate
from .mixture_config import Mixture, read_mixture
from .overlap import overlap_fault

RECIPE, TRAIN_CONFIG = "recipe.json", "train.yaml"
ENDLESS = 1 << 40
SHOWN_EVERY = 0.5  # seconds
_drawn_tokens: Any = None  # of this process and its siblings, in shared memory


def pack_mixture(mixture: Mixture, out: str | Path, workers: int = 2) -> dict[str, Any]:
    """Write the data folder of a mixture; returns its manifest.

    Shards are made beside the final place, by `workers` processes, and stay there if the run is killed: the same
    mixture then resumes with what is missing, and ends with the same bytes.

    Raises:
        ValueError: `out` holds something else or is being written, or a source that gives no sample.
        FileNotFoundError: record files, or text, that are missing.
        OSError: the disk is full, or a worker died; what was finished stays.
    """
    out = Path(out)
    if is_foreign(out, MANIFEST):
        raise ValueError(f"{out} exists but is not an Elastic Attention data folder; choose another --out")
    with sole_writer(out):
        return _packed(mixture, out, workers)


def _packed(mixture: Mixture, out: Path, workers: int) -> dict[str, Any]:
    real = Path(os.path.realpath(out))  # a link may lead to another disk, and parts are renamed into place
    scratch = real.with_name(f".{real.name}.parts")
    _begin(scratch, mixture)
    jobs = [(split, part) for split in SPLITS if split in mixture.tokens for part in range(mixture.parts(split))]
    entries: dict[tuple[str, int], dict[str, Any]] = {}
    entries |= {job: entry for job in jobs if (entry := _finished(scratch, *job)) is not None}
    missing = [job for job in jobs if job not in entries]
    with _bar(mixture, entries) as drawn, closing(_run(mixture, scratch, missing, workers, drawn)) as made:
        for job, entry in zip(missing, made, strict=True):
            entries[job] = entry
    splits: dict[str, dict[str, Any]] = {}
    for split, part in jobs:
        splits.setdefault(split, {})[_name(part)] = entries[split, part]
    manifest = {"format": FORMAT, **_origin(mixture), "splits": splits}
    write_atomic(scratch / TRAIN_CONFIG, yaml.safe_dump(_training(mixture, out), sort_keys=False))
    write_atomic(scratch / MANIFEST, sealed(manifest))
    put_in_place(scratch, out)
    # What resuming needs, to the last moment, and what a killed run on another machine left.
    for file in (out / RECIPE, *out.glob("*/*.json"), *out.glob("*/.*.writing")):
        file.unlink()
    return manifest


@contextmanager
def _bar(mixture: Mixture, entries: dict[tuple[str, int], dict[str, Any]]) -> Iterator[Any]:
    """Inside, a bar follows the tokens of the shards in `entries` and, between them, those that all processes have
    drawn: a count in shared memory. It has no lock, so that a process that dies holds up none; what is lost when two
    add to it at once, a finished shard makes up for.
    """
    drawn: Any = multiprocessing.RawValue("q", 0)
    before, ended = sum(entry["tokens"] for entry in entries.values()), threading.Event()

    def show() -> None:
        finished = sum(entry["tokens"] for entry in list(entries.values()))
        bar.n = max(bar.n, finished, min(bar.total, before + drawn.value))
        bar.refresh()

    def follow() -> None:
        while not ended.wait(SHOWN_EVERY):
            show()

    with tqdm(total=sum(mixture.tokens.values()), desc="mixture", unit="tokens", unit_scale=True) as bar:
        bar.n = bar.initial = before
        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield drawn
        finally:
            ended.set()
            thread.join()
            show()


def _run(
    mixture: Mixture, scratch: Path, jobs: list[tuple[str, int]], workers: int, drawn: Any
) -> Generator[dict[str, Any], None, None]:
    if workers <= 1 or len(jobs) <= 1:
        _count_in(drawn)
        yield from (pack_part(mixture, scratch, split, part) for split, part in jobs)
        return
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, initializer=_begin_worker, initargs=(drawn,)) as pool:
        try:
            with _signals_held():
                futures = [pool.submit(pack_part, mixture, scratch, split, part) for split, part in jobs]
            yield from (future.result() for future in futures)
        except BrokenProcessPool as error:
            raise ChildProcessError(
                f"a worker process died ({error}); finished shards stay, so run the same command again, with fewer "
                "--workers or a smaller part_tokens if memory ran out"
            ) from error
        except BaseException:
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()  # in the middle of a shard, which would take minutes to end
            raise  # the pool notices, and leaving `with` waits for its thread, which would disturb the process's end


@contextmanager
def _signals_held() -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM wait until all processes are begun. Those begin with these handlers: Ctrl-C is left to
    the parent, SIGTERM ends them.
    """
    parent, held = os.getpid(), []

    def hold(number: int, _frame: Any) -> None:
        if os.getpid() == parent:
            held.append(number)
        elif number == signal.SIGTERM:
            os._exit(1)

    if threading.current_thread() is not threading.main_thread():
        yield  # signals are another thread's
        return
    before = {number: signal.signal(number, hold) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for again in held:
            signal.raise_signal(again)


def _count_in(drawn: Any) -> None:
    """Let this process add to a count what it draws."""
    global _drawn_tokens
    _drawn_tokens = drawn


def _begin_worker(drawn: Any) -> None:
    """Make this worker process end when its parent is gone, even killed. Ctrl-C, which a terminal sends to all
    processes, is left to the parent, and SIGTERM ends it.
    """
    _count_in(drawn)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def pack_part(mixture: Mixture, scratch: Path, split: str, part: int) -> dict[str, Any]:
    """Draw, tokenise and pack one shard; a function of its arguments alone."""
    report = ReadReport()
    budget = mixture.tokens[split] / mixture.parts(split)
    samples: list[Sample] = []
    for name in mixture.sources:
        samples += _drawn(mixture, name, split, part, budget * mixture.share(name), report)
    rows = fill_up(best_fit(samples, mixture.seq_length), mixture, split, part, *_tokenizer_of(mixture))
    file = scratch / split / f"{_name(part)}.arrow"
    with new_file(file) as writing:
        entry = write_shard(writing, map(packed_row, rows))
    entry["skipped"] = report.bad
    write_atomic(file.with_suffix(".json"), sealed({"entry": entry}))
    return entry


def _drawn(mixture: Mixture, name: str, split: str, part: int, budget: float, report: ReadReport) -> list[Sample]:
    """Samples of one source up to its share of the budget; the last one goes in if at least half of it fits."""
    tokenizer, measure = _tokenizer_of(mixture)
    taken: list[Sample] = []
    left = budget
    for record in _records(mixture, name, split, part, measure, report):
        try:
            sample = replace(tokenise(record, tokenizer), source=name)
        except ValueError as error:
            raise ValueError(f"source {name!r}, record {record.source or 'without source'}: {error}") from error
        size = len(sample.input_ids)
        if size > mixture.seq_length:
            report.bad.append(f"{name}: {record.source} has {size} tokens, more than the {mixture.seq_length} of a row")
            continue
        if left < size / 2 and taken:
            return taken
        taken.append(sample)
        left -= size
        if _drawn_tokens is not None:
            _drawn_tokens.value += size
        if left <= 0:
            return taken
    if not taken:
        raise ValueError(f"source {name!r} gives no sample for part {part} of {split}; {report}")
    report.bad.append(
        f"{name}: used up {left:.0f} tokens before its share of part {part}; give more records, or less weight"
    )
    return taken


def _records(mixture: Mixture, name: str, split: str, part: int, measure: Any, report: ReadReport) -> Iterator[Record]:
    source = mixture.sources[name]
    if source.path is not None:
        path = source.path.format(split=split)
        for number, record in enumerate(read_records(path, report, every=mixture.parts(split), first=part), 1):
            if (fault := overlap_fault(record, mixture.window, measure)) is None:
                yield record
            else:
                report.good -= 1
                report.bad.append(f"{path}: good record {number} of the part ({record.source or 'no source'}): {fault}")
        return
    shortest, longest = source.context or mixture.context
    seed = mixture.seed * 1_000_003 + part
    generator, more = source.generator or name, (mixture.window, source.system)
    yield from generate(generator, split, ENDLESS, longest, seed, measure, *mixture.folders, shortest, *more)


def _tokenizer_of(mixture: Mixture) -> Any:
    tokenizer, measure = _tokenizer(mixture.backbone)
    set_template_kwargs(tokenizer, mixture.chat_template_kwargs)
    return tokenizer, measure


@lru_cache(maxsize=1)
def _tokenizer(backbone: str) -> Any:
    tokenizer = load_tokenizer(backbone)
    return tokenizer, token_count(tokenizer)


def _origin(mixture: Mixture) -> dict[str, Any]:
    tokenizer, _ = _tokenizer_of(mixture)
    return {
        "seq_length": mixture.seq_length,
        "mixture": mixture.to_dict(),
        "versions": {name: version(name) for name in ("transformers", "tokenizers", "datasets")},
        **tokenizer_origin(tokenizer),
    }


def _begin(scratch: Path, mixture: Mixture) -> None:
    """Keep the parts of a killed run of the same mixture, records, tokenizer and versions; clear those of another."""
    named = (s.path.format(split=split) for s in mixture.sources.values() if s.path for split in mixture.tokens)
    states = {path: Path(path).stat() for path in named if Path(path).is_file()}
    files = {path: [state.st_size, state.st_mtime_ns] for path, state in states.items()}
    recipe = json.dumps({**_origin(mixture), "records": files}, sort_keys=True)
    if not (scratch / RECIPE).is_file() or (scratch / RECIPE).read_bytes() != recipe.encode():
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        write_atomic(scratch / RECIPE, recipe)


def _finished(scratch: Path, split: str, part: int) -> dict[str, Any] | None:
    """What a killed run has said of a shard; None where there is none, or it or the shard is damaged."""
    file = scratch / split / f"{_name(part)}.json"
    try:
        entry: dict[str, Any] = unsealed(file.read_text(encoding="utf-8"))["entry"]
        return entry if file_sha256(file.with_suffix(".arrow")) == entry["sha256"] else None
    except (FileNotFoundError, ValueError, KeyError):
        return None


def _training(mixture: Mixture, out: Path) -> dict[str, Any]:
    """Layer for `elastic fit -c`: the data and the targets."""
    layer: dict[str, Any] = {"data": {"data_dir": str(out)}}
    return {**layer, "model": {"targets": mixture.targets}} if mixture.targets else layer


def _name(part: int) -> str:
    return f"part-{part:05d}"


def main(argv: list[str] | None = None, prog: str = "python -m data_prep.pack_mixture") -> int:
    """Command line; `prog` is how it was called."""
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("mixture", help="a shipped mixture, such as mixture/offline, or a YAML file of your own")
    parser.add_argument("--out", type=Path, required=True, help="data folder to write")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    args = parser.parse_args(argv)
    try:
        check_place("--out", args.out, folder=True)
        manifest = pack_mixture(read_mixture(find_config(args.mixture, "mixture")), args.out, args.workers)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for split, parts in manifest["splits"].items():
        rows, tokens = (sum(entry[key] for entry in parts.values()) for key in ("rows", "tokens"))
        skipped = sum(len(entry["skipped"]) for entry in parts.values())
        fill = tokens / (rows * manifest["seq_length"])
        sys.stdout.write(f"{split}: {rows} rows, {tokens} tokens, {fill:.1%} full, {skipped} records left out\n")
        if fill < FULL:
            sys.stdout.write("  fuller rows: let a generator make short contexts, or raise part_tokens\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
