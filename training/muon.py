"""The Muon optimiser for the weight matrices of GPT-2's blocks (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

1. Average the gradient with momentum (Nesterov).
2. Replace it by a nearly orthogonal matrix with the same row and column spaces (five Newton-Schulz steps).
3. Step by it, scaled so that an entry moves as far as under AdamW (Liu et al. 2025, arXiv 2502.16982).

GPT-2 keeps the query, key and value weights side by side in one matrix. Each is made orthogonal on its own: taken
together, the large gradient of the values would leave next to nothing for the queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the Newton-Schulz polynomial, from the post
SAME_SIZE_AS_ADAMW = 0.2  # typical size of an entry of an AdamW update, from the paper


class Muon(torch.optim.Optimizer):
    """Muon with decoupled weight decay; `params` are matrices, [inputs, outputs] as in GPT-2.

    A matrix with three times as many columns as rows is taken for three matrices side by side.
    """

    def __init__(self, params: Iterable[torch.Tensor], lr: float, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, weight.grad, group)

    def _move(self, weight: torch.Tensor, gradient: torch.Tensor, group: Mapping[str, float]) -> None:
        state = self.state[weight]
        if "average" not in state:
            state["average"] = torch.zeros_like(weight)
        average, momentum = state["average"], group["momentum"]
        average.lerp_(gradient, 1 - momentum)
        update = gradient.lerp(average, momentum)
        parts = update.chunk(3, dim=1) if update.shape[1] == 3 * update.shape[0] else (update,)
        scale = SAME_SIZE_AS_ADAMW * max(parts[0].shape) ** 0.5
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.sub_(torch.cat([orthogonal(part) for part in parts], dim=1), alpha=group["lr"] * scale)


def orthogonal(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """A matrix of the same shape with the same singular vectors, all singular values between about 0.7 and 1.2.

    Newton-Schulz in bfloat16. A matrix of zeros stays zero.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).bfloat16()
    x = x / (x.norm() + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return (x.T if tall else x).to(matrix.dtype)
