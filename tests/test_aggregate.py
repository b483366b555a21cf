"""token_weights against plain loops, and the split property; shift_labels against torch's pad."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyoffline as po
from pyoffline.aggregate import ALIASES, MODES, GlobalCounts, shift_labels, token_weights

F64 = torch.float64


def loop_weights(mask, mode, groups, horizon):
    """Rows of lists -> rows of lists, straight from the definitions."""
    tokens = sum(map(sum, mask))
    lengths = [sum(row) for row in mask]
    sequences = sum(n > 0 for n in lengths)
    per_group = {g: sum(n for n, h in zip(lengths, groups, strict=True) if h == g) for g in groups}
    prompts = sum(n > 0 for n in per_group.values())
    out = []
    for row, n, g in zip(mask, lengths, groups, strict=True):
        weight = {
            "token-mean": lambda: 1 / tokens,
            "token-mean-local": lambda: 1 / tokens,
            "seq-mean-token-mean": lambda n=n: 1 / sequences / n,
            "seq-mean-token-sum": lambda: 1 / sequences,
            "seq-mean-token-sum-norm": lambda: 1 / sequences / horizon,
            "token-sum": lambda: 1.0,
            "prompt-mean": lambda g=g: 1 / prompts / per_group[g],
            "constant": lambda: 1 / len(mask) / horizon,
        }[mode]
        out.append([weight() if valid else 0.0 for valid in row])
    return torch.tensor(out, dtype=F64).reshape(len(mask), len(mask[0]))


def weights(mask, mode, groups=None, **kw):
    groups = torch.tensor(groups, dtype=torch.int64) if mode == "prompt-mean" else None
    return token_weights(mask, mode, group_ids=groups, dtype=F64, **kw)


@st.composite
def batches(draw, min_rows=1):
    rows, width = draw(st.integers(min_rows, 6)), draw(st.integers(1, 5))
    mask = [[draw(st.booleans()) for _ in range(width)] for _ in range(rows)]
    groups = [draw(st.sampled_from([7, -3, 10**12])) for _ in range(rows)]
    return mask, groups


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=60, deadline=None)
@given(batch=batches())
def test_every_mode_is_its_definition(mode, batch):
    mask, groups = batch
    got = weights(torch.tensor(mask), mode, groups)
    want = loop_weights(mask, mode, groups, len(mask[0]))
    torch.testing.assert_close(got, want, rtol=1e-15, atol=0)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=40, deadline=None)
@given(batch=batches(), seed=st.integers(0, 99))
def test_packed_equals_padded(mode, batch, seed):
    """Sequences of a packed batch are its distinct ids, carried by ignored tokens too."""
    mask, groups = batch
    padded = torch.tensor(mask)
    counts = None
    if MODES[mode].horizon:
        rows = len(mask) if mode == "constant" else int(padded.any(1).sum())
        counts = GlobalCounts(horizon=len(mask[0]), sequences=max(rows, 1))
    want = weights(padded, mode, groups, counts=counts)
    ids = torch.arange(len(mask)).repeat_interleave(len(mask[0])) * 5 - 4
    shuffle = torch.randperm(ids.numel(), generator=torch.Generator().manual_seed(seed))
    got = weights(
        padded.reshape(-1)[shuffle], mode, groups, counts=counts, sequence_ids=ids[shuffle]
    )
    torch.testing.assert_close(got, want.reshape(-1)[shuffle], rtol=1e-15, atol=0)


def step_counts(mask, groups, horizon, mode, **kw):
    lengths = [sum(row) for row in mask]
    alive = [g for g, n in zip(groups, lengths, strict=True) if n]
    rows = len(mask) if mode == "constant" else len(alive)
    return GlobalCounts(sum(lengths), rows, len(set(alive)), horizon, **kw)


@pytest.mark.parametrize("mode", [m for m in MODES if m != "token-mean-local"])
@settings(max_examples=60, deadline=None)
@given(batch=batches(min_rows=2), data=st.data())
def test_micro_batch_gradients_add_up(mode, batch, data):
    """Every partition of the rows (whole groups for prompt-mean); float64, through autograd."""
    mask, groups = batch
    parts = [data.draw(st.integers(0, 3)) for _ in mask]
    if mode == "prompt-mean":
        parts = [hash(g) % 2 for g in groups]
    counts = step_counts(mask, groups, 11, mode)
    full = torch.tensor(mask)
    features = torch.randn(*full.shape, 3, dtype=F64, generator=torch.Generator().manual_seed(1))

    def gradient(rows):
        theta = torch.tensor([0.3, -1.2, 0.7], dtype=F64, requires_grad=True)
        losses = (features[rows] @ theta).tanh()
        w = weights(full[rows], mode, [groups[i] for i in rows], counts=counts)
        (w * losses).sum().backward()
        return theta.grad

    total = sum(
        gradient([i for i, p in enumerate(parts) if p == part]) for part in sorted(set(parts))
    )
    torch.testing.assert_close(total, gradient(list(range(len(mask)))), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["seq-mean-token-mean", "prompt-mean"])
@settings(max_examples=40, deadline=None)
@given(batch=batches(min_rows=2), cut=st.integers(1, 4))
def test_splits_through_a_sequence(mode, batch, cut):
    """Context parallel: a sequence is cut, and its (its prompt's) size comes from unit_tokens."""
    mask, groups = batch
    full = torch.tensor(mask)
    lengths = full.sum(1)
    unit = lengths
    if mode == "prompt-mean":
        unit = torch.tensor(
            [sum(lengths[j] for j, h in enumerate(groups) if h == g) for g in groups]
        )
    counts = step_counts(mask, groups, None, mode, unit_tokens=unit)
    cut = min(cut, full.shape[1])
    halves = [weights(x, mode, groups, counts=counts) for x in (full[:, :cut], full[:, cut:])]
    torch.testing.assert_close(
        torch.cat(halves, 1), weights(full, mode, groups), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("mode", [m for m in MODES if m != "token-mean-local"])
def test_hosts_that_average_are_undone(mode):
    """2 ranks x 3 micro-batches, the host's averages cancelled: the result of the full batch."""
    full = torch.rand(12, 5, generator=torch.Generator().manual_seed(0)) > 0.3
    groups = [0] * 2 + [1] * 2 + [2] * 2 + [3] * 2 + [4] * 2 + [5] * 2
    losses = torch.randn(12, 5, dtype=F64)
    whole = step_counts(full.tolist(), groups, 5, mode)
    counts = step_counts(full.tolist(), groups, 5, mode, grad_accum=3, dp_size=2)
    want = (weights(full, mode, groups, counts=whole) * losses).sum()
    rank_means = [
        sum(
            (
                weights(full[i : i + 2], mode, groups[i : i + 2], counts=counts) * losses[i : i + 2]
            ).sum()
            for i in rows
        )
        / 3
        for rows in ((0, 2, 4), (6, 8, 10))
    ]
    torch.testing.assert_close(sum(rank_means) / 2, want, rtol=1e-12, atol=0)


def test_local_mean_leaves_the_average_to_the_host():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    counts = GlobalCounts(tokens=100, grad_accum=4, dp_size=2)
    assert token_weights(mask, "token-mean-local", counts=counts).sum() == 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (3, 0)], ids=str)
