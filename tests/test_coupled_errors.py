"""Bad input to coupled objectives: a clear error or the documented value, never NaN (PROMISES N6,
N12); the packing of units into chunks.
"""

import dataclasses
import math

import coupled_batches as cb
import pytest
import torch
from coupled_batches import CASES
from hypothesis import given, settings
from hypothesis import strategies as st

import pyoffline as po
from pyoffline.coupled_table import COUPLED, COUPLED_OF_CODE
from pyoffline.objectives import REGISTRY, ROW_OF_CODE, from_name
from pyoffline.plan import PlanSettings, plan_units

pytestmark = pytest.mark.usefixtures("one_thread")


def call(objective, labels=None, **fields):
    labels = torch.zeros(2, 3, dtype=torch.long) if labels is None else labels
    logits = torch.zeros(*labels.shape, 5)
    return po.policy_loss(logits, po.TokenBatch(labels, **fields), objective)


OLD = torch.full((2, 3), -1.0)
ADV = torch.ones(2)
FLAT = {"labels": torch.zeros(6, dtype=torch.long), "old_logps": OLD.reshape(-1)}
GROUPED = {"rewards": ADV, "group_ids": torch.tensor([0, 0])}


def packed(*ids):
    return {**FLAT, "sequence_ids": torch.tensor(ids), "advantages": torch.ones(6)}


def sequences(**values):
    return {"behavior_logps": OLD, "sequences": po.SequenceBatch(**values)}


