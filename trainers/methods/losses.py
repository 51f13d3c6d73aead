"""The losses of the methods that need no reference, as their papers have them.

All take the mean log probability of a token of each answer, of shape (pairs,).
"""

from __future__ import annotations

from typing import Any


def orpo_loss(chosen: Any, rejected: Any, *, weight: float) -> Any:
    """The likelihood of the chosen answer, and ``weight`` times the odds of it over the rejected one; shape (pairs,).

    Source: ORPO, arXiv:2403.07691, equations 3 to 7.
    """
    import torch

    odds = (chosen - rejected) - (torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected)))
    return -chosen - weight * torch.nn.functional.logsigmoid(odds)


def simpo_loss(chosen: Any, rejected: Any, *, beta: float, gamma: float, likelihood: float = 0.0) -> Any:
    """The margin between the answers over ``gamma``, through a sigmoid of sharpness ``beta``; shape (pairs,).

    Source: SimPO, arXiv:2405.14734, equation 6. ``likelihood`` weighs that of the chosen answer beside it (CPO,
    arXiv:2401.08417, equation 4).
    """
    import torch

    return -torch.nn.functional.logsigmoid(beta * (chosen - rejected) - gamma) - likelihood * chosen
