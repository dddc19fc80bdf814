"""BentoML's clients, and a second service that depends on this one."""

from __future__ import annotations

import asyncio
import io
import pickle
import socket
import struct

import bentoml
import numpy as np
import pytest
import uvicorn
from bentoml.exceptions import BentoMLException, InvalidArgument, NotFound
from helpers.bundles import change_manifest
from helpers.http import without_times
from helpers.server import BENTOML, SERVE, app_server, bentoml_serve
from helpers.training import ROOT
from patchcore_plugin.bento.methods import ROUTES, ImageStream, PatchcoreMethods, describe_methods
from patchcore_plugin.bento.server import UnixSocketOnlyMiddleware
from PIL import Image
from pydantic import ValidationError

PARTS = (*BENTOML, "serve", "bento.examples.parts:Parts")

SECOND = """
import io, os
import bentoml
import numpy as np
from PIL import Image
from pathlib import Path
from patchcore_plugin.bento.service import PatchcoreService

@bentoml.service
class Second:
    first = bentoml.depends(PatchcoreService, url=os.environ["FIRST"])

    @bentoml.api
    async def ask(self, path: str) -> dict:
        content, image = Path(path).read_bytes(), np.asarray(Image.open(path))
        forms = [Path(path), path, content, io.BytesIO(content), image, Image.fromarray(image), open(path, "rb")]
        answers = [await self.first.predict(image=form) for form in forms]
        answers += [item.answer for item in (await self.first.predict_batch(images=forms[:3])).results]
        answers += [await self.first.explain(image=content), await self.first.to_async.predict(image=image, heatmap=True)]
        return {
            "scores": [answer.score for answer in answers],
            "vector": answers[-2].reasons[0].nearest.vector,
            "size": (await self.first.heatmap(image=content)).size,
            "models": [model.name for model in (await self.first.models()).models],
        }
"""


@pytest.fixture
def expected(client, test_images):
    """What the first test image is answered over HTTP."""
    answer = client.post("/predict", files={"image": test_images[0].read_bytes()}).json()
    return without_times(answer)


def pictures(path):
    """An image file in all forms that are read without the service's module."""
    content = path.read_bytes()
    return [path, str(path), Image.open(path), Image.open(io.BytesIO(content))]


def test_schema(client):
    from patchcore_plugin.bento.service import PatchcoreService

    told = client.get("/schema.json").json()
    assert told == describe_methods()
    routes = {route["name"]: route for route in PatchcoreService.schema()["routes"]}
    assert {route["name"]: {**route, "output": None} for route in told["routes"]} == {
        name: {**route, "output": None} for name, route in routes.items()
    }
    assert routes["heatmap"]["output"] in [route["output"] for route in told["routes"]]
    for route in told["routes"]:
        if route["name"] != "heatmap":
            fields = PatchcoreService.apis[route["name"]].output_spec.model_fields
            assert set(route["output"]["properties"]) == set(fields)


def test_client_of_a_model_without_a_threshold(bundle_copy, test_images):
    """It answers null for the regions."""
    change_manifest(bundle_copy, image={}, pixel={})
    with app_server(bundle=bundle_copy) as server, bentoml.SyncHTTPClient(str(server), server_ready_timeout=0) as client:
        assert client.predict(image=test_images[0])["regions"] is None


def test_client(server, test_images, expected):
    first = test_images[0]
    with bentoml.SyncHTTPClient(str(server)) as client:
        for image in pictures(first):
            assert without_times(client.predict(image=image)) == expected
        assert without_times(client.predict(first, "cells", heatmap=False)) == expected
        assert client.predict(image=first, heatmap=True)["heatmap"].startswith("iVBOR")
        batch = client.predict_batch(images=[first, Image.open(first), test_images[1]])["results"]
        assert [item["answer"]["score"] for item in batch[:2]] == [expected["score"]] * 2
        assert batch[2]["name"] == test_images[1].name
        for kind, mode in (("overlay", "RGB"), ("map", "I;16")):
            drawn = client.heatmap(image=first, kind=kind)
            raw = server.client.post(f"/heatmap?kind={kind}", files={"image": first.read_bytes()})
            assert drawn.mode == mode
            assert np.array_equal(drawn, Image.open(io.BytesIO(raw.content)))
        assert client.explain(image=first)["reasons"]
        assert client.models() == server.client.get("/models").json()


