"""Nothing is reported to others, and what others do afterwards is left as it was."""

import logging
import time

import pytest
import torch

from patchcore_plugin.model.conversion import convert
from patchcore_plugin.model.torch_model import FaissPatchcoreModel
from patchcore_plugin.side_effects import without_side_effects


@pytest.fixture
def sent(monkeypatch):
    """Messages that telemetry sends, in place of sending them; it has the user's consent."""
    backend = pytest.importorskip("openvino_telemetry.backend.backend_ga4", reason="openvino-telemetry is not installed")
    from openvino.tools.ovc.telemetry_utils import init_ovc_telemetry

    messages = []
    monkeypatch.setattr(backend.GA4Backend, "send", lambda _, message: messages.append(message))
    monkeypatch.setattr(init_ovc_telemetry(), "consent", True)  # in a CI job it has none
    return messages


def test_a_conversion_reports_nothing(sent):
    model = FaissPatchcoreModel(["layer2"], "test_resnet", pre_trained=False)
    convert(model, 64, 64)
    assert not sent


def test_sending_is_as_before_afterwards(sent):
    from openvino_telemetry.backend.backend_ga4 import GA4Backend
    from openvino_telemetry.utils.sender import TelemetrySender

    sender, backend = TelemetrySender(), GA4Backend("tid", "app", "1")
    with without_side_effects():
        sender.send(backend, "no")
    with pytest.raises(ZeroDivisionError), without_side_effects():
        raise ZeroDivisionError
    sender.send(backend, "yes")
    sender.executor.shutdown()
    assert sent == ["yes"]


def test_telemetry_is_what_would_have_reported(sent):
    """The first test would fail without the guard."""
    import openvino as ov

    ov.convert_model(torch.nn.Linear(2, 2), example_input=torch.zeros(1, 2))
    deadline = time.monotonic() + 30  # threads send
    while not sent and time.monotonic() < deadline:
        time.sleep(0.05)
    assert sent


class Refused(torch.nn.Module):
    """A network with an operation that OpenVINO does not have."""

    def forward(self, images):
        return torch.linalg.svd(images)[0]


def test_a_conversion_that_fails_leaves_the_logs_alone():
    import openvino as ov

    root = logging.getLogger()
    before = root.level, root.filters[:], root.handlers[:]
    with pytest.raises(Exception, match="svd"), without_side_effects():
        ov.convert_model(Refused(), example_input=torch.rand(2, 3, 8, 8))
    assert (root.level, root.filters, root.handlers) == before
