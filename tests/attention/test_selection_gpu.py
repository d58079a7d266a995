"""The methods that choose key blocks on a GPU: the choice against its oracle, and the kernel under it."""

import pytest
import torch

from elastic.attention import block_selection
from elastic.attention.head_plan import HeadPlan
from elastic.attention.layout import batch_layout
from elastic.attention.routed import backend_for, fused, routed_attention
from elastic.attention.selection.sample import AttentionSample
from elastic.attention.selection.table import SELECTIONS
from elastic.attention.torch_path import attend
from elastic.bench.structured import structured
from elastic.config import CHOOSING_IN_STEPS
from elastic.console import say
from tests.attention.test_selection import NAMES, ROWS, SCALE, random_sample, sparse_of
from tests.kernels.gpu import HAS_GPU

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a GPU that runs the kernels")]
DEVICE = torch.device("cuda")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_choice_is_the_oracles(name, dtype):
    """In fp32 every row; in half precision 99.9 % of the rows within a block, the oracle with the same values."""
    compare(name, dtype)


@pytest.mark.parametrize("name", ["flexprefill", "flashprefill"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128])
def test_the_choice_of_the_kernels_is_the_oracles(name, dtype, dim):
    """99.9 % of the rows within a block, as those of PyTorch."""
    compare(name, dtype, dim, blocks=(64, 128), lengths=(37, 130, 515, 900, 1500))


def compare(name, dtype, *sizes, **more):
    differing, far, rows, seed = 0, 0, 0, 0
    while rows < ROWS:
        sample = random_sample(name, seed, dtype, *sizes, **more)
        device = AttentionSample(sample.q_HLD.to(DEVICE), sample.k_KSD.to(DEVICE), sample.sparse, sample.scale)
        found, wanted = SELECTIONS[name].choose(device).cpu(), SELECTIONS[name].oracle(sample)
        most = torch.maximum((found & ~wanted).sum(-1), (wanted & ~found).sum(-1))
        differing, far = differing + int((most > 0).sum()), far + int((most > 1).sum())
        rows, seed = rows + most.numel(), seed + 1
    say(f"{name} {dtype}: {differing} of {rows} rows differ, {far} by more than a block")
    assert far <= rows / 1000 and (differing == 0 or dtype != torch.float32)


def operands(length, heads=8, kv_heads=2, dim=128):
    q, k = structured(length, heads, kv_heads, dim, str(DEVICE))  # noise alone would make every block as good as any
    v = torch.randn(k.shape, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE)
    return tuple(x.transpose(1, 2).bfloat16() for x in (q, k, v))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block", [64, 128])
def test_the_kernel_attends_to_the_chosen_blocks(name, block):
    q, k, v = operands(4096)
    route = torch.tensor([[0.0, 1.0]], device=DEVICE)
    plan = HeadPlan.build(route, sparse_of(name, block), batch_layout(1, 4096, 0, DEVICE))
    found = routed_attention(q, k, v, route, plan, 128**-0.5)
    expected = attend(*(x.float() for x in (q, k, v)), found.plan, 128**-0.5)
    torch.testing.assert_close(found.output.float(), expected, rtol=0.02, atol=0.02)
    assert 0 < float(found.density[0, 1]) < 1
    assert f"{name} has no operator of its own" in backend_for(DEVICE, torch.bfloat16, 128, sparse=plan.sparse)


@pytest.mark.parametrize("block", [64, 128])
def test_a_choice_of_everything_is_dense_attention_bit_for_bit(block):
    q, k, v = operands(2048)
    ones = torch.ones(1, 2, device=DEVICE)
    plan = HeadPlan.build(ones, sparse_of("nsa", block, top_k=1000), batch_layout(1, 2048, 0, DEVICE))
    chosen = routed_attention(q, k, v, ones, plan, 128**-0.5)
    dense = HeadPlan.build(0 * ones, plan.sparse, plan.layout)
    assert bool((chosen.density == 1).all())
    assert torch.equal(chosen.output, fused(q, k, v, 0 * ones, dense, 128**-0.5))


@pytest.mark.parametrize("name", NAMES)
def test_a_choice_does_not_wait_for_the_gpu(name):
    q, k, v = operands(2048)
    ones = torch.ones(1, 2, device=DEVICE)
    plan = HeadPlan.build(ones, sparse_of(name, 64), batch_layout(1, 2048, 0, DEVICE))
    routed_attention(q, k, v, ones, plan, 128**-0.5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        routed_attention(q, k, v, ones, plan, 128**-0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", CHOOSING_IN_STEPS)
@pytest.mark.parametrize("keys", [515, 4095])
def test_decode_steps_of_all_rows_choose_as_each_row_alone(name, keys):
    q, k, _ = (x[:, :, :keys].repeat(3, 1, 1, 1).double() for x in operands(4096))
    mask = torch.ones(3, keys, dtype=torch.long)
    mask[1, :50], mask[2, : keys // 2] = 0, 0
    layout = batch_layout(3, 1, keys - 1, DEVICE, mask.to(DEVICE))
    plan = HeadPlan.build(torch.ones(3, 2, device=DEVICE), sparse_of(name, 64), layout)
    alone = block_selection._bits_by_sample(SELECTIONS[name], q[:, :, -1:], k, plan, SCALE)
    assert torch.equal(block_selection.selected_bits(SELECTIONS[name], q[:, :, -1:], k, plan, SCALE), alone)
