"""Checkpoints to and from a hub on the loopback address, by the hub's own client, and to and from folders."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import elastic
from elastic import cli
from elastic.files import sealed, unsealed
from elastic.model import loading
from elastic.model.attach import attach
from elastic.model.card import is_written_here, model_card
from elastic.model.checkpoint import CARD, METADATA, WEIGHTS, read_elastic, router_state, save_elastic
from elastic.model.hub import HubUnreachableError, checkpoint_folder, fetch
from elastic.model.sharing import pull, push
from tests.helpers.hub import OWNER, STRANGER, running, use
from tests.helpers.models import small_config, varied_routers
from tests.helpers.training import command_environment

REPO = "me/routers"
BOTH = (METADATA, WEIGHTS)
SHIPPED = Path(__file__).parents[2] / "checkpoints" / "smollm2-135m-fa-ssa"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with running() as hub:
        use(hub, monkeypatch, tmp_path / "cache")
        monkeypatch.chdir(tmp_path)
        yield hub


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two checkpoints of the tiny backbone."""
    folder = tmp_path_factory.mktemp("made")
    for name, seed in (("one", 0), ("two", 1)):
        model, _ = loading.load_backbone("tiny")
        varied_routers(attach(model, small_config()), seed)
        recipe = {"step": 40, "data": {"sources": {"tiny": 3}}}
        save_elastic(folder / name, model, "tiny", recipe=recipe, metrics={"single_qa": {"exact": 0.5 + seed / 4}})
    return folder


@pytest.fixture
def one(made, tmp_path):
    return Path(shutil.copytree(made / "one", tmp_path / "one"))


@pytest.fixture
def two(made, tmp_path):
    return Path(shutil.copytree(made / "two", tmp_path / "two"))


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def card_of(place, source, license_id=None):
    return model_card(read_elastic(source), str(place), license_id).encode()


def same_routers(one, other):
    mine, theirs = router_state(one), router_state(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def set_backbone(folder, name):
    values = unsealed((folder / METADATA).read_text())
    (folder / METADATA).write_text(sealed({**values, "backbone": name}))


# -- round trips


def test_a_round_trip_through_a_hub_keeps_every_byte(hub, one, tmp_path):
    done = push(one, REPO)
    assert done.is_new and hub.repositories[REPO].commits[-1][0] == done.commit
    assert any(line.startswith("PUT /lfs/") for line in hub.asked)
    there = hub.repositories[REPO].files
    assert set(there) == {*BOTH, CARD, ".gitattributes"} and there[CARD] == card_of(REPO, one)
    assert {name: there[name] for name in BOTH} == contents(one)
    got = pull(REPO)
    assert got.place == "routers" and got.is_new and got.commit == done.commit
    assert contents("routers") == {**contents(one), CARD: there[CARD]}
    assert not pull(REPO).is_new and contents("routers") == {**contents(one), CARD: there[CARD]}

    model, tokenizer = elastic.load(REPO)
    local, _ = elastic.load(one)
    assert same_routers(model, local)
    (answer,) = elastic.generate(model, tokenizer, "f1 f2 k3", max_new_tokens=2)
    assert answer.report.msr is not None


def test_a_round_trip_through_a_folder_keeps_every_byte(one, tmp_path):
    shared = tmp_path / "shared"
    assert push(one, str(shared)).is_new and not push(one, str(shared)).is_new
    assert contents(shared) == {**contents(one), CARD: card_of(shared, one)}
    assert pull(str(shared), tmp_path / "got").is_new
    assert contents(tmp_path / "got") == contents(shared)


def test_revisions(hub, one, two, tmp_path):
    first, second = push(one, REPO).commit, push(two, REPO).commit
    hub.repositories[REPO].tags["v1"] = first
    assert first != second and push(two, REPO).commit == second
    assert len(hub.repositories[REPO].commits) == 3  # the one with .gitattributes is first
    for revision, made in (("v1", one), (first, one), (second, two), ("main", two), (None, two)):
        assert (checkpoint_folder(REPO, revision) / WEIGHTS).read_bytes() == (made / WEIGHTS).read_bytes()
    assert same_routers(elastic.load(REPO, revision="v1")[0], elastic.load(one)[0])
    assert pull(REPO, tmp_path / "old", "v1").commit == first


def test_the_newest_commit_is_asked_for_and_the_cache_answers_where_no_hub_does(hub, one, two, monkeypatch, recwarn):
    first = push(one, REPO).commit
    elastic.load(REPO)
    second = push(two, REPO).commit
    assert checkpoint_folder(REPO).name == second
    asked = len(hub.asked)
    assert checkpoint_folder(REPO, first).name == first and len(hub.asked) == asked
    assert not [one for one in recwarn if one.category is UserWarning]
    from huggingface_hub import constants

    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}"
        )
        with pytest.warns(
            UserWarning, match=f"cannot be reached for {REPO} .* those of commit {second}, from the cache"
        ):
            assert checkpoint_folder(REPO).name == second
        with pytest.raises(
            HubUnreachableError, match="no checkpoint 'me/other': there is no such folder, and the hub "
        ):
            elastic.load("me/other")
        with pytest.raises(OSError, match=r"cannot be reached .* or bring a folder that `elastic pull` wrote"):
            pull("me/other")


