"""What `generate` of an attached model is asked for, judged in one place: its own keywords, a `generation_config` and
the model's own generation config (docs/design.md section 7).

A prompt, read in one pass or in pieces (`elastic.model.prefill`), decides the routes; what reads several tokens after
it verifies an answer under the same decision. Prompt lookup and assisted decoding would read their first candidates
together with the prompt, so they are given none until the prompt has been read.
"""

from functools import partial
from typing import Any

from elastic.cache.elastic_cache import ElasticCache
from elastic.cache.keyword import cache_of
from elastic.model.pass_state import AttachedState, generating
from elastic.model.prefill import Prefill
from elastic.protocols import CausalLM

REFUSED = {
    "assistant_early_exit": "an early exit leaves layers out, whose routes the cache would miss",
    "penalty_alpha": "contrastive search runs code from a hub on its own cache",
    "dola_layers": "contrasting layers needs code from a hub",
    "custom_generate": "foreign code may not keep the routes of a prompt",
    "use_mtp": "its draft layers have no routers",
}
VERIFIED = ("prompt_lookup_num_tokens", "assistant_model")


def setting(model: CausalLM, options: dict[str, Any], name: str) -> Any:
    """A generation's setting: the call's keyword, else its `generation_config`, else the model's; None if unset."""
    if name in options:
        return options[name]
    given = getattr(options.get("generation_config"), name, None)
    return getattr(model.generation_config, name, None) if given is None else given


def judge(model: CausalLM, options: dict[str, Any], refused: dict[str, str] = REFUSED) -> bool:
    """Whether the generation verifies candidates, several tokens at a time.

    Raises:
        ValueError: a model in training mode, or settings under which a prompt's decision could not hold.
    """
    if model.training:
        raise ValueError("the model is in training mode, where routers draw at random; call model.eval() first")
    for name, reason in refused.items():
        if (value := setting(model, options, name)) is not None and value is not False:
            raise ValueError(f"{name}={value!r} is not supported: {reason}; leave it out")
    if setting(model, options, "use_cache") is False:
        raise ValueError("use_cache=False is not supported: routes live on the cache; leave it out")
    verified = [name for name in VERIFIED if setting(model, options, name) is not None]
    _check_pieces(model, options, verified)
    handle = getattr(model, "_elastic_handle", None)
    sparse = None if handle is None else handle.state.config_in_force().sparse
    if verified and sparse is not None and sparse.chooses_in_steps:
        raise ValueError(
            f"{verified[0]} verifies several tokens at once, but heads of {sparse.name} choose key blocks for every "
            "token; leave it out"
        )
    if verified and handle is not None and None in handle.state.windows.values():
        raise ValueError(
            f"{verified[0]} takes tokens back, but the backbone's linear attention keeps a state instead of tokens; "
            "leave it out"
        )
    cache = cache_of(options)
    if verified and hasattr(setting(model, options, "assistant_model"), "_elastic_handle"):
        raise ValueError("the assistant model has routers, which would route each of its drafts; detach it first")
    if verified and isinstance(cache, ElasticCache) and cache.config.kv_cache == "elastic":
        raise ValueError(
            f"{verified[0]} takes tokens back, which streaming heads of an elastic KV cache cannot; use kv_cache='full'"
        )
    if verified and cache is not None and cache.get_seq_length():
        raise ValueError(
            f"{verified[0]} came with a cache of {cache.get_seq_length()} tokens; start from an empty cache"
        )
    return bool(verified)


def _check_pieces(model: CausalLM, options: dict[str, Any], verified: list[str]) -> None:
    size = setting(model, options, "prefill_chunk_size")
    if size is None:
        return
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"prefill_chunk_size={size!r} is not a whole number of 1 or more tokens")
    if verified:
        raise ValueError(
            f"prefill_chunk_size={size} and {verified[0]} do not go together: transformers' assisted decoding reads a "
            "prompt in one pass; leave one of them out"
        )
    if options.get("inputs_embeds") is not None:
        raise ValueError(
            f"prefill_chunk_size={size} came with inputs_embeds; pieces are cut from input_ids, pass those"
        )


class Generate:
    """A model's `generate`, judged first. Callable in place of the method; copies with its model."""

    def __init__(self, model: CausalLM, state: AttachedState) -> None:
        self.model, self.state, self.inner = model, state, model.generate
        self.__wrapped__ = self.inner  # for those who read the signature

    def __call__(self, *args: Any, **options: Any) -> Any:
        if len(args) > 1:
            args, options = args[:1], {"generation_config": args[1], **options, **_positional(args[2:])}
        with generating(self.state, judge(self.model, options)):
            return self.inner(*args, **options)


def _positional(args: tuple[Any, ...]) -> dict[str, Any]:
    names = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "synced_gpus", "assistant_model")
    return dict(zip(names, args, strict=False))


class PromptFirst:
    """A candidate generator of transformers that offers nothing before the prompt has been read."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.begun = inner, False
        self.requires_model_outputs = inner.requires_model_outputs

    def get_candidates(self, input_ids: Any, **outputs: Any) -> Any:
        """Candidates [1, S + c] and their logits, or none."""
        found = self.inner.get_candidates(input_ids, **outputs)  # an assistant must see the prompt first, too
        if self.begun:
            return found
        self.begun = True
        return input_ids, None

    def update_candidate_strategy(self, input_ids: Any, scores: Any, num_matches: Any) -> None:
        """Tell the generator how many of its candidates were accepted."""
        if scores.shape[1] > 1:
            self.inner.update_candidate_strategy(input_ids, scores, num_matches)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["inner"], name)


def _prompt_first(make: Any, *args: Any, **settings: Any) -> PromptFirst:
    return PromptFirst(make(*args, **settings))


def watch(model: CausalLM, state: AttachedState) -> None:
    """Put the judge before a model's `generate`, and what it needs into the steps of it."""
    part: Any = model
    make = part._get_candidate_generator
    part.generate, part._get_candidate_generator = Generate(model, state), partial(_prompt_first, make)
    part._prefill = Prefill(model, state)


def unwatch(model: CausalLM) -> None:
    """Undo `watch`, whether or not it was called."""
    own = vars(model)
    if isinstance(own.get("generate"), Generate):
        before = own.pop("generate").inner
        if getattr(before, "__func__", None) is not type(model).generate:
            own["generate"] = before  # somebody else's, from before
        own.pop("_get_candidate_generator", None)
        own.pop("_prefill", None)
