"""Which key blocks each query block of a block-sparse head visits, as the bit set that the kernel reads.

bits int32 [N, H, ceil(Sq / 128), W]: bit b % 32 of word b // 32 of query block m says whether its 128 queries visit key
block b (`block` = 64 or 128 keys). Both count from the sample's first query and first key. Keys after a query stay
hidden whatever the bits say; a query whose bits show it nothing gives output 0 and LSE -inf.
"""

import torch
from torch import Tensor

from elastic.kernels.params import QUERY_BLOCK


def query_block(block: int) -> int:
    """Queries that share a row of bits: 128 for key blocks of 64 and 128, which the kernels take. Smaller key blocks,
    which only PyTorch runs, have query blocks of their own size, so that short test sequences have several.
    """
    return QUERY_BLOCK if 2 * block >= QUERY_BLOCK else block


def bits_from_mask(mask: Tensor) -> Tensor:
    """Pack a boolean [..., key blocks] tensor into int32 [..., ceil(key blocks / 32)]."""
    padded = torch.nn.functional.pad(mask.bool(), (0, -mask.shape[-1] % 32))
    # Made where they are used: a list would be copied to a GPU, which waits for it.
    weights = 1 << torch.arange(32, dtype=torch.int32, device=mask.device)
    # The weights are distinct powers of two, so the sum is an or and cannot overflow.
    return (torch.unflatten(padded, -1, (-1, 32)) * weights).sum(-1, dtype=torch.int32)


def mask_from_bits(bits: Tensor) -> Tensor:
    """Unpack int32 [..., W] into a boolean [..., 32 W] tensor."""
    shifts = torch.arange(32, dtype=torch.int32, device=bits.device)
    return ((bits.unsqueeze(-1) >> shifts) & 1).bool().flatten(-2)


def count_bits(bits: Tensor) -> Tensor:
    """Key blocks of every row: int32 [..., W] -> int64 [...]. Sums neighbouring fields of 1, 2, 4, ... bits."""
    pairs = bits - ((bits >> 1) & 0x55555555)
    nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    octets = (nibbles + (nibbles >> 4)) & 0x0F0F0F0F
    return ((octets * 0x01010101) >> 24).sum(-1)


def bits_from_indices(indices: Tensor, counts: Tensor, key_blocks: int) -> Tensor:
    """Bit set of explicit lists: row [...] visits key blocks indices[..., :counts[...]].

    Args:
        indices: integer [..., I], each below key_blocks, in any order; entries from counts on are ignored.
        counts: integer [...], at most I.
        key_blocks: number of key blocks of the sequence.

    Raises:
        ValueError: shapes that do not belong together; for lists on the CPU also a block or count out of range. Lists
            on a GPU are not read by the host: there a block beyond the sequence ends in a device assertion or is
            dropped.
    """
    if indices.shape[:-1] != counts.shape:
        raise ValueError(
            f"indices {list(indices.shape)} and counts {list(counts.shape)} do not belong together; expected "
            "[..., I] and [...]"
        )
    used = torch.arange(indices.shape[-1], device=indices.device) < counts.unsqueeze(-1)
    if indices.device.type == "cpu":
        _check_lists(indices, counts, used, key_blocks)
    # Unused entries go to an extra last block that is dropped again.
    target = torch.where(used, indices.long(), key_blocks)
    mask = torch.zeros(*counts.shape, key_blocks + 1, dtype=torch.bool, device=indices.device)
    return bits_from_mask(mask.scatter_(-1, target, True)[..., :key_blocks])


def _check_lists(indices: Tensor, counts: Tensor, used: Tensor, key_blocks: int) -> None:
    wrong = indices[used & ((indices < 0) | (indices >= key_blocks))]
    if wrong.numel():
        raise ValueError(
            f"indices name key block {int(wrong[0])}; expected 0 to {key_blocks - 1} ({key_blocks} blocks)"
        )
    wrong = counts[(counts < 0) | (counts > indices.shape[-1])]
    if wrong.numel():
        raise ValueError(f"counts hold {int(wrong[0])}; expected 0 to {indices.shape[-1]}, the width of indices")
