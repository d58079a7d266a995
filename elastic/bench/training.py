"""`elastic bench training`: what routed training costs beside the recipe that runs both modes of every head, and the
memory and time of a step of a whole backbone (random weights); with `--devices` on several GPUs
(`elastic.bench.scaling`).

The recipe computes each head's output in both modes, mixes them by the route and lets autograd go through both: two
forward and two backward passes with the same kernels. Routed training gives the same gradients from one forward and
one backward pass of the routed mode, and a forward pass of the other one on a share of the queries.
Legend: S tokens, N samples, H query heads, K KV heads, D head dim.
"""

import argparse
import gc
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from elastic.attention.head_plan import HeadPlan
from elastic.attention.layout import packed_layout
from elastic.attention.routed import Routed, fused, routed_attention
from elastic.attention.row_slice import RowSlice
from elastic.bench import records, tables
from elastic.bench.options import add_record_options, kernel_device
from elastic.bench.race import TOLERANCE, largest_difference
from elastic.bench.records import Measurement
from elastic.bench.scaling_tables import STRATEGIES
from elastic.bench.step import HEAD_DIM, HEADS, KV_HEADS, SHAPES, Step, bounds_of, random_backbone, random_row
from elastic.bench.timing import Timing, measure
from elastic.config import SparseConfig
from elastic.console import say
from elastic.kernels import unsupported_backward
from elastic.model.attach import handle_of, last_routes, set_row_slice
from elastic.training.config import ALLOCATOR

SUMMARY = "a routed training step beside the recipe that runs both modes; memory of a step of a whole backbone"
PARTS = ("attention", "whole", "step")
WARM_UP = 4096  # tokens of the step before a timed one
LAYERS = 5  # of the attention case; 5 * 8 KV heads hold every tenth of an MSR


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    parser.add_argument("--length", type=int, default=65536, metavar="S", help="tokens of the row (default 65536)")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="equal samples in the row (default 1)")
    parser.add_argument("--msr", type=float, default=0.7, metavar="R", help="share of streaming heads (default 0.7)")
    parser.add_argument("--shares", type=float, nargs="+", default=(1.0, 0.125), metavar="F",
                        help="gradient shares of routed training (default 1 0.125)")  # fmt: skip
    parser.add_argument("--layers", type=int, default=4, metavar="L",
                        help="layers of backbones whose step is timed in both recipes (default 4)")  # fmt: skip
    parser.add_argument("--backbones", nargs="*", choices=list(SHAPES), default=list(SHAPES), metavar="NAME",
                        help=f"shapes of the backbones, of {', '.join(SHAPES)} (default all)")  # fmt: skip
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                        help=f"what to run, of {', '.join(PARTS)} (default all)")  # fmt: skip
    parser.add_argument("--memory-gb", type=float, default=80.0, metavar="GB", help="limit on memory (default 80)")
    parser.add_argument("--compile", action="store_true", help="torch.compile what surrounds attention")
    parser.add_argument("--unfused", action="store_true", help="time steps with nothing around attention fused, too")
    parser.add_argument("--devices", type=int, default=1, metavar="N",
                        help="GPUs: above 1, whole steps under each strategy beside one GPU (default 1)")  # fmt: skip
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES), metavar="NAME",
                        help=f"of several GPUs, some of {', '.join(STRATEGIES)} (default all)")  # fmt: skip
    parser.add_argument("--context-parallel", type=int, metavar="C",
                        help="GPUs that share a row under strategy context (default all)")  # fmt: skip
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="timed on several GPUs (default 2)")
    parser.add_argument("--no-single", action="store_true", help="leave out the one GPU beside several, where a row "
                        "does not fit on it")  # fmt: skip
    add_record_options(parser, "training")
    parser.set_defaults(dtype="bf16", head_dim=HEAD_DIM)


