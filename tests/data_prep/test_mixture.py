"""Mixtures: budget, shares and fill as asked, the same bytes after a kill, bad ones refused by name."""

import errno
import json
import multiprocessing
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_prep import inspect_shards, pack_mixture
from data_prep.mixture_config import Mixture, Source, read_mixture
from elastic.data.datamodule import MixtureDataModule
from elastic.data.records import Record, write_records
from elastic.data.shards import SPLITS, open_corpus, sources_of, verify
from elastic.training.metrics import TaskMeans

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "mixture").glob("*.yaml"))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Two generators and a file, for the word-level tokenizer; unknown words are one token each."""
    folder = tmp_path_factory.mktemp("records")
    for split in SPLITS:
        records = [
            Record("code", f"f{i % 9} " * (20 + i % 50), "count on", f"{i % 9} {i % 7}", f"r{i}") for i in range(1200)
        ]
        write_records(folder / f"{split}.jsonl", records)
    return Mixture(
        backbone="tiny",
        seq_length=512,
        tokens={"train": 60_000, "validation": 4_000, "test": 4_000},
        sources={
            "needle_single": Source(2.0),
            "fact_chain": Source(1.0),
            "own": Source(1.0, str(folder / "{split}.jsonl")),
        },
        context=(64, 400),
        targets={"single_qa": 0.5, "code": [0.8, 1.0]},
        part_tokens=20_000,
    )


@pytest.fixture(scope="module")
def packed(mixture, tmp_path_factory):
    out = tmp_path_factory.mktemp("mixture") / "data"
    pack_mixture.pack_mixture(mixture, out, workers=2)
    return out


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*.*")) if p.name != "train.yaml"}


def test_budget_shares_and_fill(packed, mixture):
    manifest = verify(packed)
    assert list(manifest["splits"]["train"]) == ["part-00000", "part-00001", "part-00002"]
    for split, budget in mixture.tokens.items():
        parts = manifest["splits"][split].values()
        tokens, rows = sum(e["tokens"] for e in parts), sum(e["rows"] for e in parts)
        assert -0.05 * budget < tokens - budget < 2 * len(parts) * mixture.seq_length
        assert sources_of(manifest, split) == ("fact_chain", "needle_single", "own")
        assert split != "train" or tokens >= 0.97 * rows * mixture.seq_length
        for entry in parts:
            assert sum(sum(found.values()) for found in entry["lengths"].values()) == entry["samples"]
            assert entry["skipped"] == [] and set(entry["tasks"]) == {"single_qa", "multihop_qa", "code"}
    by_source = {}
    for part in manifest["splits"]["train"]:
        for row in open_corpus(packed, "train", part):
            for name, a, b in zip(row["source"], row["cu_seq_lens"], row["cu_seq_lens"][1:], strict=False):
                by_source[name] = by_source.get(name, 0) + b - a
    for name in mixture.sources:
        assert by_source[name] / sum(by_source.values()) == pytest.approx(mixture.share(name), abs=0.03)


def test_rows_of_long_records_are_filled_up(mixture, tmp_path):
    """Records of six tenths of a row leave four tenths, which generators fill; without one the rows stay as they are,
    and the command says so.
    """
    write_records(tmp_path / "long.jsonl", [Record("code", f"f{i} " * 1200, "count", f"{i}") for i in range(40)])
    own = {"own": Source(1.0, str(tmp_path / "long.jsonl"))}
    long = replace(mixture, seq_length=2048, tokens={"train": 24_000}, part_tokens=24_000, context=(64, 1900))
    for sources, low, high in ((own, 0.55, 0.65), ({**own, "many_shot": Source(0.01)}, pack_mixture.FULL, 1)):
        made = pack_mixture.pack_mixture(replace(long, sources=sources), tmp_path / "data", 1)["splits"]["train"]
        entry = made["part-00000"]
        assert low <= entry["tokens"] / (entry["rows"] * 2048) <= high and entry["sources"]["own"] >= 19
    again = pack_mixture.pack_mixture(replace(long, sources=sources), tmp_path / "again", 1)
    assert again["splits"]["train"] == made  # what fills is a function of seed and part too


def test_training_reads_it_and_results_can_be_told_by_source(packed):
    module = MixtureDataModule(str(packed), rows_per_step=2)
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))[0]
    names = sources_of(module.manifest, "train")
    means = TaskMeans(("loss",), names)
    means.update(torch.tensor([names.index(s) for s in batch["source"]]), {"loss": torch.ones(len(batch["source"]))})
    assert {name: row["n"] for name, row in means.compute().items()} == {
        name: batch["source"].count(name) for name in names if name in batch["source"]
    }
    import yaml

    layer = yaml.safe_load((packed / "train.yaml").read_text())
    assert layer == {"data": {"data_dir": str(packed)}, "model": {"targets": {"single_qa": 0.5, "code": [0.8, 1.0]}}}


def test_any_number_of_workers_writes_the_same_bytes(packed, mixture, tmp_path):
    pack_mixture.pack_mixture(mixture, tmp_path / "data", workers=1)
    assert content(tmp_path / "data") == content(packed)
    other = replace(mixture, seed=1)
    assert pack_mixture.pack_mixture(other, tmp_path / "data", workers=1)["splits"] != verify(packed)["splits"]


def _dies(mixture, out, parts):
    made = iter(range(parts))
    pack_part = pack_mixture.pack_part

    def dying(*arguments):
        if next(made, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return pack_part(*arguments)

    pack_mixture.pack_part = dying
    pack_mixture.pack_mixture(mixture, out, workers=1)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_bar_moves_while_a_shard_is_made(workers, mixture, tmp_path, monkeypatch, capsys):
    """Not once for each of them, which may take minutes; and it ends where the shards do."""
    tokenise = pack_mixture.tokenise
    monkeypatch.setattr(pack_mixture, "SHOWN_EVERY", 0.02)
    monkeypatch.setattr(pack_mixture, "tokenise", lambda *given: time.sleep(0.01) or tokenise(*given))
    one = replace(mixture, tokens={"train": 20_000, "test": 1_000}, part_tokens=20_000)
    manifest = pack_mixture.pack_mixture(one, tmp_path / "data", workers)
    shown = [
        int(float(n) * (1000 if k else 1)) for n, k in re.findall(r"\| ([\d.]+)(k?)/21.0k", capsys.readouterr().err)
    ]
    tokens = manifest["splits"]["train"]["part-00000"]["tokens"]
    assert shown == sorted(shown) and len({n for n in shown if 0 < n < 0.9 * tokens}) > 2
    assert shown[-1] >= 0.99 * tokens


def test_a_killed_run_goes_on_to_the_same_bytes(packed, mixture, tmp_path, monkeypatch):
    process = multiprocessing.get_context("fork").Process(target=_dies, args=(mixture, tmp_path / "data", 2))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / "data").exists()
    made = []
    pack_part = pack_mixture.pack_part
    monkeypatch.setattr(pack_mixture, "pack_part", lambda *a: made.append(a[2:]) or pack_part(*a))
    pack_mixture.pack_mixture(mixture, tmp_path / "data", workers=1)
    assert made == [("train", 2), ("validation", 0), ("test", 0)]
    assert content(tmp_path / "data") == content(packed) and [p.name for p in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("damage", ["shard", "cut", "count", "gone"])
def test_a_finished_shard_that_was_damaged_since_is_made_again(damage, packed, mixture, tmp_path, monkeypatch):
    process = multiprocessing.get_context("fork").Process(target=_dies, args=(mixture, tmp_path / "data", 2))
    process.start()
    process.join(120)
    shard, entry = (tmp_path / ".data.parts" / "train" / f"part-00000{ending}" for ending in (".arrow", ".json"))
    if damage == "shard":
        whole = bytearray(shard.read_bytes())
        whole[len(whole) // 2] ^= 1
        shard.write_bytes(whole)
    elif damage == "gone":
        shard.unlink()
    else:
        text = entry.read_text()
        entry.write_text(text[:40] if damage == "cut" else text.replace('"rows": ', '"rows": 1', 1))
    made, pack_part = [], pack_mixture.pack_part
    monkeypatch.setattr(pack_mixture, "pack_part", lambda *a: made.append(a[2:]) or pack_part(*a))
    pack_mixture.pack_mixture(mixture, tmp_path / "data", workers=1)
    assert made == [("train", 0), ("train", 2), ("validation", 0), ("test", 0)]
    assert content(tmp_path / "data") == content(packed)


def test_a_full_disk_is_named_and_nothing_finished_is_lost(packed, mixture, tmp_path, monkeypatch, capsys):
    write, calls = pack_mixture.write_shard, iter([True, False])

    def full(file, rows):
        return write(file if next(calls, True) else Path("/dev/full"), rows)

    monkeypatch.setattr(pack_mixture, "write_shard", full)
    with pytest.raises(OSError) as stopped:
        pack_mixture.pack_mixture(mixture, tmp_path / "data", workers=1)
    assert stopped.value.errno == errno.ENOSPC and not (tmp_path / "data").exists()
    assert len(list((tmp_path / ".data.parts").rglob("*.arrow"))) == 1
    pack_mixture.pack_mixture(mixture, tmp_path / "data", workers=1)
    assert content(tmp_path / "data") == content(packed)


def test_bad_records_are_counted_and_a_source_that_ends_is_named(mixture, tmp_path):
    file = tmp_path / "few.jsonl"
    lines = [json.dumps({"task": "code", "context": "f1 " * n, "question": "", "answer": "1"}) for n in (30, 600)]
    file.write_text("\n".join([*lines, "not json", '{"task": "poem"}']), encoding="utf-8")
    tokens = {"train": 512}
    few = replace(mixture, tokens=tokens, sources={"few": Source(1.0, str(file))}, part_tokens=512)
    entry = pack_mixture.pack_mixture(few, tmp_path / "data", 1)["splits"]["train"]["part-00000"]
    assert entry["samples"] == 1
    told = "\n".join(entry["skipped"])
    assert "has 604 tokens, more than the 512" in told and "few.jsonl:3: not JSON" in told
    assert "missing ['context'" in told and "few: used up 4" in told
    with pytest.raises(FileNotFoundError, match=r"no record file at .*absent"):
        gone = replace(few, sources={"gone": Source(1.0, str(tmp_path / "absent.jsonl"))})
        pack_mixture.pack_mixture(gone, tmp_path / "more", 1)


def test_inspection_shows_shares_and_draws_them(packed, tmp_path, capsys):
    picture = tmp_path / "shares.png"
    assert inspect_shards.main([str(packed), "--backbone", "tiny", "--picture", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert "sources: fact_chain" in shown and "label mask of its row" in shown and picture.stat().st_size > 10_000
    assert inspect_shards.mask_line([-100] * 32 + [5] * 32, 8) == "....####"


def test_the_shipped_mixtures_are_read():
    assert CONFIGS
    for path in CONFIGS:
        mixture = read_mixture(path)
        assert all(mixture.parts(split) >= 1 for split in mixture.tokens) and sum(
            map(mixture.share, mixture.sources)
        ) == pytest.approx(1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not valid YAML"),
        ("colour: red", "yaml: the mixture has no setting 'colour'; settings are backbone, "),
        ("sead: 3", "yaml: the mixture has no setting 'sead'; did you mean seed?"),
        ("sources: {many_shot: {weight: '2'}}", "source 'many_shot' has the weight '2'; expected a number above 0"),
        ("seq_length: 1.5", "yaml: seq_length=1.5 is not a whole number of tokens"),
        ("window: wide", "yaml: window='wide' is not a whole number of tokens"),
        ("context: [64, all]", "yaml: context='all' is not a whole number of tokens"),
        ("tokens: {dev: 4000}", "tokens={'dev': 4000}; expected a budget of at least one row"),
        ("context: [10, 100]", r"context=\[10, 100\]; expected two lengths from 64 to below the 512 tokens of a row"),
        (
            "sources: {sudoku: {weight: 1}}",
            "source 'sudoku' has no path and is not a generator; generators are",
        ),
        ("sources: {s: {generator: sudoku}}", "source 's' has no path and is not a generator; generators are needle_"),
        ("sources: {s: {path: x, generator: many_shot}}", "has a path, so it takes no generator and no context"),
        ("sources: {s: {generator: many_shot, context: [90, 600]}}", r"context=\[90, 600\]; expected two lengths from"),
        ("sources: {s: {generator: many_shot, context: [90]}}", r"context=\[90\]; expected two lengths from"),
        ("sources: {many_shot: {weight: 0}}", "source 'many_shot' has the weight 0; expected a number above 0"),
        ("sources: {many_shot: {wait: 0}}", "yaml: source 'many_shot' has no setting 'wait'; did you mean weight?"),
        ("sources: {}", "no sources; name generators"),
        ("targets: {poetry: 1}", "targets name poetry; known tasks are"),
        ("part_tokens: 5", "part_tokens=5 is below seq_length=512"),
    ],
)
def test_bad_mixture_files_are_refused(tmp_path, text, message):
    import yaml

    base = {
        "backbone": "tiny",
        "seq_length": 512,
        "tokens": {"train": 4000},
        "context": [64, 400],
        "sources": {"many_shot": {"weight": 1}},
    }
    file = tmp_path / "mixture.yaml"
    file.write_text(text if text.endswith("[") else yaml.safe_dump({**base, **yaml.safe_load(text)}))
    with pytest.raises(ValueError, match=message):
        read_mixture(file)


def test_a_data_folder_that_is_a_link_stays_one(mixture, tmp_path):
    """Parts are made beside what it points to, which may be on another disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "disk" / "real")
    small = replace(mixture, tokens={"train": 2_000}, sources={"needle_single": Source()})
    (tmp_path / ".data.parts").touch()  # in the way of parts beside the link
    pack_mixture.pack_mixture(small, tmp_path / "data", workers=1)
    assert (tmp_path / "data").is_symlink() and verify(tmp_path / "disk" / "real") == verify(tmp_path / "data")
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]


