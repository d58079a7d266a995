"""Shards and the DataModule: damage is named, order follows from the seed, a resumed loader continues bit-equally."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning import LightningModule, Trainer

from data_prep.tiny_language import build_tokenizer
from elastic.data.datamodule import MixtureDataModule, MixtureSampler, ResumableLoader
from elastic.data.packing import Sample, pack
from elastic.data.shards import SPLITS, DataWriter, open_corpus, read_manifest, sources_of, tokenizer_hash, verify

CORPORA = {"single_qa": 12, "code": 20}  # rows of each in training
CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "data").glob("*.yaml"))


def write_data(out, corpora=CORPORA, splits=SPLITS):
    """Rows of eight tokens; the first token of a row identifies it over all corpora of a split."""
    origin = {"seq_length": 8, "tokenizer": {"name": "tiny", "sha256": tokenizer_hash(build_tokenizer())}}
    with DataWriter(out, origin) as writer:
        for split in splits:
            first = 0
            for task_id, (name, count) in enumerate(corpora.items()):
                rows = [Sample([first + i, *range(7)], 5, task_id, "made") for i in range(count)]
                writer.add(split, name, pack(rows, 8))
                first += count
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "packed")


def names(batches):
    """The rows of each step."""
    return [[part["input_ids"][0, ::8].tolist() for part in step] for step in batches]


def loader_of(data, **settings):
    module = MixtureDataModule(str(data), **{"rows_per_step": 4, "micro_batch_rows": 2, **settings})
    module.setup("fit")
    return module.train_dataloader()


def test_corpora_come_back_as_written(data):
    manifest = verify(data)
    entry = manifest["splits"]["train"]["code"]
    assert (entry["rows"], entry["samples"], entry["tokens"]) == (20, 20, 160)
    rows = open_corpus(data, "train", "code")
    assert rows[3] == {
        "input_ids": [15, *range(7)],
        "labels": [-100] * 5 + [4, 5, 6],
        "cu_seq_lens": [0, 8],
        "prompt_spans": [[0, 5]],
        "user_spans": [[0, 5]],
        "task_id": [1],
        "source": ["made"],
    }
    assert entry["sources"] == {"made": 20} and sources_of(manifest, "train") == ("made",)


def test_a_step_is_a_list_of_micro_batches(data):
    steps = list(loader_of(data))
    assert len(steps) == 32 // 4 and all(len(step) == 2 for step in steps)
    assert all(part["input_ids"].shape == (1, 16) for step in steps for part in step)
    assert all(part["cu_seq_lens"].tolist() == [0, 8, 16] for step in steps for part in step)


def test_order_depends_on_seed_and_epoch_only(data):
    first, again, other = loader_of(data), loader_of(data), loader_of(data, seed=1)
    epochs = [names(first), names(first)]
    assert epochs == [names(again), names(again)]
    assert epochs[0] != epochs[1] and epochs[0] != names(other)
    assert epochs[0] == names(loader_of(data, num_workers=1))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("taken", [0, 1, 5, 8, 11])
def test_a_resumed_loader_goes_on_bit_equally(data, taken, workers):
    whole, state = loader_of(data), None
    expected = [step for _ in range(3) for step in names(whole)][taken:]
    broken, left = loader_of(data, num_workers=workers), taken
    while left:
        for _ in broken:
            left -= 1
            if not left:
                break
    state = json.loads(json.dumps(broken.state_dict()))
    resumed = loader_of(data, num_workers=workers)
    resumed.load_state_dict(state)
    found = []
    while len(found) < len(expected):
        found += names(resumed)
    assert found == expected


def test_a_state_of_another_run_is_refused(data):
    state = loader_of(data).state_dict()
    for settings, message in (
        ({"seed": 3}, r"seed 0 \(now 3\)"),
        ({"rows_per_step": 8}, r"rows_per_step 4 \(now 8\)"),
        ({"weights": {"code": 0}}, r"rows \[12, 20\] \(now \[12\]\)"),
    ):
        with pytest.raises(ValueError, match=f"rows in another order: .*{message}.*; resume with the same data"):
            loader_of(data, **settings).load_state_dict(state)


def test_processes_share_the_rows_out():
    def order(rank, world, rows=2):
        return list(MixtureSampler([12, 20], [1.0, 1.0], rows, 0, rank, world))

    shares = [order(rank, 4) for rank in range(4)]
    assert {len(share) for share in shares} == {32 // 8}
    alone = order(0, 1, rows=8)
    together = [[row for share in shares for row in share[step]] for step in range(4)]
    assert together == alone


def test_weights_set_the_mixture():
    sampler = MixtureSampler([500, 500], [3.0, 1.0], 4, 0)
    rows = [row for step in sampler for row in step]
    assert 0.70 < sum(row < 500 for row in rows) / len(rows) < 0.80
    counts = Counter(rows)
    assert all(counts[row] in (1, 2) for row in range(500))  # a corpus drawn from often goes round, evenly
    assert max(counts[row] for row in range(500, 1000)) == 1


def test_evaluation_reads_every_row_once_in_order(data):
    module = MixtureDataModule(str(data))
    for stage, loader in (("test", module.test_dataloader), ("predict", module.predict_dataloader)):
        module.setup(stage)
        assert [batch["input_ids"][0, 0].item() for batch in loader()] == list(range(32))
    module.setup("validate")
    assert len(module.val_dataloader()) == 32


@pytest.mark.parametrize(("world", "rows"), [(2, 1), (3, 2), (5, 4), (40, 1)])
def test_processes_share_out_the_rows_of_evaluation_and_count_each_once(data, world, rows):
    module = MixtureDataModule(str(data), rows_per_step=rows, micro_batch_rows=rows)
    module.setup("test")
    steps, seen = set(), []
    for rank in range(world):
        module.trainer = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": world, "rank": rank})
        batches = list(module.test_dataloader())
        steps.add(len(batches))
        predicted = [tuple(place) for batch in module.predict_dataloader() for place in batch["place"].tolist()]
        assert predicted == [tuple(place) for batch in batches for place in batch["place"].tolist()]
        for batch in batches:
            assert batch["place"].shape == (len(batch["task_id"]), 3) and batch["counted"].dtype == torch.bool
            seen += [tuple(place) for place in batch["place"][batch["counted"]].tolist()]
    assert len(steps) == 1
    module.trainer = None
    alone = [tuple(place) for batch in module.test_dataloader() for place in batch["place"].tolist()]
    assert sorted(seen) == sorted(alone) and len(set(alone)) == len(alone) >= 32


def test_places_do_not_depend_on_weights(data):
    everything = MixtureDataModule(str(data))
    names = list(read_manifest(data)["splits"]["test"])
    second = MixtureDataModule(str(data), weights={names[0]: 0.0})
    places = []
    for module in (everything, second):
        module.setup("test")
        places.append([tuple(place) for batch in module.test_dataloader() for place in batch["place"].tolist()])
    assert places[1] == [place for place in places[0] if place[0] == 1] != places[0]


class Recorder(LightningModule):
    """Writes down which rows it was trained on."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(1)), []

    def training_step(self, batch, batch_idx):
        self.seen += names([batch])
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        assert batch["input_ids"].shape == (1, 8)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(data, root, steps, checkpoint=None, **settings):
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        default_root_dir=root,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        **settings,
    )
    module = Recorder()
    trainer.fit(module, MixtureDataModule(str(data), rows_per_step=4), ckpt_path=checkpoint, weights_only=False)
    return trainer, module.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("limit", [1.0, 3])
