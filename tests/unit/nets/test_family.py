"""Laws of how models of others are called, which need no model."""

import torch

from dumo.nets.family import Inputs, kontext


def test_an_image_to_edit_has_places_of_its_own() -> None:
    """FLUX.1 Kontext tells its tokens from those of the sample by the first axis alone."""
    x, source = torch.zeros(2, 6, 4), torch.ones(2, 6, 4)
    inputs = Inputs(
        x=x,
        time=torch.zeros(2),
        tokens=torch.zeros(2, 5, 8),
        mask=None,
        pooled=None,
        guidance=None,
        grid=(2, 3),
        lengths=None,
        source=source,
    )
    given = kontext(inputs)
    assert torch.equal(given["hidden_states"], torch.cat([x, source], 1))
    sample, edited = given["img_ids"].split(6)
    assert sample[:, 0].tolist() == [0] * 6
    assert edited[:, 0].tolist() == [1] * 6
    assert torch.equal(sample[:, 1:], edited[:, 1:])
