"""ElasticModule: what is trained, what is logged, evaluation, checkpoints and refusals."""

import copy
import hashlib
import itertools
import warnings
from dataclasses import replace

import pytest
import torch

from elastic.data.packing import collate
from elastic.data.tasks import TASKS, task_index
from elastic.model.attach import override_routes, routers
from elastic.model.checkpoint import is_trainable
from elastic.training.config import OptimiserConfig, TemperatureConfig
from elastic.training.metrics import score_answers
from elastic.training.module import ElasticModule
from tests.helpers.training import SMALL, build_data, router_tensors, small_run

QUICK = OptimiserConfig(lr=1e-2, multiplier_lr=0.5)
FIRST = "model.model.layers.0.self_attn.router.count"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    return small_run(data, tmp_path_factory.mktemp("run"), steps=3, optimiser=QUICK)


def frozen_hash(module: ElasticModule) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if not is_trainable(name):
            digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def test_steps_move_routers_raise_multipliers_and_leave_the_backbone(data, tmp_path, trained):
    untouched, *_ = small_run(data, tmp_path, fit=False)
    untouched.configure_model()
    module, *_ = trained
    assert frozen_hash(module) == frozen_hash(untouched)
    for router in routers(module.model):
        assert router.head[-1].weight.abs().max() > 0  # starts at zero
        assert router.count > 0 and not torch.equal(router.mean, torch.zeros_like(router.mean))
    prices, below = module.multipliers.by_class(), task_index("in_context")
    assert prices["u/in_context"] == 0 < prices["v/in_context"] and module.multipliers.l2[below] > 0  # 1.0 is far
    assert all(prices[f"{name}/{absent}"] == 0 for name in ("u", "v", "l2") for absent in ("code", "span"))


def test_optimisers_hold_exactly_the_routers_and_the_multipliers(trained):
    module, *_ = trained
    names = {id(p): name for name, p in module.named_parameters()}
    descent, ascent = module.configure_optimizers()
    held = [[names[id(p)] for group in o.param_groups for p in group["params"]] for o in (descent, ascent)]
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    assert set(held[0]) | set(held[1]) == trainable == {n for n in names.values() if is_trainable(n)}
    assert sorted(held[1]) == ["multipliers.l2", "multipliers.u", "multipliers.v"]
    assert len(held[0]) == len(set(held[0])) == 10 * len(routers(module.model))
    decayed, plain = descent.param_groups
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    assert all(p.dim() == 1 for p in plain["params"]) and all(p.dim() == 2 for p in decayed["params"])
    assert ascent.param_groups[0]["maximize"] and ascent.param_groups[0]["weight_decay"] == 0


def test_one_batch_is_one_step(trained):
    module, _, trainer = trained
    assert trainer.global_step == module.total_steps == 3


def test_logged_names(trained):
    names = set(trained[2].callback_metrics)
    expected = {"loss", "regulariser", "router_entropy", "gradient_norm", "temperature", "lr", "multiplier_lr"}
    expected |= {"step_seconds", "tokens_per_second"} | {f"{x}/{t}" for x in ("u", "v", "l2") for t in (*TASKS, "span")}
    assert {f"train/{name}" for name in expected} | {"step"} <= names
    assert any(name.startswith("train/msr/") for name in names) and any(n.startswith("train/esr/") for n in names)


def test_same_seed_gives_bit_equal_routers_and_another_seed_does_not(data, tmp_path, trained):
    first = router_tensors(trained[0])
    again = router_tensors(small_run(data, tmp_path, steps=3, optimiser=QUICK)[0])
    other = router_tensors(small_run(data, tmp_path, steps=3, optimiser=QUICK, seed=1)[0])
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_gradient_checkpointing_changes_nothing(data, tmp_path, trained):
    plain = router_tensors(trained[0])
    saving = router_tensors(small_run(data, tmp_path, steps=3, optimiser=QUICK, gradient_checkpointing=True)[0])
    assert all(torch.equal(plain[name], saving[name]) for name in plain)


