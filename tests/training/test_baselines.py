"""What elastic routing is measured against: a learned static pattern, random heads, all heads streaming."""

import json

import pytest
import torch
from safetensors.torch import load_file

from elastic import cli
from elastic.config import ElasticConfig, RouterConfig
from elastic.data.datamodule import MixtureSampler
from elastic.files import unsealed
from elastic.model.attach import attach, last_routes, override_routes, routers
from elastic.model.checkpoint import WEIGHTS, load_into, save_elastic
from elastic.routing.fixed_routes import drawn
from elastic.routing.kinds import build_router
from elastic.routing.router import StaticRouter
from elastic.training.config import OptimiserConfig
from elastic.training.multipliers import LagrangeMultipliers
from tests.helpers.models import KV_HEADS, LAYERS, random_ids, small_config, tiny_model
from tests.helpers.training import ROOT, SMALL, build_data, small_run
from tests.kernels.gpu import needs_gpu

STATIC = ElasticConfig(RouterConfig(kind="static"), SMALL.sparse)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_data(tmp_path_factory.mktemp("data"))


def static_model(seed: int = 3):
    """An attached model whose static pattern differs between heads."""
    model = attach(tiny_model(), ElasticConfig(RouterConfig(kind="static"), small_config().sparse))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for router in routers(model):
            router.logits.copy_(torch.randn(KV_HEADS, 2, generator=generator))
    return model


def test_a_static_router_has_two_logits_per_head_and_ignores_its_input():
    router = build_router(4, 16, RouterConfig(kind="static"))
    assert isinstance(router, StaticRouter)
    assert {name: value.shape for name, value in router.state_dict().items()} == {"logits": (4, 2)}
    with torch.no_grad():
        router.logits.copy_(torch.randn(4, 2))
    one, two = router(torch.randn(3, 4, 16)), router(torch.randn(3, 4, 16))
    assert torch.equal(one, two) and torch.equal(one[0], one[2]) and one.shape == (3, 4, 2)
    one.sum().backward()
    assert torch.equal(router.logits.grad, torch.full((4, 2), 3.0))


def test_static_decisions_are_the_same_for_every_sample_and_obey_the_bias():
    model = static_model()
    with torch.no_grad():
        model(random_ids(3, 40))
    route = last_routes(model).route
    expected = torch.stack([(router.logits[:, 1] > router.logits[:, 0]).float() for router in routers(model)])
    assert torch.equal(route, expected[:, None].expand(-1, 3, -1))
    assert set(expected.unique().tolist()) == {0.0, 1.0}


def test_a_static_pattern_trains_saves_and_loads_like_a_router(data, tmp_path):
    quick = OptimiserConfig(lr=0.1, weight_decay=0.0, multiplier_lr=0.5)
    module, _, trainer = small_run(data, tmp_path, 3, elastic=STATIC, optimiser=quick)
    assert all(router.logits.abs().max() > 0 for router in routers(module.model))
    assert set(trainer._checkpoint_connector.dump_checkpoint()["state_dict"]) == {
        *(f"model.model.layers.{layer}.self_attn.router.logits" for layer in range(3)),
        *(f"multipliers.{name}" for name in ("u", "v", "l2")),
    }
    again, *_ = small_run(data, tmp_path, 3, elastic=STATIC, optimiser=quick)
    for one, two in zip(routers(module.model), routers(again.model), strict=True):
        assert torch.equal(one.logits, two.logits)


