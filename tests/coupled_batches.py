"""Batches of sequences for the tests of coupled objectives, and ways to run them."""

import coupled_oracle
import torch

import pyoffline as po

FIELDS = {"old": "old_logps", "mu": "behavior_logps", "ref": "ref_logps"}
LENGTHS = (5, 1, 9, 3, 7, 2, 6, 4)
GROUPS = (7, -3, 7, 7, -3, 2, 2, 7)

# name -> (objective, what it reads)
CASES = {
    "gspo": (po.GSPO(0.2, 0.2), "old adv"),
    "luspo": (po.LUSPO(0.2, 0.2), "old adv"),
    "gmpo": (po.GMPO(0.2), "old adv"),
    "topr": (po.TOPR(), "mu rewards"),
    "vespo": (po.VESPO(), "old adv"),
    "iw_sft": (po.ImportanceWeightedSFTSequence(2.0, 0.6, 1.7), "ref"),
    "power": (po.SequencePowerIS(0.4), "mu adv"),
    "power_0": (po.SequencePowerIS(0.0), "mu adv"),
    "renyi": (po.RenyiRWR(0.5, 0.7), "mu rewards group"),
    "renyi_0": (po.RenyiRWR(0.0), "rewards group"),
    "renyi_1": (po.RenyiRWR(1.0, 2.0), "mu rewards group"),
    "renyi_2": (po.RenyiRWR(2.5), "mu rewards group"),
    "elbo": (po.AlphaELBO(0.5, 0.8), "mu rewards group"),
    "elbo_0": (po.AlphaELBO(0.0), "mu rewards group"),
    "elbo_1": (po.AlphaELBO(1.0), "mu rewards group"),
    "elbo_near_1": (po.AlphaELBO(0.999), "mu rewards group"),
    "a_star": (po.AStarPO(0.3), "ref adv"),
    "kl_pg": (po.KLRegularizedPG(0.2), "old ref rewards"),
    "kl_pg_all": (po.KLRegularizedPG(0.2, to_go=False), "old ref rewards"),
    "opsm_gspo": (po.OPSM(po.GSPO(0.2, 0.2), 0.02), "old mu adv"),
    "opsm_ppo": (po.OPSM(po.PPOClip(0.2, 0.2) + 0.1 * po.KL("k2", "old"), 0.02), "old mu adv"),
    "composed": (
        po.GSPO(0.2, 0.2) + 0.3 * po.KL("k2", "ref") - 0.2 * po.Entropy() + 0.01 * po.ZLoss(),
        "old ref adv",
    ),
    "with_nll": (0.7 * po.RenyiRWR(0.5) + 0.5 * po.NLL(0.1, 0.01), "mu rewards group"),
    "two_units": (po.RenyiRWR(0.5) + 2.0 * po.LUSPO(0.2, 0.2), "old mu adv rewards group"),
}


def make(reads="", dtype=torch.float32, seed=0, lengths=LENGTHS, d=32, v=211, **options) -> dict:
    """A packed batch as `coupled_oracle.run` reads it.

    `options`: weights, omega (bool), ignored (bool: some tokens do not count), bias, temperature,
    head (dict), groups. Log-probs lie 0.03 or 0.4 off the policy's, a whole sequence on one side:
    no clip border is near enough for the rounding of a logit to decide.
    """
    g = torch.Generator().manual_seed(seed)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    n, s = ids.numel(), len(lengths)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    labels = torch.randint(0, v, (n,), generator=g)
    if options.get("ignored", True):
        labels[2::6] = -100
    hidden, weight = randn(n, d).to(dtype), (randn(v, d) * 1.5 / d**0.5).to(dtype)
    batch = {"hidden": hidden, "weight": weight, "labels": labels, "ids": ids}
    batch["bias"] = randn(v).to(dtype) if options.get("bias") else None
    batch["temperature"] = torch.rand(n, generator=g) + 0.7 if options.get("temperature") else None
    batch["head"] = options.get("head", {})
    batch["weights"] = None
    if options.get("weights"):
        batch["weights"] = torch.rand(n, generator=g) / n + 0.5 / n
        batch["weights"][4::9] = 0.0
    batch["omega"] = torch.rand(s, generator=g) + 0.2 if options.get("omega") else None
    names = reads.split()
    rows = {**batch, "labels": labels.clamp(min=0), "weights": None, "omega": None}
    truth = coupled_oracle.run({**rows, "adv": None}, po.NLL(), torch.float64)["logps"]
    for name in ("old", "mu", "ref"):
        far = torch.where(torch.rand(s, generator=g) < 0.5, 0.03, 0.4)
        side = torch.where(torch.rand(s, generator=g) < 0.5, -1.0, 1.0)
        moved = (far * side)[ids] + 0.02 * (torch.rand(n, generator=g) - 0.5)
        moved = torch.where(truth + moved > -1e-3, -moved.abs(), moved)
        batch[name] = (truth + moved).float() if name in names else None
    batch["adv"] = randn(s) if "adv" in names else None
    batch["rewards"] = randn(s) if "rewards" in names else None
    batch["group"] = None
    if "group" in names:
        batch["group"] = torch.tensor(options.get("groups", GROUPS))[:s]
    batch["extra"] = {}
    return batch


