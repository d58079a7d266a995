"""The grammar of methods: every command reads and prints it, a name and its method are the same thing, and names that
were written before there was one grammar are refused, or read where files hold them.
"""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic import cli
from elastic.config import SparseConfig
from elastic.routing.methods import (
    FORMS,
    GRAMMAR,
    MODES,
    Method,
    caveats,
    columns,
    parse_method,
    parse_methods,
    ratio_columns,
    renamed,
)
from tests.helpers.training import ROOT

READ = {  # name -> method
    "dense": Method("dense"),
    "streaming": Method("streaming"),
    "xattention": Method("xattention"),
    "xattention:0.95": Method("xattention", threshold=0.95),
    "moba:3": Method("moba", top_k=3),
    "moba:12:128": Method("moba", top_k=12, chunk=128),
    "nsa": Method("nsa"),
    "nsa:8": Method("nsa", top_k=8),
    "infllm": Method("infllm"),
    "infllm:32": Method("infllm", top_k=32),
    "flexprefill:0.95": Method("flexprefill", gamma=0.95),
    "flexprefill:0.9:256": Method("flexprefill", gamma=0.9, min_budget=256),
    "flashprefill:0.12": Method("flashprefill", threshold=0.12),
    "random:0.7": Method("random", msr=0.7),
    "random:1:5": Method("random", msr=1.0, seed=5),
    "static:heads.tsv": Method("static", file="heads.tsv"),
    "static:a@b/heads.tsv@0.25": Method("static", file="a@b/heads.tsv", msr=0.25),
    "static:heads.tsv@0": Method("static", file="heads.tsv", msr=0.0),
    "elastic": Method("elastic"),
    "elastic@-2": Method("elastic", bias=-2.0),
    "elastic@0": Method("elastic", bias=0.0),
    "elastic/fa-xa": Method("elastic", modes="fa-xa"),
    "elastic/xa-ssa@1.5": Method("elastic", modes="xa-ssa", bias=1.5),
    "elastic:runs/a/checkpoint": Method("elastic", checkpoint="runs/a/checkpoint"),
    "elastic:runs/lr@3/checkpoint@-1": Method("elastic", checkpoint="runs/lr@3/checkpoint", bias=-1.0),
    "elastic/fa-xa:runs/a@1e-05": Method("elastic", modes="fa-xa", checkpoint="runs/a", bias=1e-5),
    "elastic:1:2": Method("elastic", checkpoint="1:2"),
    "elastic:./fa-xa": Method("elastic", checkpoint="./fa-xa"),
}
OLD = {  # what `elastic test` called them -> what they are called now
    "elastic:-2": "elastic@-2",
    "elastic:1.5": "elastic@1.5",
    "elastic:fa-xa": "elastic/fa-xa",
    "elastic:fa-xa:1": "elastic/fa-xa@1",
    "elastic:xa-ssa@-0.5": "elastic/xa-ssa@-0.5",
}


@pytest.mark.parametrize("name", READ)
def test_a_name_is_read_and_printed(name):
    assert parse_method(name) == READ[name]
    assert READ[name].name == name == renamed(name)


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("random:.70:0", "random:0.7"),
        ("xattention:9e-1", "xattention:0.9"),
        ("elastic@+2.0", "elastic@2"),
        ("moba:03:512", "moba:3"),
        ("flexprefill:.90:1024", "flexprefill:0.9"),
    ],
)
def test_a_method_has_one_name(name, same):
    assert parse_method(name).name == same


PATHS = st.from_regex(r"[\w. :@-]*/[\w. :-]*", fullmatch=True)  # what follows the last @ has a slash
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
METHODS = st.one_of(
    st.builds(Method, st.just("xattention"), threshold=st.none() | st.floats(0, 1, exclude_min=True)),
    st.builds(Method, st.just("moba"), top_k=st.integers(1, 999), chunk=st.integers(1, 4096)),
    st.builds(Method, st.sampled_from(["nsa", "infllm"]), top_k=st.none() | st.integers(1, 999)),
    st.builds(
        Method,
        st.just("flexprefill"),
        gamma=st.floats(0, 1, exclude_min=True),
        min_budget=st.integers(1, 9999),
    ),
    st.builds(Method, st.just("flashprefill"), threshold=st.floats(0, 1, exclude_min=True)),
    st.builds(Method, st.just("random"), msr=st.floats(0, 1), seed=st.integers(0, 2**63 - 1)),
    st.builds(Method, st.just("static"), file=PATHS, msr=st.none() | st.floats(0, 1)),
    st.builds(
        Method,
        st.just("elastic"),
        modes=st.none() | st.sampled_from(list(MODES)),
        checkpoint=st.none() | PATHS,
        bias=st.none() | NUMBERS,
    ),
)


@given(METHODS)
def test_names_round_trip(method):
    assert parse_method(method.name) == method
    assert parse_method(method.name).name == method.name == renamed(method.name)


