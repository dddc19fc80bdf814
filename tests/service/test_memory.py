"""The promise of bento/README.md about memory, on a real server."""

import threading
from pathlib import Path

import psutil
from helpers.http import predict
from helpers.pictures import black_png, encoded
from helpers.server import SERVE, bentoml_serve
from PIL import Image

MIB = 1 << 20
WIDTH, HEIGHT = 8000, 5000


class Watch:
    """Memory of a server's processes.

    Attributes:
        peak: Most bytes that were seen.
    """

    def __init__(self, server) -> None:
        self.peak, self._end = 0, threading.Event()
        self._processes = [psutil.Process(server.process.pid), *server.children()]
        self._thread = threading.Thread(target=self._look)

    def now(self) -> int:
        """Bytes at this moment."""
        return sum(process.memory_info().rss for process in self._processes)

    def _look(self) -> None:
        while not self._end.wait(0.005):
            self.peak = max(self.peak, self.now())

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def test_memory_of_large_images(bundle, test_images, tmp_path):
    """20 bytes a pixel of an image in work, beside 450 MiB, whatever the file; and they are given back."""
    picture = Image.new("RGB", (WIDTH, HEIGHT))
    contents = {
        "PNG": black_png(WIDTH, HEIGHT, color=2),
        "JPEG": encoded(picture, "JPEG", progressive=True, subsampling=0),
        "TIFF": encoded(picture, "TIFF", compression="tiff_lzw"),
        "WebP": encoded(picture, "WEBP", lossless=True, method=0),
    }
    files = sum(file.stat().st_size for file in Path(bundle).iterdir())
    with bentoml_serve(SERVE, tmp_path, PATCHCORE_BUNDLE=str(bundle)) as server:
        for _ in range(3):
            assert predict(server.client, test_images[0]).status_code == 200
        for name, content in contents.items():
            with Watch(server) as watch:
                before = watch.now()
                assert predict(server.client, content).status_code == 200, name
                predict(server.client, test_images[0])  # OpenVINO keeps the last image until the next one
                after = watch.now()
            print(name, [number // MIB for number in (before, watch.peak, after)])
            assert watch.peak < 450 * MIB + files + 20 * WIDTH * HEIGHT, name
            assert after - before < 50 * MIB, name
