"""`elastic fit | validate | test | predict`: LightningCLI with this project's module, data and callbacks."""

import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]  # its __all__ is made at run time
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from elastic.commands.catalogue import TRAINING
from elastic.commands.training_data import own_data
from elastic.commands.training_sizes import choose_sizes
from elastic.console import hint, say
from elastic.data.datamodule import MixtureDataModule
from elastic.files import check_place, config_names, find_config, named, read_yaml, sole_writer
from elastic.routing.methods import GRAMMAR
from elastic.training.callbacks import (
    LAST,
    ElasticCheckpoint,
    ResumeCheckpoint,
    RoutingPictures,
    RunProgress,
    StopSignal,
    check_unused,
)
from elastic.training.config import ALLOCATOR
from elastic.training.module import ElasticModule
from elastic.training.result_files import PredictionFile, ResultsFile
from elastic.training.resume import AtomicCheckpointIO, local_checkpoint

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": -1,
    "log_every_n_steps": 10,
    "enable_model_summary": False,
    "default_root_dir": "runs/elastic",
    "use_distributed_sampler": False,  # the data module shares out the rows itself
    "num_sanity_val_steps": 0,
}


class NamedConfig(ActionConfigFile):
    """`-c train`: a shipped configuration by its name, or a file by its path."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Read the settings; values that are neither a name nor a plain path (YAML text, URLs) are the parent's."""
        found = str(find_config(values)) if re.fullmatch(r"[\w./~-]+", values) else values
        if found != values or Path(found).is_file():
            check_keys(parser, found)
        before = _mappings(cfg)
        super().__call__(parser, cfg, found, option_string)  # type: ignore[no-untyped-call]  # as jsonargparse wrote it
        for key, value in _mappings(cfg).items():
            cfg[key] = {**before.get(key, {}), **value}


def check_keys(parser: Any, file: str) -> None:
    """Refuse a setting that a file names and the command does not have.

    Raises:
        ValueError: with the file and the settings that are like it; also a file that holds no settings.
    """
    known = {action.dest for action in parser._actions}

    def check(part: Any, prefix: str) -> None:
        for key, value in part.items() if isinstance(part, dict) else ():
            name = f"{prefix}{key}"
            below = sorted(dest.removeprefix(f"{name}.") for dest in known if dest.startswith(f"{name}."))
            if isinstance(value, dict) and "class_path" in value:
                continue  # settings of a class, which the parser knows once it has found the class
            if below and isinstance(value, int | float | list):
                raise ValueError(f"{file} sets {name} to {value!r}, which has settings of its own: {', '.join(below)}")
            if below:
                check(value, f"{name}.")
            elif name not in known:
                beside = sorted({dest.removeprefix(prefix).split(".")[0] for dest in known if dest.startswith(prefix)})
                raise ValueError(
                    f"{file} sets {name}, which is not a setting; {hint(str(key), beside, 'settings there')}"
                )

    check(read_yaml(file), "")


def _mappings(cfg: Any) -> dict[str, dict[str, Any]]:
    """Settings of the model and the data that are mappings, such as `model.targets`: a later file adds to those of an
    earlier one, key by key, as it does to settings; `null` empties them.
    """
    return {k: v for k, v in cfg.items() if isinstance(v, dict) and k.startswith(("model.", "data."))}


def _files_first(arguments: list[str]) -> list[str]:
    """The same arguments with the configurations before all flags, which win over them wherever they were written."""
    files: list[str] = []
    flags: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument in ("-c", "--config"):
            files += [argument, *islice(rest, 1)]
        else:
            config = argument.startswith("--config=") or (argument.startswith("-c") and argument[1] != "-")
            (files if config else flags).append(argument)
    return [*files, *flags]


