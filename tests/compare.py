"""The one comparator: truth is fp64, and the bar is the error of the same-dtype PyTorch reference.

A result passes when its error, as elementwise maximum and as RMS, is at most `factor` times the
reference's, plus a floor of a few fp32 ulps of the truth's own scale (a reference that is exact by
chance is no bar). The bar is the same everywhere; no option and no environment variable widens it.
"""

import torch
from torch import Tensor

EPS32 = torch.finfo(torch.float32).eps
FORWARD = 2.0
GRADIENT = 3.0
FLOOR_ULPS = 4.0  # fp32 ulps of the largest (for the RMS: of the RMS) true value


def max_and_rms(x: Tensor) -> tuple[float, float]:
    """Largest magnitude and root mean square in fp64."""
    x = x.detach().double()
    return x.abs().max().item(), x.square().mean().sqrt().item()


def check(name: str, got: Tensor, truth: Tensor, reference: Tensor, factor: float) -> None:
    """Raise AssertionError unless `got` is as close to the fp64 `truth` as `reference` allows."""
    assert truth.dtype == torch.float64, f"{name}: the truth is {truth.dtype}, not fp64"
    assert got.shape == truth.shape == reference.shape, (
        f"{name}: {got.shape}, {truth.shape}, {reference.shape}"
    )
    assert got.numel(), f"{name}: nothing to compare"
    assert got.isfinite().all(), f"{name}: {int((~got.isfinite()).sum())} entries are not finite"
    errors = max_and_rms(got.detach().double() - truth)
    bars = max_and_rms(reference.detach().double() - truth)
    scales = max_and_rms(truth)
    for kind, error, bar, scale in zip(("max", "rms"), errors, bars, scales, strict=True):
        allowed = factor * bar + FLOOR_ULPS * EPS32 * scale
        assert error <= allowed, (
            f"{name}: {kind} error {error:.3e} > {allowed:.3e} = {factor:g} x {bar:.3e} "
            f"(the PyTorch reference's error) + {FLOOR_ULPS:g} eps x {scale:.3e}"
        )


def check_forward(name: str, got: Tensor, truth: Tensor, reference: Tensor) -> None:
    """`check` at the bar of outputs: 2x."""
    check(name, got, truth, reference, FORWARD)


def check_gradient(name: str, got: Tensor, truth: Tensor, reference: Tensor) -> None:
    """`check` at the bar of gradients: 3x."""
    check(name, got, truth, reference, GRADIENT)


def check_loss(got: Tensor, truth: dict, reference: dict) -> None:
    """A loss, which is one draw of the error: its bar is the error of the terms that it adds."""
    bar = (reference["terms"].double() - truth["terms"]).abs().sum()
    allowed = FORWARD * bar + FLOOR_ULPS * EPS32 * truth["terms"].abs().sum()
    error = (got.double() - truth["loss"]).abs()
    assert error <= allowed, f"loss: error {error:.3e} > {allowed:.3e}"


def same_bits(name: str, got: Tensor, want: Tensor) -> None:
    """Bitwise equality, NaN included and -0 told from +0."""
    assert got.dtype == want.dtype and got.shape == want.shape, (
        f"{name}: {got.dtype} {tuple(got.shape)} against {want.dtype} {tuple(want.shape)}"
    )
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    a, b = got.detach().contiguous().view(width), want.detach().contiguous().view(width)
    differ = a != b
    if got.is_floating_point():
        differ &= ~(got.detach().contiguous().isnan() & want.detach().contiguous().isnan())
    assert not differ.any(), (
        f"{name}: {int(differ.sum())} of {differ.numel()} entries differ, first at "
        f"{differ.nonzero()[0].tolist()}"
    )
