"""What the Triton kernels are compiled for: calls of their wrappers, by name.

By hand: what most users run, and what is one of a kind. For row pass, distillation and scoring a
cover of their axes besides, in which each value of an axis meets each value of every other.
Tensors are on the meta device: triton_compile.py records what a call would launch. Not here: that.
"""

import dataclasses
import functools
import itertools

import torch

import pyoffline as po
from pyoffline.calls import HeadScalars, RowOutputs, Rows
from pyoffline.divergence_math import DIVERGENCES
from pyoffline.gpu_rows import NOTHING
from pyoffline.kernels.distill_row_pass import distill_row_pass
from pyoffline.kernels.epilogue_rows import epilogue_rows
from pyoffline.kernels.row_pass import row_pass
from pyoffline.kernels.scale_by_upstream import scale_by_upstream
from pyoffline.kernels.score_rows import score_rows
from pyoffline.objectives import ANCHORS, TABLE, Term
from pyoffline.program import compile_terms
from pyoffline.triton_backend import _outputs

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TYPES = {"bf16": BF16, "fp16": FP16, "fp32": FP32, "tf32": FP32}
PLAIN, ALL = HeadScalars(), HeadScalars(30.0, -1.0, 0.7)
N = 4
CHIPS = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950")


def empty(*shape, dtype=FP32):
    return torch.empty(shape, dtype=dtype, device="meta")


def whole_table():
    """Every row of THE TABLE, KL terms with each anchor, two of the terms gated."""
    terms = []
    for name, row in TABLE.items():
        anchors = ANCHORS.values() if "anchor" in row.reads else (0,)
        gate = {"ppo_clip": "mask", "kl_k3": "blend"}.get(name)
        params = (0.5,) * len(row.params)
        terms += [Term(name, 1.0, params, anchor, gate) for anchor in anchors]
    return compile_terms(tuple(terms))


COMPOSED = po.PPOClip() + 0.04 * po.KL("k3", "old") - 1e-3 * po.Entropy()
SMOOTHING = po.NLL(label_smoothing=0.1, z_loss=1e-4) - 1e-3 * po.Entropy().weighted_by("mask")
PROGRAMS = {
    "ppo+kl+entropy": COMPOSED.program(False),
    "smoothing": SMOOTHING.program(False),
    "table": whole_table(),
}


def rows_of(vocab, program=None, head="", n=N, **more) -> Rows:
    """fp32 row inputs; "all of the head": everything that a head and a call of it may have."""
    given, extras = {}, {}
    if program:
        given = {k: empty(n) for k in program.reads} | {"weights": empty(n)}
        given |= {"codes": program.codes, "hyper": program.hyper}
        extras = {gate: empty(n) for gate in program.gates}
    if head == "all of the head":
        given |= {"temperature": empty(n), "bias": empty(vocab), "class_weight": empty(vocab)}
        given["head"] = ALL
    if head == "softcap":
        given["head"] = HeadScalars(30.0, 1.0, 1.0)
    labels = empty(n, dtype=torch.int64)
    return Rows(labels, **({"head": PLAIN, "extras": extras} | given | more))


def outputs_of(n=N, coefs=False, gap=False) -> tuple:
    return _outputs(RowOutputs.zeros(n, FP32, torch.device("meta"), coefs, gap))


# ---- cases -------------------------------------------------------------------------------------


def cover(axes: dict, first: tuple, possible) -> list:
    """Cases (tuples of one value an axis) after `first`, until each value of an axis has met each
    value of every other, where a case is possible. The same on every run.
    """

    def pairs(case):
        return set(itertools.combinations(enumerate(case), 2))

    found = list(first)
    candidates = [(c, pairs(c)) for c in itertools.product(*axes.values()) if possible(*c)]
    open_pairs = set().union(*(p for _, p in candidates)).difference(*(pairs(c) for c in first))
    while open_pairs:
        case, met = max(candidates, key=lambda c: len(c[1] & open_pairs))
        open_pairs -= met
        found.append(case)
    return found


def chips_of(place: int) -> tuple:
    """Cases by hand (place < 0) are compiled for every chip, those of a cover for one of a vendor,
    in turn.
    """
    return CHIPS if place < 0 else (CHIPS[place % 3], CHIPS[3 + place % 2])