def test_a_checkpoint_from_before_there_were_checksums_of_settings(hub, one, tmp_path):
    """Nor a recipe, measurements, or what the chat template was told."""
    earlier = unsealed((one / METADATA).read_text())
    for name in ("recipe", "metrics", "chat_template_kwargs", "versions"):
        del earlier[name]
    (one / METADATA).write_text(json.dumps(earlier))
    push(one, REPO)
    pull(REPO, "out")
    assert {name: contents("out")[name] for name in BOTH} == contents(one)
    assert contents("out")[CARD].count(b"Nothing was recorded.") == 2


# -- altered contents


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("where", ["on the way", "on the hub", "in the folder"])
def test_altered_contents_are_refused(hub, one, tmp_path, name, where):
    data = bytearray((one / name).read_bytes())
    data[-9] ^= 1
    if where == "in the folder":
        (one / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"one/{name} is damaged"):
            push(one, REPO)
        with pytest.raises(ValueError, match=f"one/{name} is damaged"):
            pull(str(one), "out")
        assert REPO not in hub.repositories
    else:
        push(one, REPO)
        if where == "on the hub":
            hub.repositories[REPO].commit({name: bytes(data)})
        else:
            hub.bodies[name] = bytes(data)
        for use_it in (elastic.load, pull):
            with pytest.raises(ValueError, match=rf"{REPO} at commit \w+ is refused: .*/{name} is damaged"):
                use_it(REPO)
    assert not Path("out").exists() and not Path("routers").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_no_other_file_of_a_repository_is_asked_for(hub, one, tmp_path):
    push(one, REPO)
    hub.repositories[REPO].commit({"../../../evil.py": b"1", "/etc/evil": b"2", "pytorch_model.bin": b"3"})
    before = set(tmp_path.rglob("*"))
    hub.asked.clear()
    pull(REPO, "out")
    assert {path.name for path in Path("out").iterdir()} == {*BOTH, CARD}
    assert {line.rsplit("/", 1)[1] for line in hub.asked} == {*BOTH, CARD}
    new = {path for path in tmp_path.rglob("*") if path not in before}
    assert all(path.is_relative_to(tmp_path / "out") or path.is_relative_to(tmp_path / "cache") for path in new)


def test_a_server_that_is_no_hub(hub, one):
    push(one, REPO)
    hub.repositories[REPO].commits[-1] = ("../../../evil", hub.repositories[REPO].files)
    with pytest.raises(ValueError, match=r"names no commit, but '\.\./\.\./\.\./evil'; is HF_ENDPOINT a hub"):
        pull(REPO)


# -- what the hub refuses


