"""distill_row_pass at the C++ boundary: every bad argument is a named error that writes nothing,
every good one writes its outputs and nothing else (PROMISES M1, N2, A4).
"""

import pytest
import torch
from row_pass_args import CODES, Guarded, inputs, outputs

from pyoffline import _C

ROWS, VOCAB, K = 5, 37, 4
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODE = _C.divergence_codes()


def hyper(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def arguments(teacher="logits", dtype=torch.float32, student=torch.float32):
    """Valid arguments, every optional one given."""
    args = inputs(ROWS, VOCAB, student)
    del args["class_weight"]
    args["divergences"] = [CODE["jsd"], -1, CODE["renyi_divergence"], 0, CODE["tvd"], -1]
    args["divergence_hyper"] = hyper([1.0, 0.3], [0.5, 0.7], [-0.2, 0.0])
    g = torch.Generator().manual_seed(1)
    if teacher == "logits":
        args["teacher"] = (3 * torch.randn(ROWS, VOCAB, generator=g)).to(dtype)
        args |= {"teacher_bias": torch.randn(VOCAB, generator=g), "teacher_softcap": 9.0}
        args |= {"teacher_logit_scale": 1.1, "teacher_temperature": 0.7}
    else:
        logps, ids = torch.randn(ROWS, VOCAB, generator=g).log_softmax(-1).topk(K)
        ids, order = ids.sort(-1)
        args |= {"topk_ids": ids, "topk_logps": logps.gather(-1, order)}
        args["topk_tail"] = 1 - logps.exp().sum(-1)
    return args


def results(student=torch.float32, make=Guarded):
    made = outputs(ROWS, VOCAB, student, make)
    made["values"] = make((3, ROWS), torch.float32)
    made["teacher_entropy"] = make((ROWS,), torch.float32)
    made["top1_agreement"] = make((ROWS,), torch.uint8)
    return made


def call(args, outs):
    plain = {name: getattr(x, "tensor", x) for name, x in outs.items()}
    args = {**args, **plain}
    _C.distill_row_pass(args.pop("logits"), args.pop("labels"), **args)


@pytest.mark.parametrize("teacher", ["logits", "top-k"])
@pytest.mark.parametrize("student", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_M1_A4_outputs_are_written_whole_and_nothing_else_is(teacher, student, dtype):
    args, outs = arguments(teacher, dtype, student), results(student)
    kept = {k: v.clone() for k, v in args.items() if isinstance(v, torch.Tensor)}
    call(args, outs)
    for name, x in outs.items():
        assert x.intact(), name
        assert not x.tensor.is_floating_point() or x.tensor.isfinite().all(), name
    for name in ("dlogits", "values", "teacher_entropy", "loss"):
        rows = outs[name].tensor if name != "values" else outs[name].tensor.t()
        assert not rows[1:3].any() and rows[0].any(), name  # ignored, weight 0
    for name, x in kept.items():
        assert torch.equal(args[name], x), name


@pytest.mark.parametrize("teacher", ["logits", "top-k"])
@pytest.mark.parametrize("narrow", [False, True])
def test_in_place_equals_out_of_place(teacher, narrow):
    dtype = torch.bfloat16 if narrow else torch.float32
    apart = results(dtype)
    call(arguments(teacher), apart)
    args, outs = arguments(teacher), results(dtype)
    logits = args["logits"].clone()
    args["logits"] = logits
    outs["dlogits"] = logits.view(dtype)[:, :VOCAB]
    call(args, outs)
    assert torch.equal(outs["dlogits"], apart["dlogits"].tensor)


def replaced(**changes):
    return lambda: changes


BAD = [
    ("no teacher", lambda: {"teacher": None}, ValueError, "either teacher or topk_ids"),
    (
        "two teachers",
        lambda: {k: v for k, v in arguments("top-k").items() if k.startswith("topk")},
        ValueError,
        "either teacher or topk_ids",
    ),
    ("teacher of V - 1", replaced(teacher=torch.zeros(ROWS, VOCAB - 1)), ValueError, "teacher"),
    ("teacher of another C", replaced(teacher=torch.zeros(ROWS - 1, VOCAB)), ValueError, "teacher"),
    ("teacher in fp64", replaced(teacher=torch.zeros(ROWS, VOCAB).double()), ValueError, "teacher"),
    ("teacher is a list", replaced(teacher=[[0.0]]), TypeError, "teacher"),
    ("teacher transposed", replaced(teacher=torch.zeros(VOCAB, ROWS).t()), ValueError, "stride"),
    ("bias of V + 1", replaced(teacher_bias=torch.zeros(VOCAB + 1)), ValueError, "teacher_bias"),
    ("softcap below 0", replaced(teacher_softcap=-1.0), ValueError, "teacher_softcap"),
    ("temperature 0", replaced(teacher_temperature=0.0), ValueError, "teacher_temperature"),
    ("class weights", replaced(class_weight=torch.ones(VOCAB)), ValueError, "class_weight"),
    ("no divergence", replaced(divergences=[]), ValueError, "divergences"),
    ("half a pair", replaced(divergences=[1]), ValueError, "divergences"),
    ("nine", replaced(divergences=[1, -1] * 9), ValueError, "divergences"),
    ("an array", replaced(divergences=torch.tensor([1, -1])), TypeError, "divergences"),
    ("code 0", replaced(divergences=[0, -1, 1, -1, 1, -1]), ValueError, "divergences[0]"),
    ("code 7", replaced(divergences=[7, -1, 1, -1, 1, -1]), ValueError, "divergences[0]"),
    ("gate 1", replaced(divergences=[1, 1, 1, -1, 1, -1]), ValueError, "divergences[1]"),
    ("hyper of 2 rows", replaced(divergence_hyper=hyper([1, 0], [1, 0])), ValueError, "hyper"),
    ("hyper in fp32", replaced(divergence_hyper=torch.zeros(3, 2)), ValueError, "hyper"),
    ("values of 2 rows", replaced(values=torch.zeros(2, ROWS)), ValueError, "values"),
    ("values missing", replaced(values=None), TypeError, "values"),
    ("entropy missing", replaced(teacher_entropy=None), TypeError, "teacher_entropy"),
    ("agreement fp32", replaced(top1_agreement=torch.zeros(ROWS)), ValueError, "top1_agreement"),
    ("unknown argument", replaced(beta=0.5), TypeError, "beta"),
    ("a bad label", replaced(labels=torch.full((ROWS,), VOCAB)), IndexError, "labels"),
]
BAD_TOP_K = [
    ("ids in int32", replaced(topk_ids=torch.zeros(ROWS, K).int()), ValueError, "topk_ids"),
    ("k of 0", replaced(topk_ids=torch.zeros(ROWS, 0).long()), ValueError, "topk_ids"),
    ("k above V", replaced(topk_ids=torch.zeros(ROWS, VOCAB + 1).long()), ValueError, "topk_ids"),
    ("logps of k - 1", replaced(topk_logps=torch.zeros(ROWS, K - 1)), ValueError, "topk_logps"),
    ("no logps", replaced(topk_logps=None), TypeError, "topk_logps"),
    ("no tail", replaced(topk_tail=None), TypeError, "topk_tail"),
    ("no ids", replaced(topk_ids=None, teacher=torch.zeros(ROWS, VOCAB)), ValueError, "topk_ids"),
    (
        "strided ids",
        lambda: {"topk_ids": torch.arange(2 * K).expand(ROWS, 2 * K).clone()[:, :K]},
        ValueError,
        "contiguous",
    ),
    *(
        (name, replaced(topk_ids=torch.tensor([ids] * ROWS)), IndexError, "topk_ids")
        for name, ids in (
            ("descending", [3, 2, 1, 0]),
            ("twice", [1, 2, 2, 3]),
            ("below 0", [-1, 2, 3, 4]),
            ("above V", [0, 1, 2, VOCAB]),
            ("far above", [0, 1, 2, 2**62]),
        )
    ),
]


@pytest.mark.parametrize(
    ("teacher", "change", "error", "part"),
    [("logits", *b[1:]) for b in BAD] + [("top-k", *b[1:]) for b in BAD_TOP_K],
    ids=[b[0] for b in BAD + BAD_TOP_K],
)
def test_M1_a_bad_argument_is_a_named_error_and_writes_nothing(teacher, change, error, part):
    args, outs = arguments(teacher), results()
    for name, value in change().items():
        (outs if name in outs else args)[name] = value
    with pytest.raises(error) as raised:
        call(args, outs)
    assert "distill_row_pass" in str(raised.value) and part in str(raised.value)
    for x in outs.values():
        if isinstance(x, Guarded):
            assert x.intact()
            untouched = x.tensor.isnan() if x.tensor.is_floating_point() else x.tensor == 0xA5
            assert untouched.all(), "an output was written before the error"


def test_M1_shared_memory_is_refused():
    both = torch.zeros(ROWS, VOCAB)
    for change in (
        {"teacher": both, "dlogits": both},
        {"teacher": both, "values": both[:3, :ROWS]},
    ):
        args, outs = arguments(), results()
        for name, value in change.items():
            (outs if name in outs else args)[name] = value
        with pytest.raises(ValueError, match="contiguous|overlapping"):
            call(args, outs)


def test_M1_ids_of_rows_that_do_not_count_may_hold_anything():
    args, outs = arguments("top-k"), results()
    want = results()
    call(args, want)
    args["topk_ids"] = args["topk_ids"].clone()
    args["topk_ids"][1:3] = -(2**60)
    call(args, outs)
    for name, x in outs.items():
        assert torch.equal(x.tensor, want[name].tensor), name


def test_M1_random_calls_kill_nothing():
    """300 calls, each argument replaced by a wrong one now and then; a third of them are valid."""
    g = torch.Generator().manual_seed(0)
    changes = [b[1] for b in BAD], [b[1] for b in BAD_TOP_K]
    good = 0
    for i in range(300):
        kind = i % 2
        args = arguments(("logits", "top-k")[kind], DTYPES[i % 3], DTYPES[(i // 3) % 3])
        outs = results(DTYPES[(i // 3) % 3])
        for _ in range(int(torch.randint(0, 3, (), generator=g))):
            pool = changes[kind]
            change = pool[int(torch.randint(0, len(pool), (), generator=g))]()
            for name, value in change.items():
                (outs if name in outs else args)[name] = value
        try:
            call(args, outs)
            good += 1
        except (ValueError, TypeError, IndexError):
            pass
        assert all(x.intact() for x in outs.values() if isinstance(x, Guarded))
    assert 60 < good < 200


def test_the_codes_are_those_of_the_table():
    from pyoffline.divergence_math import DIVERGENCES

    assert _C.divergence_codes() == {name: row.code for name, row in DIVERGENCES.items()}
    assert not set(CODES) & set(CODE)