def named(kernel, case, axes) -> str:
    """The kernel and what is not the axis' first value; the first axis always."""
    first = [values[0] for values in axes.values()]
    words = [w for i, w in enumerate(case) if i < 2 or w != first[i]]
    return " ".join((kernel, *words))


# ---- row pass ----------------------------------------------------------------------------------

ROW_AXES = {
    "what": (
        "ppo+kl+entropy", "smoothing", "statistics", "coefs", "lifted statistics", "lifted coefs",
    ),
    "dtypes": ("bf16", "fp16", "fp32", "fp32 to bf16"),
    # rows at multiples of 16 elements; the same with a cut last group (odd V in the library's own
    # buffer); rows anywhere; and a first one that is off too
    "layout": ("even", "cut", "shifted", "unaligned"),
    "vocab": ("large", "small"),
    "head": ("", "all of the head"),
}  # fmt: skip
ROW_CASES = (
    ("ppo+kl+entropy", "bf16", "even", "large", ""),
    ("ppo+kl+entropy", "fp16", "even", "large", ""),
    ("ppo+kl+entropy", "fp32", "even", "large", ""),
    ("ppo+kl+entropy", "fp32 to bf16", "even", "large", ""),
    ("ppo+kl+entropy", "fp32 to fp16", "even", "large", ""),
    ("ppo+kl+entropy", "bf16", "even", "large", "softcap"),
    ("ppo+kl+entropy", "bf16", "shifted", "large", ""),
    ("ppo+kl+entropy", "fp32", "shifted", "large", ""),
    ("ppo+kl+entropy", "bf16", "even", "large", "all of the head"),
    ("ppo+kl+entropy", "bf16", "even", "small", ""),
    ("smoothing", "bf16", "even", "large", ""),
    ("smoothing", "bf16", "even", "large", "all of the head"),
    ("smoothing", "fp16", "cut", "large", "all of the head"),
    ("smoothing", "fp32", "shifted", "large", "all of the head"),
    ("ppo+kl+entropy", "bf16", "shifted", "large", "all of the head"),
    ("table", "bf16", "even", "large", ""),
    ("table", "fp32", "cut", "small", ""),
    ("statistics", "bf16", "even", "large", ""),
    ("coefs", "bf16", "even", "large", ""),
    # one of a kind: rows at multiples of 16 bytes but not of 16 elements; gradient rows apart
    # otherwise than the logits' rows; a whole number of groups from an address that is off
    ("ppo+kl+entropy", "bf16", "groups", "large", ""),
    ("ppo+kl+entropy", "bf16", "unlike", "large", ""),
    ("coefs", "fp32", "unaligned groups", "large", ""),
)


def row_case_is_possible(what, dtypes, layout, vocab, head):
    if "statistics" in what and " to " in dtypes:
        return False
    # in the library's own buffer only
    own = " to " in dtypes or what.startswith("lifted")
    return not own or layout in ("even", "cut")