def tokens(batch: dict, **changes) -> po.TokenBatch:
    """The packed TokenBatch of a batch."""
    given = {FIELDS[k]: batch[k] for k in FIELDS if batch.get(k) is not None}
    # no `|=` of dicts: Dynamo of torch 2.6 has none
    given.update({k: batch[k] for k in ("labels", "weights", "temperature")})
    parts = {"rewards": "rewards", "group_ids": "group", "weights": "omega"}
    own = {k: batch[v] for k, v in parts.items() if batch.get(v) is not None}
    sequences = po.SequenceBatch(**own) if own else None
    given.update(advantages=batch.get("adv"), sequences=sequences, sequence_ids=batch["ids"])
    return po.TokenBatch(**{**given, "extra": batch["extra"] or None, **changes})


def padded(batch: dict) -> tuple[dict, torch.Tensor]:
    """The same batch as [S, T] rows, padding filled with rubbish; and where its tokens went [N]."""
    ids = batch["ids"]
    s, lengths = int(ids.max()) + 1, torch.bincount(ids)
    longest = int(lengths.max())
    start = lengths.cumsum(0) - lengths
    place = ids * longest + torch.arange(ids.numel()) - start[ids]
    out = dict(batch)
    for name in ("hidden", "labels", "weights", "temperature", "old", "mu", "ref"):
        x = batch.get(name)
        if x is None:
            continue
        fill = -100 if name == "labels" else torch.nan
        full = torch.full((s * longest, *x.shape[1:]), fill, dtype=x.dtype)
        full[place] = x
        out[name] = full.reshape(s, longest, *x.shape[1:])
    return out, place


def run(batch: dict, objective, backend: str, upstream: float = 1.0, wanted=None) -> dict:
    """`linear_policy_loss` and its gradients, in the form of `coupled_oracle.run`."""
    wanted = wanted or ("hidden", "weight", "bias")
    leaves = {
        k: batch[k].detach().clone().requires_grad_(k in wanted)
        for k in ("hidden", "weight", "bias")
        if batch.get(k) is not None
    }
    given = tokens(batch)
    if batch["labels"].dim() == 2:
        given = tokens({**batch, "ids": None})
    with po.use_backend(backend):
        h = po.Head(leaves["weight"], leaves.get("bias"), **batch["head"])
        out = po.linear_policy_loss(leaves["hidden"], h, given, objective)
        (out.loss * upstream).backward()
    result = {"loss": out.loss.detach(), **out.stats._asdict(), "metrics": out.metrics}
    for k, x in leaves.items():
        if k not in wanted:
            assert x.grad is None
            continue
        assert x.grad.dtype == x.dtype
        result[f"d{k}"] = x.grad if upstream == 1.0 else x.grad.double() / upstream
    return result


def run_logits(logits, batch: dict, objective, backend: str) -> dict:
    """`policy_loss` on given logits [N, V]; the gradient under "dlogits"."""
    z = logits.detach().clone().requires_grad_()
    with po.use_backend(backend):
        out = po.policy_loss(z, tokens(batch), objective)
        out.loss.backward()
    result = {"loss": out.loss.detach(), **out.stats._asdict(), "metrics": out.metrics}
    return result | {"dlogits": z.grad}