@pytest.mark.parametrize(
    ("case", "kind", "message"),
    [
        (
            "missing",
            FileNotFoundError,
            "the hub has no repository me/other that you may see; check the name, or log in",
        ),
        (
            "private",
            FileNotFoundError,
            "no repository me/other that you may see; .* `hf auth login`.* where it is private",
        ),
        ("gated", PermissionError, "me/other is gated; ask for access"),
        ("revision", FileNotFoundError, "me/other has no revision 'v9'; its page on the hub lists them"),
        (
            "other files",
            ValueError,
            r"me/other at main is not an Elastic Attention checkpoint: it has no elastic\.json",
        ),
        ("no weights", ValueError, r"me/other at main is not an Elastic Attention checkpoint: it has no .*safetensors"),
        ("down", OSError, r"the hub answered 503 for me/other \(.*try again later"),
        ("logged out", PermissionError, "the hub does not let you do this with me/other"),
    ],
)
def test_what_cannot_be_fetched(hub, one, monkeypatch, case, kind, message):
    if case != "missing":
        files = {"config.json": b"{}", "model.safetensors": b""} if case == "other files" else contents(one)
        files = {METADATA: files[METADATA]} if case == "no weights" else files
        hub.add("me/other", files, private=case == "private", gated=case == "gated")
    hub.status = {"down": 503, "logged out": 403}.get(case, 0)
    token = {"private": None, "gated": STRANGER}.get(case, OWNER)
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    revision = "v9" if case == "revision" else None
    for use_it in (lambda: elastic.load("me/other", revision=revision), lambda: pull("me/other", "out", revision)):
        with pytest.raises(kind, match=message):
            use_it()
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("case", "kind", "message"),
    [
        (
            "nobody",
            PermissionError,
            "the hub accepts files only from users who are logged in; log in with `hf auth login`",
        ),
        ("stranger", PermissionError, "the hub does not let you do this with me/routers"),
        ("a model", ValueError, "me/routers on the hub holds config.json, model.safetensors and no Elastic Attention"),
        ("public", ValueError, "me/routers is there already, for everybody to see; leave --private out"),
        ("somebody else", OSError, "somebody else changed me/routers at the same time"),
        ("unreachable", HubUnreachableError, "the hub cannot be reached for me/routers"),
        ("not a name", ValueError, "'me/rou--ters' at 'main': "),
    ],
)
def test_what_cannot_be_pushed(hub, one, two, monkeypatch, case, kind, message):
    from huggingface_hub import constants

    if case in ("a model", "public", "somebody else"):
        files = {"config.json": b"{}", "model.safetensors": b""} if case == "a model" else contents(two)
        hub.add(REPO, files)
    if case == "somebody else":
        hub.before_commit = lambda repository: repository.commit({"theirs": b"."})
    if case == "nobody":
        monkeypatch.delenv("HF_TOKEN")
    if case == "stranger":
        monkeypatch.setenv("HF_TOKEN", STRANGER)
    if case == "unreachable":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    before = dict(hub.repositories[REPO].files) if REPO in hub.repositories else None
    with pytest.raises(kind, match=message):
        push(one, "me/rou--ters" if case == "not a name" else REPO, private=case == "public")
    after = dict(hub.repositories[REPO].files) if REPO in hub.repositories else None
    assert after == (before and {**before, **({"theirs": b"."} if case == "somebody else" else {})})