def matrix(dtype, layout, vocab):
    """Rows of logits."""
    group = 16 // dtype.itemsize
    odd = layout in ("cut", "shifted", "unaligned", "unlike")
    length = {"large": 151_936, "small": 4096}[vocab] - odd
    if layout in ("groups", "unaligned groups"):
        length += group
    stride = -(-length // 16) * 16 if layout in ("even", "cut", "unlike") else length
    flat = empty(N * stride + 1, dtype=dtype)[int(layout.startswith("unaligned")) :]
    return flat.as_strided((N, length), (stride, 1), flat.storage_offset())


def run_rows(what, dtypes, layout, vocab, head):
    kind, _, narrow = dtypes.partition(" to ")
    logits = matrix(TYPES[kind], layout, vocab)
    length = logits.shape[1]
    dlogits = logits.view(TYPES[narrow or kind])[:, :length]
    if layout == "unlike":
        dlogits = empty(N, length, dtype=logits.dtype)
    rows, out = rows_of(length, PROGRAMS.get(what), head), outputs_of()
    if what.endswith("coefs"):
        rows, out = dataclasses.replace(rows, coefs=empty(4, N)), _outputs(NOTHING)
    if what == "table":
        out = outputs_of(coefs=True, gap=True)
    if what == "lifted statistics":
        kept = RowOutputs.zeros(N, FP32, torch.device("meta"))
        out = _outputs(dataclasses.replace(NOTHING, entropy=kept.entropy, lse=kept.lse))
    if what.startswith("lifted"):
        rows = dataclasses.replace(rows, weights=empty(N), class_weight=None)
    wanted = None if "statistics" in what else dlogits
    scale = empty() if "fp16" in dtypes and wanted is not None else None
    lifted, flag = what.startswith("lifted"), empty(2, dtype=torch.int64)
    row_pass(logits, wanted, rows, out, flag, scale, is_lifted=lifted)


def run_statistics(coefs=False, gap=False, top1=False):
    """Statistics of a kind of their own: a program's coefficients without a gradient (the first
    half of distillation), for a custom term (gap), whether the label is the top entry.
    """
    logits, out = matrix(BF16, "even", "large"), outputs_of(coefs=coefs, gap=gap)
    if top1:
        out = (None,) * 5 + (out[5], None, None)
    rows = rows_of(logits.shape[1], PROGRAMS["ppo+kl+entropy"] if coefs else None)
    row_pass(logits, None, rows, out, empty(2, dtype=torch.int64))


def row_variants():
    cases = cover(ROW_AXES, ROW_CASES, row_case_is_possible)
    for i, case in enumerate(cases):
        call = functools.partial(run_rows, *case)
        yield named("row_pass", case, ROW_AXES), call, 0, chips_of(i - len(ROW_CASES))
    for kind in ("coefs", "gap", "top1"):
        call = functools.partial(run_statistics, **{kind: True})
        yield f"row_pass statistics with {kind} bf16", call, 0, CHIPS


# ---- distillation ------------------------------------------------------------------------------

PAIR_AXES = {
    "what": (*DIVERGENCES, "all"),
    "dtypes": ("bf16", "fp16", "fp32", "fp32 to bf16"),
    "teacher": ("", "bf16 teacher", "fp32 teacher"),
    "gradient": ("", "statistics"),
    "layout": ("even", "cut", "unaligned"),
    "vocab": ("large", "small"),
    "head": ("", "all of the head"),
}
PAIR_CASES = (
    *((d, "bf16", "", "", "even", "large", "") for d in DIVERGENCES),
    ("jsd", "fp32", "", "", "even", "large", ""),
    ("jsd", "fp32 to fp16", "", "", "even", "large", ""),
)


def pair_case_is_possible(what, dtypes, teacher, gradient, layout, vocab, head):
    narrows = " to " in dtypes
    if narrows and gradient == "statistics":
        return False
    return not (narrows and layout == "unaligned") and not teacher.startswith(dtypes)


def run_pair(what, dtypes, teacher, gradient, layout, vocab, head):
    kind, _, narrow = dtypes.partition(" to ")
    logits = matrix(TYPES[kind], layout, vocab)
    theirs = matrix(TYPES[teacher.split()[0]] if teacher else logits.dtype, layout, vocab)
    length, gated = logits.shape[1], what == "all"
    dlogits = None if gradient else logits.view(TYPES[narrow or kind])[:, :length]
    found = DIVERGENCES.values() if gated else (DIVERGENCES[what],)
    terms = [(row.code, 0 if gated and row.code % 2 else -1, 1.0, 0.5) for row in found]
    extras = {"mask": empty(N)} if gated else {}
    more = {"weights": empty(N), "coefs": empty(4, N), "extras": extras}
    rows = dataclasses.replace(rows_of(length, None, head), class_weight=None, **more)
    other = dataclasses.replace(rows_of(length, None, head), temperature=None)
    results = (empty(N), empty(len(terms), N), empty(N), empty(N, dtype=torch.uint8))
    scale = empty() if "fp16" in dtypes else None
    distill_row_pass(logits, theirs, dlogits, rows, other, terms, results, scale)


def pair_variants():
    cases = cover(PAIR_AXES, PAIR_CASES, pair_case_is_possible)
    for i, case in enumerate(cases):
        call = functools.partial(run_pair, *case)
        yield named("distill", case, PAIR_AXES), call, 0, chips_of(i - len(PAIR_CASES))


# ---- scoring and the epilogue ------------------------------------------------------------------

TILE_AXES = {
    "what": ("", "epilogue", "epilogue again"),
    "dtypes": ("bf16", "fp16", "fp32", "tf32"),
    # dimensions that are multiples of 16 and of the tile, of 16, of 8, of nothing
    "dim": ("whole", "even", "uneven", "unaligned"),
    "logits": ("", "fp32 logits", "bf16 logits"),
    "head": ("", "all of the head", "temperature"),
}
TILE_CASES = (
    *(("", d, "whole", "", "") for d in ("bf16", "fp16", "fp32", "tf32")),
    *(("", d, "whole", "", "all of the head") for d in ("bf16", "fp32")),
    *(("", d, "unaligned", "", "all of the head") for d in ("bf16", "fp32")),
    *(("", d, "uneven", "", "") for d in ("bf16", "fp32")),
    ("epilogue", "bf16", "whole", "", ""),
    ("epilogue", "bf16", "whole", "", "temperature"),
    ("epilogue", "bf16", "unaligned", "", "temperature"),
    ("epilogue again", "bf16", "whole", "", ""),
)
DIMS = {"whole": 4096, "even": 4096 + 16, "uneven": 4096 + 8, "unaligned": 4096 + 1}


def tile_case_is_possible(what, dtypes, dim, logits, head):
    if what:  # bf16 all through, no softcap
        return dtypes == "bf16" and not logits and head != "all of the head"
    own = "fp32" if dtypes == "tf32" else dtypes
    return not logits.startswith(own)


def run_scoring(what, dtypes, dim, logits, head, program="ppo+kl+entropy"):
    kind, vocab, size = TYPES[dtypes], 151_936, DIMS[dim]
    hidden, weight = empty(N, size, dtype=kind), empty(vocab, size, dtype=kind)
    rows = rows_of(vocab, PROGRAMS.get(program), head)
    if head == "temperature":
        rows = dataclasses.replace(rows, temperature=empty(N), bias=empty(vocab))
    flag = empty(2, dtype=torch.int64)
    out = outputs_of(gap=head == "all of the head" or program == "table")
    if what:
        exps = empty(N, vocab, dtype=BF16)
        epilogue_rows(hidden, weight, rows, out, flag, exps)
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = dtypes == "tf32"
    rounded = TYPES[logits.split()[0]] if logits else kind
    try:
        score_rows(hidden, weight, rows, out, flag, rounded)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def tile_variants():
    for i, case in enumerate(cover(TILE_AXES, TILE_CASES, tile_case_is_possible)):
        words = " ".join(w for w in case if w and w != "whole")
        # the epilogue launches label_logits, score_tiles, score_finish, score_tiles again
        at = {"": 0, "epilogue": 1, "epilogue again": 3}[case[0]]
        chips = chips_of(i - len(TILE_CASES))
        yield f"score_tiles {words}", functools.partial(run_scoring, *case), at, chips
    plain = ("", "bf16", "whole", "")
    for program in ("ppo+kl+entropy", "table", "statistics"):
        for head in TILE_AXES["head"][:2]:
            call = functools.partial(run_scoring, *plain, head, program)
            yield f"score_finish {program} {head}".strip(), call, 1, CHIPS
    for head in ("", "temperature"):
        call = functools.partial(run_scoring, "epilogue", "bf16", "whole", "", head)
        yield f"score_finish with factors {head}".strip(), call, 2, CHIPS
        yield f"label_logits bf16 {head}".strip(), call, 0, CHIPS


def scale_variants():
    for kind in ("bf16", "fp16", "fp32"):
        for words, size in (("", 1 << 20), (" of any size", (1 << 20) + 1)):
            grad, factor = empty(size, dtype=TYPES[kind]), empty()
            call = functools.partial(scale_by_upstream, grad, factor)
            yield f"scale_by_upstream {kind}{words}", call, 0, CHIPS


@functools.cache
def variants() -> dict:
    """name -> (call, which of its launches, chips); a name begins with its kernel's."""
    kinds = (row_variants, pair_variants, tile_variants, scale_variants)
    listed = [x for kind in kinds for x in kind()]
    found = {name: tuple(rest) for name, *rest in listed}
    assert len(found) == len(listed), "two variants of one name"
    return found
