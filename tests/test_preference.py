"""Preference objectives through the public functions: fp64 oracle, backends, layouts, weights, bad
input (PROMISES N1, N2, N3, N7, N11, N12).
"""

from dataclasses import replace

import compare
import pytest
import torch
from batches import BACKENDS
from preference_cases import BATCHWISE, CASES, LENGTHS, PAIRED, B, P, S, T, draw, run, truth

import pyoffline as po

pytestmark = pytest.mark.usefixtures("one_thread")
each_case = pytest.mark.parametrize("name", CASES)
each_pair = pytest.mark.parametrize("name", PAIRED)


def same(got, want, tol=1e-11):
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


@each_case
def test_n1_loss_and_gradients_equal_fp64_autograd_of_the_formula(name):
    batch = draw(name)
    got = run(batch, CASES[name][0])
    for x, want in zip(got, truth(name, batch), strict=False):
        same(x, want)


@each_case
@pytest.mark.parametrize("backend", BACKENDS)
def test_n1_fp32_and_bf16_are_as_close_to_the_truth_as_plain_pytorch(name, backend):
    for dtype in (torch.float32, torch.bfloat16):
        batch = draw(name, 1, dtype)
        want = truth(name, batch)
        plain = run(batch, CASES[name][0], "reference")
        got = run(batch, CASES[name][0], backend)
        compare.check_forward("loss", got[0], want[0], plain[0])
        compare.check_gradient("dhidden", got[1], want[1], plain[1])
        compare.check_gradient("dweight", got[2], want[2], plain[2])


@each_case
def test_given_logits_get_the_same_loss_and_the_gradient_of_the_formula(name):
    batch = draw(name, 2)
    logits = (batch["hidden"] @ batch["weight"].T).requires_grad_()
    out = po.policy_loss(logits, batch["tokens"], CASES[name][0])
    (dz,) = torch.autograd.grad(out.loss, logits)
    loss, dx, _ = truth(name, batch)
    same(out.loss.detach(), loss)
    same(dz @ batch["weight"], dx)


@each_case
@pytest.mark.parametrize("rows", [1, 4, 7])
def test_the_chunk_plan_and_a_frozen_head_change_nothing(name, rows):
    batch = draw(name, 3)
    want = run(batch, CASES[name][0])
    with po.chunk_rows(rows):
        for x, y in zip(run(batch, CASES[name][0])[:3], want, strict=False):
            same(x, y, 1e-12)
        x = batch["hidden"].detach().requires_grad_()
        out = po.linear_policy_loss(x, po.Head(batch["weight"]), batch["tokens"], CASES[name][0])
        same(torch.autograd.grad(out.loss, x)[0], want[1], 1e-12)


@each_case
def test_a_packed_batch_equals_the_padded_one(name):
    batch = draw(name, 4)
    want = run(batch, CASES[name][0])
    tokens = batch["tokens"]
    keep = tokens.labels >= 0
    ids = torch.arange(S)[:, None].expand(S, T)[keep]
    pick = {k: getattr(tokens, k) for k in ("ref_logps",) if getattr(tokens, k) is not None}
    packed = replace(
        tokens,
        labels=tokens.labels[keep],
        sequence_ids=ids,
        extra={k: v[keep] for k, v in tokens.extra.items()} if tokens.extra else None,
        **{k: v[keep] for k, v in pick.items()},
    )
    got = run({**batch, "hidden": batch["hidden"][keep], "tokens": packed}, CASES[name][0])
    same(got[0], want[0], 1e-13)
    same(got[1], want[1][keep], 1e-13)
    same(got[2], want[2], 1e-12)


@pytest.mark.parametrize("name", [n for n in CASES if CASES[n][3]])
def test_reference_sums_per_sequence_serve_as_well_as_per_token(name):
    batch = draw(name, 5)
    want = run(batch, CASES[name][0])
    tokens = batch["tokens"]
    sums = torch.where(tokens.labels >= 0, tokens.ref_logps, 0.0).sum(1)
    sequences = replace(tokens.sequences, ref_logps=sums)
    got = run(batch, CASES[name][0], ref_logps=None, sequences=sequences)
    for x, y in zip(got[:3], want, strict=False):
        same(x, y, 1e-12)


def test_a_reference_head_is_one_more_call():
    """What a reference model costs: one GEMM, no logits."""
    batch = draw("sigmoid", 6)
    head = po.Head(torch.randn(*batch["weight"].shape, dtype=torch.float64).mul(0.5))
    with torch.no_grad():
        ref = po.linear_token_logps(batch["hidden"], head, batch["tokens"].labels).logps
    got = run(batch, po.DPO(B), ref_logps=ref)
    batch["tokens"] = replace(batch["tokens"], ref_logps=ref)
    same(got[0], truth("sigmoid", batch)[0])