def test_a_private_repository(hub, one, monkeypatch):
    push(one, REPO, private=True)
    assert hub.repositories[REPO].private and read_elastic(fetch(REPO))
    push(one, REPO, private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(FileNotFoundError, match="that you may see"):
        pull(REPO)


# -- places


def test_a_folder_of_the_name_of_a_repository(hub, one, two):
    push(two, REPO)
    shutil.copytree(one, REPO)
    assert checkpoint_folder(REPO) == Path(REPO)  # as transformers does
    asked = len(hub.asked)
    for refused in (lambda: push(one, REPO), lambda: pull(REPO, "out")):
        with pytest.raises(ValueError, match=r"but is also a folder here; write \./me/routers for the folder, or run "):
            refused()
    with pytest.raises(
        ValueError, match="revision='v1' is of a repository on the hub, but me/routers is a place on this"
    ):
        elastic.load(REPO, revision="v1")
    with pytest.raises(ValueError, match=r"--revision v1 is of a repository on the hub, but \./me/routers is a folder"):
        pull(f"./{REPO}", "out", "v1")
    with pytest.raises(ValueError, match="revision='v1' is of a repository on the hub, but moba:3 is a method"):
        elastic.load("moba:3", "tiny", revision="v1")
    assert pull(f"./{REPO}", "out").is_new and len(hub.asked) == asked
    assert contents("out") == contents(one)


@pytest.mark.parametrize("name", ["routers", "a/b/c", "https://huggingface.co/me/routers", "~/routers"])
def test_a_name_that_is_neither_of_the_hub_nor_of_a_folder(hub, one, name):
    for refused in (lambda: push(one, name), lambda: pull(name, "out")):
        way = "name a repository by these alone" if "://" in name else r"write \./"
        with pytest.raises(ValueError, match=rf"{name} is neither owner/name on the hub nor a folder here; {way}"):
            refused()
    assert not hub.asked and not Path(name).exists()


def test_an_owner_with_the_name_of_a_method(hub, one):
    push(one, "dense/routers")
    assert elastic.load("dense/routers")


def test_what_a_folder_holds_is_not_replaced(one, two, tmp_path):
    shared = tmp_path / "shared"
    push(one, str(shared))
    (shared / "notes.txt").write_text("mine")
    (shared / CARD).write_text("my own words")
    before = contents(shared)
    for refused in (lambda: push(two, str(shared)), lambda: pull(str(two), shared)):
        with pytest.raises(ValueError, match=f"{shared} holds another checkpoint, which stays"):
            refused()
    assert push(one, str(shared)).card_kept
    assert contents(shared) == before
    (shared / CARD).unlink()
    for license_id in (None, "mit"):
        assert not push(one, str(shared), license_id=license_id).card_kept
        assert contents(shared) == {**before, CARD: card_of(shared, one, license_id)}
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("mine")
    for place in ("work", "work/thesis.tex"):
        with pytest.raises(ValueError, match=r"is not an Elastic Attention checkpoint|is a file; expected a folder"):
            pull(str(one), tmp_path / place)
    assert contents(tmp_path / "work") == {"thesis.tex": b"mine"}


def test_a_full_disk_leaves_nothing(one, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("elastic.files._flush", full)
    with pytest.raises(OSError, match="No space left"):
        pull(str(one), tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


# -- model cards


def test_a_card_that_somebody_wrote_stays(hub, one, two):
    push(one, REPO)
    repository = hub.repositories[REPO]
    repository.commit({CARD: repository.files[CARD].replace(b"\n", b"\r\n")})  # as a browser's editor saves it
    assert not push(two, REPO).card_kept and repository.files[CARD] == card_of(REPO, two)
    edited = repository.files[CARD].replace(b"# routers", b"# The best routers")
    repository.commit({CARD: edited, "notes": b"mine"})
    assert push(one, REPO).card_kept
    assert repository.files[CARD] == edited and repository.files["notes"] == b"mine"
    assert repository.files[WEIGHTS] == (one / WEIGHTS).read_bytes()


def test_a_card_in_the_folder_goes_along(hub, one, two):
    (one / CARD).write_text("---\nlicense: mit\n---\nmy own words")
    with pytest.raises(ValueError, match=r"--license is for a card that is made, but .*/one has its own README\.md"):
        push(one, REPO, license_id="mit")
    for words in ("my own words", "better words"):
        (one / CARD).write_text(f"---\nlicense: mit\n---\n{words}")
        assert not push(one, REPO).card_kept and hub.repositories[REPO].files[CARD] == (one / CARD).read_bytes()
    (two / CARD).write_bytes(card_of("somebody/else", two))  # which an earlier push wrote
    push(two, "me/others")
    assert hub.repositories["me/others"].files[CARD] == card_of("me/others", two)


def test_a_card_that_the_hub_refuses(hub, one):
    with pytest.raises(ValueError, match=r'Invalid metadata in README\.md\. - "license" must be one of a list'):
        push(one, REPO, license_id="no-such")
    assert push(one, REPO, license_id="mit").is_new


def test_what_a_card_says(tmp_path):
    push(SHIPPED, str(tmp_path / "card"), license_id="apache-2.0")
    text = (tmp_path / "card" / CARD).read_text()
    _, front, body = text.split("---\n", 2)
    metadata = read_elastic(SHIPPED)
    assert yaml.safe_load(front) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "adapter",
        "library_name": "elastic-attention",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["elastic-attention", "attention-router", "sparse-attention", "long-context", "llama"],
    }
    told = (
        "| backbone | smollm2-135m |",
        f"| sha256 of router.safetensors | {metadata['weights_sha256']} |",
        f"| sha256 of the architecture | {metadata['architecture_sha256']} |",
        "| router.kind | level |",
        f"| sparse.window | {metadata['config']['sparse']['window']} |",
        f"| data.order.samples | {metadata['recipe']['data']['order']['samples']} |",
        f"| retrieval of dense | {metadata['metrics']['retrieval of dense']:.6g} |",
        f"| foreign.mean MSR | {metadata['metrics']['foreign']['mean MSR']:.6g} |",
        f"model, tokenizer = elastic.load({json.dumps(str(tmp_path / 'card'))})",
    )
    assert all(line in body for line in told), [line for line in told if line not in body]
    assert is_written_here(text) and not is_written_here(text.replace("full", "FULL"))


def test_what_a_recipe_says_is_no_markup(one):
    metadata = read_elastic(one)
    metadata["recipe"] = {"note": "a | b\n\n# c\n<script>alert(1)</script> [x](javascript:1) `d`", "long": "y" * 9999}
    metadata["metrics"] = {}
    metadata["backbone"] = "evil\n---\nlicense: mit"
    text = model_card(metadata, REPO)
    assert r"| note | a \| b # c &lt;script&gt;alert(1)&lt;/script&gt; \[x\](javascript:1) \`d\` |" in text
    assert "y" * 401 not in text and "Nothing was recorded." in text
    front = yaml.safe_load(text.split("---\n")[1])
    assert "license" not in front and "base_model" not in front


def test_a_backbone_that_others_do_not_have(hub, one, tmp_path):
    set_backbone(one, str(tmp_path / "llama"))
    with pytest.raises(ValueError, match=r"/llama', a place on this machine .* with --backbone owner/name"):
        push(one, REPO)
    assert REPO not in hub.repositories
    assert push(one, "./here").is_new  # for others on this machine
    push(one, REPO, backbone="meta-llama/Llama-3.2-1B")
    there = hub.repositories[REPO].files
    assert there[WEIGHTS] == (one / WEIGHTS).read_bytes()
    assert read_elastic(fetch(REPO))["backbone"] == "meta-llama/Llama-3.2-1B"
    assert yaml.safe_load(there[CARD].decode().split("---\n")[1])["base_model"] == "meta-llama/Llama-3.2-1B"
    with pytest.raises(ValueError, match=r"--private is of the hub, but \./there is a folder"):
        push(one, "./there", private=True)


# -- commands


def test_the_commands(hub, one, capsys):
    assert cli.main(["push", str(one), REPO, "--license", "mit"]) == 0
    commit = hub.repositories[REPO].commits[-1][0]
    again = f'Next: elastic generate --checkpoint {REPO} --revision {commit} --prompt "..."\n'
    assert capsys.readouterr().out == f"{REPO}: pushed\n{again}"
    assert b"license: mit" in hub.repositories[REPO].files[CARD]
    assert cli.main(["pull", REPO, "--out", "o ut", "--revision", commit]) == 0
    said = capsys.readouterr().out
    assert said == f"o ut: pulled (commit {commit})\nNext: elastic generate --checkpoint 'o ut' --prompt \"...\"\n"
    asked = ["--prompt", "f1 f2 k3", "--max-new-tokens", "2"]
    assert cli.main(["generate", "--checkpoint", REPO, "--revision", commit, *asked]) == 0
    here = capsys.readouterr()
    assert cli.main(["generate", "--checkpoint", "o ut", *asked]) == 0
    assert capsys.readouterr() == here
    for wrong, message in (
        (["pull", "me/other"], "elastic pull: error: the hub has no repository me/other"),
        (["push", "nowhere", REPO], "elastic push: error: no checkpoint at nowhere: elastic.json is missing"),
        (
            ["generate", "--checkpoint", "me/other", *asked],
            "no checkpoint 'me/other': there is no such folder, and the hub",
        ),
    ):
        assert cli.main(wrong) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_a_server_of_a_revision(hub, one, capsys):
    pytest.importorskip("fastapi", reason="needs the extra serve")
    push(one, REPO)
    assert cli.main(["serve", "--checkpoint", REPO, "--revision", "v9", "--port", "0"]) == 2
    assert "me/routers has no revision 'v9'" in capsys.readouterr().err


def test_a_process_finds_the_hub_by_its_environment(hub, one, tmp_path):
    push(one, REPO)
    told = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "elastic", "pull", REPO]
    done = subprocess.run(command, env=command_environment(**told), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {name: contents("routers")[name] for name in BOTH} == contents(one)
