"""`elastic bench router`: what routing one layer costs at prefill, from the layer's hidden states to the head plan.

`fused` is what inference runs: gather the prompt's boundaries, project them to keys, one launch for pooling, features,
MLPs, decision and modes. `torch` is its slow twin. `fused-keys` and `torch-keys` begin where the keys are at hand: the
part that the budget of docs/design.md section 3 counts. `reach` and `reach-torch` are the feature that looks at all
keys, which `elastic.bench.reach` times. Device times are those of calls in a CUDA graph, over the
routers of several layers in turn, so that no weight waits in the cache; host times are the launch path alone.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elastic.attention.head_plan import HeadPlan
from elastic.attention.layout import Layout, batch_layout
from elastic.bench import reach, records, tables
from elastic.bench.cases import DTYPES
from elastic.bench.options import add_record_options, kernel_device
from elastic.bench.race import DISAGREED
from elastic.bench.records import LEFT_OUT, Measurement
from elastic.bench.replay import in_turn, replayed
from elastic.bench.timing import host_microseconds
from elastic.config import ElasticConfig
from elastic.console import say
from elastic.kernels import unsupported_reason
from elastic.model.families import RoutedAttention, prerope_keys
from elastic.model.layer_hooks import route_layer
from elastic.model.pass_state import ForwardPass
from elastic.routing.decision import decide_from_keys
from elastic.routing.pooling import Pooling
from elastic.routing.router import AttentionRouter, Decision, Router

SUMMARY = "routing one layer at prefill: fused kernel beside PyTorch, from 512 to 1M tokens"
LENGTHS = (512, 8192, 131_072, 1_048_576)
LAYERS = 32  # routers that take turns
SURE = 1e-3  # logits closer than this may be decided either way


@dataclass(frozen=True)
class RouteCase:
    """One line of the table: a prompt of `length` tokens for each of `batch` samples."""

    length: int
    batch: int
    hidden: int
    kv_heads: int
    head_dim: int
    dtype: str

    @property
    def name(self) -> str:
        """As the table calls it: route-512, route-128k-b8."""
        size = f"{self.length // 1024}k" if self.length % 1024 == 0 else str(self.length)
        return f"route-{size}" + (f"-b{self.batch}" if self.batch > 1 else "")

    def properties(self) -> Measurement:
        """What a record says about its case."""
        shape = {"batch": self.batch, "hidden": self.hidden, "kv_heads": self.kv_heads, "head_dim": self.head_dim}
        return {"length": self.length, **shape, "dtype": self.dtype}


@dataclass(eq=False)
class _Attention:
    k_proj: nn.Linear
    head_dim: int
    router: Router
    layer_idx: int


def layers_of(case: RouteCase, config: ElasticConfig, device: str) -> list[RoutedAttention]:
    """What routing reads of attention modules: a key projection and a router with random weights and statistics."""
    torch.manual_seed(0)
    made: list[RoutedAttention] = []
    for index in range(LAYERS):
        with torch.device(device):
            project = nn.Linear(case.hidden, case.kv_heads * case.head_dim, bias=False, dtype=DTYPES[case.dtype])
            router = AttentionRouter(case.kv_heads, case.head_dim, config.router).eval()
            nn.init.normal_(router.head[-1].weight, std=0.05)  # type: ignore[arg-type]
            router.update_statistics(0.2 * torch.randn(64, case.kv_heads, case.head_dim))
        attn = _Attention(k_proj=project, head_dim=case.head_dim, router=router, layer_idx=index)
        made.append(attn)
    return made


def plan_of(decision: Decision, of_pass: ForwardPass) -> HeadPlan:
    """The head plan as the layer's hook builds it."""
    return HeadPlan.build(decision.route_NK, of_pass.config.sparse, of_pass.layout, mode_NK=decision.mode_NK)


def whole(layers: list[RoutedAttention], hidden: Tensor, of_pass: ForwardPass) -> list[Callable[[], HeadPlan]]:
    """Per layer: route and plan from the hidden states."""
    return [lambda attn=attn: plan_of(route_layer(attn, hidden, of_pass), of_pass) for attn in layers]  # type: ignore[misc]


def from_keys(layers: list[RoutedAttention], hidden: Tensor, of_pass: ForwardPass) -> list[Callable[[], HeadPlan]]:
    """Per layer: route and plan from keys that are gathered and projected already."""
    config, row_slice = of_pass.config, of_pass.row_slice
    pooling = Pooling.shared(of_pass.layout, config.router, hidden.shape[1], row_slice)
    pooled = hidden.flatten(0, 1).index_select(0, pooling.token_M).unflatten(0, pooling.weight_N2P.shape)
    keys = [prerope_keys(attn, pooled) for attn in layers]

    def call(attn: RoutedAttention, key: Tensor) -> HeadPlan:
        decision, _ = decide_from_keys(
            attn.router, key, pooling, config, None, row_slice=row_slice, fused=of_pass.fused
        )
        return plan_of(decision, of_pass)

    return [lambda attn=attn, key=key: call(attn, key) for attn, key in zip(layers, keys, strict=True)]  # type: ignore[misc]


