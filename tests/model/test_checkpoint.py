"""Checkpoint folders: exact contents, atomic writing, and every way in which loading is refused."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

from elastic.files import SEAL, file_sha256, unsealed
from elastic.model import checkpoint
from elastic.model.attach import attach, elastic_config, is_attached, last_routes, override_routes, routers
from elastic.model.checkpoint import (
    CARD,
    METADATA,
    WEIGHTS,
    is_trainable,
    load_into,
    read_elastic,
    router_state,
    save_elastic,
)
from elastic.training.multipliers import LagrangeMultipliers
from tests.helpers.models import LAYERS, random_ids, small_config, tiny_model, varied_routers


@pytest.fixture
def saved(tmp_path):
    model = attach(tiny_model(), small_config())
    varied_routers(model)
    save_elastic(tmp_path / "ck", model, "somewhere/tiny", LagrangeMultipliers(), {"seed": 3}, {"single_qa": {"n": 2}})
    return tmp_path / "ck"


def rewrite(path, change):
    """Change the tensors and make the checksum fit again."""
    state = load_file(path / WEIGHTS)
    change(state)
    save_file(state, path / WEIGHTS)
    edit(path, weights_sha256=file_sha256(path / WEIGHTS))


def edit(path, **values):
    metadata = unsealed((path / METADATA).read_text())
    (path / METADATA).write_text(json.dumps({**metadata, **values}))


def refused(path, message, model=None, kind=ValueError):
    """Loading raises, says why, and leaves the model as it was."""
    model = model or tiny_model()
    with pytest.raises(kind, match=message):
        load_into(model, path)
    assert not is_attached(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_loaded_model_routes_and_answers_the_same(saved):
    model, again = attach(tiny_model(), small_config()), load_into(tiny_model(), saved)
    varied_routers(model)
    ids = random_ids(3, 60)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    assert torch.equal(last_routes(model).route, last_routes(again).route)
    assert set(last_routes(again).route.unique().tolist()) == {0.0, 1.0}
    assert all(
        torch.equal(a, b) for a, b in zip(router_state(model).values(), router_state(again).values(), strict=True)
    )


def test_the_files_hold_exactly_routers_and_multipliers(saved):
    assert sorted(p.name for p in saved.iterdir()) == [METADATA, WEIGHTS]
    parts = ["task.0", "task.2", "head.0", "head.2", "head.4"]
    names = [f"{part}.{kind}" for part in parts for kind in ("weight", "bias")] + ["mean", "var", "count"]
    expected = {f"layers.{layer}.{name}" for layer in range(LAYERS) for name in names}
    assert set(load_file(saved / WEIGHTS)) == expected | {f"multipliers.{name}" for name in ("u", "v", "l2")}
    metadata = read_elastic(saved)
    assert metadata["config"] == small_config().to_dict()
    assert metadata["backbone"] == "somewhere/tiny"
    assert metadata["architecture"]["num_kv_heads"] == 2
    assert metadata["recipe"] == {"seed": 3}
    assert metadata["metrics"] == {"single_qa": {"n": 2}}
    assert set(metadata["versions"]) == {"elastic-attention", "torch", "transformers"}


def test_the_predicate_splits_a_training_state_dict():
    module = torch.nn.Module()
    module.model, module.multipliers = attach(tiny_model(), small_config()), LagrangeMultipliers()
    keys = list(module.state_dict())
    chosen = [k for k in keys if is_trainable(k)]
    assert len(chosen) == LAYERS * len(routers(module.model)[0].state_dict()) + 3
    assert all("router" in k or k in ("multipliers.u", "multipliers.v", "multipliers.l2") for k in chosen)
    trained = [n for n, p in module.named_parameters() if p.requires_grad]
    assert trained == [n for n, _ in module.named_parameters() if is_trainable(n)]
    assert not is_trainable("model.layers.0.self_attn.k_proj.weight")
    assert not is_trainable("multipliers_head.weight")


def test_saving_again_replaces_the_checkpoint(saved):
    model = load_into(tiny_model(), saved)
    with torch.no_grad():
        routers(model)[0].head[0].bias.fill_(0.5)
    save_elastic(saved, model, "other")
    assert read_elastic(saved)["backbone"] == "other"
    assert float(load_file(saved / WEIGHTS)["layers.0.head.0.bias"].mean()) == 0.5
    assert [p.name for p in saved.parent.iterdir()] == ["ck"]


def test_saving_again_keeps_a_card(saved):
    (saved / CARD).write_text("my own words")
    save_elastic(saved, load_into(tiny_model(), saved), "other")
    assert read_elastic(saved)["backbone"] == "other" and (saved / CARD).read_text() == "my own words"


@pytest.mark.parametrize("step", ["safetensors.torch.save_file", "elastic.files._flush", "elastic.files.put_in_place"])
def test_a_killed_save_keeps_the_old_checkpoint(saved, monkeypatch, step):
    model = load_into(tiny_model(), saved)
    before = (saved / WEIGHTS).read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(step, killed)
        with pytest.raises(KeyboardInterrupt):
            save_elastic(saved, model, "other")
    assert read_elastic(saved)["backbone"] == "somewhere/tiny"
    assert (saved / WEIGHTS).read_bytes() == before
    save_elastic(saved, model, "other")
    assert read_elastic(saved)["backbone"] == "other"


def test_killed_between_the_two_renames_the_old_checkpoint_is_found_again(saved):
    model = load_into(tiny_model(), saved)
    old = saved.with_name(".ck.old")
    saved.rename(old)
    refused(saved, r"elastic\.json is missing; a save was interrupted, rename .*\.ck\.old", kind=FileNotFoundError)
    save_elastic(saved, model, "other")
    assert read_elastic(saved)["backbone"] == "other"
    assert not old.exists()


def test_savers_and_readers_of_a_checkpoint_do_not_disturb_each_other(saved):
    """Readers get the routers of one save, never the files of two."""
    models = [load_into(tiny_model(), saved) for _ in range(3)]

    def save(number):
        with torch.no_grad():
            routers(models[number])[0].head[0].bias.fill_(number)
        for _ in range(15):
            save_elastic(saved, models[number], str(number))

    save(0)
    with ThreadPoolExecutor(3) as pool:
        savers = [pool.submit(save, number) for number in range(3)]
        while not all(saver.done() for saver in savers):
            found = float(routers(load_into(tiny_model(), saved))[0].head[0].bias.detach().mean())
            assert found in (0.0, 1.0, 2.0)
        for saver in savers:
            saver.result()
    assert [p.name for p in saved.parent.iterdir()] == ["ck"]


def test_a_save_that_comes_and_goes_while_another_is_read_is_not_damage(saved, monkeypatch):
    """The folder holds what it held before, byte for byte, but the weights in between were of another save."""
    models, read, between = [load_into(tiny_model(), saved) for _ in range(2)], checkpoint._read_weights, []
    with torch.no_grad():
        routers(models[1])[0].head[0].bias.fill_(1.0)
    save_elastic(saved, models[0], "0")

    def interrupted(path, sha256):
        if between:
            return read(path, sha256)
        between.append(save_elastic(saved, models[1], "1"))
        try:
            return read(path, sha256)
        finally:
            save_elastic(saved, models[0], "0")

    monkeypatch.setattr(checkpoint, "_read_weights", interrupted)
    metadata, _ = checkpoint.read_both(saved)
    assert between and metadata["backbone"] == "0"


def test_saving_refuses_a_foreign_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    model = attach(tiny_model(), small_config())
    with pytest.raises(ValueError, match="exists but is not an Elastic Attention checkpoint; choose another folder"):
        save_elastic(tmp_path, model, "tiny")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_saving_refuses_broken_routers(tmp_path):
    model = attach(tiny_model(), small_config())
    with torch.no_grad():
        routers(model)[1].task[0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.task\.0\.weight holds NaN or infinity.*train again with lower"):
        save_elastic(tmp_path / "ck", model, "tiny")
    with pytest.raises(ValueError, match=r"is torch\.float16.*expected torch\.float32"):
        broken = attach(tiny_model(), small_config())
        routers(broken)[0].task[0].weight.data = routers(broken)[0].task[0].weight.data.half()
        save_elastic(tmp_path / "ck", broken, "tiny")
    assert not (tmp_path / "ck").exists()


def test_saving_refuses_a_stock_model(tmp_path):
    with pytest.raises(ValueError, match="this model has no routers"):
        save_elastic(tmp_path / "ck", tiny_model(), "tiny")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 4}, "with num_layers=3, but this backbone has num_layers=4"),
        ({"num_key_value_heads": 4}, "with num_kv_heads=2, but this backbone has num_kv_heads=4"),
        ({"head_dim": 32}, "with head_dim=16, but this backbone has head_dim=32"),
    ],
)
def test_another_backbone_is_refused(saved, changes, message):
    refused(saved, f"was trained on 'somewhere/tiny' {message}; load the backbone", tiny_model(**changes))


def test_a_relative_of_the_backbone_is_told(saved):
    with pytest.warns(UserWarning, match="was trained on another backbone.*vocab_size 97 there, 101 here"):
        model = load_into(tiny_model(vocab_size=101), saved)
    assert is_attached(model)


@pytest.mark.parametrize("name", [METADATA, WEIGHTS])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    refused(saved, rf"no checkpoint at .*ck: {name} is missing", kind=FileNotFoundError)


def test_a_missing_folder_is_named(tmp_path):
    refused(
        tmp_path / "none", "no checkpoint at .*none: elastic.json is missing; `elastic fit`", kind=FileNotFoundError
    )


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}'])
def test_damaged_metadata(saved, text):
    (saved / METADATA).write_text(text)
    refused(saved, r"elastic\.json is damaged \(.*\); restore the checkpoint from a copy or train again")


def test_metadata_that_is_not_text(saved):
    (saved / METADATA).write_bytes(b"\xff\xfe\x00")
    refused(saved, r"elastic\.json is damaged")


def test_a_newer_format(saved):
    edit(saved, format=2)
    refused(saved, "has format 2, this version reads format 1; update elastic-attention")


def test_an_unknown_setting(saved):
    edit(saved, config={"colour": "red"})
    refused(saved, r"elastic\.json is damaged \(unknown setting colour")


def test_a_changed_setting_is_refused_unless_the_checksum_was_taken_out(saved):
    """Checkpoints from before there was one lack it, and load."""
    file = saved / METADATA
    text = file.read_text()
    changed = text.replace('"sparsity_bias": 0.0', '"sparsity_bias": -2.0')
    assert changed != text and SEAL in json.loads(text) and SEAL not in read_elastic(saved)
    file.write_text(changed)
    refused(
        saved, r"elastic\.json is damaged \(it was changed after .*; where a change is yours, take its 'sha256' out"
    )
    file.write_text(json.dumps({key: value for key, value in json.loads(changed).items() if key != SEAL}))
    assert elastic_config(load_into(tiny_model(), saved)).sparsity_bias == -2.0


@pytest.mark.parametrize("size", [0, 7, 1000])
def test_truncated_weights(saved, size):
    (saved / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes()[:size])
    refused(saved, r"router\.safetensors is damaged: sha256 \w+, expected \w+; restore")


def test_one_flipped_bit(saved):
    data = bytearray((saved / WEIGHTS).read_bytes())
    data[-5] ^= 1
    (saved / WEIGHTS).write_bytes(data)
    refused(saved, r"router\.safetensors is damaged: sha256")


def test_a_pickle_is_never_read(saved):
    torch.save({"layers.0.mean": torch.zeros(1)}, saved / WEIGHTS)
    edit(saved, weights_sha256=file_sha256(saved / WEIGHTS))
    refused(saved, r"router\.safetensors is damaged \(.*header")


def test_a_missing_tensor(saved):
    rewrite(saved, lambda state: state.pop("layers.2.head.4.weight"))
    refused(saved, r"missing tensors layers\.2\.head\.4\.weight, unexpected tensors none")


def test_an_unexpected_tensor(saved):
    rewrite(saved, lambda state: state.update({"lm_head.weight": torch.zeros(2)}))
    refused(saved, r"missing tensors none, unexpected tensors lm_head\.weight")


def test_a_wrong_dtype(saved):
    rewrite(saved, lambda state: state.update({"layers.0.mean": state["layers.0.mean"].half()}))
    refused(saved, r"tensor layers\.0\.mean is torch\.float16 \[2, 16\], expected torch\.float32 \[2, 16\]")


def test_a_wrong_shape(saved):
    rewrite(saved, lambda state: state.update({"layers.0.var": torch.ones(3, 16)}))
    refused(saved, r"tensor layers\.0\.var is torch\.float32 \[3, 16\], expected torch\.float32 \[2, 16\]")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(saved, value):
    rewrite(saved, lambda state: state["layers.1.task.2.bias"].fill_(value))
    refused(saved, r"tensor layers\.1\.task\.2\.bias holds NaN or infinity")


def test_all_full_routes_of_a_loaded_model_equal_the_stock_model(saved):
    ids = random_ids(2, 50)
    with torch.no_grad():
        stock = tiny_model()(ids).logits
        model = load_into(tiny_model(), saved)
        with override_routes(model, 0):
            assert torch.equal(model(ids).logits, stock)
