"""How a run chooses its room for tokens on their way to experts: up at once, down after a while, saved with the run."""

import json

import numpy as np
import pytest

from deepseek_jax.config import MoEConfig
from deepseek_jax.parallel.dispatch import ExpertMesh, LocalDispatcher, dispatchers
from deepseek_jax.training.room import PATIENCE, RoomControl

LADDER = dispatchers("all_to_all", MoEConfig(), ExpertMesh(1, 8), tokens=1024, slack=1.25)
SMALL = np.array([1024, 1024 * 8])
"""A demand that balanced routing has, and that the least setting holds: 1024 tokens, each with 8 experts."""


def run(control: RoomControl, demand: np.ndarray) -> int:
    """One step by the rules of `Trainer.step`: the settings that it tried."""
    tried = 1
    while not LADDER[control.setting(LADDER)].fits(demand):
        control.overflowed(LADDER)
        tried += 1
    control.fitted(LADDER, demand, 1024)
    return tried


def test_a_fresh_router_begins_above_the_least_room_and_comes_down():
    control = RoomControl()
    used = []
    for _ in range(PATIENCE + 2):
        assert run(control, SMALL) == 1
        used.append(control.used)
    assert used == [1] * PATIENCE + [0, 0]
    assert control.reruns == 0


def test_skew_costs_a_rerun_once_and_not_in_every_step():
    """The first steps of a router that sends nearly all to one device: as many reruns as settings, and no more."""
    control = RoomControl()
    for step in range(200):
        run(control, np.array([1024, int(7.5 * 1024 * 8)]) if step % 40 == 0 else SMALL)
    assert control.reruns == len(LADDER) - 2


def test_a_run_that_came_down_too_soon_waits_longer_before_the_next_time():
    control, steps = RoomControl(), []
    skewed = np.array([1024, 2 * 1024 * 8])
    for _ in range(4):
        count = 0
        while control.setting(LADDER) == 1:
            run(control, SMALL)
            count += 1
        steps.append(count)
        run(control, skewed)
    assert steps == [PATIENCE, 2 * PATIENCE, 4 * PATIENCE, 8 * PATIENCE]


def test_a_demand_that_leaves_no_air_keeps_the_room():
    control = RoomControl()
    tight = np.array([1024, LADDER[0].pairs])
    assert LADDER[0].fits(tight)
    for _ in range(3 * PATIENCE):
        run(control, tight)
    assert control.used == 1


def test_the_state_goes_through_a_checkpoint():
    control, again = RoomControl(), RoomControl()
    run(control, np.array([1024, 2 * 1024 * 8]))
    control.overflowed(LADDER)
    again.set_state(json.loads(json.dumps(control.get_state())))
    assert again.get_state() == control.get_state()
    assert again.setting(LADDER) == 2
    assert again.setting((LocalDispatcher(8),)) == 0, "on another mesh the ladder may be shorter"


def test_the_last_setting_never_overflows():
    control = RoomControl()
    control.set_state({"setting": len(LADDER) - 1, "calm": 0, "patience": 1})
    with pytest.raises(AssertionError, match="room for any routing"):
        control.overflowed(LADDER)