def launches(call: Callable[[], Any]) -> int:
    """Kernels and copies that a call puts on the device."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profile.events())


def disagreement(layers: list[RoutedAttention], hidden: Tensor, layout: Layout, config: ElasticConfig) -> str | None:
    """Where kernel and PyTorch decide differently although the logits are apart; None: nowhere."""
    for attn in layers:
        passes = [ForwardPass(layout, config, fused=fused) for fused in (True, False)]
        fused, torch_only = (route_layer(attn, hidden, of_pass) for of_pass in passes)
        mode, wanted = (plan_of(*pair).mode_NK for pair in zip((fused, torch_only), passes, strict=True))
        logits = torch_only.logits_NK2
        assert logits is not None
        sure = (logits[..., 1] - logits[..., 0]).abs() > SURE
        if not torch.equal(mode[sure], wanted[sure]):
            return f"{DISAGREED} in layer {attn.layer_idx}"
    return None


def run_case(
    case: RouteCase, config: ElasticConfig, budget_ms: float, device: str, count: bool = True
) -> list[Measurement]:
    """Device time and host time of all contestants on one prompt, and their launches if `count`."""
    layers = layers_of(case, config, device)
    hidden = torch.randn(case.batch, case.length, case.hidden, device=device, dtype=DTYPES[case.dtype])
    layout = batch_layout(case.batch, case.length, 0, hidden.device)
    shared = {"case": case.name, **case.properties()}
    found: list[Measurement] = []
    with torch.inference_mode():
        why = disagreement(layers, hidden, layout, config)
        for who, fused, calls_of in (
            ("fused", True, whole), ("torch", False, whole), ("fused-keys", True, from_keys),
            ("torch-keys", False, from_keys),
        ):  # fmt: skip
            if why is not None and fused:
                found.append({**shared, "who": who, "metric": LEFT_OUT, "value": None, "unit": "", "why": why})
                continue
            call = in_turn(calls_of(layers, hidden, ForwardPass(layout, config, fused=fused)))
            found += replayed(case.name, case.properties(), who, call, budget_ms)
            figures = [("host time", host_microseconds(call, rounds=12), "us")]
            figures += [("launches", float(launches(call)), "a layer")] if count else []
            for metric, value, unit in figures:
                found.append({**shared, "who": who, "metric": metric, "value": value, "unit": unit})
                say(f"{case.name:28s} {who:10s} {metric}: {value:.4g} {unit}")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS, metavar="N",
                        help="tokens of the prompt (default 512 8K 128K 1M)")  # fmt: skip
    parser.add_argument("--reach-lengths", type=int, nargs="*", default=reach.LENGTHS, metavar="N",
                        help="tokens of the prompts that reach is timed on (default 8K 32K 128K)")  # fmt: skip
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="samples (default 1)")
    parser.add_argument("--hidden", type=int, default=4096, metavar="E", help="hidden size (default 4096)")
    parser.add_argument("--kv-heads", type=int, default=8, metavar="K", help="KV heads (default 8)")
    parser.add_argument("--head-dim", type=int, default=128, metavar="D", help="64 or 128 (default 128)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="element type (default bf16)")
    add_record_options(parser, "router")


def run(args: argparse.Namespace, command: str) -> int:
    """Time every length of both kinds, show the table, write `<out>/<tag>.json`.

    Returns:
        0, or 1 where a kernel finds something else than PyTorch.

    Raises:
        ValueError: options that do not fit, or no GPU that runs the kernel.
    """
    if min(*args.lengths, *args.reach_lengths, args.batch, args.hidden, args.kv_heads) < 1:
        raise ValueError("--lengths, --reach-lengths, --batch, --hidden and --kv-heads must be at least 1")
    if not (args.lengths or args.reach_lengths):
        raise ValueError("nothing to time; give --lengths or --reach-lengths at least one value")
    device, config = kernel_device(args, unsupported_reason), ElasticConfig()
    stamp, path = records.stamp(command, args.commit, device), Path(args.out) / f"{args.tag}.json"
    stamp["kernel"] = "route_prompt"
    found: list[Measurement] = []
    for number, length in enumerate(args.lengths):
        case = RouteCase(length, args.batch, args.hidden, args.kv_heads, args.head_dim, args.dtype)
        found += [{**record, **stamp} for record in run_case(case, config, args.budget_ms, str(device), number == 0)]
        records.save(path, found)  # after every length: a long run that is stopped leaves what it has
        torch.cuda.empty_cache()
    for shape in reach.SHAPES:
        for length in args.reach_lengths:
            timed = reach.run_reach(reach.ReachCase(length, *shape, args.dtype), args.budget_ms, str(device))
            found += [{**record, **stamp, "kernel": "reach"} for record in timed]
            records.save(path, found)
            torch.cuda.empty_cache()
    say(f"\n{tables.terminal(found)}\n\nWritten: {path}")
    return int(any(record["metric"] == LEFT_OUT for record in found))
