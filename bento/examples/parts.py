"""A second service on top of this one: it decides on a part by pictures from several sides.

    PATCHCORE_BUNDLE=bundle bentoml serve bento.examples.parts:Parts
    curl --form images=@top.png --form images=@left.png http://127.0.0.1:3000/inspect

BentoML starts PatchcoreService in a process of its own, which only this service can reach; /metrics shows those of both.
This service answers this computer alone, by ``http`` below. PATCHCORE_HOST, PATCHCORE_API_KEY and the like guard
PatchcoreService, not this service, whose requests BentoML reads: put a proxy before it where others are to reach it.

The page and the record's routes of PatchcoreService have no address then. Where they are needed, run PatchcoreService by
itself, and let this service depend on its URL, ``bentoml.depends(PatchcoreService, url="http://127.0.0.1:3001")``, with its
key in the environment variable BENTO_CLOUD_API_KEY.
"""

from __future__ import annotations

import bentoml
from patchcore_plugin.bento.methods import ImageInput
from patchcore_plugin.bento.service import PatchcoreService
from pydantic import BaseModel


class Part(BaseModel):
    """Decision on a part.

    Attributes:
        accepted: Whether every picture is normal.
        reasons: What is wrong, a sentence for each picture that is not normal or cannot be read.
    """

    accepted: bool
    reasons: list[str]


@bentoml.service(name="parts", http={"host": "127.0.0.1"})
class Parts:
    """Accepts a part if PatchCore calls the pictures of all its sides normal."""

    patchcore = bentoml.depends(PatchcoreService)

    @bentoml.api
    async def inspect(self, images: list[ImageInput], model: str | None = None) -> Part:
        """Decide on a part by pictures of its sides."""
        batch = await self.patchcore.predict_batch(images=images, model=model)
        reasons = []
        for item in batch.results:
            if item.problem is not None:
                reasons.append(item.problem.detail)
            elif item.answer.verdict != "normal":
                reasons.append(f"{item.name} is {item.answer.verdict}: {item.answer.ratio:.2f} of the limit")
        return Part(accepted=not reasons, reasons=reasons)