def run(args: argparse.Namespace, command: str) -> int:
    """Time every part, show the figures, write `<out>/<tag>.json`.

    Returns:
        0, or 1 where the two recipes' gradients differ.

    Raises:
        ValueError: options that do not fit, or no GPU that runs the kernels.
    """
    if not 0 < args.msr < 1 or args.samples < 1 or args.length % (128 * args.samples):
        raise ValueError(
            f"--msr {args.msr:g} --samples {args.samples} --length {args.length}: expected an MSR in (0, 1) and a "
            "length that is a multiple of 128 per sample"
        )
    os.environ.setdefault(*ALLOCATOR)
    device = kernel_device(args, unsupported_backward)
    if args.devices > 1:
        from elastic.bench.scaling import run as run_on_several  # Lightning is slow to import

        return run_on_several(args, command)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, args.memory_gb * 1e9 / total), device)
    stamp, path = records.stamp(command, args.commit, device), args.out / f"{args.tag}.json"
    stamp["kernel"] = "attention_backward_sm90 (sm_90a)"
    parts: list[Callable[[], list[Measurement]]] = []
    if "attention" in args.parts:
        parts.append(partial(attention_records, args, device))
    for name in args.backbones:
        parts += [partial(whole_records, args, device, name)] if "whole" in args.parts else []
        parts += [partial(step_records, args, device, name)] if "step" in args.parts else []
    found: list[Measurement] = []
    for part in parts:
        found += [{**record, "length": args.length, "samples": args.samples, **stamp} for record in part()]
        records.save(path, found)
        gc.collect()  # a model and its hooks refer to each other
        torch.cuda.empty_cache()
    say("\n".join(["", *tables.remarks(found), "", f"Written: {path}"]))
    wrong = [r["metric"] == "largest difference" and not r["value"] <= TOLERANCE for r in found]
    return int(any(wrong) or any(r["metric"] == records.LEFT_OUT for r in found))


def both_modes(
    q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, route_NK: Tensor, plan: HeadPlan, scale: float
) -> Tensor:
    """What `routed_attention` must equal: every head in both modes, mixed by the route. Packed rows; [1, S, H, D]."""
    outs = []
    for value in (0.0, 1.0):
        constant = torch.full_like(route_NK, value).detach()
        mode = replace(plan, mode_NK=HeadPlan.build(constant, plan.sparse, plan.layout).mode_NK)
        outs.append(fused(q_BHSD, k_BKSD, v_BKSD, constant, mode, scale))
    lengths = plan.layout.end_N - plan.layout.begin_N
    group = q_BHSD.shape[1] // k_BKSD.shape[1]
    weight_SH = route_NK.repeat_interleave(lengths, dim=0, output_size=q_BHSD.shape[2]).repeat_interleave(group, dim=1)
    return torch.lerp(outs[0], outs[1], weight_SH[None, :, :, None].to(outs[0].dtype))


class BothModes(RowSlice):
    """Makes an attached model train by the recipe."""

    def attend(
        self, q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, route_NK: Tensor, plan: HeadPlan, scale: float
    ) -> Routed:
        """`both_modes` in place of `routed_attention`."""
        return Routed(both_modes(q_BHSD, k_BKSD, v_BKSD, route_NK, plan, scale), plan)


def routed_output(*arguments: Any) -> Tensor:
    """`routed_attention` as `both_modes` is called."""
    return routed_attention(*arguments).output


def spread_routes(layers: int, samples: int, kv_heads: int, ratio: float) -> Tensor:
    """Routes [L, N, K] of which `ratio` are 1, evenly spread."""
    place = torch.arange(layers * samples * kv_heads + 1, dtype=torch.float64)
    return (place * ratio + 0.5).floor().diff().float().view(layers, samples, kv_heads)


def attention_records(args: argparse.Namespace, device: torch.device) -> list[Measurement]:
    """Forward and backward of attention alone, over layers whose heads stream at the wanted ratio."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(1, args.length, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    q, k, v, grad = (torch.randn(shape, generator=generator, device=device).bfloat16() for shape in shapes)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    routes = spread_routes(LAYERS, args.samples, KV_HEADS, args.msr).to(device).requires_grad_()
    layout = packed_layout(bounds_of(args.length, args.samples), None, args.length, device)

    def layer(attend: Callable[..., Tensor], share: float, route_NK: Tensor) -> tuple[Tensor, ...]:
        plan = HeadPlan.build(route_NK, SparseConfig(), layout, share)
        out = attend(*(x.transpose(1, 2) for x in leaves), route_NK, plan, HEAD_DIM**-0.5)
        return (out.detach(), *torch.autograd.grad(out, (*leaves, route_NK), grad))

    recipes = {"both modes": partial(layer, both_modes, 1.0)}
    recipes |= {named(share): partial(layer, routed_output, share) for share in args.shares}
    *want, want_route = recipes["both modes"](routes[0])
    *got, got_route = layer(routed_output, 1.0, routes[0])
    different = max(largest_difference(tuple(got), tuple(want)), relative(got_route, want_route))
    del want, got
    case = f"attention-{LAYERS}l-{args.length // 1024}k"
    found = [{"case": case, "who": "routed", "metric": "largest difference", "value": different, "unit": "relative"}]
    calls = {name: partial(_all, call, routes) for name, call in recipes.items()}
    return found + compare(case, calls, partial(measure, budget_ms=args.budget_ms))


def _all(call: Callable[[Tensor], Any], routes: Tensor) -> None:
    for route in routes:
        call(route)


def named(share: float) -> str:
    """Routed training with this gradient share."""
    return f"routed, share {share:g}"


def relative(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest value."""
    return ((got - want).abs().amax() / want.abs().amax()).item()