def test_statistics_freeze_after_the_warm_up(data, tmp_path):
    counts = []
    for steps in (5, 10):
        module, *_ = small_run(data, tmp_path, steps=steps, rows_per_step=1)
        counts.append(float(routers(module.model)[0].count))
    assert counts[1] > counts[0] > 0
    assert counts[1] < 10 * counts[0] / 2  # two of ten steps gather, not all


def test_evaluation_scores_dense_and_routed_in_one_pass(trained):
    module, loader, trainer = trained
    trainer.test(module, loader, verbose=False)
    assert set(module.results) == {"single_qa", "in_context"}
    for task, row in module.results.items():
        assert set(row) == {*module.columns, *(f"{name}_95" for name in module.columns), "n"} and row["n"] == 8
        assert module.route_maps[task].shape == (3, 2)
        assert row["msr"] == pytest.approx(float(module.route_maps[task].mean()), abs=1e-6)
        assert f"test/elastic_exact/{task}" in trainer.callback_metrics
    assert module.results["single_qa"]["dense_exact"] > 0.9  # the shipped backbone finds its needles


def test_only_what_was_gathered_is_computed(data, tmp_path, trained):
    """Without a warning of the metrics: XAttention's density where a method has such heads."""
    elastic = replace(SMALL, sparse=replace(SMALL.sparse, stride=4))
    methods = ["dense", "elastic", "xattention:0.5"]
    module, loader, trainer = small_run(data, tmp_path, fit=False, elastic=elastic, methods=methods)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*`compute` method of metric")
        trained[2].test(*trained[:2], verbose=False)
        trainer.test(module, loader, verbose=False)
    assert trained[0].densities == {} and module.densities.keys() == {"xattention:0.5"}
    assert len(module.densities["xattention:0.5"]) == 3 and all(0 < x <= 1 for x in module.densities["xattention:0.5"])


def test_scores_equal_a_plain_computation(trained, data):
    from elastic.data.shards import open_corpus

    module, *_ = trained
    module.eval()
    batch = collate(list(open_corpus(data, "test", "single_qa"))[:2])
    with torch.no_grad(), override_routes(module.model, 0):
        hidden = module.hidden_states(batch)
        head = module.model.get_output_embeddings()
        scores = score_answers(hidden, head, batch["labels"], batch["cu_seq_lens"], 3).scores
        logits = head(hidden)[0, :-1]
    bounds, labels = batch["cu_seq_lens"].tolist(), batch["labels"][0]
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        answer = [i for i in range(begin + 1, end) if labels[i] != -100]
        picked = logits[[i - 1 for i in answer]]
        expected = torch.nn.functional.cross_entropy(picked, labels[answer])
        torch.testing.assert_close(scores["loss"][n], expected, atol=1e-5, rtol=1e-5)
        assert scores["accuracy"][n] == (picked.argmax(-1) == labels[answer]).float().mean()
    module.train()


def test_a_sample_without_an_answer_is_refused():
    labels = torch.tensor([[-100, 3, -100, -100]])
    with pytest.raises(ValueError, match="a sample has no labelled token"):
        score_answers(torch.randn(1, 4, 2), torch.nn.Linear(2, 5), labels, torch.tensor([0, 2, 4]), 8)


def test_predictions_name_task_route_and_answer(trained):
    module, loader, trainer = trained
    sample = trainer.predict(module, loader)[0][0]
    assert sample["task"] in TASKS and 0 <= sample["msr"] <= 1 and sample["answer"]
    assert len(sample["route"]) == 3 and all(len(row) == 2 for row in sample["route"])


