"""Methods by name: what `elastic test`, `validate`, `eval` and the studies compare on one model.

A method is a choice of routes and of the modes that they lead to, so all methods run through one code path. `FORMS` is
the grammar: the parser, the printer and every `--help` are made from it; docs/evaluation.md explains it. No torch
import.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic.config import CHOOSING, Mode, SparseConfig

if TYPE_CHECKING:
    from torch import Tensor

FORMS = {  # <field of Method>, [left out where it has its default]
    "dense": "dense",
    "streaming": "streaming",
    "xattention": "xattention[:<threshold>]",
    "moba": "moba:<top_k>[:<chunk>]",
    "nsa": "nsa[:<top_k>]",
    "infllm": "infllm[:<top_k>]",
    "flexprefill": "flexprefill:<gamma>[:<min_budget>]",
    "flashprefill": "flashprefill:<threshold>",
    "random": "random:<msr>[:<seed>]",
    "static": "static:<file>[@<msr>]",
    "elastic": "elastic[/<modes>][:<checkpoint>][@<bias>]",
}
GRAMMAR = ", ".join(FORMS.values())
MODES: dict[str, tuple[Mode, Mode]] = {
    "fa-ssa": ("full", "streaming"),
    "fa-xa": ("full", "xattention"),
    "xa-ssa": ("xattention", "streaming"),
}
DEFAULT_METHODS = ("dense", "elastic")
SCORES = ("loss", "accuracy", "exact")
RATIOS = ("msr", "esr_last", "esr_all")
CAVEATS = {  # what a table says beside a method whose paper trains the model with it
    "moba": "MoBA needs continued training in its paper (arXiv 2502.13189); here the backbone is frozen",
    "nsa": "NSA is trained with the model in its paper (arXiv 2502.11089); here the backbone is frozen, without gates "
    "and learnt compression",
    "infllm": "InfLLM-V2 needs continued training in its paper (arXiv 2509.24663); here the backbone is frozen",
}
_UNIFORM: dict[str, int] = {"dense": 0, "streaming": 1, **dict.fromkeys(CHOOSING, 1)}  # the route of every head
_VALUES: dict[str, tuple[Callable[[str], Any], Callable[[Any], bool], str]] = {  # how to read, what is allowed
    "threshold": (float, lambda value: 0 < value <= 1, "a threshold above 0, up to 1"),
    "gamma": (float, lambda value: 0 < value <= 1, "a coverage above 0, up to 1"),
    "top_k": (int, lambda value: 0 < value < 2**31, "a number of blocks of 1 or more"),
    "chunk": (int, lambda value: 0 < value < 2**31, "a number of tokens of 1 or more"),
    "min_budget": (int, lambda value: 0 < value < 2**31, "a number of tokens of 1 or more"),
    "msr": (float, lambda value: 0 <= value <= 1, "an MSR from 0 to 1"),
    "seed": (int, lambda value: 0 <= value < 2**63, "a whole number of 0 or more"),
    "bias": (float, math.isfinite, "a finite number"),
    "modes": (str, lambda value: value in MODES, f"one of {', '.join(MODES)}"),
}


@dataclass(frozen=True)
class Method:
    """One way to choose routes; `parse_method` reads it from its name and checks it.

    Attributes:
        kind: `dense`, `streaming`, `xattention`, `moba`, `nsa`, `infllm`, `flexprefill`, `flashprefill`: every head in
            that mode, whatever the configuration; `random`: heads drawn once; `static`: the heads of a pattern file or
            a calibration; `elastic`: the routers decide.
        threshold: of XAttention, where None leaves the configuration's, and of FlashPrefill.
        gamma, min_budget: of FlexPrefill: share of the attention that is covered, and tokens that lines cover at least.
        top_k: blocks that MoBA, NSA and InfLLM-V2 choose; None: as published.
        chunk: tokens of MoBA's blocks.
        msr: share of heads on route 1. None with `static`: the heads that a pattern scores below 0.5, or the level of a
            calibration that stays within its budget (`elastic.routing.calibration`).
        seed: of the random heads.
        file: pattern file, a line per layer and a number per KV head, or what `elastic calibrate` wrote.
        modes: a key of `MODES`: the routers' decisions choose between these instead of the configuration's.
        checkpoint: folder of the routers; None: those that are evaluated (`elastic test`).
        bias: `sparsity_bias` of the routers (docs/design.md section 2); None leaves the checkpoint's own.
    """

    kind: str
    threshold: float | None = None
    gamma: float | None = None
    min_budget: int = SparseConfig.min_budget
    top_k: int | None = None
    chunk: int = SparseConfig.chunk
    msr: float | None = None
    seed: int = 0
    file: str | None = None
    modes: str | None = None
    checkpoint: str | None = None
    bias: float | None = None

    @property
    def name(self) -> str:
        """The name that `parse_method` reads as this method; results are filed under it."""

        def optional(part: re.Match[str]) -> str:
            (field,) = re.findall(r"<(\w+)>", part[1])
            return "" if getattr(self, field) == _DEFAULTS[field] else part[1]

        form = re.sub(r"\[(.*?)\]", optional, FORMS[self.kind])
        return re.sub(r"<(\w+)>", lambda part: _shown(getattr(self, part[1])), form)

    @property
    def caveat(self) -> str:
        """What a table says beside the method; empty where there is nothing to say."""
        return CAVEATS.get(self.kind, "")

    def sparse(self, own: SparseConfig) -> SparseConfig:
        """The modes and sizes that the method runs on a model configured with `own`.

        Raises:
            ValueError: XAttention with a stride that does not divide the block, MoBA with a chunk that is not a
                multiple of it.
        """
        threshold = self.threshold or self.gamma or own.threshold
        if self.kind in CHOOSING:
            chosen = {"top_k": self.top_k, "chunk": self.chunk, "min_budget": self.min_budget}
            return replace(own, route0="full", route1=self.kind, threshold=threshold, **chosen)  # type: ignore[arg-type]
        modes = self.modes or ("fa-ssa" if self.kind in _UNIFORM else None)
        route0, route1 = (own.route0, own.route1) if modes is None else MODES[modes]
        return replace(own, route0=route0, route1=route1, threshold=threshold)

    def routes(
        self,
        layers: int,
        kv_heads: int,
        architecture: Mapping[str, Any] | None = None,
        sparse: SparseConfig | None = None,
    ) -> "Tensor | None":
        """Routes [L, K] in {0, 1} for `override_routes`; None lets the routers decide.

        Args:
            architecture: of the backbone (`elastic.model.loading.architecture`), which a calibration must be of.
            sparse: what the method runs, which a calibration must have measured; None: not known yet.

        Raises:
            OSError: a file that cannot be read.
            ValueError: one that does not fit L layers of K KV heads, or a calibration of another architecture or other
                modes.
        """
        from elastic.routing.calibration import first_heads
        from elastic.routing.fixed_routes import drawn, head_order, uniform

        if self.kind == "random":
            return drawn(layers, kv_heads, self.msr or 0.0, self.seed)
        if self.file is not None:
            order, level = head_order(Path(self.file), layers, kv_heads, self.msr, architecture, sparse)
            return first_heads(order, level, layers, kv_heads)
        return uniform(layers, kv_heads, _UNIFORM[self.kind]) if self.kind in _UNIFORM else None


def parse_method(name: str) -> Method:
    """The method of that name. Files and checkpoints need not exist.

    Raises:
        ValueError: an unknown method, another form than in `FORMS`, or a value out of range.
    """
    kind = re.split("[:/@]", name, maxsplit=1)[0]
    if kind not in FORMS:
        raise ValueError(f"method {name!r} is not known; use one of {GRAMMAR}")
    if (present := renamed(name)) != name:
        path = name.removeprefix("elastic:")
        raise ValueError(f"method {name!r} is an old spelling; write {present} (or elastic:./{path} for a folder)")
    found = re.fullmatch(_PATTERNS[kind], name)
    if found is None:
        raise ValueError(f"method {name!r} is not of the form {FORMS[kind]}")
    values = {field: text for field, text in found.groupdict().items() if text is not None}
    return Method(kind, **{field: _value(name, field, text) for field, text in values.items()})


def parse_methods(names: Sequence[str], of_run: bool) -> list[Method]:
    """The methods of a command, all different.

    Args:
        of_run: `elastic` means the routers of this run, which are always compared (`elastic test`, `validate`). Else
            routers come from the checkpoint that the method names (`elastic eval`).

    Raises:
        ValueError: as `parse_method`, a method given twice, or routers that this command does not have.
        FileNotFoundError: no such pattern file or checkpoint.
    """
    methods = [parse_method(name) for name in names]
    found = [method.name for method in methods]
    if twice := [name for name in dict.fromkeys(found) if found.count(name) > 1]:
        raise ValueError(f"methods={list(names)} names {twice[0]} twice; name each method once")
    if of_run and "elastic" not in found:
        raise ValueError(f"methods={list(names)} lacks elastic; the routers are what is evaluated, add it")
    for method in methods:
        if of_run and method.checkpoint is not None:
            raise ValueError(
                f"method {method.name!r} names a checkpoint, but this command evaluates the routers of its run; write "
                f"{replace(method, checkpoint=None).name} and set model.routers (or --ckpt_path), or use `elastic eval`"
            )
        if not of_run and method.kind == "elastic" and method.checkpoint is None:
            raise ValueError(
                f"method {method.name!r} names no checkpoint, and this command has no routers of its own; write "
                f"{replace(method, checkpoint='<checkpoint>').name} with the folder of a checkpoint"
            )
        for path, what in ((method.file, "pattern file"), (method.checkpoint, "checkpoint folder")):
            if path is not None and not Path(path).exists():
                raise FileNotFoundError(f"method {method.name!r}: {path} does not exist; expected a {what}")
    return methods


def family_of(method: Method) -> str:
    """What a method's operating points have in common, without the numbers that tell them apart."""
    if method.kind == "elastic":
        return replace(method, bias=None).name
    return f"static:{method.file}" if method.kind == "static" else method.kind


