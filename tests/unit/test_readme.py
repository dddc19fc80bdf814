"""The READMEs agree with the code and with the tree."""

import inspect
import json
import re

import pytest
from helpers.training import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = {"README.md": 160, "configs/README.md": 66, "bento/README.md": 145, "tests/benchmarks/README.md": 260}
"""Every README, with its longest length in lines."""


def first_column(section):
    """Cells in the first column of a section's table, without its heading, as one text."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE)
    _, *cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| ")]
    return "".join(cells)


def anchors(text):
    """Anchors that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("document", "limit"), DOCUMENTS.items())
def test_length(document, limit):
    assert len((ROOT / document).read_text(encoding="utf-8").splitlines()) <= limit


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files_and_headings(document):
    file = ROOT / document
    links = [link for link in re.findall(r"\]\(([^)]+)\)", file.read_text(encoding="utf-8")) if "://" not in link]
    for link in links:
        path, _, anchor = link.partition("#")
        target = file.parent / path if path else file
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_every_readme_is_found_from_the_first():
    links = re.findall(r"\]\(([^)#]+)", README)
    assert set(DOCUMENTS) - {"README.md"} <= set(links)


def test_commands():
    from patchcore_plugin.cli import main

    assert sorted(re.findall(r"`(\w+)", first_column("In production"))) == sorted(main.commands)


@pytest.fixture(scope="module")
def openapi():
    """The service's OpenAPI document."""
    from patchcore_plugin.bento.app import make_app
    from patchcore_plugin.bento.settings import Settings

    return make_app(Settings()).openapi()


def test_routes(openapi):
    routes = {f"{method.upper()} {path}" for path, methods in openapi["paths"].items() for method in methods}
    assert set(re.findall(r"`(.+?)`", first_column("Serve"))) == routes


def test_answer_of_the_service(openapi):
    """The sample has the fields of a real answer, and its values agree with one another."""
    (sample,) = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    answer = json.loads(sample)
    content = openapi["paths"]["/predict"]["post"]["responses"]["200"]["content"]
    check_fields(answer, content["application/json"]["schema"], openapi)
    assert (answer["score"] > answer["threshold"]) == (answer["verdict"] == "anomalous")
    assert answer["regions"][0]["peak"] > answer["pixel_threshold"]


def check_fields(value, schema, openapi):
    """Compare the fields of a JSON value and of all objects in it with a schema."""
    schema = schema.get("anyOf", [schema])[0]  # the second is null
    if "$ref" in schema:
        schema = openapi["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    if "additionalProperties" in schema:  # fields that the description names
        assert all(re.search(rf"\b{name}\b", schema["description"]) for name in value)
    elif isinstance(value, dict):
        assert set(value) == set(schema["properties"])
        for name, item in value.items():
            check_fields(item, schema["properties"][name], openapi)
    elif isinstance(value, list):
        assert value
        for item in value:
            check_fields(item, schema["items"], openapi)


def test_arguments_of_the_model():
    from anomalib.models import Patchcore

    from patchcore_plugin import FaissPatchcore

    arguments, known = (set(inspect.signature(model).parameters) for model in (FaissPatchcore, Patchcore))
    listed = re.findall(r"`(\w+): ", first_column("Train and export"))
    assert listed
    assert set(listed) <= arguments - known


def test_every_config_is_described_and_shows_its_command():
    described = (ROOT / "configs/README.md").read_text(encoding="utf-8")
    configs = sorted((ROOT / "configs").glob("*.yaml"))
    assert configs
    for config in configs:
        header = config.read_text(encoding="utf-8").split("\n\n")[0]
        assert re.search(rf"^# +(patchcore train --config|patchcore evaluate) configs/{config.name}", header, re.MULTILINE)
        assert f"]({config.name})" in described


def test_every_benchmark_is_described():
    described = (ROOT / "tests/benchmarks/README.md").read_text(encoding="utf-8")
    scripts = {file.name for file in (ROOT / "tests/benchmarks").glob("*.py")} - {"common.py"}
    assert {script for script in scripts if script in described} == scripts
