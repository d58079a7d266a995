"""`RouteReport`: what the routers decided for one prompt, as a terminal picture, JSON or PNG (docs/design.md section
7).

Legend: L layers, N samples, K KV heads.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic.cache.turns import Turn
from elastic.config import CHOOSING, SHORT, SparseConfig
from elastic.console import supports_unicode
from elastic.files import write_atomic
from elastic.plots import route_figure, save_png
from elastic.routing.sparsity import causal_pairs, density_by_layer, esr, kv_bytes_kept, msr, window_pairs

GLYPHS, ASCII_GLYPHS = ("█", "░"), ("#", ".")  # FA, SA


@dataclass(frozen=True)
class RouteReport:
    """Decisions for one prompt.

    Attributes:
        route: [L][K] in {0, 1}, 1 = SA.
        prompt_tokens: length of the prompt.
        configuration: such as `FA-SSA`.
        sink, window: of the streaming pattern, in tokens.
        stride, threshold: of XAttention.
        msr: share of heads on SA.
        esr_last, esr_all: share of query-key pairs of the prompt not computed: last layer (the paper's), all layers.
            After later turns: of the queries of all turns, each under the routes of its turn.
        kv_bytes_kept: what the cache of the prompt needs under these routes.
        kv_bytes_full: what the ordinary cache of the prompt holds.
        backend: the attention implementation that ran.
        kv_cache: what the cache keeps: full or elastic.
        kv_bytes_held: what the cache holds for this sample, generated tokens and reserved room included.
        density: by layer, share of the query-key pairs that its heads with chosen blocks computed; None in a layer
            without such heads, and empty if the configuration has none. Of all turns, as ESR.
        layers: decoder layers of the model.
        routed_layers: those that L counts, which have routers. The rest are of the model's own kinds, with a sliding
            window or linear attention.
        msr_model, esr_model, kv_bytes_kept_model, kv_bytes_full_model: `msr`, `esr_all`, `kv_bytes_kept` and
            `kv_bytes_full` over all decoder layers, where the heads of the other layers count as sparse. Linear
            attention visits no pairs and keeps a state, whose bytes are counted.
    """

    route: tuple[tuple[int, ...], ...]
    prompt_tokens: int
    configuration: str
    sink: int
    window: int
    stride: int
    threshold: float
    msr: float
    esr_last: float
    esr_all: float
    kv_bytes_kept: int
    kv_bytes_full: int
    backend: str
    kv_cache: str
    kv_bytes_held: int
    density: tuple[float | None, ...]
    layers: int
    routed_layers: tuple[int, ...]
    msr_model: float
    esr_model: float
    kv_bytes_kept_model: int
    kv_bytes_full_model: int

    def __str__(self) -> str:
        return self.render(supports_unicode())

    def render(self, unicode: bool = True) -> str:
        """Terminal picture: layers from left to right, KV heads from top to bottom, one glyph per decision."""
        full, sparse = GLYPHS if unicode else ASCII_GLYPHS
        layers, heads = len(self.route), len(self.route[0])
        label = len(f"head {heads - 1}")
        ruler = "".join(str(i).ljust(10) for i in range(0, layers, 10))[
            : max(layers, len(str((layers - 1) // 10 * 10)))
        ]
        lines = [f"{'layer'.ljust(label)}  {ruler}".rstrip()]
        for head in range(heads):
            glyphs = "".join(sparse if layer[head] else full for layer in self.route)
            lines.append(f"{f'head {head}'.ljust(label)}  {glyphs}")
        modes = {
            "FA": "full",
            "SSA": f"streaming (sink {self.sink}, window {self.window})",
            "XA": f"xattention (stride {self.stride}, threshold {self.threshold:g})",
            **{SHORT[mode]: mode for mode in CHOOSING if mode != "xattention"},
        }
        one, two = self.configuration.split("-")
        lines += [
            f"{full} {modes[one]}   {sparse} {modes[two]}",
            f"{self.prompt_tokens} prompt tokens, backend {self.backend}",
            f"MSR {self.msr:.3f}   ESR {self.esr_last:.3f} last layer, {self.esr_all:.3f} all layers",
            f"KV cache: routes need {_size(self.kv_bytes_kept)} of {_size(self.kv_bytes_full)}, the {self.kv_cache} "
            f"cache holds {_size(self.kv_bytes_held)}",
        ]
        if len(self.routed_layers) < self.layers:
            lines += [
                f"routers in layers {', '.join(map(str, self.routed_layers))} of {self.layers}; with its other layers, "
                "counted as sparse:",
                f"MSR {self.msr_model:.3f}   ESR {self.esr_model:.3f}   KV cache: {_size(self.kv_bytes_kept_model)} of "
                f"{_size(self.kv_bytes_full_model)}",
            ]
        found = [share for share in self.density if share is not None]
        if found:
            chooser = next(mode for mode in CHOOSING if SHORT[mode] in (one, two))
            lines.append(
                f"{chooser} heads compute {sum(found) / len(found):.3f} of the pairs, {min(found):.3f} to "
                f"{max(found):.3f} by layer"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        lists = {"density": list(self.density), "routed_layers": list(self.routed_layers)}
        return {**asdict(self), "route": [list(layer) for layer in self.route], **lists}

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON text, also written to `path` if given."""
        text = json.dumps(self.to_dict(), indent=1)
        if path is not None:
            write_atomic(path, text + "\n")
        return text

    def save_heatmap(self, path: str | Path) -> Path:
        """Write the decisions as a PNG picture."""
        title = f"{self.configuration}, {self.prompt_tokens} prompt tokens"
        return save_png(route_figure(torch.tensor(self.route), title), path)


def route_reports(
    route_LNK: Tensor,
    lengths_N: Tensor,
    sparse: SparseConfig,
    *,
    head_dim: int,
    element_size: int,
    backend: str,
    kv_cache: str,
    held_N: Sequence[int],
    density_LNK: Tensor | None = None,
    turns: Sequence[Turn] = (),
    windows: Mapping[int, int | None] | None = None,
    state_bytes: int = 0,
) -> list[RouteReport]:
    """One report per sample.

    Args:
        route_LNK: decisions in {0, 1}.
        lengths_N: prompt tokens of each sample, those of earlier turns included.
        sparse: modes and pattern sizes.
        head_dim: D.
        element_size: bytes of one number in the KV cache.
        backend, kv_cache: as in the report.
        held_N: bytes that the cache holds for every sample.
        density_LNK: see `elastic.routing.sparsity.esr`.
        turns: all turns of the conversation; default: there is one.
        windows: of the layers without routers, see `elastic.model.layer_types.stock_layers`; default: there are none.
        state_bytes: what all layers of linear attention keep of a sample.

    Raises:
        ValueError: shapes that do not belong together.
    """
    _check_shapes(route_LNK, lengths_N)
    route = route_LNK.detach().cpu().double()
    one = Turn(route_LNK, density_LNK, torch.zeros_like(lengths_N), lengths_N)
    last, mean, density = _over_turns(turns or [one], sparse)
    kept = kv_bytes_kept(route, lengths_N, sparse, head_dim, element_size)
    model = _Model(route.shape[0], dict(windows or {}), route.shape[2] * 2 * head_dim * element_size, state_bytes)
    routes, shares, lengths = route.transpose(0, 1).long().tolist(), msr(route).tolist(), lengths_N.tolist()
    return [
        RouteReport(
            route=tuple(map(tuple, routes[n])),
            prompt_tokens=lengths[n],
            configuration=sparse.name,
            **{name: getattr(sparse, name) for name in ("sink", "window", "stride", "threshold")},
            msr=shares[n],
            esr_last=float(last[n]),
            esr_all=float(mean[n]),
            kv_bytes_kept=int(kept[n]),
            backend=backend,
            kv_cache=kv_cache,
            kv_bytes_held=held_N[n],
            density=tuple(density[n]),
            **model.figures(lengths[n], shares[n], float(mean[n]), int(kept[n])),
        )
        for n in range(route.shape[1])
    ]


def _check_shapes(route_LNK: Tensor, lengths_N: Tensor) -> None:
    if route_LNK.dim() != 3 or lengths_N.shape != route_LNK.shape[1:2]:
        raise ValueError(
            f"route has shape {list(route_LNK.shape)} and prompt lengths {list(lengths_N.shape)}; expected "
            "[layers, samples, KV heads] and [samples]"
        )


@dataclass(frozen=True)
class _Model:
    """All layers of a model with those of its own kinds.

    Attributes:
        routed: how many layers have routers.
        windows: of the others, by decoder layer.
        token: bytes of a token's keys and values in one layer.
        states: bytes of a sample's states in all layers of linear attention.
    """

    routed: int
    windows: dict[int, int | None]
    token: int
    states: int

    def figures(self, length: int, msr: float, esr: float, kept: int) -> dict[str, Any]:
        """What a report says of all layers and of full caches, given what it says of the routed layers of a prompt."""
        full = self.routed * length * self.token
        layers, windows = self.routed + len(self.windows), [w for w in self.windows.values() if w is not None]
        seen = sum(window_pairs(length, window) for window in windows)  # pairs; linear attention has none
        pruned = len(self.windows) - seen / max(1, causal_pairs(length))
        held = sum(min(length, window - 1) for window in windows) * self.token  # the next token is the window's last
        held += self.states
        return {
            "kv_bytes_full": full,
            "layers": layers,
            "routed_layers": tuple(n for n in range(layers) if n not in self.windows),
            "msr_model": (self.routed * msr + len(self.windows)) / layers,
            "esr_model": (self.routed * esr + pruned) / layers,
            "kv_bytes_kept_model": kept + held,
            "kv_bytes_full_model": full + held,
        }


def _over_turns(turns: Sequence[Turn], sparse: SparseConfig) -> tuple[Tensor, Tensor, list[list[float | None]]]:
    """`esr` [N], of the last layer and of all, and `density_by_layer` [N][L]; a turn counts by its pairs."""
    pairs_TN, found = _pairs(turns), [esr(t.route_LNK, t.end_N, sparse, t.density_LNK, t.begin_N) for t in turns]
    last, mean = ((torch.stack(of) * pairs_TN).sum(0) / pairs_TN.sum(0) for of in zip(*found, strict=True))
    densities = [turn.density_LNK for turn in turns if turn.density_LNK is not None]
    heads = turns[0].route_LNK.shape[2]
    routes, weight = torch.cat([turn.route_LNK for turn in turns], 2), pairs_TN.repeat_interleave(heads, 0).T
    return last, mean, density_by_layer(routes, sparse, torch.cat(densities, 2) if densities else None, weight)


def _pairs(turns: Sequence[Turn]) -> Tensor:
    """Causally visible pairs of each turn's queries, float64 [turns, N]."""
    ends = [(turn.begin_N.tolist(), turn.end_N.tolist()) for turn in turns]
    pairs = [[causal_pairs(end) - causal_pairs(begin) for begin, end in zip(*of, strict=True)] for of in ends]
    return torch.tensor(pairs, dtype=torch.float64)


def heads_that_differ(one: RouteReport, two: RouteReport) -> int:
    """Number of (layer, KV head) pairs that two reports route differently."""
    pairs = zip(one.route, two.route, strict=True)
    return sum(a != b for x, y in pairs for a, b in zip(x, y, strict=True))


def _size(count: int) -> str:
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
