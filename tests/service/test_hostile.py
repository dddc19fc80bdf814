"""Odd and hostile requests: each one is answered with the right status and reason, and no worker is lost."""

import io
import json
import socket
import subprocess
import sys
import zipfile
import zlib

import httpx
import numpy as np
import pytest
from helpers.http import predict, wait_for
from helpers.pictures import bmp_of_runs, chunk, encoded, jpeg_of_scans, png, tiff_of_strips
from PIL import Image

from patchcore_plugin.images import MAX_PIXELS, MAX_SIDE, ImageError, ImageTooLargeError, read_image

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")


def check(response: httpx.Response, code: str | None) -> None:
    """The response has this problem, with all that a problem has; or, without a code, it is an answer."""
    assert response.headers["x-request-id"]
    if code is None:
        assert response.status_code == 200, response.text
        return
    assert response.headers["content-type"] == "application/problem+json", response.text
    problem = response.json()
    assert (problem["code"], problem["status"]) == (code, response.status_code)
    assert problem["request_id"] == response.headers["x-request-id"]
    assert len(problem["detail"]) > 10
    assert response.status_code < 500


def send(client, content, name="cell.png", kind="image/png"):
    return client.post("/predict", files={"image": (name, content, kind)})


def code_of_library(content: bytes) -> str | None:
    """The problem that an image file should have, as the library decodes it."""
    try:
        read_image(io.BytesIO(content))
    except ImageTooLargeError:
        return "image_too_large"
    except ImageError:
        return "image_unreadable"
    return None


@pytest.mark.parametrize("form", FORMATS)
def test_truncated_and_flipped(client, runtime, test_images, form):
    """Of 160 files, those that still decode get the runtime's score, the others a problem."""
    good = encoded(Image.open(test_images[0]).convert("RGB").resize((120, 120)), form)
    rng = np.random.default_rng(0)
    contents = [good, *(good[:length] for length in np.linspace(0, len(good) - 1, 8).astype(int))]
    for _ in range(24):
        damaged = bytearray(good)
        for place in rng.integers(0, min(len(good), rng.choice([40, 400, len(good)])), 4):
            damaged[place] ^= 1 << rng.integers(8)
        contents.append(bytes(damaged))
    codes = [code_of_library(content) for content in contents]
    assert codes[0] is None
    assert codes[1] == "image_unreadable", "a file without a byte"
    for content, code in zip(contents, codes, strict=True):
        response = send(client, content)
        check(response, code)
        if code is None:
            expected = runtime.predict([io.BytesIO(content)])[0]
            assert response.json()["score"] == pytest.approx(expected.score, rel=1e-6)


@pytest.mark.parametrize("width", [0, 1, 2**15, 2**15 + 1, 2**20, 2**31 - 1, 2**32 - 1])
@pytest.mark.parametrize("height", [0, 1, 9000, 2**15 + 1, 2**31 - 1, 2**32 - 1])
def test_dimensions_that_a_header_claims(client, width, height):
    data = bytes(40_000)
    if 0 in (width, height):
        code = "image_unreadable"
    elif width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        code = "image_too_large"
    else:
        code = "image_unreadable" if (1 + 3 * width) * height > len(data) else None
    check(send(client, png(width, height, data=data)), code)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16, 3, 255])
@pytest.mark.parametrize("color", [0, 2, 3, 4, 6, 1, 255])
def test_kinds_of_png(client, depth, color):
    """Those of the PNG specification are read up to 8 bits; deeper ones are for a model with an intensity range."""
    valid = {0: (1, 2, 4, 8), 2: (8,), 3: (1, 2, 4, 8), 4: (8,), 6: (8,)}
    code = None if depth in valid.get(color, ()) else "image_unreadable"
    check(send(client, png(16, 16, depth, color, bytes(16 * (16 * 8 + 1)))), code)


