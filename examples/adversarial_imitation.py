"""Adversarial imitation of a small language: reverse KL (AIRL), Jensen-Shannon (GAIL), FAIRL.

The expert writes strings of 5 tokens over 6 letters from a mixture of two Markov chains; 2,048 of
its strings are the demonstrations. The policy is a GRU with a head, sampled from scratch; a second
GRU discriminates whole strings (trajectory level). Each round: one discriminator step
(`imitation.discriminator_loss`), rewards of its logits on the policy's own strings, a baseline from
`advantages`, one step of `linear_policy_loss` with `WeightedNLL`. Because there are only 7,776
strings, both KLs to the expert are computed by enumeration and not estimated. Behaviour cloning on
the same demonstrations (`NLL`) stands beside. Writes docs/figures/adversarial_imitation.png. Two
cores, no network, about a minute of processor time.

    python examples/adversarial_imitation.py [--out docs/figures] [--rounds 400]
"""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import pyoffline as po

LETTERS, LENGTH, WIDTH, BATCH, DEMOS = 6, 5, 32, 256, 2048
STRINGS = torch.cartesian_prod(*[torch.arange(LETTERS)] * LENGTH)  # [7776, 5]
CLIP = 4.0  # of the discriminator's logits in rewards: FAIRL's -d e^d has no bound
METHODS = {
    "reverse KL (AIRL)": po.imitation.airl_rewards,
    "JS (GAIL)": po.imitation.gail_rewards,
    "FAIRL (-d e^d)": po.imitation.fairl_rewards,
    "forward KL (e^d)": lambda d: po.imitation.policy_rewards(d, "forward_kl"),
}


def expert() -> Tensor:
    """Log-probability [7776] of every string: a mixture of two Markov chains."""
    g = torch.Generator().manual_seed(3)
    logs = []
    for _ in range(2):
        first = (2 * torch.randn(LETTERS, generator=g)).log_softmax(0)
        step = (2 * torch.randn(LETTERS, LETTERS, generator=g)).log_softmax(1)
        moves = step[STRINGS[:, :-1], STRINGS[:, 1:]].sum(1)
        logs.append(first[STRINGS[:, 0]] + moves)
    return torch.stack(logs).logsumexp(0) - torch.tensor(2.0).log()


class Policy(nn.Module):
    """Embedding, GRU, head; position t holds what predicts letter t."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(LETTERS + 1, WIDTH)
        self.body = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, LETTERS)

    def hidden(self, strings: Tensor) -> Tensor:
        start = torch.full_like(strings[:, :1], LETTERS)
        return self.body(self.embed(torch.cat([start, strings[:, :-1]], 1)))[0]

    @torch.no_grad()
    def sample(self, n: int, generator) -> Tensor:
        token, state, out = torch.full((n, 1), LETTERS), None, []
        for _ in range(LENGTH):
            hidden, state = self.body(self.embed(token), state)
            p = self.head(hidden[:, 0]).softmax(-1)
            token = torch.multinomial(p, 1, generator=generator)
            out.append(token)
        return torch.cat(out, 1)

    @torch.no_grad()
    def log_probs(self) -> Tensor:
        """[7776] of every string."""
        head = po.Head(self.head.weight, self.head.bias)
        return po.linear_token_logps(self.hidden(STRINGS), head, STRINGS).logps.sum(1)

    def loss(self, strings: Tensor, objective, advantages: Tensor | None = None) -> Tensor:
        tokens = po.TokenBatch(strings, advantages=advantages)
        head = po.Head(self.head.weight, self.head.bias)
        return po.linear_policy_loss(self.hidden(strings), head, tokens, objective).loss


class Discriminator(nn.Module):
    """One logit per string: log of the expert's density over the policy's."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(LETTERS, WIDTH)
        self.body = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.out = nn.Linear(WIDTH, 1)

    def forward(self, strings: Tensor) -> Tensor:
        return self.out(self.body(self.embed(strings))[0][:, -1])[:, 0]


def kls(log_policy: Tensor, log_expert: Tensor) -> tuple[float, float]:
    """KL(policy || expert), KL(expert || policy) in nats, exact."""
    reverse = (log_policy.exp() * (log_policy - log_expert)).sum()
    forward = (log_expert.exp() * (log_expert - log_policy)).sum()
    return float(reverse), float(forward)


