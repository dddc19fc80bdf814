"""``patchcore update --from``: what operators said of a service's answers, in a bundle's successor."""

import hashlib
import re

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, ImageEnhance

from patchcore_plugin import PatchcoreRuntime
from patchcore_plugin.bundle import DEFECTS, read_manifest
from patchcore_plugin.cli import main
from patchcore_plugin.operations.update import update_bundle
from patchcore_plugin.record import Answer, RecordWriter, prepare, say
from patchcore_plugin.record.ids import make_id


def record_of(folder, *said, model="cells"):
    """A record of images (path, word), each stored, as the service writes it."""
    prepare(folder)
    writer = RecordWriter(folder, days=30, limit=2**30)
    answers = []
    for path, word in said:
        content = path.read_bytes()
        fields = {"score": 40.0, "ratio": 1.2, "verdict": "anomalous", "p_value": None, "model": model,
                  "version": "3f2a9c01d4e5", "threshold": 30.0, "regions": [], "milliseconds": {}}  # fmt: skip
        answers.append((Answer(make_id(), "request", path.name, hashlib.sha256(content).hexdigest(), fields, content), word))
        assert writer.put(answers[-1][0])
    writer.close(60)
    for answer, word in answers:
        say(folder, answer.record, word, "", None, 2**30)
    return folder


def update(*arguments):
    return CliRunner().invoke(main, ["update", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def images(test_images, runtime, tmp_path_factory):
    """Two false alarms (normal cells under stronger light), and two defective cells that are anomalous."""
    folder, good = tmp_path_factory.mktemp("said"), []
    for path in test_images:
        if path.parent.name == "good" and len(good) < 2:
            bright = folder / f"bright-{path.name}"
            ImageEnhance.Brightness(Image.open(path).convert("L")).enhance(1.7).save(bright)
            if runtime.predict([bright])[0].verdict == "anomalous":
                good.append(bright)
    bad = [path for path in test_images if path.parent.name == "defective"]
    bad = [
        path
        for path, answer in zip(bad, runtime.predict(bad), strict=True)
        if answer.regions and answer.verdict == "anomalous"
    ]
    assert len(good) == 2
    return {"good": good, "bad": bad[:2], "others": test_images}


def test_false_alarm_is_gone_and_what_resembles_a_defect_scores_higher(bundle, runtime, images, cells, tmp_path):
    said = [(images["good"][0], "good"), *((path, "bad") for path in images["bad"])]
    record = record_of(tmp_path / "record", *said, said[0])
    result = update(bundle, "--from", record, "--test", cells / "test", "--output", tmp_path / "new")
    assert result.exit_code == 0, result.output
    assert "Operators called 1 parts good and 2 bad." in result.output
    assert "They are taught." in result.output
    assert "False alarms among the 1 new images (whose patches are in the bank now): 1 before, 0 after." in result.output
    assert all(path.name in result.output for path, _ in said)
    assert "Of 2 bad parts, 0 were called normal before, and 0 are now." in result.output
    assert re.search(r"Of its \d+ good images, \d+ were anomalous before, and \d+ are now; of its \d+ defect", result.output)
    new, manifest = PatchcoreRuntime.load(tmp_path / "new"), read_manifest(tmp_path / "new")
    step = manifest.lineage[-1]
    assert (manifest.format_version, step.images, 2 <= step.defects <= 10) == (11, 1, True)
    assert manifest.image == runtime.manifest.image
    assert new.predict([images["good"][0]])[0].verdict == "normal"
    before, after = runtime.predict(images["bad"]), new.predict(images["bad"])
    assert all(now.score > was.score for was, now in zip(before, after, strict=True))
    info = CliRunner().invoke(main, ["info", str(tmp_path / "new")], env={"COLUMNS": "200"}).output
    assert f"and {step.defects} patches of defects" in info
    again = update(tmp_path / "new", "--from", record, "--output", tmp_path / "newer")
    assert again.exit_code == 0, again.output
    assert len(PatchcoreRuntime.load(tmp_path / "newer").defects.vectors) == step.defects, "they are not taught twice"
    update_bundle(tmp_path / "new", images["good"], tmp_path / "third")
    assert read_manifest(tmp_path / "third").files[DEFECTS] == manifest.files[DEFECTS]


def test_defects_alone_lower_no_score(bundle, runtime, images, tmp_path):
    record = record_of(tmp_path / "record", *((path, "bad") for path in images["bad"]))
    result = update(bundle, "--from", record, "--output", tmp_path / "new")
    assert result.exit_code == 0, result.output
    assert "was not measured: give --test" in result.output
    new = PatchcoreRuntime.load(tmp_path / "new")
    assert np.array_equal(new.bank.vectors, runtime.bank.vectors)
    before, after = (np.array([answer.score for answer in each.predict(images["others"])]) for each in (runtime, new))
    assert (after >= before * (1 - 1e-6)).all()
    assert (after > before * 1.01).any()
    maps = [each.predict(images["bad"][:1])[0].anomaly_map for each in (runtime, new)]
    assert (maps[1] >= maps[0] - 1e-4).all()


def test_defects_that_do_harm_are_not_taught(bundle, images, cells, tmp_path):
    """An operator who calls good parts bad."""
    wrong = [path for path in images["others"] if path.parent.name == "good"][:40]
    record = record_of(tmp_path / "record", *((path, "bad") for path in wrong))
    result = update(bundle, "--from", record, "--test", cells / "test", "--output", tmp_path / "new")
    assert "They are NOT taught" in result.output
    assert result.exit_code == 1
    assert "There is nothing to update from" in result.output
    assert not (tmp_path / "new").exists()


def test_parts_that_teach_nothing(bundle, images, tmp_path):
    """Those of which both was said, and those whose images are gone or damaged."""
    good, other = images["good"]
    record = record_of(tmp_path / "record", (good, "good"), (good, "bad"), (other, "good"), (images["bad"][0], "bad"))
    stored = {path.read_bytes(): path for path in record.rglob("*") if path.is_file()}
    stored[other.read_bytes()].unlink()
    stored[images["bad"][0].read_bytes()].write_bytes(b"another image")
    result = update(bundle, "--from", record, "--output", tmp_path / "new")
    assert result.exit_code == 1
    assert f"{good.name} was called both good and bad, and teaches nothing." in result.output
    for path in (other, images["bad"][0]):
        assert f"{path.name} is not stored in the record, or damaged, and teaches nothing." in result.output
    assert not (tmp_path / "new").exists()


def test_record_that_cannot_be(bundle, images, tmp_path):
    record = record_of(tmp_path / "record", (images["good"][0], "good"))
    record_of(record, (images["good"][1], "good"), model="other")
    (tmp_path / "empty").mkdir()
    for arguments, reason in [
        (["--from", record], "choose one of cells, other (--model)"),
        (["--from", record, "--model", "third"], "of the model 'third' is good or bad: there is nothing to learn"),
        ([], "Give either NEW_NORMALS"),
        ([tmp_path, "--from", record], "Give either NEW_NORMALS"),
        (["--from", tmp_path / "empty"], "There is no record"),
        (["--from", tmp_path / "none"], "does not exist"),
    ]:
        result = update(bundle, *arguments, "--output", tmp_path / "new")
        assert result.exit_code in (1, 2)
        assert reason.replace(" ", "") in result.output.replace("\n", "").replace(" ", ""), result.output
    assert not (tmp_path / "new").exists()
