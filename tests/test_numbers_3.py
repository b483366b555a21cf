"""Same inputs, same numbers: views, repeats, threads, batches, micro-batches, sizes past 2^32
(PROMISES N7, N9, N11, N12, N13, N15).
"""

import dataclasses
import importlib

import batches
import compare
import oracle
import pytest
import torch
from batches import BACKENDS, DTYPES, dtype_name, needs_cpu

import pyoffline as po
from pyoffline.token_objectives import ImportanceSampling

pytestmark = pytest.mark.usefixtures("one_thread")
OBJECTIVE = po.DecoupledPPO() + 0.1 * po.KL("k3") - 0.05 * po.Entropy() + po.NLL(0.1, 1e-3)
READS = ("old", "mu", "ref", "adv")
GRADS = ("dhidden", "dweight", "dbias")


def bits(x):
    """The bytes of a tensor's whole storage."""
    return torch.tensor([], dtype=torch.uint8).set_(x.detach().untyped_storage()).clone()


# what a view is taken of, and the view; each equals the tensor it was made from
VIEWS = {
    "strided": lambda x: torch.stack([x, torch.full_like(x, 7)], 1).flatten(0, 1)[::2],
    "offset": lambda x: torch.cat([x[:1], x])[1:],
    "transposed": lambda x: x.t().contiguous().t() if x.dim() == 2 else x,
    "sliced columns": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]] if x.dim() == 2 else x,
    "strided columns": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "negative step by flip": lambda x: x.flip(0).flip(0),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("view", VIEWS)
