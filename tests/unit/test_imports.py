"""The two worlds: the runtime never imports training packages, and importing the package loads nothing."""

import subprocess
import sys

TRAINING = ("torch", "torchvision", "lightning", "anomalib", "timm", "pytorch_lightning", "jsonargparse")


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_runtime_predicts_without_the_training_packages(bundle, test_images):
    code = f"""
import sys
from patchcore_plugin import PatchcoreRuntime
runtime = PatchcoreRuntime.load({str(bundle)!r})
answer = runtime.predict([{str(test_images[0])!r}])[0]
runtime.heatmap({str(test_images[0])!r}, answer)
assert answer.score > 0
print([name for name in {TRAINING!r} if name in sys.modules])
"""
    assert run(code) == "[]"


def test_command_line_and_service_do_not_import_the_training_packages():
    code = f"""
import sys
import patchcore_plugin.cli.main, patchcore_plugin.bento.service
print([name for name in {TRAINING!r} if name in sys.modules])
"""
    assert run(code) == "[]"


def test_importing_the_package_loads_nothing():
    code = """
import sys
import patchcore_plugin
print(patchcore_plugin.__all__, sorted({'numpy', 'openvino', 'faiss', 'torch', 'pydantic'} & set(sys.modules)))
"""
    assert run(code) == "['ConformalPostProcessor', 'FaissPatchcore', 'PatchcoreRuntime', 'Spade', 'register'] []"


def test_unknown_attribute():
    code = """
import patchcore_plugin
try:
    patchcore_plugin.Patchcoer
except AttributeError as error:
    print(error)
"""
    assert run(code) == "module 'patchcore_plugin' has no attribute 'Patchcoer'"
