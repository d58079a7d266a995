"""The methods that choose key blocks: each against its oracle and its paper's own setting, and in a plan."""

import itertools
import random

import pytest
import torch

from elastic.attention import block_selection, reference
from elastic.attention.block_selection import density
from elastic.attention.head_plan import HeadPlan
from elastic.attention.layout import batch_layout, packed_layout
from elastic.attention.modes import MODE_IDS
from elastic.attention.routed import backend_for, fused, routed_attention
from elastic.attention.selection import compressed, flashprefill, flexprefill, pooling
from elastic.attention.selection.sample import AttentionSample
from elastic.attention.selection.table import SELECTIONS
from elastic.cache.decode_attention import decode_attention
from elastic.config import CHOOSING, CHOOSING_IN_STEPS, SHORT, SparseConfig
from elastic.kernels.block_bits import mask_from_bits, query_block

CPU = torch.device("cpu")
SCALE = 0.25
NAMES = list(SELECTIONS)
ROWS = 1000


def sparse_of(name: str, block: int = 4, **sizes) -> SparseConfig:
    """A configuration whose second mode leaves out much."""
    sizes = {
        **{"sink": block, "window": 2 * block, "stride": min(4, block), "threshold": 0.5, "top_k": 4},
        **{"chunk": 2 * block, "min_budget": block},
        **sizes,
    }
    return SparseConfig("full", name, block=block, **sizes)


def random_sample(
    name: str, seed: int, dtype: torch.dtype = torch.float32, dim: int = 16,
    blocks: tuple[int, ...] = (4, 8, 16, 64), lengths: tuple[int, ...] = (1, 5, 37, 64, 130, 257),
) -> AttentionSample:  # fmt: skip
    """Any length, grouping, number of cached keys, block and setting."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    block, kv_heads, group = rng.choice(blocks), rng.choice((1, 2, 3)), rng.choice((1, 2, 4))
    length, past = rng.choice(lengths), rng.choice((0, 0, 0, 5, 64, 131))
    q = 2 * torch.randn(kv_heads * group, length, dim, generator=generator)
    k = 2 * torch.randn(kv_heads, length + past, dim, generator=generator)
    sizes = {"sink": block * rng.choice((0, 1, 2)), "window": block * rng.choice((1, 2, 4))}
    sizes |= {"top_k": rng.choice((None, 1, 2, 4)), "chunk": block * rng.choice((1, 2, 4))}
    sizes |= {"threshold": rng.choice((0.1, 0.5, 0.9)), "min_budget": block * rng.choice((1, 2))}
    return AttentionSample(q.to(dtype), k.to(dtype), sparse_of(name, block, **sizes), dim**-0.5)


def random_samples(name: str, dtype: torch.dtype):
    """Samples, their choices and those of the oracle, until there are `ROWS` rows of bits."""
    rows, seed = 0, 0
    while rows < ROWS:
        sample = random_sample(name, seed, dtype)
        found, wanted = SELECTIONS[name].choose(sample), SELECTIONS[name].oracle(sample)
        assert found.shape == wanted.shape
        yield sample, found, wanted
        rows, seed = rows + found.shape[0] * found.shape[1], seed + 1


@pytest.mark.parametrize("name", NAMES)
def test_the_choice_is_the_oracles_in_fp32(name):
    some = 0
    for sample, found, wanted in random_samples(name, torch.float32):
        assert torch.equal(found, wanted)
        assert not (found & ~sample.seen()).any() and (found | ~sample.own()).all()
        some += int((sample.seen() & ~found).sum())
    assert some > ROWS  # it leaves out something


@pytest.mark.parametrize("name", NAMES)
def test_the_choice_is_within_a_block_of_the_oracles_in_bf16(name):
    """The oracle sees the same bf16 values, as wide numbers."""
    far, rows = 0, 0
    for _, found, wanted in random_samples(name, torch.bfloat16):
        one_way, other = (found & ~wanted).sum(-1), (wanted & ~found).sum(-1)
        far, rows = far + int((torch.maximum(one_way, other) > 1).sum()), rows + one_way.numel()
    assert far <= rows / 1000, f"{far} of {rows} rows differ by more than a block"


def test_chunks_of_scores_change_nothing(monkeypatch):
    for name, module in (("nsa", compressed), ("flashprefill", flashprefill)):
        for seed in range(6):
            sample = random_sample(name, seed)
            found = SELECTIONS[name].choose(sample)
            with monkeypatch.context() as patch:
                patch.setattr(module, "_CHUNK_SCORES", 1)
                assert torch.equal(SELECTIONS[name].choose(sample), found)


def one_head(name: str, length: int, block: int, q=None, k=None, **sizes) -> AttentionSample:
    """One query head of dimension 8 over `length` keys, of random values unless given."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, length, 8, generator=generator) if q is None else q
    k = torch.randn(1, length, 8, generator=generator) if k is None else k
    return AttentionSample(q, k, sparse_of(name, block, **sizes), 8**-0.5)