def test_asynchronous_client(server, test_images, expected):
    async def predict(image):  # a client closes the files of all its calls when one ends, so that each call has its own
        async with bentoml.AsyncHTTPClient(str(server)) as client:
            return await client.predict(image=image)

    async def ask():
        answers = await asyncio.gather(*map(predict, pictures(test_images[0])))
        async with bentoml.AsyncHTTPClient(str(server)) as client:
            return answers, await client.models(), await client.heatmap(image=test_images[0])

    answers, models, drawn = asyncio.run(ask())
    assert [without_times(answer) for answer in answers] == [expected] * 4
    assert models["models"][0]["name"] == "cells"
    assert drawn.size == (300, 300)


def test_errors_of_a_client(server, test_images, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    with bentoml.SyncHTTPClient(str(server)) as client:
        for call, kind, code in (
            (lambda: client.predict(image=tmp_path / "text.png"), InvalidArgument, "image_unreadable"),
            (lambda: client.predict(image=test_images[0], model="other"), NotFound, "model_unknown"),
            (lambda: client.predict(image="http://127.0.0.1:9/cell.png"), BentoMLException, "unsupported_media_type"),
            (
                lambda: client.predict_batch(images=["http://127.0.0.1:9/cell.png", test_images[0]]),
                InvalidArgument,
                "images",
            ),
            (lambda: client.predict(image=test_images[0], model=7), InvalidArgument, "field_invalid"),
            (lambda: client.predict(image=test_images[0], heatmap="maybe"), InvalidArgument, "field_invalid"),
            (lambda: client.heatmap(image=test_images[0], kind="photo"), InvalidArgument, "field_invalid"),
            (lambda: client.heatmap(image=test_images[0], kind=["map"]), InvalidArgument, "field_invalid"),
            (lambda: client.predict_batch(images=[]), BentoMLException, "unsupported_media_type"),
        ):
            with pytest.raises(kind, match=code):
                call()
        with pytest.raises(TypeError, match="Missing required arguments"):
            client.predict()
        with pytest.raises(TypeError, match="not found in endpoint"):
            client.predict(image=test_images[0], threshold=1)


def test_key_of_a_client(bundle, test_images):
    with app_server(bundle=bundle, api_key="line-7") as server:
        ready = {"server_ready_timeout": 0}  # BentoML's own route
        with bentoml.SyncHTTPClient(str(server), token="line-7", **ready) as client:
            assert client.predict(image=test_images[0])["verdict"]
        with pytest.raises(BentoMLException, match="Failed to fetch schema"):
            bentoml.SyncHTTPClient(str(server), token="line-8", **ready)


def test_fields_of_other_clients_are_taken_as_they_are(client, test_images):
    files = {"image": test_images[0].read_bytes()}
    for name in ("null", '"cells"'):
        assert client.post("/predict", files=files, data={"model": name}).json()["code"] == "model_unknown"


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("http://127.0.0.1:9/cell.png", "URLs are not fetched"),
        ("absent.png", "No such file"),
        (7, "got int"),
        (None, "got NoneType"),
        (io.StringIO("text"), "got StringIO"),
        (np.zeros((4, 4, 3)), "float64, cannot be sent"),
        (np.zeros((0, 4), np.uint8), "cannot be sent"),
        (np.zeros((4, 4, 4), np.uint8), "cannot be sent"),
        (np.array([], object), "cannot be sent"),
        (Image.new("F", (4, 4)), "mode F cannot be sent"),
        (Image.new("CMYK", (4, 4)), "mode CMYK cannot be sent"),
    ],
)
def test_what_is_no_image(image, message):
    with pytest.raises(ValueError, match=message):
        ImageStream.of(image)
    with pytest.raises(ValidationError, match=message):
        PatchcoreMethods.predict.input_spec.from_inputs(image=image)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_arrays_keep_their_values(dtype):
    image = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (7, 5), dtype)
    assert np.array_equal(Image.open(ImageStream.of(image)), image)
    assert np.array_equal(Image.open(ImageStream.of(Image.fromarray(image))), image)