def compare(
    case: str, calls: Mapping[str, Callable[[], Any]], timer: Callable[[Callable[[], Any]], Timing]
) -> list[Measurement]:
    """Times of the recipes, and how much faster the others are than the first one."""
    found: list[Measurement] = []
    for who, call in calls.items():
        timing = timer(call)
        say(f"{case:28s} {who:22s} {timing.ms:10.1f} ms  {timing.repeats} repeats")
        shared = {"case": case, "who": who, "repeats": timing.repeats}
        found.append({**shared, "metric": "step time", "value": timing.ms, "unit": "ms"})
        if len(found) > 1:
            speed = found[0]["value"] / timing.ms
            found.append({**shared, "metric": f"speed over {found[0]['who']}", "value": speed, "unit": "x"})
    return found


def timed_steps(call: Callable[[], Any], warm: int = 1, repeats: int = 2) -> Timing:
    """Mean time of a call that takes seconds."""
    for _ in range(warm):
        call()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(repeats):
        call()
    last.record()
    torch.cuda.synchronize()
    return Timing(first.elapsed_time(last) / repeats, repeats)


def step_records(args: argparse.Namespace, device: torch.device, name: str) -> list[Measurement]:
    """A training step of a backbone of a few layers, by both recipes."""
    model = random_backbone(name, args.layers, args.msr, args.compile, device)
    batch = random_row(args.length, args.samples, SHAPES[name]["vocab_size"], device)
    recipe = Step(model, batch, 1.0, args.msr)

    def both() -> None:
        previous = set_row_slice(model, BothModes())
        recipe()
        set_row_slice(model, previous)

    def unfused(call: Callable[[], Any]) -> None:
        parts = handle_of(model).state.layer_parts
        parts.on = False
        call()
        parts.on = True

    calls: dict[str, Callable[[], Any]] = {"both modes": both}
    calls |= {named(share): Step(model, batch, share, args.msr) for share in args.shares}
    if args.unfused:
        calls |= {f"{name}, unfused": partial(unfused, call) for name, call in calls.items()}
    case = f"{name}-{args.layers}l-{args.length // 1024}k"
    found = compare(case, calls, timed_steps)
    ratio = last_routes(model).route.mean().item()
    return [*found, {"case": case, "who": "routed", "metric": "MSR", "value": ratio, "unit": ""}]


def whole_records(args: argparse.Namespace, device: torch.device, name: str) -> list[Measurement]:
    """Memory and time of a step of a whole backbone, within `--memory-gb`."""
    torch.cuda.reset_peak_memory_stats(device)
    model = random_backbone(name, None, args.msr, args.compile, device)
    batch = random_row(args.length, args.samples, SHAPES[name]["vocab_size"], device)
    case, who, share = f"{name}-{args.length // 1024}k", named(min(args.shares)), min(args.shares)
    try:
        Step(model, random_row(WARM_UP, 1, SHAPES[name]["vocab_size"], device), share, args.msr)()
        timing = timed_steps(Step(model, batch, share, args.msr), 0, 1)
    except torch.OutOfMemoryError as error:
        why = " ".join(str(error).split())[:300]
        return [{"case": case, "who": who, "metric": records.LEFT_OUT, "value": None, "unit": "", "why": why}]
    figures = {
        "step time": (timing.ms, "ms"),
        "peak allocated": (torch.cuda.max_memory_allocated(device) / 1e9, "GB"),
        "peak reserved": (torch.cuda.max_memory_reserved(device) / 1e9, "GB"),
        "MSR": (last_routes(model).route.mean().item(), ""),
    }
    for metric, (value, unit) in figures.items():
        say(f"{case:28s} {metric:22s} {value:10.2f} {unit}")
    return [{"case": case, "who": who, "metric": m, "value": x, "unit": unit} for m, (x, unit) in figures.items()]
