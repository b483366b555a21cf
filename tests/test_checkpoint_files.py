"""Random numbers of a checkpoint that are missing or damaged stop a resume (PROMISES T2)."""

import pytest
import torch

pytest.importorskip("transformers")

from trainer_cases import make_trainer, samples  # noqa: E402

from pyoffline import checkpoint  # noqa: E402
from pyoffline.token_objectives import NLL  # noqa: E402


@pytest.mark.parametrize("damage", ["missing", "cut", "without torch's"])
def test_t2_a_run_does_not_resume_without_its_random_numbers(tmp_path, damage):
    trainer, _ = make_trainer(tmp_path, samples(4), NLL(), keep=frozenset())
    trainer._save_rng_state(str(tmp_path))
    trainer._load_rng_state(str(tmp_path))
    path = tmp_path / "rng_state_0.safetensors"
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    else:
        with checkpoint.safe_open(path, framework="pt") as file:
            meta = file.metadata()
        checkpoint.save_file({"numpy": torch.zeros(624, dtype=torch.int64)}, path, metadata=meta)
    with pytest.raises(Exception, match="rng_state_0|header|incomplete|torch") as caught:
        trainer._load_rng_state(str(tmp_path))
    assert not isinstance(caught.value, AssertionError)
