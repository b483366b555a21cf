"""Bad input, function by function: a clear error with the names and the values, nothing half-done;
and the empties that are no error at all (N = 0, all ignored).
"""

import math

import pytest
import torch

import pyoffline as po

N, D, V = 6, 8, 11
BACKENDS = ("reference", "cpu")
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def good():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=g, requires_grad=True)
    w = torch.randn(V, D, generator=g, requires_grad=True)
    labels = torch.tensor([1, 0, 10, -100, 4, 4])
    return x, w, labels, torch.randn(N, generator=g), torch.full((N,), -2.0)


X, W, LABELS, ADV, OLD = good()
LOGITS = (X @ W.t()).detach()
HEAD = po.Head(W)
TOKENS = po.TokenBatch(LABELS, ADV, OLD)
IDS = torch.tensor([0, 0, 1, 1, 1, 2])


def lpl(hidden=X, head=HEAD, tokens=TOKENS, objective=None):
    return po.linear_policy_loss(hidden, head, tokens, objective or po.PPOClip())


def pl(logits=LOGITS, tokens=TOKENS, objective=None):
    return po.policy_loss(logits, tokens, objective or po.PPOClip())


def batch(**changes):
    return po.TokenBatch(**{"labels": LABELS, "advantages": ADV, "old_logps": OLD, **changes})


def packed(ids, count=3):
    return batch(sequence_ids=ids, advantages=torch.ones(count))


def relabel(at, value):
    labels = LABELS.clone()
    labels[at] = value
    return labels


