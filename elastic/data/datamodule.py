"""DataModules over packed shards: corpora mixed by weight, deterministic for a seed, resumable within an epoch."""

from collections.abc import Iterator
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, DistributedSampler, Sampler

from elastic.data.packing import Batch, PackedRow, collate
from elastic.data.shards import open_corpus, verify

EVALUATION = {"validate": "validation", "fit": "validation", "test": "test", "predict": "test"}


class MixtureSampler(Sampler[list[int]]):
    """Row indices, one optimiser step after the other: each row's corpus is drawn by weight, its rows in turn.

    An epoch has as many rows as the corpora together. Every process draws the same order and takes its own
    share of each step, one run of rows, so that the micro-batches of a step are the same for any number of processes.

    Args:
        sizes: rows per corpus, in the order of the concatenated dataset.
        weights: relative weight per corpus, positive.
        rows: rows per step and process.
        seed: seed of the order; epochs differ.
        rank, world: this process and their number.
    """

    def __init__(
        self, sizes: list[int], weights: list[float], rows: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        self.sizes, self.weights, self.rows = sizes, torch.tensor(weights, dtype=torch.float64), rows
        self.seed, self.rank, self.world = seed, rank, world
        self.epoch = self.start = 0  # of the next iteration

    def __len__(self) -> int:
        return max(1, sum(self.sizes) // (self.rows * self.world))

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order()
        step = self.rows * self.world
        for first in range(self.start * step, len(self) * step, step):
            mine = first + self.rank * self.rows
            yield order[mine : mine + self.rows]

    def recipe(self) -> dict[str, Any]:
        """Everything that the order of the rows depends on, epochs apart; equal on all processes."""
        weights = (self.weights / self.weights.sum()).tolist()
        return {
            "rows": self.sizes,
            "weights": weights,
            "rows_per_step": self.rows,
            "seed": self.seed,
            "world": self.world,
        }

    def order(self) -> list[int]:
        """All processes' row indices of the current epoch."""
        generator = torch.Generator("cpu").manual_seed(self.seed * 1_000_003 + self.epoch)
        total = len(self) * self.rows * self.world
        picks = torch.multinomial(self.weights, total, replacement=True, generator=generator).tolist()
        offsets = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        streams = [_endless(size, generator) for size in self.sizes]
        return [offsets[corpus] + next(streams[corpus]) for corpus in picks]


def _endless(size: int, generator: torch.Generator) -> Iterator[int]:
    """Permutations of range(size), one after the other."""
    while True:
        yield from torch.randperm(size, generator=generator, device="cpu").tolist()


class ResumableLoader:
    """One list of micro-batches per optimiser step, an endless stream of epochs that resumes where it was left.

    Iterating yields the rest of the current epoch, or the next epoch where that one is finished. Lightning saves and
    restores the place by `state_dict` and `load_state_dict`. Not a `DataLoader`: Lightning would swap the sampler of
    one when training on several processes, and this one shares out the rows itself.

    Args:
        dataset: rows of all corpora.
        sampler: order of the rows.
        micro_batch_rows: rows per micro-batch.
        num_workers: processes that read ahead.
    """

    def __init__(self, dataset: Any, sampler: MixtureSampler, micro_batch_rows: int, num_workers: int) -> None:
        self.sampler, self.done = sampler, 0
        self.loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=_Micro(micro_batch_rows),
            num_workers=num_workers,
            generator=torch.Generator(),  # else every epoch's start would draw from the global one
        )

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[Batch]]:
        # Lightning stops at the length, so nothing after the last batch would run: roll over at the start.
        if self.done >= len(self):
            self.sampler.epoch, self.done = self.sampler.epoch + 1, 0
        self.sampler.start = self.done
        for batch in self.loader:
            self.done += 1  # counts what is handed out, not what workers have read ahead
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Epoch, steps handed out in it, and what the order depends on."""
        return {"epoch": self.sampler.epoch, "done": self.done, "order": self.sampler.recipe()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the last step handed out.

        Raises:
            ValueError: a state of other data, weights, seed or number of processes, whose rows come in another order.
        """
        mine, theirs = self.sampler.recipe(), state["order"]
        differing = [
            f"{name} {theirs.get(name)!r} (now {mine[name]!r})" for name in mine if theirs.get(name) != mine[name]
        ]
        if differing:
            raise ValueError(
                f"the checkpoint was trained on rows in another order: {', '.join(differing)}; resume with the same "
                "data, weights, seed, rows_per_step and number of processes, or start a new run"
            )
        self.sampler.epoch, self.done = state["epoch"], state["done"]


