"""The `elastic` command: dispatch, help, errors, configuration."""

import subprocess
import sys
import time

import pytest
import torch
import yaml

from elastic import cli
from elastic.commands import catalogue
from tests.helpers.forked import forked_program
from tests.helpers.training import ROOT, build_data, command_environment

CONFIGS = ROOT / "configs"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_command(argv, capsys):
    assert cli.main(argv) == 0
    text = capsys.readouterr().out
    for name in ("fit", "validate", "test", "predict", "generate", "bench", "doctor", "demo", "data_prep"):
        assert f"\n  {name} " in text


def test_help_needs_neither_torch_nor_lightning():
    code = "import sys, elastic.cli; elastic.cli.main(['--help']); print(*sys.modules, file=sys.stderr)"
    environment = command_environment()
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    seconds = time.perf_counter() - started
    assert not {"torch", "lightning", "transformers", "jsonargparse"} & set(done.stderr.split())
    assert seconds < 30, "two seconds in practice; the bound is loose for loaded machines"


@pytest.mark.parametrize(("name", "summary"), [*catalogue.COMMANDS.items(), *catalogue.TRAINING.items()])
def test_commands_describe_themselves_in_the_words_of_the_list(name, summary, capsys):
    _, listed, _ = in_process(capsys, "--help")
    code, text, _ = in_process(capsys, name, "--help")
    assert code == 0 and f" {summary}\n" in listed
    assert summary.lower() in " ".join(text.lower().split())


def test_the_bias_of_generate_is_the_checkpoints_own(capsys):
    _, text, _ = in_process(capsys, "generate", "--help")
    assert "below 0 fewer (default: as the checkpoint says)" in " ".join(text.split())


# Stands in for torch's import: says what OpenMP would read, and ends.
WAITING = """
import os, runpy, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("torch waits", os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Finder())
sys.argv = ["elastic", *sys.argv[1:]]
runpy.run_module("elastic", run_name="__main__")
"""


