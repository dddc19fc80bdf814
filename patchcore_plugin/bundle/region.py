"""The region of interest: which pixels of the network's input are inspected, and so which patches."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Self

_MAX_RUNS = 1_000_000


class RegionOfInterest(BaseModel):
    """The pixels of the network's input that are inspected.

    Attributes:
        size: Height H and width W of the network's input, in pixels.
        runs: Lengths of the runs of pixels, row by row: of pixels outside first (0 if the first pixel lies inside), then
            inside and outside by turns.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: tuple[Annotated[int, Field(ge=1, strict=True)], Annotated[int, Field(ge=1, strict=True)]]
    runs: Annotated[tuple[Annotated[int, Field(ge=0, strict=True)], ...], Field(min_length=2, max_length=_MAX_RUNS)]

    @model_validator(mode="after")
    def _check_runs(self) -> Self:
        if 0 in self.runs[1:] or sum(self.runs) != self.size[0] * self.size[1]:
            msg = f"runs do not make {self.size[1]} x {self.size[0]} pixels"
            raise ValueError(msg)
        return self

    @classmethod
    def of(cls, pixels: NDArray[np.bool_]) -> Self:
        """Make the region of a mask.

        Args:
            pixels: Whether each pixel of the network's input is inspected (H, W).
        """
        flat = np.concatenate([[False], pixels.ravel(), [not pixels.flat[-1]]])
        changes = np.flatnonzero(np.diff(flat))
        return cls(size=pixels.shape, runs=tuple(np.diff(changes, prepend=0).tolist()))

    @property
    def pixels(self) -> NDArray[np.bool_]:
        """Whether each pixel of the network's input is inspected (H, W)."""
        return _pixels(self)

    @property
    def share(self) -> float:
        """Share of the network's input that is inspected."""
        return float(self.pixels.mean())

    def at(self, size: tuple[int, int]) -> NDArray[np.bool_]:
        """Whether the center of each cell of another grid (h, w) over the same picture lies inside."""
        rows, columns = (
            ((2 * np.arange(cells) + 1) * pixels) // (2 * cells) for cells, pixels in zip(size, self.size, strict=True)
        )
        return self.pixels[rows[:, None], columns]

    def patches(self, grid: tuple[int, int]) -> NDArray[np.int64]:
        """Numbers of the inspected patches of a grid (h, w), counted row by row: those whose center lies inside."""
        return np.flatnonzero(self.at(grid))


@lru_cache(maxsize=32)
def _pixels(region: RegionOfInterest) -> NDArray[np.bool_]:
    inside = np.arange(len(region.runs)) % 2 == 1
    pixels = np.repeat(inside, region.runs).reshape(region.size)
    pixels.flags.writeable = False
    return pixels
