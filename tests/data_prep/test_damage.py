"""A full disk, a killed run and damaged files in data preparation: a clear message, nothing lost, the same bytes after
all.
"""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from data_prep import build_mixture, pack_mixture, published, tokenize_and_pack
from elastic import files
from elastic.data import shards
from elastic.data.records import Record, write_records
from elastic.data.shards import SPLITS, verify

FULL = "No space left on device"


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 256 KiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no right to mount a small disk: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Records of two tasks, about a megabyte."""
    folder = tmp_path_factory.mktemp("damage") / "records"
    for split in SPLITS:
        (folder / split).mkdir(parents=True)
        for task in ("code", "single_qa"):
            made = [Record(task, f"f{i % 9} " * (40 + i % 60), "count", f"{i % 9}", f"own/{i}") for i in range(700)]
            write_records(folder / split / f"{task}.jsonl", made)
    return folder


def mixture_file(folder, records, **more):
    """Six parts of rows of 256 tokens."""
    values = {
        "backbone": "tiny",
        "seq_length": 256,
        "tokens": {"train": 40_000, "validation": 5_000},
        "context": [64, 200],
        "part_tokens": 8_000,
        "sources": {task: {"path": f"{records}/{{split}}/{task}.jsonl"} for task in ("code", "single_qa")},
    }
    file = folder / "mixture.yaml"
    file.write_text(yaml.safe_dump({**values, **more}))
    return file


def refused(capsys, main, *arguments):
    """The message of a command that ends with code 2."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def killed(run, *arguments):
    """Run in a process that kills itself."""
    process = multiprocessing.get_context("fork").Process(target=run, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def content(folder):
    """Bytes by file; `train.yaml` names the folder itself."""
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*.*")) if p.name != "train.yaml"}


def test_a_full_disk_while_records_are_built(small_disk, capsys):
    out = small_disk / "records"
    arguments = ("--out", out, "--language", "tiny", "--words", "64")
    assert build_mixture.main([str(a) for a in (*arguments, "--per-task", "8")]) == 0
    before = content(out)
    assert FULL in refused(capsys, build_mixture.main, *arguments, "--per-task", "4000")
    assert content(out) == before
    assert build_mixture.main([str(a) for a in (*arguments, "--per-task", "8")]) == 0  # what was half written is gone
    assert content(out) == before and [path.name for path in small_disk.iterdir()] == ["records"]


def test_a_full_disk_while_records_are_packed(small_disk, records, tmp_path, capsys):
    few = tmp_path / "few"
    for split in SPLITS:
        (few / split).mkdir(parents=True)
        write_records(few / split / "code.jsonl", [Record("code", "f1 " * 50, "count", "1")] * 5)
    out = small_disk / "data"
    command = ("--backbone", "tiny", "--seq-length", "256", "--out", out)
    assert tokenize_and_pack.main([str(a) for a in ("--records", few, *command)]) == 0
    before = content(out)
    assert FULL in refused(capsys, tokenize_and_pack.main, "--records", records, *command)
    assert content(out) == before and verify(out)


def test_a_full_disk_while_a_mixture_is_packed(small_disk, records, tmp_path, capsys):
    file = mixture_file(tmp_path, records)
    assert pack_mixture.main([str(file), "--out", str(tmp_path / "whole"), "--workers", "1"]) == 0
    (small_disk / "other").write_bytes(b"x" * (150 << 10))
    assert FULL in refused(capsys, pack_mixture.main, file, "--out", small_disk / "data", "--workers", "1")
    finished = list(small_disk.rglob("*.arrow"))
    assert finished and not (small_disk / "data").exists()
    stamps = {path.name: path.stat().st_mtime_ns for path in finished}
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    assert pack_mixture.main([str(file), "--out", str(small_disk / "data"), "--workers", "1"]) == 0
    assert content(small_disk / "data") == content(tmp_path / "whole")
    kept = {path.name: path.stat().st_mtime_ns for path in (small_disk / "data" / "train").iterdir()}
    assert stamps.items() <= kept.items()  # finished shards were not made again


def test_a_full_disk_while_published_data_is_converted(small_disk, tmp_path, capsys):
    row = {"document": "word " * 2000, "summary": "A word.", "id": "1"}
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps({**row, "document": f"{i} {row['document']}"}) + "\n" for i in range(40)))
    out = small_disk / "xsum.jsonl"
    out.write_text("earlier")
    arguments = ("xsum", "--path", file, "--out", out, "--backbone", "tiny", "--shortest", "1")
    assert FULL in refused(capsys, published.main, *arguments)
    assert out.read_text() == "earlier" and [path.name for path in small_disk.iterdir()] == ["xsum.jsonl"]