@pytest.mark.parametrize(("written", "read"), [("1e6", 10**6), ("1.5e+6", 1_500_000), ("1_000_000", 10**6)])
def test_counts_of_tokens_in_every_notation(written, read, tmp_path):
    """YAML takes 1e6 for text and 1.5e+6 for a float."""
    text = (
        f"backbone: tiny\nseq_length: 512\ntokens: {{train: {written}}}\ncontext: [64, 400]\npart_tokens: {written}\n"
    )
    (tmp_path / "m.yaml").write_text(text + "sources: {needle_single: {weight: 1}}\n")
    mixture = read_mixture(tmp_path / "m.yaml")
    assert mixture.tokens == {"train": read} and mixture.part_tokens == read
    assert type(mixture.tokens["train"]) is type(mixture.part_tokens) is int


@pytest.mark.parametrize("written", ["many", "1.5", "true", ".inf", ".nan", "[1]"])
def test_counts_that_are_none(written, tmp_path):
    text = f"backbone: tiny\nseq_length: 512\ntokens: {{train: {written}}}\ncontext: [64, 400]\n"
    (tmp_path / "m.yaml").write_text(text + "sources: {needle_single: {weight: 1}}\n")
    with pytest.raises(ValueError, match=r"m\.yaml: tokens\.train=.* is not a whole number of tokens"):
        read_mixture(tmp_path / "m.yaml")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "m.yaml holds nothing, expected settings"),
        (b"# all of it\n", "m.yaml holds nothing, expected settings"),
        (b"[1, 2]", r"m.yaml holds \[1, 2\], expected settings"),
        (b"seed: \xff", r"(?s)m.yaml is not valid YAML in UTF-8: .*0xff"),
        (b"seed: 1\nseq_length: 9\nseed: 2", "(?s)m.yaml is not valid YAML in UTF-8: seed is there twice.*line 1"),
        (b"sources:\n  own: {weight: 1}\n  own: {weight: 2}", "(?s)own is there twice.*line 2, column 3"),
    ],
)
def test_what_is_no_settings_is_named(content, said, tmp_path):
    """Of two settings with one name YAML takes the last."""
    (tmp_path / "m.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_mixture(tmp_path / "m.yaml")


def test_lengths_in_every_notation(tmp_path):
    text = "backbone: tiny\nseq_length: 1e3\ntokens: {train: 1e4}\ncontext: [1e2, 4e2]\nwindow: 2.0e+2\n"
    (tmp_path / "m.yaml").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"sources: {many_shot: {context: [64, 9e1]}}\n")
    found = read_mixture(tmp_path / "m.yaml")
    assert (found.seq_length, found.window, found.context) == (1000, 200, (100, 400))
    assert found.sources["many_shot"].context == (64, 90)
