"""Laws of rows of text by number."""

import torch

from dumo.nets.rows import Rows


def test_a_caption_edits_its_own_image() -> None:
    source = torch.randn(4, 2, 3, 3, dtype=torch.float16)
    rows = Rows(torch.zeros(4, 5, 8), None, None, source=source)
    c = torch.tensor([2, 0, 2])
    found = rows.sources(c)
    assert found is not None
    assert torch.equal(found, source[c].float())
    assert Rows(torch.zeros(4, 5, 8), None, None).sources(c) is None
