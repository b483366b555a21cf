"""A pytest plugin of `run.py`: a smoke test of the mutated library first, then what each test did.

Writes one JSON object a line to $TEETH_REPORT. The first test that fails by assertion ends the
session; one that fails in another way (an exception of the mutated code) does not. Not here: what
follows from it.
"""

import importlib
import json
import os
from pathlib import Path

import pytest


def _write(**row):
    with Path(os.environ["TEETH_REPORT"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _smoke():
    """The mutated copy imports, trains and scores: no named test fails by an import."""
    import torch

    import pyoffline as po

    here = Path(po.__file__).resolve()
    assert here.is_relative_to(Path.cwd()), f"{here} is not the mutated copy in {Path.cwd()}"
    importlib.import_module(os.environ["TEETH_MODULE"])
    for backend in ("reference", "cpu"):
        hidden, weight = (torch.randn(n, 8, requires_grad=True) for n in (6, 19))
        labels = torch.tensor([1, -100, 3, 18, 0, 7])
        tokens = po.TokenBatch(labels, torch.ones(6), torch.full((6,), -3.0))
        with po.use_backend(backend):
            loss = po.linear_policy_loss(hidden, po.Head(weight), tokens, po.PPOClip()).loss
            loss.backward()
            logps = po.linear_token_logps(hidden.detach(), po.Head(weight.detach()), labels).logps
        assert loss.shape == () and logps.shape == (6,)


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session):
    _smoke()
    _write(smoke="passed")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.when == "call" or report.outcome == "failed":
        asserted = call.excinfo is not None and call.excinfo.errisinstance(
            (AssertionError, pytest.fail.Exception)
        )
        error = "" if call.excinfo is None else call.excinfo.exconly()
        caught = report.outcome == "failed" and report.when == "call" and asserted
        lines = [line.strip() for line in error.splitlines() if line.strip()]
        _write(
            test=item.nodeid,
            when=report.when,
            outcome=report.outcome,
            caught=caught,
            error=" ".join(lines[:2])[:200],
        )
        if caught:
            item.session.shouldstop = "caught"


def pytest_sessionfinish(session, exitstatus):
    _write(exit=int(exitstatus))
