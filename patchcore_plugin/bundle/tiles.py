"""Tiles: a large input is cut into parts, which the network embeds one by one, and their embeddings are put together.

The geometry is that of anomalib's tiler: tiles begin at multiples of the stride, those at the right and bottom edge reach
beyond the input, which is filled with zeros there, and where tiles overlap, embeddings are averaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Self

MAX_INPUT_SIDE = 16_384
"""Longest side of the network's input, in pixels."""

MAX_TILES = 10_000
"""Most tiles of an input."""

Side = Annotated[int, Field(ge=1, le=MAX_INPUT_SIDE)]
Size = tuple[Side, Side]


class Tiles(BaseModel):
    """How the network's input is cut into tiles.

    Attributes:
        size: Height and width of a tile, in pixels.
        stride: Rows and columns from one tile to the next, in pixels; at most the size.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: Size
    stride: Size

    @model_validator(mode="after")
    def _check_stride(self) -> Self:
        if self.stride[0] > self.size[0] or self.stride[1] > self.size[1]:
            msg = f"the stride {self.stride} of tiles is larger than their size {self.size}, which leaves pixels out"
            raise ValueError(msg)
        return self

    def check_input(self, size: tuple[int, int]) -> None:
        """Refuse an input that is smaller than a tile, or has too many.

        Args:
            size: Height and width of the input, in pixels.

        Raises:
            ValueError: If a tile is larger, or there are more than 10,000 tiles.
        """
        if self.size[0] > size[0] or self.size[1] > size[1]:
            msg = f"tiles of {self.size} pixels (height, width) are larger than the input of {tuple(size)}"
            raise ValueError(msg)
        down, across = self._counts(size)
        if down * across > MAX_TILES:
            msg = f"{down} x {across} tiles are more than {MAX_TILES:,}: take larger ones, or a larger stride"
            raise ValueError(msg)

    def places(self, size: tuple[int, int], inspected: NDArray[np.bool_] | None = None) -> list[tuple[int, int]]:
        """First row and column of each tile of an input, row by row. Arguments and errors are those of :meth:`layout`."""
        self.check_input(size)
        down, across = self._counts(size)
        places = [(row * self.stride[0], column * self.stride[1]) for row in range(down) for column in range(across)]
        if inspected is None:
            return places
        height, width = self.size
        return [(top, left) for top, left in places if inspected[top : top + height, left : left + width].any()]

    def layout(
        self, size: tuple[int, int], cells: tuple[int, int], inspected: NDArray[np.bool_] | None = None
    ) -> TileLayout:
        """Place the tiles in an input, and their embeddings in its patch grid.

        Args:
            size: Height H and width W of the input, in pixels.
            cells: Rows and columns of the patch grid of one tile.
            inspected: Pixels of the input (H, W) that are inspected; None for all. Tiles without any are left out.

        Raises:
            ValueError: If the patches of tiles do not lie on one grid, or the tiles do not fit the input.
        """
        for tile, stride, count in zip(self.size, self.stride, cells, strict=True):
            pixels = tile // count
            if pixels * count != tile or stride % pixels:
                msg = (
                    f"tiles of {self.size} pixels with stride {self.stride} have {cells} patches, which do not lie on one "
                    f"grid: take multiples of {pixels} pixels"
                )
                raise ValueError(msg)
        places = self.places(size, inspected)
        pixels = self.size[0] // cells[0], self.size[1] // cells[1]
        grid = -(-size[0] // pixels[0]), -(-size[1] // pixels[1])
        windows = [
            (
                slice(top // pixels[0], min(top // pixels[0] + cells[0], grid[0])),
                slice(left // pixels[1], min(left // pixels[1] + cells[1], grid[1])),
            )
            for top, left in places
        ]
        counts = np.zeros(grid, np.float32)
        for window in windows:
            counts[window] += 1
        return TileLayout(places, windows, grid, np.maximum(counts, 1))

    def padded(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of an input that is filled with zeros as far as the tiles reach.

        Args:
            size: Height and width of the input, in pixels.
        """
        height, width = ((n - 1) * s + t for n, s, t in zip(self._counts(size), self.stride, self.size, strict=True))
        return height, width

    def _counts(self, size: tuple[int, int]) -> tuple[int, int]:
        """Tiles down and across."""
        down, across = (
            -(-max(side - tile, 0) // stride) + 1 for side, tile, stride in zip(size, self.size, self.stride, strict=True)
        )
        return down, across


@dataclass(frozen=True)
class TileLayout:
    """Where the tiles of an input lie.

    Attributes:
        places: First row and column of each tile, in pixels of the input.
        windows: Rows and columns of each tile's embedding in the patch grid; patches beyond the grid are cut off.
        grid: Rows h and columns w of the input's patch grid.
        counts: Number of tiles that have each patch (h, w), float32; 1 where there is none.
    """

    places: list[tuple[int, int]]
    windows: list[tuple[slice, slice]]
    grid: tuple[int, int]
    counts: NDArray[np.float32]

    @property
    def overlap(self) -> bool:
        """Whether any patch is in several tiles."""
        return bool((self.counts > 1).any())
