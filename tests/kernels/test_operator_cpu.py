"""The operator's contract on the CPU: the oracle against SDPA, the messages, the bit sets, the parameter block."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from elastic.kernels import attention_forward, bits_from_indices, bits_from_mask
from elastic.kernels.block_bits import mask_from_bits
from elastic.kernels.devices import kernel_path, launch_config, selection_config
from elastic.kernels.params import (
    MAP_BYTES,
    PARAMS_BYTES,
    SELECTION_BYTES,
    Pattern,
    Ranges,
    pack_pointers,
    pack_selection,
    pack_sizes,
)
from elastic.visibility import visible

SIZE = {"sink": 4, "window": 8, "granule": "token", "block": 64}
PATTERN = Pattern(**SIZE)


def operands(tokens: int = 40):
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(2, tokens, 4, 64, generator=gen)
    k, v = (torch.randn(2, tokens, 2, 64, generator=gen) for _ in range(2))
    return q, k, v, torch.tensor([[0, 1], [1, 0]], dtype=torch.int32)


def test_oracle_equals_sdpa() -> None:
    q, k, v, mode = operands()
    out, lse = attention_forward(q, k, v, mode, PATTERN)
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
    out, lse = attention_forward(q[:1], k[:1], v[:1], mode, PATTERN, Ranges(begin, end, begin, end, row))
    for n, (b, e) in enumerate(((0, 15), (15, 40))):
        alone, _ = attention_forward(q[:1, b:e], k[:1, b:e], v[:1, b:e], mode[n : n + 1], PATTERN)
        torch.testing.assert_close(out[:, b:e], alone)
    assert lse.isfinite().all()


def contract_cases():
    """Arguments of the operator by name: whole rows, views of [B, H, S, D], packed samples, block bits, sinks."""
    q, k, v, mode = operands()
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    cuts = torch.tensor([0, 15, 40], dtype=torch.int32)
    begin, end = cuts[:-1].clone(), cuts[1:].clone()
    packed = (begin, end, begin, end, torch.zeros(2, dtype=torch.int32), None, None)
    bits = bits_from_mask(torch.ones(2, 4, 1, 1))
    whole = (4, 8, "token", 64, 0.1)
    return {
        "whole": (q, k, v, mode, *whole, *[None] * 7),
        "views": (*views, mode, *whole, *[None] * 7),
        "packed": (q[:1], k[:1], v[:1], mode, *whole, *packed),
        "bits": (q, k, v, 2 * torch.ones_like(mode), *whole, *[None] * 5, bits, None),
        "sinks": (q, k, v, mode, *whole, *[None] * 6, torch.zeros(4)),
    }


@pytest.mark.parametrize("name", ["whole", "views", "packed", "bits", "sinks"])
def test_operator_contract(name: str) -> None:
    torch.library.opcheck(torch.ops.elastic.attention_forward, contract_cases()[name])


def test_torch_compile_sees_one_operator() -> None:
    q, k, v, mode = operands()
    seen = []

    def backend(graph, _inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def layer(q, k, v, mode):
        return attention_forward(q, k, v, mode, PATTERN)[0] * 2

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    assert torch.equal(compiled(q, k, v, mode), layer(q, k, v, mode))
    assert [name for name in seen if "elastic" in name] == ["elastic.attention_forward"]


@pytest.mark.parametrize("block", [64, 128])
def test_block_sparse_oracle_equals_sdpa(block: int) -> None:
    """Fewer queries than keys, another mask per query head; a query that sees nothing answers 0 and -inf."""
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(1, 300, 4, 64, generator=gen)
    k, v = (torch.randn(1, 430, 2, 64, generator=gen) for _ in range(2))
    mask = torch.rand(1, 4, 3, -(-430 // block), generator=gen) < 0.5
    mode = torch.full((1, 2), 2, dtype=torch.int32)
    out, lse = attention_forward(q, k, v, mode, Pattern.without_streaming(block), bits=bits_from_mask(mask))
    seen = torch.zeros(4, 300, 430, dtype=torch.bool)
    for head in range(4):
        for i in range(300):
            for n in mask[0, head, i // 128].nonzero().flatten().tolist():
                seen[head, i, n * block : min((n + 1) * block, i + 131)] = True
    want = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=seen[None], enable_gqa=True)
    some = seen.any(-1)[None]
    torch.testing.assert_close(out.transpose(1, 2)[some], want[some])
    assert (
        (lse[~some] == float("-inf")).all() and (out.transpose(1, 2)[~some] == 0).all() and lse[some].isfinite().all()
    )


def test_parts_merge_to_the_whole() -> None:
    """Attention over a set of blocks and over the others, weighted by their LSEs, is attention over all."""
    q, k, v, mode = operands(500)
    chosen = torch.rand(2, 4, 4, 8, generator=torch.Generator().manual_seed(1)) < 0.5
    whole, whole_lse = attention_forward(q, k, v, torch.zeros_like(mode), PATTERN)
    parts = [
        attention_forward(q, k, v, torch.full_like(mode, 2), PATTERN, bits=bits_from_mask(m)) for m in (chosen, ~chosen)
    ]
    lse = torch.stack([part[1] for part in parts])
    torch.testing.assert_close(lse.logsumexp(0), whole_lse)
    weight = (lse - whole_lse).exp().transpose(2, 3).unsqueeze(-1)
    torch.testing.assert_close(sum(w * part[0] for w, part in zip(weight, parts, strict=True)), whole)


def test_bits() -> None:
    mask = torch.rand(3, 5, 70, generator=torch.Generator().manual_seed(0)) < 0.4
    bits = bits_from_mask(mask)
    assert bits.shape == (3, 5, 3) and torch.equal(mask_from_bits(bits)[..., :70], mask)
    counts = mask.sum(-1)
    indices = mask.int().argsort(dim=-1, descending=True, stable=True)
    assert torch.equal(bits_from_indices(indices, counts, 70), bits)
    assert torch.equal(
        bits_from_indices(indices.flip(-1), torch.full_like(counts, 70), 70), bits_from_mask(mask | True)
    )


@pytest.mark.parametrize(
    ("indices", "counts", "message"),
    [
        ([[0, 1]], [2, 2], r"indices \[1, 2\] and counts \[2\] do not belong together"),
        ([[0, 7]], [2], "name key block 7; expected 0 to 6"),
        ([[-1, 7]], [1], "name key block -1"),
        ([[0, 1]], [3], "counts hold 3; expected 0 to 2"),
        ([[0, 1]], [-1], "counts hold -1"),
    ],
)
def test_wrong_lists_are_named(indices: list, counts: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bits_from_indices(torch.tensor(indices), torch.tensor(counts), 7)


def test_parameter_block_has_the_declared_size() -> None:
    q, k, _, mode = operands()
    sizes = pack_sizes(q, k, k, q, mode, None, Pattern(0, 1, "token", 64, 0.1))
    pointers = pack_pointers(q, k, k, q, q, mode, None, Ranges(), mode)
    assert 4 * MAP_BYTES + len(pointers) + len(sizes) == PARAMS_BYTES


def test_selection_fits_the_declared_sizes() -> None:
    """Its parameters, and the shared memory of a CTA: a warp's masses take what the samples' schedule leaves."""
    assert len(pack_selection(0.9, None, 0, 0, 32, 32)) + PARAMS_BYTES == SELECTION_BYTES
    sizes = ((1, 3, 5), (1, 2048, 4096), (512, 2048, 4096))
    small, long, packed = (selection_config(132, *one) for one in sizes)
    assert (small.grid, small.shared_units, long.grid) == (3, 32, 132)
    assert long.shared_units % 32 == packed.shared_units % 32 == 0 and long.shared_units > packed.shared_units > 0
    assert small.shared_bytes < packed.shared_bytes <= 232448 and long.shared_bytes <= 232448


def test_launch_choices() -> None:
    assert launch_config((9, 0), 132, 128, 1, 10**6).arch == "sm_90a"
    assert launch_config((9, 0), 132, 128, 512, 10**6).shared_bytes <= 232448
    assert launch_config((8, 6), 80, 128, 1, 3).grid == 3
    for capability, arch in (((8, 0), "sm_80"), ((8, 9), "sm_89"), ((10, 0), "sm_100"), ((12, 0), "sm_120")):
        chosen = launch_config(capability, 100, 128, 1, 10**6)
        assert (chosen.name, chosen.arch) == ("attention_forward_sm80", arch)
    assert kernel_path(torch.device("cpu")) == "oracle (PyTorch)"
    with pytest.raises(ValueError, match=r"7\.5.*8\.0"):
        launch_config((7, 5), 40, 128, 1, 1)
