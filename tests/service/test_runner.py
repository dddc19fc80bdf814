"""Scoring in a process of its own: answers are the same as in one process."""

import json
import shutil
from dataclasses import fields

import numpy as np
import pytest
from helpers.bundles import set_intensity_range
from helpers.http import predict, predict_batch, without_times
from helpers.pictures import encoded
from helpers.server import SERVE, app_server, bentoml_serve
from patchcore_plugin.bento.runner import from_message, to_message
from patchcore_plugin.bento.scorer import Scored
from PIL import Image

from patchcore_plugin import PatchcoreRuntime
from patchcore_plugin.bundle import BundleError


@pytest.fixture(scope="module")
def bundles(bundle, calibrated, tmp_path_factory):
    """A folder of two bundles, of which one has a calibration, of one for deep images, and of a damaged one."""
    folder = tmp_path_factory.mktemp("bundles")
    shutil.copytree(bundle, folder / "cells")
    shutil.copytree(calibrated, folder / "my_part")
    shutil.copytree(bundle, folder / "torn")
    shutil.copytree(bundle, folder / "deep")
    set_intensity_range(folder / "deep", [0, 65535])
    (folder / "torn" / "bank.faiss").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def server(bundles, tmp_path_factory):
    """A BentoML server with a runner's process."""
    environment = {
        "PATCHCORE_BUNDLE": "",
        "PATCHCORE_BUNDLES": str(bundles),
        "PATCHCORE_DEFAULT_MODEL": "cells",
        "PATCHCORE_RUNNER": "process",
        "PATCHCORE_LOG": "json",
    }
    with bentoml_serve(SERVE, tmp_path_factory.mktemp("runner"), **environment) as server:
        yield server


def test_same_answers_as_in_one_process(server, bundles, test_images):
    """From /predict, /predict_batch, /explain and /heatmap."""
    image = {"image": test_images[0].read_bytes()}
    batch = [path.read_bytes() for path in test_images[:6]]
    with app_server(bundles=bundles, default_model="cells") as one_process:
        clients = server.client, one_process.client
        for model in ("cells", "my_part"):
            for path in (f"/predict?heatmap=true&model={model}", f"/explain?model={model}"):
                ours, theirs = (client.post(path, files=image).json() for client in clients)
                assert theirs["model"] == model
                assert without_times(ours) == without_times(theirs), path
        for kind in ("overlay", "map"):
            ours, theirs = (client.post(f"/heatmap?kind={kind}", files=image) for client in clients)
            assert ours.content == theirs.content
        ours, theirs = ([without_times(answer) for answer in predict_batch(client, batch)] for client in clients)
        assert ours == theirs


def test_problems(server, test_images):
    for path in ("/predict", "/explain"):
        unreadable = server.client.post(path, files={"image": b"x"})
        assert (unreadable.status_code, unreadable.json()["code"]) == (400, "image_unreadable")
        torn = server.client.post(f"{path}?model=torn", files={"image": test_images[0].read_bytes()})
        assert (torn.status_code, torn.json()["code"]) == (503, "model_unavailable")
        assert "bank.faiss" not in torn.text
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    assert any("bank.faiss has 0 bytes" in line["message"] for line in lines)
    assert any(line["message"] == "request" and line["code"] == "model_unavailable" for line in lines if "code" in line)


def test_deep_images(server, test_images):
    """A model scales deep images by its own range; an image that it cannot read is a problem of that image alone."""
    pixels = np.asarray(Image.open(test_images[0]).convert("L"))
    deep = encoded(Image.fromarray(pixels.astype(np.uint16) * 257))
    expected = predict(server.client, test_images[0], model="cells").json()
    assert predict(server.client, deep, model="deep").json()["score"] == pytest.approx(expected["score"], rel=1e-6)
    files = [
        ("images", ("deep.png", deep)),
        ("images", ("plain.png", test_images[0].read_bytes())),
        ("images", ("b.png", deep)),
    ]
    answers = server.client.post("/predict_batch?model=deep", files=files).json()["results"]
    assert [answer["answer"] is None for answer in answers] == [False, True, False]
    assert answers[1]["problem"]["code"] == "image_unreadable"
    assert answers[1]["problem"]["detail"].startswith("'plain.png' cannot be read as an image: it holds 8 bits (uint8), and")
    for path in ("/predict", "/explain", "/heatmap"):
        refused = server.client.post(f"{path}?model=cells", files={"image": ("deep.png", deep)})
        assert (refused.status_code, refused.json()["code"]) == (400, "image_unreadable"), refused.text
        assert "'deep.png' cannot be read as an image: it holds uint16 values, and without intensity_range" in refused.text
    assert server.client.post("/explain?model=deep", files={"image": deep}).json()["reasons"]


def test_drift(server, calibrated, test_images):
    """The process that answers watches production, whichever process scores."""
    good = [path for path in test_images if path.parent.name == "good"][:32]
    pictures = [encoded(Image.open(path).rotate(90)) for path in good]
    before = {model["model"]: model for model in server.client.get("/drift").json()["models"]}
    seen = before["my_part"]["drift"]["images"] if "my_part" in before else 0
    expected = PatchcoreRuntime.load(calibrated).predict(good)
    answers = [predict(server.client, path, model="my_part").json() for path in good]
    assert [answer["p_value"] for answer in answers] == [prediction.p_value for prediction in expected]
    for picture in 2 * pictures:
        assert predict(server.client, picture, model="my_part").status_code == 200
    drifts = {model["model"]: model["drift"] for model in server.client.get("/drift").json()["models"]}
    assert (drifts["my_part"]["images"], drifts["my_part"]["drifted"]) == (seen + 96, True)
    assert drifts["my_part"]["distance"] > drifts["my_part"]["normal_distance"]
    assert drifts.get("cells") is None, "it has no calibration"
    metrics = server.client.get("/metrics").text
    assert 'patchcore_drifted{model="my_part"} 1.0' in metrics
    assert 'patchcore_drift_evidence{model="my_part"}' in metrics
    assert server.log.read_text().count("Production has drifted from what the model my_part was calibrated on:") == 1


def test_message(runtime, test_images):
    """Nothing of a result is lost between the processes."""
    prediction, reasons = runtime.explain(test_images[0])
    for sent in (Scored(prediction, "cells", "0123456789ab"), Scored(prediction, "cells", "0123456789ab", tuple(reasons))):
        received = from_message(to_message(sent), "cells")
        for field in fields(sent.prediction):
            np.testing.assert_equal(getattr(received.prediction, field.name), getattr(sent.prediction, field.name))
        np.testing.assert_equal([vars(reason) for reason in received.reasons], [vars(reason) for reason in sent.reasons])
        assert (received.model, received.version) == (sent.model, sent.version)
    with pytest.raises(BundleError, match="the reason"):
        from_message({"error": "the reason"}, "cells")