@pytest.mark.parametrize(("length", "sparsity"), [(8192, 0.8125), (32768, 0.9531)])
def test_the_published_setting_of_moba(length, sparsity):
    """Section 3.1: blocks of 512, top 3, "sparsity up to 81.25 %" at 8K and 95.31 % at 32K."""
    chosen = SELECTIONS["moba"].choose(one_head("moba", length, 128, top_k=None, chunk=512))
    assert 1 - chosen[0, -1].double().mean().item() == pytest.approx(sparsity, abs=5e-5)
    assert (chosen[0].sum(-1)[12:] >= 9).all()  # two chunks and the part of its own that a query block sees


def test_the_published_setting_of_nsa():
    """Section 4.1: l = 32, d = 16, blocks of 64, n = 16 with one initial and two local blocks, window 512: at most
    16 * 64 + 512 tokens; a query block of 128 holds one block more than a query's window."""
    assert compressed.cell_stride(64) == 16
    alone = SELECTIONS["nsa"].choose(one_head("nsa", 4096, 64, top_k=None, window=64))
    assert (alone[0].sum(-1)[8:] == 16).all() and alone[0, :, 0].all()
    chosen = SELECTIONS["nsa"].choose(one_head("nsa", 4096, 64, top_k=None, window=512))
    assert (chosen[0].sum(-1) <= 16 + 9 - 2).all() and (chosen & alone == alone).all()
    assert all(chosen[0, m, 2 * m - 7 : 2 * m + 2].all() for m in range(4, 32))


def test_the_published_setting_of_infllm():
    """Section 4.1 and MiniCPM4.1's sparse_config: blocks of 64, 1 initial, 63 chosen, 32 local, 6144 tokens for a
    query, and for a query block of 128 the one more that its second half's window begins with."""
    chosen = SELECTIONS["infllm"].choose(one_head("infllm", 12800, 64, top_k=None, sink=64, window=2048))
    assert (chosen[0].sum(-1)[48:] == 96 + 1).all() and chosen[0, :, 0].all()
    assert all(chosen[0, m, 2 * m - 31 : 2 * m + 2].all() for m in range(16, 100))


def test_the_published_settings_of_flexprefill():
    """Algorithms 3 and 4, min_budget 1024 in blocks of 128 (experiments/scripts/flex_prefill/ruler.sh)."""
    length, block = 4096, 128
    # Mass on the first token alone: one line would hold gamma, the budget makes it 8 columns and 8 diagonals. One of
    # these is that of the last query block and the first token, where other query blocks have nothing.
    k = torch.zeros(1, length, 8)
    k[0, 0, 0] = 60.0
    q = torch.zeros(1, length, 8)
    q[..., 0] = 1.0
    sample = one_head("flexprefill", length, block, q, k, threshold=0.95, min_budget=1024)
    chosen = SELECTIONS["flexprefill"].choose(sample)[0]
    assert (chosen.sum(-1)[16:] == 8 + 7).all() and chosen[:, 0].all() and chosen.diagonal().all()
    assert chosen.sum(-1)[:8].tolist() == list(range(1, 9))  # as many as are seen
    # Attention that the means tell exactly is query aware, and its pairs hold gamma of the estimate.
    flat = one_head("flexprefill", length, block, q, torch.zeros_like(k), threshold=0.9, min_budget=128)
    chosen = SELECTIONS["flexprefill"].choose(flat)[0]
    share = torch.ones(32, 32).tril() / torch.arange(1, 33)[:, None]
    held = (share * chosen).sum().item() / 32
    assert 0.9 <= held <= 0.9 + 2 / 32 and flexprefill.TAU == 0.1
    assert flexprefill.distance(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0])) == pytest.approx(0.4645, abs=1e-4)