@pytest.mark.parametrize(
    "arguments",
    [
        *(pytest.param((name, "-c", "debug"), id=name) for name in catalogue.TRAINING),
        ("generate", "--checkpoint", "none", "--prompt", "a"),
        ("serve", "--checkpoint", "none"),
        ("calibrate", "--backbone", "tiny"),
        ("bench", "attention"),
        ("demo", "--tiny"),
        ("doctor",),
        ("data_prep", "build_mixture", "--language", "tiny", "--out", "records"),
        ("data_prep", "pack_mixture", "mixture/offline", "--out", "data"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_every_command_has_its_threads_wait_without_spinning(arguments, tmp_path):
    """Set before torch is loaded, unless the user has."""
    for chosen, read in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        environment = command_environment()
        environment.pop("OMP_WAIT_POLICY", None)
        environment |= {"OMP_WAIT_POLICY": chosen} if chosen else {}
        argv = [sys.executable, "-c", WAITING, *arguments]
        done = subprocess.run(argv, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120)
        assert done.stdout == f"torch waits {read}\n", done.stdout + done.stderr


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("elastic 0.")


@pytest.mark.parametrize(
    ("name", "hint"), [("fti", "did you mean fit?"), ("generat", "did you mean generate?"), ("zzz", "commands are fit")]
)
def test_unknown_commands_get_a_suggestion(name, hint, capsys):
    assert cli.main([name]) == 2
    error = capsys.readouterr().err
    assert f"there is no command {name!r}" in error and hint in error and error.count("\n") == 1


def in_process(capsys, *arguments):
    """(exit code, stdout, stderr) of `elastic ...` without a subprocess."""
    try:
        code = cli.main(list(arguments))
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_fit_help_reads_well(capsys):
    code, text, _ = in_process(capsys, "fit", "--help")
    assert code == 0
    assert text.startswith("usage: elastic fit -c NAME|FILE")
    assert "Train routers on packed data." in text
    for setting in ("--model.optimiser.lr", "--data.data_dir", "--resume_checkpoint.every_n_steps", "--ckpt_path"):
        assert setting in text
    assert text.index("--model.backbone") < text.index("--trainer.max_steps")


@pytest.mark.parametrize(
    "layers",
    [
        ("-c", str(CONFIGS / "tiny.yaml"), "--config", str(CONFIGS / "debug.yaml")),
        ("-c", "tiny", "--config=debug"),
        ("-ctiny", "-c", "{trainer: {max_steps: 4}}"),
    ],
    ids=["paths", "names", "text"],
)
def test_later_files_and_flags_win(layers, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ("--model.optimiser.lr", "0.5", "--print_config")
    code, text, _ = in_process(capsys, "fit", *layers, *flags)
    settings = yaml.safe_load(text)
    assert code == 0
    assert settings["trainer"]["max_steps"] == 4  # debug.yaml
    assert settings["model"]["optimiser"]["multiplier_lr"] == 0.05  # tiny.yaml
    assert settings["model"]["optimiser"]["lr"] == 0.5  # flag


@pytest.mark.parametrize(
    "arguments",
    [
        ("--trainer.max_steps", "9", "-c", "{file}"),
        ("--trainer.max_steps=9", "--config={file}", "-ctiny"),
        ("-c", "tiny", "--trainer.max_steps", "9", "--config", "{file}"),
    ],
)
def test_flags_win_wherever_they_are(arguments, tmp_path, monkeypatch, capsys):
    """And later files over earlier ones: tiny.yaml has 200 steps, the first file 6."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("trainer: {max_steps: 6}\nmodel: {optimiser: {lr: 0.25}}\n")
    filled = [argument.format(file="mine.yaml") for argument in arguments]
    code, text, _ = in_process(capsys, "fit", *filled, "--print_config")
    settings = yaml.safe_load(text)
    assert code == 0 and settings["trainer"]["max_steps"] == 9
    assert settings["model"]["optimiser"]["lr"] == (0.002 if filled[-1] == "-ctiny" else 0.25)


def test_mappings_of_later_files_and_flags_add_to_earlier_ones(tmp_path, monkeypatch, capsys):
    """`targets`, `weights` and `budgets`, in the settings that a run keeps as well."""
    monkeypatch.chdir(tmp_path)
    one = {
        "model": {"targets": {"single_qa": 0.5, "code": 0.9}, "objective": {"budgets": {"code": 0.1}}},
        "data": {"weights": {"a": 2.0, "b": 1.0}},
    }
    two = {
        "model": {"targets": {"code": [0.2, 0.4]}, "objective": {"budgets": {"single_qa": 0.3}}},
        "data": {"weights": {"b": 0.0}},
    }
    for name, layer in (("one", one), ("two", two), ("none", {"model": {"targets": None}})):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(layer))
    flags = ("--model.targets.in_context=0.7", "-c", "one.yaml", "-c", "two.yaml", "--print_config")
    _, text, _ = in_process(capsys, "fit", *flags)
    settings = yaml.safe_load(text)
    assert settings["model"]["targets"] == {"single_qa": 0.5, "code": [0.2, 0.4], "in_context": 0.7}
    assert settings["model"]["objective"]["budgets"] == {"code": 0.1, "single_qa": 0.3}
    assert settings["data"]["weights"] == {"a": 2.0, "b": 0.0}
    _, text, _ = in_process(capsys, "fit", "-c", "one.yaml", "-c", "none.yaml", "-c", "two.yaml", "--print_config")
    assert yaml.safe_load(text)["model"]["targets"] == {"code": [0.2, 0.4]}


def test_a_file_of_the_user_wins_over_a_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()  # a folder is not a configuration: `data/tiny` is still the shipped one
    (tmp_path / "tiny").write_text("trainer: {max_steps: 7}\n")
    code, text, _ = in_process(capsys, "fit", "-c", "data/tiny", "-c", "tiny", "--print_config")
    settings = yaml.safe_load(text)
    assert code == 0
    assert settings["trainer"]["max_steps"] == 7 and settings["data"]["data_dir"] == "data/tiny"


def test_unknown_configurations_get_a_suggestion_and_the_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for given, close in (("tinny", "tiny"), ("model/qwen3", "model/qwen3-8b"), ("configs/debug.yaml", "debug")):
        code, _, error = in_process(capsys, "fit", "-c", given)
        assert code == 2 and error.count("\n") == 1
        assert f"neither a file {given} nor a shipped configuration" in error
        assert close in error.split("did you mean")[1].split("?")[0]
        assert "names are data/offline, " in error and "objective/quality, " in error and "mixture" not in error


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trainer: {max_step: 6}", "mine.yaml sets trainer.max_step, which is not a setting; did you mean max_steps"),
        ("model: {optimiser: {lrr: 1}}", "mine.yaml sets model.optimiser.lrr, which is not a setting; did you mean lr"),
        ("modle: {backbone: tiny}", "mine.yaml sets modle, which is not a setting; did you mean model"),
        ("data: {zzz: 1}", "mine.yaml sets data.zzz, which is not a setting; settings there are data_dir, "),
        ("trainer: [", "mine.yaml is not valid YAML in UTF-8: "),
        ("model: 3", "mine.yaml sets model to 3, which has settings of its own: backbone, "),
        ("model: {optimiser: [1]}", "mine.yaml sets model.optimiser to [1], which has settings of its own: "),
        (
            "trainer: {max_steps: 1}\ntrainer: {max_epochs: 2}",
            "mine.yaml is not valid YAML in UTF-8: trainer is there tw",
        ),
        ("", "mine.yaml holds nothing, expected settings"),
    ],
)
def test_a_wrong_setting_is_named_with_its_file_and_a_suggestion(text, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(text)
    code, _, error = in_process(capsys, "fit", "-c", "tiny", "-c", "mine.yaml", "-c", "debug")
    assert code == 2 and said in " ".join(error.split()) and "Traceback" not in error


FOLDERS = {
    "eval": ("eval", "--backbone", "tiny", "--out"),
    "demo": ("demo", "--tiny", "--out"),
    "fit": ("fit", "-c", "debug", "--trainer.default_root_dir"),
    "calibrate --levels": ("calibrate", "--backbone", "tiny", "--levels"),
    "build_mixture": ("data_prep", "build_mixture", "--language", "tiny", "--out"),
    "tokenize_and_pack": (
        *("data_prep", "tokenize_and_pack", "--records", "none", "--backbone", "tiny", "--seq-length", "64", "--out"),
    ),
    "pack_mixture": ("data_prep", "pack_mixture", "mixture/offline", "--out"),
}
FILES = {
    "calibrate": ("calibrate", "--backbone", "tiny", "--out"),
    "calibrate --picture": ("calibrate", "--backbone", "tiny", "--picture"),
    "published": ("data_prep", "published", "xsum", "--backbone", "tiny", "--out"),
    "inspect_shards": ("data_prep", "inspect_shards", "none", "--backbone", "tiny", "--picture"),
    "generate --report-json": ("generate", "--checkpoint", "none", "--prompt", "a", "--report-json"),
    "generate --heatmap": ("generate", "--checkpoint", "none", "--prompt", "a", "--heatmap"),
}


@pytest.mark.parametrize("name", [*FOLDERS, *FILES])
def test_a_result_cannot_be_where_a_file_or_folder_is_in_the_way(name, tmp_path, monkeypatch, capsys):
    """Told before any work, with the option that named the place."""
    if name == "eval":
        pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder.json").mkdir()
    *given, option = {**FOLDERS, **FILES}[name]
    whole = "file is a file; expected a folder" if name in FOLDERS else "folder.json is a folder; expected a file"
    below = f"file/new/out.json is to be in {tmp_path / 'file'}, which is a file"
    for place, said in (("file" if name in FOLDERS else "folder.json", whole), ("file/new/out.json", below)):
        code, _, error = in_process(capsys, *given, f"{option}={place}")
        assert code == 2 and f"{option.removeprefix('--trainer.')} {said}" in error.replace("trainer.", ""), error
        assert error.count("\n") == 1


def test_data_prep_lists_and_runs_its_steps(tmp_path, capsys):
    from elastic.commands.data_prep import STEPS

    code, text, _ = in_process(capsys, "data_prep", "--help")
    assert code == 0 and all(f"\n  {name} " in text for name in STEPS)
    scripts = {path.stem for path in (ROOT / "data_prep").glob("*.py") if "def main(" in path.read_text()}
    assert scripts - set(STEPS) == {"make_tiny"}, "which a maintainer runs"
    for name in STEPS:
        code, text, _ = in_process(capsys, "data_prep", name, "--help")
        assert code == 0 and text.startswith(f"usage: elastic data_prep {name} ")
    code, _, error = in_process(capsys, "data_prep", "pack_mixtures")
    assert code == 2 and "did you mean pack_mixture or" in error and error.count("\n") == 1
    code, _, error = in_process(capsys, "data_prep", "pack_mixture", "mixture/heldot", "--out", str(tmp_path / "data"))
    assert code == 2 and "did you mean mixture/heldout" in error and "mixture/paper" in error
    assert "train" not in error and error.startswith("elastic data_prep pack_mixture: error: ")
    arguments = ("--language", "tiny", "--per-task", "2", "--words", "48", "--out", str(tmp_path / "records"))
    code, text, _ = in_process(capsys, "data_prep", "build_mixture", *arguments)
    assert code == 0 and text.startswith("train: ") and (tmp_path / "records" / "mixture.json").is_file()


ERRORS = [
    (["--model.optimiser.lr", "-1"], "optimiser.lr=-1.0 is not positive"),
    (["--model.elastic.sparse.window", "30"], "sparse.window=30 is not a multiple of sparse.block=4"),
    (["--model.elastic.sparse.route1", "sliding"], "sliding"),
    (["--model.loss_chunk", "0"], "loss_chunk=0 is below 1"),
    (["--model.targets.needle", "0.5"], "unknown task 'needle'"),
    (["--model.backbone", "./nowhere"], "no backbone './nowhere'"),
    (["--model.colour", "red"], "colour"),
    (["--data.data_dir", "nowhere"], "no data at nowhere"),
    (["--data.rows_per_step", "0"], "rows_per_step=0"),
    (["--trainer.max_steps", "-1"], "set trainer.max_steps or trainer.max_epochs"),
    (["--trainer.precision", "bf16-true"], "would cast routers and multipliers"),
    (["--trainer.gradient_clip_val", "1.0"], "clip"),
    (["--resume_checkpoint.every_n_steps", "0"], "resume_checkpoint.every_n_steps=0 is below 1"),
    (["--elastic_checkpoint.every_n_steps", "-1"], "elastic_checkpoint.every_n_steps=-1 is below 0"),
    (["--ckpt_path", "nowhere.ckpt"], "nowhere.ckpt"),
    (["-c", str(CONFIGS / "sparse" / "fa_xa.yaml")], "sparse.stride=16 does not divide sparse.block=4; use 4"),
    (["-c", "nowhere.yaml"], "nowhere.yaml"),
]


@pytest.mark.parametrize(("flags", "message"), ERRORS, ids=[m[:40] for _, m in ERRORS])
def test_what_the_user_can_put_right_is_said_before_training(flags, message, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["-c", str(CONFIGS / "debug.yaml"), "--data.data_dir", str(data), *flags]
    code, _, error = in_process(capsys, "fit", *arguments)
    assert code == 2
    assert message in " ".join(error.split())
    assert "Traceback" not in error
    assert not (tmp_path / "runs" / "debug" / "checkpoint").exists()


def test_test_without_a_run_says_so(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["-c", str(CONFIGS / "debug.yaml"), "--data.data_dir", str(data), "--ckpt_path", "last"]
    code, _, error = in_process(capsys, "test", *arguments)
    assert code == 2
    assert "no checkpoint at runs/debug/last.ckpt; train first" in error and error.count("\n") == 1


def test_traceback_on_request(tmp_path):
    arguments, log = ("fit", "-c", str(CONFIGS / "debug.yaml"), "--data.data_dir", "nowhere"), tmp_path / "log"
    process = forked_program(arguments, tmp_path, log, ELASTIC_TRACEBACK="1")
    process.start()
    process.join(300)
    said = log.read_text()
    assert process.exitcode == 1 and "Traceback" in said and "no data at nowhere" in said


def test_a_run_that_diverges_ends_with_its_own_code(monkeypatch, capsys):
    from elastic.commands import training

    def diverge(*_):
        raise FloatingPointError("the loss is nan at step 3")

    monkeypatch.setattr(training, "run", diverge)
    assert cli.main(["fit"]) == 1
    assert capsys.readouterr().err == "elastic fit: error: the loss is nan at step 3\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore"), "Tried to allocate 2 GiB."),
        (
            RuntimeError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'"),
            "CUDA error: out of memory;",
        ),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "DefaultCPUAllocator"),
        (MemoryError(), "error: out of memory;"),
    ],
)
def test_too_little_memory_is_one_line(error, said, monkeypatch, capsys):
    def main(rest):
        raise error

    monkeypatch.setattr("elastic.commands.doctor.main", main)
    assert cli.main(["doctor"]) == 2
    told = capsys.readouterr().err
    assert said in told and "use smaller batches" in told and told.count("\n") == 1
    monkeypatch.setenv("ELASTIC_TRACEBACK", "1")
    with pytest.raises(type(error)):
        cli.main(["doctor"])


def test_another_failure_keeps_its_traceback(monkeypatch):
    def main(rest):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("elastic.commands.doctor.main", main)
    with pytest.raises(RuntimeError, match="illegal"):
        cli.main(["doctor"])
