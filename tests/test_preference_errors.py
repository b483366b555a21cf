"""Bad preference batches and parameters: each a clear error that says what to do (PROMISES N12)."""

import math
from dataclasses import replace

import pytest
import torch
from preference_cases import CASES, B, P, S, draw, run

import pyoffline as po
from pyoffline.coupled_table import COUPLED, COUPLED_OF_CODE, MASKS
from pyoffline.objectives import REGISTRY, from_name
from pyoffline.preference import F_DIVERGENCES
from pyoffline.preference_rows import DPO_LOSSES

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "aot", "orpo", "alpha_po", "cpo"])
@pytest.mark.parametrize("side", [1, 1 + P])
def test_a_lone_chosen_or_rejected_answer_is_an_error(name, side):
    batch = draw(name)
    labels = batch["tokens"].labels.clone()
    labels[side] = -100
    with pytest.raises(ValueError, match=r"tokens that count on one side only.*mask both"):
        run(batch, CASES[name][0], labels=labels)
    weights = torch.ones(labels.shape, dtype=torch.float64)
    weights[side] = 0.0
    with pytest.raises(ValueError, match="tokens that count on one side only"):
        run(batch, CASES[name][0], weights=weights)


@pytest.mark.parametrize("name", ["sigmoid", "orpo", "cpo"])
def test_an_odd_number_of_sequences_is_an_error(name):
    batch = draw(name)
    batch["hidden"] = batch["hidden"][:-1]
    ref = batch["tokens"].ref_logps
    with pytest.raises(ValueError, match="an even number of sequences .* got 7"):
        run(
            batch,
            CASES[name][0],
            labels=batch["tokens"].labels[:-1],
            ref_logps=None if ref is None else ref[:-1],
        )


@pytest.mark.parametrize("name", CASES)
def test_nothing_that_counts_is_a_loss_of_0(name):
    batch = draw(name)
    got = run(batch, CASES[name][0], labels=torch.full_like(batch["tokens"].labels, -100))
    assert got[0] == 0 and (got[1] == 0).all() and (got[2] == 0).all()


def test_an_empty_answer_of_a_group_is_not_there():
    batch = draw("list_dpo")
    labels = batch["tokens"].labels.clone()
    labels[2] = -100
    got = run(batch, po.ListDPO(B), labels=labels)
    assert got[0].isfinite() and (got[1][2] == 0).all()


@pytest.mark.parametrize("objective", [po.ListDPO(B), po.RRHF()])
def test_a_group_of_ties_gives_0(objective):
    batch = draw("list_dpo" if isinstance(objective, po.ListDPO) else "rrhf")
    sequences = replace(batch["tokens"].sequences, rewards=torch.ones(S, dtype=torch.float64))
    got = run(batch, objective, sequences=sequences)
    assert got[0] == 0 and (got[1] == 0).all()


@pytest.mark.parametrize("bad", [-0.1, 1.5])
def test_a_target_outside_0_1_is_an_error_and_a_nan_one_shows(bad):
    batch = draw("soft")
    targets = batch["values"]["targets"].clone()
    targets[0] = bad
    with pytest.raises(ValueError, match=r"P\(chosen beats rejected\) in \[0, 1\] \(1 of 4"):
        run(batch, po.DPO(B), sequences=po.SequenceBatch(targets=targets))
    targets[0] = torch.nan
    assert run(batch, po.DPO(B), sequences=po.SequenceBatch(targets=targets))[0].isnan()
    targets[0], targets[P:] = 0.5, torch.nan  # the second half is not read
    assert run(batch, po.DPO(B), sequences=po.SequenceBatch(targets=targets))[0].isfinite()


def test_kto_wants_1_or_0_and_shows_a_nan():
    batch = draw("kto")
    targets = batch["values"]["targets"].clone()
    targets[3] = 0.5
    with pytest.raises(ValueError, match=r"expected 1 \(desirable\) or 0 \(undesirable\)"):
        run(batch, po.KTO(), sequences=po.SequenceBatch(targets=targets))
    targets[3] = torch.nan
    loss, dx, _, _ = run(batch, po.KTO(), sequences=po.SequenceBatch(targets=targets))
    assert loss.isnan() and dx[3].isnan().any() and dx[:3].isfinite().all()
    labels = targets.nan_to_num(1.0) > 0.5
    got = run(batch, po.KTO(), sequences=po.SequenceBatch(targets=labels))
    assert got[0].isfinite()


def test_kto_takes_its_kl_as_a_tensor_and_clamps_it_at_0():
    assert po.KTO(kl=torch.tensor(0.25)) == po.KTO(kl=0.25)
    assert po.KTO(kl=-3) == po.KTO(kl=-3.0) == po.KTO(kl=0.0) == po.KTO(kl=torch.tensor(-1.0))
    with pytest.raises(ValueError, match="a float or a 0-d tensor"):
        po.KTO(kl=torch.zeros(2))
    with pytest.raises(ValueError, match="kl"):
        po.KTO(kl=math.nan)


@pytest.mark.parametrize(
    ("objective", "missing", "match"),
    [
        (po.DPO(B), {"ref_logps": None}, "ref_logps or tokens.sequences.ref_logps: .* neither"),
        (po.KTO(B), {"sequences": None}, "reads tokens.sequences.targets, which is missing"),
        (po.ListDPO(B), {"sequences": None}, "reads tokens.sequences"),
        (po.DPO(B, margin="rewards"), {}, "reads tokens.sequences.rewards, which is missing"),
    ],
)
def test_what_is_read_must_be_given(objective, missing, match):
    batch = draw("sigmoid")
    with pytest.raises(ValueError, match=match):
        run(batch, objective, **missing)


