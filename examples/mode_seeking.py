"""Mean-seeking to mode-seeking on a target that the model cannot cover.

And what reward-weighted regression and prefix ratios estimate. Two cores, no network, under two
minutes.

The answers are 121 points on a line, logged once each by a uniform policy mu, with rewards whose
Gibbs policy pi* ~ mu e^{r/tau} has two modes. The model is a discretised Gaussian: the "hidden
state" is its natural parameter and the head's frozen weight is (x, x^2), so `linear_policy_loss`
trains it as it would train a language model, and with every answer there once the sums over samples
are exact expectations. Writes docs/figures/mode_seeking.png and docs/figures/offline_estimates.png,
prints the table that docs/theory.md quotes. Not here: a language model (`pyoffline demo`).

    python examples/mode_seeking.py [--out docs/figures] [--steps 40]
"""

import argparse
import math
import time
from pathlib import Path

import torch

import pyoffline as po

F64 = torch.float64
X = torch.linspace(-6, 6, 121, dtype=F64)
TAU = 0.5
MODES, WIDTHS, SHARES = (-2.4, 2.0), (0.55, 0.75), (0.5, 0.5)
ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
BETAS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)


def target() -> torch.Tensor:
    """pi* [121]: two Gaussians of equal mass; the narrow one has the higher peak."""
    parts = (
        share * torch.exp(-0.5 * ((X - at) / width) ** 2) / width
        for at, width, share in zip(MODES, WIDTHS, SHARES, strict=True)
    )
    p = sum(parts)
    return p / p.sum()


PI_STAR = target()
REWARDS = TAU * (PI_STAR * len(X)).log()  # of mu uniform: pi* ~ e^{r/tau}, Z = 1
WEIGHT = torch.stack([X, X * X], 1)
HEAD = po.Head(WEIGHT)
MU = torch.full((len(X), 1), -math.log(len(X)), dtype=F64)


def natural(theta: torch.Tensor) -> torch.Tensor:
    """theta = (m, log(s - 0.1)) -> natural parameters (m/s^2, -1/(2 s^2)), the hidden state.

    s stays above the grid's spacing, so that a collapse to one answer is a visible limit.
    """
    precision = (0.1 + torch.exp(theta[1])) ** -2
    return torch.stack([theta[0] * precision, -0.5 * precision])


def log_model(theta: torch.Tensor) -> torch.Tensor:
    return (WEIGHT @ natural(theta)).log_softmax(0)


def offline_loss(objective, advantages=None, sequences=None):
    """theta -> loss of the logged answers, one sequence of one token each."""
    reads_mu = not isinstance(objective, po.WeightedNLL)
    tokens = po.TokenBatch(
        torch.arange(len(X))[:, None],
        advantages=None if advantages is None else advantages[:, None],
        behavior_logps=MU if reads_mu else None,
        sequences=sequences,
    )

    def loss(theta):
        hidden = natural(theta).expand(len(X), 1, 2)
        return po.linear_policy_loss(hidden, HEAD, tokens, objective).loss

    return loss


def power_is(alpha: float):
    return offline_loss(po.PowerIS(alpha), (REWARDS / TAU).exp())


def grouped(objective):
    group = torch.zeros(len(X), dtype=torch.int64)
    return offline_loss(objective, sequences=po.SequenceBatch(REWARDS, group))


def jsd(beta: float):
    """beta KL(T||M) + (1-beta) KL(S||M); its ends are defined as the two KLs, as in TRL."""

    def loss(theta):
        log_s, log_t = log_model(theta), PI_STAR.log()
        if beta in (0.0, 1.0):
            first, second = (log_t, log_s) if beta == 0 else (log_s, log_t)
            return (first.exp() * (first - second)).sum()
        log_m = torch.logaddexp(log_s + math.log(1 - beta), log_t + math.log(beta))
        kl_t = (log_t.exp() * (log_t - log_m)).sum()
        return beta * kl_t + (1 - beta) * (log_s.exp() * (log_s - log_m)).sum()

    return loss