def test_lightning_resumes_in_the_middle_of_an_epoch(data, tmp_path, limit):
    _, whole = fit(data, tmp_path, 20, limit_train_batches=limit)
    assert len(whole) == 20 and whole[:8] != whole[8:16]
    for stop in (5, 8, 10):
        trainer, start = fit(data, tmp_path, stop, limit_train_batches=limit)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        states = torch.load(tmp_path / "last.ckpt", weights_only=False)["loops"]["fit_loop"]["state_dict"]
        assert len(states["combined_loader"]) == 1
        _, rest = fit(data, tmp_path, 20, tmp_path / "last.ckpt", limit_train_batches=limit)
        assert start + rest == whole, f"stopped after {stop} steps"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configs_build_the_data_module(path):
    parser = ArgumentParser()
    parser.add_argument("-c", action="config")
    parser.add_class_arguments(MixtureDataModule, "data")
    module = parser.instantiate(parser.parse_args([f"-c={path}"])).data
    assert module.rows_per_step % module.micro_batch_rows == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rows_per_step": 3, "micro_batch_rows": 2},
            "rows_per_step=3 is not a positive multiple of micro_batch_rows=2",
        ),
        ({"rows_per_step": 0}, "rows_per_step=0 is not a positive multiple"),
        ({"num_workers": -1}, "num_workers=-1 is below 0; 0 reads in the training process"),
        ({"seed": -1}, r"seed=-1 is not in \[0, 2\*\*40\)"),
        ({"weights": {"prose": 1.0}}, "weights name corpus 'prose', but .* has single_qa, code"),
        ({"weights": {"code": -1.0}}, "weight of corpus 'code' is -1.0; expected a number of 0 or more"),
        ({"weights": {"code": float("nan")}}, "weight of corpus 'code' is nan"),
        ({"weights": {"code": float("inf")}}, "weight of corpus 'code' is inf"),
        ({"weights": {"code": True}}, "weight of corpus 'code' is True"),
        (
            {"weights": {"code": 0, "single_qa": 0}},
            "all corpora of .* have weight 0; give at least one of single_qa, code",
        ),
        (
            {"data_dir": "absent"},
            "no data at absent .manifest.json is missing.; build it with .elastic data_prep tokenize_and_pack",
        ),
    ],
)
def test_bad_settings_stop_before_training(data, settings, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        MixtureDataModule(**{"data_dir": str(data), **settings}).setup("fit")


def damage(data, how):
    shard = data / "train" / "code.arrow"
    if how == "missing":
        shard.unlink()
    elif how == "short":
        shard.write_bytes(shard.read_bytes()[:-50])
    elif how == "flipped":
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    elif how == "manifest":
        (data / "manifest.json").write_text('{"format": 1, "spl')
    elif how in ("name", "count"):  # one bit of each
        text = (data / "manifest.json").read_text()
        change = {"name": ('"code"', '"codd"'), "count": ('"rows": ', '"rows": 1')}[how]
        (data / "manifest.json").write_text(text.replace(*change, 1))
    elif how == "format":
        manifest = read_manifest(data)
        (data / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "missing",
            r"shard .*train/code.arrow is damaged: sha256 no file, expected [0-9a-f]{64}; build the data again",
        ),
        ("short", r"shard .*train/code.arrow is damaged: sha256 [0-9a-f]{64}, expected [0-9a-f]{64}"),
        ("flipped", r"shard .*train/code.arrow is damaged: sha256 [0-9a-f]{64}, expected [0-9a-f]{64}"),
        ("manifest", r"manifest.json is damaged \(.*line 1 column.*\); build the data again"),
        ("name", r"manifest.json is damaged \(.*it was changed after it was written.*\); build the data again"),
        ("count", r"manifest.json is damaged \(.*it was changed after it was written.*\); build the data again"),
        ("format", r"manifest.json has format 99, this version reads format 2; build the data again"),
    ],
)
def test_damage_is_named_before_training(tmp_path, how, message):
    damage(write_data(tmp_path / "packed"), how)
    with pytest.raises(ValueError, match=message):
        MixtureDataModule(str(tmp_path / "packed")).setup("fit")


