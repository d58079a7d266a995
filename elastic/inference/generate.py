"""Load routers onto their backbone and generate text through `model.generate` (docs/design.md section 7)."""

import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from elastic.attention.routed import backend_for
from elastic.cache.elastic_cache import ElasticCache
from elastic.cache.keyword import NEW, OLD, given
from elastic.cache.linear_layer import state_bytes
from elastic.config import SparseConfig
from elastic.data.prompts import (
    TEMPLATE,
    EncodedPrompt,
    Prompts,
    check_length,
    encode,
    left_pad,
    padded_spans,
    set_template_kwargs,
    single_prompts,
)
from elastic.inference.budget import bias_of_budget
from elastic.inference.decode_graph import can_graph, graphed
from elastic.inference.report import RouteReport, route_reports
from elastic.model.attach import biased, elastic_config, handle_of, is_attached, route_of, set_config, user_wrote
from elastic.model.checkpoint import load_into, read_elastic
from elastic.model.generation import REFUSED, VERIFIED, judge, setting
from elastic.model.hub import checkpoint_folder
from elastic.model.layer_types import stock_layers
from elastic.model.loading import architecture, load_backbone
from elastic.model.ordered_routers import attach_fixed, attach_static
from elastic.protocols import CausalLM, KVCache, Tokenizer
from elastic.routing.calibration import is_calibration, read_calibration
from elastic.routing.methods import FORMS, Method, parse_method

_OWN = ("input_ids", "inputs_embeds", "attention_mask", NEW, OLD, "return_dict_in_generate", "max_length")
_REFUSED = {
    **REFUSED,
    "cache_implementation": "the cache holds the routes; kv_cache='full' or 'elastic' chooses what it keeps",
}


@dataclass(frozen=True)
class Generation:
    """Answer to one prompt.

    Attributes:
        text: new text without special tokens.
        token_ids: new tokens, up to and without the padding after the end of the answer.
        report: what the routers decided at prefill.
    """

    text: str
    token_ids: list[int]
    report: RouteReport


def load(
    path: str | Path,
    backbone: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    gguf_file: str | None = None,
    kv_cache: str | None = None,
    revision: str | None = None,
) -> tuple[CausalLM, Tokenizer]:
    """A backbone with the routers of a checkpoint, frozen and in eval mode, and its tokenizer.

    Args:
        path: checkpoint folder; owner/name of a checkpoint on the Hugging Face Hub, unless a folder of that name is
            here; or the name of a method (`elastic.routing.methods`) whose routes are the same for every input:
            `static:<file>[@<msr>]`, the heads of a calibration (`elastic calibrate`) or of a pattern file, or one such
            as `moba:3`, with the default sizes of `SparseConfig`.
        backbone: name to load the backbone by; default the one that was trained on or calibrated; other methods
            need it.
        device: a torch device.
        dtype: of the backbone's weights; routers stay fp32.
        gguf_file: file name where the backbone's weights are in GGUF format.
        kv_cache: what `generate` keeps of a prompt, `full` or `elastic`; default: as the checkpoint says.
        revision: branch, tag or commit hash of a checkpoint on the hub; default `main`, whose newest commit is taken.

    Raises:
        FileNotFoundError: no checkpoint, no file, or no such backbone.
        OSError: a hub that cannot be reached, or does not let the user read (`elastic.model.hub.fetch`).
        ValueError: a damaged or altered checkpoint or file, one for another backbone, or a revision of a folder.
    """
    options: dict[str, Any] = {"dtype": dtype, "device": device, "gguf_file": gguf_file}
    method = _fixed_method(path)
    if method is None:
        path = checkpoint_folder(path, revision)
        metadata = read_elastic(path)
        model, tokenizer = load_backbone(backbone or metadata["backbone"], **options)
        set_template_kwargs(tokenizer, metadata[TEMPLATE])
        load_into(model, path)
    elif revision is not None:
        raise ValueError(f"revision={revision!r} is of a repository on the hub, but {path} is a method")
    elif method.file is not None:
        model, tokenizer = _load_static(method, backbone, options)
    else:
        model, tokenizer = _load_fixed(method, backbone, options)
    if kv_cache is not None:
        set_config(model, replace(elastic_config(model), kv_cache=kv_cache))  # type: ignore[arg-type]
    return model.requires_grad_(False).eval(), tokenizer


def _fixed_method(path: str | Path) -> Method | None:
    """The method that is named instead of a checkpoint folder, if one is whose routes no router decides."""
    kind = re.split("[:@]", str(path), maxsplit=1)[0]
    if kind not in FORMS or kind == "elastic" or Path(path).exists():
        return None
    return parse_method(str(path))


def _load_fixed(method: Method, backbone: str | None, options: dict[str, Any]) -> tuple[CausalLM, Tokenizer]:
    if backbone is None:
        raise ValueError(f"method {method.name} does not say which backbone it runs on; name it (backbone, --backbone)")
    sparse = method.sparse(SparseConfig())
    model, tokenizer = load_backbone(backbone, **options)
    return attach_fixed(model, method, sparse), tokenizer