def test_the_published_setting_of_flashprefill():
    """alpha 0.12, sink 2 and window 4 blocks of 128, the last 2 query blocks in full (patches/patch_loader_vllm_*.py,
    qwen3moe)."""
    length, block, alpha = 4096, 128, 0.12
    k, q = torch.zeros(1, length, 8), torch.zeros(1, length, 8)
    q[..., 0] = 8**0.5
    share = torch.zeros(32)
    for n, of_largest in ((10, 1.0), (11, 0.13), (12, 0.11), (13, 0.121), (14, 0.119)):
        share[n] = of_largest
        k[0, n * block : (n + 1) * block, 0] = 10 + torch.tensor(of_largest).log()
    sizes = {"threshold": alpha, "sink": 256, "window": 512}
    chosen = SELECTIONS["flashprefill"].choose(one_head("flashprefill", length, block, q, k, **sizes))[0]
    assert all(chosen[m].nonzero()[:, 0].tolist() == [0, 1, 10, 11, 13, *range(m - 3, m + 1)] for m in range(20, 30))
    assert chosen[-2:].sum(-1).tolist() == [31, 32]


def operands(rows, queries, keys, heads=4, kv_heads=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, heads, queries, 16), (rows, kv_heads, keys, 16), (rows, kv_heads, keys, 16))
    return tuple((s * torch.randn(shape, generator=generator)) for shape, s in zip(shapes, (3, 3, 1), strict=True))


def oracle_mask(q, k, sparse):
    """What the choosing heads of whole rows see, [B, H, Lq, Lk], by the oracle."""
    queries, keys = q.shape[2], k.shape[2]
    samples = [AttentionSample(q[row], k[row], sparse, SCALE) for row in range(q.shape[0])]
    chosen = torch.stack([SELECTIONS[sparse.route1].oracle(sample) for sample in samples])
    blocks = chosen.repeat_interleave(q.shape[1] // chosen.shape[1], 1).repeat_interleave(sparse.block, -1)[..., :keys]
    rows = blocks.repeat_interleave(query_block(sparse.block), -2)[:, :, :queries]
    return rows & (torch.arange(keys) <= torch.arange(keys - queries, keys)[:, None])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block", [4, 64])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (193, 193), (150, 290)])
def test_mixed_routes_attend_to_the_oracles_blocks(name, block, queries, keys):
    sparse, route = sparse_of(name, block), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    q, k, v = operands(2, queries, keys)
    plan = HeadPlan.build(route, sparse, batch_layout(2, queries, keys - queries, CPU))
    mask = oracle_mask(q, k, sparse)
    wide = (x.double() for x in (q, k, v))
    found = routed_attention(q, k, v, route, plan, SCALE)
    causal = torch.arange(keys) <= torch.arange(keys - queries, keys)[:, None]
    runs = [torch.where(route[:, :, None, None].repeat_interleave(2, 1) > 0.5, mask, causal)]
    expected = reference_output(*wide, runs[0])
    torch.testing.assert_close(found.output, expected, rtol=0, atol=1e-5)
    if block == 64:  # the operators take no smaller blocks
        torch.testing.assert_close(fused(q, k, v, route, found.plan, SCALE), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        density(found.plan)[route > 0.5],
        (mask.double().sum((-1, -2)) / causal.sum()).unflatten(1, (2, 2)).mean(-1)[route > 0.5],
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block", [4, 64])
def test_a_decode_step_chooses_where_the_paper_does(name, block):
    """NSA's and InfLLM-V2's heads choose by the one query; the others attend to the whole cache."""
    sparse, keys = sparse_of(name, block), 900
    q, k, v = operands(2, 1, keys)
    mask = torch.ones(2, keys, dtype=torch.long)
    mask[1, :77] = 0
    route = torch.ones(2, 2)
    plan = HeadPlan.build(route, sparse, batch_layout(2, 1, keys - 1, CPU, mask))
    outputs = [decode_attention(q, k, v, plan, SCALE, None), routed_attention(q, k, v, route, plan, SCALE).output]
    for row, pad in ((0, 0), (1, 77)):
        own = q[row : row + 1], k[row : row + 1, :, pad:], v[row : row + 1, :, pad:]
        seen = oracle_mask(*own[:2], sparse) if name in CHOOSING_IN_STEPS else torch.ones(1, 4, 1, keys - pad).bool()
        assert (seen.sum() < 4 * (keys - pad)) == (name in CHOOSING_IN_STEPS)
        expected = reference_output(*(x.double() for x in own), seen)
        for output in outputs:
            torch.testing.assert_close(output[row : row + 1], expected, rtol=0, atol=1e-5)
    assert density(plan) is None and plan.chooses_blocks == (name in CHOOSING_IN_STEPS)


@pytest.mark.parametrize("name", CHOOSING_IN_STEPS)
@pytest.mark.parametrize("seed", range(30))
def test_decode_steps_of_all_rows_choose_as_each_row_alone(name, seed):
    rng = random.Random(seed)
    rows, block, kv_heads = rng.choice((1, 3, 5)), rng.choice((4, 64)), rng.choice((1, 2))
    keys = rng.choice((2, 7, 65, 300, 1100))
    q, k, _ = (x.double() for x in operands(rows, 1, keys, kv_heads * rng.choice((1, 3)), kv_heads, seed))
    mask = torch.ones(rows, keys, dtype=torch.long)
    for row in range(rng.choice((0, rows))):
        mask[row, : rng.randrange(keys)] = 0
    k = torch.where(mask[:, None, :, None] > 0, k, torch.nan)  # what padding left in the cache matters to nobody
    sparse, layout = sparse_of(name, block, top_k=rng.choice((1, 2, 6))), batch_layout(rows, 1, keys - 1, CPU, mask)
    route = torch.tensor([[rng.choice((0.0, 1.0)) for _ in range(kv_heads)] for _ in range(rows)])
    plan, selection = HeadPlan.build(route, sparse, layout), SELECTIONS[name]
    alone = block_selection._bits_by_sample(selection, q, k, plan, SCALE)
    assert torch.equal(block_selection.selected_bits(selection, q, k, plan, SCALE), alone)
    assert layout.decoding and bool((alone != 0).any()) == bool((route > 0).any())


def reference_output(q, k, v, mask):
    """Attention under a dense mask [B, H, Lq, Lk], as [B, Lq, H, D] in fp32."""
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).transpose(2, 3) * SCALE
    weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), -1)
    return (weights @ v.repeat_interleave(group, 1)).transpose(1, 2).float()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block", [4, 64])