class ElasticCLI(LightningCLI):
    """One run keeps everything in `trainer.default_root_dir`; a checkpoint never changes the settings of a run."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """The parent's parser, with names of shipped configurations."""
        parser = LightningArgumentParser(**kwargs)
        parser.add_argument(
            "-c",
            "--config",
            action=NamedConfig,
            metavar="NAME|FILE",
            help=f"a shipped configuration ({', '.join(config_names())}) or a YAML file",
        )
        return parser

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Model and data come before the trainer's many settings in `--help` and in the saved configuration."""
        parser.add_lightning_class_args(ElasticModule, "model")
        parser.add_lightning_class_args(MixtureDataModule, "data")
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{name}": value for name, value in self.trainer_defaults.items()})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Settings of the two checkpoint callbacks, `resume_checkpoint` and `elastic_checkpoint`."""
        parser.add_lightning_class_args(ResumeCheckpoint, "resume_checkpoint")
        parser.add_lightning_class_args(ElasticCheckpoint, "elastic_checkpoint")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the given arguments, flags after files; unlike the parent's, does not compare them with `sys.argv`."""
        command, *rest = args
        self.config = parser.parse_args([command, *_files_first(rest)])

    def _parse_ckpt_path(self) -> None:
        """The parent lets hyper-parameters in a checkpoint override files and flags. Here those always win."""

    def before_instantiate_classes(self) -> None:
        """Make the data of a run that names none, and choose the sizes that are left to the memory of the GPUs; what
        a run saves of its settings has them.
        """
        config = self.config[self.subcommand]
        if config["data"]["data_dir"] is None:
            config["data"]["data_dir"] = str(own_data(config["model"]["backbone"], config["model"]["gguf_file"]))
        told = choose_sizes(config)
        if told is not None:
            tell: Any = rank_zero_only(say)
            tell(told, stream=sys.stderr)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """A trainer that logs to TensorBoard and saves atomically, unless its settings say otherwise.

        Raises:
            ValueError: devices that Lightning cannot read, or an accelerator whose package is missing.
        """
        config = self._get(self.config_init, "trainer")
        check_place("trainer.default_root_dir", config["default_root_dir"], folder=True)
        if config.get("logger") in (None, True):
            kwargs["logger"] = TensorBoardLogger(config["default_root_dir"], name="", version="")
        given = config.get("plugins") or []
        kwargs["plugins"] = [*(given if isinstance(given, list) else [given]), AtomicCheckpointIO()]
        bar = [] if config.get("enable_progress_bar") is False else [RunProgress()]
        callbacks = [StopSignal(), *bar, RoutingPictures(), ResultsFile(), PredictionFile()]  # a table after the bar
        kwargs["callbacks"] = [*(config.get("callbacks") or []), *callbacks]
        try:
            return super().instantiate_trainer(**kwargs)
        except (TypeError, ImportError) as error:
            place = {name: config.get(name) for name in ("accelerator", "devices", "strategy")}
            raise ValueError(f"no trainer can be made with {place} ({error}); see `elastic fit --help`") from error

    def _run_subcommand(self, subcommand: str) -> None:
        """The parent's, as the only process that trains into its folder; errors of the disk name that."""
        folder, writes = Path(self.trainer.default_root_dir), subcommand == "fit" and self.trainer.is_global_zero
        alone = writes and not self.trainer.fast_dev_run  # type: ignore[attr-defined]
        with _quiet_event_writer(), named(folder), sole_writer(folder) if alone else nullcontext():
            super()._run_subcommand(subcommand)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """`--ckpt_path last` means this run's own `last.ckpt`; training starts afresh where there is none yet."""
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "fit" and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            check_unused(Path(self.trainer.default_root_dir), kwargs.get("ckpt_path"))
        if kwargs.get("ckpt_path") == "last":
            path = Path(self.trainer.default_root_dir) / LAST
            if not path.is_file() and subcommand != "fit":
                raise FileNotFoundError(
                    f"no checkpoint at {path}; train first with `elastic fit` and the same settings"
                )
            kwargs["ckpt_path"] = str(path) if path.is_file() else None
            say(f"checkpoint: {path if path.is_file() else f'{path} does not exist yet, starting from the beginning'}")
        elif kwargs.get("ckpt_path") is not None:
            kwargs["ckpt_path"] = str(local_checkpoint(kwargs["ckpt_path"]))
        if subcommand in ("validate", "test"):
            kwargs["verbose"] = False  # ResultsFile prints the table
        if subcommand == "predict":
            kwargs["return_predictions"] = False  # PredictionFile writes them
        return kwargs


@contextmanager
def _quiet_event_writer() -> Iterator[None]:
    """Inside, TensorBoard's thread prints no traceback where it cannot write: its next call raises the same error."""
    before = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        if not (isinstance(failed.exc_value, OSError) and type(failed.thread).__name__ == "_AsyncWriterThread"):
            before(failed)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def run(command: str, arguments: list[str]) -> int:
    """Run one of Lightning's entry points.

    Raises:
        ValueError, FileNotFoundError: what the user can put right.
        SystemExit: `--help`, `--print_config`, or arguments that do not parse.
    """
    _quieten()
    os.environ.setdefault(*ALLOCATOR)
    try:
        command_line(ElasticCLI, command, arguments)
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    return 0


def command_line(cls: type[ElasticCLI], command: str, arguments: list[str]) -> ElasticCLI:
    """Parse, build and run."""
    return cls(
        ElasticModule,
        MixtureDataModule,
        seed_everything_default=0,
        trainer_defaults=dict(TRAINER_DEFAULTS),
        save_config_kwargs={
            "overwrite": True,
            "config_filename": "config.yaml" if command == "fit" else f"config_{command}.yaml",
        },
        parser_kwargs={"prog": "elastic", **{name: _help(name) for name in TRAINING}},
        auto_configure_optimizers=False,
        args=[command, *arguments],
    )


def _help(command: str) -> dict[str, str]:
    """What `--help` shows above the settings."""
    return {
        "usage": f"elastic {command} -c NAME|FILE [-c NAME|FILE ...] [--section.key VALUE ...] [--ckpt_path last]",
        "description": f"{TRAINING[command].capitalize()}. Settings come from shipped configurations by "
        "name (train, model/qwen3-4b, ...) and from YAML files; later ones win over earlier ones "
        "(mappings such as model.targets key by key), "
        "flags over both, wherever they are. "
        "`--print_config` shows the settings that result."
        + ("" if command == "predict" else f" Names for `--model.methods`: {GRAMMAR}."),
    }


def _quieten() -> None:
    """Leave out notes that no user can act on."""
    for name in (
        "lightning.pytorch.utilities.rank_zero",
        "lightning.fabric.utilities.seed",
        "lightning.pytorch.trainer.connectors.checkpoint_connector",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec|treespec).*")
