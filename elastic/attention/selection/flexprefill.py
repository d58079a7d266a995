"""FlexPrefill (arXiv 2502.20766, algorithms 1 to 4): each head's pattern, and its budget, from its last queries.

Q^ are the sample's last `block` queries; a = softmax(scale Q^ K^T) is their attention, V[n] its share in key block n,
and b = softmax over blocks of scale mean(Q^) . mean(K[n]) an estimate of V from means alone (algorithm 2).

- Where the estimate holds, sqrt(JS(b, V)) < tau = 0.1, the head is *query aware* (algorithm 4): every query block m
  estimates softmax over the seen n of scale mean(Q[m]) . mean(K[n]), and of all pairs (m, n) of the head the heaviest
  are visited, the fewest that hold `gamma` of the sum.
- Other heads take *vertical and slash* lines (algorithm 3): tokens that all queries attend to, and distances at which
  they do. As the published code makes blocks of lines: the fewest tokens that hold gamma of the vertical mass, divided
  by the block, plus one, are the number of key blocks that every query block visits, those of the largest V. A slash is
  a block of distances, [s block, (s + 1) block), for which query block m visits key block m - s; their number is found
  in the same way. At least `min_budget` tokens of each (1024), which query-aware heads have too.

Key block 0 and slash 0 are always visited. Every query head chooses for itself. Decoding attends in full, as published.
Published gamma: 0.9 to 0.95. FlexPrefill needs no training.
"""

import torch
from torch import Tensor

from elastic.attention.selection.pooling import block_sums, covering, grouped_scores, rank_order, run_means
from elastic.attention.selection.sample import AttentionSample
from elastic.kernels.block_choice import launch_lines, unsupported_choice

TAU = 0.1


