"""Another CPU than the one that runs the tests."""

from __future__ import annotations

import openvino as ov


def set_bfloat16(monkeypatch, has: bool) -> None:
    """Make OpenVINO say that the CPU computes in bfloat16, or that it does not. It computes as before."""
    get_property = ov.Core.get_property
    capabilities = ["FP32", "BF16"] if has else ["FP32"]

    def answer(self, *arguments):
        return capabilities if arguments[-1] == "OPTIMIZATION_CAPABILITIES" else get_property(self, *arguments)

    monkeypatch.setattr(ov.Core, "get_property", answer)
