"""Every loss is compiled whole, what our recipes for a GPU compile once for all steps; and gives what it gives else."""

import json
from pathlib import Path

import pytest

from forked import python
from meeting import outputs

PATIENCE = 900  # seconds, on a busy machine


@pytest.mark.nightly
def test_losses_compile_whole_and_our_recipes_for_a_gpu_once(tmp_path: Path) -> None:
    """Guided ones too, whatever the number of the rows that guidance needs; of each kind of recipe one."""
    ((out, _),) = outputs([python("from unit.training.whole import main; main()", cwd=tmp_path)], PATIENCE)
    found, wholes = json.loads(out.splitlines()[-1])
    assert all(wholes.values()), wholes
    assert {"PlainStep", "DuMo", "TwinFlow", "Outside"} <= {case.split()[0] for case in wholes}
    names = {case.split()[0] for case in found}
    assert {"imagenet256-xl2-dual", "my-images", "inductor", "learned", "given", "tread", "checkpointed"} <= names
    for name in names:
        # Blocks of two kinds are compiled for training, for recomputing activations and for guidance.
        for choice, most in (("blocks", 10 if name == "checkpointed" else 5), ("loss", 1)):
            if (case := f"{name} {choice}") in found:
                plain, none = found.get(f"{name} none for {choice}", found[f"{name} none"])
                assert none == [0] * len(plain)
                losses, graphs = found[case]
                assert losses == pytest.approx(plain, rel=1e-4 if name == "inductor" else 1e-3), case
                assert graphs == [graphs[0], *[graphs[1]] * (len(plain) - 1)], case  # two numbers of rows, then any
                assert graphs[-1] <= most, case
