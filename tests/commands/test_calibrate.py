"""`elastic calibrate`, and what its file is good for at once: `elastic.load`, `elastic generate`, `elastic serve`."""

import json
import os
import shlex
import shutil
import threading
from contextlib import contextmanager
from multiprocessing import Pipe

import pytest
import torch

import elastic
from elastic import cli
from elastic.commands.calibration_report import advice
from elastic.commands.eval import build_parser
from elastic.model.attach import attach, elastic_config, last_routes, override_routes, routers
from elastic.model.checkpoint import read_elastic, save_elastic
from elastic.model.loading import load_backbone
from elastic.routing.calibration import read_calibration
from elastic.routing.methods import MODES
from tests.helpers.training import build_data
from tests.test_design_page import fields_of

FAST = ["--samples", "6", "--rates", "0.3", "--draws", "0"]
TINY = ["--backbone", "tiny", "--sink", "4", "--window", "16", "--block", "4", *FAST]
PROMPT = "f4 f5 " * 30 + "key k3 1 2 3 4 " + "f6 " * 20 + "find k3"


def run(*arguments):
    return cli.main(["calibrate", *map(str, arguments)])


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("cal") / "cal.json"
    assert run(*TINY, "--lengths", "80,100", "--out", path, "--picture", path.with_suffix(".png")) == 0
    return path


def test_what_it_writes_and_says(file, tmp_path, capsys):
    again = tmp_path / "again.json"
    assert run(*TINY, "--lengths", "80,100", "--out", again, "--compare", file) == 0
    out, _ = capsys.readouterr()
    assert again.read_bytes() == file.read_bytes() and "seconds" not in file.read_text()
    assert "Rows for the order: 6 samples of 3 sources" in out and "Rows for the cost: 3 samples" in out
    assert "\nMSR" in out and "KL to dense" in out and "order by gradient beside gradient" in out
    assert f"Written: {again}\n" in out and f"\nstatic:{again} is the dense model, because every" in out
    assert f"elastic generate --checkpoint static:{again}@0.5" in out
    assert "calibrating, curve: 100%" in out
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["again.json"]
    found = read_calibration(file)
    assert found.backbone == "tiny" and (found.sparse.sink, found.sparse.window, found.sparse.block) == (4, 16, 4)
    assert found.provenance["data"]["lengths"] == [80, 100] and found.provenance["data"]["from"] == "generators"


def test_the_commands_that_it_ends_with_work_as_printed(file, tmp_path, capsys):
    """Also where the path has a blank; the second of them names backbone and sizes."""
    place = tmp_path / "two words" / "cal.json"
    place.parent.mkdir()
    shutil.copy(file, place)
    told = advice(read_calibration(file), place)
    first, second = (shlex.split(line.partition(": ")[2]) for line in told.splitlines() if "elastic " in line)
    assert first[:2] == ["elastic", "generate"] and cli.main([*first[1:], "--max-new-tokens", "1"]) == 0
    args = build_parser().parse_args(second[2:])
    assert (args.backbone, args.sink, args.window, args.block) == ("tiny", 4, 16, 4)
    assert args.methods == ["dense", f"static:{place}@0.5"]
    (levels,) = (shlex.split(line) for line in advice(read_calibration(file), place, place.parent).splitlines())
    assert levels[levels.index("--checkpoint") + 1] == str(place.parent)


def test_the_page_has_every_field(file):
    assert list(json.loads(file.read_text())) == list(fields_of("a calibration"))


def test_two_files_are_compared_without_measuring(file, capsys):
    assert run("--compare", file, file) == 0
    out, _ = capsys.readouterr()
    assert [line.split() for line in out.splitlines()[3:]] == [
        ["10%", "1", "100%", "1.000"], ["20%", "1", "100%", "1.000"], ["30%", "2", "100%", "1.000"],
    ]  # fmt: skip


