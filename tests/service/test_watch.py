"""p-values and drift over HTTP, wherever the network runs."""

import io

import httpx
import pytest
from helpers.server import SERVE, bentoml_serve
from PIL import Image

from patchcore_plugin import PatchcoreRuntime


def turned(path) -> bytes:
    stream = io.BytesIO()
    Image.open(path).rotate(90).save(stream, "PNG")
    return stream.getvalue()


def ask(url, contents):
    files = [("images", (f"{number}.png", content)) for number, content in enumerate(contents)]
    response = httpx.post(f"{url}/predict_batch", files=files, timeout=120)
    assert response.status_code == 200, response.text
    return [result["answer"] for result in response.json()["results"]]


@pytest.mark.parametrize("runner", ["inside", "process"])
def test_p_values_and_drift(calibrated, test_images, tmp_path, runner):
    good = [path for path in test_images if path.parent.name == "good"][:32]
    expected = PatchcoreRuntime.load(calibrated).predict(good)
    with bentoml_serve(SERVE, tmp_path, PATCHCORE_BUNDLE=str(calibrated), PATCHCORE_RUNNER=runner) as url:
        assert httpx.get(f"{url}/drift").json() == {"models": []}
        answers = ask(url, [path.read_bytes() for path in good])
        assert [answer["p_value"] for answer in answers] == [prediction.p_value for prediction in expected]
        (seen,) = httpx.get(f"{url}/drift").json()["models"]
        assert (seen["model"], seen["version"]) == (answers[0]["model"], answers[0]["version"])
        content = {"image": ("1.png", good[0].read_bytes())}
        assert httpx.post(f"{url}/explain", files=content, timeout=120).status_code == 200
        assert httpx.get(f"{url}/drift").json()["models"] == [seen], "an explained image has been counted already"
        drift = seen["drift"]
        assert (drift["images"], drift["drifted"], drift["since"], drift["what"]) == (32, False, None, None)
        for _ in range(2):
            ask(url, [turned(path) for path in good])
        drift = httpx.get(f"{url}/drift").json()["models"][0]["drift"]
        assert (drift["images"], drift["drifted"]) == (96, True)
        assert drift["evidence"] >= drift["threshold"]
        assert drift["distance"] > drift["normal_distance"]
        metrics = httpx.get(f"{url}/metrics").text
        assert 'patchcore_drifted{model="my_part"} 1.0' in metrics
        assert "patchcore_drift_evidence" in metrics
        log = url.log.read_text()
        assert log.count("Production has drifted from what the model my_part was calibrated on:") == 1


def test_model_without_calibration(bundle, test_images, tmp_path):
    with bentoml_serve(SERVE, tmp_path, PATCHCORE_BUNDLE=str(bundle)) as url:
        (answer,) = ask(url, [test_images[0].read_bytes()])
        assert answer["p_value"] is None
        (seen,) = httpx.get(f"{url}/drift").json()["models"]
        assert (seen["model"], seen["drift"]) == ("cells", None)
