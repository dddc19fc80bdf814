"""The operator's page, in a real Chromium."""

import base64
import io
import json
import re
import shutil
import time

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.bundles import change_manifest, set_intensity_range
from helpers.http import predict, wait_for
from helpers.pictures import encoded
from helpers.server import app_server
from PIL import Image, ImageChops, ImageEnhance, ImageStat

from patchcore_plugin.bundle import read_manifest, version_of
from patchcore_plugin.cli import main
from patchcore_plugin.record import Filter, prepare, read_history, read_said
from patchcore_plugin.runtime import PatchcoreRuntime

api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
expect = api.expect

COUNT_URLS = """
    const live = (window.liveUrls = new Set());
    const {createObjectURL: create, revokeObjectURL: revoke} = URL;
    URL.createObjectURL = (blob) => { const url = create.call(URL, blob); live.add(url); return url; };
    URL.revokeObjectURL = (url) => { live.delete(url); revoke.call(URL, url); };
"""
DROPPED = """(files) => {
    const transfer = new DataTransfer();
    for (const {name, content} of files) {
        transfer.items.add(new File([Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0))], name));
    }
    return transfer;
}"""


@pytest.fixture(scope="module")
def defect(runtime, samples):
    """A defective cell with several regions, and what the runtime says of it."""
    paths = sorted(samples.iterdir())[:24]  # as many as the page offers
    answers = dict(zip(paths, runtime.predict(paths), strict=True))
    return max(answers.items(), key=lambda item: (item[1].verdict == "anomalous", len(item[1].regions)))


@pytest.fixture
def visit(browser):
    """Open the page; after the test, nothing may have been asked of another host, and no error written."""
    visited = []

    def open_page(url, path="/ui/", **context):
        page = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **context}).new_page()
        page.requested, page.errors = [], []
        page.on("request", lambda request: page.requested.append(request.url))
        page.on("console", lambda message: message.type in ("error", "warning") and page.errors.append(message.text))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("dialog", lambda dialog: page.errors.append(dialog.message))
        page.add_init_script(COUNT_URLS)
        page.goto(url + path)
        visited.append((url, page))
        return page

    yield open_page
    for url, page in visited:
        hosts = {asked for asked in page.requested if not asked.startswith((f"{url}/", "blob:", "data:"))}
        errors = list(page.errors)
        page.context.close()
        assert not hosts
        assert not errors


@pytest.fixture
def page(visit, server):
    return visit(server)


def choose(page, *files):
    page.locator("#files").set_input_files(list(files))


def drop(page, **files):
    content = [{"name": name, "content": base64.b64encode(data).decode()} for name, data in files.items()]
    page.dispatch_event("body", "drop", {"dataTransfer": page.evaluate_handle(DROPPED, content)})


def verdict_is(page, word, name):
    expect(page.locator("#name")).to_have_text(name)
    expect(page.locator("#word")).to_have_text(word)


def natural_size(page, image):
    return page.evaluate(
        "id => { const image = document.getElementById(id); return [image.naturalWidth, image.naturalHeight] }", image
    )