def test_packed_data_and_settings_of_a_configuration(tmp_path):
    data = build_data(tmp_path)
    assert run("-c", "tiny", "-c", tmp_path / "mine.yaml", "--data", data) == 2
    (tmp_path / "mine.yaml").write_text("model:\n  elastic:\n    sparse: {window: 16, sink: 8}\n")
    options = ["-c", "tiny", "-c", tmp_path / "mine.yaml", "--sink", "4", "--data", data, *FAST]
    assert run(*options, "--by", "ablation", "--rounds", "0", "--out", tmp_path / "cal.json") == 0
    found = read_calibration(tmp_path / "cal.json")
    assert (found.sparse.sink, found.sparse.window, found.sparse.block) == (4, 16, 4)
    assert found.provenance["data"]["from"] == "packed data" and found.provenance["settings"] == {"levels": [0.0]}
    assert set(found.curve.sources) == {"single_qa/tiny", "in_context/tiny"}


def test_level_routers(tmp_path, capsys):
    """Order, cost and routers in one command; the checkpoint answers at once."""
    out, levels = tmp_path / "cal.json", tmp_path / "levels"
    assert run(*TINY, "--lengths", "100", "--out", out, "--levels", levels, "--level-samples", 12, "--budget", 0.3) == 0
    said, _ = capsys.readouterr()
    assert "Rows for the levels: 12 samples" in said and f"Written: {out}, {levels}\n" in said
    assert f'Next: elastic generate --checkpoint {levels} --prompt "..."' in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cal.json", "levels"]
    model, tokenizer = elastic.load(levels)
    router = elastic_config(model).router
    assert (router.kind, router.budget) == ("level", 0.3)
    order = torch.cat([of.rank for of in routers(model)]).argsort().tolist()
    assert order == list(read_calibration(out).order)
    (answer,) = elastic.generate(model, tokenizer, PROMPT, 4)
    assert len(answer.token_ids) == 4
    metadata = read_elastic(levels)
    assert metadata["recipe"]["by"] == "outcomes" and len(metadata["metrics"]["explained variance by layer"]) == 3


@pytest.mark.parametrize("by", ["gradient", "ablation"])
@pytest.mark.parametrize("modes", ["fa-xa", "xa-ssa"])
def test_level_routers_of_other_modes(modes, by, tmp_path, capsys):
    """What route 0 costs by itself is told apart from what the heads on route 1 add."""
    out, levels = tmp_path / "cal.json", tmp_path / "levels"
    options = [*TINY, "--stride", "4", "--modes", modes, "--by", by, "--rounds", "0", "--lengths", "100"]
    assert run(*options, "--out", out, "--levels", levels, "--level-samples", 12) == 0
    found = read_calibration(out)
    alone = found.curve.kl[0]
    assert (found.sparse.route0, found.sparse.route1) == MODES[modes] and found.sparse.stride == 4
    assert found.floor == alone and (alone > 0.01 if modes == "xa-ssa" else alone == 0)
    assert found.curve.kl[-1] > alone and found.provenance["by"] == by
    model, tokenizer = elastic.load(levels)
    assert elastic_config(model).sparse == found.sparse and elastic_config(model).router.kind == "level"
    (answer,) = elastic.generate(model, tokenizer, PROMPT, 4)
    assert answer.report.configuration == found.sparse.name and len(answer.token_ids) == 4
    assert "elastic eval" not in advice(found, out), "whose files' heads are full or streaming"
    assert ("beyond what xattention heads cost" in advice(found, out)) == (modes == "xa-ssa")
    (dense,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("0 "))
    assert dense.split()[1] == f"{alone:.4f}"