@pytest.mark.parametrize(
    ("objective", "given", "match"),
    [
        (po.DPO(B), {"rewards": torch.zeros(S)}, "rewards is given but"),
        (po.DPO(B, loss="hinge"), {"targets": torch.ones(S)}, "targets is given but"),
        (po.DPO(B), {"ref_logps": torch.zeros(S)}, "expected one of them, got .* and"),
        (po.SimPO(), {"ref_logps": torch.zeros(S)}, "ref_logps is given but"),
        (po.DPO(B), {"group_ids": torch.zeros(S, dtype=torch.long)}, "group_ids is given but"),
    ],
)
def test_what_is_given_must_be_read(objective, given, match):
    reads_reference = not isinstance(objective, po.SimPO)
    batch = draw("sigmoid" if reads_reference else "sim_po")
    with pytest.raises(ValueError, match=match):
        run(batch, objective, sequences=po.SequenceBatch(**given))


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: po.DPO(0.0), "beta=0.0"),
        (lambda: po.DPO(math.inf), "beta=inf"),
        (lambda: po.DPO(math.nan), "beta=nan"),
        (lambda: po.DPO(loss="sigmoidal"), "expected one of sigmoid"),
        (lambda: po.DPO(label_smoothing=1.5), "label_smoothing=1.5"),
        (lambda: po.DPO(label_smoothing=0.1, loss="hinge"), "takes no label_smoothing"),
        (lambda: po.DPO(label_smoothing=0.5, loss="robust"), "below 0.5"),
        (lambda: po.DPO(loss="exo_pair"), "inside"),
        (lambda: po.DPO(f_divergence="kl"), "expected one of reverse_kl"),
        (lambda: po.DPO(loss="nca_pair", f_divergence="forward_kl"), "no f-divergence scores"),
        (lambda: po.DPO(alpha=0.3), "alpha belongs to"),
        (lambda: po.DPO(loss="ipo", margin=1.0), "takes no margin"),
        (lambda: po.DPO(margin="reward"), "margin"),
        (lambda: po.KTO(desirable=-1.0), "desirable=-1.0"),
        (lambda: po.CPO(loss="simpo"), "expected one of sigmoid, hinge, ipo"),
        (lambda: po.TPO(label_smoothing=0.1, loss="ipo"), "takes no label_smoothing"),
        (lambda: po.WPO(po.KTO()), "WPO weighs pairs; kto is none"),
        (lambda: po.WPO(po.DPO(loss="aot")), "WPO weighs pairs; dpo_aot is none"),
        (lambda: po.WPO(po.DPO() + po.NLL()), "WPO weighs pairs; nll is none"),
        (lambda: po.DPO().weighted_by("positive"), "couples the tokens"),
    ],
)
def test_parameters_are_checked_when_the_objective_is_built(build, match):
    with pytest.raises(ValueError, match=match):
        build()


@pytest.mark.parametrize(
    "build", [lambda: po.DPO("0.1"), lambda: po.DPO(reference_free=1), lambda: po.WPO("dpo")]
)
def test_a_wrong_type_is_a_type_error(build):
    with pytest.raises(TypeError):
        build()


def test_names_of_the_configuration_and_codes_of_the_table():
    names = ("dpo", "kto", "cpo", "orpo", "sim_po", "alpha_po", "tpo", "wpo", "list_dpo", "rrhf")
    assert set(names) <= set(REGISTRY)
    assert from_name("dpo", loss="hinge", beta=0.05) == po.DPO(0.05, loss="hinge")
    assert from_name("kto", desirable=1.33).desirable == 1.33
    assert len(COUPLED_OF_CODE) == len(COUPLED) + len(MASKS)


def test_every_loss_and_divergence_is_built_and_has_a_row():
    for loss in DPO_LOSSES:
        for free in (False, True):
            smoothing = 0.1 if loss == "exo_pair" else 0.0
            o = po.DPO(B, smoothing, free, loss)
            assert o.terms()[0].row in COUPLED
    assert len({po.DPO(f_divergence=f).power() for f in F_DIVERGENCES}) == 4
    assert po.DPO(f_divergence="alpha_divergence", alpha=1.0).power() == 0.0


def test_tpo_l_is_simpo_and_alpha_0_too():
    batch = draw("sim_po")
    want = run(batch, po.SimPO(B, 0.5))[0]
    for objective in (po.TPO(B, loss="tpo-l"), po.AlphaPO(0.0, B, 0.5)):
        torch.testing.assert_close(run(batch, objective)[0], want, rtol=1e-13, atol=0)


def test_objectives_scale_add_and_carry_their_terms():
    batch = draw("sigmoid")
    one = run(batch, po.DPO(B))
    both = run(batch, 2.0 * po.DPO(B) + 0.5 * po.KL("k3") - 0.1 * po.Entropy())
    parts = run(batch, 0.5 * po.KL("k3") - 0.1 * po.Entropy())
    for x, y, z in zip(both[:3], one, parts, strict=False):
        torch.testing.assert_close(x, 2.0 * y + z, rtol=1e-11, atol=1e-12)