def test_a_missing_split_is_named(tmp_path):
    module = MixtureDataModule(str(write_data(tmp_path / "packed", splits=("train",))))
    with pytest.raises(ValueError, match="has no split 'validation', only train; build the data with it"):
        module.setup("fit")


def test_a_broken_off_write_leaves_nothing_behind(tmp_path):
    out = write_data(tmp_path / "packed")
    before = read_manifest(out)
    with pytest.raises(ZeroDivisionError), DataWriter(out, {}) as writer:
        writer.add("train", "code", pack([Sample([1, 2], 1, 0)], 8))
        _ = 1 / 0
    assert read_manifest(out) == before and [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_a_writer_refuses_what_it_must_not_write(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("precious")
    with (
        pytest.raises(ValueError, match="thesis exists but is not an Elastic Attention data folder; choose"),
        DataWriter(tmp_path / "thesis", {}),
    ):
        pass
    with DataWriter(tmp_path / "out", {}) as writer:
        with pytest.raises(ValueError, match="unknown split 'dev'; expected one of train, validation, test"):
            writer.add("dev", "code", [])
        with pytest.raises(ValueError, match="corpus 'code' of split 'train' has no rows; build more records"):
            writer.add("train", "code", [])


def test_loaders_do_not_draw_from_the_global_generator(data):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    loader = loader_of(data)
    assert isinstance(loader, ResumableLoader) and list(loader)
    assert torch.equal(before, torch.get_rng_state())
