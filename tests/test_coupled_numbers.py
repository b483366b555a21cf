"""Coupled objectives on every backend (PROMISES N1 to N5, N8, N9)."""

import math
from dataclasses import replace

import batches
import compare
import coupled_batches as cb
import coupled_oracle as co
import pytest
import torch
from batches import BACKENDS, DTYPES, dtype_name
from coupled_batches import CASES

import pyoffline as po
from pyoffline.coupled import Coupled
from pyoffline.coupled_table import COUPLED

pytestmark = pytest.mark.usefixtures("one_thread")
F64 = torch.float64
NAN, INF = math.nan, math.inf
GRADS = ("dhidden", "dweight", "dbias")
INPUTS = ("old", "mu", "ref", "adv", "rewards")
RARE = {"power_0", "renyi_1", "renyi_2", "elbo_0", "elbo_near_1", "kl_pg_all"}
MAIN = [n for n in CASES if n not in RARE]


class Bar:
    """The fp64 truth of a batch and the error of the same-dtype reference."""

    def __init__(self, batch, objective, upstream=1.0):
        self.truth = co.run(batch, objective, F64)
        self.plain = co.run(batch, objective, upstream=upstream)

    def check(self, got, names):
        compare.check_forward("logps", got["logps"], self.truth["logps"], self.plain["logps"])
        for name in names:
            compare.check_gradient(name, got[name], self.truth[name], self.plain[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", MAIN)
def test_N1_error_within_that_of_the_same_dtype_reference(name, dtype, backend):
    """In one chunk, in chunks cut at units, with units longer than a chunk, with a frozen head."""
    objective, reads = CASES[name]
    batch = cb.make(reads, dtype, seed=21, weights=True, bias=True)
    bar = Bar(batch, objective)
    bar.check(cb.run(batch, objective, backend), GRADS)
    with po.chunk_rows(6):
        bar.check(cb.run(batch, objective, backend), GRADS)
        bar.check(cb.run(batch, objective, backend, wanted=("hidden",)), ("dhidden",))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [6, 64])
def test_N1_head_options_and_a_loss_scale(rows, backend):
    head = {"softcap": 8.0, "logit_scale": 0.7, "temperature": 1.3}
    objective, reads = CASES["composed"]
    for options in ({"head": head, "bias": True}, {"temperature": True}):
        batch = cb.make(reads, torch.float16, seed=22, weights=True, **options)
        with po.chunk_rows(rows):
            got = cb.run(batch, objective, backend, upstream=2.0**16)
        bar = Bar(batch, objective, upstream=2.0**16)
        bar.check(got, [g for g in GRADS if g in got])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ["rising", "falling", "first_chunks_empty"])
def test_N1_fp16_coefficients_of_very_different_size(order, backend):
    """The power-of-two scale follows the largest coefficient seen; what is accumulated follows."""
    batch = cb.make("mu adv", torch.float16, seed=23, ignored=False)
    size = torch.logspace(-7, 1, 8)
    adv = {"rising": size, "falling": size.flip(0), "first_chunks_empty": size * (size > 1e-3)}
    batch["adv"] = adv[order]
    objective = po.SequencePowerIS(0.3)
    bar = Bar(batch, objective)
    for rows in (1, 9):
        with po.chunk_rows(rows):
            got = cb.run(batch, objective, backend)
        bar.check(got, ("dhidden", "dweight"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e30])
def test_N2_tokens_that_do_not_count_are_bitwise_invisible(value, backend):
    for name in ("gspo", "renyi", "kl_pg", "opsm_ppo", "iw_sft", "with_nll"):
        objective, reads = CASES[name]
        batch = cb.make(reads, seed=24, weights=True, lengths=(5, 1, 9, 3, 7, 2, 6, 4))
        empty = batch["ids"] == 3
        batch["labels"][empty] = -100
        out = (batch["labels"] == -100) | (batch["weights"] == 0)
        poison = dict(batch)
        for key in ("hidden", "old", "mu", "ref", "weights"):
            if batch[key] is not None:
                poison[key] = batch[key].clone()
                poison[key][out if key != "weights" else batch["labels"] == -100] = value
        for key in ("adv", "rewards"):  # of a sequence without a token that counts
            if batch[key] is not None:
                poison[key] = batch[key].clone()
                poison[key][3] = value
        for rows in (5, 100):
            with po.chunk_rows(rows):
                clean = cb.run(batch, objective, backend)
                got = cb.run(poison, objective, backend)
            assert (clean["dhidden"][out] == 0).all() and clean["loss"].isfinite()
            for key in ("loss", "dhidden", "dweight", *batches.STATS):
                compare.same_bits(f"{name} {key}", got[key], clean[key])
            for key, x in got["metrics"].items():
                compare.same_bits(f"{name} {key}", x, clean["metrics"][key])