# what is done, exception, words that the message must hold (names, expected, got)
TABLE = {
    # labels (N6: the row and the value)
    "label too large": (lambda: lpl(tokens=batch(labels=relabel(4, V))), IndexError, "row 4", "11"),
    "label negative": (lambda: lpl(tokens=batch(labels=relabel(2, -1))), IndexError, "row 2", "-1"),
    "label too large, logits": (
        lambda: pl(tokens=batch(labels=relabel(5, 99))),
        IndexError,
        "row 5",
        "99",
    ),
    "label in token_logps": (
        lambda: po.token_logps(LOGITS, relabel(0, V)),
        IndexError,
        "row 0",
        "[0, 11)",
    ),
    "label in linear_token_logps": (
        lambda: po.linear_token_logps(X, HEAD, relabel(1, -7)),
        IndexError,
        "row 1",
        "-7",
    ),
    "label in cross_entropy": (
        lambda: po.cross_entropy(LOGITS, relabel(1, V)),
        IndexError,
        "row 1",
    ),
    "label in linear_cross_entropy with class weights": (
        lambda: po.linear_cross_entropy(X, W, relabel(1, V), weight=torch.ones(V)),
        IndexError,
        "row 1",
    ),
    "labels float": (lambda: lpl(tokens=batch(labels=ADV)), TypeError, "labels", "int64", "float"),
    "labels shape": (
        lambda: lpl(tokens=batch(labels=LABELS[:4])),
        ValueError,
        "labels",
        "(6,)",
        "(4,)",
    ),
    "labels missing": (lambda: lpl(tokens=batch(labels=None)), TypeError, "labels", "NoneType"),
    # hidden, logits, head
    "logits passed as hidden": (
        lambda: lpl(hidden=LOGITS),
        ValueError,
        "hidden",
        "look like logits",
        "linear_",
    ),
    "hidden width": (lambda: lpl(hidden=X[:, :5]), ValueError, "hidden", "[11, 8]", "(6, 5)"),
    "hidden 0-d": (lambda: lpl(hidden=torch.tensor(1.0)), ValueError, "hidden", "()"),
    "hidden integer": (lambda: lpl(hidden=X.long()), TypeError, "hidden", "int64"),
    "hidden sparse": (lambda: lpl(hidden=X.detach().to_sparse()), ValueError, "hidden", "dense"),
    "hidden no tensor": (lambda: lpl(hidden=[[1.0]]), TypeError, "hidden", "list"),
    "hidden and head dtypes": (
        lambda: lpl(hidden=X.bfloat16()),
        TypeError,
        "bfloat16",
        "float32",
        "autocast",
    ),
    "logits integer": (lambda: pl(logits=LABELS), TypeError, "logits", "int64"),
    "logits of width 0": (lambda: pl(logits=torch.zeros(N, 0)), ValueError, "logits", "(6, 0)"),
    "head is a module": (lambda: lpl(head=torch.nn.Linear(D, V)), TypeError, "Head.of", "Linear"),
    "head is a weight": (lambda: lpl(head=W), TypeError, "po.Head"),
    "head on meta": (
        lambda: lpl(head=po.Head(W.detach().to("meta"))),
        (ValueError, TypeError),
        "meta",
    ),
    "hidden on meta": (lambda: lpl(hidden=X.detach().to("meta")), ValueError, "meta", "cpu"),
    "labels on meta": (
        lambda: lpl(tokens=batch(labels=LABELS.to("meta"))),
        ValueError,
        "labels",
        "meta",
    ),
    "advantages on meta": (
        lambda: lpl(tokens=batch(advantages=ADV.to("meta"))),
        ValueError,
        "advantages",
        "meta",
    ),
    # arguments in the wrong place
    "swapped hidden and head": (
        lambda: lpl(hidden=HEAD, head=X),
        TypeError,
    ),
    "swapped tokens and objective": (
        lambda: po.linear_policy_loss(X, HEAD, po.NLL(), TOKENS),
        TypeError,
        "objective",
        "TokenBatch",
    ),
    "labels for tokens": (lambda: lpl(tokens=LABELS), TypeError, "TokenBatch", "Tensor"),
    "objective class": (lambda: lpl(objective=po.PPOClip), TypeError, "objective", "po.PPOClip()"),
    "objective name": (lambda: lpl(objective="ppo"), TypeError, "objective", "str"),
    "swapped cross_entropy": (lambda: po.cross_entropy(LABELS, LOGITS), TypeError, "input"),
    # tensors of the batch
    "missing old": (
        lambda: lpl(tokens=po.TokenBatch(LABELS, ADV)),
        ValueError,
        "old_logps",
        "PPOClip",
        "missing",
    ),
    "missing advantages": (
        lambda: lpl(tokens=po.TokenBatch(LABELS, old_logps=OLD)),
        ValueError,
        "advantages",
        "missing",
    ),
    "unused old": (lambda: lpl(objective=po.WeightedNLL()), ValueError, "old_logps", "not read"),
    "unused ref": (lambda: lpl(tokens=batch(ref_logps=OLD)), ValueError, "ref_logps", "not read"),
    "unused extra": (lambda: lpl(tokens=batch(extra={"q": ADV})), ValueError, "q", "not read"),
    "unused sequences": (
        lambda: lpl(tokens=batch(sequences=po.SequenceBatch(rewards=torch.ones(2)))),
        ValueError,
        "rewards",
        "token-local",
    ),
    "missing extra": (
        lambda: lpl(tokens=po.TokenBatch(LABELS), objective=po.NLL().weighted_by("q")),
        ValueError,
        "q",
        "missing",
    ),
    "advantages shape": (
        lambda: lpl(tokens=batch(advantages=ADV[:2])),
        ValueError,
        "advantages",
        "(6,)",
        "(2,)",
    ),
    "old shape": (lambda: lpl(tokens=batch(old_logps=OLD[:2])), ValueError, "old_logps", "(2,)"),
    "old integer": (lambda: lpl(tokens=batch(old_logps=LABELS)), TypeError, "old_logps", "int64"),
    "weights shape": (
        lambda: lpl(tokens=batch(weights=torch.ones(N, 1))),
        ValueError,
        "weights",
        "(6, 1)",
    ),
    "n_valid wrong": (lambda: lpl(tokens=batch(n_valid=6)), ValueError, "n_valid", "6", "5"),
    "sequence_ids shape": (
        lambda: lpl(tokens=batch(sequence_ids=torch.zeros(2, dtype=torch.long))),
        ValueError,
        "sequence_ids",
        "(2,)",
    ),
    "sequence_ids negative": (lambda: lpl(tokens=packed(IDS - 1)), ValueError, "0..S-1", "-1"),
    "sequence_ids decreasing": (lambda: lpl(tokens=packed(IDS.flip(0))), ValueError, "0..S-1", "2"),
    "too many per sequence": (
        lambda: lpl(tokens=packed(IDS, 5)),
        ValueError,
        "advantages",
        "3 sequences",
        "(5,)",
    ),
    "too few per sequence": (lambda: lpl(tokens=packed(IDS, 2)), ValueError, "advantages", "(2,)"),
    "unknown field": (lambda: batch(advantage=ADV), TypeError, "advantage"),
    "n_valid float": (lambda: lpl(tokens=batch(n_valid=5.0)), TypeError, "n_valid", "5.0"),
    "ignore_index": (lambda: lpl(tokens=batch(ignore_index=None)), TypeError, "ignore_index"),
    "ignore_index, logps": (
        lambda: po.token_logps(LOGITS, LABELS, ignore_index=1.5),
        TypeError,
        "ignore_index",
        "1.5",
    ),
    "extra is a list": (lambda: lpl(tokens=batch(extra=[ADV])), TypeError, "extra", "list"),
    "temperature 0": (lambda: lpl(tokens=batch(temperature=ADV * 0)), ValueError, "> 0", "row 0"),
    "temperature negative": (
        lambda: po.linear_token_logps(X, HEAD, LABELS, -torch.ones(N)),
        ValueError,
        "temperature",
        "-1.0",
    ),
    "temperature, one float": (lambda: po.token_logps(LOGITS, LABELS, -0.5), ValueError, "-0.5"),
    # objectives
    "clip negative": (lambda: po.PPOClip(-0.1), ValueError, "PPOClip", "-0.1"),
    "clip NaN": (lambda: po.PPOClip(math.nan), ValueError, "PPOClip", "nan"),
    "clip no number": (lambda: po.PPOClip("0.2"), TypeError, "PPOClip", "0.2"),
    "scale by a tensor": (lambda: po.NLL() * torch.ones(2), TypeError),
    "scale by inf": (lambda: math.inf * po.NLL(), ValueError, "finite", "inf"),
    "plus a number": (lambda: po.NLL() + 1.0, TypeError),
    "weighted twice": (
        lambda: po.NLL().weighted_by("a").weighted_by("b"),
        ValueError,
        "once",
        "'a'",
        "'b'",
    ),
    "gate with a comma": (lambda: po.NLL().weighted_by("a,b"), ValueError, "'a,b'", "comma"),
    "gate without a name": (lambda: po.JSD(0.5).weighted_by(""), ValueError, "empty"),
    # cross entropy
    "reduction": (
        lambda: po.cross_entropy(LOGITS, LABELS, reduction="avg"),
        ValueError,
        "reduction",
        "avg",
    ),
    "class probabilities": (
        lambda: po.cross_entropy(LOGITS, LOGITS.softmax(-1)[:1]),
        ValueError,
        "probabilities",
    ),
    "label smoothing": (
        lambda: po.cross_entropy(LOGITS, LABELS, label_smoothing=1.5),
        ValueError,
        "label_smoothing",
        "1.5",
    ),
    "class weight shape": (
        lambda: po.cross_entropy(LOGITS, LABELS, weight=torch.ones(3)),
        ValueError,
        "weight",
        "(11,)",
        "(3,)",
    ),
    "z_loss": (lambda: po.cross_entropy(LOGITS, LABELS, z_loss=-1.0), ValueError, "z_loss", "-1"),
    "options": (
        lambda: po.linear_cross_entropy(X, W, LABELS, options=object()),
        TypeError,
        "options",
    ),
    "target shape": (
        lambda: po.linear_cross_entropy(X, W, LABELS[:3]),
        ValueError,
        "target",
        "(6,)",
        "(3,)",
    ),
    # settings
    "chunk_rows": (lambda: po.chunk_rows(0), ValueError, "chunk_rows", "0"),
    "memory_budget": (lambda: po.memory_budget(1.5), ValueError, "memory_budget", "1.5"),
    "explain": (lambda: po.explain(0, 8, 8), ValueError, "n_tokens", "0"),
    "explain dtype": (lambda: po.explain(8, 8, 8, "bf16"), TypeError, "dtype", "bf16"),
}


