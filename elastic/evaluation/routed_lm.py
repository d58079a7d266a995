"""lm-evaluation-harness' Hugging Face model with routed attention: routes follow from the context alone, of which
routers see what the user wrote; over-long prompts are cut in the middle, and every sample leaves its MSR, ESR, prefill
time and tokens.
"""

import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from elastic.cache.keyword import given
from elastic.config import SparseConfig
from elastic.data.context_length import context_length
from elastic.data.prompts import EncodedPrompt, left_pad, padded_spans, render, token_span, user_text
from elastic.inference.decode_graph import can_graph, graphed
from elastic.inference.generate import eos_ids, new_cache
from elastic.model.attach import elastic_config, last_routes, override_routes, route_of, user_wrote
from elastic.model.loading import architecture
from elastic.protocols import CausalLM, KVCache, Tokenizer
from elastic.routing.sparsity import esr, msr


@dataclass(frozen=True)
class PrefillStats:
    """What a sample's context came to.

    Attributes:
        msr, esr_last, esr_all: of its routes.
        prefill_seconds: of its batch, up to the first token's logits.
        tokens: of its context, after cutting.
        cut: tokens cut out of the middle.
    """

    msr: float
    esr_last: float
    esr_all: float
    prefill_seconds: float
    tokens: int
    cut: int


class _Context(NamedTuple):
    """A context about to be read.

    Attributes:
        text: as the harness gave it.
        prompt: what is left of it after cutting.
        cut: tokens cut out of the middle.
    """

    text: str
    prompt: EncodedPrompt
    cut: int