def scrolls_sideways(page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")


def test_answer_of_a_defective_cell(page, defect, keep):
    path, expected = defect
    assert expected.verdict == "anomalous"
    assert expected.regions
    choose(page, path)
    verdict_is(page, "Anomalous", path.name)
    expect(page.locator("#said")).to_have_text(re.compile(f"^Anomalous, score .*, {re.escape(path.name)}$"))
    assert float(page.locator("#score").text_content()) == pytest.approx(expected.score, rel=1e-3)
    assert float(page.locator("#threshold").text_content()) == pytest.approx(expected.threshold, rel=1e-3)
    assert page.locator("#ratio").text_content() == f"{expected.score / expected.threshold:.1%}".replace("%", " %")
    meter = page.locator("#meter")
    assert float(meter.get_attribute("aria-valuenow")) == pytest.approx(expected.score, rel=1e-6)
    width, bar, mark = (page.locator(part).bounding_box() for part in ("#meter", "#bar", "#mark"))
    end = float(meter.get_attribute("aria-valuemax"))
    assert bar["width"] / width["width"] == pytest.approx(expected.score / end, abs=0.01)
    middle = mark["x"] + mark["width"] / 2 - width["x"]
    assert middle / width["width"] == pytest.approx(expected.threshold / end, abs=0.01)

    rows = [[float(cell) for cell in row.locator("td").all_text_contents()] for row in page.locator("#regions tr").all()]
    assert rows == [
        [number, one.left, one.top, one.width, one.height, one.area, pytest.approx(one.peak, rel=1e-3)]
        for number, one in enumerate(expected.regions, 1)
    ]
    stage = page.locator("#under").bounding_box()
    scale = stage["width"] / 300
    assert stage["height"] == pytest.approx(stage["width"], abs=1)
    boxes = [box.bounding_box() for box in page.locator("#boxes > div").all()]
    assert boxes == [
        {
            "x": pytest.approx(stage["x"] + one.left * scale, abs=1),
            "y": pytest.approx(stage["y"] + one.top * scale, abs=1),
            "width": pytest.approx(one.width * scale, abs=1),
            "height": pytest.approx(one.height * scale, abs=1),
        }
        for one in expected.regions
    ]
    for image in ("image", "under", "heatmap"):
        assert natural_size(page, image) == [300, 300]
    stages = page.locator("#times dt").all_text_contents()
    assert stages == ["decode", "network", "search", "answer", "total"]
    expect(page.locator("#model-name")).to_have_text("cells")
    expect(page.locator("#model-version")).to_have_text(re.compile("[0-9a-f]{12}"))
    expect(page.locator("#models")).to_be_hidden()
    assert not scrolls_sideways(page)
    keep(page, "1280x800")


def test_heatmap_fades(page, defect):
    choose(page, defect[0])
    verdict_is(page, "Anomalous", defect[0].name)
    heatmap = page.locator("#heatmap")
    expect(heatmap).to_have_css("opacity", "1")
    page.locator("#opacity").focus()
    for _ in range(4):
        page.keyboard.press("ArrowLeft")
    expect(heatmap).to_have_css("opacity", "0.8")
    expect(page.locator("#opacity-value")).to_have_text("80 %")
    page.keyboard.press("Home")
    expect(heatmap).to_have_css("opacity", "0")
    page.get_by_role("checkbox", name="Regions").uncheck()
    expect(page.locator("#boxes")).to_be_hidden()
    choose(page, defect[0])
    expect(page.locator("#history li")).to_have_count(2)
    expect(heatmap).to_have_css("opacity", "0")  # as the operator left it


def test_keyboard_alone(page, samples):
    page.on("filechooser", lambda chooser: None)  # from now on; set up only when it opens, it may come too late
    names = sorted(path.name for path in samples.iterdir())[:24]
    expect(page.locator("#sample-list button")).to_have_count(24)
    expect(page.locator("#sample-list canvas")).to_have_count(24)

    def tab_to(name):
        for _ in range(60):
            page.keyboard.press("Tab")
            if (
                page.evaluate("document.activeElement.getAttribute('aria-label') ?? document.activeElement.innerText")
                == name
            ):
                assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
                return
        pytest.fail(f"{name} cannot be reached")

    tab_to("Choose images…")
    with page.expect_file_chooser():
        page.keyboard.press("Enter")
    tab_to(names[2])
    page.keyboard.press("Enter")
    expect(page.locator("#name")).to_have_text(names[2])
    tab_to(names[3])
    page.keyboard.press("Space")
    expect(page.locator("#name")).to_have_text(names[3])
    first = page.locator("#history button").nth(1)
    tab_to(first.inner_text())
    page.keyboard.press("Enter")
    expect(page.locator("#name")).to_have_text(names[2])
    expect(first).to_have_attribute("aria-current", "true")
    expect(first).to_be_focused()


def test_history(page, runtime, test_images, keep):
    paths = [*test_images[:2], *test_images[-20:]]
    choose(page, *paths)
    expect(page.locator("#status")).to_have_text(re.compile("^22 images: "), timeout=60_000)
    entries = page.locator("#history button")
    expect(entries).to_have_count(20)
    assert page.locator("#history .name").all_text_contents() == [path.name for path in reversed(paths[2:])]
    expect(page.locator("#history canvas")).to_have_count(20)
    assert page.evaluate("liveUrls.size") <= 2
    keep(page, "history")
    for number in (19, 0, 7):
        path = paths[::-1][number]
        expected = runtime.predict([path])[0]
        entries.nth(number).click()
        verdict_is(page, {"normal": "Normal", "anomalous": "Anomalous"}[expected.verdict], path.name)
        assert float(page.locator("#meter").get_attribute("aria-valuenow")) == pytest.approx(expected.score, rel=1e-6)
        expect(page.locator("#regions tr")).to_have_count(len(expected.regions))
        expect(page.locator("#heatmap")).to_have_js_property("complete", value=True)
        assert natural_size(page, "heatmap") == [300, 300]
        assert page.locator("#history [aria-current]").count() == 1
    assert page.evaluate("liveUrls.size") <= 2


def test_what_is_no_image(page, defect, keep):
    choose(page, defect[0])
    verdict_is(page, "Anomalous", defect[0].name)
    choose(page, {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no image"})
    expect(page.get_by_role("alert")).to_have_text(re.compile(r"^'notes\.txt' cannot be read as an image"))
    verdict_is(page, "Not checked", "notes.txt")
    for part in ("#scoring", "#pictures", "#details"):
        expect(page.locator(part)).to_be_hidden()  # of the image before
    keep(page, "problem")
    page.locator("#history button").nth(1).click()
    verdict_is(page, "Anomalous", defect[0].name)
    expect(page.get_by_role("alert")).to_be_empty()
    (error,) = page.errors
    assert "status of 400" in error
    page.errors.clear()


def test_dropped_files_with_hostile_names(page, defect):
    content = defect[0].read_bytes()
    names = ["<img src=x onerror=alert(1)>.png", "<script>alert(2)<\\script>.png", 'a";\r\nX-Evil: 1.png', "&lt;b&gt;.png"]
    drop(page, **dict.fromkeys(names, content))
    expect(page.locator("#status")).to_have_text("4 images: 4 anomalous")
    assert page.locator("#history .name").all_text_contents() == names[::-1]
    assert page.locator("#name").text_content() == names[-1]
    assert page.locator("#history :is(script, b, img), #result :is(script, b)").count() == 0
    for name in names:
        drop(page, **{name: b"no image"})
        expect(page.locator("#name")).to_have_text(name)
        expect(page.locator("#word")).to_have_text("Not checked")
    assert page.locator(":is(#problem, #name, #status) > *").count() == 0
    assert all("status of 400" in error for error in page.errors)
    page.errors.clear()


def test_api_key(visit, bundle, samples, defect, keep):
    with app_server(bundle=bundle, samples=samples, api_key="line-7") as url:
        page = visit(url)
        field = page.get_by_label("API key")
        expect(field).to_be_focused()
        choose(page, defect[0])  # waits for the key as well
        keep(page, "key")
        field.fill("ключ")
        field.press("Enter")
        expect(page.locator("#key-note")).to_have_text("A key cannot have these characters.")
        field.fill("line-8")
        field.press("Enter")
        expect(page.locator("#key-note")).to_have_text("The service does not take this key.")
        with page.expect_request("**/predict") as asked:
            field.fill("line-7")
            field.press("Enter")
        assert asked.value.header_value("x-api-key") == "line-7"
        verdict_is(page, "Anomalous", defect[0].name)
        expect(field).to_be_hidden()
        expect(page.locator("#sample-list canvas")).to_have_count(24)
        page.get_by_role("button", name=defect[0].name, exact=True).click()
        expect(page.locator("#history li")).to_have_count(2)
        assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
        assert all("status of 401" in error for error in page.errors)
        page.errors.clear()


def test_several_models(visit, bundle, defect, tmp_path, keep):
    for name in ("left", "right", "torn"):
        shutil.copytree(bundle, tmp_path / "bundles" / name)
    (tmp_path / "bundles" / "torn" / "manifest.json").write_text("{")
    with app_server(bundles=tmp_path / "bundles") as url:
        page = visit(url)
        models = page.get_by_label("Model")
        expect(models).to_have_value("")
        expect(models.locator("option")).to_have_count(4)
        expect(models.locator("option[value=torn]")).to_be_disabled()
        choose(page, defect[0])
        expect(page.get_by_role("alert")).to_contain_text("right")  # the service says which there are
        models.select_option("right")
        choose(page, defect[0])
        expect(page.locator("#model-name")).to_have_text("right")
        keep(page, "models")
        models.select_option("left")
        shutil.rmtree(tmp_path / "bundles" / "left")
        time.sleep(1.5)  # the service looks once in a second
        choose(page, defect[0])
        expect(page.locator("#word")).to_have_text("Not checked")
        expect(models.locator("option")).to_have_count(3)
        assert all("status of 404" in error for error in page.errors)
        page.errors.clear()


def test_busy_service(page, defect):
    """Three requests are turned away; each is repeated when the service says."""
    times = []

    def turn_away(route):
        times.append(page.evaluate("performance.now()"))
        problem = '{"status": 503, "code": "busy", "detail": "Too many.", "request_id": "x"}'
        route.fulfill(status=503, headers={"Retry-After": "0.3"}, content_type="application/problem+json", body=problem)

    page.route("**/predict", turn_away, times=3)
    drop(page, **{"one.png": defect[0].read_bytes(), "two.png": defect[0].read_bytes()})
    expect(page.locator("#status")).to_contain_text("trying again in 0.3 s")
    expect(page.locator("#status")).to_have_text("2 images: 2 anomalous")
    assert len(times) == 3
    page.route("**/predict", turn_away)
    choose(page, defect[0])
    expect(page.get_by_role("alert")).to_have_text("Too many.")
    assert len(times) == 3 + 6
    assert all("status of 503" in error for error in page.errors)
    page.errors.clear()


def test_service_is_gone(page, defect):
    page.route("**/predict", lambda route: route.abort())
    choose(page, defect[0])
    expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
    page.unroute("**/predict")
    choose(page, defect[0])
    verdict_is(page, "Anomalous", defect[0].name)
    expect(page.get_by_role("alert")).to_be_empty()
    assert all("ERR_FAILED" in error for error in page.errors)
    page.errors.clear()


def test_model_without_threshold(page, defect, keep):
    unknown = dict.fromkeys(["normalized_score", "verdict", "threshold", "ratio", "pixel_threshold", "regions"])

    def forget(route):
        response = route.fetch()
        route.fulfill(response=response, json={**response.json(), **unknown})

    page.route("**/predict", forget)
    choose(page, defect[0])
    verdict_is(page, "No verdict", defect[0].name)
    assert float(page.locator("#score").text_content()) == pytest.approx(defect[1].score, rel=1e-3)
    expect(page.locator("#threshold")).to_have_text("no threshold")
    expect(page.locator("#ratio-item")).to_be_hidden()
    expect(page.locator("#regions-note")).to_contain_text("no threshold")
    expect(page.locator("#meter")).to_be_hidden()
    expect(page.locator("#regions tr")).to_have_count(0)
    expect(page.locator("#heatmap")).to_be_visible()
    keep(page, "no-threshold")


def test_threshold_with_a_sensitivity(visit, bundle_copy, defect):
    """The page shows the threshold by which the verdict goes, as /models does."""
    scale = read_manifest(bundle_copy).image.model_dump()
    change_manifest(bundle_copy, image={**scale, "sensitivity": 0.3})
    with app_server(bundle=bundle_copy) as server:
        (model,) = server.client.get("/models").json()["models"]
        assert model["threshold"] > scale["threshold"]
        page = visit(server)
        choose(page, defect[0])
        expect(page.locator("#name")).to_have_text(defect[0].name)
        expect(page.locator("#word")).to_have_text("Anomalous" if defect[1].score > model["threshold"] else "Normal")
        assert float(page.locator("#threshold").text_content()) == pytest.approx(model["threshold"], rel=1e-3)


def test_p_value(page, defect):
    """Shown where the model has a calibration, which this one has not."""
    choose(page, defect[0])
    verdict_is(page, "Anomalous", defect[0].name)
    expect(page.locator("#p-value-item")).to_be_hidden()

    def calibrate(route):
        response = route.fetch()
        route.fulfill(response=response, json={**response.json(), "p_value": 1 / 21})

    page.route("**/predict", calibrate)
    choose(page, defect[0])
    expect(page.locator("#p-value")).to_have_text("0.048")
    expect(page.locator("#p-value-item")).to_be_visible()


def test_part_to_review(visit, calibrated, defect, keep, tmp_path):
    """Between the two thresholds; the page says what they promise."""
    bundle = tmp_path / "bundle"
    shutil.copytree(calibrated, bundle)
    manifest = read_manifest(bundle)
    score = PatchcoreRuntime.load(bundle).predict([defect[0]])[0].score
    image = {**manifest.image.model_dump(), "threshold": score + 1, "maximum": score + 20, "review": score - 1}
    calibration = {**json.loads(manifest.calibration.model_dump_json()), "review_rate": 0.2}
    regions = {"min_area": 1.0, "mm_per_pixel": 0.05}
    change_manifest(bundle, format_version=12, image=image, calibration=calibration, regions=regions)
    answer = PatchcoreRuntime.load(bundle).predict([defect[0]])[0]
    assert answer.regions
    assert answer.small_regions
    with app_server(bundle=bundle) as server:
        page = visit(server)
        choose(page, defect[0])
        verdict_is(page, "Review", defect[0].name)
        assert float(page.locator("#review-threshold").text_content()) == pytest.approx(score - 1, rel=1e-3)
        bar, *marks = (page.locator(part).bounding_box() for part in ("#bar", "#review-mark", "#mark"))
        assert marks[0]["x"] < bar["x"] + bar["width"] < marks[1]["x"] + marks[1]["width"]
        promise = "Of 100 good parts, 4.76 would be stopped, and 14.3 more looked at, on average."
        expect(page.locator("#promise")).to_have_text(promise)
        sizes = [float(cell) for cell in page.locator("#regions td:last-child").all_text_contents()]
        assert sizes == [pytest.approx(region.area * 0.05**2, rel=1e-3) for region in answer.regions]
        note = f", and {answer.small_regions} smaller than the model's limit, not listed"
        expect(page.locator("#regions-note")).to_contain_text(note)
        expect(page.locator("#history .review")).to_have_count(1)
        keep(page, "review")


def test_deep_image(visit, bundle_copy, defect):
    """A browser shows it too dark, or clipped: the heatmap, over the scaled image, stands alone."""
    set_intensity_range(bundle_copy, [0, 4095])
    pixels = np.rint(np.asarray(Image.open(defect[0]).convert("L")) * (4095 / 255)).astype(np.uint16)
    with app_server(bundle=bundle_copy) as server:
        page = visit(server)
        drop(page, **{"cell.png": encoded(Image.fromarray(pixels))})
        verdict_is(page, "Anomalous", "cell.png")
        expect(page.locator("#blind")).to_be_visible()
        expect(page.locator("#image")).to_be_hidden()
        expect(page.locator("#under")).to_be_hidden()
        assert natural_size(page, "heatmap") == [300, 300]
        drop(page, **{"plain.png": defect[0].read_bytes()})
        verdict_is(page, "Not checked", "plain.png")
        expect(page.locator("#problem")).to_contain_text("it holds 8 bits (uint8)")
        page.errors.clear()  # the browser tells of an answer of status 400


def test_tiff(page, defect, keep):
    """Which no browser shows."""
    with Image.open(defect[0]) as picture:
        drop(page, **{"cell.tif": encoded(picture, "TIFF")})
    verdict_is(page, "Anomalous", "cell.tif")
    expect(page.locator("#blind")).to_be_visible()
    expect(page.locator("#under")).to_be_hidden()
    expect(page.locator("#opacity")).to_be_disabled()
    assert natural_size(page, "heatmap") == [300, 300]
    expect(page.locator("#boxes > div")).to_have_count(len(defect[1].regions))
    keep(page, "tiff")
    choose(page, defect[0])
    expect(page.locator("#under")).to_be_visible()
    expect(page.locator("#opacity")).to_be_enabled()


def test_photo_with_rotation(page, defect):
    """The service leaves EXIF's rotation alone; image, heatmap and regions must lie on each other."""
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    with Image.open(defect[0]) as cell:
        photo = cell.convert("L").crop((0, 0, 300, 200))
    photo.paste(255, (0, 0, 100, 60))
    drop(page, **{"photo.jpg": encoded(photo, "JPEG", exif=exif)})
    expect(page.locator("#image-size")).to_have_text(re.compile("^300 . 200$"))
    page.locator("#opacity").fill("0")
    page.locator("#boxes-shown").uncheck()
    for pane in page.locator(".stage").all():
        with Image.open(io.BytesIO(pane.screenshot())) as shot:
            assert shot.width / shot.height == pytest.approx(1.5, abs=0.02)
            difference = ImageChops.difference(shot.convert("L").resize(photo.size), photo)
        assert ImageStat.Stat(difference).mean[0] < 4


@pytest.mark.parametrize("colors", ["light", "dark"])
def test_sizes_of_screens(visit, server, defect, colors, keep):
    page = visit(server, viewport={"width": 360, "height": 740}, color_scheme=colors)
    assert not scrolls_sideways(page)
    choose(page, defect[0])
    verdict_is(page, "Anomalous", defect[0].name)
    assert not scrolls_sideways(page)
    keep(page, f"phone-{colors}")
    page.set_viewport_size({"width": 1280, "height": 800})
    keep(page, f"1280x800-{colors}")
    assert not scrolls_sideways(page)
    image, heatmap = (page.locator(pane).bounding_box() for pane in ("#image", "#heatmap"))
    assert (heatmap["y"], heatmap["width"]) == (image["y"], image["width"])  # side by side
    page.set_viewport_size({"width": 1920, "height": 1080})
    keep(page, f"1920x1080-{colors}")


def test_behind_a_path_prefix(visit, server, defect):
    page = visit(server)

    def without_prefix(route):
        route.fulfill(response=route.fetch(url=route.request.url.replace("/line-7/", "/")))

    page.route(f"{server}/line-7/**", without_prefix)
    page.goto("about:blank")
    page.requested.clear()
    page.goto(f"{server}/line-7/ui/")
    expect(page.locator("#sample-list canvas")).to_have_count(24)
    choose(page, defect[0])
    verdict_is(page, "Anomalous", defect[0].name)
    assert all("/line-7/" in asked for asked in page.requested if asked.startswith("http"))


@pytest.fixture
def recording(bundle, samples, tmp_path):
    """A server with a record, in ``tmp_path / "record"``."""
    prepare(tmp_path / "record")
    with app_server(bundle=bundle, samples=samples, record=tmp_path / "record") as server:
        yield server


def test_history_and_words_survive_a_reload(visit, recording, runtime, defect, test_images, tmp_path, keep):
    normal = next(path for path in test_images if runtime.predict([path])[0].verdict == "normal")
    page = visit(recording, viewport={"width": 1280, "height": 720})
    choose(page, normal, defect[0])
    verdict_is(page, "Anomalous", defect[0].name)
    good, bad = (page.get_by_role("button", name=f"This part is {word}") for word in ("good", "bad"))
    expect(good).to_have_attribute("aria-pressed", "false")
    keep(page, "feedback")
    page.get_by_label("Note").fill("a drop <b>of</b> water")
    good.click()
    expect(page.locator("#feedback-note")).to_have_text("Recorded: this part is good.")
    expect(good).to_have_attribute("aria-pressed", "true")
    expect(bad).to_have_attribute("aria-pressed", "false")
    page.get_by_label("Note").fill("oil")
    bad.click()  # after the change of the note, which is said with the word before
    expect(bad).to_have_attribute("aria-pressed", "true")
    expect(good).to_have_attribute("aria-pressed", "false")
    page.get_by_label("Note").fill("<img src=x> oil")
    page.get_by_label("Note").press("Enter")
    wait_for(lambda: [said.note for said in read_said(tmp_path / "record", "bad")] == ["<img src=x> oil"], 10)
    page.locator("#history button").nth(1).click()
    verdict_is(page, "Normal", normal.name)
    expect(bad).to_have_attribute("aria-pressed", "false")
    expect(page.get_by_label("Note")).to_have_value("")
    wait_for(lambda: len(read_history(tmp_path / "record", Filter(), 9)) == 2, 10)

    page.reload()
    expect(page.locator("#history .name")).to_have_text([defect[0].name, normal.name])
    expect(page.locator("#history .spoken")).to_have_text(["said to be bad", ""])
    expect(page.locator("#history canvas")).to_have_count(1)  # of the image that the record has
    expect(page.locator("#older")).to_be_hidden()
    first, second = page.locator("#history button").all()
    first.click()
    verdict_is(page, "Anomalous", defect[0].name)
    assert float(page.locator("#score").text_content()) == pytest.approx(defect[1].score, rel=1e-3)
    expect(page.locator("#image")).to_be_visible()
    assert natural_size(page, "image") == natural_size(page, "under") == [300, 300]
    expect(page.locator("#no-heatmap")).to_be_visible()
    expect(page.locator("#heatmap")).to_be_hidden()
    expect(page.locator("#boxes > div")).to_have_count(len(defect[1].regions))
    expect(page.get_by_label("Note")).to_have_value("<img src=x> oil")
    expect(bad).to_have_attribute("aria-pressed", "true")
    keep(page, "recorded")
    second.click()
    verdict_is(page, "Normal", normal.name)
    expect(page.locator("#pictures")).to_be_hidden()
    bad.click()
    expect(page.locator("#feedback-note")).to_have_text(
        re.compile("The model cannot learn from it, as the image is not stored")
    )
    choose(page, normal)
    expect(page.locator("#history li")).to_have_count(3)
    expect(page.locator("#pictures")).to_be_visible()
    expect(page.locator("#heatmap")).to_be_visible()
    bad.click()  # now the image goes along
    expect(page.locator("#feedback-note")).to_have_text("Recorded: this part is bad.")
    wait_for(lambda: normal.read_bytes() in [said.content() for said in read_said(tmp_path / "record", "bad")], 10)
    assert page.locator("#history :is(script, b, img), #result :is(script, b)").count() == 0


def test_false_alarm_is_gone_after_an_update(visit, bundle_copy, runtime, test_images, tmp_path):
    """The whole way: false alarm, button, update, a new bundle in the old one's place, and no alarm."""
    for path in test_images:
        bright = tmp_path / f"bright-{path.name}"
        ImageEnhance.Brightness(Image.open(path).convert("L")).enhance(1.7).save(bright)
        if path.parent.name == "good" and runtime.predict([bright])[0].verdict == "anomalous":
            break
    prepare(tmp_path / "record")
    with app_server(bundle=bundle_copy, record=tmp_path / "record") as server:
        page = visit(server)
        choose(page, bright)
        verdict_is(page, "Anomalous", bright.name)
        page.locator("#say-good").click()
        expect(page.locator("#say-good")).to_have_attribute("aria-pressed", "true")
        command = ["update", str(bundle_copy), "--from", str(tmp_path / "record"), "--output", str(tmp_path / "new")]
        result = CliRunner().invoke(main, command, catch_exceptions=False)
        assert "1 before, 0 after" in result.output
        bundle_copy.rename(tmp_path / "old")
        (tmp_path / "new").rename(bundle_copy)
        version = version_of(bundle_copy)
        wait_for(lambda: predict(server.client, bright).json()["version"] == version, 30)
        choose(page, bright)
        verdict_is(page, "Normal", bright.name)
        expect(page.locator("#model-version")).to_have_text(version)


def test_words_by_keyboard_alone(visit, recording, defect, tmp_path):
    page = visit(recording)
    choose(page, defect[0])
    verdict_is(page, "Anomalous", defect[0].name)

    def tab_to(element):
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.locator(element).evaluate("element => element === document.activeElement"):
                assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
                return
        pytest.fail(f"{element} cannot be reached")

    tab_to("#say-good")
    page.keyboard.press("Space")
    expect(page.locator("#say-good")).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#say-good")).to_be_focused()
    tab_to("#say-bad")
    page.keyboard.press("Enter")
    expect(page.locator("#say-bad")).to_have_attribute("aria-pressed", "true")
    tab_to("#note")
    page.keyboard.type("scratch")
    page.keyboard.press("Tab")
    wait_for(lambda: [said.note for said in read_said(tmp_path / "record", "bad")] == ["scratch"], 10)
    assert read_said(tmp_path / "record", "good") == []


def test_older_answers(visit, recording, defect, tmp_path):
    for _ in range(25):
        assert predict(recording.client, defect[0]).status_code == 200
    wait_for(lambda: len(read_history(tmp_path / "record", Filter(), 99)) == 25, 10)
    page = visit(recording)
    for count in (20, 25):
        expect(page.locator("#history li")).to_have_count(count)
        expect(page.locator("#history canvas")).to_have_count(count)
        if count < 25:
            page.get_by_role("button", name="Show older ones").click()
    expect(page.locator("#older")).to_be_hidden()
    choose(page, defect[0])
    verdict_is(page, "Anomalous", defect[0].name)
    expect(page.locator("#history li")).to_have_count(25)
    expect(page.locator("#older")).to_be_visible()  # the oldest has made room
    page.locator("#older").click()
    expect(page.locator("#history li")).to_have_count(26)


@pytest.mark.parametrize("colors", ["light", "dark"])
def test_record_on_a_phone(visit, recording, defect, colors, keep):
    page = visit(recording, viewport={"width": 360, "height": 740}, color_scheme=colors)
    choose(page, defect[0])
    verdict_is(page, "Anomalous", defect[0].name)
    page.get_by_role("button", name="This part is good").click()
    expect(page.locator("#feedback-note")).to_have_text("Recorded: this part is good.")
    assert not scrolls_sideways(page)
    keep(page, f"phone-feedback-{colors}")


def test_record_that_cannot_be_written(visit, recording, defect, tmp_path):
    """The page says so, and the image is checked all the same."""
    page = visit(recording)
    choose(page, defect[0])
    verdict_is(page, "Anomalous", defect[0].name)
    problem = '{"status": 503, "code": "record_unavailable", "detail": "The record is full.", "request_id": "x"}'
    page.route("**/feedback", lambda route: route.fulfill(status=503, content_type="application/problem+json", body=problem))
    page.get_by_role("button", name="This part is good").click()
    expect(page.get_by_role("alert")).to_have_text("The record is full.")
    expect(page.locator("#say-good")).to_have_attribute("aria-pressed", "false")
    assert all("status of 503" in error for error in page.errors)
    page.errors.clear()


def test_without_a_record(page, defect):
    choose(page, defect[0])
    verdict_is(page, "Anomalous", defect[0].name)
    expect(page.locator("#feedback")).to_be_hidden()
    expect(page.locator("#older")).to_be_hidden()
    assert not [asked for asked in page.requested if "/history" in asked]
