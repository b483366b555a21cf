"""Coupled objectives as ops: GEMMs counted, memory, autograd and compilation (PROMISES A1 to A4,
M2, N7).
"""

import copy
import pickle  # noqa: S403  the test is that objectives survive it
from concurrent.futures import ThreadPoolExecutor

import coupled_batches as cb
import pytest
import torch
import torch.utils.checkpoint
from batches import BACKENDS, needs_cpu
from coupled_batches import CASES
from torch._dynamo.testing import CompileCounterWithBackend

import pyoffline as po
from pyoffline import coupled_ops, ops
from pyoffline.backends import load
from pyoffline.plan import plan_list

pytestmark = pytest.mark.usefixtures("one_thread")
D, V = 32, 211


@pytest.fixture
def kernels(monkeypatch):
    """Counts the rows that each GEMM takes and remembers what is allocated, by backend name."""

    def watch(backend):
        module = load(backend, torch.zeros(1))
        cls = module.CpuKernels if backend == "cpu" else module.ReferenceKernels
        seen = {"logits": 0, "dhidden": 0, "add_dweight": 0, "shapes": []}
        arguments = {"logits": 1, "dhidden": 0, "add_dweight": 0}

        def spy(name, plain):
            def counted(self, *args):
                seen[name] += args[arguments[name]].shape[0]
                return plain(self, *args)

            return counted

        def shape_spy(plain):
            def made(self, *args):
                out = plain(self, *args)
                seen["shapes"].append(tuple(out.shape))
                return out

            return made

        for name in arguments:
            monkeypatch.setattr(cls, name, spy(name, getattr(cls, name)))
        for name in ("buffer", "empty"):
            monkeypatch.setattr(cls, name, shape_spy(getattr(cls, name)))
        return seen

    return watch


HEAD, ALL = ("weight",), ("hidden", "weight")
GEMMS = [
    # rows of a chunk, gradients wanted, GEMMs of logits, dhidden, dweight, why
    (100, ALL, (1, 1, 1), "everything fits: three"),
    (9, ALL, (1, 1, 1), "every sequence fits: three"),
    (1, ALL, (2, 1, 1), "longer than a chunk: the logits twice"),
    (100, ("hidden",), (1, 1, 0), "frozen head: two"),
    (1, ("hidden",), (1, 1, 0), "frozen head, longer than a chunk: still two"),
    (9, HEAD, (1, 0, 1), "head only"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "wanted", "counts", "reason"), GEMMS)
