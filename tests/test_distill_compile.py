"""linear_distill_loss under torch.compile and torch.library (PROMISES A3)."""

import pytest
import torch
from batches import BACKENDS
from test_distill_autograd import TEACHERS, N, V, distill, draw
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import pyoffline as po
from pyoffline import autograd, ops
from pyoffline.distill_ops import linear_distill

pytestmark = pytest.mark.usefixtures("one_thread")
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture
def fresh():
    """No compiled code of another test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_call(x, w, labels, tensors, kind, divergence):
    teacher = {
        "head": lambda: po.TeacherHead(tensors[0], po.Head(tensors[1])),
        "logits": lambda: po.TeacherLogits(tensors[0]),
        "top-k": lambda: po.TeacherTopK(*tensors),
    }[kind]()
    out = distill(x, w, labels, teacher, divergence)
    return out.loss, out.stats.logps, *out.metrics.values()


def compile_args(n, kind, divergence, seed=0):
    x, w, labels, t = draw(n, kind, seed)
    tensors = {
        "head": lambda: (t.hidden, t.head.weight),
        "logits": lambda: (t.logits,),
        "top-k": lambda: (t.ids, t.logps),
    }[kind]()
    return x, w, labels, tensors, kind, divergence


def assert_equal_to_eager(compiled, args):
    want, got = compiled_call(*args), compiled(*args)
    torch.testing.assert_close(
        [t.detach() for t in got], [t.detach() for t in want], rtol=1e-6, atol=1e-7
    )
    a, b = (torch.autograd.grad(t[0], args[:2]) for t in (got, want))
    torch.testing.assert_close(list(a), list(b), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("kind", "backend"), [(kind, "cpu") for kind in TEACHERS] + [("head", "reference")]
)
def test_a3_fullgraph_dynamic_shapes_equal_eager(kind, backend, fresh):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(compiled_call, fullgraph=True, backend=counter)
    with po.use_backend(backend):
        for i, n in enumerate((8, 12)):
            assert_equal_to_eager(compiled, compile_args(n, kind, po.JSD(0.2 + 0.1 * i), i))
    assert counter.frame_count <= 2


def test_a3_inductor_equals_eager(fresh):
    compiled = torch.compile(compiled_call, fullgraph=True)
    assert_equal_to_eager(compiled, compile_args(8, "head", po.ReverseKL() + po.NLL()))


def test_a3_twenty_values_of_beta_are_one_compile(fresh):
    """0 and 1 too, which stand for the two KLs."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(compiled_call, fullgraph=True, backend=counter)
    for i in range(20):
        d = po.JSD(i / 19) + 0.05 * i * po.NLL()
        assert_equal_to_eager(compiled, compile_args(8, "head", d))
    assert counter.frame_count == 1


def op_args(kind="head", backend="reference", grads=(True, True), n=N, bias=False):
    x, w, labels, _ = draw(n)
    x.requires_grad_(grads[0]), w.requires_grad_(grads[1])
    needs = grads[0] * ops.HIDDEN + grads[1] * ops.WEIGHT + bias * ops.BIAS
    b = torch.randn(V, requires_grad=True) if bias else None
    t = compile_args(n, kind, None)[3]
    teacher = {
        "head": lambda: (*t, None, None, None, None, None, None),
        "logits": lambda: (*[None] * 5, *t, None, None),
        "top-k": lambda: (*[None] * 6, *t),
    }[kind]()
    p = (po.JSD(0.3) + 0.5 * po.ForwardKL() + po.NLL()).program(False)
    head = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    q = p.objective
    vectors = (torch.full((n,), 0.25), None, None, None, None, None)
    tail = (q.hyper, head, list(q.codes), "", -100, 0, needs, backend, [3, 0, 0])
    more = (*teacher, head, 0, list(p.codes), p.hyper)
    return (x, w, b, None, None, labels, *vectors, [], None, *tail, *more)


@each_backend
@pytest.mark.parametrize(
    "case",
    [
        {"kind": "head", "bias": True},
        {"kind": "logits", "grads": (True, False)},
        {"kind": "top-k", "grads": (False, True)},
        {"kind": "head", "grads": (False, False)},
        {"kind": "top-k", "n": 0},
    ],
    ids=str,
)
def test_a3_opcheck_all_four_utilities(case, backend):
    torch.library.opcheck(linear_distill, op_args(backend=backend, **case))


@pytest.mark.parametrize("kind", TEACHERS)
def test_a3_fake_tensors_have_the_real_shapes_strides_and_dtypes(kind):
    args = compile_args(9, kind, po.JSD(0.5))
    real = compiled_call(*args)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x, w = (mode.from_tensor(a.detach()).requires_grad_() for a in args[:2])
        tensors = tuple(mode.from_tensor(t) for t in args[3])
        fake = compiled_call(x, w, mode.from_tensor(args[2]), tensors, *args[4:])
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_a2_a_kept_output_of_the_op_is_not_written():
    args = op_args()
    out = linear_distill(*args)
    kept = [t.clone() for t in out[10:12]]
    (out[0] * 3.0).backward()
    assert all(torch.equal(a, b) for a, b in zip(kept, out[10:12], strict=True))
    assert autograd.PRIVATE == 3