def test_packed_samples_choose_as_they_do_alone(name, block):
    bounds, sparse = [0, 1, 130, 300], sparse_of(name, block)
    q, k, v = operands(1, 300, 300)
    route = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    packed = packed_layout(torch.tensor(bounds, dtype=torch.int32), None, 300, CPU)
    found = routed_attention(q, k, v, route, HeadPlan.build(route, sparse, packed), SCALE)
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        own = tuple(x[:, :, begin:end] for x in (q, k, v))
        alone = HeadPlan.build(route[n : n + 1], sparse, batch_layout(1, end - begin, 0, CPU))
        expected = routed_attention(*own, route[n : n + 1], alone, SCALE)
        torch.testing.assert_close(found.output[:, begin:end], expected.output, rtol=0, atol=1e-5)
        if expected.plan.bits is None:  # one token chooses nothing, but for NSA and InfLLM-V2
            assert end - begin == 1 and name not in CHOOSING_IN_STEPS
            continue
        bits = found.plan.bits[n, :, : expected.plan.bits.shape[2], : expected.plan.bits.shape[3]]
        assert torch.equal(bits, expected.plan.bits[0])
        assert found.plan.bits[n].count_nonzero() == expected.plan.bits.count_nonzero()
        heads = route[n].repeat_interleave(2) > 0.5
        assert (expected.plan.bits[0][~heads] == 0).all() and (expected.plan.bits[0][heads] != 0).any()