class _Micro:
    """Collate rows into micro-batches of a fixed number of rows; picklable for worker processes."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __call__(self, rows: list[PackedRow]) -> list[Batch]:
        return [collate(rows[i : i + self.rows]) for i in range(0, len(rows), self.rows)]


class PlacedBatch(Batch):
    """A batch of evaluation.

    place: int64 [N, 3], where each sample lies in the data: its corpus (its place among those of the split's manifest),
        row in the corpus, place in the row. The same for any weights, number of processes and rows of a batch.
    counted: bool [N], False in rows that are read again only so that all processes take equally many steps.
    """

    place: Tensor
    counted: Tensor


class PlacedRows(Dataset[Any]):
    """Rows of some corpora one after the other, each with its `place` and whether it is `counted`; past their end they
    begin again, not counted.

    Args:
        corpora: rows by the corpus' place in the manifest.
    """

    def __init__(self, corpora: dict[int, Any]) -> None:
        self.rows: Any = ConcatDataset(list(corpora.values()))
        self.places = [(corpus, row) for corpus, rows in corpora.items() for row in range(len(rows))]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = index % len(self)
        return {**self.rows[place], "place": self.places[place], "counted": index < len(self)}


class SharedRows(DistributedSampler[Any]):
    """Every `num_replicas`-th row for each process, beyond the last row where they would not be equally many. Lightning
    leaves samplers of this class as they are.
    """

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.total_size, self.num_replicas))


def collate_placed(rows: list[dict[str, Any]]) -> PlacedBatch:
    """Join rows of `PlacedRows` into one batch."""
    batch = collate(rows)  # type: ignore[arg-type]  # rows with two fields more
    sizes = [len(row["task_id"]) for row in rows]
    places = [(*row["place"], index) for row, size in zip(rows, sizes, strict=True) for index in range(size)]
    counted = [row["counted"] for row, size in zip(rows, sizes, strict=True) for _ in range(size)]
    return PlacedBatch(**batch, place=torch.tensor(places), counted=torch.tensor(counted))


def data_place(trainer: Any) -> tuple[int, int]:
    """Which share of the rows this process reads, and of how many: its own of those of all processes, or that of its
    group under a strategy whose groups share rows. `trainer` may be None.
    """
    shared = None if trainer is None else trainer.distributed_sampler_kwargs
    return (0, 1) if shared is None else (int(shared["rank"]), int(shared["num_replicas"]))


class MixtureDataModule(LightningDataModule):
    """Packed corpora of one data folder, sensitive and robust ones mixed by weight.

    In training every process gets its own share of each step's rows. All other rows are shared out too, one by one;
    some are read twice where they do not divide, so that all processes take equally many steps, but count once.

    Args:
        data_dir: folder written by `elastic data_prep`. None: `elastic fit` packs the offline mixture for the backbone.
        weights: weight per corpus; corpora without an entry get 1, a weight of 0 leaves a corpus out.
        rows_per_step: packed rows per optimiser step and process, under context parallelism per group of processes.
        micro_batch_rows: packed rows per forward pass, in evaluation too; divides `rows_per_step` (the rest is gradient
            accumulation). None: 1, but `elastic fit` on a GPU takes as many as its memory holds.
        seed: seed of the order.
        num_workers: processes that read ahead; 0 reads in the training process.
    """

    def __init__(
        self,
        data_dir: str | None = None,
        weights: dict[str, float] | None = None,
        rows_per_step: int = 8,
        micro_batch_rows: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if data_dir is None:
            raise ValueError("data_dir is not given; name a folder that `elastic data_prep` wrote")
        micro_batch_rows = 1 if micro_batch_rows is None else micro_batch_rows
        if rows_per_step < 1 or micro_batch_rows < 1 or rows_per_step % micro_batch_rows:
            raise ValueError(
                f"rows_per_step={rows_per_step} is not a positive multiple of micro_batch_rows={micro_batch_rows}; "
                "one optimiser step accumulates whole micro-batches"
            )
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers} is below 0; 0 reads in the training process")
        if not 0 <= seed < 2**40:
            raise ValueError(f"seed={seed} is not in [0, 2**40)")
        self.data_dir, self.weights, self.seed, self.num_workers = data_dir, weights or {}, seed, num_workers
        self.rows_per_step, self.micro_batch_rows = rows_per_step, micro_batch_rows
        self.manifest: dict[str, Any] | None = None

    def setup(self, stage: str) -> None:
        """Verify the data before anything runs.

        Raises:
            FileNotFoundError: no data.
            ValueError: a damaged shard, a missing split, a weight that names no corpus or is not a number of 0 or more.
        """
        if self.manifest is None:
            self.manifest = verify(self.data_dir)
        needed = {EVALUATION[stage]} | ({"train"} if stage == "fit" else set())
        for split in needed:
            self._corpora(split)

    def train_dataloader(self) -> ResumableLoader:
        """Lists of micro-batches, one list per optimiser step."""
        corpora = self._corpora("train")
        data = [open_corpus(self.data_dir, "train", name) for name in corpora]
        sizes, weights = [len(d) for d in data], [self.weights.get(name, 1.0) for name in corpora]
        rank, world = data_place(self.trainer)
        sampler = MixtureSampler(sizes, weights, self.rows_per_step, self.seed, rank, world)
        return ResumableLoader(ConcatDataset(data), sampler, self.micro_batch_rows, self.num_workers)

    def val_dataloader(self) -> DataLoader[PlacedBatch]:
        """Batches of `micro_batch_rows` rows, in order; this process's share."""
        return self._sequential("validation")

    def test_dataloader(self) -> DataLoader[PlacedBatch]:
        """Batches of `micro_batch_rows` rows, in order; this process's share."""
        return self._sequential("test")

    def predict_dataloader(self) -> DataLoader[PlacedBatch]:
        """Batches of `micro_batch_rows` rows, in order; this process's share."""
        return self._sequential("test")

    def _sequential(self, split: str) -> DataLoader[PlacedBatch]:
        chosen = self._corpora(split)
        known = list((self.manifest or {})["splits"][split])
        data = PlacedRows({known.index(name): open_corpus(self.data_dir, split, name) for name in chosen})
        rank, world = data_place(self.trainer)
        sampler = SharedRows(data, num_replicas=world, rank=rank, shuffle=False) if world > 1 else None
        return DataLoader(
            data,
            batch_size=self.micro_batch_rows,
            sampler=sampler,
            collate_fn=collate_placed,
            num_workers=self.num_workers,
        )

    def _corpora(self, split: str) -> list[str]:
        """Corpora of a split that the weights leave in."""
        if self.manifest is None:
            self.manifest = verify(self.data_dir)
        splits = self.manifest["splits"]
        if split not in splits:
            raise ValueError(
                f"{self.data_dir} has no split {split!r}, only {', '.join(splits)}; build the data with it"
            )
        known = splits[split]
        for name, weight in self.weights.items():
            if name not in known:
                raise ValueError(f"weights name corpus {name!r}, but {split} of {self.data_dir} has {', '.join(known)}")
            if not (isinstance(weight, int | float) and not isinstance(weight, bool) and 0 <= weight < float("inf")):
                raise ValueError(f"weight of corpus {name!r} is {weight!r}; expected a number of 0 or more")
        chosen = [name for name in known if self.weights.get(name, 1.0) > 0]
        if not chosen:
            raise ValueError(
                f"all corpora of {split} have weight 0; give at least one of {', '.join(known)} a positive weight"
            )
        return chosen