SHIFTABLE = ("sigmoid", "soft", "margin", "rewards", "hinge", "exo_pair", "robust", "discopop")


@pytest.mark.parametrize("name", [*SHIFTABLE, "aot", "list_dpo"])
def test_a_constant_on_every_answer_changes_nothing(name):
    """The partition function of the reference cancels in x_w - x_l."""
    batch = draw(name, 7)
    want = run(batch, CASES[name][0])
    tokens = batch["tokens"]
    sums = torch.where(tokens.labels >= 0, tokens.ref_logps, 0.0).sum(1)
    sequences = replace(tokens.sequences, ref_logps=sums + 3.25)
    got = run(batch, CASES[name][0], ref_logps=None, sequences=sequences)
    for x, y in zip(got[:3], want, strict=False):
        same(x, y, 1e-12)


def permuted(batch: dict, order) -> dict:
    tokens = batch["tokens"]
    given = {k: v[order] for k, v in vars(tokens.sequences).items() if v is not None}
    ref = None if tokens.ref_logps is None else tokens.ref_logps[order]
    extra = {k: v[order] for k, v in tokens.extra.items()} if tokens.extra else None
    weights = None if tokens.weights is None else tokens.weights[order]
    moved = replace(
        tokens,
        labels=tokens.labels[order],
        ref_logps=ref,
        extra=extra,
        weights=weights,
        sequences=po.SequenceBatch(**given),
    )
    return {**batch, "hidden": batch["hidden"][order], "tokens": moved}


@each_pair
def test_pairs_may_come_in_any_order(name):
    batch, order = draw(name, 8), torch.tensor([2, 0, 3, 1])
    order = torch.cat([order, order + P])
    want = run(batch, CASES[name][0])
    got = run(permuted(batch, order), CASES[name][0])
    same(got[0], want[0], 1e-13)
    same(got[1], want[1][order], 1e-13)


@pytest.mark.parametrize("name", [n for n in PAIRED if n not in BATCHWISE])
@pytest.mark.parametrize("weighted", ["tokens", "sequences"])
def test_n11_micro_batches_of_pairs_add_up_to_the_full_batch(name, weighted):
    """The caller owns the normaliser: token weights, or with them the pairs' own weights."""
    batch = draw(name, 9)
    g = torch.Generator().manual_seed(9)
    change = {"weights": torch.rand(S, T, generator=g, dtype=torch.float64) + 0.1}
    if weighted == "sequences":
        omega = torch.rand(S, generator=g, dtype=torch.float64)
        change["sequences"] = replace(batch["tokens"].sequences, weights=omega)
    batch["tokens"] = replace(batch["tokens"], **change)
    want = run(batch, CASES[name][0])
    total, dw, dx = 0.0, 0.0, torch.zeros_like(want[1])
    for part in ([0, 2], [1], [3]):
        rows = torch.tensor([*part, *(i + P for i in part)])
        got = run(permuted(batch, rows), CASES[name][0])
        total, dw = total + got[0], dw + got[2]
        dx[rows] = got[1]
    same(total, want[0], 1e-12)
    same(dx, want[1], 1e-12)
    same(dw, want[2], 1e-12)


def test_n11_a_pair_weighs_the_tokens_of_both_its_sequences():
    batch = draw("sigmoid", 10)
    weights = torch.rand(S, T, dtype=torch.float64) + 0.1
    valid = batch["tokens"].labels >= 0
    omega = torch.where(valid, weights, 0.0).sum(1)
    x = (run(batch, po.DPO(B))[3].stats.logps - batch["tokens"].ref_logps).where(valid, 0.0).sum(1)
    each = -torch.nn.functional.logsigmoid(B * (x[:P] - x[P:]))
    got = run(batch, po.DPO(B), weights=weights)
    same(got[0], ((omega[:P] + omega[P:]) * each).sum())
    sequences = po.SequenceBatch(weights=torch.arange(S, dtype=torch.float64))
    got = run(batch, po.DPO(B), sequences=sequences)
    same(got[0], (torch.tensor([4.0, 6, 8, 10], dtype=torch.float64) * each).sum())


@each_pair
def test_a_fully_ignored_pair_does_not_exist(name):
    batch = draw(name, 11)
    order = torch.tensor([0, 1, 3, 4, 5, 7])
    want = run(permuted(batch, order), CASES[name][0])
    labels = batch["tokens"].labels.clone()
    labels[[2, 6]] = -100
    got = run(batch, CASES[name][0], labels=labels)
    same(got[0], want[0], 1e-13)
    same(got[1][order], want[1], 1e-13)
    assert (got[1][[2, 6]] == 0).all()