def choose(sample: AttentionSample) -> Tensor:
    """Key blocks of every query head, [H, M, N]."""
    seen_MN, own_MN, block = sample.seen(), sample.own(), sample.sparse.block
    last_q, k_KND = sample.q_HLD[:, -block:], run_means(sample.k_KSD, block)
    lines_2HS = _lines(sample, last_q)
    vertical_HN, slash_HN = block_sums(lines_2HS, block)
    guess_HN = torch.softmax(sample.scale * grouped_scores(last_q.mean(1, keepdim=True, dtype=sample.wide), k_KND), -1)
    aware_H = distance(guess_HN[:, 0], vertical_HN) < TAU
    budget = -(-sample.sparse.min_budget // block)
    count_2H = torch.where(aware_H, 0, _tokens(lines_2HS, sample) // block + 1).clamp(min=budget)
    lines = _heaviest_blocks(vertical_HN, count_2H[0])[:, None] | _along(
        _heaviest_blocks(slash_HN, count_2H[1]), own_MN
    )
    pairs = _heaviest_pairs(sample, k_KND) & aware_H[:, None, None]
    return (lines | pairs | own_MN) & seen_MN


def distance(one: Tensor, other: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence of distributions along the last dimension, in nats."""
    middle = (one + other) / 2
    parts = [torch.xlogy(p, p / middle).nan_to_num(nan=0.0).sum(-1) for p in (one, other)]
    return (sum(parts) / 2).clamp(min=0).sqrt()  # type: ignore[union-attr]


def _lines(sample: AttentionSample, last_q: Tensor) -> Tensor:
    """Attention of the last queries by key, and by distance (0 first), their mean, [2, H, S]."""
    if unsupported_choice(last_q, sample.k_KSD, sample.sparse.block) is None:
        return launch_lines(last_q, sample.k_KSD, sample.scale)
    keys, rows = sample.k_KSD.shape[1], last_q.shape[1]
    # Before the first key come as many that nobody sees, so that the diagonals of all rows are of one length.
    k_KPD = torch.nn.functional.pad(sample.k_KSD, (0, 0, rows - 1, 0))
    score_HRP = grouped_scores(last_q, k_KPD).mul_(sample.scale)
    score_HRP[..., : rows - 1] = float("-inf")
    later = torch.ones(rows, rows, dtype=torch.bool, device=last_q.device).triu(1)
    score_HRP[..., keys - 1 :].masked_fill_(later, float("-inf"))
    share_HRP = torch.softmax(score_HRP, dim=-1)
    # Row r is at position keys - rows + r, so its entry d + r lies keys - 1 - d back.
    width = share_HRP.shape[-1]
    diagonal_HSR = share_HRP.as_strided((share_HRP.shape[0], keys, rows), (rows * width, 1, width + 1))
    return torch.stack([share_HRP.mean(1)[:, rows - 1 :], (diagonal_HSR.sum(-1) / rows).flip(-1)])


def _tokens(mass_2HS: Tensor, sample: AttentionSample) -> Tensor:
    """The fewest tokens and distances that hold gamma of their mass, [2, H]."""
    flat = mass_2HS.flatten(0, 1)
    cut, equal = covering(flat, flat.new_full((flat.shape[0],), sample.sparse.threshold))
    return ((flat > cut).sum(-1) + equal[:, 0]).view(mass_2HS.shape[:2])


def _heaviest_blocks(mass_HN: Tensor, count_H: Tensor) -> Tensor:
    """The first block and the heaviest others, `count_H` in all, [H, N]."""
    mass = mass_HN.index_fill(-1, torch.zeros(1, dtype=torch.long, device=mass_HN.device), 2.0)  # above every share
    order = rank_order(mass, torch.ones_like(mass, dtype=torch.bool))
    taken = torch.arange(mass.shape[-1], device=mass.device) < count_H[:, None]
    return torch.zeros_like(taken).scatter(-1, order, taken)


def _along(distances_HN: Tensor, own_MN: Tensor) -> Tensor:
    """Key blocks at the chosen distances from each of the query block's own, [H, M, N]."""
    blocks = own_MN.shape[1]
    low_M, own_M = own_MN.int().argmax(-1), own_MN.sum(-1)
    # Distances below 0 and from N on are chosen by nobody. 128 queries lie in three blocks of 64 at most: a table for
    # one, two and three says of a distance from the first of these whether it is a chosen one from any of them.
    padded = torch.nn.functional.pad(distances_HN, (blocks, 2))
    tables = [padded[:, : 2 * blocks]]
    for ahead in (1, 2):
        tables.append(tables[-1] | padded[:, ahead : ahead + 2 * blocks])
    back_MN = low_M[:, None] - torch.arange(blocks, device=own_MN.device) + blocks
    place_MN = (own_M[:, None] - 1) * 2 * blocks + back_MN
    return torch.unflatten(torch.cat(tables, 1).index_select(1, place_MN.flatten()), 1, own_MN.shape)


def _heaviest_pairs(sample: AttentionSample, k_KND: Tensor) -> Tensor:
    """Pairs of query and key block that hold gamma of the estimate, [H, M, N]."""
    score_HMN = grouped_scores(run_means(sample.q_HLD, sample.rows).mul_(sample.scale), k_KND)
    share = torch.softmax(score_HMN.masked_fill_(~sample.seen(), float("-inf")), dim=-1)
    flat = share.flatten(1)
    need_H = flat.new_full((flat.shape[0],), sample.sparse.threshold * share.shape[1])
    cut, equal = (x[..., None] for x in covering(flat, need_H))
    # Of equal pairs the first. They are counted row by row, and by rows, because a GPU counts along many rows at once.
    is_cut = share == cut
    of_row = is_cut.sum(-1, keepdim=True)
    left = equal - (of_row.cumsum(1) - of_row)
    return (share > cut) | (is_cut & (is_cut.cumsum(-1, dtype=torch.int32) <= left))


def oracle(sample: AttentionSample) -> Tensor:
    """The same, from the algorithms, a head at a time."""
    wide, block, gamma = sample.wide, sample.sparse.block, sample.sparse.threshold
    length, keys = sample.q_HLD.shape[1], sample.k_KSD.shape[1]
    seen_MN, own_MN, budget = sample.seen().cpu(), sample.own().cpu(), -(-sample.sparse.min_budget // block)
    blocks = range(seen_MN.shape[1])
    chosen = torch.zeros(sample.q_HLD.shape[0], *seen_MN.shape, dtype=torch.bool)
    for head, q_LD in enumerate(sample.q_HLD.to(wide).cpu()):
        k_SD = sample.k_KSD[head // sample.group].to(wide).cpu()
        last = range(max(0, length - block), length)
        vertical, slash = torch.zeros(keys, dtype=wide), torch.zeros(keys, dtype=wide)
        for i in last:
            position = sample.past + i
            share = torch.softmax(sample.scale * (k_SD[: position + 1] @ q_LD[i]), dim=0) / len(last)
            vertical[: position + 1] += share
            slash[: position + 1] += share.flip(0)  # by distance
        means = torch.stack([k_SD[n * block : (n + 1) * block].mean(0) for n in blocks])
        by_block = torch.stack([vertical[n * block : (n + 1) * block].sum() for n in blocks])
        guess = torch.softmax(sample.scale * (means @ q_LD[list(last)].mean(0)), dim=0)
        aware = bool(distance(guess, by_block) < TAU)
        columns, distances = (_oracle_lines(mass, block, gamma, budget, aware) for mass in (vertical, slash))
        for m, own_N in enumerate(own_MN.tolist()):
            own = [n for n in blocks if own_N[n]]
            chosen[head, m, [n for n in blocks if n in columns or any(o - n in distances for o in own)]] = True
        if aware:
            chosen[head] |= _oracle_pairs(sample, q_LD, means, seen_MN)
    return chosen & seen_MN


def _oracle_lines(mass: Tensor, block: int, gamma: float, budget: int, aware: bool) -> set[int]:
    """Blocks of lines, from the mass of every token or distance."""
    held, tokens = 0.0, 0
    for value in sorted(mass.tolist(), reverse=True):
        if held >= gamma:
            break
        held, tokens = held + value, tokens + 1
    count = max(budget, 0 if aware else tokens // block + 1)
    sums = [mass[n * block : (n + 1) * block].sum().item() for n in range(-(-len(mass) // block))]
    return {0, *sorted(range(1, len(sums)), key=lambda n: (-sums[n], n))[: count - 1]}


def _oracle_pairs(sample: AttentionSample, q_LD: Tensor, means: Tensor, seen_MN: Tensor) -> Tensor:
    """What a query-aware head visits, [M, N]."""
    shares: dict[tuple[int, int], float] = {}
    for m, seen_N in enumerate(seen_MN.tolist()):
        visible = [n for n, seen in enumerate(seen_N) if seen]
        q_D = q_LD[m * sample.rows : (m + 1) * sample.rows].mean(0)
        share = torch.softmax(sample.scale * (means[visible] @ q_D), dim=0)
        shares |= {(m, n): value for n, value in zip(visible, share.tolist(), strict=True)}
    chosen, held = torch.zeros_like(seen_MN), 0.0
    for pair in sorted(shares, key=lambda pair: (-shares[pair], pair)):
        if held >= sample.sparse.threshold * seen_MN.shape[0]:
            break
        chosen[pair], held = True, held + shares[pair]
    return chosen
