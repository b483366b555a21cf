"""Sequence and group objectives: formulas against fp64 autograd, and what must not change them."""

import coupled_batches as cb
import coupled_oracle as co
import pytest
import torch
from coupled_batches import CASES

import pyoffline as po

pytestmark = pytest.mark.usefixtures("one_thread")
F64 = torch.float64
GRADS = ("dhidden", "dweight")


def as_fp64(batch: dict) -> dict:
    floats = {k: x for k, x in batch.items() if torch.is_tensor(x) and x.is_floating_point()}
    return {**batch, **{k: x.double() for k, x in floats.items()}}


def close(got: dict, want: dict, names=("loss", *GRADS), tol=1e-12):
    for name in names:
        scale = want[name].abs().max().clamp(min=1e-3)
        worst = (got[name].double() - want[name].double()).abs().max()
        assert worst <= tol * scale, f"{name}: {worst:.2e} of {scale:.2e}"


@pytest.mark.parametrize("weighted", ["none", "weights", "omega"])
@pytest.mark.parametrize("name", CASES)
def test_N1_fp64_equals_autograd(name, weighted):
    objective, reads = CASES[name]
    options = {} if weighted == "none" else {weighted: True}
    if weighted == "omega" and not any(
        r.weighs != "token" for r in objective.program(True).coupled
    ):
        pytest.skip("a token-weighted objective reads no sequence weights")
    batch = as_fp64(cb.make(reads, seed=3, **options))
    truth = co.run(batch, objective)
    assert truth["dhidden"].abs().max() > 0 or name == "elbo_0"
    close(cb.run(batch, objective, "reference"), truth)
    logits = (batch["hidden"] @ batch["weight"].T).detach()
    close(
        cb.run_logits(logits, batch, objective, "reference"),
        co.run_logits(logits, batch, objective),
        ("loss", "dlogits"),
    )


@pytest.mark.parametrize("rows", [1, 4, 10, 25])
@pytest.mark.parametrize("name", CASES)
def test_N8_chunk_size_changes_nothing(name, rows):
    objective, reads = CASES[name]
    batch = as_fp64(cb.make(reads, seed=4, weights=True))
    whole = cb.run(batch, objective, "reference")
    with po.chunk_rows(rows):
        close(cb.run(batch, objective, "reference"), whole, ("loss", "logps", "entropy", *GRADS))
        frozen = cb.run(batch, objective, "reference", wanted=("hidden",))
        head = cb.run(batch, objective, "reference", wanted=("weight",))
    close(frozen, whole, ("loss", "dhidden"))
    close(head, whole, ("loss", "dweight"))
    for key, value in whole["metrics"].items():
        assert torch.allclose(frozen["metrics"][key], value, atol=1e-12, equal_nan=True), key


@pytest.mark.parametrize("name", CASES)
def test_N2_packed_equals_padded(name):
    """Whatever the padding holds."""
    objective, reads = CASES[name]
    batch = as_fp64(cb.make(reads, seed=5, weights=True))
    wide, place = cb.padded(batch)
    packed, full = cb.run(batch, objective, "reference"), cb.run(wide, objective, "reference")
    close(full, packed, ("loss", "dweight"))
    dhidden = full["dhidden"].reshape(-1, batch["hidden"].shape[1])
    close({"dhidden": dhidden[place]}, packed, ("dhidden",))
    rest = torch.ones(dhidden.shape[0], dtype=torch.bool)
    rest[place] = False
    assert (dhidden[rest] == 0).all()


@pytest.mark.parametrize("name", CASES)
def test_permutation_of_sequences_changes_nothing(name):
    objective, reads = CASES[name]
    batch = as_fp64(cb.make(reads, seed=6))
    order = torch.randperm(len(cb.LENGTHS), generator=torch.Generator().manual_seed(1))
    moved, rows = dict(batch), torch.cat([(batch["ids"] == i).nonzero()[:, 0] for i in order])
    for k in ("hidden", "labels", "old", "mu", "ref"):
        moved[k] = None if batch[k] is None else batch[k][rows]
    for k in ("adv", "rewards", "group"):
        moved[k] = None if batch[k] is None else batch[k][order]
    lengths = torch.tensor(cb.LENGTHS)[order]
    moved["ids"] = torch.repeat_interleave(torch.arange(len(order)), lengths)
    got, want = cb.run(moved, objective, "reference"), cb.run(batch, objective, "reference")
    close(got, want, ("loss", "dweight"))
    close(got, {"dhidden": want["dhidden"][rows]}, ("dhidden",))


@pytest.mark.parametrize("name", CASES)
def test_N11_micro_batches_add_up(name):
    """Cut between groups, with the caller's weights as the only normaliser."""
    objective, reads = CASES[name]
    groups = (1, 1, 1, 0, 0, 5, 5, 5)
    batch = as_fp64(cb.make(reads, seed=7, weights=True, groups=groups))
    whole = cb.run(batch, objective, "reference")
    parts = []
    for low, high in ((0, 3), (3, 5), (5, 8)):
        here = (batch["ids"] >= low) & (batch["ids"] < high)
        part = dict(batch)
        for k in ("hidden", "labels", "ids", "weights", "old", "mu", "ref"):
            part[k] = None if batch[k] is None else batch[k][here]
        for k in ("adv", "rewards", "group"):
            part[k] = None if batch[k] is None else batch[k][low:high]
        part["ids"] = part["ids"] - low
        parts.append(cb.run(part, objective, "reference"))
    total = {k: sum(p[k] for p in parts) for k in ("loss", "dweight")}
    close(total, whole, ("loss", "dweight"))
    close({"dhidden": torch.cat([p["dhidden"] for p in parts])}, whole, ("dhidden",))