def _load_static(method: Method, backbone: str | None, options: dict[str, Any]) -> tuple[CausalLM, Tokenizer]:
    file = Path(method.file or "")
    if not file.is_file():
        raise FileNotFoundError(f"{method.name}: no file {file}; `elastic calibrate --out {file}` writes one")
    sparse = SparseConfig()
    if is_calibration(file):
        found = read_calibration(file)
        backbone, sparse = backbone or found.backbone, found.sparse
    if backbone is None:
        raise ValueError(f"pattern file {file} does not say which backbone it is of; name it (backbone, --backbone)")
    model, tokenizer = load_backbone(backbone, **options)
    return attach_static(model, file, method.msr, sparse), tokenizer


def generate(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompt: Prompts,
    max_new_tokens: int = 64,
    *,
    sparsity_bias: float | None = None,
    budget: float | None = None,
    kv_cache: str | None = None,
    streamer: Any = None,
    chat_template: bool = True,
    tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    sanitize_control_tokens: bool = False,
    **options: Any,
) -> list[Generation]:
    """Answer prompts; greedy unless `do_sample=True` is among the options of `model.generate`.

    Args:
        prompt: a text, a list of texts, or one conversation as a list of {"role", "content"} messages.
        max_new_tokens: length limit of an answer.
        sparsity_bias: for this call only, instead of the configuration's: above 0 more heads run SA.
        budget: for this call only, level routers: divergence from the dense model to stay below, in nats per answer
            token, instead of the checkpoint's.
        kv_cache: for this call only: `full` keeps every token of every head, `elastic` only sink + window of streaming
            heads; the answers are the same.
        streamer: a transformers streamer, for one prompt.
        chat_template: put texts into the tokenizer's chat template as the user's message, as in training; False takes
            them as they are.
        tools: functions or JSON schemas that the chat template tells the model it may call.
        chat_template_kwargs: for this call only: variables of the chat template, such as `enable_thinking`, beside
            those of the checkpoint.
        sanitize_control_tokens: control tokens that messages spell out, such as `<|im_start|>`, stay text.
        **options: passed to `model.generate`; among them `prefill_chunk_size`: so many tokens of a prompt are read at a
            time, which needs less memory. Routers decide in the last piece, and those before it attend in full. Decode
            steps replay a CUDA graph where the decode kernel runs, except with beams, with the same numbers;
            `cuda_graph=False` launches them one by one.

    Returns:
        One `Generation` per prompt, in order; `num_return_sequences` of them per prompt, if that is among the options.

    Raises:
        ValueError: an empty prompt, one too long for the model, options that do not go together, or a model without
            routers or in training mode.
    """
    _check_model(model)
    _check_options(model, options, max_new_tokens)
    if budget is not None:
        if sparsity_bias is not None:
            raise ValueError(f"budget={budget} and sparsity_bias={sparsity_bias} both say how sparse; give one of them")
        sparsity_bias = bias_of_budget(model, budget)
    reading = (chat_template, tools, chat_template_kwargs, sanitize_control_tokens)
    encoded = [encode(item, tokenizer, *reading) for item in single_prompts(prompt)]
    answers = len(encoded) * (setting(model, options, "num_return_sequences") or 1)
    if streamer is not None and answers != 1:
        raise ValueError(f"a streamer shows one answer but {answers} were asked for; pass one prompt")
    check_length(encoded, model, max_new_tokens)
    options |= {"max_new_tokens": max_new_tokens, "streamer": streamer}
    return answer_tokens(model, tokenizer, encoded, sparsity_bias=sparsity_bias, kv_cache=kv_cache, **options)


