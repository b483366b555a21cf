"""10^3 random calls of the C++ boundary in a subprocess (PROMISES M1); `make fuzz` runs 10^5."""

import json
import subprocess
import sys
from pathlib import Path


def test_a_thousand_random_calls_kill_nothing():
    script = Path(__file__).with_name("fuzz_bindings.py")
    done = subprocess.run(
        [sys.executable, str(script), "--count", "1000", "--seed", "1"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr[-3000:]}"
    counts = json.loads(done.stdout)
    assert counts["valid"] >= 100, counts
    assert counts["ValueError"] and counts["TypeError"] and counts["IndexError"], counts