def test_gemms_per_token(rows, wanted, counts, reason, backend, kernels):
    lengths = (9,) * 5
    batch = cb.make("mu adv", lengths=lengths, ignored=False)
    seen, n = kernels(backend), 45
    with po.chunk_rows(rows):
        cb.run(batch, po.SequencePowerIS(0.5), backend, wanted=wanted)
    got = tuple(seen[k] / n for k in ("logits", "dhidden", "add_dweight"))
    assert got == counts, reason
    assert sum(got) <= 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_coefficient_0_are_left_out_before_the_recomputation(backend, kernels):
    batch = cb.make("old adv", lengths=(9,) * 5, ignored=False)
    batch["adv"] = torch.tensor([0.0, 1.0, 0.0, -1.0, 0.0])
    seen = kernels(backend)
    with po.chunk_rows(4):
        got = cb.run(batch, po.GSPO(1.0, 100.0), backend)
    # the last unit has no gradient: a row of zeros ends the accumulation of dweight
    assert (seen["logits"], seen["dhidden"], seen["add_dweight"]) == (45 + 18, 18, 18 + 1)
    with po.chunk_rows(100):
        whole = cb.run(batch, po.GSPO(1.0, 100.0), backend)
    for key in ("dhidden", "dweight"):
        torch.testing.assert_close(got[key], whole[key], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_entropy_term_recomputes_with_a_frozen_head(backend, kernels):
    batch = cb.make("old ref adv", lengths=(9,) * 5, ignored=False)
    seen = kernels(backend)
    with po.chunk_rows(4):
        cb.run(batch, CASES["composed"][0], backend, wanted=("hidden",))
    assert seen["logits"] == 90


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_is_one_gemm_and_allocates_none(backend, kernels):
    batch = cb.make("old adv", lengths=(9,) * 5, ignored=False)
    seen = kernels(backend)
    with po.use_backend(backend), po.chunk_rows(4):
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                head = po.Head(
                    batch["weight"].requires_grad_(not torch.is_inference_mode_enabled())
                )
                out = po.linear_policy_loss(batch["hidden"], head, cb.tokens(batch), po.GSPO())
            assert not out.loss.requires_grad
    assert seen["logits"] in (0, 90) and seen["dhidden"] == seen["add_dweight"] == 0
    assert (V, D) not in seen["shapes"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_M2_one_chunk_buffer_within_the_budget_whatever_the_batch(backend, kernels):
    budget = 4 * V * 20
    for count in (3, 40):
        batch = cb.make("mu rewards group", lengths=(5, 11, 30) * count, groups=tuple(range(120)))
        seen = kernels(backend)
        with po.memory_budget(budget):
            cb.run(batch, po.RenyiRWR(0.5), backend)
        wide = [s for s in seen["shapes"] if len(s) == 2 and s[1] == V]
        assert len(set(wide)) == 1 and 10 <= wide[0][0] <= 20
        # the gradient, and beyond 32 chunks its second level
        assert len([s for s in seen["shapes"] if s == (V, D)]) == (1 if count == 3 else 2)


def leaves(batch):
    return [batch[k].detach().clone().requires_grad_() for k in ("hidden", "weight")]


def loss_of(kind, batch, objective, x, w):
    given = cb.tokens(batch)
    if kind == "linear":
        return po.linear_policy_loss(x, po.Head(w), given, objective).loss
    return po.policy_loss(x @ w.t(), given, objective).loss


KINDS = pytest.mark.parametrize("kind", ["linear", "logits"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [4, 100])
def test_A1_gradients_exactly_where_asked(rows, backend):
    objective, reads = CASES["gspo"]
    batch = cb.make(reads, bias=True, weights=True)
    with po.chunk_rows(rows):
        whole = cb.run(batch, objective, backend)
        for wanted in (("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias")):
            part = cb.run(batch, objective, backend, wanted=wanted)
            for name in wanted:
                got, want = part[f"d{name}"], whole[f"d{name}"]
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


class Lora(torch.nn.Module):
    def __init__(self):
        super().__init__()
        from peft import LoraConfig, get_peft_model

        model = torch.nn.Sequential()
        model.add_module("head", torch.nn.Linear(D, V, bias=False))
        config = LoraConfig(r=4, target_modules=["head"], lora_alpha=8)
        self.model = get_peft_model(model, config)


@pytest.mark.parametrize("backend", BACKENDS)
def test_A1_lora_factors(backend):
    pytest.importorskip("peft")
    objective, reads = CASES["renyi"]
    batch = cb.make(reads)
    torch.manual_seed(0)
    head = Lora().model.base_model.model.head
    for p in head.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    grads = {}
    for kind in ("fused", "plain"):
        for rows in (4, 100):
            head.zero_grad()
            with po.use_backend(backend), po.chunk_rows(rows):
                if kind == "fused":
                    out = po.linear_policy_loss(
                        batch["hidden"], po.Head.of(head), cb.tokens(batch), objective
                    )
                else:
                    out = po.policy_loss(head(batch["hidden"]), cb.tokens(batch), objective)
                out.loss.backward()
            grads[kind, rows] = [p.grad.clone() for p in head.parameters() if p.requires_grad]
    assert len(grads["plain", 4]) == 2
    for rows in (4, 100):
        for got, want in zip(grads["fused", rows], grads["plain", rows], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@KINDS
def test_A2_upstream_twice_and_double_backward(kind):
    objective, reads = CASES["gspo"]
    batch = cb.make(reads)
    x, w = leaves(batch)
    with po.use_backend("reference"), po.chunk_rows(4):
        loss = loss_of(kind, batch, objective, x, w)
        first = torch.autograd.grad(loss, (x, w), retain_graph=True)
        kept = [g.clone() for g in first]
        again = torch.autograd.grad(loss, (x, w), torch.tensor(-2.5), retain_graph=True)
        for f, k, a in zip(first, kept, again, strict=True):
            assert torch.equal(f, k)
            torch.testing.assert_close(a, -2.5 * k, rtol=1e-5, atol=1e-8)
        live = torch.autograd.grad(loss, (x, w), create_graph=True)
        with pytest.raises(RuntimeError, match=f"{kind}_coupled: double backward"):
            torch.autograd.grad(live[0].sum(), x)
        up = torch.tensor([1.0, -3.0])
        loss = loss_of(kind, batch, objective, x, w)
        many = torch.autograd.grad(loss, x, up, is_grads_batched=True)[0]
        torch.testing.assert_close(many[1], -3.0 * kept[0], rtol=1e-5, atol=1e-8)
        with pytest.raises(RuntimeError, match=f"{kind}_coupled: torch.func.grad"):
            torch.func.grad(lambda y: loss_of(kind, batch, objective, y, w))(x.detach())
        with pytest.raises(RuntimeError, match=f"{kind}_coupled: jvp"):
            torch.func.jvp(lambda y: loss_of(kind, batch, objective, y, w), (x.detach(),), (x,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_A2_units_weigh_by_their_own_omega(backend):
    """One sequence's weight is the upstream of its loss: gradients are linear in omega."""
    objective, reads = CASES["gspo"]
    batch = cb.make(reads, omega=True)
    whole = cb.run(batch, objective, backend)
    for i in (0, 5):
        alone = {**batch, "omega": torch.where(torch.arange(8) == i, batch["omega"], 0.0)}
        got = cb.run(alone, objective, backend)["dhidden"]
        mine = batch["ids"] == i
        torch.testing.assert_close(got[mine], whole["dhidden"][mine], rtol=1e-5, atol=1e-8)
        assert (got[~mine] == 0).all()


@KINDS
@pytest.mark.parametrize("backend", BACKENDS)
def test_N7_inputs_are_never_written_and_views_give_the_same(kind, backend):
    objective, reads = CASES["renyi"]
    batch = cb.make(reads, weights=True)
    x, w = leaves(batch)
    with po.use_backend(backend), po.chunk_rows(4):
        want = torch.autograd.grad(loss_of(kind, batch, objective, x, w), (x, w))
        odd = dict(batch)
        for k in ("mu", "weights", "rewards"):
            odd[k] = torch.stack([batch[k], batch[k]], 1)[:, 1]
        before = {k: v.clone() for k, v in odd.items() if torch.is_tensor(v)}
        xt = x.detach().t().contiguous().t().requires_grad_()
        got = torch.autograd.grad(loss_of(kind, odd, objective, xt, w), (xt, w))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(odd[k], v) for k, v in before.items())


@pytest.mark.parametrize("name", CASES)
def test_A2_objectives_survive_pickle_and_deepcopy(name):
    objective, reads = CASES[name]
    for again in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):  # noqa: S301
        assert again == objective
        a, b = objective.program(True), again.program(True)
        assert (a.codes, a.reads, a.sequence_reads) == (b.codes, b.reads, b.sequence_reads)
        assert torch.equal(a.hyper, b.hyper)


@pytest.mark.parametrize("backend", BACKENDS)
def test_A2_eight_threads_and_checkpointing_give_the_same_bits(backend):
    objective, reads = CASES["renyi"]
    batch = cb.make(reads, weights=True)

    def grads(_):
        x, w = leaves(batch)
        with po.use_backend(backend), po.chunk_rows(7):
            return torch.autograd.grad(loss_of("linear", batch, objective, x, w), (x, w))

    want = grads(0)
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(grads, range(16)):
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    x, w = leaves(batch)
    with po.use_backend(backend), po.chunk_rows(7):
        step = torch.utils.checkpoint.checkpoint(
            lambda x: loss_of("linear", batch, objective, x, w), x, use_reentrant=False
        )
        got = torch.autograd.grad(step, (x, w))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def compiled_call(kind):
    def call(x, w, batch, objective):
        given = cb.tokens(batch)
        if kind == "linear":
            out = po.linear_policy_loss(x, po.Head(w), given, objective)
        else:
            out = po.policy_loss(x @ w.t(), given, objective)
        return out.loss, out.stats.logps, *out.metrics.values()

    return call


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("kind", "name"), [("linear", "opsm_gspo"), ("linear", "with_nll"), ("logits", "renyi")]
)
def test_A3_fullgraph_dynamic_shapes_equal_eager(name, kind, fresh):
    objective, reads = CASES[name]
    counter = CompileCounterWithBackend("aot_eager")
    call = compiled_call(kind)
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for lengths in ((3, 2, 4), (5, 1, 2, 2), (2, 2, 3, 1, 6)):
        batch = cb.make(reads, lengths=lengths, groups=(1, 1, 0, 0, 0))
        x, w = leaves(batch)
        want = call(x, w, batch, objective)
        got = compiled(x, w, batch, objective)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        a, b = (torch.autograd.grad(out[0], (x, w)) for out in (got, want))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 2


def test_A3_twenty_values_of_a_clip_are_one_compile(fresh):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(compiled_call("linear"), fullgraph=True, backend=counter)
    batch = cb.make("old ref adv")
    x, w = leaves(batch)
    for i in range(20):
        objective = po.GSPO(0.01 * (i + 1), 0.02 * (i + 1)) + 0.01 * i * po.KL("k3")
        compiled(x, w, batch, objective)
    assert counter.frame_count == 1


def op_args(kind, name, wanted=(True, True)):
    objective, reads = CASES[name]
    batch = cb.make(reads, lengths=(3, 2, 4))
    program = objective.program(batch["mu"] is not None)
    x, w = (t.requires_grad_(g) for t, g in zip(leaves(batch), wanted, strict=True))
    rows = [batch[k] for k in ("labels", "weights", "old", "mu", "ref")]
    adv = None if batch["adv"] is None else batch["adv"][batch["ids"]]
    rows += [adv, None, [], batch["ids"], batch["rewards"], batch["group"], None, None, None]
    if kind == "logits":
        z = (x @ w.t()).detach().requires_grad_(wanted[0])
        return (z, *rows, program.hyper, program.codes, "", -100, wanted[0], "reference")
    needs = wanted[0] * ops.HIDDEN + wanted[1] * ops.WEIGHT
    head = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    tail = (program.hyper, head, program.codes, "", -100, 0, needs, "reference", [3, 0, 0])
    return (x, w, None, None, None, *rows, *tail)


@KINDS
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, False)])
def test_A3_opcheck(kind, wanted):
    op = getattr(coupled_ops, f"{kind}_coupled")
    for name in ("gspo", "renyi"):
        torch.library.opcheck(op, op_args(kind, name, wanted))


