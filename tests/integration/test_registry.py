"""Registration with anomalib: our entry point, a third party's, and broken ones."""

import subprocess
import sys
import textwrap

import pytest

PLUGIN = """
from anomalib.models import Padim
from anomalib.models.components import AnomalibModule
from patchcore_plugin import FaissPatchcore

class ThirdPartyPadim(Padim):  # not a direct subclass of AnomalibModule
    pass

class NotAModel:
    pass

class Patchcore(FaissPatchcore):  # a name that anomalib has already
    pass

class Mixin:
    def on_save_checkpoint(self, checkpoint):
        pass

class Reordered(Padim, Mixin):  # making it a direct subclass would let Mixin's method win
    pass
"""

ENTRY_POINTS = """
[anomalib.models]
third_party_padim = third_party:ThirdPartyPadim
not_a_model = third_party:NotAModel
broken_module = third_party_absent:Model
broken_name = third_party:Absent
raises = third_party_raises:Model
same_name = third_party:Patchcore
reordered = third_party:Reordered
exits = third_party_exits:Model
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with an installed third-party distribution, some of whose entry points are broken."""
    site = tmp_path_factory.mktemp("site")
    (site / "third_party.py").write_text(PLUGIN)
    (site / "third_party_raises.py").write_text("raise RuntimeError('third party is ill')")
    (site / "third_party_exits.py").write_text("raise SystemExit(3)")
    info = site / "third_party-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    return site


def run(site, code: str) -> subprocess.CompletedProcess:
    code = f"import sys; sys.path.insert(0, {str(site)!r})\n" + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)


def test_models_are_usable_wherever_anomalib_takes_one(site):
    result = run(
        site,
        """
        import warnings
        warnings.simplefilter("ignore")
        import anomalib.models
        from anomalib.models import get_model, list_models, UnknownModelError
        arguments = {"backbone": "efficientnet_lite0", "layers": ["blocks.2", "blocks.4"]}
        ours = {"class_path": "patchcore_plugin.FaissPatchcore", "init_args": arguments}

        assert "faiss_patchcore" not in list_models()
        try:
            get_model(ours)
            raise SystemExit("anomalib takes the class_path without us: registration has nothing left to do")
        except UnknownModelError:
            pass

        import patchcore_plugin
        first = patchcore_plugin.register()
        second = patchcore_plugin.register()
        assert first == second and patchcore_plugin.FaissPatchcore in first

        assert "faiss_patchcore" in list_models() and "FaissPatchcore" in list_models("pascal")
        assert isinstance(get_model("faiss_patchcore", **arguments), patchcore_plugin.FaissPatchcore)
        assert isinstance(get_model("FaissPatchcore", **arguments), patchcore_plugin.FaissPatchcore)
        assert isinstance(get_model(ours), patchcore_plugin.FaissPatchcore)
        short = {"class_path": "FaissPatchcore", "init_args": arguments}
        assert isinstance(get_model(short), patchcore_plugin.FaissPatchcore)

        import third_party
        assert "third_party_padim" in list_models()
        padim = {"backbone": "resnet18", "layers": ["layer1"], "pre_trained": False, "n_features": 10}
        assert type(get_model("third_party_padim", **padim)) is third_party.ThirdPartyPadim
        by_path = get_model({"class_path": "third_party.ThirdPartyPadim", "init_args": padim})
        assert type(by_path) is third_party.ThirdPartyPadim
        assert third_party.ThirdPartyPadim.__mro__[1].__name__ == "Padim"
        assert third_party.Reordered.on_save_checkpoint is third_party.Padim.on_save_checkpoint
        by_path = get_model({"class_path": "third_party.Reordered", "init_args": padim})
        assert type(by_path) is third_party.Reordered
        assert anomalib.models.Patchcore.__module__.startswith("anomalib.")
        print("all good")
        """,
    )
    assert result.stdout.strip().endswith("all good"), result.stderr


def test_broken_entry_points_are_warnings_that_name_them(site):
    result = run(
        site,
        """
        import warnings
        import anomalib.models
        import patchcore_plugin
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            patchcore_plugin.register()
        for warning in caught:
            if "Entry point" in str(warning.message):
                print(warning.message)
        """,
    )
    for name, reason in {
        "not_a_model": "it is no AnomalibModule",
        "broken_module": "ModuleNotFoundError",
        "broken_name": "AttributeError",
        "raises": "RuntimeError: third party is ill",
        "same_name": "has the name of anomalib's own Patchcore: choose it by its full class_path",
        "reordered": "is not found by short name",
        "exits": "SystemExit: 3",
    }.items():
        (line,) = (line for line in result.stdout.splitlines() if f"'{name}'" in line)
        assert reason in line
    assert "faiss_patchcore" not in result.stdout