class RoutedLM(HFLM):  # type: ignore[misc]
    """An attached model under lm-evaluation-harness.

    Args:
        model: attached, frozen, in eval mode.
        tokenizer: pads on the left.
        route: what `override_routes` takes; None leaves the decision to the routers.
        batch_size: samples in one forward pass.
        max_length: tokens of prompt and answer; default the model's limit.
        sparse: modes and pattern sizes; default the model's own.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        route: int | Tensor | None,
        batch_size: int = 1,
        max_length: int | None = None,
        sparse: SparseConfig | None = None,
    ) -> None:
        limit = context_length(model.config)
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=min(max_length or limit, limit),
            backend="causal",
        )
        self.route, self.sparse = route, sparse or elastic_config(model).sparse
        self.prefill_stats: dict[str, PrefillStats] = {}
        self._waiting: list[_Context] = []
        self._encoded: dict[str, list[int]] = {}
        self._offsets: dict[str, list[tuple[int, int]]] = {}
        self._user: dict[str, tuple[int, int]] = {}  # characters of the user's words, by text

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Answers; the prompts are encoded all at once, on all cores, where the harness encodes each one twice."""
        start = self.tokenizer.decode(self.prefix_token_id)
        given = list(dict.fromkeys(r.args[0] for r in requests))
        rendered = [text for text in given if text in self._user]
        plain = [text for text in given if text not in self._user and not text.startswith(start)]
        for texts, special in ((rendered, False), (plain, True)):
            if texts and self.add_bos_token is None:
                encoded = self.tokenizer(texts, add_special_tokens=special, return_offsets_mapping=True)
                self._encoded |= dict(zip(texts, encoded["input_ids"], strict=True))
                self._offsets |= dict(zip(texts, encoded["offset_mapping"], strict=True))
        try:
            answers: list[str] = super().generate_until(requests, disable_tqdm)
            return answers
        finally:
            self._encoded, self._offsets = {}, {}

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as text, of which we remember what the user wrote."""
        text = render(chat_history, self.tokenizer, begun=not add_generation_prompt)
        self._user[text] = user_text(chat_history, self.tokenizer, begun=not add_generation_prompt)
        return text

    def _context(self, text: str, ids: list[int], limit: int | None) -> _Context:
        kept = cut_middle(ids, limit)
        user, cut = self._user_span(text, ids), len(ids) - len(kept)
        first = len(kept) // 2  # tokens before what was cut out
        begin, end = (place if place <= first else max(first, place - cut) for place in user)
        return _Context(text, EncodedPrompt(kept, (begin, end) if begin < end else (0, len(kept))), cut)

    def _user_span(self, text: str, ids: list[int]) -> tuple[int, int]:
        """Tokens of the user's words; a context that no chat template made counts whole."""
        characters = self._user.get(text)
        if characters is None:
            return 0, len(ids)
        offsets = self._offsets.get(text)
        if offsets is None:
            offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        begin, end = token_span(offsets, characters)
        added = len(ids) - len(offsets)  # tokens that the harness put before it
        return begin + added, end + added

    def tok_encode(self, string: str, *arguments: Any, **options: Any) -> list[int]:
        """Ids of a text."""
        known = None if arguments or options else self._encoded.get(string)
        if string in self._user and not arguments:
            options.setdefault("add_special_tokens", False)  # the chat template has written them
        return super().tok_encode(string, *arguments, **options) if known is None else known

    def tok_batch_encode(
        self, strings: Any, padding_side: str = "left", left_truncate_len: int | None = None, truncation: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, S], padded on the left; a prompt over the limit loses its middle."""
        if padding_side != "left" or truncation:
            raise ValueError(f"padding_side={padding_side!r}, truncation={truncation}; expected 'left' and False")
        encoded = [list(self.tok_encode(text)) for text in strings]
        pairs = zip(strings, encoded, strict=True)
        self._waiting = [self._context(text, ids, left_truncate_len) for text, ids in pairs]
        return left_pad(
            [context.prompt.ids for context in self._waiting], self.tokenizer.pad_token_id, torch.device("cpu")
        )

    @torch.no_grad()
    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation: Any) -> Tensor:
        """Ids [B, prompt + answer]; where the decode kernel runs, decode steps replay a CUDA graph."""
        if self.eot_token_id in eos_ids(self.model):  # where `generate` ends by itself, without decoding every step
            stop = [text for text in stop if text != self.tok_decode(self.eot_token_id, skip_special_tokens=False)]
        clock, graph = _Clock(self.device), can_graph(self.model, architecture(self.model)["head_dim"], self.sparse)
        generation |= {"stop": stop, "logits_processor": LogitsProcessorList([clock])}
        prompts = [context.prompt for context in self._waiting]
        spans = padded_spans(prompts, torch.device("cpu")) if prompts else None
        with override_routes(self.model, self.route, self.sparse), user_wrote(self.model, spans):
            ours = new_cache(self.model, max_length - context.shape[1], "full") if graph else None
            cache: KVCache = DynamicCache(config=self.model.config) if ours is None else ours
            with nullcontext() if ours is None else graphed(self.model, ours):
                output: Tensor = super()._model_generate(context, max_length, **given(cache), **generation)
        record = route_of(cache)
        assert record.prompt_lengths is not None and clock.seconds is not None  # the prefill has just run
        self._keep(record.route, record.density, record.prompt_lengths, clock.seconds)
        return output

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of continuations, samples packed into one row; the router sees the context only. A rolling
        window has no context of its own: all of it is the prompt, as when a model reads a text.
        """
        results: list[tuple[float, bool]] = []
        size = override_bs or int(self.batch_size)
        for start in range(0, len(requests), size):
            chunk = requests[start : start + size]
            self._waiting = [
                self._context(pair[0] if pair else "", ids, self.max_length + 1 - len(a)) for pair, ids, a in chunk
            ]
            prompts = [context.prompt for context in self._waiting]
            rows = [prompt.ids + answer[:-1] for prompt, (_, _, answer) in zip(prompts, chunk, strict=True)]
            rolling = [pair is None for pair, _, _ in chunk]
            prompts = [EncodedPrompt.whole(r) if w else p for p, r, w in zip(prompts, rows, rolling, strict=True)]
            logits, seconds = self._packed(rows, prompts)
            state = last_routes(self.model)
            self._keep(state.route, state.density, torch.tensor([len(prompt) for prompt in prompts]), seconds)
            for piece, (_, _, answer) in zip(torch.split(logits, [len(row) for row in rows]), chunk, strict=True):
                scores = F.log_softmax(piece[-len(answer) :].float(), dim=-1)
                target = torch.tensor(answer, device=scores.device)
                total = scores.gather(1, target[:, None]).sum()
                results.append((float(total), bool((scores.argmax(-1) == target).all())))
        return results

    def _packed(self, rows: list[list[int]], prompts: list[EncodedPrompt]) -> tuple[Tensor, float]:
        """Logits [S, vocabulary] of rows one after the other, and the seconds they took."""
        ends = torch.tensor([0, *map(len, rows)]).cumsum(0)
        lengths, users = (torch.tensor(part) for part in ([len(p) for p in prompts], [p.user for p in prompts]))
        spans = torch.stack([ends[:-1], ends[:-1] + lengths], dim=1)
        started = time.perf_counter()
        with override_routes(self.model, self.route, self.sparse):
            logits = self.model(
                input_ids=torch.tensor([[token for row in rows for token in row]], device=self.device),
                position_ids=torch.cat([torch.arange(len(row)) for row in rows])[None].to(self.device),
                cu_seq_lens=ends.to(torch.int32).to(self.device),
                prompt_spans=spans.to(self.device),
                user_spans=(ends[:-1, None] + users).to(self.device),
                use_cache=False,
            ).logits[0]
        return logits, time.perf_counter() - started

    def _keep(self, route_LNK: Tensor, density_LNK: Tensor | None, lengths_N: Tensor, seconds: float) -> None:
        route = route_LNK.detach().cpu().double()
        last, mean = esr(route, lengths_N.cpu(), self.sparse, density_LNK)
        for n, (text, prompt, cut) in enumerate(self._waiting):
            self.prefill_stats[text] = PrefillStats(
                float(msr(route)[n]), float(last[n]), float(mean[n]), seconds, len(prompt), cut
            )


def cut_middle(ids: list[int], limit: int | None) -> list[int]:
    """At most `limit` tokens: the first and the last half of it, the odd one at the end.

    Raises:
        ValueError: a limit below 1.
    """
    if limit is None or len(ids) <= limit:
        return ids
    if limit < 1:
        raise ValueError(
            f"the answer leaves {limit} tokens for the prompt; raise the length or ask for shorter answers"
        )
    first = limit // 2
    return ids[:first] + ids[len(ids) - (limit - first) :]


class _Clock(LogitsProcessor):
    """Seconds from its making to the first token's logits."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.started = device, time.perf_counter()
        self.seconds: float | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.seconds is None:
            if input_ids.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds = time.perf_counter() - self.started
        return scores
