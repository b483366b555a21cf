"""The table of wrong `row_pass` arguments, each with its reason, for test_bindings.py."""

import numpy as np
import torch
from row_pass_args import CODES

ROWS, VOCAB = 5, 37


def resized_after_view():
    base = torch.zeros(ROWS * VOCAB)
    view = base.view(ROWS, VOCAB)
    base.untyped_storage().resize_(64)
    return view


def misaligned(shape, dtype):
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.zeros(nbytes + 1, np.uint8)[1:].view(dtype).reshape(shape)


def readonly(array):
    array.setflags(write=False)
    return array


def beyond_memory():
    """A numpy view whose strides leave the memory of its base."""
    base = np.zeros(ROWS * VOCAB, np.float32)
    return np.lib.stride_tricks.as_strided(base, (ROWS, VOCAB), (4 * 10**6, 4))


# (what is wrong, replaced arguments, exception, part of the message)
BAD = [
    ("logits is a list", lambda: {"logits": [[1.0]]}, TypeError, "logits: expected a torch.Tensor"),
    ("logits is None", lambda: {"logits": None}, TypeError, "required"),
    ("labels is None", lambda: {"labels": None}, TypeError, "labels"),
    (
        "logits of fp64",
        lambda: {"logits": torch.zeros(ROWS, VOCAB).double()},
        ValueError,
        "float64",
    ),
    ("logits complex", lambda: {"logits": torch.zeros(ROWS, VOCAB) + 0j}, ValueError, "complex"),
    ("logits 1-D", lambda: {"logits": torch.zeros(ROWS * VOCAB)}, ValueError, "shape"),
    ("logits 3-D", lambda: {"logits": torch.zeros(1, ROWS, VOCAB)}, ValueError, "dimensions"),
    ("no columns", lambda: {"logits": torch.zeros(ROWS, 0)}, ValueError, "at least one column"),
    ("logits transposed", lambda: {"logits": torch.zeros(VOCAB, ROWS).t()}, ValueError, "unit"),
    (
        "logits meta",
        lambda: {"logits": torch.zeros(ROWS, VOCAB, device="meta")},
        ValueError,
        "meta",
    ),
    (
        "logits sparse",
        lambda: {"logits": torch.zeros(ROWS, VOCAB).to_sparse()},
        ValueError,
        "strided",
    ),
    (
        "negative view",
        lambda: {"logits": torch._neg_view(torch.zeros(ROWS, VOCAB))},
        ValueError,
        "neg",
    ),
    ("zero tensor", lambda: {"adv": torch._efficientzerotensor(ROWS)}, ValueError, "null"),
    ("storage shrunk", lambda: {"logits": resized_after_view()}, ValueError, "inside its storage"),
    ("numpy past its base", lambda: {"logits": beyond_memory()}, ValueError, "inside its storage"),
    (
        "row stride of 2^62",
        lambda: {
            "logits": np.lib.stride_tricks.as_strided(
                np.zeros(99, np.float32), (ROWS, VOCAB), (2**62, 4)
            )
        },
        ValueError,
        "inside its storage",
    ),
    (
        "negative strides",
        lambda: {"logits": np.zeros((ROWS, VOCAB), np.float32)[::-1]},
        ValueError,
        "strides of at least 0",
    ),
    (
        "misaligned logits",
        lambda: {"logits": misaligned((ROWS, VOCAB), np.float32)},
        ValueError,
        "aligned",
    ),
    ("big-endian", lambda: {"adv": np.zeros(ROWS, ">f4")}, ValueError, ">f4"),
    ("labels int32", lambda: {"labels": torch.zeros(ROWS).int()}, ValueError, "int32"),
    (
        "labels too short",
        lambda: {"labels": torch.zeros(ROWS - 1).long()},
        ValueError,
        "labels: expected shape",
    ),
    (
        "labels strided",
        lambda: {"labels": torch.zeros(2 * ROWS).long()[::2]},
        ValueError,
        "contiguous",
    ),
    ("bias too long", lambda: {"bias": torch.zeros(VOCAB + 1)}, ValueError, "bias: expected shape"),
    (
        "bias bf16",
        lambda: {"bias": torch.zeros(VOCAB).bfloat16()},
        ValueError,
        "bias: expected float32",
    ),
    ("adv expanded", lambda: {"adv": torch.zeros(1).expand(ROWS)}, ValueError, "unit stride"),
    ("adv a scalar", lambda: {"adv": torch.zeros(())}, ValueError, "adv"),
    ("adv a float", lambda: {"adv": 1.0}, TypeError, "adv"),
    ("weights fp64", lambda: {"weights": torch.ones(ROWS).double()}, ValueError, "weights"),
    ("extras is a tensor name", lambda: {"extras": ["x"]}, TypeError, "extras[0]"),
    ("extras is an int", lambda: {"extras": 3}, TypeError, "extras"),
    ("codes is an array", lambda: {"codes": np.zeros(3, np.int64)}, TypeError, "codes"),
    ("codes not in threes", lambda: {"codes": [1, -1]}, ValueError, "triples"),
    (
        "codes not ints",
        lambda: {"codes": [1.5, -1, 0], "hyper": torch.zeros(1, 8).double()},
        TypeError,
        "codes[0]",
    ),
    (
        "unknown code",
        lambda: {"codes": [999, -1, 0], "hyper": torch.zeros(1, 8).double()},
        ValueError,
        "999",
    ),
    (
        "gate past extras",
        lambda: {"codes": [CODES["nll"], 1, 0], "hyper": torch.zeros(1, 8).double()},
        ValueError,
        "codes[1]",
    ),
    (
        "anchor of 4",
        lambda: {"codes": [CODES["kl_k1"], -1, 4], "hyper": torch.zeros(1, 8).double()},
        ValueError,
        "codes[2]",
    ),
    (
        "KL without an anchor",
        lambda: {"codes": [CODES["kl_k1"], -1, 0], "hyper": torch.zeros(1, 8).double()},
        ValueError,
        "anchor",
    ),
    ("old missing", lambda: {"old": None}, ValueError, "old: expected a tensor, because ppo_clip"),
    ("ref missing for the anchor", lambda: {"ref": None}, ValueError, "ref: expected"),
    ("hyper missing", lambda: {"hyper": None}, TypeError, "hyper"),
    ("hyper fp32", lambda: {"hyper": torch.zeros(4, 8)}, ValueError, "hyper"),
    ("hyper of another length", lambda: {"hyper": torch.zeros(3, 8).double()}, ValueError, "hyper"),
    ("coefs beside codes", lambda: {"coefs": torch.zeros(4, ROWS)}, ValueError, "coefs"),
    ("gradient of nothing", lambda: {"codes": [], "hyper": None}, ValueError, "dlogits"),
    ("softcap negative", lambda: {"softcap": -1.0}, ValueError, "softcap"),
    ("softcap NaN", lambda: {"softcap": float("nan")}, ValueError, "softcap"),
    ("softcap text", lambda: {"softcap": "30"}, TypeError, "softcap"),
    ("temperature 0", lambda: {"uniform_temperature": 0.0}, ValueError, "uniform_temperature"),
    ("threads 0", lambda: {"threads": 0}, ValueError, "threads"),
    ("threads 2000", lambda: {"threads": 2000}, ValueError, "threads"),
    ("ignore_index 2^64", lambda: {"ignore_index": 2**64}, ValueError, "ignore_index"),
    ("unknown keyword", lambda: {"weight": None}, TypeError, "'weight'"),
    ("dlogits fp64", lambda: {"dlogits": torch.zeros(ROWS, VOCAB).double()}, ValueError, "dlogits"),
    ("dlogits narrower", lambda: {"dlogits": torch.zeros(ROWS, VOCAB - 1)}, ValueError, "dlogits"),
    ("dlogits transposed", lambda: {"dlogits": torch.zeros(VOCAB, ROWS).t()}, ValueError, "unit"),
    (
        "dlogits rows overlap",
        lambda: {"dlogits": torch.as_strided(torch.zeros(999), (ROWS, VOCAB), (VOCAB - 1, 1))},
        ValueError,
        "rows that do not overlap",
    ),
    (
        "dlogits expanded",
        lambda: {"dlogits": torch.zeros(VOCAB).expand(ROWS, VOCAB)},
        ValueError,
        "overlap",
    ),
    (
        "output read-only",
        lambda: {"loss": readonly(np.zeros(ROWS, np.float32))},
        ValueError,
        "writable",
    ),
    ("output strided", lambda: {"loss": torch.zeros(2 * ROWS)[::2]}, ValueError, "unit stride"),
    ("is_top1 float", lambda: {"is_top1": torch.zeros(ROWS)}, ValueError, "is_top1"),
    (
        "coefs_out strided",
        lambda: {"coefs_out": torch.zeros(4, ROWS + 1)[:, :ROWS]},
        ValueError,
        "contiguous",
    ),
]