def test_empty_mask_gives_zeros(mode, shape):
    mask = torch.zeros(shape, dtype=torch.bool)
    got = weights(mask, mode, list(range(shape[0])))
    assert got.shape == mask.shape and bool((got == 0).all())


@pytest.mark.parametrize(
    "count",
    [8, torch.tensor(8), torch.tensor([8]), torch.tensor(8.0), torch.tensor(8, dtype=torch.int32)],
    ids=["int", "0-d", "1-element", "float", "int32"],
)
def test_num_items_in_batch(count):
    mask = torch.tensor([[1, 1, 0]])
    got = token_weights(mask, num_items_in_batch=count)
    assert got.dtype == torch.float32 and got.tolist() == [[0.125, 0.125, 0.0]]


@pytest.mark.parametrize("mode", MODES)
def test_no_host_sync(mode):
    """On the meta device every read-back raises."""
    mask = torch.ones(2, 3, dtype=torch.bool, device="meta")
    groups = torch.zeros(2, dtype=torch.int64, device="meta") if mode == "prompt-mean" else None
    assert token_weights(mask, mode, group_ids=groups).shape == (2, 3)


def test_peers_formulas():
    """verl's agg_loss and TRL's loss_type, written as they write them."""
    g = torch.Generator().manual_seed(3)
    loss, mask = torch.randn(4, 6, dtype=F64, generator=g), torch.rand(4, 6, generator=g) > 0.3
    m = mask.double()
    row = (loss * m).sum(-1)
    peers = {
        "dapo": (loss * m).sum() / 50,
        "bnpo": (loss * m).sum() / m.sum().clamp(min=1.0),
        "grpo": (row / m.sum(-1).clamp(min=1.0)).mean(),
        "dr_grpo": (loss * m).sum() / (4 * 128),
        "seq-mean-token-sum-norm": row.mean() / 128,
    }
    counts = GlobalCounts(tokens=50, horizon=128)
    for name, want in peers.items():
        got = (token_weights(mask, name, counts=counts, dtype=F64) * loss).sum()
        torch.testing.assert_close(got, want, rtol=1e-14, atol=0)
    assert set(ALIASES.values()) <= set(MODES)