def test_bombs(client):
    """Files with little to send and much to decode."""
    for mode, side in (("1", 30_000), ("L", 12_000)):
        check(send(client, encoded(Image.new(mode, (side, side)))), "image_too_large")
    check(send(client, png(100, 100, data=bytes(200_000_000))), None)  # what is behind the last row is left alone
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(150_000_000)))
    check(send(client, png(8, 8, data=bytes(8 * 25), before=text)), "image_unreadable")
    frame = Image.new("L", (64, 64))
    check(send(client, encoded(frame, "TIFF", save_all=True, append_images=[frame] * 500)), "image_unreadable")


def test_slow_files(client, server):
    """Files that Pillow would read for seconds to hours are refused at once, and libtiff's words stay out of the log."""
    for content in (jpeg_of_scans(8000, 8000, 20_000), tiff_of_strips(2_000_000), bmp_of_runs(9000, 9000)):
        check(send(client, content), "image_unreadable")
    broken = bytearray(encoded(Image.new("L", (300, 300)), "TIFF", compression="tiff_lzw"))
    broken[100:] = bytes(len(broken) - 100)
    before = server.log.read_text()
    check(send(client, bytes(broken)), "image_unreadable")
    assert {line.partition("request")[1] for line in server.log.read_text().removeprefix(before).splitlines()} == {"request"}


def test_other_files(client, test_images):
    """Formats that Pillow could open, with what it takes to do so, and files of two kinds at once."""
    picture = Image.open(test_images[0]).convert("RGB").resize((64, 64))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a", "b")
    for form in ("GIF", "ICO", "EPS", "PDF", "TGA", "PCX", "SGI", "JPEG2000", "ICNS", "DDS"):
        check(send(client, encoded(picture, form)), "image_unreadable")
    for content in (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n",
        b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        b"<!doctype html><script>alert(1)</script>",
        b"#!/bin/sh\ntrue\n",
        b"\x80\x04\x95.",
        archive.getvalue(),
        b"\0" * 100_000,
        b"BM" + b"\xff" * 60,
        b"II*\0" + b"\xff" * 60,
        b"RIFF\xff\xff\xff\xffWEBP" + b"\xff" * 60,
        b"P6\n#" + b"a" * 100_000,
        b"P6 999999999 999999999 255\n",
        b"P2 4 4 255 " + b"1 " * 16,  # an image, but of a format that only the command line reads
    ):
        check(send(client, content), "image_unreadable")
    check(send(client, encoded(picture) + archive.getvalue()), None)
    check(send(client, archive.getvalue() + encoded(picture)), "image_unreadable")


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr"])
def test_modes_are_read_as_training_reads_them(client, runtime, test_images, mode):
    """In TIFF, which keeps them all; anomalib converts to RGB by Pillow as well."""
    content = encoded(Image.open(test_images[0]).convert("RGB").convert(mode), "TIFF")
    response = predict(client, content)
    check(response, None)
    assert response.json()["score"] == pytest.approx(runtime.predict([io.BytesIO(content)])[0].score, rel=1e-6)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_modes_are_refused_without_a_range(client, test_images, mode):
    gray = Image.open(test_images[0])
    picture = Image.fromarray(np.asarray(gray).astype(np.uint16) * 3) if mode == "I;16" else gray.convert(mode)
    check(predict(client, encoded(picture, "TIFF")), "image_unreadable")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotation_in_exif_is_left_alone(client, runtime, test_images, orientation):
    picture = Image.open(test_images[0]).convert("RGB").crop((0, 0, 300, 200))
    exif = Image.Exif()
    exif[0x0112] = orientation
    answer = predict(client, encoded(picture, exif=exif)).json()
    assert answer["size"] == {"width": 300, "height": 200}
    assert answer["score"] == pytest.approx(runtime.predict([picture])[0].score, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("", "image_missing"),  # a field without a file name holds text
        ("a" * 5000, "form_invalid"),
        *((name, None) for name in ("ä.png", "电池.png", "../../etc/passwd", "a\0b.png", 'a"b.png', "<script>.png", "con")),
        ("\u202egnp.exe", None),
    ],
)
def test_names(client, test_images, name, code):
    check(send(client, test_images[0].read_bytes(), name), code)
    check(send(client, b"no image", name), code or "image_unreadable")


