"""What a net cannot take is refused with the numbers of the longer side."""

import pytest

from dumo.data.memory import Memory
from dumo.run import mismatch


@pytest.mark.parametrize("shape", [(4, 32, 96), (4, 96, 32)])
def test_the_longer_side_is_counted(shape: tuple[int, ...]) -> None:
    """Images need not be squares: those of 96 pixels and patches of 2 have 48 a side."""
    data = Memory(name="array", shape=shape, classes=0, digest="")
    _, height, width = shape
    (fault,) = mismatch._position_faults(data, patch=2, max_patches=40, default_side=64)
    images = f"images of {height} x {width} pixels have 48"
    assert f"{images}: set data.side=80 or less (the pipeline's default is 64)" in fault