def renamed(name: str) -> str:
    """The present name of a method in results files written before there was one grammar: `elastic:-2` is now
    `elastic@-2`, `elastic:fa-xa:1` is `elastic/fa-xa@1`. Other names are returned as they are.
    """
    kind, _, rest = name.partition(":")
    first, *numbers = re.split("[:@]", rest)
    modes = first if first in MODES else None
    numbers = numbers if modes else [first, *numbers]
    if kind != "elastic" or len(numbers) > 1 or not all(map(_is_number, numbers)):
        return name
    return "".join((kind, *(f"/{word}" for word in (modes,) if word), *(f"@{number}" for number in numbers)))


def ratio_columns(name: str) -> dict[str, str]:
    """Columns of MSR and ESR in the results of the method `name`: plain for `elastic`, with the name for others, none
    for `dense`.
    """
    return {} if name == "dense" else {ratio: ratio if name == "elastic" else f"{name}_{ratio}" for ratio in RATIOS}


def caveats(methods: Sequence[Method]) -> list[str]:
    """What tables print beside these methods, each once."""
    return list(dict.fromkeys(method.caveat for method in methods if method.caveat))


def columns(methods: Sequence[Method]) -> tuple[str, ...]:
    """Names of everything measured per sample: `<method>_<score>`, then MSR and ESR."""
    scores = [f"{method.name}_{score}" for method in methods for score in SCORES]
    return (*scores, *(column for method in methods for column in ratio_columns(method.name).values()))


def _pattern(form: str) -> str:
    """The regular expression of a form. What follows the last @ is a number, unless it contains a slash."""
    values = {"file": ".+?", "checkpoint": ".+?"}
    form = form.replace("[", "(?:").replace("]", ")?")
    return re.sub(r"<(\w+)>", lambda part: f"(?P<{part[1]}>{values.get(part[1], '[^:@/]*')})", form)


_PATTERNS = {kind: _pattern(form) for kind, form in FORMS.items()}
_DEFAULTS = {field.name: field.default for field in fields(Method)}


def _value(name: str, field: str, text: str) -> Any:
    """A field's value; paths are texts of any kind."""
    read, allowed, what = _VALUES.get(field, (str, bool, ""))
    try:
        value = read(text)
    except ValueError:
        value = None
    if value is None or not allowed(value):
        at = f", and what follows the last @ is one; rename a path that ends in @{text}" if f"@{text}" in name else ""
        raise ValueError(f"method {name!r}: {text!r} is not {what}{at}")
    return value


def _shown(value: object) -> str:
    """A value as in a name: numbers in the fewest digits that read back the same."""
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
