"""The chunk plan and its context managers: within the budget, equal chunks, fixed shapes in
deterministic mode, and numbers that do not depend on it beyond rounding.
"""

import threading

import pytest
import torch

import pyoffline as po
from pyoffline.plan import (
    DETERMINISTIC_ROWS,
    MIB,
    READ_AT_RUN,
    PlanSettings,
    current_settings,
    plan_chunks,
    plan_list,
    settings_of,
)

NONE = PlanSettings(0, 0, False)

# n, vocab, itemsize, settings -> rows, chunks, padded; reason
TABLE = [
    ((100, 1000, 4, NONE), (100, 1, False), "everything fits the default 448 MiB"),
    ((0, 1000, 4, NONE), (1, 0, False), "no rows, no chunks"),
    ((4096, 131072, 4, NONE), (832, 5, False), "448 MiB / 512 KiB a row"),
    ((4097, 131072, 4, NONE), (832, 5, False), "one row more: equal chunks, cut at 16"),
    ((100, 1000, 4, PlanSettings(0, 1, False)), (1, 100, False), "at least one row"),
    ((100, 1000, 4, PlanSettings(7, 0, False)), (7, 15, False), "chunk_rows wins"),
    ((100, 1000, 4, PlanSettings(7, 1, False)), (7, 15, False), "over the budget too"),
    ((100, 1000, 4, PlanSettings(0, 0, True)), (DETERMINISTIC_ROWS, 1, True), "padded"),
    ((300, 1000, 4, PlanSettings(0, 0, True)), (DETERMINISTIC_ROWS, 2, True), "fixed shape"),
    ((300, 1000, 4, PlanSettings(0, 40000, True)), (10, 30, True), "fixed within the budget"),
    ((300, 1000, 4, PlanSettings(64, 0, True)), (64, 5, True), "chunk_rows sets the shape"),
]


@pytest.mark.parametrize(("given", "want", "reason"), TABLE)
def test_plan_table(given, want, reason):
    plan = plan_chunks(*given, "cpu")
    assert (plan.rows, len(plan.bounds), plan.padded) == want, reason


def test_m2_plans_cover_every_row_once_and_keep_the_budget():
    g = torch.Generator().manual_seed(0)
    for _ in range(300):
        n, vocab = (int(torch.randint(1, top, (), generator=g)) for top in (5000, 300000))
        budget = int(torch.randint(1, 600, (), generator=g)) * MIB
        plan = plan_chunks(n, vocab, 2, PlanSettings(0, budget, False), "cpu")
        rows = [i for start, stop in plan.bounds for i in (start, stop)]
        assert rows[0] == 0 and rows[-1] == n
        assert rows[1:-1:2] == rows[2::2]
        tallest = max(stop - start for start, stop in plan.bounds)
        assert tallest * vocab * 2 <= max(budget, vocab * 2)
        assert len(plan.bounds) <= 1.2 * n * vocab * 2 / budget + 2 or tallest <= 16


def test_context_managers_nest_restore_and_stay_in_their_thread():
    before = current_settings()
    with po.chunk_rows(5), po.memory_budget(1000):
        with po.chunk_rows(3), po.deterministic():
            assert current_settings() == PlanSettings(3, 1000, True)
        assert current_settings() == PlanSettings(5, 1000, False)
        seen = []
        t = threading.Thread(target=lambda: seen.append(current_settings()))
        t.start()
        t.join()
        assert seen == [before]
    with pytest.raises(KeyError), po.chunk_rows(9):
        raise KeyError
    assert current_settings() == before


def test_n9_torchs_own_switch_is_deterministic_mode():
    torch.use_deterministic_algorithms(True)
    try:
        assert current_settings().deterministic
    finally:
        torch.use_deterministic_algorithms(False)
    assert not current_settings().deterministic


def test_plan_list_carries_the_settings_through_an_op():
    with po.chunk_rows(5), po.deterministic():
        assert settings_of(plan_list()) == PlanSettings(5, 0, True)
        assert settings_of([READ_AT_RUN]) == current_settings()
    assert settings_of(plan_list()) == NONE


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "4"])
@pytest.mark.parametrize("manager", [po.chunk_rows, po.memory_budget])
def test_a_setting_that_makes_no_sense_raises_at_once(manager, value):
    with pytest.raises(ValueError, match=repr(value)):
        manager(value)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_n8_the_plan_changes_nothing_but_rounding(backend):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 16, generator=g, requires_grad=True)
    w = torch.randn(97, 16, generator=g, requires_grad=True)
    labels = torch.randint(0, 97, (50,), generator=g)
    labels[::3] = -100

    def run():
        out = po.linear_policy_loss(x, po.Head(w), po.TokenBatch(labels), po.NLL())
        return [out.loss.detach(), out.stats.logps, *torch.autograd.grad(out.loss, (x, w))]

    with po.use_backend(backend):
        want = run()
        plans = (po.chunk_rows(1), po.chunk_rows(7), po.memory_budget(4096), po.deterministic())
        for plan in plans:
            with plan:
                torch.testing.assert_close(run(), want, rtol=1e-5, atol=1e-6)


def test_explain_follows_the_context_managers_and_prints():
    with po.chunk_rows(64):
        e = po.explain(1000, 128, 4096, torch.bfloat16)
    assert (e.chunk_rows, e.chunks) == (64, 16)
    assert e.chunk_nbytes == 64 * 4096 * 2
    assert e.accumulator_nbytes == 4096 * 128 * 4
    assert e.flop == 3 * 2 * 1000 * 128 * 4096
    assert "16 of 64 rows" in str(e)
    frozen = po.explain(1000, 128, 4096, torch.bfloat16, train_head=False)
    assert frozen.gemms == 2 and frozen.accumulator_nbytes == 0