def adversarial(rewards, demos: Tensor, log_expert: Tensor, rounds: int) -> list[tuple]:
    """(round, KL(policy || expert), KL(expert || policy)) along the discriminator loop."""
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    policy, judge = Policy(), Discriminator()
    act = torch.optim.Adam(policy.parameters(), lr=3e-3)
    tell = torch.optim.Adam(judge.parameters(), lr=5e-3, weight_decay=1e-4)
    fade = [torch.optim.lr_scheduler.CosineAnnealingLR(o, rounds + 1) for o in (act, tell)]
    group, rows = torch.zeros(BATCH, dtype=torch.int64), []
    for i in range(rounds + 1):
        if i % 20 == 0:
            rows.append((i, *kls(policy.log_probs(), log_expert)))
        strings = policy.sample(BATCH, g)
        tell.zero_grad()
        shown = demos[torch.randint(len(demos), (BATCH,), generator=g)]
        po.imitation.discriminator_loss(judge(shown), judge(strings)).backward()
        tell.step()
        paid = rewards(judge(strings).clamp(-CLIP, CLIP))
        advantages = po.advantages.group_normalize(paid, group)
        act.zero_grad()
        policy.loss(strings, po.WeightedNLL() - 0.002 * po.Entropy(), advantages).backward()
        act.step()
        for schedule in fade:
            schedule.step()
    return rows


def cloning(demos: Tensor, log_expert: Tensor, rounds: int) -> list[tuple]:
    """The same rows for maximum likelihood on the demonstrations."""
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    policy = Policy()
    act = torch.optim.Adam(policy.parameters(), lr=5e-3)
    rows = []
    for i in range(rounds + 1):
        if i % 20 == 0:
            rows.append((i, *kls(policy.log_probs(), log_expert)))
        act.zero_grad()
        shown = demos[torch.randint(len(demos), (BATCH,), generator=g)]
        policy.loss(shown, po.NLL()).backward()
        act.step()
    return rows


def draw(path: Path, runs: dict[str, list[tuple]]) -> None:
    """Both KLs over the rounds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = ("#d1495b", "#2e86ab", "#edae49", "#6a994e", "#6b7280")
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", sharey=True)
    titles = ("KL(policy || expert): precision", "KL(expert || policy): coverage")
    for k, (ax, title) in enumerate(zip(axes, titles, strict=True), 1):
        for (name, rows), colour in zip(runs.items(), colours, strict=True):
            style = "--" if name.startswith("cloning") else "-"
            ax.plot([r[0] for r in rows], [r[k] for r in rows], style, color=colour, label=name)
        ax.set_title(title, fontsize=10, loc="left")
        ax.set_xlabel("round", fontsize=9)
        ax.grid(color="#e4e7eb", linewidth=0.6)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    axes[0].set_ylabel("nats", fontsize=9)
    axes[0].set_yscale("log")
    for ax in axes:
        ax.tick_params(labelsize=8)
    axes[1].legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0.4, 0.47))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("docs/figures"),
        help="folder of the figure (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds", type=int, default=400, help="of discriminator and policy (default: %(default)s)"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)  # small matrices: a barrier costs more than the work
    start, log_expert = time.perf_counter(), expert()
    g = torch.Generator().manual_seed(7)
    demos = STRINGS[torch.multinomial(log_expert.exp(), DEMOS, replacement=True, generator=g)]
    runs = {n: adversarial(r, demos, log_expert, args.rounds) for n, r in METHODS.items()}
    runs["cloning (NLL)"] = cloning(demos, log_expert, args.rounds)
    print(f"{'objective':<20}{'KL(policy||expert)':>20}{'KL(expert||policy)':>20}{'best at':>9}")
    for name, rows in runs.items():
        best = min(rows, key=lambda r: r[1] + r[2])
        print(f"{name:<20}{rows[-1][1]:>20.3f}{rows[-1][2]:>20.3f}{best[0]:>9}")
        print(f"{'  at its best':<20}{best[1]:>20.3f}{best[2]:>20.3f}")
    args.out.mkdir(parents=True, exist_ok=True)
    draw(args.out / "adversarial_imitation.png", runs)
    wall, cpu = time.perf_counter() - start, time.process_time()
    print(f"\nfigure in {args.out}; {wall:.0f} s, {cpu:.0f} s of processor time")


if __name__ == "__main__":
    main()
