"""Answers of an evaluation on a GPU, where decode steps replay a CUDA graph, are those without the graph."""

import pytest
import torch

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
from elastic.config import ElasticConfig, SparseConfig
from elastic.evaluation import routed_lm
from elastic.inference.decode_graph import can_graph
from elastic.model.attach import attach, routers
from tests.evaluation.test_routed_lm import generated, letters
from tests.helpers.models import tiny_model, varied_routers
from tests.kernels.gpu import needs_gpu

pytestmark = [pytest.mark.gpu, needs_gpu]
SPARSE = SparseConfig(sink=64, window=128, block=64)


@pytest.mark.parametrize("way", ["dense", "streaming", "some heads", "routers", "xattention"])
def test_answers_of_replayed_steps_are_those_of_single_ones(way, monkeypatch):
    model = tiny_model(hidden_size=512, head_dim=128, initializer_range=0.1, eos_token_id=None).to(torch.float16)
    attach(model, ElasticConfig(sparse=SPARSE)).eval()
    varied_routers(model)
    model, tokenizer = model.to("cuda"), letters()
    assert can_graph(model, model.config.head_dim)
    shape = (len(routers(model)), routers(model)[0].kv_heads)
    some = (torch.arange(shape[0] * shape[1]).view(shape) % 2).float()
    route = {"dense": 0, "streaming": 1, "some heads": some, "routers": None, "xattention": 1}[way]
    sparse = SparseConfig(sink=64, window=128, block=64, route1="xattention") if way == "xattention" else SPARSE
    texts = [" ".join(f"f{i % 7 + n}" for i in range(20 * n + 5)) for n in range(1, 7)]
    options, found, replayed = {"until": [], "max_gen_toks": 24}, [], []
    graphed = routed_lm.graphed
    monkeypatch.setattr(routed_lm, "graphed", lambda *given: replayed.append(1) or graphed(*given))
    for graph in (True, False):
        monkeypatch.setattr(routed_lm, "can_graph", lambda *_, graph=graph: graph)
        lm = routed_lm.RoutedLM(model, tokenizer, route, batch_size=4, sparse=sparse)
        found.append((generated(lm, texts, options), [lm.prefill_stats[text].msr for text in texts]))
    assert len(replayed) == 2  # batches
    assert found[0][1] == found[1][1]
    same = sum(one == two for one, two in zip(found[0][0], found[1][0], strict=True))
    assert same >= 5 and any(found[0][0])  # sums of another order may part two equally likely tokens
