"""Pictures as patches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tutti.objectives.terms.patches import averaged, to_patches


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_averaged_is_average_pooling_to_the_last_bit_on_bytes(factor: int) -> None:
    bytes_ = torch.randint(0, 256, (5, 3, 12, 24)).to(torch.float32)
    assert torch.equal(averaged(bytes_, factor), F.avg_pool2d(bytes_, factor))
    floats = torch.rand(5, 3, 12, 24)
    torch.testing.assert_close(averaged(floats, factor), F.avg_pool2d(floats, factor))


def test_a_patch_holds_its_own_square_row_by_row_and_colour_last() -> None:
    images = torch.arange(1 * 2 * 3 * 4 * 4, dtype=torch.float64).reshape(1, 2, 3, 4, 4)
    patches = to_patches(images, grid=2, downsample=1, dtype=torch.float64)
    assert patches.shape == (1, 8, 12)
    square = images[0, 1, :, 2:4, 0:2]  # second view, lower left
    assert torch.equal(patches[0, 6], square.permute(1, 2, 0).flatten())
    coarse = to_patches(images, grid=2, downsample=2, dtype=torch.float64)
    assert torch.equal(coarse[0, 6], square.mean((1, 2)))