def test_second_service(bundle, test_images, tmp_path):
    """In processes of their own: the first one is called through a Unix socket, by methods."""
    (tmp_path / "text.png").write_text("no picture")
    with bentoml_serve(PARTS, tmp_path, cwd=ROOT, PATCHCORE_BUNDLE=str(bundle), PATCHCORE_API_KEY="line-7") as server:
        paths = [*test_images[:2], tmp_path / "text.png"]
        files = [("images", (path.name, path.read_bytes())) for path in paths]
        told = server.client.post("/inspect", files=files)
        assert told.status_code == 200, told.text
        with app_server(bundle=bundle) as alone:
            batch = alone.client.post("/predict_batch", files=files).json()["results"]
        anomalous = [item for item in batch[:2] if item["answer"]["verdict"] == "anomalous"]
        assert told.json()["accepted"] is False
        assert len(told.json()["reasons"]) == len(anomalous) + 1
        assert "'text.png' cannot be read as an image" in told.json()["reasons"][-1]

        unknown = server.client.post("/inspect", files=files[:1], data={"model": "other"})
        assert unknown.status_code == 404
        assert "model_unknown" in unknown.text
        assert server.client.post("/predict", files={"image": files[0][1]}).status_code == 404
        assert len(server.children()) == 2
        assert 'route="/predict_batch"' in server.client.get("/metrics").text, "BentoML shows those of both"
    assert server.log.read_text(errors="replace").count('path="/predict_batch"') == 2


def test_service_that_depends_on_an_address(bundle, test_images, expected, tmp_path):
    """Over HTTP, by methods that know the types: of bytes, streams and arrays too, and of answers that are objects."""
    (tmp_path / "second.py").write_text(SECOND)
    with (
        bentoml_serve(SERVE, tmp_path, PATCHCORE_BUNDLE=str(bundle), PATCHCORE_API_KEY="line-7") as first,
        bentoml_serve(
            (*BENTOML, "serve", "second:Second"), tmp_path, FIRST=str(first), BENTO_CLOUD_API_KEY="line-7"
        ) as second,
    ):
        answer = second.client.post("/ask", json={"path": str(test_images[0])})
    assert answer.status_code == 200, second.log.read_text()
    assert answer.json()["scores"] == [expected["score"]] * 12
    assert answer.json()["vector"] >= 0
    assert answer.json()["size"] == [300, 300]
    assert answer.json()["models"] == ["cells"]


def test_methods_in_the_own_process(bundle, test_images, expected):
    """As in a unit test of a service that depends on this one."""
    from patchcore_plugin.bento.service import make_service
    from patchcore_plugin.bento.settings import Settings

    service = make_service(Settings(bundle=bundle))()
    try:
        answer = asyncio.run(service.predict(image=test_images[0]))
        assert answer.score == expected["score"]
        assert asyncio.run(service.heatmap(image=test_images[0].read_bytes(), kind="map")).mode == "I;16"
        for image, options, kind in (("absent.png", {}, InvalidArgument), (test_images[0], {"model": "other"}, NotFound)):
            with pytest.raises(kind):
                asyncio.run(service.predict(image=image, **options))
    finally:
        service.pipeline.close()


def test_pickles_from_outside_are_refused(server, tmp_path):
    class Written:
        def __reduce__(self):
            return (open, (str(tmp_path / "unpickled"), "x"))

    content, kind = pickle.dumps({"image": Written()}), "application/vnd.bentoml+pickle"
    for path in ROUTES.values():
        response = server.client.post(path, content=content, headers={"content-type": kind})
        assert path == "/models" or response.status_code == 415
    assert not (tmp_path / "unpickled").exists()


def test_connection_that_has_ended_is_not_taken_for_the_own_one():
    """A connection that its client has reset before it is taken has no client's address, and its request is still read."""
    seen = []

    class Noted(UnixSocketOnlyMiddleware):
        async def handle(self, scope, receive, send):
            seen.append((scope["client"], await receive()))
            await super().handle(scope, receive, send)

    async def inner(scope, receive, send):
        seen.append("taken")

    async def serve():
        listener = socket.create_server(("127.0.0.1", 0))
        client = socket.create_connection(listener.getsockname())
        client.sendall(b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\n\r\nx")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        served = uvicorn.Server(uvicorn.Config(Noted(inner), lifespan="off", log_level="error"))
        task = asyncio.create_task(served.serve([listener]))
        await asyncio.sleep(1)
        served.should_exit = True
        await task

    asyncio.run(serve())
    assert seen, "the request was not read"
    assert "taken" not in seen
