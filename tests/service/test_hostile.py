"""Odd and hostile requests: every one is answered with a code and a reason, and no worker is lost."""

import io
import json
import socket
import struct
import subprocess
import sys
import zipfile
import zlib

import httpx
import numpy as np
import psutil
import pytest
from helpers.server import SERVE, bentoml_serve
from PIL import Image

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")


@pytest.fixture(scope="module")
def url(bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    with bentoml_serve(SERVE, folder, PATCHCORE_BUNDLE=str(bundle), PATCHCORE_MAX_BODY="8") as server:
        workers = workers_of(server)
        yield server
        assert workers_of(server) == workers, "a worker died"
        assert "Traceback" not in server.log.read_text(errors="replace")


def workers_of(server) -> set[int]:
    return {child.pid for child in psutil.Process(server.process.pid).children(recursive=True)}


def encoded(form: str, picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, form)
    return stream.getvalue()


def check(response: httpx.Response) -> int:
    """An answer, or a problem with all that one has; gives its status."""
    assert response.status_code < 500, response.text
    assert response.headers["x-request-id"]
    if response.status_code != 200:
        assert response.headers["content-type"] == "application/problem+json", response.text
        problem = response.json()
        assert problem["status"] == response.status_code
        assert problem["request_id"] == response.headers["x-request-id"]
        assert problem["code"].replace("_", "").isalpha()
        assert len(problem["detail"]) > 10
    return response.status_code


def send(url, content, name="cell.png", kind="image/png", **fields) -> int:
    return check(httpx.post(f"{url}/predict", files={"image": (name, content, kind)}, data=fields, timeout=60))


@pytest.mark.parametrize("form", FORMATS)
def test_truncated_and_flipped(url, test_images, form):
    """160 files; those that still decode are scored."""
    good = encoded(form, Image.open(test_images[0]).convert("RGB").resize((120, 120)))
    assert send(url, good) == 200
    rng = np.random.default_rng(0)
    for length in np.linspace(0, len(good) - 1, 8).astype(int):
        assert send(url, good[:length]) in (200, 400)
    for _ in range(24):
        damaged = bytearray(good)
        for place in rng.integers(0, min(len(good), rng.choice([40, 400, len(good)])), 4):
            damaged[place] ^= 1 << rng.integers(8)
        assert send(url, bytes(damaged)) in (200, 400, 413)


def png(width, height, depth=8, colour=2, data=b"") -> bytes:
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("width", [0, 1, 2**15, 2**15 + 1, 2**20, 2**31 - 1, 2**32 - 1])
@pytest.mark.parametrize("height", [0, 1, 9000, 2**15 + 1, 2**31 - 1, 2**32 - 1])
def test_dimensions_that_a_header_claims(url, width, height):
    assert send(url, png(width, height, data=bytes(4000))) in (200, 400, 413)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16, 3, 255])
@pytest.mark.parametrize("colour", [0, 2, 3, 4, 6, 1, 255])
def test_kinds_of_png(url, depth, colour):
    assert send(url, png(16, 16, depth, colour, bytes(16 * (16 * 8 + 1)))) in (200, 400)


def test_bombs(url):
    """Little to send, much to decode."""
    assert send(url, encoded("PNG", Image.new("1", (30_000, 30_000)))) == 413
    assert send(url, encoded("PNG", Image.new("L", (12_000, 12_000)))) == 413
    assert send(url, png(100, 100, data=bytes(200_000_000))) in (200, 400)
    text = zlib.compress(bytes(150_000_000))
    bomb = png(8, 8, data=bytes(8 * 25))
    chunk = b"zTXta\0\0" + text
    body = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    assert send(url, bomb[:33] + body + bomb[33:]) in (200, 400, 413)
    frames = io.BytesIO()
    Image.new("L", (64, 64)).save(frames, "TIFF", save_all=True, append_images=[Image.new("L", (64, 64))] * 500)
    assert send(url, frames.getvalue()) == 200


def test_other_files(url, test_images):
    """Formats that Pillow could open, with what it takes to do so, and files of two kinds at once."""
    picture = Image.open(test_images[0]).convert("RGB").resize((64, 64))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a", "b")
    for form in ("GIF", "ICO", "EPS", "PDF", "TGA", "PCX", "SGI", "JPEG2000", "ICNS", "DDS"):
        assert send(url, encoded(form, picture)) == 400, form
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
        b"P6 999999999 999999999 255\n",
        b"P6\n#" + b"a" * 100_000,
    ):
        assert send(url, content) in (400, 413)
    assert send(url, encoded("PNG", picture) + archive.getvalue()) == 200
    assert send(url, archive.getvalue() + encoded("PNG", picture)) == 400


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_modes_are_read_as_training_reads_them(url, runtime, test_images, mode):
    """In TIFF, which keeps them all; anomalib converts to RGB by Pillow as well."""
    grey = Image.open(test_images[0])
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(grey).astype(np.uint16) * 3)
    else:
        picture = grey.convert("RGB").convert("L").convert(mode) if mode in ("I", "F") else grey.convert("RGB").convert(mode)
    content = encoded("TIFF", picture)
    response = httpx.post(f"{url}/predict", files={"image": content}, timeout=60)
    if check(response) == 200:
        assert response.json()["score"] == pytest.approx(runtime.predict([io.BytesIO(content)])[0].score, rel=1e-6)
    else:
        pytest.fail(response.text)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotation_in_exif_is_left_alone(url, runtime, test_images, orientation):
    picture = Image.open(test_images[0]).convert("RGB").crop((0, 0, 300, 200))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    picture.save(stream, "PNG", exif=exif)
    response = httpx.post(f"{url}/predict", files={"image": stream.getvalue()}, timeout=60)
    assert response.json()["size"] == {"width": 300, "height": 200}
    assert response.json()["score"] == pytest.approx(runtime.predict([picture])[0].score, rel=1e-6)


