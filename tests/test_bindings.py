"""The C++ boundary: every bad argument is a named error, every good one writes its outputs and
nothing else (PROMISES M1, N2, N6, N7, N13, A4)."""

import numpy as np
import pytest
import torch
from bad_arguments import BAD, ROWS, VOCAB
from compare import same_bits
from row_pass_args import CODES, Guarded, call, inputs, outputs

from pyoffline import _C

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class LyingTensor(torch.Tensor):
    """Says that its data lies elsewhere."""

    def data_ptr(self):
        return 8

    def stride(self, *args):
        return (10**9, 1)


def with_instance_pointer():
    x = torch.zeros(3, VOCAB)
    x.data_ptr = lambda: 8
    return x


@pytest.mark.parametrize(
    ("replace", "error", "part"), [b[1:] for b in BAD], ids=[b[0] for b in BAD]
)
def test_bad_argument_is_a_named_error(replace, error, part):
    replaced = replace()
    results = outputs(ROWS, VOCAB, torch.float32)
    arguments = inputs(ROWS, VOCAB)
    for name in list(replaced):
        if name in results:
            results[name] = replaced.pop(name)
    with pytest.raises(error) as raised:
        call(arguments, results, **replaced)
    assert "row_pass" in str(raised.value)
    assert part in str(raised.value)
    for x in results.values():
        if isinstance(x, Guarded):
            assert x.intact()
            untouched = x.tensor.isnan() if x.tensor.is_floating_point() else x.tensor == 0xA5
            assert untouched.all(), "an output was written before the error"


def shared_outputs():
    """(what shares memory, replaced arguments)."""
    both = torch.zeros(ROWS)
    wide = torch.zeros(ROWS, VOCAB + 8)
    return [
        ("two outputs are one tensor", {"loss": both, "logps": both}),
        (
            "outputs overlap by one",
            {"loss": wide.view(-1)[:ROWS], "lse": wide.view(-1)[4 : 4 + ROWS]},
        ),
        ("an output is an input", {"adv": both, "entropy": both}),
        (
            "dlogits shifted in logits",
            {"logits": wide[:, :VOCAB], "dlogits": wide[:, 4 : 4 + VOCAB]},
        ),
        (
            "dlogits of another pitch",
            {"logits": wide[:, :VOCAB], "dlogits": wide.view(-1)[: ROWS * VOCAB].view(ROWS, VOCAB)},
        ),
        ("wider dlogits in place", wider_in_place()),
    ]


def wider_in_place():
    memory = torch.zeros(ROWS, 4 * VOCAB, dtype=torch.bfloat16)
    return {"logits": memory[:, :VOCAB], "dlogits": memory.view(torch.float32)[:, :VOCAB]}


@pytest.mark.parametrize("case", range(6), ids=[name for name, _ in shared_outputs()])
def test_shared_memory_is_refused(case):
    replaced = shared_outputs()[case][1]
    arguments = {
        **inputs(ROWS, VOCAB),
        **{k: v for k, v in replaced.items() if k in ("logits", "adv")},
    }
    results = {k: v for k, v in replaced.items() if k not in ("logits", "adv")}
    with pytest.raises(ValueError, match="overlapping memory"):
        call(arguments, results)


@pytest.mark.parametrize(
    "make", [with_instance_pointer, lambda: torch.zeros(3, VOCAB).as_subclass(LyingTensor)]
)
def test_a_pointer_that_lies_is_not_believed(make):
    logps = torch.full((3,), float("nan"))
    _C.row_pass(make(), torch.zeros(3).long(), logps=logps)
    np.testing.assert_allclose(logps.numpy(), -np.log(VOCAB), rtol=1e-6)


def test_an_error_inside_a_sequence_comes_through():
    class Hostile(list):
        def __iter__(self):
            raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        call(inputs(ROWS, VOCAB), outputs(ROWS, VOCAB, torch.float32), codes=Hostile([1, -1, 0]))


def test_wrapped_tensors_are_refused():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.zeros(3, VOCAB))
    jagged = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged)
    for bad in (fake, jagged):
        with pytest.raises(ValueError, match="row_pass: logits"):
            _C.row_pass(bad, torch.zeros(3).long(), logps=torch.zeros(3))

    def inside(x):
        _C.row_pass(x[None], torch.zeros(1).long(), logps=torch.zeros(1))
        return x

    with pytest.raises(ValueError, match="memory of its own"):
        torch.vmap(inside)(torch.zeros(3, VOCAB))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 37), (3, 1), (9, 1000)])