def test_only_the_like_is_replaced(file, tmp_path, capsys):
    """A calibration of the same backbone and modes; not one of others, nor routers that were trained."""
    before = file.read_bytes()
    assert run(*TINY, "--modes", "fa-xa", "--stride", 4, "--out", file) == 2
    assert "is a calibration of 'tiny' for FA-SSA, which one of 'tiny' for FA-XA would re" in capsys.readouterr().err
    assert run(*FAST, "smollm2-135m", "--out", file) == 2
    assert "which one of 'smollm2-135m' for FA-SSA would replace" in capsys.readouterr().err
    assert file.read_bytes() == before
    model, _ = load_backbone("tiny")
    trained = save_elastic(tmp_path / "trained", attach(model), "tiny")
    assert run(*TINY, "--out", tmp_path / "cal.json", "--levels", trained) == 2
    assert "trained holds routers of kind paper, which stay" in capsys.readouterr().err


def test_own_texts(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text(" ".join(f"f{i % 16} p{i % 7}" for i in range(1500)))
    options = ["--text", tmp_path / "texts", "--lengths", "300"]
    assert run(*TINY, *options, "--out", tmp_path / "cal.json") == 0
    found = read_calibration(tmp_path / "cal.json")
    assert set(found.curve.sources) == {"texts"} and found.provenance["data"]["order"]["tokens"] == 6 * 300


@pytest.fixture
def other(file, tmp_path):
    """A calibration of a backbone with one layer more."""
    values = json.loads(file.read_text())
    values["architecture"]["num_layers"] = 4
    values["need"].append([0.0, 0.0])
    values["order"] += [6, 7]
    path = tmp_path / "other.json"
    path.write_text(json.dumps(values))
    return path


def test_load_runs_the_heads_of_the_file(file):
    for name, msr in ((f"static:{file}@0.5", 0.5), (f"static:{file}", None)):
        model, tokenizer = elastic.load(name)
        ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
        routes = read_calibration(file).routes(msr)
        with torch.no_grad():
            own = model(ids).logits
            assert torch.equal(last_routes(model).route[:, 0], routes)
            with override_routes(model, routes):
                assert torch.equal(model(ids).logits, own)
    (answer,) = elastic.generate(model, tokenizer, PROMPT, max_new_tokens=2, sparsity_bias=100.0)
    assert answer.report.msr == 1.0


def test_load_refuses_what_does_not_fit(file, other, tmp_path):
    with pytest.raises(ValueError, match=r"with num_layers=4, but this backbone has num_layers=3"):
        elastic.load(f"static:{other}@0.5")
    with pytest.raises(FileNotFoundError, match=r"no file absent.json; `elastic calibrate --out absent.json`"):
        elastic.load("static:absent.json@0.5")
    (tmp_path / "heads.tsv").write_text("1 0\n0 1\n0 0\n")
    with pytest.raises(ValueError, match=r"heads.tsv does not say which backbone it is of; name it"):
        elastic.load(f"static:{tmp_path}/heads.tsv")
    model, _ = elastic.load(f"static:{tmp_path}/heads.tsv", "tiny")
    with torch.no_grad():
        model(torch.arange(4, 60)[None])
    assert last_routes(model).route[:, 0].tolist() == [[0, 1], [1, 0], [1, 1]]


def test_generate_takes_the_method(file, other, capsys):
    options = ["--prompt", PROMPT, "--max-new-tokens", "3"]
    assert cli.main(["generate", "--checkpoint", f"static:{file}@0.5", *options]) == 0
    out, err = capsys.readouterr()
    assert out.strip() and "MSR 0.500" in err and "sink 4, window 16" in err
    assert cli.main(["generate", "--checkpoint", f"static:{other}@0.5", *options]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert cli.main(["generate", "--checkpoint", f"static:{file}@2", *options]) == 2
    assert "'2' is not an MSR from 0 to 1" in capsys.readouterr().err


def test_serve_takes_the_method(file, capsys, monkeypatch):
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(package, reason="needs the extra serve")
    from elastic.inference.serving import front
    from elastic.inference.serving.remote import Listening

    told = []

    def listen(connection):
        told.append(connection.recv())
        connection.send(Listening())
        connection.close()

    @contextmanager
    def in_a_thread(listening, name, *_):
        ours, theirs = Pipe()
        thread = threading.Thread(target=listen, args=(theirs,))
        thread.start()
        yield os.getpid(), ours
        thread.join()

    monkeypatch.setattr(front, "front_of", in_a_thread)
    assert cli.main(["serve", "--checkpoint", f"static:{file}@0.5", "--port", "0"]) == 0
    assert "model 'cal.json@0.5' at http://127.0.0.1:" in capsys.readouterr().out
    assert told[0].config.num_hidden_layers == 3 and told[0].tokenizer.chat_template


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no backbone is named; write its name"),
        (["-c", "tyni"], "neither a file tyni nor a shipped configuration"),
        (["--backbone", "./none"], "no backbone './none'"),
        (["--backbone", "tiny"], "contexts of 896 tokens lie within sink 128 + window 2048"),
        ([*TINY, "--lengths", "20"], "contexts of 20 tokens lie within sink 4 + window 16"),
        ([*TINY, "--lengths", "2000"], "--lengths 2000 is more than the 1024 tokens that tiny reads"),
        ([*TINY, "--window", "5"], "sparse.window=5 is not a multiple of sparse.block=4"),
        ([*TINY, "--samples", "0"], "--samples 0 is below 1"),
        ([*TINY, "--out", "cal.txt"], "--out cal.txt does not end in .json"),
        ([*TINY, "--out", "{folder}/mine.json"], "mine.json exists but is not a calibration that may be replaced"),
        ([*TINY, "--picture", "cal.jpg"], "--picture cal.jpg does not end in .png"),
        ([*TINY, "--compare", "absent.json"], "no calibration file at absent.json"),
        (["--compare", "{folder}/mine.json", "{folder}/mine.json"], "is not a calibration file"),
        (["--compare", "a", "b", "c"], "--compare names 3 files"),
        ([*TINY, "--data", "{folder}"], "no data at {folder}"),
        ([*TINY, "--data", "a", "--text", "b"], "--data and --text both name what to judge heads by"),
        ([*TINY, "--data", "a", "--lengths", "100"], "--lengths does not go with --data"),
        ([*TINY, "--text", "{folder}", "--lengths", "300"], "holds no .txt or .md file"),
        ([*TINY, "--device", "toaster"], "device='toaster' is not a torch device"),
        ([*TINY, "--lengths", "99", "--dtype", "int8"], "dtype='int8' is not supported"),
        ([*TINY, "--lengths", "30"], "contexts of 30 words are too short for the tiny language"),
        ([*TINY, "--devices", "0"], "--devices 0 with --device cpu"),
        ([*TINY, "--rates", "0"], "expected shares of the heads between 0 and 1"),
        ([*TINY, "--by", "ablation", "--rounds", "0.5"], "expected MSR levels that ascend from 0"),
        ([*TINY, "--levels", "{folder}"], "{folder} exists but is not a checkpoint that may be replaced"),
        ([*TINY, "--levels", "new", "--level-samples", "0"], "--level-samples 0 is below 1"),
        ([*TINY, "--levels", "new", "--budget", "0"], "router.budget=0.0 is not a number above 0"),
        (
            [*TINY, "--stride", "4", "--modes", "fa-xa", "--lengths", "20", "--levels", "new"],
            "contexts of 20 tokens lie within sink 4 + window 16, where level routers (--levels) find no reach",
        ),
        ([*TINY, "--modes", "fa-xa"], "sparse.stride=16 does not divide sparse.block=4; use 4"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.json").write_text("my own")
    assert run(*(option.replace("{folder}", str(tmp_path)) for option in options)) == 2
    out, err = capsys.readouterr()
    assert err.startswith("elastic calibrate: error: ") and err.count("\n") == 1
    assert message.replace("{folder}", str(tmp_path)) in err
    assert (tmp_path / "mine.json").read_text() == "my own" and "Written" not in out


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--by", "magic"], "invalid choice: 'magic'"), (["--lengths", "a,b"], "invalid list of whole numbers value")],
)
def test_wrong_options(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*options)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and "--help" in err