@needs_cpu
@pytest.mark.parametrize("rows", [4, 100])
def test_A4_every_output_element_is_written(rows):
    """torch fills fresh memory with NaN under its deterministic switch."""
    for name in ("gspo", "renyi", "composed"):
        objective, reads = CASES[name]
        batch = cb.make(reads, torch.bfloat16)
        batch["labels"][batch["ids"] == 4] = -100
        batch["adv"] = None if batch["adv"] is None else batch["adv"] * (torch.arange(8) > 2)
        got = []
        for poison in (False, True):
            torch.use_deterministic_algorithms(poison)
            try:
                with po.chunk_rows(rows):
                    got.append(cb.run(batch, objective, "cpu"))
                    frozen = cb.run(batch, objective, "cpu", wanted=("hidden",))
            finally:
                torch.use_deterministic_algorithms(False)
            assert frozen["dhidden"].isfinite().all()
        for key in ("loss", "logps", "dhidden", "dweight"):
            torch.testing.assert_close(got[1][key], got[0][key], rtol=2e-2, atol=1e-4)


def test_threads_and_the_plan_travel_with_the_call():
    assert plan_list() == [0, 0, 0]
    objective, reads = CASES["renyi"]
    batch = cb.make(reads)
    a = cb.run(batch, objective, "reference")
    torch.set_num_threads(2)
    b = cb.run(batch, objective, "reference")
    torch.testing.assert_close(a["dweight"], b["dweight"], rtol=1e-5, atol=1e-7)