def answer_tokens(
    model: CausalLM,
    tokenizer: Tokenizer,
    encoded: list[EncodedPrompt],
    *,
    max_new_tokens: int,
    sparsity_bias: float | None = None,
    kv_cache: str | None = None,
    cuda_graph: bool = True,
    **options: Any,
) -> list[Generation]:
    """Answer prompts that are token ids already, as one left-padded batch; `generate` says the rest.

    Their length is not checked: rows that a stopping criterion ends may share a batch with longer answers.
    """
    pad = options.get("pad_token_id", tokenizer.pad_token_id)
    pad = tokenizer.eos_token_id if pad is None else pad
    ids, mask = left_pad([prompt.ids for prompt in encoded], pad, model.device)
    spans = padded_spans(encoded, torch.device("cpu"))
    cache = new_cache(model, max_new_tokens, kv_cache)
    graph = cuda_graph and _one_token_at_a_time(model, options) and can_graph(model, architecture(model)["head_dim"])
    options.setdefault("do_sample", bool(getattr(options.get("generation_config"), "do_sample", False)))
    options |= {"max_new_tokens": max_new_tokens, "pad_token_id": pad}
    if setting(model, options, "stop_strings") is not None:
        options["tokenizer"] = tokenizer
    replayed = graphed(model, cache) if graph else nullcontext()
    with torch.no_grad(), biased(model, sparsity_bias), user_wrote(model, spans), replayed:
        output = model.generate(ids, attention_mask=mask, **given(cache), **options)
    each = len(output) // len(encoded)
    reports = route_report(model, cache)[:: len(cache.counts) // len(encoded)]  # a prompt's answers share its route
    reports = [report for report in reports for _ in range(each)]
    ends = setting(model, options, "eos_token_id")
    ends = [] if ends is None else torch.as_tensor(ends).flatten().tolist()
    answers = [_answer(row[ids.shape[1] :].tolist(), ends, pad) for row in output]
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    return [Generation(*parts) for parts in zip(texts, answers, reports, strict=True)]


def new_cache(model: CausalLM, max_new_tokens: int | Sequence[int] = 0, kv_cache: str | None = None) -> ElasticCache:
    """An empty KV cache for `model.generate(..., past_key_values=cache)`; it also remembers the routes.

    Args:
        model: an attached model.
        max_new_tokens: tokens to have room for beyond the prompt, so that no decode step moves memory; of several
            prompts, those of each or one number for all.
        kv_cache: `full` or `elastic`; default: as the model's configuration says.

    Raises:
        ValueError: a model without routers, or an unknown kind of cache.
    """
    config = elastic_config(model)
    if kv_cache is not None:
        config = replace(config, kv_cache=kv_cache)  # type: ignore[arg-type]
    windows = stock_layers(model.config)
    return ElasticCache(len(model.get_decoder().layers), config, max_new_tokens, windows=windows)


def route_report(model: CausalLM, cache: KVCache) -> list[RouteReport]:
    """What the routers decided for every sample of a cache that a generation filled: the one given to `model.generate`,
    or the `past_key_values` of what it returns with `return_dict_in_generate=True`. Under tensor parallelism of all
    heads, on every process, all of which call it; so are the bytes.

    Raises:
        ValueError: a cache without routes, or a model without routers.
    """
    record, sparse, head_dim = route_of(cache), elastic_config(model).sparse, architecture(model)["head_dim"]
    turns, whole = record.turns, handle_of(model).share.whole
    samples = turns[-1].route_LNK.shape[1]
    states = state_bytes(cache) // samples
    if isinstance(cache, ElasticCache):
        kind, held = cache.config.kv_cache, cache.sample_bytes()
    else:
        keyed = [layer for layer in cache.layers if hasattr(layer, "keys")]  # all but linear attention
        kind = "full"
        held = [sum(layer.keys.nbytes + layer.values.nbytes for layer in keyed) // samples + states] * samples
    held = whole(torch.tensor(held)[:, None]).sum(1).tolist()
    density = None if record.density is None else whole(record.density)
    turns = [
        replace(t, route_LNK=whole(t.route_LNK), density_LNK=None if t.density_LNK is None else whole(t.density_LNK))
        for t in turns
    ]
    return route_reports(
        turns[-1].route_LNK,
        record.prompt_lengths,
        sparse,
        head_dim=head_dim,
        element_size=model.dtype.itemsize,
        backend=backend_for(model.device, model.dtype, head_dim, sparse=sparse),
        density_LNK=density,
        turns=turns,
        windows=stock_layers(model.config),
        state_bytes=states,
        kv_cache=kind,
        held_N=held,
    )


def eos_ids(model: CausalLM) -> list[int]:
    """Tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _one_token_at_a_time(model: CausalLM, options: dict[str, Any]) -> bool:
    beams = setting(model, options, "num_beams") or 1
    return beams == 1 and all(setting(model, options, name) is None for name in VERIFIED)


def _answer(tokens: list[int], ends: list[int], pad: int | None) -> list[int]:
    """Tokens up to the end of the answer; rows that finished early are padded to the longest."""
    stop = next((i + 1 for i, token in enumerate(tokens) if token in ends), None)
    if stop is not None:
        return tokens[:stop]
    while tokens and tokens[-1] == pad and pad in ends:
        tokens = tokens[:-1]
    return tokens


def _check_model(model: CausalLM) -> None:
    if not is_attached(model):
        raise ValueError("this model has no routers; load it with elastic.load(path) or call elastic.attach(model)")


def _check_options(model: CausalLM, options: dict[str, Any], max_new_tokens: int) -> None:
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens!r} is not a whole number of 1 or more")
    own = [name for name in _OWN if name in options]
    if own:
        raise ValueError(f"generate sets {', '.join(own)} itself; for full control call model.generate")
    judge(model, options, _REFUSED)
    for name in ("max_new_tokens", "max_length"):
        value = getattr(options.get("generation_config"), name, None)
        if value is not None and (name, value) != ("max_new_tokens", max_new_tokens):
            raise ValueError(
                f"generation_config has {name}={value}, the call max_new_tokens={max_new_tokens}; give the call what "
                "you want and leave it out of the generation_config"
            )