@pytest.mark.parametrize("body", [b"", b"{}", b"--a--\r\n", b"\x80\x04."])
@pytest.mark.parametrize(
    "kind",
    ["application/json", "text/plain", "application/vnd.bentoml+pickle", "application/x-www-form-urlencoded", "x", "",
     "multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=" + "a" * 500,
     "multipart/mixed; boundary=a", "image/svg+xml", "image/", "application/octet-stream", "a" * 3000],
)  # fmt: skip
def test_content_types(client, kind, body):
    for route in ("predict", "predict_batch", "heatmap"):
        if len(kind) > 512:
            code = "unsupported_media_type"
        elif kind.startswith("multipart/form-data"):
            code = "image_missing" if kind.endswith("boundary=") and not body else "form_invalid"
        elif kind.startswith(("image/", "application/octet-stream")) and route != "predict_batch":
            code = "image_unreadable" if body else "image_missing"
        else:
            code = "unsupported_media_type"
        response = client.post(f"/{route}", content=body, headers={"content-type": kind})
        check(response, code)
        if code == "unsupported_media_type":  # the advice names what the route takes
            assert ("send an image" in response.text) == (route != "predict_batch")
            assert ("the files 'images'" in response.text) == (route == "predict_batch")


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"model": "../cells"}, "model_unknown"),
        ({"model": "a" * 5000}, "model_unknown"),
        ({"model": "cells\0"}, "model_unknown"),
        ({"heatmap": "2"}, "field_invalid"),
        ({"heatmap": "a" * 5000}, "field_invalid"),
    ],
)
def test_fields(client, test_images, fields, code):
    check(predict(client, test_images[0], **fields), code)


@pytest.mark.parametrize(
    ("method", "path", "data", "message"),
    [
        (
            "POST",
            "/predict",
            {"heatmaps": "true"},
            "'heatmaps' here: beside its files, the form takes model, heatmap.",
        ),
        ("POST", "/predict", {"kind": "map"}, "no field 'kind'"),
        ("POST", "/predict?heatmaps=true", {}, "no parameter 'heatmaps' here: the URL takes model, heatmap."),
        ("POST", "/predict", {"model": ["cells", "other"]}, "has its field 'model' twice"),
        ("POST", "/heatmap", {"heatmap": "true"}, "no field 'heatmap' here: beside its files, the form takes model, kind."),
        ("POST", "/explain", {"modell": "cells"}, "no field 'modell'"),
        ("GET", "/models?name=cells", None, "no parameter 'name' here: the URL takes none."),
        ("GET", "/drift?model=cells", None, "no parameter 'model'"),
    ],
)
def test_what_nobody_knows_is_refused(client, test_images, method, path, data, message):
    """A typing error in the name of a field would otherwise be without effect, and without a word."""
    files = None if data is None else {"image": test_images[0].read_bytes()}
    response = client.request(method, path, files=files, data=data)
    check(response, "field_invalid")
    assert message in response.json()["detail"]


def test_forms(client, test_images):
    image = test_images[0].read_bytes()

    def post(code, route="predict", **arguments):
        check(client.post(f"/{route}", **arguments), code)

    form = {"headers": {"content-type": "multipart/form-data; boundary=a"}}
    post("form_invalid", files={"model": ("a.png", image), "image": ("b.png", image)})  # two files
    post("form_invalid", files={"image": image}, data={f"field{number}": "x" for number in range(100)})
    post("form_invalid", "predict_batch", files=[("images", (f"{number}.png", b"x")) for number in range(33)])
    post("field_invalid", "heatmap", files={"image": image}, data={"kind": "both"})
    post("field_invalid", "heatmap?kind=both", files={"image": image})
    post("field_invalid", "predict?heatmap=maybe", files={"image": image})
    post("field_invalid", "predict?model=" + "a" * 300, files={"image": image})
    post("form_invalid", content=b"--a\r\n" * 10_000, **form)
    part = b'--a\r\nContent-Disposition: form-data; name="image"; filename="x.png"\r\n'
    post("image_missing", content=part, **form)
    headers = b"".join(b"X-%d: y\r\n" % number for number in range(5000))
    post("form_invalid", content=part + headers, **form)


