"""StableAdamW and the warm cosine, the optimiser and the schedule of Dinomaly and INP-Former; Adam as RD4AD has it; half a
cosine as CutPaste has it; the schedules of CFLOW, DRAEM and EfficientAD.

StableAdamW: Wortsman et al., "Stable and low-precision training for large-scale vision-language models", NeurIPS 2023,
https://arxiv.org/abs/2304.13013, in the form of Dinomaly's released code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler


class ShortMomentumAdam(Adam):
    """Adam whose first moment is short, beta1 = 0.5, as in RD4AD's released code.

    A class of its own, because the command line can only read plain numbers from a default optimiser, no pair of betas.

    lr, betas, eps, weight_decay, fused: as in torch's Adam.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 5e-3,
        betas: tuple[float, float] = (0.5, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        fused: bool = True,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)


class StableAdamW(Optimizer):
    """AdamW whose step is shortened, tensor by tensor, when the second moment has fallen behind the gradient.

    With u = g / denominator and r = max(1, RMS(u) / clip_threshold) a tensor moves by lr / r times AdamW's direction.
    The released code compares the raw gradient g, not the momentum, and the clipping acts from the first step on.

    lr: >= 0 (a warm-up starts from 0). betas, weight_decay: as in AdamW; the decay acts before the update, on every
    tensor. amsgrad: the denominator is the largest second moment so far (Dinomaly and INP-Former; Dinomaly2 without).
    clip_threshold: RMS of u from which steps are shortened. skip_nonfinite: leave out steps with a NaN or infinity in
    any gradient (Dinomaly2), instead of spoiling the weights; it costs a wait for the device in every step.

    Raises ValueError for values out of range, and RuntimeError for sparse gradients.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-10,
        weight_decay: float = 1e-4,
        amsgrad: bool = True,
        clip_threshold: float = 1.0,
        skip_nonfinite: bool = False,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0 or clip_threshold <= 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                "StableAdamW needs lr, eps and weight_decay >= 0, betas in [0, 1) and clip_threshold > 0, found "
                f"lr={lr}, eps={eps}, weight_decay={weight_decay}, betas={tuple(betas)}, clip_threshold={clip_threshold}."
            )
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "clip_threshold": clip_threshold,
        }
        self.skip_nonfinite = skip_nonfinite
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update. closure: computes the loss again and returns it, as for any optimiser of torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.skip_nonfinite and not self._all_finite():
            return loss
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._update(parameters, group)
        return loss

    def _all_finite(self) -> bool:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        return not gradients or bool(torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all())

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """All tensors of a group at once: a GPU gets a dozen launches instead of a dozen per tensor."""
        gradients = [parameter.grad for parameter in parameters]
        if any(gradient.is_sparse for gradient in gradients):
            raise RuntimeError("StableAdamW has no rule for sparse gradients.")
        for parameter in parameters:
            if not self.state[parameter]:
                state = self.state[parameter]
                state["step"] = 0
                state["first"] = torch.zeros_like(parameter)
                state["second"] = torch.zeros_like(parameter)
                if group["amsgrad"]:
                    state["largest"] = torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in parameters]
        for state in states:
            state["step"] += 1
        first, second = [state["first"] for state in states], [state["second"] for state in states]
        beta1, beta2 = group["betas"]
        lr = group["lr"]

        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        torch._foreach_mul_(first, beta1)
        torch._foreach_add_(first, gradients, alpha=1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        moments = second
        if group["amsgrad"]:
            moments = [state["largest"] for state in states]
            torch._foreach_maximum_(moments, second)
        denominators = torch._foreach_sqrt(moments)
        torch._foreach_div_(denominators, [math.sqrt(1 - beta2 ** state["step"]) for state in states])
        torch._foreach_add_(denominators, group["eps"])

        norms = torch._foreach_norm(torch._foreach_div(gradients, denominators))
        sizes = [group["clip_threshold"] * math.sqrt(parameter.numel()) for parameter in parameters]
        shortenings = torch._foreach_div(norms, sizes)
        torch._foreach_clamp_min_(shortenings, 1.0)  # r, one number per tensor, still on the device
        steps = torch._foreach_div(first, denominators)
        torch._foreach_div_(steps, shortenings)
        torch._foreach_mul_(steps, [-lr / (1 - beta1 ** state["step"]) for state in states])
        torch._foreach_add_(parameters, steps)


class WarmCosine(LRScheduler):
    """Learning rate per step: linear warm-up from 0, then half a cosine down to a share of the rate. Step it per step.

    The first of `warmup_steps` has rate 0 and the last of them the full rate, as numpy's linspace gives them; step
    warmup_steps + i has final_ratio + (1 - final_ratio) (1 + cos(pi i / (total_steps - warmup_steps))) / 2 of it, and
    from total_steps on it stays there. total_steps: None = the training's length, which whoever trains fills in.
    final_ratio: 0.1 in Dinomaly and INP-Former; 1 (Dinomaly2) is a constant rate after the warm-up.

    A training shorter than its warm-up never leaves it. Raises ValueError for that where total_steps is given, and for
    negative numbers.
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int | None = None, warmup_steps: int = 100, final_ratio: float = 0.1
    ) -> None:
        if warmup_steps < 0 or final_ratio < 0 or (total_steps is not None and warmup_steps > total_steps):
            raise ValueError(
                f"The warm-up must fit into the training, found warmup_steps={warmup_steps} of total_steps={total_steps}, "
                f"and final_ratio must not be negative, found {final_ratio}. Lower warmup_steps or train longer."
            )
        self.total_steps, self.warmup_steps, self.final_ratio = total_steps, warmup_steps, final_ratio
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        """The learning rate of each parameter group in the present step."""
        return [rate * self.factor(self.last_epoch) for rate in self.base_lrs]

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied by in step 0, 1, 2, ..."""
        if step < self.warmup_steps:
            return step / max(1, self.warmup_steps - 1)
        if self.total_steps is None:
            raise ValueError("total_steps of WarmCosine is None: set it to the number of steps of the training.")
        length = self.total_steps - self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / length) if length > 0 else 1.0
        return self.final_ratio + (1 - self.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


class WarmStairs(LRScheduler):
    """Learning rate per step: linear warm-up, then half a cosine that falls in stairs, as in CFLOW's code. Step it per step.

    The training is cut into `stairs` equal parts (CFLOW: meta-epochs). The rate of part k is
    final_ratio + (1 - final_ratio) (1 + cos(pi k / stairs)) / 2 of the full one; in the first `warm` parts it rises instead,
    linearly from `start_ratio` to the rate of part `warm`. total_steps: None = the training's length, which whoever trains fills
    in.

    Raises ValueError for numbers that make no such schedule.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | None = None,
        stairs: int = 25,
        warm: int = 2,
        start_ratio: float = 0.1,
        final_ratio: float = 1e-3,
    ) -> None:
        if not 0 <= warm < stairs or start_ratio < 0 or final_ratio < 0:
            raise ValueError(
                f"WarmStairs needs 0 <= warm < stairs and no negative ratio, found warm={warm}, stairs={stairs}, "
                f"start_ratio={start_ratio}, final_ratio={final_ratio}."
            )
        self.total_steps, self.stairs, self.warm = total_steps, stairs, warm
        self.start_ratio, self.final_ratio = start_ratio, final_ratio
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        """The learning rate of each parameter group in the present step."""
        return [rate * self.factor(self.last_epoch) for rate in self.base_lrs]

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied by in step 0, 1, 2, ..."""
        if not step:
            return self.start_ratio if self.warm else 1.0
        if self.total_steps is None:
            raise ValueError("total_steps of WarmStairs is None: set it to the number of steps of the training.")
        part = min(step / self.total_steps, 1) * self.stairs
        if part < self.warm:
            return self.start_ratio + part / self.warm * (self._stair(self.warm) - self.start_ratio)
        return self._stair(math.floor(part))

    def _stair(self, part: int) -> float:
        return self.final_ratio + (1 - self.final_ratio) * 0.5 * (1 + math.cos(math.pi * part / self.stairs))


class Drops(LRScheduler):
    """Learning rate per step, multiplied by `ratio` at a share of the training, and again at another. Step it per step.

    DRAEM: a fifth at 0.8 and at 0.9. EfficientAD: a tenth at 0.95, and at 1, which no step reaches. total_steps: None = the
    training's length, which whoever trains fills in.

    Raises ValueError for shares outside (0, 1] or a negative ratio.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | None = None,
        first: float = 0.8,
        second: float = 0.9,
        ratio: float = 0.2,
    ) -> None:
        if not (0 < first <= 1 and 0 < second <= 1 and ratio >= 0):
            raise ValueError(
                f"Drops needs shares in (0, 1] and no negative ratio, found first={first}, second={second}, ratio={ratio}."
            )
        self.total_steps, self.first, self.second, self.ratio = total_steps, first, second, ratio
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        """The learning rate of each parameter group in the present step."""
        return [rate * self.factor(self.last_epoch) for rate in self.base_lrs]

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied by in step 0, 1, 2, ..."""
        if not step:
            return 1.0
        if self.total_steps is None:
            raise ValueError("total_steps of Drops is None: set it to the number of steps of the training.")
        return self.ratio ** sum(step >= share * self.total_steps for share in (self.first, self.second))


class HalfCosine(LRScheduler):
    """Learning rate per step: half a cosine from the full rate down to 0. Step it per step.

    Step k of N has (1 + cos(pi max(k - late, 0) / N)) / 2 of the rate. late: steps before the cosine begins; 1 where the
    schedule is asked before the optimiser's first step, as in CutPaste's reimplementation, so that two steps have the full
    rate. total_steps: N; None = the training's length, which whoever trains fills in.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int | None = None, late: int = 1) -> None:
        if late < 0:
            raise ValueError(f"late must not be negative, found {late}.")
        self.total_steps, self.late = total_steps, late
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        """The learning rate of each parameter group in the present step."""
        return [rate * self.factor(self.last_epoch) for rate in self.base_lrs]

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied by in step 0, 1, 2, ..."""
        late = max(step - self.late, 0)
        if late == 0:
            return 1.0
        if self.total_steps is None:
            raise ValueError("total_steps of HalfCosine is None: set it to the number of steps of the training.")
        return 0.5 * (1 + math.cos(math.pi * min(late, self.total_steps) / self.total_steps))