@pytest.mark.parametrize("name", NAMES)
def test_left_padding_changes_nothing(name):
    sparse, pad = sparse_of(name), 41
    q, k, v = operands(2, 120, 120)
    mask = torch.ones(2, 120, dtype=torch.long)
    mask[1, :pad] = 0
    route = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    found = routed_attention(q, k, v, route, HeadPlan.build(route, sparse, batch_layout(2, 120, 0, CPU, mask)), SCALE)
    own = tuple(x[1:, :, pad:] for x in (q, k, v))
    alone = HeadPlan.build(route[1:], sparse, batch_layout(1, 120 - pad, 0, CPU))
    expected = routed_attention(*own, route[1:], alone, SCALE)
    torch.testing.assert_close(found.output[1:, pad:], expected.output, rtol=0, atol=1e-5)
    bits = found.plan.bits[1, :, : expected.plan.bits.shape[2], : expected.plan.bits.shape[3]]
    assert torch.equal(bits, expected.plan.bits[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("packed", [False, True])
def test_a_choice_of_everything_is_dense_attention_bit_for_bit(name, packed):
    everything = {"top_k": 1000, "min_budget": 1 << 20, "threshold": 1e-30 if name == "flashprefill" else 1.0}
    everything |= {"window": 64 * 16} if name == "flashprefill" else {}
    sparse = sparse_of(name, 64, **everything)
    q, k, v = operands(1, 700, 700)
    bounds = torch.tensor([0, 300, 700], dtype=torch.int32)
    layout = packed_layout(bounds, None, 700, CPU) if packed else batch_layout(1, 700, 0, CPU)
    ones = torch.ones(layout.row_N.shape[0], 2)
    chosen = routed_attention(q, k, v, ones, HeadPlan.build(ones, sparse, layout), SCALE)
    dense = routed_attention(q, k, v, 0 * ones, HeadPlan.build(0 * ones, sparse, layout), SCALE)
    assert torch.equal(chosen.output, dense.output) and (chosen.density == 1).all()
    kernel = [fused(q, k, v, route, found.plan, SCALE) for route, found in ((ones, chosen), (0 * ones, dense))]
    assert torch.equal(*kernel)
    assert mask_from_bits(chosen.plan.bits)[..., :11].sum() > 0


def test_equal_scores_are_taken_in_order():
    score, seen = torch.zeros(1, 1, 6), torch.tensor([[True] * 5 + [False]])
    forced = torch.tensor([[False, False, False, False, True, False]])
    assert pooling.heaviest(score, forced, seen, 3)[0, 0].tolist() == [True, True, False, False, True, False]
    broken = torch.tensor([[[float("nan"), 1.0, float("-inf"), 0.0, 2.0, 9.0]]])
    assert pooling.heaviest(broken, forced, seen, 3)[0, 0].tolist() == [False, True, False, True, True, False]
    assert pooling.heaviest(broken, forced, seen, 100)[0, 0].tolist() == [True] * 5 + [False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_covering_is_what_sorting_finds(dtype):
    mass = torch.rand(50, 300, generator=torch.Generator().manual_seed(0), dtype=dtype) ** 8
    mass[0], mass[1, 5:] = 0.25, 0.0
    need = mass.sum(-1) * torch.linspace(0.05, 0.95, 50, dtype=dtype)
    cut, equal = pooling.covering(mass, need)
    ranked = mass.sort(dim=-1, descending=True).values
    fewest = (ranked.cumsum(-1) - ranked < need[:, None]).sum(-1)
    assert torch.equal((mass > cut).sum(-1) + equal[:, 0], fewest)
    cut, equal = pooling.covering(mass, mass.sum(-1) + 1)
    assert (cut == 0).all() and torch.equal(equal[:, 0], (mass == 0).sum(-1))  # everything


def test_half_precision_means_are_sums_in_fp32():
    x = torch.full((1, 300, 2), 1.0, dtype=torch.bfloat16)
    x[0, 0, 0] = 257.0  # 256 in bf16
    means = pooling.run_means(x, 128)
    assert means.dtype == torch.float32 and means[0, :, 1].tolist() == [1.0, 1.0, 1.0]
    assert means[0, 0, 0].item() == pytest.approx((256 + 127) / 128)


def test_every_mode_that_chooses_has_its_row():
    assert {*SELECTIONS, "xattention"} == set(CHOOSING) and set(SHORT) == set(MODE_IDS)
    assert not any("-" in name for name in SHORT.values())  # a report splits FA-SSA there
    chosen = backend_for(CPU, torch.float32, 64, sparse=sparse_of("moba"))
    assert chosen == "torch (cpu)"


def test_reference_knows_the_mask():
    """`elastic.attention.reference` mixes any chosen mask, XAttention's or another's."""
    q, k, v = operands(1, 40, 40)
    sparse, route = sparse_of("moba"), torch.ones(1, 2)
    mask = oracle_mask(q, k, sparse)
    expected = reference.routed_attention(q, k, v, route, sparse, SCALE, mask).transpose(1, 2)
    plan = HeadPlan.build(route, sparse, batch_layout(1, 40, 0, CPU))
    torch.testing.assert_close(routed_attention(q, k, v, route, plan, SCALE).output, expected, rtol=0, atol=1e-5)