def test_N7_views_give_the_contiguous_answer_and_inputs_are_not_written(backend, dtype, view):
    # every row counts: compaction would hide a stride
    batch = batches.make(dtype=dtype, reads=READS, temperature=True, bias=True, ignored=False)
    want = batches.run(batch, OBJECTIVE, backend)
    viewed = {
        k: VIEWS[view](x) if isinstance(x, torch.Tensor) and x.dim() else x
        for k, x in batch.items()
    }
    leaves = {k: viewed[k].requires_grad_() for k in ("hidden", "weight", "bias")}
    before = {k: bits(x) for k, x in viewed.items() if isinstance(x, torch.Tensor)}
    with po.use_backend(backend):
        head = po.Head(leaves["weight"], leaves["bias"])
        out = po.linear_policy_loss(leaves["hidden"], head, batches.tokens(viewed), OBJECTIVE)
        grads = torch.autograd.grad(out.loss, list(leaves.values()))
    assert all(torch.equal(x, bits(viewed[k])) for k, x in before.items())
    compare.same_bits("loss", out.loss, want["loss"])
    for name in batches.STATS:
        compare.same_bits(name, getattr(out.stats, name), want[name])
    for name, got in zip(GRADS, grads, strict=True):
        compare.same_bits(name, got, want[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("view", [*VIEWS, "expanded"])
def test_N7_views_of_logits(backend, dtype, view):
    batch = batches.make(dtype=dtype, reads=READS, ignored=False)
    z = torch.randn(37, 301, generator=torch.Generator().manual_seed(2)).to(dtype)
    if view == "expanded":  # stride 0: every row is the first
        z = z[:1].expand(37, 301)
        want = batches.run_logits(z.contiguous(), batch, OBJECTIVE, backend)
    else:
        want = batches.run_logits(z, batch, OBJECTIVE, backend)
        z = VIEWS[view](z)
    before = bits(z)
    got = batches.run_logits(z, batch, OBJECTIVE, backend)
    again = batches.run_logits(z, batch, OBJECTIVE, backend)
    assert torch.equal(bits(z), before)
    for name in ("loss", "dlogits", *batches.STATS):
        compare.same_bits(name, got[name], want[name])
        compare.same_bits(name, again[name], want[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_N7_leading_dimensions_are_only_a_shape(backend):
    batch = batches.make(36, reads=READS, ignored=False)
    want = batches.run(batch, OBJECTIVE, backend)
    shaped = {
        k: x.reshape(3, 2, 6, *x.shape[1:])
        for k, x in batch.items()
        if isinstance(x, torch.Tensor) and k != "weight"
    }
    with po.use_backend(backend):
        hidden = shaped["hidden"].clone().requires_grad_()
        tokens = batches.tokens({**batch, **shaped})
        out = po.linear_policy_loss(hidden, po.Head(batch["weight"]), tokens, OBJECTIVE)
        out.loss.backward()
    compare.same_bits("loss", out.loss, want["loss"])
    compare.same_bits("dhidden", hidden.grad.reshape(36, -1), want["dhidden"])
    compare.same_bits("logps", out.stats.logps.reshape(-1), want["logps"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_N9_bitwise_the_same_run_to_run(backend, dtype):
    batch = batches.make(70, dtype=dtype, reads=READS, bias=True)
    with po.chunk_rows(16):
        runs = [batches.run(batch, OBJECTIVE, backend) for _ in range(5)]
    for got in runs[1:]:
        for name in ("loss", *GRADS, *batches.STATS):
            compare.same_bits(name, got[name], runs[0][name])


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("n, v", [(3, 40000), (64, 3001)])
def test_N9_the_row_pass_is_independent_of_the_thread_count(dtype, n, v):
    """Few long rows and many short ones: both ways of sharing the work among threads."""
    z = torch.randn(n, v, generator=torch.Generator().manual_seed(3)).to(dtype)
    batch = batches.row_batch(torch.arange(n) * 11 % v)
    for k in READS:
        batch[k] = -torch.rand(n, generator=torch.Generator().manual_seed(4)) * 9
    runs = []
    for count in (1, 2, 3, 8):
        with batches.threads(count):
            runs.append(batches.run_logits(z, batch, OBJECTIVE, "cpu"))
    for got in runs[1:]:
        for name in ("loss", "dlogits", *batches.STATS):
            compare.same_bits(name, got[name], runs[0][name])


@needs_cpu
def test_N9_the_row_pass_is_independent_of_the_position():
    z = torch.randn(9, 1003, generator=torch.Generator().manual_seed(3))
    want = batches.run_logits(z[4:5], batches.row_batch([7]), po.NLL(0.1), "cpu")
    for position in range(9):
        rows = z.clone()
        rows[position] = z[4]
        got = batches.run_logits(rows, batches.row_batch([7] * 9), po.NLL(0.1), "cpu")
        compare.same_bits("logps", got["logps"][position], want["logps"][0])
        compare.same_bits("dlogits", got["dlogits"][position], want["dlogits"][0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_N9_deterministic_logps_do_not_depend_on_batch_position_or_chunks(backend, dtype):
    g = torch.Generator().manual_seed(6)
    hidden, weight = torch.randn(600, 40, generator=g), torch.randn(501, 40, generator=g)
    hidden, head = hidden.to(dtype), po.Head(weight.to(dtype))
    labels = torch.randint(0, 501, (600,), generator=g)
    with po.use_backend(backend), po.deterministic():
        want = po.linear_token_logps(hidden, head, labels).logps
        order = torch.randperm(600, generator=g)
        for rows in (order, order[:1], order[:257], torch.tensor([5] * 20), torch.arange(599, 600)):
            got = po.linear_token_logps(hidden[rows], head, labels[rows]).logps
            compare.same_bits("logps", got, want[rows])
        some = labels.where(torch.arange(600) % 3 != 0, torch.tensor(-100))
        got = po.linear_token_logps(hidden, head, some).logps
        compare.same_bits("logps", got[some != -100], want[some != -100])
        policy = po.linear_policy_loss(hidden, head, po.TokenBatch(some), po.NLL())
        compare.same_bits("logps", policy.stats.logps[some != -100], want[some != -100])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("train", [False, True], ids=["score", "train"])
def test_N9_deterministic_mode_runs_every_product_at_one_shape(backend, train, monkeypatch):
    """Small products may be independent of their number of rows by luck; the shapes may not."""
    module = importlib.import_module(f"pyoffline.{backend}")
    kernels = module.CpuKernels if backend == "cpu" else module.ReferenceKernels
    plain, shapes = kernels.logits, []

    def spy(self, call, hidden, adapter, out):
        shapes.append((tuple(hidden.shape), tuple(out.shape)))
        return plain(self, call, hidden, adapter, out)

    monkeypatch.setattr(kernels, "logits", spy)
    for n in (1, 37, 300):
        batch = batches.make(n, bias=True)
        with po.deterministic(), po.chunk_rows(64):
            if train:
                batches.run(batch, po.NLL(), backend)
            else:
                with po.use_backend(backend):
                    po.linear_token_logps(
                        batch["hidden"], po.Head(batch["weight"]), batch["labels"]
                    )
    assert len(shapes) > 5 and set(shapes) == {((64, 48), (64, 301))}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("logits_dtype", [None, torch.float32], ids=["as_weight", "fp32_logits"])
def test_N15_the_first_step_is_on_policy(backend, dtype, logits_dtype):
    """Score, then train on unchanged weights: |l - old| <= 1e-5 at equal chunk shape; exactly 0 in
    deterministic mode, also when the training batch is another one.
    """
    batch = batches.make(90, 64, 700, dtype, reads=("adv",), bias=True, ignored=False)
    head = po.Head(batch["weight"], batch["bias"], logits_dtype=logits_dtype)

    def train(rows, old):
        part = {k: batch[k][rows] for k in ("labels", "weights", "adv")}
        tokens = batches.tokens({**part, "old": old[rows], "temperature": None, "extra": {}})
        return po.linear_policy_loss(batch["hidden"][rows], head, tokens, po.PPOClip())

    everything = torch.arange(90)
    with po.use_backend(backend):
        old = po.linear_token_logps(batch["hidden"], head, batch["labels"]).logps
        assert (train(everything, old).stats.logps - old).abs().max() <= 1e-5
        with po.deterministic():
            old = po.linear_token_logps(batch["hidden"], head, batch["labels"]).logps
            for rows in (everything, everything[3:40], everything[::7], everything[:1]):
                out = train(rows, old)
                compare.same_bits("logps", out.stats.logps, old[rows])
                assert out.metrics["ratio/max"] == 1 and out.metrics["ratio/min"] == 1


@pytest.mark.parametrize("k", [1, 2, 4, 7, 37])
def test_N11_micro_batches_add_up_to_the_full_batch_in_fp64(k):
    batch = batches.make(reads=READS, temperature=True, bias=True)
    for name in ("hidden", "weight", "bias"):
        batch[name] = batch[name].double()
    want = batches.run(batch, OBJECTIVE, "reference")
    total = dict.fromkeys(("loss", *GRADS), 0.0)
    dhidden = []
    for rows in torch.arange(37).chunk(k):
        part = {
            n: x[rows] if isinstance(x, torch.Tensor) and n not in ("weight", "bias") else x
            for n, x in batch.items()
        }
        got = batches.run(part, OBJECTIVE, "reference")
        total = {n: total[n] + got[n] if n != "dhidden" else 0.0 for n in total}
        dhidden.append(got["dhidden"])
    total["dhidden"] = torch.cat(dhidden)
    for name, x in total.items():
        torch.testing.assert_close(x, want[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_N11_weights_are_the_primitive_and_the_default_is_the_token_mean(backend):
    batch = batches.make(bias=True)
    batch["weights"] = torch.where(batch["labels"] == -100, 0.0, 1.0)
    count = int(batch["weights"].sum())
    mean = {**batch, "weights": batch["weights"] / count}
    a, b = (batches.run(x, po.NLL(), backend) for x in ({**batch, "weights": None}, mean))
    for name in ("loss", *GRADS):
        compare.same_bits(name, a[name], b[name])
    truth = oracle.run(batch, po.NLL(), torch.float64)
    assert abs(a["loss"].item() - truth["loss"].item() / count) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("how", ["labels", "weights", "default weights", "no rows"])
def test_N11_nothing_that_counts_is_loss_0_and_zero_gradients(backend, dtype, how):
    batch = batches.make(0 if how == "no rows" else 12, dtype=dtype, reads=READS, bias=True)
    batch["hidden"][::2] = float("nan")
    if how == "weights":
        batch["weights"] = torch.zeros(12)
    else:
        batch["labels"] = torch.full_like(batch["labels"], -100)
    if how == "default weights":
        batch["weights"] = None
    got = batches.run(batch, OBJECTIVE, backend)
    assert got["loss"] == 0
    for name in GRADS:
        assert (got[name] == 0).all(), name
    z = torch.full((len(batch["labels"]), 5), float("nan"), dtype=dtype)
    got = batches.run_logits(z, batch, OBJECTIVE, backend)
    assert got["loss"] == 0 and (got["dlogits"] == 0).all()
    assert all(x.isfinite() for x in got["metrics"].values())


TENSORS = ("old_logps", "ref_logps", "behavior_logps", "advantages")
UNUSED = [
    (po.NLL(), set()),
    (po.WeightedNLL(), {"advantages"}),
    (po.PPOClip(), {"old_logps", "advantages"}),
    (po.KL("k1"), {"ref_logps"}),
    (po.KL("k3_is", "mu"), {"behavior_logps", "old_logps"}),
    (ImportanceSampling(), {"behavior_logps", "advantages"}),
    (po.PPOClip() + po.KL(), {"old_logps", "advantages", "ref_logps"}),
    (po.ProximalSFT(), {"old_logps"}),
    (po.DecoupledPPO(), {"old_logps", "advantages", "behavior_logps"}),
]


@pytest.mark.parametrize("objective, reads", UNUSED, ids=[str(u[0])[:40] for u in UNUSED])
def test_N12_an_unused_or_missing_tensor_raises_and_is_named(objective, reads):
    z, labels, x = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), torch.full((2,), -1.0)
    po.policy_loss(z, po.TokenBatch(labels, **dict.fromkeys(reads, x)), objective)
    for name in TENSORS:
        changed = reads ^ {name}
        with pytest.raises(ValueError, match=name):
            po.policy_loss(z, po.TokenBatch(labels, **dict.fromkeys(changed, x)), objective)
    given = dict.fromkeys(reads, x)
    for field in dataclasses.fields(po.SequenceBatch):
        sequences = po.SequenceBatch(**{field.name: x})
        with pytest.raises(ValueError, match=field.name):
            po.policy_loss(z, po.TokenBatch(labels, **given, sequences=sequences), objective)
    with pytest.raises(ValueError, match="'surprise'"):
        po.policy_loss(z, po.TokenBatch(labels, **given, extra={"surprise": x}), objective)
    with pytest.raises(ValueError, match="'missing'"):
        gated = objective + po.NLL().weighted_by("missing")
        po.policy_loss(z, po.TokenBatch(labels, **given), gated)


def test_N12_unknown_keywords_and_wrong_counts_raise():
    z, labels = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
    calls = {
        "epsilon": lambda **k: po.policy_loss(z, po.TokenBatch(labels), po.NLL(), **k),
        "old_logp": lambda **k: po.TokenBatch(labels, **k),
        "bias_": lambda **k: po.Head(z, **k),
        "weights": lambda **k: po.token_logps(z, labels, **k),
        "smoothing": lambda **k: po.cross_entropy(z, labels, **k),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=name):
            call(**{name: torch.ones(2)})
    with pytest.raises(ValueError, match="n_valid is 1, but 2"):
        po.policy_loss(z, po.TokenBatch(labels, n_valid=1), po.NLL())


ROW = 2**18


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("linear_rows", [2**13 + 4, 2**14 + 4], ids=["past 2^31", "past 2^32"])
def test_N13_rows_past_2_to_the_31_and_32_elements(backend, linear_rows, tmp_path):
    """A sparse file of bf16 logits, 4 or 8 GiB in name: only the rows that count exist. An offset
    that wraps to a negative number reads the zeros before them, and fails instead of crashing.
    """
    n, path = linear_rows, str(tmp_path / "logits.bin")
    z = torch.from_file(path, shared=True, size=2**31 + n * ROW, dtype=torch.bfloat16)
    z = z[2**31 :].view(n, ROW)
    g = torch.Generator().manual_seed(0)
    rows = torch.tensor([0, n // 2, n - 6, n - 3, n - 1])
    z[rows] = torch.randn(5, ROW, generator=g).bfloat16()
    labels = torch.full((n,), -100)
    labels[rows] = torch.tensor([1, ROW - 1, 77, 0, 4242])
    some, some_labels = z[rows], labels[rows]
    with po.use_backend(backend), torch.no_grad():
        got, want = po.token_logps(z, labels), po.token_logps(some, some_labels)
        loss = po.policy_loss(z, po.TokenBatch(labels), po.NLL())
    for name in batches.STATS:
        compare.same_bits(name, getattr(got, name)[rows], getattr(want, name))
    compare.same_bits("logps", loss.stats.logps[rows], want.logps)
    # backward: the first and the last row as a view, whose gradient has the size of two rows
    view = z[:: n - 1]
    y = torch.arange(view.shape[0])
    far = batches.run_logits(view, batches.row_batch(y), po.NLL(), backend)
    near = batches.run_logits(view.clone(), batches.row_batch(y), po.NLL(), backend)
    compare.same_bits("dlogits", far["dlogits"], near["dlogits"])
