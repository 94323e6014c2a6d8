"""Attention masks on a token grid, row-major: token index = row * width + column.

Masks are boolean, shape (L, L) with one row per query, and True means *this key may be attended to*, as
`torch.nn.functional.scaled_dot_product_attention` reads them. A module builds its mask once and keeps it as a buffer.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _two(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def window_mask(grid: tuple[int, int], window: int | tuple[int, int]) -> Tensor:
    """True where the key lies inside the window centred on the query, the query's own position included.

    grid: (height, width) in tokens. window: side, or (height, width), in tokens; the half-width is `window // 2`, so
    an even size covers the same tokens as the next odd one (8 acts as 9) as in the released code of UniAD. Windows
    are clipped at the border. Returns bool (L, L), L = height * width. Raises ValueError for a window below 1.
    """
    height, width = grid
    rows_window, columns_window = _two(window)
    if min(rows_window, columns_window) < 1:
        raise ValueError(
            f"The window must be at least 1 token wide, found {window}. To switch masking off, use no mask."
        )
    rows, columns = torch.arange(height), torch.arange(width)
    near_row = (rows[:, None] - rows).abs() <= rows_window // 2  # (height, height)
    near_column = (columns[:, None] - columns).abs() <= columns_window // 2  # (width, width)
    near = near_row[:, None, :, None] & near_column[None, :, None, :]  # (height, width, height, width)
    return near.reshape(height * width, height * width)


def neighbor_mask(grid: tuple[int, int], window: int | tuple[int, int]) -> Tensor:
    """True where the key lies *outside* the window: the neighbour mask of UniAD and UniAS, and RLR's MLKA.

    Exactly the complement of `window_mask`, with the same arguments and shape. Raises ValueError for a window that
    would leave some query without a single visible key, because a softmax over nothing is not a number.
    """
    height, width = grid
    rows_window, columns_window = _two(window)
    visible = ~window_mask(grid, window)
    blind = int((~visible.any(dim=1)).sum())
    if blind:
        raise ValueError(
            f"A neighbour window of {rows_window}x{columns_window} hides every token from {blind} of the "
            f"{height * width} positions of a {height}x{width} grid, and attention over nothing is undefined. "
            f"Choose a window smaller than {height // 2 * 2} rows or smaller than {width // 2 * 2} columns, "
            "or a finer feature grid."
        )
    return visible