def units(batch, objective):
    kinds = {row.unit for row in objective.program(True).coupled}
    return batch["group"][batch["ids"]] if kinds - {"sequence"} else batch["ids"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MAIN)
def test_N3_a_broken_token_shows_and_stays_in_its_unit(name, backend):
    objective, reads = CASES[name]
    batch = cb.make(reads, seed=25, weights=True)
    token = int((batch["ids"] == 2).nonzero()[1, 0])
    assert batch["labels"][token] != -100 and batch["weights"][token] != 0
    mine = units(batch, objective)
    mine = mine == mine[token]
    for key in ("hidden", *INPUTS):
        if batch.get(key) is None:
            continue
        broken = {**batch, key: batch[key].clone()}
        broken[key][2 if key in ("adv", "rewards") else token] = NAN
        for rows in (6, 100):
            with po.chunk_rows(rows):
                clean = cb.run(batch, objective, backend)
                got = cb.run(broken, objective, backend)
                frozen = cb.run(broken, objective, backend, wanted=("hidden",))
            assert not got["loss"].isfinite(), key
            assert not got["dhidden"][mine].isfinite().all(), key
            assert not frozen["dhidden"][mine].isfinite().all(), key
            compare.same_bits(key, got["dhidden"][~mine], clean["dhidden"][~mine])
            assert frozen["dhidden"][~mine].isfinite().all()


def record(offset: float, reward: float) -> Coupled:
    """Two sequences of two tokens in one group, l - anchor = offset in the first one."""
    logp = torch.tensor([-0.5, -1.5, -2.0, -0.1], dtype=F64)
    moved = torch.tensor([offset, offset, 0.1, -0.2], dtype=F64)
    value = torch.tensor([reward, 0.5], dtype=F64)
    seq = torch.tensor([0, 0, 1, 1])
    half = torch.full((2,), 0.5, dtype=F64)
    anchors = dict.fromkeys(("old", "mu", "ref"), logp - moved)
    stats = dict.fromkeys(("entropy", "lse", "log_sum_p2"), logp)
    tokens = {"weights": half[seq], "seq": seq, "adv": value[seq]}
    lengths, group = torch.tensor([2, 2]), torch.tensor([0, 0])
    return Coupled(
        logp, **stats, **tokens, lengths=lengths, omega=half, group=group, rewards=value, **anchors
    )


PARAMS = {
    "gspo": (0.2, 0.2),
    "luspo": (0.2, 0.2),
    "gmpo": (0.4,),
    "vespo": (2.0, 3.0, 3.0, 2.0),
    "importance_weighted_sft_sequence": (2.0, 0.0, 16.0),
    "sequence_power_is": (0.5,),
    "renyi_rwr": (0.5, 1.0),
    "renyi_rwr_zero": (0.0, 1.0),
    "alpha_elbo": (0.5, 1.0),
    "a_star_po": (1e-3,),
    "kl_regularized_pg": (0.1, 1.0),
    "topr": (),
}
OFFSETS = [s * x for x in (0.0, 20.0, 88.0, 89.0, 100.0, 700.0, 1e30) for s in (1.0, -1.0)]


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("name", PARAMS)
def test_N4_extreme_log_ratios_give_the_value_or_inf_never_nan(name, offset):
    for reward in (-1.0, 0.0, 1.0):
        c = replace(record(offset, reward), params=PARAMS[name])
        got = COUPLED[name].fn(c)
        for x in (got.loss, got.a, *got.metrics.values()):
            assert not x.isnan().any(), (reward, x)
        first = got.loss if got.loss.numel() == 2 else got.loss[:1]
        if name in ("gspo", "luspo", "gmpo", "sequence_power_is", "vespo") and reward == 0:
            assert first[0] == 0 and (got.a[:2] == 0).all()
        if name in ("gspo", "luspo", "gmpo") and reward and abs(offset) > 1:
            if (offset > 0) == (reward > 0):
                assert (got.a[:2] == 0).all()
            elif name != "gmpo":
                want = -0.5 * reward * torch.tensor(offset, dtype=F64).exp()
                assert (got.a[0] == want * (1.0 if name == "luspo" else 0.5)).all()
        assert got.a[2:].isfinite().all() or COUPLED[name].unit == "group"


