"""A model's own routers, whose choice of experts the pass may see and replace.

Where a pass replaces the choice, the weights of the experts follow from the router's own logits, so its gradient
reaches the hidden states as ever; the router is frozen. Rows whose choice stands keep their bits.
Shape letters: T rows of the pass, D hidden size, E experts, K experts of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tinsmith.model.frozen import EVEN_ROWS
from tinsmith.model.linear import PassHolder

Weigh = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Router(nn.Module):
    """In the place of a router. number: its place among the model's routers. weigh: see `Family.expert_weights`."""

    def __init__(
        self, number: int, router: nn.Module, weigh: Weigh | None, holder: PassHolder, *, is_even: bool
    ) -> None:
        """is_even: it is never asked about so few rows that their number would change a row's bits."""
        super().__init__()
        self.router = router
        self.number = number
        self._weigh = weigh
        self._holder = holder
        self._is_even = is_even
        self.num_chosen = cast(int, router.top_k)

    def forward(self, hidden_states: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        """[..., D] -> what the router gives of each row: with `weigh` logits [T, E], weights [T, K], experts [T, K].

        given: what else a router is called with, such as a bias for the choice; nothing of a row.
        """
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        missing = max(0, EVEN_ROWS - len(x_TD)) if self._is_even else 0
        found = self.router(F.pad(x_TD, (0, 0, 0, missing)) if missing else x_TD, *given)
        parts = tuple(part[: len(x_TD)] for part in found)
        if self._weigh is None:
            return parts
        logits_TE, weights_TK, own_TK = parts
        chosen_TK = self._holder.context.choose(self.number, own_TK)
        if chosen_TK is own_TK:
            return parts
        new_TK = self._weigh(self.router, logits_TE, chosen_TK).to(weights_TK.dtype)
        changed_T1 = (chosen_TK != own_TK).any(1, keepdim=True)
        return logits_TE, torch.where(changed_T1, new_TK, weights_TK), chosen_TK


def softmax_weights(router: nn.Module, logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
    """The softmax over all experts; divided by the sum of a row's, unless the router's `norm_topk_prob` is off."""
    weights_TK = logits_TE.softmax(-1, dtype=torch.float32).gather(1, experts_TK)
    if getattr(router, "norm_topk_prob", True):
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return weights_TK


def chosen_softmax_weights(router: nn.Module, logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
    """The softmax over the logits of a row's own experts."""
    chosen_TK = logits_TE.gather(1, experts_TK)
    return chosen_TK.softmax(-1, dtype=chosen_TK.dtype)


def sigmoid_weights(router: nn.Module, logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
    """Sigmoids, without the bias that only serves the choice, divided by their sum where `norm_topk_prob` is on, times
    `routed_scaling_factor` (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""
    weights_TK = logits_TE.sigmoid().gather(1, experts_TK)
    if router.norm_topk_prob:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return weights_TK * cast(float, router.routed_scaling_factor)


class ChoiceWatch:
    """While it is open: what the routers of a model that wasn't opened yet choose, by their place."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], choose: bool) -> None:
        """choose: it is they who choose, see `Family.routers_choose`; else the largest of their logits are chosen."""
        self.choices: list[Tensor] = []
        self._choose = choose
        self._routers = [module for module in model.modules() if type(module).__name__ in names]
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        self._hooks = [router.register_forward_hook(self._note) for router in self._routers]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, router: nn.Module, given: Any, found: tuple[Tensor, ...]) -> None:
        self.choices.append(found[-1] if self._choose else found[-1].topk(cast(int, router.top_k), dim=1).indices)


def replace_routers(
    model: nn.Module, names: tuple[str, ...], weigh: Weigh | None, holder: PassHolder, *, choose: bool, is_even: bool
) -> list[Router]:
    """Put `Router` in the place of all modules of these classes; those whose choice can be replaced.

    choose: it is they who choose, see `Family.routers_choose`.
    """
    found = [(path, module) for path, module in model.named_modules() if type(module).__name__ in names]
    routers = [Router(number, module, weigh, holder, is_even=is_even) for number, (_, module) in enumerate(found)]
    for (path, _), router in zip(found, routers, strict=True):
        model.set_submodule(path, router)
    return routers if weigh is not None or not choose else []