@pytest.mark.parametrize(
    "name",
    ["", "ä.png", "电池.png", "a" * 5000, "../../etc/passwd", "a\0b.png", 'a"b.png', "<script>.png", "\u202egnp.exe", "con"],
)
def test_names(url, test_images, name):
    assert send(url, test_images[0].read_bytes(), name) in (200, 400)
    assert send(url, b"no image", name) == 400


@pytest.mark.parametrize(
    "kind",
    ["application/json", "text/plain", "application/vnd.bentoml+pickle", "application/x-www-form-urlencoded", "x", "",
     "multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=" + "a" * 500,
     "multipart/mixed; boundary=a", "image/svg+xml", "image/", "application/octet-stream", "a" * 3000],
)  # fmt: skip
@pytest.mark.parametrize("body", [b"", b"{}", b"--a--\r\n", b"\x80\x04."])
def test_content_types(url, kind, body):
    for route in ("predict", "predict_batch", "heatmap"):
        status = check(httpx.post(f"{url}/{route}", content=body, headers={"content-type": kind}, timeout=60))
        assert status in (400, 415)


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
def test_fields(url, test_images, fields, code):
    response = httpx.post(f"{url}/predict", files={"image": test_images[0].read_bytes()}, data=fields, timeout=60)
    assert check(response) in (400, 404)
    assert response.json()["code"] == code


def test_forms(url, test_images):
    image = test_images[0].read_bytes()

    def post(route="predict", **arguments):
        return check(httpx.post(f"{url}/{route}", timeout=60, **arguments))

    assert post(files={"model": ("a.png", image), "image": ("b.png", image)}) == 400  # two files
    assert post(files={"image": image}, data={f"field{number}": "x" for number in range(100)}) == 400
    assert post("predict_batch", files=[("images", (f"{number}.png", b"x")) for number in range(33)]) == 400
    assert post("heatmap", files={"image": image}, data={"kind": "both"}) == 400
    assert post("heatmap?kind=both", files={"image": image}) == 400
    assert post("predict?heatmap=maybe", files={"image": image}) == 400
    assert post("predict?model=" + "a" * 300, files={"image": image}) == 400
    assert post(content=b"--a\r\n" * 10_000, headers={"content-type": "multipart/form-data; boundary=a"}) == 400
    part = b'--a\r\nContent-Disposition: form-data; name="image"; filename="x.png"\r\n'
    assert post(content=part, headers={"content-type": "multipart/form-data; boundary=a"}) == 400
    headers = b"".join(b"X-%d: y\r\n" % number for number in range(5000))
    assert post(content=part + headers, headers={"content-type": "multipart/form-data; boundary=a"}) == 400


def test_too_large_a_body(url):
    """Refused by its stated length, or, where it states none, when it has grown too long."""
    large = bytes(9 << 20)
    for content in (large, iter([large[: 1 << 20]] * 9)):
        response = httpx.post(f"{url}/predict", content=content, headers={"content-type": "image/png"}, timeout=60)
        assert check(response) == 413
        assert response.json()["code"] == "body_too_large"


def raw(url, request: bytes) -> bytes:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    return answer


@pytest.mark.parametrize(
    "request_",
    [
        b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\nContent-Type: image/png\r\n\r\nshort",
        b"POST /predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Type: image/png\r\n\r\nzz\r\n",
        b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
        b"GARBAGE\r\n\r\n",
        b"\0" * 1000,
        b"POST /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: a\r\n" + b"X: " + b"a" * 100_000 + b"\r\n\r\n",
    ],
)
def test_broken_requests(url, request_):
    answer = raw(url, request_)
    assert b" 500 " not in answer.split(b"\r\n")[0]
    assert httpx.get(f"{url}/readyz", timeout=20).status_code == 200


def test_other_routes_and_methods(url):
    for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS"):
        assert check(httpx.request(method, f"{url}/predict", timeout=20)) == 405
    for path in (
        "ui/../../settings.py",
        "ui/%2e%2e/settings.py",
        "ui/%2e%2e%2f%2e%2e%2fpyproject.toml",
        "samples/%2e%2e",
        "ui/x",
    ):
        assert httpx.get(f"{url}/{path}", timeout=20).status_code == 404, path


@pytest.mark.parametrize("examples", [15, pytest.param(150, marks=pytest.mark.slow)])
def test_schemathesis(url, tmp_path, examples):
    """Requests made from the OpenAPI document, right ones and wrong ones."""
    command = [
        sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run", f"{url}/docs.json",
        "--checks", "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
        "--max-examples", str(examples), "--seed", "1", "--no-color",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_openapi_describes_every_field(url):
    """Each with a description or a title of its own, answers with an example."""
    document = httpx.get(f"{url}/docs.json", timeout=20).json()
    assert {"/predict", "/predict_batch", "/heatmap", "/explain", "/models", "/drift"} == set(document["paths"])
    schemas = document["components"]["schemas"]
    for name in ("Answer", "FoundRegion", "Problem", "Model"):
        assert schemas[name]["examples"], name
        for field, about in schemas[name]["properties"].items():
            assert about.get("description") or "$ref" in json.dumps(about) or field == "backbone", (name, field)