# why, call, exception, words that the message must hold
BAD = [
    ("flat labels", lambda: call(po.GSPO(), **FLAT, advantages=torch.ones(6)), ValueError,
     "sequence_ids beside packed labels"),
    ("falling ids", lambda: call(po.GSPO(), **packed(0, 0, 1, 0, 1, 1)), ValueError,
     "position 3 holds 0 after 1"),
    ("a gap", lambda: call(po.GSPO(), **packed(0, 0, 1, 1, 3, 3)), ValueError,
     "position 4 holds 3 after 1"),
    ("not from 0", lambda: call(po.GSPO(), **packed(1, 1, 1, 2, 2, 2)), ValueError,
     "position 0 holds 1"),
    ("missing rewards", lambda: call(po.TOPR(), behavior_logps=OLD), ValueError,
     "tokens.sequences.rewards, which is missing"),
    ("missing groups", lambda: call(po.RenyiRWR(), **sequences(rewards=ADV)), ValueError,
     "tokens.sequences.group_ids, which is missing"),
    ("missing old", lambda: call(po.GSPO(), advantages=ADV), ValueError,
     "tokens.old_logps, which is missing"),
    ("missing adv", lambda: call(po.GSPO(), old_logps=OLD), ValueError,
     "tokens.advantages, which is missing"),
    ("unread rewards", lambda: call(
        po.GSPO(), old_logps=OLD, advantages=ADV, sequences=po.SequenceBatch(rewards=ADV)),
     ValueError, "tokens.sequences.rewards is given but GSPO"),
    ("unread groups", lambda: call(po.TOPR(), **sequences(**GROUPED)), ValueError,
     "tokens.sequences.group_ids is given but TOPR"),
    ("unread mu", lambda: call(po.GSPO(), old_logps=OLD, advantages=ADV, behavior_logps=OLD),
     ValueError, "tokens.behavior_logps is given but GSPO"),
    ("weights of sequences with a token-weighted objective", lambda: call(
        po.VESPO(), old_logps=OLD, advantages=ADV, sequences=po.SequenceBatch(weights=ADV)),
     ValueError, "tokens.sequences.weights is given but VESPO"),
    ("token-local", lambda: call(po.NLL(), sequences=po.SequenceBatch(rewards=ADV)), ValueError,
     "token-local"),
    ("rewards of another length", lambda: call(
        po.TOPR(), **sequences(rewards=torch.ones(3))), ValueError, "each of 2 sequences"),
    ("too many rewards of a packed batch", lambda: call(
        po.TOPR(), labels=FLAT["labels"], sequence_ids=torch.tensor([0, 0, 0, 1, 1, 1]),
        behavior_logps=OLD.reshape(-1), sequences=po.SequenceBatch(rewards=torch.ones(3))),
     ValueError, "each of 2 sequences, got 3"),
    ("rewards of rank 2", lambda: call(po.TOPR(), **sequences(rewards=OLD)), ValueError,
     "expected 1 dimensions"),
    ("float groups", lambda: call(
        po.RenyiRWR(), **sequences(rewards=ADV, group_ids=ADV)), TypeError, "expected integers"),
    ("integer rewards", lambda: call(po.TOPR(), **sequences(rewards=torch.tensor([0, 1]))),
     TypeError, "tokens.sequences.rewards: expected float"),
    ("a record of another kind", lambda: call(
        po.TOPR(), behavior_logps=OLD, sequences={"rewards": ADV}), TypeError, "SequenceBatch"),
    ("a label outside [0, V)", lambda: call(
        po.GSPO(), labels=torch.tensor([[0, 1], [2, 9]]), old_logps=OLD[:, :2], advantages=ADV),
     IndexError, "row 3 holds 9"),
    ("weighted per token", lambda: po.GSPO().weighted_by("g"), ValueError, "couples the tokens"),
    ("alpha below 0", lambda: po.RenyiRWR(-0.1), ValueError, r"alpha=-0.1\) is outside"),
    ("alpha above 1", lambda: po.AlphaELBO(1.5), ValueError, "outside"),
    ("tau 0", lambda: po.RenyiRWR(0.5, 0.0), ValueError, "outside"),
    ("clip_low", lambda: po.GSPO(1.5), ValueError, "outside"),
    ("alpha infinite", lambda: po.RenyiRWR(math.inf), ValueError, "finite number"),
    ("power infinite", lambda: po.SequencePowerIS(-math.inf), ValueError, "finite number"),
    ("a token's power infinite", lambda: po.PowerIS(math.inf), ValueError, "finite number"),
    ("k infinite", lambda: po.VESPO(k_neg=math.inf), ValueError, "finite number"),
    ("low infinite", lambda: po.DistillToken(low=math.inf), ValueError, "finite number"),
    ("low above high", lambda: po.ImportanceWeightedSFTSequence(2.0, 3.0, 1.0), ValueError,
     "above high"),
    ("OPSM of no objective", lambda: po.OPSM(0.5, 0.1), TypeError, "OPSM"),
    ("to_go", lambda: po.KLRegularizedPG(0.1, to_go=1.0), TypeError, "expected a bool"),
    ("a bool for a float", lambda: po.GSPO(True), TypeError, "expects a float"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "kind", "words"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_raises_and_says_what_to_do(make, kind, words):
    with pytest.raises(kind, match=words):
        make()


def test_label_outside_the_vocabulary_names_the_row_of_the_batch():
    batch = cb.make("mu rewards group")
    batch["labels"][17] = 999
    for backend in ("reference", "cpu"):
        with po.chunk_rows(5), pytest.raises(IndexError, match="row 17 holds 999"):
            cb.run(batch, po.RenyiRWR(0.5), backend)


def test_bounds_and_temperatures_may_be_infinite():
    batch = cb.make("old adv")
    wide = cb.run(batch, po.GSPO(1.0, math.inf), "reference")
    assert wide["loss"].isfinite() and wide["dhidden"].abs().max() > 0
    batch = cb.make("mu rewards group")
    flat = cb.run({**batch, "rewards": batch["rewards"] * 0}, po.RenyiRWR(0.5), "reference")
    assert cb.run(batch, po.RenyiRWR(0.5, math.inf), "reference")["loss"] == flat["loss"]


@pytest.mark.parametrize("name", CASES)
def test_documented_values_of_odd_groups_and_empty_sequences(name):
    """A group of one, a group of equal rewards, empty sequences: finite, and the rest unchanged."""
    objective, reads = CASES[name]
    batch = cb.make(reads, groups=(0, 1, 1, 1, 2, 2, 2, 2), ignored=False)
    if batch["rewards"] is not None:
        batch["rewards"][1:4] = 0.5
    plain = cb.run(batch, objective, "reference")
    assert plain["loss"].isfinite() and plain["dhidden"].isfinite().all()
    batch["labels"][(batch["ids"] == 5) | (batch["ids"] == 7)] = -100
    hollow = cb.run(batch, objective, "reference")
    keep = (batch["ids"] != 5) & (batch["ids"] != 7)
    short = dict(batch)
    for k in ("hidden", "labels", "old", "mu", "ref"):
        short[k] = None if batch[k] is None else batch[k][keep]
    order = torch.tensor([0, 1, 2, 3, 4, 6])
    for k in ("adv", "rewards", "group"):
        short[k] = None if batch[k] is None else batch[k][order]
    short["ids"] = torch.repeat_interleave(
        torch.arange(6), torch.tensor([cb.LENGTHS[i] for i in order])
    )
    without = cb.run(short, objective, "reference")
    torch.testing.assert_close(hollow["loss"], without["loss"])
    torch.testing.assert_close(hollow["dhidden"][keep], without["dhidden"])
    assert (hollow["dhidden"][~keep] == 0).all()


def test_a_group_of_one_has_coef_minus_1_or_0():
    batch = cb.make("mu rewards group", groups=tuple(range(8)), ignored=False)
    one = {**batch, "mu": None, "rewards": None, "group": None, "adv": torch.ones(8)}
    one["omega"] = None
    one["weights"] = torch.full((len(batch["ids"]),), 1 / 8)
    sft = cb.run(one, po.WeightedNLL(), "reference")
    for alpha in (0.0, 0.5, 1.0):
        got = cb.run(batch, po.RenyiRWR(alpha), "reference")
        torch.testing.assert_close(got["dhidden"], sft["dhidden"], rtol=1e-5, atol=1e-7)
        assert (cb.run(batch, po.AlphaELBO(alpha), "reference")["dhidden"].abs() < 1e-7).all()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_N11_all_ignored_gives_loss_0_and_zero_gradients(name, backend):
    objective, reads = CASES[name]
    batch = cb.make(reads)
    batch["labels"][:] = -100
    got = cb.run(batch, objective, backend)
    assert got["loss"] == 0 and all((got[k] == 0).all() for k in ("dhidden", "dweight"))
    assert all(x.isfinite() for x in got["metrics"].values())
    logits = torch.zeros(len(batch["ids"]), 5)
    got = cb.run_logits(logits, batch, objective, backend)
    assert got["loss"] == 0 and (got["dlogits"] == 0).all()


def test_no_tokens_at_all():
    empty = po.TokenBatch(torch.zeros(0, 4, dtype=torch.long), torch.zeros(0), torch.zeros(0, 4))
    hidden, weight = torch.zeros(0, 4, 3, requires_grad=True), torch.ones(5, 3, requires_grad=True)
    for backend in ("reference", "cpu"):
        with po.use_backend(backend):
            out = po.linear_policy_loss(hidden, po.Head(weight), empty, po.GSPO())
        out.loss.backward()
        assert out.loss == 0 and (weight.grad == 0).all()


def test_the_coupled_table_and_the_dataclasses_agree():
    assert not set(COUPLED_OF_CODE) & set(ROW_OF_CODE)
    codes = [row.code for row in COUPLED.values()]
    assert len(set(codes)) == len(codes) and min(codes) > 100
    needed = {"sequence_power_is": {"alpha": 0.5}, "kl_regularized_pg": {"beta": 0.1}}
    for name, cls in REGISTRY.items():
        if getattr(cls, "__module__", "") != "pyoffline.sequence_objectives" or name == "opsm":
            continue
        made = from_name(name, **needed.get(name, {}))
        fields = tuple(f.name for f in dataclasses.fields(cls))
        for has_mu in (False, True):
            assert COUPLED[made.row_name(has_mu)].params == fields, name
    reads = po.OPSM(po.RenyiRWR() + 0.1 * po.KL(), 0.1).program(True)
    assert reads.reads == {"mu", "adv", "ref"}
    assert reads.sequence_reads == {"rewards", "group_ids"}


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    rows=st.integers(1, 50),
    fixed=st.booleans(),
    padded=st.booleans(),
)
def test_units_are_packed_whole_and_in_as_few_chunks_as_there_can_be(sizes, rows, fixed, padded):
    chunk = PlanSettings(rows if fixed else 0, 4 * rows, padded)
    plan = plan_units(sizes, 1, 4, chunk, "cpu")
    assert plan.rows <= rows and plan.padded == padded
    at = unit = 0
    for block in plan.blocks:
        assert (block.start, block.units[0]) == (at, unit)
        held = sizes[slice(*block.units)]
        at, unit = at + sum(held), block.units[1]
        assert block.stop == at
        assert block.fits == (sum(held) <= plan.rows) and (block.fits or len(held) == 1)
        parts = plan.parts(block)
        assert (parts[0][0], parts[-1][1]) == (block.start, block.stop)
        assert all(a[1] == b[0] for a, b in zip(parts, parts[1:], strict=False))
        assert all(0 < stop - start <= plan.rows for start, stop in parts)
        assert len(parts) == -(-sum(held) // plan.rows)
    assert (at, unit) == (sum(sizes), len(sizes))
    greedy, room = 0, 0
    for size in sizes:
        if size > room:
            greedy, room = greedy + 1, plan.rows if size <= plan.rows else 0
        room -= size if size <= plan.rows else 0
    assert len(plan.blocks) == greedy