def test_too_large_a_body(client):
    """Refused by its stated length, or, where it states none, when it has grown too long."""
    large = bytes(9 << 20)
    for content in (large, iter([large[: 1 << 20]] * 9)):
        response = client.post("/predict", content=content, headers={"content-type": "image/png"})
        check(response, "body_too_large")


def raw(server, request: bytes, end: bool = False) -> bytes:
    """The first line of the answer to bytes that need not be HTTP; ``end`` says that no more bytes will follow."""
    host, port = server.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(request)
        if end:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        while b"\r\n" not in answer and (piece := connection.recv(65536)):
            answer += piece
    return answer.split(b"\r\n")[0]


POST = b"POST /predict HTTP/1.1\r\nHost: localhost\r\n"
BAD_REQUEST = b"HTTP/1.1 400 Bad Request"
HEAD_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large"


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        (POST + b"Content-Length: -5\r\n\r\n", BAD_REQUEST),
        (POST + b"Content-Length: 99999999999999999999\r\n\r\n", BAD_REQUEST),
        (POST + b"Transfer-Encoding: chunked\r\nContent-Type: image/png\r\n\r\nzz\r\n", BAD_REQUEST),
        (POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc", BAD_REQUEST),
        (b"GARBAGE\r\n\r\n", BAD_REQUEST),
        (b"\0" * 1000, BAD_REQUEST),
        (b"POST /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", HEAD_TOO_LARGE),
        (POST + b"X: " + b"a" * 100_000 + b"\r\n\r\n", HEAD_TOO_LARGE),
    ],
    ids=["negative", "endless", "chunk", "two-lengths", "garbage", "zeros", "long-path", "long-header"],
)
def test_broken_requests(server, client, request_, answer):
    assert raw(server, request_) == answer
    assert client.get("/readyz").status_code == 200


def test_body_that_ends_early(server, client):
    """Nobody is left to answer; the log has the request."""
    before = server.log.read_text().count('code="disconnected"')
    assert raw(server, POST + b"Content-Length: 100\r\nContent-Type: image/png\r\n\r\nshort", end=True) == b""
    wait_for(lambda: server.log.read_text().count('code="disconnected"') == before + 1, 10)
    assert client.get("/readyz").status_code == 200


def test_other_routes_and_methods(client):
    for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS"):
        check(client.request(method, "/predict"), "method_not_allowed")
    for path in (
        "ui/../../settings.py",
        "ui/%2e%2e/settings.py",
        "ui/%2e%2e%2f%2e%2e%2fpyproject.toml",
        "samples/%2e%2e",
        "ui/x",
    ):
        assert client.get(f"/{path}").status_code == 404, path


@pytest.mark.parametrize("examples", [15, pytest.param(150, marks=pytest.mark.slow)])
def test_schemathesis(server, tmp_path, examples):
    """Requests made from the OpenAPI document, right ones and wrong ones."""
    command = [
        sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run", f"{server}/docs.json",
        "--checks", "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
        "--max-examples", str(examples), "--seed", "1", "--no-color",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_openapi_describes_every_field(client):
    """Each field has a description of its own, and answers have an example."""
    document = client.get("/docs.json").json()
    scoring = {"/predict", "/predict_batch", "/heatmap", "/explain", "/models", "/drift"}
    record = {"/history", "/history.csv", "/history/totals", "/history/{record_id}/image", "/feedback"}
    assert scoring | record == set(document["paths"])
    schemas = document["components"]["schemas"]
    for name in ("ImageAnswer", "AnomalousRegion", "Problem", "ModelSummary", "RecordedAnswer", "FeedbackAnswer"):
        assert schemas[name]["examples"], name
        for field, about in schemas[name]["properties"].items():
            assert about.get("description") or "$ref" in json.dumps(about), (name, field)
