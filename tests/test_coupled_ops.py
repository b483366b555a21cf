"""Coupled objectives as ops: autograd and compilation (PROMISES A1 to A4, N7)."""

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

pytestmark = pytest.mark.usefixtures("one_thread")
D, V = 32, 211


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