def test_a_static_checkpoint_round_trips_and_is_refused_as_an_input_router(tmp_path):
    model = static_model()
    save_elastic(tmp_path / "ck", model, "tiny", LagrangeMultipliers())
    assert set(load_file(tmp_path / "ck" / WEIGHTS)) == {
        *(f"layers.{layer}.logits" for layer in range(LAYERS)),
        *(f"multipliers.{name}" for name in ("u", "v", "l2")),
    }
    again = load_into(tiny_model(), tmp_path / "ck")
    ids = random_ids(2, 40)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    metadata = unsealed((tmp_path / "ck" / "elastic.json").read_text())
    metadata["config"]["router"]["kind"] = "input"
    (tmp_path / "ck" / "elastic.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match=r"missing tensors layers\.0\..*unexpected tensors layers\.0\.logits"):
        load_into(tiny_model(), tmp_path / "ck")


def test_level_routers_train_too(data, tmp_path):
    """Their features are more from layer to layer."""
    levels = ElasticConfig(RouterConfig(kind="level"), SMALL.sparse)
    module, _, _ = small_run(data, tmp_path, elastic=levels, optimiser=OptimiserConfig(warmup=0.9), rows_per_step=4)
    for router in routers(module.model):
        assert router.count > 4 and router.scale.shape == router.weight.shape
        assert router.weight.abs().max() > 0 and router.mean.abs().max() > 0


def test_one_test_command_reports_every_method(data, tmp_path, capsys):
    root, names = tmp_path / "run", ["dense", "elastic", "elastic@-50", "elastic@50", "streaming", "random:0.5"]
    (tmp_path / "heads.tsv").write_text("1 0\n0 0\n1 1\n")
    names.append(f"static:{tmp_path / 'heads.tsv'}")
    files = [word for name in ("debug.yaml", "router/static.yaml") for word in ("-c", str(ROOT / "configs" / name))]
    flags = [f"--data.data_dir={data}", f"--trainer.default_root_dir={root}", "--trainer.enable_progress_bar=false"]
    assert cli.main(["fit", *files, *flags, "--trainer.max_steps=2"]) == 0
    capsys.readouterr()
    methods = f"--model.methods=[{', '.join(names)}]"
    assert cli.main(["test", *files, *flags, "--trainer.limit_test_batches=1.0", methods, "--ckpt_path=last"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name} exact" in printed for name in names)
    results = json.loads((root / "results_test.json").read_text())
    assert results["methods"] == names and results["elastic"]["router"]["kind"] == "static"
    for row in results["tasks"].values():
        assert row["streaming_msr"] == 1 and row["random:0.5_msr"] == 0.5  # of six KV heads
        assert row[f"{names[-1]}_msr"] == 0.5 and row[f"{names[-1]}_loss"] != row["random:0.5_loss"]
        assert (row["elastic@-50_msr"], row["elastic@50_msr"]) == (0, 1)  # the ends of its operating points
        assert row["elastic@-50_loss"] == row["dense_loss"] and row["elastic@50_loss"] == row["streaming_loss"]
        assert row["streaming_esr_all"] > row["random:0.5_esr_all"] > 0
    needles = results["tasks"]["single_qa"]
    assert needles["dense_exact"] > needles["streaming_exact"]


def test_routes_are_drawn_alike_where_another_device_is_the_default():
    """Lightning builds models with the GPU as torch's default device."""
    sampler = MixtureSampler([12, 20], [1.0, 1.0], 2, 0)
    usual = sampler.order()
    with torch.device("meta"):
        assert sampler.order() == usual
        assert drawn(3, 2, 0.5, 2).shape == (3, 2)


@pytest.mark.gpu
@needs_gpu
def test_every_method_is_evaluated_on_a_gpu(data, tmp_path):
    words = ["-c", str(ROOT / "configs" / "debug.yaml"), f"--data.data_dir={data}", "--trainer.accelerator=gpu"]
    words += [f"--trainer.default_root_dir={tmp_path}", "--trainer.limit_test_batches=1.0"]
    (tmp_path / "heads.tsv").write_text("1 0\n0 0\n1 1\n")
    names = ["dense", "elastic", "streaming", "random:0.5", f"static:{tmp_path / 'heads.tsv'}"]
    assert cli.main(["test", *words, f"--model.methods=[{', '.join(names)}]"]) == 0
    found = json.loads((tmp_path / "results_test.json").read_text())["tasks"]
    assert all(row["random:0.5_msr"] == 0.5 for row in found.values())


def test_a_baseline_equals_its_override(data, tmp_path):
    from elastic.data.packing import collate
    from elastic.data.shards import open_corpus

    module, loader, trainer = small_run(data, tmp_path, fit=False, methods=["random:0.5:2", "elastic"])
    trainer.test(module, loader, verbose=False)
    batches = [collate([row]) for row in open_corpus(data, "test", "single_qa")]
    with torch.no_grad(), override_routes(module.model, module.methods[0].routes(3, 2)):
        losses = torch.cat([module._answers(batch).scores["loss"] for batch in batches])
    assert module.results["single_qa"]["random:0.5:2_loss"] == pytest.approx(float(losses.double().mean()), rel=1e-6)
    assert module.results["single_qa"]["msr"] == 0  # undecided routers keep every head full
