"""Head.of where the weight's values are elsewhere: ZeRO-3, FSDP 1 and 2, DTensor, meta.

One rank over gloo, on the CPU: which state raises and which trains is tested, not the collectives.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pyoffline.head import Head, backbone

V, D = 11, 6


class TinyLM(nn.Module):
    """A causal LM without Hugging Face: an embedding, one layer, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Embedding(V, D), nn.Linear(D, D), nn.Tanh())
        self.lm_head = nn.Linear(D, V)

    def forward(self, ids):
        return self.lm_head(self.model(ids))


def zero3(model):
    model.lm_head.weight = nn.Parameter(torch.empty(0))
    model.lm_head.weight.ds_id = 3


def fsdp1(model):
    model.lm_head.weight = nn.Parameter(torch.randn(V * D))


def freed(model):
    model.lm_head.weight = nn.Parameter(torch.empty(0, D))


ELSEWHERE = [  # name, what happened to the weight, words of the cause and of the fix
    ("ZeRO-3", zero3, "ZeRO-3.*GatheredParameters"),
    ("FSDP1 flat", fsdp1, "flat.*summon_full_params"),
    ("FSDP1 freed", freed, "empty.*summon_full_params"),
    ("meta", lambda m: m.to("meta"), "no values.*to_empty"),
]


@pytest.mark.parametrize(("name", "change", "words"), ELSEWHERE)
def test_a_weight_that_is_elsewhere_raises_at_the_call(name, change, words):
    """Not at Head.of: the head is made before the wrapped forward has gathered anything."""
    model = TinyLM()
    change(model)
    head = Head.of(model)
    with pytest.raises(ValueError, match=words):
        head.tensors()


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_dtensor_weight(one_rank):
    from torch.distributed.tensor import Shard, distribute_tensor

    model = TinyLM()
    full = model.lm_head.weight.detach().clone()
    model.lm_head.weight = nn.Parameter(distribute_tensor(full, one_rank, [Shard(0)]))
    head = Head.of(model)
    with pytest.raises(ValueError, match=r"DTensor.*unshard\(\)"):
        head.tensors()
    with torch.no_grad():
        assert torch.equal(head.tensors().weight, full)
    model.lm_head.weight.requires_grad_(False)
    assert torch.equal(head.tensors().weight, full)


@pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"),
    reason="not run: fully_shard of this torch needs a GPU (2.6)",
)
def test_fully_sharded_model_trains_inside_its_forward(one_rank):
    from torch.distributed.fsdp import fully_shard

    class Step(nn.Module):
        def __init__(self, lm):
            super().__init__()
            self.lm, self.head = lm, Head.of(lm)

        def forward(self, ids):
            head = self.head.tensors()
            return (
                nn.functional.linear(backbone(self.lm)(ids), head.weight, head.bias).square().mean()
            )

    torch.manual_seed(0)
    plain, ids = TinyLM(), torch.arange(8).view(2, 4)
    step = fully_shard(Step(copy.deepcopy(plain)), mesh=one_rank)
    step(ids).backward()
    plain(ids).square().mean().backward()
    for name, p in plain.named_parameters():
        got = dict(step.lm.named_parameters())[name].grad.full_tensor()
        assert torch.allclose(got, p.grad, atol=1e-6), name