@pytest.mark.parametrize(
    "moment", ["in a file", "before the exchange", "in the exchange", "after the exchange", "after it in one step"]
)
def test_a_killed_build_is_made_good_by_the_same_command(moment, tmp_path, monkeypatch):
    """Wherever the kill comes, an earlier folder or the new one is there in full afterwards."""
    wanted = tmp_path / "wanted"
    build_mixture.build_mixture(wanted, 6, 64, language="tiny", seed=1)
    out = tmp_path / "records"
    build_mixture.build_mixture(out, 6, 64, language="tiny", seed=0)
    old = content(out)

    def run():
        kill_at(moment, out, monkeypatch)
        build_mixture.build_mixture(out, 6, 64, language="tiny", seed=1)

    killed(run)
    complete = [content(path) for path in tmp_path.iterdir() if (path / "mixture.json").is_file() and path != wanted]
    assert old in complete or content(wanted) in complete
    build_mixture.build_mixture(out, 6, 64, language="tiny", seed=1)
    assert content(out) == content(wanted) and {p.name for p in tmp_path.iterdir()} == {"wanted", "records"}


def test_three_writers_of_a_folder_are_one(records, tmp_path):
    """The others are told of it, whatever they would write."""
    from data_prep.tiny_language import build_tokenizer
    from tests.test_files import another_writer

    out = tmp_path / "data"
    mixture = pack_mixture.read_mixture(mixture_file(tmp_path, records))
    with another_writer(out) as first:
        for write in (
            lambda: build_mixture.build_mixture(out, 6, 64, language="tiny"),
            lambda: tokenize_and_pack.prepare(records, build_tokenizer(), out, 512),
            lambda: pack_mixture.pack_mixture(mixture, out, 1),
        ):
            with pytest.raises(ValueError, match=f"data is being written by process {first.pid} on "):
                write()
    build_mixture.build_mixture(out, 6, 64, language="tiny")
    assert not list(tmp_path.glob(".*"))


def kill_at(moment, out, monkeypatch):
    if moment == "in a file":
        write = build_mixture.write_records

        def half(path, made):
            count = write(path, made)
            die() if "validation" in str(path) else None
            return count

        monkeypatch.setattr(build_mixture, "write_records", half)
    elif moment == "before the exchange":
        monkeypatch.setattr(files, "put_in_place", die)
    elif moment == "after it in one step":
        exchange = files._exchange
        monkeypatch.setattr(files, "_exchange", lambda *names: exchange(*names) and die())
    else:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)  # as where the system has none
        rename = Path.rename

        def dying(path, target):
            first = path == out  # the earlier folder is set aside
            found = rename(path, target)
            die() if first == (moment == "in the exchange") else None
            return found

        monkeypatch.setattr(Path, "rename", dying)


