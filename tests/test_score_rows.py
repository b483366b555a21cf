"""Scoring without logits (`_C.score_rows`): what the row pass says of stored logits, for every
dtype, border of a panel, transform of the head and kind of row (PROMISES N1, N2, N3, N9, N15, A4).

With the identity as hidden states the product is exact, so the row pass on the transposed weight is
the truth.
"""

import math

import pytest
import torch
from batches import DTYPES, dtype_name, make, needs_cpu, threads
from row_pass_args import Guarded, inputs, outputs

import pyoffline as po

pytestmark = needs_cpu
_C = pytest.importorskip("pyoffline._C")
if not all(_C.gemm_info()[name] for name in ("bf16", "fp16", "fp32")):
    pytest.skip("not run: no vendor GEMM in this torch", allow_module_level=True)

PANEL = _C.gemm_info()["panels"]["logits"]
BORDERS = (1, 2, 37, PANEL - 1, PANEL, PANEL + 1, 2 * PANEL, 3 * PANEL + 5)


@pytest.fixture(autouse=True)
def kernel(bf16_kernel):
    return bf16_kernel


def both(logits, *, block_rows=4096, operands=None, **given) -> tuple[dict, dict]:
    """(score_rows on the identity and logits^T, or on `operands`, row_pass on the logits)."""
    rows, vocab = logits.shape
    results = []
    for scoring in (True, False):
        out = {k: v for k, v in outputs(rows, vocab, logits.dtype).items() if k != "dlogits"}
        plain = {k: x.tensor for k, x in out.items()}
        arguments = {k: v for k, v in given.items() if k not in ("logits", "labels")}
        if scoring:
            eye = torch.eye(rows, dtype=logits.dtype)
            states, weight = operands or (eye, logits.t().contiguous())
            name = dtype_name(logits.dtype)
            _C.score_rows(
                states,
                weight,
                given["labels"],
                logits_dtype=name,
                block_rows=block_rows,
                **arguments,
                **plain,
            )
        else:
            _C.row_pass(logits, given["labels"], **arguments, **plain)
        assert all(x.intact() for x in out.values())
        results.append(plain)
    return results[0], results[1]


