"""A model in two parts by transformers' `tp_plan` answers as the whole one: routers follow their KV heads, every
process has the cache of its own, and reports are of all heads.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import elastic
from elastic.config import RouterConfig
from elastic.inference.generate import new_cache
from elastic.model.attach import attach, handle_of, override_routes, routers
from elastic.model.checkpoint import load_into, save_elastic
from elastic.model.loading import load_backbone, load_tokenizer
from elastic.model.ordered_routers import begin_in_order, place_in_order
from elastic.model.tensor_parallel import HeadShare, check_routers, head_share
from elastic.routing.kinds import build_router
from tests.helpers.forked import forked_ranks, say_to
from tests.helpers.models import small_config, tiny_model, varied_routers

PROMPTS = ["the red box holds 4 keys and nothing else", "who has the blue box now?"]


def find(folder: Path) -> None:
    """What each of the two processes finds, and one process of the whole model."""
    say_to(folder / "log")
    several = os.environ["WORLD_SIZE"] != "1"
    plan = {"tp_plan": "auto"} if several else {}
    model = AutoModelForCausalLM.from_pretrained(
        folder / "backbone", attn_implementation="sdpa", dtype=torch.float32, **plan
    )
    load_into(model, folder / "checkpoint").eval()
    tokenizer, found = load_tokenizer("tiny"), {}
    for kind in ("full", "elastic"):
        answers = elastic.generate(model, tokenizer, PROMPTS, 12, kv_cache=kind, chat_template=False)
        found[kind] = [{"tokens": answer.token_ids, "report": answer.report.to_dict()} for answer in answers]
    ids = torch.arange(90)[None] % (model.config.vocab_size - 4) + 4
    with torch.no_grad():
        logits = model(ids).logits[0, -1]
        pattern = torch.zeros(len(routers(model)), model.config.num_key_value_heads)
        pattern[:, 1] = 1
        with override_routes(model, pattern):
            given = model(ids).logits[0, -1]
            cache = new_cache(model, 4, "elastic")
            model(ids, past_key_values=cache)
    found["logits"], found["given"], found["bytes"] = logits.tolist(), given.tolist(), cache.sample_bytes()
    found["kv_heads"] = routers(model)[0].kv_heads
    (folder / f"found.{os.environ['RANK'] if several else 'whole'}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module", params=["tiny", "llama"])
def found(request, tmp_path_factory) -> dict[str, dict]:
    """What the whole model and both of its parts find."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "tiny":
        model, _ = load_backbone("tiny")
    else:
        vocabulary = load_backbone("tiny")[0].config.vocab_size
        model = tiny_model("llama", num_key_value_heads=4, num_attention_heads=8, vocab_size=vocabulary)
    model.save_pretrained(folder / "backbone")
    torch.manual_seed(0)  # of routers that send some heads either way
    attach(model, small_config())
    varied_routers(model)
    save_elastic(folder / "checkpoint", model, str(folder / "backbone"))
    for processes in (1, 2):
        codes = forked_ranks(processes, find, folder, CUDA_VISIBLE_DEVICES="")
        assert codes == [0] * processes, (folder / "log").read_text()[-3000:]
    return {name: json.loads(Path(folder / f"found.{name}.json").read_text()) for name in ("whole", "0", "1")}


def test_two_parts_answer_as_the_whole(found):
    whole, parts = found["whole"], (found["0"], found["1"])
    for part in parts:
        assert part["kv_heads"] == whole["kv_heads"] // 2
        for kind in ("full", "elastic"):
            for mine, theirs in zip(part[kind], whole[kind], strict=True):
                assert mine == theirs  # tokens; routes, ratios and bytes of all heads
        for name in ("logits", "given"):
            torch.testing.assert_close(torch.tensor(part[name]), torch.tensor(whole[name]), rtol=1e-4, atol=1e-5)
    routes = {head for answer in whole["full"] for layer in answer["report"]["route"] for head in layer}
    assert routes == {0, 1}
    assert not torch.allclose(torch.tensor(whole["logits"]), torch.tensor(whole["given"]), atol=1e-3)


def test_each_process_has_the_cache_of_its_heads(found):
    """Given the same pattern in all layers, the heads that stream are known."""
    whole, one, two = (found[name] for name in ("whole", "0", "1"))
    assert [a + b for a, b in zip(one["bytes"], two["bytes"], strict=True)] == whole["bytes"]
    streams, keeps = (two, one) if whole["kv_heads"] == 2 else (one, two)  # whose head 1 is, which streams
    assert streams["bytes"] < keeps["bytes"]


def test_what_cannot_be_cut_is_refused():
    model = tiny_model("llama", num_key_value_heads=2)
    model._tp_size = 4
    with pytest.raises(ValueError, match="2 KV heads cannot be cut into 4 parts"):
        attach(model, small_config())
    model._tp_size = 2
    with pytest.raises(ValueError, match="nothing says which of them is here"):
        attach(model, small_config())
    olmo = tiny_model("olmo2", num_key_value_heads=2)
    olmo._tp_size = 2
    with pytest.raises(ValueError, match="norms the keys of all heads together"):
        attach(olmo, small_config())
    for family in ("phi3", "gemma3_text", "gpt_oss"):
        model = tiny_model(family, num_key_value_heads=2)
        model._tp_size = 2
        with pytest.raises(ValueError, match=f"{family} model was cut.*routed in whole models only"):
            attach(model, small_config())


def test_training_and_saving_of_a_part_are_refused(tmp_path):
    """The pass is refused before anything of the part runs, so a whole model that is said to be one will do."""
    model = attach(tiny_model(), small_config())
    handle = handle_of(model)
    handle.state.parts, handle.share = 2, HeadShare(2, 0)
    with pytest.raises(ValueError, match=r"cut into 2 parts by tensor parallelism.*train with FSDP2"):
        model.train()(torch.ones(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="this process has the routers of some heads alone"):
        save_elastic(tmp_path / "checkpoint", model, "tiny")


def test_routers_that_need_all_heads_are_refused():
    level = attach(tiny_model(), replace(small_config(), router=RouterConfig(kind="level")))
    with pytest.raises(ValueError, match="of which tensor parallelism leaves each process some"):
        check_routers(routers(level), HeadShare(2, 0))


def test_an_order_is_dealt_out_with_the_heads():
    whole = attach(tiny_model(), replace(small_config(), router=RouterConfig(kind="static")))
    order = [5, 0, 3, 1, 4, 2]
    begin_in_order(whole, order, 0.5)
    for place in (0, 1):
        part = [build_router(1, 16, RouterConfig(kind="static"), layer) for layer in range(3)]
        place_in_order(part, order, 0.5, HeadShare(2, place))
        for mine, all_heads in zip(part, routers(whole), strict=True):
            assert torch.equal(mine.logits, all_heads.logits[place : place + 1])


def test_a_share_of_the_heads():
    share = HeadShare(2, 1)
    state = {"mean": torch.arange(8.0).view(4, 2), "task.0.weight": torch.ones(4, 4), "count": torch.tensor(3.0)}
    cut = share.state(state)
    assert torch.equal(cut["mean"], state["mean"][2:]) and cut["task.0.weight"] is state["task.0.weight"]
    assert HeadShare().mine(4) == slice(0, 4) and torch.equal(HeadShare().whole(state["mean"]), state["mean"])
    model = tiny_model()
    assert head_share(model, [layer.self_attn for layer in model.model.layers]) == HeadShare()