@each_case
@pytest.mark.parametrize("backend", BACKENDS)
def test_n2_what_an_ignored_token_holds_is_never_read(name, backend):
    dtype = torch.float32
    batch = draw(name, 12, dtype)
    want = run(batch, CASES[name][0], backend)
    tokens = batch["tokens"]
    hole = tokens.labels < 0
    hidden = batch["hidden"].clone()
    hidden[hole] = torch.nan
    change = {}
    if tokens.ref_logps is not None:
        change["ref_logps"] = tokens.ref_logps.masked_fill(hole, torch.inf)
    got = run({**batch, "hidden": hidden}, CASES[name][0], backend, **change)
    for k, (x, y) in enumerate(zip(got[:3], want[:3], strict=True)):
        compare.same_bits(str(k), x, y)


@pytest.mark.parametrize("name", [n for n in PAIRED if n not in BATCHWISE])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_n3_a_bad_pair_shows_and_leaves_the_other_pairs_alone(name, backend, bad):
    batch = draw(name, 13, torch.float32)
    want = run(batch, CASES[name][0], backend)
    hidden = batch["hidden"].clone()
    hidden[1, 0] = bad
    got = run({**batch, "hidden": hidden}, CASES[name][0], backend)
    assert not got[0].isfinite() and not got[1][1, 0].isfinite().all()
    others = torch.tensor([i for i in range(S) if i not in (1, 1 + P)])
    compare.same_bits("dhidden", got[1][others], want[1][others])


@pytest.mark.parametrize("name", ["list_dpo", "rrhf"])
def test_n3_a_bad_answer_stays_in_its_group(name):
    batch = draw(name, 14)
    want = run(batch, CASES[name][0])
    hidden = batch["hidden"].clone()
    hidden[2, 0] = torch.nan
    got = run({**batch, "hidden": hidden}, CASES[name][0])
    others = batch["values"]["group_ids"] != batch["values"]["group_ids"][2]
    assert got[0].isnan() and got[1][2].isnan().any()
    compare.same_bits("dhidden", got[1][others], want[1][others])


@pytest.mark.parametrize("name", [n for n in CASES if CASES[n][3] and n not in ("list_dpo", "rpo")])
@pytest.mark.parametrize("far", [(1e4, -1e4), (-1e4, 1e4), (1e4, 1e4), (700.0, -88.0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_n4_extreme_log_ratios_give_a_value_or_a_visible_inf(name, far, backend):
    batch = draw(name, 15, torch.float32)
    tokens = batch["tokens"]
    ref = torch.where(tokens.labels >= 0, tokens.ref_logps, 0.0).sum(1)
    ref[:P], ref[P:] = ref[:P] - far[0], ref[P:] - far[1]
    sequences = replace(tokens.sequences, ref_logps=ref)
    loss, dx, dw, _ = run(batch, CASES[name][0], backend, ref_logps=None, sequences=sequences)
    assert not loss.isnan()
    if loss.isfinite() and abs(loss) < 1e30:
        assert not dx.isnan().any() and not dw.isnan().any()


def test_metrics_are_those_that_trl_plots():
    batch = draw("sigmoid", 16)
    out = run(batch, po.DPO(B))[3]
    valid = batch["tokens"].labels >= 0
    logps = out.stats.logps.where(valid, 0.0).sum(1)
    x = logps - batch["tokens"].ref_logps.where(valid, 0.0).sum(1)
    up, down = B * x[:P], B * x[P:]
    want = {
        "rewards/chosen": up.mean(),
        "rewards/rejected": down.mean(),
        "rewards/margins": (up - down).mean(),
        "rewards/accuracies": (up > down).double().mean(),
        "logps/chosen": logps[:P].mean(),
        "logps/rejected": logps[P:].mean(),
    }
    for name, value in want.items():
        same(out.metrics[name], value)


def test_lengths_are_those_of_the_tokens_that_count():
    """`ipo` and `sigmoid_norm` divide by them; a token of weight 0 counts no more."""
    assert sum(LENGTHS) == int((draw("ipo")["tokens"].labels >= 0).sum())
    batch = draw("ipo", 17)
    weights = torch.full((S, T), 0.1, dtype=torch.float64)
    weights[4, 3:] = 0.0
    sequences = po.SequenceBatch(weights=torch.full((S,), 0.5 / P, dtype=torch.float64))
    got = run(batch, po.DPO(B, loss="ipo"), weights=weights, sequences=sequences)
    labels = batch["tokens"].labels.clone()
    labels[4, 3:] = -100
    batch["tokens"] = replace(batch["tokens"], labels=labels)
    same(got[0], truth("ipo", batch)[0])