@pytest.mark.parametrize("case", TABLE)
def test_bad_input_gives_an_error_that_names_it(case):
    call, error, *words = TABLE[case]
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert [w for w in words if w not in message] == [], message


@each_backend
def test_a_temperature_is_checked_only_where_a_row_counts_and_a_nan_shows(backend):
    with po.use_backend(backend):
        clean = lpl(tokens=batch(temperature=torch.ones(N))).loss
        ignored = torch.where(LABELS == -100, 0.0, torch.ones(N))
        assert torch.equal(lpl(tokens=batch(temperature=ignored)).loss, clean)
        broken = torch.where(LABELS == 10, math.nan, torch.ones(N))
        assert lpl(tokens=batch(temperature=broken)).loss.isnan()


@each_backend
def test_n6_a_bad_label_leaves_nothing_half_done(backend):
    """Inputs unchanged, no gradient anywhere, and the next call is right."""
    with po.use_backend(backend):
        want = lpl().loss
        kept = [t.detach().clone() for t in (X, W, LABELS, ADV)]
        with pytest.raises(IndexError, match="row 4 holds 11"):
            lpl(tokens=batch(labels=relabel(4, V)))
        assert all(torch.equal(a, b) for a, b in zip((X, W, LABELS, ADV), kept, strict=True))
        assert X.grad is None
        assert W.grad is None
        assert torch.equal(lpl().loss, want)