MASK = torch.ones(2, 3, dtype=torch.bool)
IDS = torch.tensor([0, 0, 1])
ERRORS = [  # (positional, keywords, exception, part of the message, reason)
    ((MASK, "token_meen"), {}, ValueError, "nearest is 'token_mean'", "misspelt mode"),
    ((MASK, "mean"), {}, ValueError, "seq-mean-token-sum-norm", "lists the modes"),
    ((MASK.float(),), {}, TypeError, "mask.bool", "a float mask is not a mask"),
    (([[1]],), {}, TypeError, "list", "not a tensor"),
    ((MASK[0, 0],), {}, ValueError, "0-d", "no tokens axis"),
    ((MASK[0], "seq-mean-token-sum"), {}, ValueError, "sequence_ids", "1-D: which sequence?"),
    ((MASK[0], "token-mean"), {"sequence_ids": IDS, "dtype": torch.half}, TypeError, "float32", ""),
    ((MASK[0], "seq-mean-token-sum"), {"sequence_ids": IDS[:2]}, ValueError, "(3,)", "shape"),
    ((MASK[0], "seq-mean-token-sum"), {"sequence_ids": IDS.float()}, TypeError, "integer", "dtype"),
    ((MASK, "prompt-mean"), {}, ValueError, "needs group_ids", "missing"),
    ((MASK, "token-mean"), {"group_ids": IDS[:2]}, ValueError, "does not read", "unused tensor"),
    ((MASK, "prompt-mean"), {"group_ids": IDS}, ValueError, "2 sequences, got 3", "one a row"),
    ((MASK, "token-sum"), {"num_items_in_batch": 3}, ValueError, "does not read", "unused count"),
    ((MASK,), {"num_items_in_batch": True}, ValueError, "True", "a bool is no count"),
    ((MASK,), {"num_items_in_batch": -1}, ValueError, "-1", "negative"),
    ((MASK,), {"num_items_in_batch": IDS}, ValueError, "(3,)", "more than one element"),
    ((MASK,), {"counts": 5}, TypeError, "GlobalCounts", "record expected"),
    ((MASK,), {"counts": GlobalCounts(5), "num_items_in_batch": 5}, ValueError, "one of", "twice"),
    ((MASK,), {"counts": GlobalCounts(dp_size=2)}, ValueError, "tokens=", "local count, 2 ranks"),
    ((MASK,), {"counts": GlobalCounts(5, dp_size=0)}, ValueError, "dp_size", "no ranks"),
    ((MASK, "constant"), {"counts": GlobalCounts(sequences=8)}, ValueError, "horizon", "padding"),
    ((MASK, "constant"), {"counts": GlobalCounts(horizon=0)}, ValueError, "horizon", "zero length"),
]


@pytest.mark.parametrize(("args", "kw", "error", "text", "why"), ERRORS)
def test_errors(args, kw, error, text, why):
    with pytest.raises(error) as caught:
        token_weights(*args, **kw)
    assert text in str(caught.value), why


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 99), min_size=6, max_size=6), min_size=1, max_size=3))
def test_shift_labels_is_torchs_pad(rows):
    labels = torch.tensor(rows)
    before = labels.clone()
    want = torch.nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
    assert shift_labels(labels).equal(want) and labels.equal(before)
    strided = labels.t().contiguous().t()
    assert shift_labels(strided).equal(want)
    assert shift_labels(labels[None], ignore_index=7)[0, :, -1].eq(7).all()


def test_shift_labels_stops_at_packed_borders():
    """Position i of a sequence never learns the first token of the next one."""
    labels = torch.tensor([10, 11, 12, 20, 30, 31])
    ids = torch.tensor([0, 0, 0, 1, 2, 2])
    assert shift_labels(labels, sequence_ids=ids).tolist() == [11, 12, -100, -100, 31, -100]


@pytest.mark.parametrize("width", [0, 1])
def test_shift_labels_of_nothing(width):
    assert shift_labels(torch.zeros(2, width, dtype=torch.int64)).tolist() == [[-100] * width] * 2


def test_shift_labels_errors():
    with pytest.raises(TypeError, match="int64"):
        shift_labels(torch.zeros(3))
    with pytest.raises(ValueError, match="sequence_ids"):
        shift_labels(torch.zeros(3, dtype=torch.int64), sequence_ids=torch.zeros(2))


def test_the_counts_of_a_step_are_public():
    weights = po.token_weights(torch.ones(2, 3).bool(), counts=po.GlobalCounts(tokens=12))
    assert torch.equal(weights, torch.full((2, 3), 1 / 12))
