"""The operator's contract on the CPU: the oracle against SDPA, the messages, the bit sets, the parameter block."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from elastic.kernels import attention_forward, bits_from_indices, bits_from_mask
from elastic.kernels.block_bits import mask_from_bits
from elastic.kernels.devices import kernel_path, launch_config
from elastic.kernels.params import MAP_BYTES, PARAMS_BYTES, Pattern, Ranges, pack_pointers, pack_sizes
from elastic.visibility import visible

SIZE = {"sink": 4, "window": 8, "granule": "token", "block": 64}


def operands(tokens: int = 40):
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(2, tokens, 4, 64, generator=gen)
    k, v = (torch.randn(2, tokens, 2, 64, generator=gen) for _ in range(2))
    return q, k, v, torch.tensor([[0, 1], [1, 0]], dtype=torch.int32)


def test_oracle_equals_sdpa() -> None:
    q, k, v, mode = operands()
    out, lse = attention_forward(q, k, v, mode, **SIZE)
    position = torch.arange(40)
    streaming = visible(position[:, None], position[None], **SIZE)
    masks = torch.stack([position[None] <= position[:, None], streaming])[mode.long()].repeat_interleave(2, dim=1)
    want = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=masks, enable_gqa=True)
    torch.testing.assert_close(out.transpose(1, 2), want)
    assert lse.shape == (2, 4, 40) and lse.isfinite().all()


def test_packed_equals_separate() -> None:
    q, k, v, _ = operands()
    cuts = torch.tensor([0, 15, 40], dtype=torch.int32)
    begin, end, row = cuts[:-1].clone(), cuts[1:].clone(), torch.zeros(2, dtype=torch.int32)
    mode = torch.tensor([[0, 1], [1, 1]], dtype=torch.int32)
    spans = {"begin_q": begin, "end_q": end, "begin_k": begin, "end_k": end, "row": row}
    out, lse = attention_forward(q[:1], k[:1], v[:1], mode, **SIZE, **spans)
    for n, (b, e) in enumerate(((0, 15), (15, 40))):
        alone, _ = attention_forward(q[:1, b:e], k[:1, b:e], v[:1, b:e], mode[n : n + 1], **SIZE)
        torch.testing.assert_close(out[:, b:e], alone)
    assert lse.isfinite().all()


def test_operator_contract() -> None:
    operator = torch.ops.elastic.attention_forward
    torch.library.opcheck(operator, (*operands(), 4, 8, "token", 64, 0.1, None, None, None, None, None, None))


def test_bits() -> None:
    mask = torch.rand(3, 5, 70, generator=torch.Generator().manual_seed(0)) < 0.4
    bits = bits_from_mask(mask)
    assert bits.shape == (3, 5, 3) and torch.equal(mask_from_bits(bits)[..., :70], mask)
    counts = mask.sum(-1)
    indices = mask.int().argsort(dim=-1, descending=True, stable=True)
    assert torch.equal(bits_from_indices(indices, counts, 70), bits)


def test_parameter_block_has_the_declared_size() -> None:
    q, k, _, mode = operands()
    sizes = pack_sizes(q, k, k, q, mode, None, Pattern(0, 1, "token", 64, 0.1))
    pointers = pack_pointers(q, k, k, q, q, mode, None, Ranges(), mode)
    assert 4 * MAP_BYTES + len(pointers) + len(sizes) == PARAMS_BYTES


def test_launch_choices() -> None:
    assert launch_config((9, 0), 132, 128, 1, 10**6).arch == "sm_90a"
    assert launch_config((9, 0), 132, 128, 512, 10**6).shared_bytes <= 232448
    assert launch_config((8, 6), 80, 128, 1, 3).grid == 3
    assert kernel_path(torch.device("cpu")) == "oracle (PyTorch)"
    with pytest.raises(ValueError, match=r"7\.5.*8\.0"):
        launch_config((7, 5), 40, 128, 1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"granule": "page"}, "granule='page'"),
        ({"window": 0}, "window=0"),
        ({"granule": "block", "sink": 3}, "not multiples of block=64"),
        ({"granule": "block", "block": 48, "sink": 48, "window": 96}, "block=48 is not a power of two"),
        ({"scale": -1.0}, "scale=-1.0"),
        ({"begin_q": torch.zeros(3, dtype=torch.int32)}, r"begin_q is torch.int32 \[3\]"),
        ({"bits": torch.zeros(1, dtype=torch.int32)}, "bits is torch.int32"),
    ],
)
def test_messages(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_forward(*operands(), **{**SIZE, **change})


def test_messages_about_operands() -> None:
    q, k, v, mode = operands()
    with pytest.raises(ValueError, match="do not belong together"):
        attention_forward(q, k, v[:, 1:], mode, **SIZE)
    with pytest.raises(ValueError, match="expected contiguous"):
        attention_forward(q, k, v, mode.long(), **SIZE)
    with pytest.raises(ValueError, match="give row"):
        attention_forward(q, k, v, mode[:1], **SIZE)