@each_backend
def test_n6_the_row_is_that_of_the_whole_batch_not_of_the_compacted_one(backend):
    """Row 3 is ignored and left out before the check; the message still counts it."""
    with po.use_backend(backend), pytest.raises(IndexError, match="row 5 holds 77"):
        lpl(tokens=batch(labels=relabel(5, 77)))


@each_backend
def test_n6_a_bad_label_at_weight_0_is_never_read(backend):
    weights = torch.ones(N)
    weights[4] = 0.0
    with po.use_backend(backend):
        assert lpl(tokens=batch(labels=relabel(4, 99), weights=weights)).loss.isfinite()


EMPTIES = {"no rows": (0,), "no sequences": (0, 5), "no positions": (3, 0)}
LOSSES = {
    "linear_policy_loss": lambda x, w, y: (
        po.linear_policy_loss(x, po.Head(w), po.TokenBatch(y), po.NLL()).loss
    ),
    "policy_loss": lambda x, w, y: po.policy_loss(x @ w.t(), po.TokenBatch(y), po.NLL()).loss,
    "linear_token_logps": lambda x, w, y: po.linear_token_logps(x, po.Head(w), y).logps.sum(),
    "token_logps": lambda x, w, y: po.token_logps(x @ w.t(), y).logps.sum(),
    "linear_cross_entropy": lambda x, w, y: po.linear_cross_entropy(x, w, y),
    "linear_cross_entropy none": lambda x, w, y: po.linear_cross_entropy(
        x, w, y, reduction="none"
    ).sum(),
    "cross_entropy": lambda x, w, y: po.cross_entropy((x @ w.t()).reshape(-1, V), y.reshape(-1)),
    "cross_entropy none": lambda x, w, y: po.cross_entropy(
        (x @ w.t()).reshape(-1, V), y.reshape(-1), reduction="none"
    ).sum(),
}


@each_backend
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [*EMPTIES.values(), (2, 3)], ids=[*EMPTIES, "all ignored"])
def test_n11_empty_and_all_ignored_batches_give_loss_0_and_zero_gradients(name, shape, backend):
    x = torch.randn(*shape, D, requires_grad=True)
    w = torch.randn(V, D, requires_grad=True)
    labels = torch.full(shape, -100)
    with po.use_backend(backend):
        loss = LOSSES[name](x, w, labels)
        loss.backward()
    assert loss.item() == 0.0
    assert x.grad.shape == x.shape
    assert w.grad.shape == w.shape
    assert not x.grad.any()
    assert not w.grad.any()


@each_backend
def test_n3_a_nan_old_logp_at_a_counted_token_shows_in_the_loss(backend):
    """The policy for NaN: no error, no nan_to_num; the loss and that token's gradient are NaN, the
    other rows of dhidden are as they were (mutation 18).
    """
    old = OLD.clone()
    old[1] = math.nan
    with po.use_backend(backend):
        clean = torch.autograd.grad(lpl().loss, X)[0]
        out = lpl(tokens=batch(old_logps=old))
        dirty = torch.autograd.grad(out.loss, X)[0]
    assert out.loss.isnan()
    assert dirty[1].isnan().all()
    others = [0, 2, 3, 4, 5]
    assert torch.equal(dirty[others], clean[others])
    assert out.metrics["num_nonfinite"] == 0  # counts our log-probs, which are finite
