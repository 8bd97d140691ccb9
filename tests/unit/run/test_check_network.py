"""Images with more patches along a side than a pretrained model has positions for are refused."""

import pytest

from dumo.data.in_memory import Memory
from dumo.run import check_network
from dumo.types import UserError


@pytest.mark.parametrize("shape", [(4, 32, 96), (4, 96, 32)])
def test_the_longer_side_is_counted(shape: tuple[int, ...]) -> None:
    """Images need not be squares: those of 96 pixels and patches of 2 have 48 a side."""
    data = Memory(name="array", shape=shape, classes=0, digest="")
    check_network._check_positions(data, patch=2, max_patches=48)
    with pytest.raises(UserError, match=r"data\.side=80"):
        check_network._check_positions(data, patch=2, max_patches=40)
