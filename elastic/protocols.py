"""What this project uses of transformers' objects, as types: the causal LM with its parts, the KV cache, the tokenizer.

Protocols describe models from outside: whatever has these members fits, and nothing needs to be subclassed. They name
what is read and called here, no more, and importing them loads neither torch nor transformers.
Legend: B rows, S tokens, V vocabulary, K KV heads, D head dim, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, overload

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle


class Module(Protocol):
    """What is used of `torch.nn.Module` where a protocol must be one too, which cannot inherit from a class.

    Attributes:
        training: in training mode routers sample.
    """

    training: bool
    _modules: dict[str, nn.Module | None]

    @property
    def forward(self) -> Callable[..., Any]: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...

    def children(self) -> Iterator[nn.Module]: ...

    def requires_grad_(self, requires_grad: bool = True) -> Self: ...

    def train(self, mode: bool = True) -> Self: ...

    def eval(self) -> Self: ...

    def add_module(self, name: str, module: nn.Module | None) -> None: ...

    def register_forward_pre_hook(self, hook: Callable[..., Any], *, with_kwargs: bool = False) -> RemovableHandle: ...

    def register_forward_hook(self, hook: Callable[..., Any]) -> RemovableHandle: ...


class KeyProjection(Protocol):
    """What routing reads of an attention module.

    Attributes:
        layer_idx: place of the layer, counted from 0.
        head_dim: D.

    The projection of keys is `k_proj` or part of `qkv_proj`, and a norm of keys, `k_norm`, exists in some families
    only: `elastic.model.families` knows.
    """

    layer_idx: int
    head_dim: int


class Norm(Protocol):
    """RMS norm over the last axis, with a weight for each of its elements."""

    weight: nn.Parameter

    def forward(self, hidden: Tensor, /) -> Tensor: ...


class AttentionModule(KeyProjection, Module, Protocol):
    """The attention of one decoder layer; `attention_dropout`, a probability, is 0 in every backbone that `attach`
    takes.
    """

    attention_dropout: float


class DecoderLayer(Module, Protocol):
    """Attention and MLP with their norms; the MLP's name differs by family (`elastic.model.families.feed_forward`)."""

    self_attn: AttentionModule


class Decoder(Module, Protocol):
    """The model without its output head."""

    @property
    def layers(self) -> Layers: ...

    def __call__(self, *args: Any, **kwargs: Any) -> DecoderOutput: ...


class DecoderOutput(Protocol):
    """What a decoder returns: `last_hidden_state` [B, S, E], after the last norm."""

    @property
    def last_hidden_state(self) -> Tensor: ...


class Layers(Protocol):
    """The decoder's layers in order."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[DecoderLayer]: ...

    def __getitem__(self, index: int) -> DecoderLayer: ...


class CausalLM(Module, Protocol):
    """A transformers causal LM.

    Attributes:
        config: its settings, which differ by family; `elastic.model.loading.architecture` reads those of the shape.
        device, dtype: of its weights.
        generation_config: says which tokens end an answer.
    """

    @property
    def config(self) -> Any: ...

    @property
    def generation_config(self) -> Any: ...

    def __call__(self, *args: Any, **kwargs: Any) -> CausalLMOutput: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def get_decoder(self) -> Decoder: ...

    def get_output_embeddings(self) -> nn.Linear: ...

    def set_attn_implementation(self, name: str, /) -> None:
        """Choose by name among the attention functions that transformers knows; `attach` registers one."""
        ...

    def gradient_checkpointing_enable(self, settings: dict[str, Any], /) -> None: ...

    def generate(self, inputs: Tensor, **options: Any) -> Any:
        """Ids [B, S + new tokens] of prompts [B, S] and their answers, or an object that the options ask for."""
        ...


class CausalLMOutput(Protocol):
    """What a causal LM returns: `logits` [B, S, V]."""

    @property
    def logits(self) -> Tensor: ...


class KVCache(Protocol):
    """Keys and values of a generation; the routes of its prefill are kept on it as an attribute.

    Attributes:
        layers: by decoder layer; DynamicCache's have `keys` and `values`, [B, K, S, D].
    """

    @property
    def layers(self) -> Sequence[Any]: ...

    def get_seq_length(self) -> int:
        """Tokens in the cache, padding included."""
        ...


class Encoding(Protocol):
    """Tokens of one text; with `return_offsets_mapping=True` also the characters (begin, end) of each."""

    @overload
    def __getitem__(self, key: Literal["input_ids"], /) -> list[int]: ...

    @overload
    def __getitem__(self, key: Literal["offset_mapping"], /) -> list[tuple[int, int]]: ...


class Tokenizer(Protocol):
    """A fast tokenizer of transformers.

    Attributes:
        chat_template: Jinja text, or None where the model has no chat format.
        name_or_path: what it was loaded by.
        backend_tokenizer: the `tokenizers.Tokenizer` that does the work.
    """

    chat_template: str | None
    name_or_path: str
    padding_side: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None

    @property
    def is_fast(self) -> bool: ...

    @property
    def eos_token_id(self) -> int | None: ...

    @property
    def pad_token_id(self) -> int | None: ...

    @property
    def all_special_tokens(self) -> list[str]: ...

    @property
    def backend_tokenizer(self) -> Any: ...

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """By id, what was added to the vocabulary: `content`, and whether it is `special`."""
        ...

    def __len__(self) -> int: ...

    def __call__(self, text: str, **options: Any) -> Encoding: ...

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any:
        """The conversation as the model reads it: text with `tokenize=False`."""
        ...

    def decode(self, token_ids: list[int] | Tensor, **options: Any) -> Any:
        """Text of one answer; a list of texts for rows."""
        ...

    def get_vocab(self) -> dict[str, int]: ...


if TYPE_CHECKING:
    from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast

    def _described(
        model: LlamaForCausalLM, cache: DynamicCache, tokenizer: PreTrainedTokenizerFast
    ) -> tuple[CausalLM, KVCache, Tokenizer]:
        """transformers' own classes fit, as users annotate them; mypy is the test."""
        return model, cache, tokenizer