def assert_same(got: dict, want: dict, atol=3e-6, rtol=3e-6):
    for name, x in want.items():
        torch.testing.assert_close(
            got[name], x, atol=atol, rtol=rtol, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("vocab", BORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_every_output_equals_the_row_pass_at_every_border_of_a_panel(dtype, vocab):
    given = inputs(19, vocab, dtype, seed=vocab)
    got, want = both(given.pop("logits"), **given)
    assert_same(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("hidden", [1000, 2100])
def test_wide_hidden_states(dtype, hidden):
    """One block of the inner size and three, in each several strips of a panel: hidden states are
    rows of the identity from all over it, so that the product is exact."""
    rows, vocab = 150, 2500
    given = inputs(rows, vocab, dtype, seed=hidden)
    logits = given.pop("logits")
    g = torch.Generator().manual_seed(hidden)
    pick = torch.randperm(hidden, generator=g)[:rows]
    states = torch.zeros(rows, hidden, dtype=dtype)
    states[torch.arange(rows), pick] = 1.0
    weight = torch.randn(vocab, hidden, generator=g).to(dtype)
    weight[:, pick] = logits.t()
    got, want = both(logits, operands=(states, weight), **given)
    assert_same(got, want, rtol=1e-5)


@pytest.mark.parametrize("head", [{"softcap": 0.0}, {"logit_scale": -1.5}, {"softcap": 3.0}])
def test_transforms_of_the_head_across_panels(head):
    given = inputs(9, 2 * PANEL + 3, torch.float32, seed=1) | head
    got, want = both(given.pop("logits"), **given)
    assert_same(got, want)


def test_n1_the_maximum_in_any_panel_a_confident_row_and_a_large_offset():
    vocab = 3 * PANEL
    logits = torch.randn(9, vocab)
    for row in range(6):  # the peak in the first, second, third panel, at its first or last entry
        logits[row, (row // 2) * PANEL + (PANEL - 1) * (row % 2)] = 30.0
    logits[6] += 1e6
    logits[7] = -1e6
    logits[8, :PANEL] -= 2000.0  # a panel that adds nothing
    labels = torch.tensor([0, 5, PANEL, 3, 2 * PANEL, vocab - 1, 77, 8, 9])
    got, want = both(logits, labels=labels)
    z = logits.double()
    truth = z.log_softmax(-1)
    logp = truth.gather(-1, labels[:, None])[:, 0]
    bound = 8 * torch.finfo(torch.float32).eps * (1 + logp.abs())
    assert ((got["logps"].double() - logp).abs() <= bound).all()
    entropy = -(truth.exp() * truth).sum(-1)
    torch.testing.assert_close(got["entropy"].double(), entropy, atol=1e-5, rtol=1e-5)
    assert (got["logps"] <= 0).all()
    assert_same(got, want)


def test_masked_vocabulary_a_whole_panel_of_minus_inf():
    vocab = 3 * PANEL
    logits = torch.randn(4, vocab)
    bias = torch.zeros(vocab)
    bias[:PANEL] = -math.inf
    bias[2 * PANEL + 1 :: 2] = -math.inf
    labels = torch.tensor([PANEL, 0, 2 * PANEL, 2 * PANEL + 1])
    got, want = both(logits, labels=labels, bias=bias)
    assert got["logps"][1] == got["logps"][3] == -math.inf
    assert got["logps"][[0, 2]].isfinite().all() and got["entropy"].isfinite().all()
    assert_same(got, want)


def test_n3_nan_and_inf_show_in_their_row_alone_wherever_the_panel():
    vocab = 2 * PANEL + 1
    hidden = torch.tensor([[1.0], [math.nan], [math.inf], [2.0]])
    weight = torch.randn(vocab, 1)
    labels = torch.tensor([0, 1, PANEL, vocab - 1])
    out = torch.full((4,), 7.0)
    _C.score_rows(hidden, weight, labels, logits_dtype="float32", logps=out)
    want = (hidden * weight.t())[[0, 3]].log_softmax(-1).gather(-1, labels[[0, 3], None])[:, 0]
    torch.testing.assert_close(out[[0, 3]], want)
    assert out[[1, 2]].isnan().all()


@pytest.mark.parametrize("nan_at", [None, 3, PANEL + 3])
def test_n3_a_row_without_a_finite_entry_is_nan(nan_at):
    vocab = 2 * PANEL
    logits = torch.randn(2, vocab)
    bias = torch.full((vocab,), -math.inf)
    if nan_at is not None:
        bias[nan_at] = math.nan
        bias[5] = 0.0
    got, want = both(logits, labels=torch.tensor([0, 5]), bias=bias)
    assert got["logps"].isnan().all() and got["lse"].isnan().all()
    assert_same(got, want)


def test_n9_the_same_bits_for_every_thread_count_and_block_that_the_product_allows():
    given = inputs(33, PANEL + 100, torch.bfloat16, seed=3)
    logits = given.pop("logits")
    results = [both(logits, threads=n, block_rows=b, **given)[0] for n, b in ((1, 33), (2, 33))]
    for name, x in results[0].items():
        assert torch.equal(x, results[1][name]), name
    for block in (1, 7, 32):
        assert_same(both(logits, block_rows=block, **given)[0], results[0])


def test_n2_rows_that_do_not_count_are_zero_whatever_they_hold():
    given = inputs(6, 50, torch.float32)
    logits = given.pop("logits")
    given["old"][1] = math.nan
    got, _ = both(logits, **given)
    for name, x in got.items():
        assert (x[..., 1] == 0).all() and (x[..., 2] == 0).all(), name


@pytest.mark.parametrize(
    ("changes", "error", "part"),
    [
        ({"logits_dtype": "float64"}, ValueError, "logits_dtype"),
        ({"logits_dtype": None}, ValueError, "logits_dtype"),
        ({"block_rows": 0}, ValueError, "block_rows"),
        ({"coefs": torch.zeros(4, 3)}, ValueError, "coefs"),
        ({"dlogits": torch.zeros(3, 5)}, TypeError, "dlogits"),
        ({"bias": torch.zeros(4)}, ValueError, "bias"),
        ({"labels": torch.tensor([0, 5, 1])}, IndexError, "row 1"),
        ({"weight": torch.zeros(5, 3)}, ValueError, "weight"),
        ({"weight": torch.zeros(0, 2)}, ValueError, "weight"),
        ({"hidden": torch.zeros(3, 2).bfloat16()}, ValueError, "weight"),
        ({"logps": torch.zeros(2)}, ValueError, "logps"),
    ],
)
def test_m1_bad_arguments_are_named_errors_and_nothing_is_written(changes, error, part):
    memory = Guarded((3,), torch.float32)
    arguments = {
        "hidden": torch.zeros(3, 2),
        "weight": torch.zeros(5, 2),
        "labels": torch.tensor([0, 1, 2]),
        "logits_dtype": "float32",
        "entropy": memory.tensor,
        **changes,
    }
    first = [arguments.pop(name) for name in ("hidden", "weight", "labels")]
    with pytest.raises(error, match="score_rows") as raised:
        _C.score_rows(*first, **arguments)
    assert part in str(raised.value)
    assert memory.intact() and memory.tensor.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_n15_scoring_and_training_agree_at_equal_chunk_shape(dtype):
    batch = make(40, 64, 5000, dtype, ignored=False)
    head = po.Head(batch["weight"])
    with po.use_backend("cpu"), po.chunk_rows(16):
        with torch.no_grad():
            scored = po.linear_token_logps(batch["hidden"], head, batch["labels"])
        x = batch["hidden"].clone().requires_grad_()
        out = po.linear_policy_loss(x, head, po.TokenBatch(batch["labels"]), po.NLL())
    assert (scored.logps - out.stats.logps).abs().max() <= 1e-5


def test_n15_in_deterministic_mode_the_difference_is_zero_whatever_the_batch():
    batch = make(40, 64, 5000, torch.bfloat16, ignored=False)
    head = po.Head(batch["weight"])
    with po.use_backend("cpu"), po.deterministic(), torch.no_grad():
        scored = po.linear_token_logps(batch["hidden"], head, batch["labels"])
        part = po.linear_token_logps(batch["hidden"][11:17], head, batch["labels"][11:17])
    assert torch.equal(scored.logps[11:17], part.logps)


def test_a_custom_objective_is_evaluated_without_logits_too():
    batch = make(20, 16, 300, reads=("adv", "mu"), ignored=True)
    fn = po.custom(lambda t: -t.adv * torch.exp(0.5 * (t.logp - t.mu)) + 0.1 * t.entropy)
    given = po.TokenBatch(
        batch["labels"],
        advantages=batch["adv"],
        behavior_logps=batch["mu"],
        weights=batch["weights"],
    )
    losses = []
    for backend in ("cpu", "reference"):
        with po.use_backend(backend), torch.no_grad(), threads(1):
            head = po.Head(batch["weight"])
            losses.append(po.linear_policy_loss(batch["hidden"], head, given, fn).loss)
    torch.testing.assert_close(*losses)