@pytest.mark.parametrize("old", OLD)
def test_old_spellings_are_refused_with_the_new_one(old):
    with pytest.raises(
        ValueError, match=re.escape(f"method {old!r} is an old spelling; write {OLD[old]} (or elastic:./")
    ):
        parse_method(old)
    assert renamed(old) == OLD[old] == parse_method(OLD[old]).name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sparse", f"method 'sparse' is not known; use one of {GRAMMAR}"),
        ("", "method '' is not known"),
        ("dense:1", "method 'dense:1' is not of the form dense"),
        ("dense@1", "is not of the form dense"),
        ("random", "method 'random' is not of the form random:<msr>[:<seed>]"),
        ("random:0.5:1:2", "is not of the form random:<msr>[:<seed>]"),
        ("random:half", "method 'random:half': 'half' is not an MSR from 0 to 1"),
        ("random:1.5", "'1.5' is not an MSR from 0 to 1"),
        ("random:nan", "'nan' is not an MSR from 0 to 1"),
        ("random:", "'' is not an MSR from 0 to 1"),
        ("random:0.5:-1", "'-1' is not a whole number of 0 or more"),
        ("random:0.5:1.5", "'1.5' is not a whole number of 0 or more"),
        ("xattention:0", "'0' is not a threshold above 0, up to 1"),
        ("xattention:most", "'most' is not a threshold above 0, up to 1"),
        ("moba", "method 'moba' is not of the form moba:<top_k>[:<chunk>]"),
        ("moba:0", "method 'moba:0': '0' is not a number of blocks of 1 or more"),
        ("moba:2.5", "'2.5' is not a number of blocks of 1 or more"),
        ("moba:3:0", "'0' is not a number of tokens of 1 or more"),
        ("moba:3:128:1", "is not of the form moba:<top_k>[:<chunk>]"),
        ("nsa:none", "'none' is not a number of blocks of 1 or more"),
        ("nsa@1", "is not of the form nsa[:<top_k>]"),
        ("infllm:", "'' is not a number of blocks of 1 or more"),
        ("flexprefill", "is not of the form flexprefill:<gamma>[:<min_budget>]"),
        ("flexprefill:1.5", "'1.5' is not a coverage above 0, up to 1"),
        ("flexprefill:0.9:0", "'0' is not a number of tokens of 1 or more"),
        ("flashprefill", "is not of the form flashprefill:<threshold>"),
        ("flashprefill:0", "'0' is not a threshold above 0, up to 1"),
        ("static", "is not of the form static:<file>[@<msr>]"),
        ("static:heads.tsv@2", "'2' is not an MSR from 0 to 1, and what follows the last @ is one"),
        ("static:heads@old", "'old' is not an MSR from 0 to 1, and what follows the last @ is one; rename a path"),
        ("elastic:", "is not of the form elastic[/<modes>][:<checkpoint>][@<bias>]"),
        ("elastic@", "'' is not a finite number"),
        ("elastic@inf", "'inf' is not a finite number"),
        ("elastic@1@2", "is not of the form elastic"),
        ("elastic:runs@more", "'more' is not a finite number"),
        ("elastic/ssa-xa", "'ssa-xa' is not one of fa-ssa, fa-xa, xa-ssa"),
    ],
)
def test_other_names_are_refused(name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_method(name)


def test_routers_come_from_the_run_or_from_a_checkpoint(tmp_path):
    named = f"elastic:{tmp_path}@-1"
    assert [m.name for m in parse_methods(["dense", named], of_run=False)] == ["dense", named]
    assert [m.bias for m in parse_methods(["elastic", "elastic@1"], of_run=True)] == [None, 1]
    (tmp_path / "heads.tsv").write_text("1\n")
    assert parse_methods(["elastic", f"static:{tmp_path}/heads.tsv"], of_run=True)[1].kind == "static"


@pytest.mark.parametrize(
    ("names", "of_run", "message"),
    [
        (["dense"], True, r"methods=\['dense'\] lacks elastic; the routers are what is evaluated"),
        (["elastic@1"], True, "lacks elastic"),
        (["elastic", "elastic"], True, "names elastic twice"),
        (["elastic", "random:0.5", "random:.50:0"], True, "names random:0.5 twice"),
        (
            ["elastic", "elastic:absent@1"],
            True,
            r"'elastic:absent@1' names a checkpoint, .* write elastic@1 and set mod",
        ),
        (["elastic", "static:absent.tsv@0.5"], True, "absent.tsv does not exist; expected a pattern file"),
        (["elastic/fa-xa@-1"], False, r"names no checkpoint, .*; write elastic/fa-xa:<checkpoint>@-1 with the folder"),
        (["elastic:absent"], False, "method 'elastic:absent': absent does not exist; expected a checkpoint folder"),
        (["dense", "dense"], False, "names dense twice"),
        (["elastic:-2"], False, "write elastic@-2"),
    ],
)
def test_lists_that_a_command_cannot_run_are_refused(names, of_run, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        parse_methods(names, of_run)


def test_methods_choose_their_modes():
    own = SparseConfig("xattention", "streaming", sink=4, window=16, block=4, stride=4)
    full, xa, ssa = "full", "xattention", "streaming"
    expected = {
        "elastic": (xa, ssa, 0.9),
        "dense": (full, ssa, 0.9),
        "streaming": (full, ssa, 0.9),
        "xattention": (full, xa, 0.9),
        "xattention:0.5": (full, xa, 0.5),
        "elastic/fa-xa": (full, xa, 0.9),
        "elastic/fa-xa:run@1.5": (full, xa, 0.9),
        "random:0.5": (xa, ssa, 0.9),
        "static:heads.tsv": (xa, ssa, 0.9),
    }
    found = {name: parse_method(name).sparse(own) for name in expected}
    assert {name: (sparse.route0, sparse.route1, sparse.threshold) for name, sparse in found.items()} == expected
    assert all((sparse.sink, sparse.window, sparse.block, sparse.stride) == (4, 16, 4, 4) for sparse in found.values())


def test_rivals_choose_their_modes_and_settings():
    own = SparseConfig("xattention", "streaming", sink=4, window=16, block=4, stride=4)
    expected = {
        "moba:3": ("moba", 3, 512, 1024, 0.9),
        "moba:12:128": ("moba", 12, 128, 1024, 0.9),
        "nsa": ("nsa", None, 512, 1024, 0.9),
        "infllm:32": ("infllm", 32, 512, 1024, 0.9),
        "flexprefill:0.95:256": ("flexprefill", None, 512, 256, 0.95),
        "flashprefill:0.12": ("flashprefill", None, 512, 1024, 0.12),
    }
    for name, settings in expected.items():
        sparse = parse_method(name).sparse(own)
        assert (sparse.route1, sparse.top_k, sparse.chunk, sparse.min_budget, sparse.threshold) == settings
        assert (sparse.route0, sparse.sink, sparse.window, sparse.block) == ("full", 4, 16, 4)
        assert sparse.chooser == sparse.route1 and parse_method(name).routes(2, 3).tolist() == [[1, 1, 1]] * 2
    with pytest.raises(ValueError, match=re.escape("sparse.chunk=6 is not a multiple of sparse.block=4")):
        parse_method("moba:3:6").sparse(own)


def test_tables_can_say_what_a_rival_lacks():
    said = caveats([parse_method(name) for name in ("dense", "moba:3", "nsa", "moba:4", "infllm", "flashprefill:0.1")])
    assert [line.split()[0] for line in said] == ["MoBA", "NSA", "InfLLM-V2"]
    assert all("the backbone is frozen" in line for line in said)
    assert not parse_method("flexprefill:0.9").caveat and not parse_method("elastic").caveat


def test_methods_choose_their_routes(tmp_path):
    def routes(name, layers=4, kv_heads=5):
        return parse_method(name).routes(layers, kv_heads)

    assert routes("dense").sum() == 0 and routes("elastic@1") is None
    assert routes("streaming").sum() == routes("xattention:0.5").sum() == 20
    assert routes("random:0.7").shape == (4, 5) and routes("random:0.7").sum() == routes("random:0.7:5").sum() == 14
    assert torch.equal(routes("random:0.7"), routes("random:0.7:0"))
    assert not torch.equal(routes("random:0.7"), routes("random:0.7:5"))
    file = tmp_path / "heads.tsv"
    file.write_text("0.9\t0.1\n0.0\t0.5\n")
    assert routes(f"static:{file}", 2, 2).tolist() == [[0, 1], [1, 0]]
    assert routes(f"static:{file}@0.75", 2, 2).tolist() == [[0, 1], [1, 1]]
    assert routes(f"static:{file}@0.25", 2, 2).tolist() == [[0, 0], [1, 0]]
    with pytest.raises(ValueError, match=r"has 2 lines of \[2\] numbers; this backbone needs 3 lines"):
        routes(f"static:{file}", 3, 2)
    file.write_text("a b\n")
    with pytest.raises(ValueError, match="is not a table of numbers"):
        routes(f"static:{file}", 1, 2)


def test_columns_of_results():
    names = columns([parse_method(name) for name in ("dense", "elastic", "random:0.7")])
    assert names[:6] == tuple(f"{m}_{s}" for m in ("dense", "elastic") for s in ("loss", "accuracy", "exact"))
    assert names[9:] == ("msr", "esr_last", "esr_all", "random:0.7_msr", "random:0.7_esr_last", "random:0.7_esr_all")
    assert ratio_columns("elastic:-2")["msr"] == "elastic:-2_msr"  # as files of earlier runs have it


@pytest.mark.parametrize("command", ["fit", "validate", "test", "eval"])
def test_every_help_prints_the_grammar(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert "".join(GRAMMAR.split()) in "".join(capsys.readouterr().out.split())


def test_the_page_explains_every_form():
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    section = page.split("## Methods\n")[1].split("\n## ")[0]
    assert re.findall(r"^\| `([^`]+)` \|", section, re.M) == list(FORMS.values())
    examples = re.search(r"^```text\n(.*?)^```", section, re.M | re.S)[1].split()
    assert {parse_method(name).name for name in examples} == set(examples)
    assert {parse_method(name).kind for name in examples} == set(FORMS)
    for old, new in re.findall(r"^\| `([^`]+)` is now `([^`]+)` \|", section, re.M):
        assert renamed(old) == new != old