@pytest.mark.parametrize("backend", BACKENDS)
def test_N4_a_clipped_sequence_has_gradient_exactly_0(backend):
    batch = cb.make("old adv", seed=26, ignored=False)
    batch["adv"] = torch.ones(8)
    batch["old"] = cb.run({**batch, "adv": None}, po.KL("k1", "old"), backend)["logps"]
    high = torch.tensor([0, 1, 0, 1, 1, 0, 0, 1])[batch["ids"]].bool()
    batch["old"] = torch.where(high, batch["old"] - 2.0, batch["old"])
    for objective in (po.GSPO(0.2, 0.2), po.LUSPO(0.2, 0.2), po.GMPO(0.4)):
        for rows in (4, 100):
            with po.chunk_rows(rows):
                got = cb.run(batch, objective, backend)
            assert (got["dhidden"][high] == 0).all() and (got["dhidden"][~high] != 0).any(-1).all()


def test_N4_borders_count_as_unclipped():
    c = record(0.0, 1.0)
    for clip_high in (0.0, 0.5):
        old = c.logp - math.log1p(clip_high)
        got = COUPLED["gspo"].fn(replace(c, old=old, params=(1.0, clip_high)))
        ratio = torch.exp(c.mean(c.logp - old))
        unclipped = ratio <= 1 + clip_high
        assert unclipped.any() and ((c.first(got.a) != 0) == unclipped).all()


def test_N5_a_long_sequence_keeps_its_digits():
    """W of 4,096 tokens: the sum is exact enough that only the log-probs' rounding is left."""
    n = 4096
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(n, 5, generator=g) * 3
    labels = torch.randint(0, 5, (n,), generator=g)
    truth = logits.double().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    mu = (truth + 0.01 * torch.randn(n, generator=g)).float()
    batch = po.TokenBatch(
        labels,
        advantages=torch.ones(1),
        behavior_logps=mu,
        sequence_ids=torch.zeros(n, dtype=torch.long),
    )
    for backend in ("reference", "cpu"):
        with po.use_backend(backend):
            out = po.policy_loss(logits, batch, po.SequencePowerIS(1.0))
        want = -torch.expm1((truth - mu.double()).sum())
        assert abs(out.loss - want) <= 2e-4 * want.abs(), backend


@pytest.mark.parametrize("name", ["gspo", "renyi", "kl_pg"])
def test_N8_error_does_not_grow_with_the_number_of_chunks(name):
    """fp32 dweight of 96 chunks against one, on the truth's scale."""
    objective, reads = CASES[name]
    lengths = (1,) * 96 if name != "renyi" else (2,) * 96
    batch = cb.make(reads, seed=27, lengths=lengths, ignored=False, groups=tuple(range(96)))
    truth = co.run(batch, objective, F64)["dweight"]
    error = []
    for rows in (1 if name != "renyi" else 2, 400):
        with po.chunk_rows(rows):
            got = cb.run(batch, objective, "reference")["dweight"]
        error.append((got.double() - truth).square().mean().sqrt())
    assert error[0] <= 1.5 * error[1] + 2e-9 * truth.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["gspo", "renyi", "opsm_ppo"])
def test_N9_same_bits_run_to_run_and_log_probs_of_any_batch(name, backend):
    objective, reads = CASES[name]
    batch = cb.make(reads, torch.bfloat16, seed=28, weights=True)
    with po.deterministic(), po.chunk_rows(8):
        a, b = (cb.run(batch, objective, backend) for _ in range(2))
        for key in ("loss", "logps", "dhidden", "dweight"):
            compare.same_bits(key, a[key], b[key])
        some = batch["ids"] >= 4
        part = {k: None if x is None else x[some] for k, x in rows_of(batch)}
        part = {**batch, **part, "ids": batch["ids"][some] - 4}
        for k in ("adv", "rewards", "group"):
            part[k] = None if batch[k] is None else batch[k][4:]
        compare.same_bits("logps", cb.run(part, objective, backend)["logps"], a["logps"][some])
    scored = cb.run(batch, objective, backend)["logps"]
    logps = po.linear_token_logps(batch["hidden"], po.Head(batch["weight"]), batch["labels"]).logps
    counted = scored != 0
    assert (scored - logps)[counted].abs().max() <= 1e-5


def rows_of(batch):
    return [(k, batch[k]) for k in ("hidden", "labels", "weights", "old", "mu", "ref")]
