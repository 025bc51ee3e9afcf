"""Acceptance in plain torch. specdec's rules say the same of one sequence, and are the form to read first."""

import torch
from torch import Tensor

from ..philox import Purpose, coins, race, rows
from ..words import unpack

Decided = tuple[Tensor, Tensor, Tensor]


def walk(tokens_BN: Tensor, parents_BN: Tensor, words_BNW: Tensor, n_B: Tensor, choice_BN: Tensor) -> Decided:
    """See the dispatcher. The deepest node that is reached ends the path, the lowest among equals."""
    N = tokens_BN.shape[1]
    real_BN = torch.arange(N, device=n_B.device) < n_B.unsqueeze(1)
    chosen_BN = tokens_BN == choice_BN.gather(1, parents_BN.clamp(min=0))
    above_BNN = unpack(words_BNW, words_BNW.shape[1])
    reached_BN = all_the_way(parents_BN, above_BNN, chosen_BN & real_BN)
    end_B1 = torch.where(reached_BN, above_BNN.sum(-1), 0).argmax(dim=1, keepdim=True)
    return *path_to(end_B1, parents_BN, above_BNN), choice_BN.gather(1, end_B1).squeeze(1)


def recursive(
    tokens_BN: Tensor,
    parents_BN: Tensor,
    drawn_BN: Tensor,
    p_BNV: Tensor,
    q_BNV: Tensor | None,
    seed: int,
    request_B: Tensor,
    step_B: Tensor,
) -> Decided:
    """See the dispatcher."""
    N = tokens_BN.shape[1]
    q_BNV = recorded(q_BNV, p_BNV)
    node_N = torch.arange(N, device=tokens_BN.device)
    u_BN = coins(seed, request_B[:, None], step_B[:, None], node_N, Purpose.ACCEPT)
    p_BV, q_BV, at_B1 = p_BNV[:, 0], q_BNV[:, 0], torch.zeros_like(tokens_BN[:, :1])
    accepted_BN = torch.zeros_like(drawn_BN)
    for n in range(1, N):  # index order tries the children of a node in the order of the draft
        x_B1 = tokens_BN[:, n : n + 1]
        law_BV = torch.where(drawn_BN.gather(1, at_B1), q_BV, one_hot(x_B1, q_BV))
        tried_B1 = parents_BN[:, n : n + 1] == at_B1
        kept_B1 = tried_B1 & (u_BN[:, n : n + 1] * law_BV.gather(1, x_B1) < p_BV.gather(1, x_B1))
        left_BV, struck_BV = residual(p_BV, law_BV), strike(q_BV, x_B1)
        p_BV = torch.where(kept_B1, p_BNV[:, n], torch.where(tried_B1, left_BV, p_BV))
        q_BV = torch.where(kept_B1, q_BNV[:, n], torch.where(tried_B1, struck_BV, q_BV))
        at_B1 = torch.where(kept_B1, n, at_B1)
        accepted_BN[:, n] = kept_B1.squeeze(1)
    return *paths(accepted_BN), _bonus(p_BV, seed, request_B, step_B, at_B1.squeeze(1))


def block(
    tokens_BN: Tensor,
    n_B: Tensor,
    drawn_BN: Tensor,
    p_BNV: Tensor,
    q_BNV: Tensor | None,
    seed: int,
    request_B: Tensor,
    step_B: Tensor,
) -> Decided:
    """See the dispatcher. Weights and gains are float64, sums over the vocabulary float32."""
    N = tokens_BN.shape[1]
    node_N = torch.arange(N, device=tokens_BN.device)
    u_BN = coins(seed, request_B[:, None], step_B[:, None], node_N, Purpose.ACCEPT)
    q_BNV = _laws_below(tokens_BN, n_B, drawn_BN, p_BNV, q_BNV)
    weight_B1 = torch.ones_like(u_BN[:, :1])
    end_B1, left_BV = torch.zeros_like(tokens_BN[:, :1]), residual(p_BNV[:, 0], q_BNV[:, 0])
    for n in range(1, N):
        x_B1, p_BV, q_BV = tokens_BN[:, n : n + 1], p_BNV[:, n], q_BNV[:, n]
        ratio_B1 = p_BNV[:, n - 1].gather(1, x_B1).double() / q_BNV[:, n - 1].gather(1, x_B1)
        weight_B1 = (weight_B1 * ratio_B1).clamp(max=1.0)
        weighted_BV = weight_B1.to(p_BV.dtype) * p_BV
        gain_B1 = (weighted_BV - q_BV).clamp(min=0).sum(-1, keepdim=True).double()
        success_B1 = u_BN[:, n : n + 1] * (gain_B1 + (1.0 - weight_B1)) < gain_B1
        success_B1 = success_B1 & (n < n_B.unsqueeze(1))
        end_B1 = torch.where(success_B1, n, end_B1)
        left_BV = torch.where(success_B1, residual(weighted_BV, q_BV), left_BV)
    bonus_B = _bonus(left_BV, seed, request_B, step_B, end_B1.squeeze(1))
    return *paths((node_N > 0) & (node_N <= end_B1)), bonus_B