@pytest.mark.parametrize("name", ["renyi", "renyi_0", "renyi_1", "elbo", "elbo_1"])
def test_a_constant_added_to_the_rewards_of_a_group_changes_no_gradient(name):
    objective, reads = CASES[name]
    batch = as_fp64(cb.make(reads, seed=8))
    offset = torch.where(batch["group"] == 7, 300.0, -5.0).double()
    moved = {**batch, "rewards": batch["rewards"] + offset}
    close(cb.run(moved, objective, "reference"), cb.run(batch, objective, "reference"), GRADS)


def pair(a, b, reads, names=("loss", *GRADS), seed=9, tol=1e-12, **changes):
    """Two objectives, or two batches, give the same."""
    batch = as_fp64(cb.make(reads, seed=seed, **changes))
    close(cb.run(batch, a, "reference"), cb.run(batch, b, "reference"), names, tol)


def test_limits():
    grouped = "mu rewards group"
    pair(po.RenyiRWR(1e-9), po.RenyiRWR(0.0), grouped, tol=1e-8)
    pair(po.RenyiRWR(1 + 1e-9), po.RenyiRWR(1.0), grouped, tol=1e-8)
    pair(po.AlphaELBO(1 - 1e-9), po.AlphaELBO(1.0), grouped, tol=1e-8)
    pair(po.AlphaELBO(1e-9), po.AlphaELBO(0.0), grouped, ("loss",), tol=1e-8)
    pair(po.SequencePowerIS(1e-9), po.SequencePowerIS(0.0), "mu adv", tol=1e-8)
    # clip -> infinity: the plain geometric-mean ratio, and nothing is clipped
    pair(po.GSPO(1.0, 1e30), po.GMPO(1e30), "old adv")


def test_reductions():
    one_token = (1,) * 8
    pair(po.GSPO(0.2, 0.3), po.PPOClip(0.2, 0.3), "old adv", lengths=one_token, ignored=False)
    pair(po.GMPO(1e30), po.PPOClip(1.0, 1e30), "old adv", lengths=one_token, ignored=False)
    pair(
        po.SequencePowerIS(1.0),
        po.ImportanceSampling(),
        "mu adv",
        GRADS,
        lengths=one_token,
        ignored=False,
    )
    pair(po.LUSPO(0.2, 0.2), po.GSPO(0.2, 0.2), "old adv", lengths=one_token, ignored=False)


def test_renyi_at_0_is_rwr_under_seq_mean_token_sum():
    batch = as_fp64(cb.make("rewards group", seed=10, ignored=False))
    adv = po.advantages.rwr(batch["rewards"], batch["group"], lam=1 / 0.7)
    mask = torch.ones_like(batch["labels"], dtype=torch.bool)
    weights = po.token_weights(mask, "seq-mean-token-sum", sequence_ids=batch["ids"]).double()
    plain = {**batch, "adv": adv, "rewards": None, "group": None, "weights": weights}
    # n_g softmax and 1/S: a group weighs n_g/S there, 1/G here
    size = torch.tensor([int((batch["group"] == g).sum()) for g in batch["group"]])
    batch["omega"] = torch.ones(8, dtype=F64) / size * (size / 8)
    got = cb.run(batch, po.RenyiRWR(0.0, 0.7), "reference")
    close(got, cb.run(plain, po.WeightedNLL(), "reference"))


def test_renyi_at_1_is_self_normalised_importance_sampling():
    batch = as_fp64(cb.make("mu rewards group", seed=11, groups=(0,) * 8, ignored=False))
    logps = cb.run(batch, po.RenyiRWR(1.0), "reference")["logps"]
    log_w = torch.zeros(8, dtype=F64).index_add_(0, batch["ids"], logps - batch["mu"])
    share = torch.softmax(log_w + batch["rewards"], 0)
    plain = {**batch, "mu": None, "adv": share, "rewards": None, "group": None}
    plain["weights"] = torch.ones(len(batch["ids"]), dtype=F64)
    close(
        cb.run(batch, po.RenyiRWR(1.0), "reference"),
        cb.run(plain, po.WeightedNLL(), "reference"),
        GRADS,
    )


def test_metrics():
    batch = as_fp64(cb.make("mu rewards group", seed=12, ignored=False))
    got = cb.run(batch, po.RenyiRWR(0.5, 0.7), "reference")
    log_w = torch.zeros(8, dtype=F64).index_add_(0, batch["ids"], got["logps"] - batch["mu"])
    divergence, ess = [], []
    for g in (7, -3, 2):
        x = (0.5 * log_w + batch["rewards"] / 0.7)[batch["group"] == g]
        divergence.append(-2.0 * x.exp().mean().log())
        q = torch.softmax(x, 0)
        ess.append(1 / (q.numel() * (q**2).sum()))
    for name, want in (("renyi/d_alpha", divergence), ("group_ess", ess)):
        assert torch.allclose(got["metrics"][name], torch.stack(want).mean(), rtol=1e-12), name
    batch = as_fp64(cb.make("old mu adv", seed=13))
    got = cb.run(batch, po.OPSM(po.GSPO(0.2, 0.2), 0.02), "reference")["metrics"]
    assert 0 < got["opsm/masked_fraction"] < 1 and 0 < got["clip_ratio/region_mean"] < 1
    assert {"num_tokens", "entropy", "approx_kl", "ess"} <= set(got)


def test_d_alpha_at_its_pole_is_infinite_and_not_nan():
    batch = as_fp64(cb.make("mu rewards group", seed=12, ignored=False))
    batch["rewards"] = torch.where(batch["group"] == 7, 9.0, -9.0).double()  # a log mean each side
    got = cb.run(batch, po.RenyiRWR(1.0), "reference")["metrics"]
    assert got["renyi/d_alpha"] == torch.inf and got["group_ess"].isfinite()
