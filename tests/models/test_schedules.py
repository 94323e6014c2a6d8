"""The learning rates of CFLOW, DRAEM and EfficientAD, step by step, against other implementations of them."""

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR, StepLR

from models.optimizers import Drops, WarmStairs

RATE = 2e-4


def rates(make, steps):
    """The rate that each of so many steps is made with."""
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=RATE)
    schedule, found = make(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_cflows_rate_warms_up_by_batches_and_falls_by_meta_epochs():
    meta_epochs, warm, batches = 25, 2, 8 * 3
    lowest = RATE * 1e-3

    def cosine(epoch):
        return lowest + (RATE - lowest) * (1 + math.cos(math.pi * epoch / meta_epochs)) / 2

    expected = []
    for epoch in range(meta_epochs):
        for batch in range(batches):
            risen = (batch + epoch * batches) / (warm * batches)
            expected.append(RATE / 10 + risen * (cosine(warm) - RATE / 10) if epoch < warm else cosine(epoch))
    found = rates(lambda optimizer: WarmStairs(optimizer, meta_epochs * batches), len(expected))
    assert found == pytest.approx(expected, rel=1e-12)


def test_without_a_warm_up_the_stairs_begin_at_the_full_rate():
    found = rates(lambda optimizer: WarmStairs(optimizer, 40, stairs=4, warm=0, final_ratio=0.0), 40)
    assert found == pytest.approx(
        [RATE * (1 + math.cos(math.pi * part / 4)) / 2 for part in range(4) for _ in range(10)]
    )


@pytest.mark.parametrize("steps", [20, 100, 700])
def test_draems_and_efficientads_rates_drop_where_torch_drops_them(steps):
    draem = rates(lambda optimizer: Drops(optimizer, steps), steps)
    milestones = [steps * 8 // 10, steps * 9 // 10]
    assert draem == pytest.approx(rates(lambda optimizer: MultiStepLR(optimizer, milestones, gamma=0.2), steps))
    efficientad = rates(lambda optimizer: Drops(optimizer, steps, first=0.95, second=1.0, ratio=0.1), steps)
    assert efficientad == pytest.approx(rates(lambda optimizer: StepLR(optimizer, steps * 95 // 100, 0.1), steps))


@pytest.mark.parametrize("kind", [WarmStairs, Drops])
def test_a_schedule_goes_on_from_its_state_and_stays_after_its_end(kind):
    whole = rates(lambda optimizer: kind(optimizer, 50), 60)
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=RATE)
    schedule = kind(optimizer, 50)
    for _ in range(30):
        optimizer.step()
        schedule.step()
    again = SGD([nn.Parameter(torch.zeros(1))], lr=RATE)
    resumed = kind(again)  # its length comes with the state
    resumed.load_state_dict(schedule.state_dict())
    again.load_state_dict(optimizer.state_dict())
    found = []
    for _ in range(30, 60):
        found.append(again.param_groups[0]["lr"])
        again.step()
        resumed.step()
    assert found == whole[30:]
    assert len(set(whole[50:])) == 1


@pytest.mark.parametrize("kind", [WarmStairs, Drops])
def test_a_schedule_of_unknown_length_says_so(kind):
    with pytest.raises(ValueError, match=f"total_steps of {kind.__name__} is None"):
        rates(lambda optimizer: kind(optimizer), 2)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (WarmStairs, {"warm": 25}),
        (WarmStairs, {"start_ratio": -0.1}),
        (Drops, {"first": 0.0}),
        (Drops, {"second": 1.5}),
        (Drops, {"ratio": -1.0}),
    ],
)
def test_numbers_that_make_no_schedule_are_refused(kind, options):
    with pytest.raises(ValueError, match=f"{kind.__name__} needs"):
        kind(SGD([nn.Parameter(torch.zeros(1))], lr=RATE), 100, **options)