def fit(loss, steps: int = 40, starts=((-2.0, -0.7), (1.6, -0.7), (0.0, 0.0))) -> torch.Tensor:
    """theta after L-BFGS from each start, the best by its own loss."""
    best, lowest = None, math.inf
    for start in starts:
        theta = torch.tensor(start, dtype=F64, requires_grad=True)
        lbfgs = torch.optim.LBFGS([theta], max_iter=steps, line_search_fn="strong_wolfe")

        def closure(theta=theta, lbfgs=lbfgs):
            lbfgs.zero_grad()
            value = loss(theta)
            value.backward()
            return value

        lbfgs.step(closure)
        value = loss(theta).item()
        if value < lowest:
            best, lowest = theta.detach(), value
    return best


def measure(theta: torch.Tensor) -> dict[str, float]:
    """What a fit looks like: mean, spread, mass nearer the smaller of its two sides, both KLs."""
    log_s = log_model(theta)
    p = log_s.exp()
    mean = (p * X).sum()
    left = p[X < 0].sum()
    return {
        "mean": float(mean),
        "width": float((p * (X - mean) ** 2).sum().sqrt()),
        "other": float(torch.minimum(left, 1 - left).clamp(min=0)),
        "forward": float((PI_STAR * (PI_STAR.log() - log_s)).sum()),
        "reverse": float((p * (log_s - PI_STAR.log())).sum()),
    }


def sweeps(steps: int) -> dict[str, dict[float, torch.Tensor]]:
    """Name -> parameter -> fitted theta."""
    out = {
        "PowerIS": {a: fit(power_is(a), steps) for a in ALPHAS},
        "RenyiRWR": {a: fit(grouped(po.RenyiRWR(a, TAU)), steps) for a in ALPHAS},
        "AlphaELBO": {a: fit(grouped(po.AlphaELBO(a, TAU)), steps) for a in ALPHAS[1:]},
        "JSD": {b: fit(jsd(b), steps) for b in BETAS},
    }
    weights = po.advantages.rwr(REWARDS, torch.zeros(len(X), dtype=torch.int64), 1 / TAU)
    out["RWR"] = {0.0: fit(offline_loss(po.WeightedNLL(), weights), steps)}
    return out


# reward-weighted regression with one noisy reward per answer


def optimism(trials: int = 40000, lams=(0.25, 0.5, 1.0), sizes=(4, 16, 64)) -> list[dict]:
    """Mean RWR weight of a noisy answer against its exact one, beside `diagnostics.rwr_bias`.

    Every second answer of a group has a noisy reward (variance 1), the others none; all have the
    same mean, so the exact weight of each is 1.
    """
    rows, g = [], torch.Generator().manual_seed(0)
    for lam in lams:
        for n in sizes:
            variance = (torch.arange(n) % 2 == 0).to(F64)
            count = trials * 4 // n
            noise = torch.randn(count, n, generator=g, dtype=F64) * variance.sqrt()
            group = torch.arange(count)[:, None].expand(count, n)
            weight = po.advantages.rwr(noise.reshape(-1), group.reshape(-1), lam).reshape(count, n)
            each = weight[:, 0::2].mean(1)
            same = torch.zeros(n, dtype=torch.int64)
            bias = po.diagnostics.rwr_bias(torch.zeros(n, dtype=F64), variance, same, lam)
            rows.append(
                {
                    "lam": lam,
                    "n": n,
                    "measured": float(each.mean().log()),
                    "error": float(each.std() / each.mean() / count**0.5),
                    "formula": float(bias.total[0]),
                    "lasting": float(bias.optimism[0] + bias.normalizer[0]),
                }
            )
    return rows


# prefixes