def residual(p_XV: Tensor, q_XV: Tensor) -> Tensor:
    """norm((p - q)+): what is left of p once its overlap with q is spent; p itself where nothing is left."""
    left_XV = (p_XV - q_XV).clamp(min=0)
    total_X1 = left_XV.sum(-1, keepdim=True)
    return torch.where(total_X1 > 0, left_XV / total_X1, p_XV)


def strike(q_XV: Tensor, x_X1: Tensor) -> Tensor:
    """q without token x, renormalised; all zero once its support is used up."""
    left_XV = q_XV.scatter(-1, x_X1, 0.0)
    total_X1 = left_XV.sum(-1, keepdim=True)
    return torch.where(total_X1 > 0, left_XV / total_X1, left_XV)


def one_hot(x_X1: Tensor, like_XV: Tensor) -> Tensor:
    """All the mass on token x."""
    return torch.zeros_like(like_XV).scatter(-1, x_X1, 1.0)


def recorded(q_BNV: Tensor | None, p_BNV: Tensor) -> Tensor:
    """q in the type of p; zero where none was recorded."""
    return torch.zeros_like(p_BNV) if q_BNV is None else q_BNV.to(p_BNV.dtype)


def all_the_way(parents_BN: Tensor, ancestors_BNN: Tensor, good_BN: Tensor) -> Tensor:
    """bool [B, N]: nodes below the root that are good, and whose ancestors below the root all are."""
    below_root_BN = parents_BN >= 0
    bad_BN = below_root_BN & ~good_BN
    return below_root_BN & ~(ancestors_BNN & bad_BN.unsqueeze(1)).any(dim=-1)


def path_to(end_B1: Tensor, parents_BN: Tensor, ancestors_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """path_BA and count_B of the path from below the root to the node `end`."""
    above_BN = ancestors_BNN.gather(1, end_B1.unsqueeze(-1).expand_as(ancestors_BNN[:, :1])).squeeze(1)
    return paths(above_BN & (parents_BN >= 0))


def paths(accepted_BN: Tensor) -> tuple[Tensor, Tensor]:
    """path_BA and count_B from the nodes of one path: index order is order of depth."""
    N = accepted_BN.shape[1]
    node_N = torch.arange(N, device=accepted_BN.device)
    path_BN = torch.where(accepted_BN, node_N, N).sort(dim=1).values
    return torch.where(path_BN < N, path_BN, -1), accepted_BN.sum(dim=1)


def _laws_below(
    tokens_BN: Tensor, n_B: Tensor, drawn_BN: Tensor, p_BNV: Tensor, q_BNV: Tensor | None
) -> Tensor:
    """[B, N, V]: the law that the child of every node of every chain came from; zero where there is none."""
    child_BN1 = tokens_BN.roll(-1, dims=1).unsqueeze(-1)
    law_BNV = torch.where(drawn_BN.unsqueeze(-1), recorded(q_BNV, p_BNV), one_hot(child_BN1, p_BNV))
    node_N = torch.arange(p_BNV.shape[1], device=p_BNV.device)
    return torch.where((node_N < n_B.unsqueeze(1) - 1).unsqueeze(-1), law_BNV, 0.0)


def _bonus(weights_BV: Tensor, seed: int, request_B: Tensor, step_B: Tensor, node_B: Tensor) -> Tensor:
    u_BV = rows(seed, request_B, step_B, node_B, Purpose.RESIDUAL, weights_BV.shape[-1])
    return race(weights_BV, u_BV.to(weights_BV.dtype))
