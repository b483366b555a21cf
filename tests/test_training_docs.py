"""docs/training.md: every configuration in it is one that `pyoffline train` accepts, and every name
of an objective in it exists.
"""

import re
from pathlib import Path

import pytest
import yaml

pytest.importorskip("transformers")

from pyoffline.config import parse_config  # noqa: E402
from pyoffline.config_objective import DIVERGENCES, known_names  # noqa: E402

TEXT = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
BLOCKS = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)]
COMMON = BLOCKS[0] | {"trainer": BLOCKS[0]["trainer"] | {"use_cpu": True}}


@pytest.mark.parametrize("block", BLOCKS[1:], ids=lambda b: b["objective"]["name"])
def test_each_configuration_is_accepted(block):
    errors = []
    config = parse_config(COMMON | block, errors)
    assert not errors and config.objective == block["objective"]


def test_there_is_one_for_each_family_and_the_help_names_them():
    from pyoffline.cli import TRAIN

    names = {block["objective"]["name"] for block in BLOCKS[1:]}
    assert names == {"ppo_clip", "gspo", "renyi_rwr", "dpo", "distill", "bradley_terry"}
    families = TRAIN.split("families of `objective`")[1]
    listed = re.findall(r"\b[a-z]+(?:_[a-z]+)*\b", families.partition(":\n")[2])
    assert names <= set(listed)
    inline = set(re.findall(r"name: (\w+)", TEXT)) | set(re.findall(r"divergence: (\w+)", TEXT))
    known = {*known_names(), *DIVERGENCES, "group_normalize", "reward", "leave_one_out"}
    assert inline <= known