def prefixes(depth=10, cut=4, lam=2.0, sizes=(64, 256, 1024, 4096, 16384), repeats=20):
    """How well sampled prefix ratios rank the 2^cut prefixes of bit strings, against exact ones.

    h writes bits with prefix-dependent probabilities; the reward counts matches with a secret
    string. Returns (samples, mean pairwise order agreement, rms error of differences) rows.
    """
    g = torch.Generator().manual_seed(1)
    codes = torch.arange(2**depth)
    bits = (codes[:, None] >> torch.arange(depth - 1, -1, -1)) & 1
    log_h, node = torch.zeros(2**depth, dtype=F64), torch.zeros_like(codes)
    for t in range(depth):
        one = torch.sigmoid(torch.randn(2**t, generator=g, dtype=F64))[node]
        log_h = log_h + torch.where(bits[:, t] == 1, one, 1 - one).log()
        node = 2 * node + bits[:, t]
    secret = torch.randint(0, 2, (depth,), generator=g)
    reward = (bits == secret).to(F64).mean(1) * 2
    prefix, prompt = codes >> (depth - cut), torch.zeros_like(codes)
    exact = po.diagnostics.prefix_ratio(reward, prefix, prompt, lam, log_weights=log_h)
    truth = exact[:: 2 ** (depth - cut)]
    first = torch.exp(log_h + lam * reward).reshape(2**cut, -1).sum(1).log()
    h = torch.exp(log_h).reshape(2**cut, -1).sum(1).log()
    by_hand = first - h - torch.exp(log_h + lam * reward).sum().log()
    if not torch.allclose(truth, by_hand, atol=1e-12):
        raise RuntimeError("prefix_ratio of an enumeration is not the exact ratio")
    rows = []
    for n in sizes:
        scores = [_ranked(reward, prefix, log_h, truth, n, lam, g) for _ in range(repeats)]
        agreement, error, seen = (float(x) for x in torch.tensor(scores).mean(0))
        rows.append({"n": n, "agreement": agreement, "error": error, "seen": seen})
    return rows


def _ranked(reward, prefix, log_h, truth, n, lam, g):
    """Pairwise order agreement, rms error of centred ratios, prefixes seen; one draw of n."""
    drawn = torch.multinomial(log_h.exp(), n, replacement=True, generator=g)
    p = prefix[drawn]
    got = po.diagnostics.prefix_ratio(reward[drawn], p, torch.zeros_like(p), lam)
    seen, where = torch.unique(p, return_inverse=True)
    estimate = torch.empty(len(seen), dtype=F64).scatter_(0, where, got)
    want = truth[seen]
    upper = torch.triu(torch.ones(len(seen), len(seen), dtype=torch.bool), 1)
    same = torch.sign(estimate[:, None] - estimate) == torch.sign(want[:, None] - want)
    off = (estimate - estimate.mean()) - (want - want.mean())
    return float(same[upper].double().mean()), float(off.square().mean().sqrt()), float(len(seen))


def show(fits, bias, ranks) -> None:
    """The tables of docs/theory.md."""
    print(
        f"{'objective':<11}{'at':>6}{'mean':>8}{'width':>8}{'other':>8}{'KL(t|m)':>9}{'KL(m|t)':>9}"
    )
    for name, by in fits.items():
        for at, theta in by.items():
            m = measure(theta)
            print(
                f"{name:<11}{at:>6.2f}{m['mean']:>8.3f}{m['width']:>8.3f}{m['other']:>8.4f}"
                f"{m['forward']:>9.3f}{m['reverse']:>9.3f}"
            )
    print(f"\n{'lam':>5}{'N':>5}{'measured':>10}{'+-':>8}{'rwr_bias':>10}{'N = inf':>9}")
    for r in bias:
        print(
            f"{r['lam']:>5.2f}{r['n']:>5}{r['measured']:>10.4f}{r['error']:>8.4f}"
            f"{r['formula']:>10.4f}{r['lasting']:>9.4f}"
        )
    print(f"\n{'samples':>8}{'prefixes':>10}{'order agreement':>17}{'rms error':>11}")
    for r in ranks:
        print(f"{r['n']:>8}{r['seen']:>10.1f}{r['agreement']:>17.4f}{r['error']:>11.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("docs/figures"),
        help="folder of the figures (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=40,
        help="L-BFGS iterations of each fit at most (default: %(default)s)",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)  # two numbers to fit: a barrier costs more than the work
    start = time.perf_counter()
    fits, bias, ranks = sweeps(args.steps), optimism(), prefixes()
    show(fits, bias, ranks)
    from mode_seeking_figures import draw_estimates, draw_modes

    args.out.mkdir(parents=True, exist_ok=True)
    modes = {n: {at: measure(t) for at, t in by.items()} for n, by in fits.items()}
    curves = {n: {at: log_model(t).exp() for at, t in by.items()} for n, by in fits.items()}
    draw_modes(args.out / "mode_seeking.png", X, PI_STAR, curves, modes)
    draw_estimates(args.out / "offline_estimates.png", bias, ranks)
    wall, cpu = time.perf_counter() - start, time.process_time()
    print(f"\nfigures in {args.out}; {wall:.0f} s, {cpu:.0f} s of processor time")


if __name__ == "__main__":
    main()
