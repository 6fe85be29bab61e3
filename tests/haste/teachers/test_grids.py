from __future__ import annotations

import numpy as np
import pytest
import torch
from haste.teachers.grids import cut_patches, resample_table, resample_tokens
from PIL import Image


@pytest.mark.parametrize("grid", [2, 5, 9])
def test_tokens_are_resampled_as_an_image_is(grid):
    """Bilinear with antialiasing, as Pillow does it."""
    tokens = torch.randn(2, 3, 16, 5)
    resampled = resample_tokens(tokens, 4, grid)
    assert resampled.shape == (2, 3, grid**2, 5) and resampled.is_contiguous()
    image = Image.fromarray(tokens[1, 2, :, 3].view(4, 4).numpy()).resize((grid, grid), Image.Resampling.BILINEAR)
    expected = torch.from_numpy(np.array(image)).flatten()
    torch.testing.assert_close(resampled[1, 2, :, 3], expected, rtol=1e-5, atol=1e-6)


def test_tokens_keep_their_type_and_a_grid_that_fits_keeps_its_tokens():
    tokens = torch.randn(1, 2, 16, 3, dtype=torch.bfloat16)
    assert resample_tokens(tokens, 4, 4) is tokens
    assert resample_tokens(tokens, 4, 3).dtype == torch.bfloat16


def test_a_linear_ramp_of_positions_stays_one_inside_and_the_prefix_stays():
    ramp = torch.arange(8.0).repeat(8, 1).view(64, 1)  # the column's number
    table = torch.cat([torch.tensor([[-1.0], [-2.0]]), ramp])
    resampled = resample_table(table, 8, 16, "bicubic")
    assert resampled.shape == (2 + 256, 1)
    assert resampled[:2].flatten().tolist() == [-1.0, -2.0]
    columns = resampled[2:].view(16, 16)[5, 4:12]
    torch.testing.assert_close(columns, (torch.arange(4.0, 12.0) + 0.5) / 2 - 0.5)


def test_patches_run_row_by_row_with_channels_last():
    images = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    patches = cut_patches(images, 2)
    assert patches.shape == (2, 6, 12)
    torch.testing.assert_close(patches[1, 4], images[1, :, 2:4, 2:4].permute(1, 2, 0).flatten())