def test_checkpoints_hold_only_what_is_trained(trained, tmp_path):
    module, _, trainer = trained
    checkpoint = trainer._checkpoint_connector.dump_checkpoint()
    keys = set(checkpoint["state_dict"])
    assert keys == {name for name in module.state_dict() if is_trainable(name)}
    assert len(keys) == 3 * (10 + 3) + 3  # per layer: five linear layers and three statistics; three multipliers
    assert len(checkpoint["optimizer_states"]) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["state_dict"].pop(FIRST), f"missing tensors {FIRST}, unexpected tensors none"),
        (lambda c: c["state_dict"].update(stray=0), "missing tensors none, unexpected tensors stray"),
        (lambda c: c.pop("elastic"), "not written by `elastic fit`"),
        (lambda c: c["elastic"].update(architecture="other"), "trained with architecture other, this run has"),
        # written before there was a choice: its routers looked at whole prompts, which this run's do not
        (lambda c: c["elastic"]["router"].pop("pool_over"), r"trained with router .*'prompt'.*, this run has .*'user'"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(trained, change, message):
    module, _, trainer = trained
    checkpoint = trainer._checkpoint_connector.dump_checkpoint()
    change(checkpoint)
    with pytest.raises(ValueError, match=message):
        module.on_load_checkpoint(checkpoint)


def test_a_resumed_run_must_have_the_same_settings(data, tmp_path, trained):
    trained[2].save_checkpoint(tmp_path / "a.ckpt")
    module, loader, trainer = small_run(data, tmp_path, steps=4, seed=5, fit=False, optimiser=QUICK)
    with pytest.raises(ValueError, match="trained with seed 0, this run has 5; use the settings"):
        trainer.fit(module, loader, ckpt_path=str(tmp_path / "a.ckpt"))


def test_a_loss_that_is_not_finite_names_step_and_task(data, tmp_path):
    module, loader, trainer = small_run(data, tmp_path, fit=False)
    module.configure_model()
    with torch.no_grad():
        module.model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(
        FloatingPointError, match=r"the objective is nan at step 0 on (single|in_c).*lower optimiser.lr"
    ):
        trainer.fit(module, loader)


def test_a_gradient_that_is_not_finite_names_step_and_task(data, tmp_path):
    class Broken(ElasticModule):
        def manual_backward(self, loss, *args, **kwargs):
            super().manual_backward(loss, *args, **kwargs)
            routers(self.model)[0].head[-1].bias.grad.fill_(float("inf"))

    _, loader, trainer = small_run(data, tmp_path, fit=False)
    with pytest.raises(FloatingPointError, match=r"gradient norm is (inf|nan) at step 0 on .*; lower optimiser.lr"):
        trainer.fit(Broken(elastic=SMALL), loader)


def test_heads_first_leaves_the_shared_router_as_it_is(data, tmp_path):
    elastic = replace(SMALL, router=replace(SMALL.router, head_offset=True))
    module, loader, trainer = small_run(data, tmp_path, fit=False)
    module = ElasticModule(elastic=elastic, optimiser=OptimiserConfig(heads_first=0.99))
    before = {}
    module.on_train_start = lambda: before.update(copy.deepcopy(routers(module.model)[0].state_dict()))
    trainer.fit(module, loader)
    router = routers(module.model)[0]
    changed = {name for name, value in router.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"offset", "mean", "var", "count"}
    trainer = small_run(data, tmp_path / "other", fit=False)[2]
    with pytest.raises(ValueError, match=r"heads_first=0\.5 trains nothing at first"):
        trainer.fit(ElasticModule(elastic=SMALL, optimiser=OptimiserConfig(heads_first=0.5)), loader)


def test_tasks_share_a_target_only_while_routes_are_alike(data, tmp_path):
    _, loader, trainer = small_run(data, tmp_path, steps=4, fit=False)
    elastic = replace(SMALL, router=replace(SMALL.router, head_offset=True))
    module, seen = ElasticModule(elastic=elastic, optimiser=OptimiserConfig(heads_first=0.5, multiplier_lr=0.1)), {}
    judge = module.objective.judge

    def watched(routed):
        rates = [optimiser.optimizer.param_groups[0]["lr"] for optimiser in module.optimizers()]
        moved = {name for name, value in module.multipliers.by_class().items() if value != 0}
        seen[module.global_step] = (routed.shared_target, *(rate > 0 for rate in rates), moved)
        return judge(routed)

    module.objective.judge = watched
    trainer.fit(module, loader)
    span = {"v/span", "l2/span"}  # MSR begins at a half, below the lower bound of 0.7
    # whether all share a target; whether the shared router and the multipliers move; which of these have moved before
    assert seen.pop(3)[3] - span == {"v/single_qa", "l2/single_qa"}  # the task of step 2's rows
    assert seen == {0: (True, False, True, set()), 1: (True, False, True, span), 2: (False, True, True, span)}


def test_prices_are_of_the_means_over_a_whole_step(data, tmp_path):
    """A step of four micro-batches, and the samples that each is told are its share."""
    _, loader, trainer = small_run(data, tmp_path, steps=1, rows_per_step=4, fit=False)
    module, seen = ElasticModule(elastic=SMALL, optimiser=QUICK), []
    judge = module.objective.judge
    module.objective.judge = lambda routed: (seen.append(routed), judge(routed))[1]
    trainer.fit(module, loader)
    count = sum(torch.bincount(routed.batch["task_id"], minlength=len(TASKS)) for routed in seen)
    assert len(seen) == 4 and all(torch.equal(routed.samples_T, count / 4) for routed in seen)
    task, ratio = (torch.cat(parts) for parts in ([r.batch["task_id"] for r in seen], [r.msr_N.detach() for r in seen]))
    for name in ("single_qa", "in_context"):
        below = module.objective.intervals[task_index(name)][0] - ratio[task == task_index(name)].mean()
        rate = module.optimizers()[1].param_groups[0]["lr"]
        assert module.multipliers.by_class()[f"v/{name}"] == pytest.approx(float(rate * below), rel=1e-4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ElasticModule(loss_chunk=0), "loss_chunk=0 is below 1"),
        (lambda: ElasticModule(dtype="int8"), "dtype='int8' is not supported; use one of float32"),
        (lambda: ElasticModule(targets={"needle": 1.0}), "unknown task 'needle'"),
        (lambda: OptimiserConfig(lr=0.0), "optimiser.lr=0.0 is not positive; the default is 0.0005"),
        (lambda: OptimiserConfig(clip_norm=float("nan")), "optimiser.clip_norm=nan is not a finite number"),
        (lambda: OptimiserConfig(betas=(0.9, 1.0)), "is not a pair of numbers in \\[0, 1\\)"),
        (lambda: OptimiserConfig(weight_decay=-1), "weight_decay=-1 is below 0; 0 switches it off"),
        (lambda: OptimiserConfig(warmup=1.0), "optimiser.warmup=1.0 is not in \\(0, 1\\)"),
        (lambda: OptimiserConfig(heads_first=1.0), "optimiser.heads_first=1.0 is not in \\[0, 1\\)"),
        (lambda: TemperatureConfig(initial=0.1, final=0.3), "expected 0 < final <= initial"),
        (lambda: TemperatureConfig(reached=0), "temperature.reached=0 is not in \\(0, 1\\]"),
    ],
)
def test_bad_settings_are_refused_at_construction(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_data_for_another_backbone_is_refused_before_training(data, tmp_path):
    module, loader, trainer = small_run(data, tmp_path, fit=False)
    loader.setup("fit")
    loader.manifest["tokenizer"] = {"name": "other", "sha256": "0"}
    with pytest.raises(ValueError, match="packed with the tokenizer of 'other', which is not that of backbone 'tiny'"):
        trainer.fit(module, loader)
    module, loader, trainer = small_run(data, tmp_path, fit=False)
    loader.setup("fit")
    loader.manifest["seq_length"] = 1 << 20
    for entry in loader.manifest["splits"]["train"].values():
        entry["longest"] = 1 << 20
    with pytest.raises(ValueError, match="packed samples have up to 1048576 tokens but backbone 'tiny' reads at most"):
        trainer.fit(module, loader)