def test_all_outputs_are_written_and_nothing_else(dtype, shape):
    arguments, results = inputs(*shape, dtype), outputs(*shape, dtype)
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    call(arguments, results)
    for name, x in results.items():
        assert x.intact(), f"{name}: wrote outside"
        assert not x.tensor.isnan().any() if x.tensor.is_floating_point() else (x.tensor < 2).all()
    for name, x in before.items():
        same_bits(name, arguments[name], x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_equal_contiguous_bitwise(dtype):
    arguments = inputs(ROWS, VOCAB, dtype)
    want, got = outputs(ROWS, VOCAB, dtype), outputs(ROWS, VOCAB, dtype)
    call(arguments, want)
    wide = torch.full((2 * ROWS + 1, VOCAB + 3), float("nan")).to(dtype)
    view = wide[1::2, 2 : 2 + VOCAB]
    view.copy_(arguments["logits"])
    target = torch.full((ROWS, VOCAB + 5), float("nan"), dtype=dtype)
    call(arguments, {**got, "dlogits": target[:, 1 : 1 + VOCAB]}, logits=view)
    same_bits("dlogits", target[:, 1 : 1 + VOCAB], want["dlogits"].tensor)
    assert target[:, 0].isnan().all() and target[:, 1 + VOCAB :].isnan().all()
    for name in want:
        if name != "dlogits":
            same_bits(name, got[name].tensor, want[name].tensor)


def test_expanded_logits_equal_their_copy():
    row = torch.randn(1, VOCAB)
    arguments = inputs(ROWS, VOCAB)
    want, got = outputs(ROWS, VOCAB, torch.float32), outputs(ROWS, VOCAB, torch.float32)
    call(arguments, want, logits=row.repeat(ROWS, 1))
    call(arguments, got, logits=row.expand(ROWS, VOCAB))
    for name in want:
        same_bits(name, got[name].tensor, want[name].tensor)


@pytest.mark.parametrize(
    ("dtype", "grad"),
    [*((d, d) for d in DTYPES), (torch.float32, torch.bfloat16), (torch.float32, torch.float16)],
)
def test_in_place_equals_out_of_place(dtype, grad):
    arguments = inputs(ROWS, VOCAB, dtype)
    want = outputs(ROWS, VOCAB, grad)
    call(arguments, want)
    logits = arguments["logits"].clone()
    dlogits = logits.view(grad)[:, :VOCAB]
    call(arguments, {"dlogits": dlogits}, logits=logits)
    same_bits("dlogits", dlogits, want["dlogits"].tensor)


def test_halves_of_one_buffer_do_not_overlap():
    buffer = torch.zeros(ROWS, 2 * VOCAB)
    arguments = inputs(ROWS, VOCAB)
    buffer[:, :VOCAB] = arguments["logits"]
    want = outputs(ROWS, VOCAB, torch.float32)
    call(arguments, want)
    call(arguments, {"dlogits": buffer[:, VOCAB:]}, logits=buffer[:, :VOCAB])
    same_bits("dlogits", buffer[:, VOCAB:], want["dlogits"].tensor)


def test_numpy_equals_torch():
    arguments = inputs(ROWS, VOCAB)
    want, got = outputs(ROWS, VOCAB, torch.float32), outputs(ROWS, VOCAB, torch.float32)
    call(arguments, want)
    as_numpy = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    as_numpy["extras"] = [x.numpy() for x in arguments["extras"]]
    call(as_numpy, {name: x.tensor.numpy() for name, x in got.items()})
    for name in want:
        same_bits(name, got[name].tensor, want[name].tensor)


def test_numpy_uint16_is_bfloat16():
    logits = torch.randn(ROWS, VOCAB).bfloat16()
    labels = torch.zeros(ROWS).long()
    want, got = torch.empty(ROWS), np.empty(ROWS, np.float32)
    _C.row_pass(logits, labels, logps=want)
    _C.row_pass(logits.view(torch.int16).numpy().view(np.uint16), labels.numpy(), logps=got)
    same_bits("logps", torch.from_numpy(got), want)


@pytest.mark.parametrize("label", [VOCAB, -1, 2**31, -(2**40), 2**63 - 1])
def test_a_bad_label_writes_nothing(label):
    arguments, results = inputs(ROWS, VOCAB), outputs(ROWS, VOCAB, torch.float32)
    arguments["labels"][3] = label
    with pytest.raises(IndexError, match=rf"got {label} at row 3"):
        call(arguments, results)
    assert results["dlogits"].tensor.isnan().all() and results["loss"].tensor.isnan().all()


def test_a_bad_label_is_never_read_where_the_weight_is_0():
    arguments = inputs(ROWS, VOCAB)
    want, got = outputs(ROWS, VOCAB, torch.float32), outputs(ROWS, VOCAB, torch.float32)
    call(arguments, want)
    arguments["labels"][2] = 10**12
    for poison in (0.0, -0.0):
        arguments["weights"][2] = poison
        call(arguments, got)
        for name in want:
            same_bits(name, got[name].tensor, want[name].tensor)


def test_ignored_rows_are_never_read():
    arguments = inputs(ROWS, VOCAB)
    want, got = outputs(ROWS, VOCAB, torch.float32), outputs(ROWS, VOCAB, torch.float32)
    call(arguments, want)
    for row in (1, 2):
        for name in ("logits", "old", "ref", "mu", "adv", "temperature"):
            arguments[name][row] = float("nan")
        arguments["extras"][0][row] = float("inf")
    call(arguments, got)
    for name in want:
        same_bits(name, got[name].tensor, want[name].tensor)
        assert (want[name].tensor[..., 1] == 0).all() or name == "dlogits"
    assert (want["dlogits"].tensor[1:3] == 0).all()


def test_no_rows_is_no_work():
    call(inputs(0, VOCAB), outputs(0, VOCAB, torch.float32))


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("exponent", [31, 32])
def test_offsets_are_64_bit(tmp_path, isa, exponent):
    """Rows further apart than 2^31 (2^32) elements, in a sparse file: three pages are touched."""
    vocab, rows = 1001, 3
    pitch = 2**exponent // 2 + 4096
    nbytes = ((rows - 1) * pitch + vocab) * 2
    path = tmp_path / "logits"
    with path.open("wb") as file:
        file.truncate(nbytes)
    flat = torch.from_file(str(path), shared=True, size=nbytes // 2, dtype=torch.bfloat16)
    logits = torch.as_strided(flat, (rows, vocab), (pitch, 1))
    arguments = {**inputs(rows, vocab, torch.bfloat16), "logits": logits}
    near = torch.randn(rows, vocab).bfloat16()
    logits.copy_(near)
    want, got = outputs(rows, vocab, torch.bfloat16), outputs(rows, vocab, torch.bfloat16)
    chosen = _C.isa()
    _C.set_isa(isa)
    try:
        call(arguments, want, logits=near)
        call(arguments, {**got, "dlogits": logits})
    finally:
        _C.set_isa(chosen)
    got["dlogits"] = logits
    for name in want:
        same_bits(name, getattr(got[name], "tensor", got[name]), want[name].tensor)


def test_small_functions_check_their_arguments():
    x = torch.zeros(4, 6)
    for function, arguments, error in [
        (_C.column_sum, (x, torch.zeros(5)), ValueError),
        (_C.column_sum, (x.t(), torch.zeros(4)), ValueError),
        (_C.weighted_sum, (torch.zeros(3), torch.zeros(4)), ValueError),
        (_C.weighted_sum, (None, None), TypeError),
        (_C.scale_cast, (x, torch.zeros(6, 4), 1.0), ValueError),
        (_C.scale_cast, (x[:, ::2], torch.zeros(4, 3), 1.0), ValueError),
        (_C.scale_cast, (x, x.view(torch.bfloat16)[:, :6], 1.0), ValueError),
        (_C.scale_cast, (x, x.clone(), "1"), TypeError),
        (_C.vector_exp, (x[0], x[0]), ValueError),
        (_C.set_isa, ("sse9",), ValueError),
        (_C.advise_hugepages, (x.t(),), ValueError),
        (_C.advise_hugepages, ("x",), TypeError),
    ]:
        with pytest.raises(error):
            function(*arguments)


def test_small_functions():
    x = torch.randn(7, 301).bfloat16()
    sums = torch.full((301,), float("nan"))
    _C.column_sum(x, sums, threads=2)
    torch.testing.assert_close(sums, x.double().sum(0).float(), rtol=1e-6, atol=1e-6)
    _C.column_sum(x, sums, accumulate=True)
    torch.testing.assert_close(sums, 2 * x.double().sum(0).float(), rtol=1e-6, atol=1e-6)
    values, weights = torch.tensor([1.0, float("inf"), 3.0]), torch.tensor([0.5, 0.0, 2.0])
    assert _C.weighted_sum(values, weights) == 6.5
    cast = torch.empty(7, 301, dtype=torch.float16)
    _C.scale_cast(x, cast, 0.5)
    same_bits("scale_cast", cast, (x.float() * 0.5).half())
    _C.scale_cast(x, x, 0.5, threads=2)
    same_bits("in place", x.half(), cast)
    big = torch.zeros(1 << 20)
    _C.advise_hugepages(big)
    assert big.sum() == 0
    assert _C.abi() == 1 and _C.isa() in _C.isas() and "nll" in _C.codes()


def test_every_objective_has_its_needs():
    """Each code evaluates where every row input is given: none is missing from needs_table."""
    arguments = inputs(ROWS, VOCAB)
    hyper = torch.tensor([[1.0, 0.5, 0.5, 3.0, 3.0, 0, 0, 0]], dtype=torch.float64)
    for name, code in CODES.items():
        results = outputs(ROWS, VOCAB, torch.float32)
        anchor = 1 if name.startswith("kl") else 0
        call(arguments, results, codes=[code, -1, anchor], hyper=hyper)
        assert results["loss"].tensor.isfinite().all(), name