@pytest.mark.parametrize("moment", ["in the exchange", "after the exchange"])
def test_a_mixture_killed_at_its_end_loses_no_shard(moment, records, tmp_path, monkeypatch):
    file = mixture_file(tmp_path, records)
    mixture = pack_mixture.read_mixture(file)
    wanted = pack_mixture.pack_mixture(mixture, tmp_path / "wanted", 1)
    out = tmp_path / "data"
    pack_mixture.pack_mixture(pack_mixture.read_mixture(mixture_file(tmp_path, records, seed=5)), out, 1)

    def run():
        kill_at(moment, out, monkeypatch)
        pack_mixture.pack_mixture(mixture, out, 1)

    killed(run)
    if moment == "in the exchange":
        records_file = records / "train" / "code.jsonl"
        state = records_file.stat()
        os.utime(records_file)  # other records: nothing of the killed run may be used
        begun = tmp_path / ".data.parts"
        pack_mixture._begin(shutil.copytree(begun, tmp_path / "copy"), mixture)
        assert not list((tmp_path / "copy").rglob("*.arrow")) and list(begun.rglob("*.arrow"))
        os.utime(records_file, ns=(state.st_atime_ns, state.st_mtime_ns))
        monkeypatch.setattr(pack_mixture, "pack_part", lambda *_: pytest.fail("a finished shard was made again"))
        pack_mixture.pack_mixture(mixture, out, 1)
        assert content(out) == content(tmp_path / "wanted")
    assert verify(out) == wanted
    assert not list(tmp_path.glob(".data.parts"))


def test_a_worker_that_dies_is_named_and_its_mixture_goes_on(records, tmp_path, monkeypatch, capsys):
    """As when memory runs out: the system kills one process."""
    file = mixture_file(tmp_path, records)
    drawn = pack_mixture._drawn

    def dying(mixture, name, split, part, *more):
        return die() if part == 3 else drawn(mixture, name, split, part, *more)

    monkeypatch.setattr(pack_mixture, "_drawn", dying)
    told = refused(capsys, pack_mixture.main, file, "--out", tmp_path / "data", "--workers", "2")
    assert "a worker process died" in told and "run the same command again, with fewer --workers" in told
    done = {path.stem for path in tmp_path.glob(".data.parts/train/*.arrow")}
    assert done and "part-00003" not in done
    monkeypatch.setattr(pack_mixture, "_drawn", drawn)
    assert pack_mixture.main([str(file), "--out", str(tmp_path / "data"), "--workers", "1"]) == 0
    verify(tmp_path / "data")


def test_a_killed_packing_of_records_leaves_the_earlier_folder(records, tmp_path, monkeypatch):
    from data_prep.tiny_language import build_tokenizer

    tokenizer, out = build_tokenizer(), tmp_path / "data"
    tokenize_and_pack.prepare(records, tokenizer, out, 512)
    before = content(out)

    def run():
        made = iter(range(3))
        write = shards.write_shard
        monkeypatch.setattr(shards, "write_shard", lambda *a: write(*a) if next(made, None) is not None else die())
        tokenize_and_pack.prepare(records, tokenizer, out, 256)

    killed(run)
    assert content(out) == before
    tokenize_and_pack.prepare(records, tokenizer, tmp_path / "other", 256)
    tokenize_and_pack.prepare(records, tokenizer, out, 256)
    assert content(out) == content(tmp_path / "other") and verify(out)


def test_damaged_record_files_in_a_mixture_are_named(records, tmp_path, capsys):
    import pyarrow
    import pyarrow.parquet

    rows = [json.loads(line) for line in (records / "train" / "code.jsonl").read_text().splitlines()]
    whole = tmp_path / "whole.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), whole, row_group_size=100)
    content_ = whole.read_bytes()
    bad = {"cut": content_[: len(content_) // 2], "hole": content_[:200] + b"\0" * 800 + content_[1000:]}
    for name, damaged in bad.items():
        (tmp_path / f"{name}.parquet").write_bytes(damaged)
        sources = {"own": {"path": str(tmp_path / f"{name}.parquet")}}
        file = mixture_file(tmp_path, records, sources=sources, tokens={"train": 40_000})
        told = refused(capsys, pack_mixture.main, file, "--out", tmp_path / "data", "--workers", "1")
        assert f"{name}.parquet cannot be read as parquet" in told and "write or fetch it again" in told
        assert not (tmp_path / "data").exists()
