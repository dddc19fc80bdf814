"""Same numbers after export: the runtime against torch on real images, whatever their number and size."""

import io
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from anomalib.data.utils import read_image
from anomalib.data.utils.tiler import Tiler
from helpers.bundles import change_manifest
from helpers.training import LAYERS, folder_datamodule, make_engine, make_model
from PIL import Image
from torchvision.transforms.v2 import Compose, InterpolationMode, Normalize, RandomHorizontalFlip, Resize

from patchcore_plugin import FaissPatchcore, PatchcoreRuntime
from patchcore_plugin.bundle import MANIFEST, BundleError
from patchcore_plugin.export import export_bundle
from patchcore_plugin.images import ImageError
from patchcore_plugin.model.torch_model import MemoryBankError


def torch_predictions(model, paths):
    """Raw scores, maps and verdicts of the model as Engine.predict gives them: training's own antialiased resize."""
    raw, maps, labels = [], [], []
    with torch.no_grad():
        for path in paths:
            image = model.pre_processor.transform(read_image(path, as_tensor=True)[None])
            answer = model.model(image)
            raw.append(float(answer.pred_score))
            maps.append(answer.anomaly_map[0, 0].numpy())
            labels.append(bool(model.post_processor(answer).pred_label))
    return np.array(raw), np.stack(maps), labels


def test_a_hundred_real_images(trained, runtime, test_images):
    assert len(test_images) == 100
    scores, maps, labels = torch_predictions(trained.model, test_images)
    answers = runtime.predict(test_images)
    np.testing.assert_allclose([answer.score for answer in answers], scores, rtol=1e-3)
    np.testing.assert_allclose(np.stack([answer.anomaly_map for answer in answers]), maps, rtol=1e-3)
    assert [answer.verdict == "anomalous" for answer in answers] == labels
    assert {True, False} == set(labels)


def test_verdict_of_the_image_that_set_the_threshold(trained, runtime, cells):
    """anomalib's threshold is one image's score: rounding must not move that image to the other side."""
    paths = sorted((cells / "test").rglob("*.png"))
    scores, _, labels = torch_predictions(trained.model, paths)
    closest = int(np.abs(scores - float(trained.model.post_processor.image_threshold)).argmin())
    assert scores[closest] == pytest.approx(float(trained.model.post_processor.image_threshold), rel=1e-6)
    assert (runtime.predict([paths[closest]])[0].verdict == "anomalous") == labels[closest]


def test_normalized_like_anomalib(trained, runtime, test_images):
    images = torch.stack([read_image(path, as_tensor=True) for path in test_images[:8]])
    with torch.no_grad():
        model = trained.model
        expected = model.post_processor(model.model(model.pre_processor.transform(images)))
    answers = runtime.predict(test_images[:8])
    np.testing.assert_allclose([answer.normalized_score for answer in answers], expected.pred_score, atol=1e-3)
    np.testing.assert_allclose([answer.normalized_map for answer in answers], expected.anomaly_map[:, 0], atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [{}, {"mode": "throughput"}, {"mode": "throughput", "threads": 3}, {"mode": "auto", "threads": 2}, {"threads": 1}],
)
def test_one_image_or_many_and_again(bundle, runtime, test_images, options):
    """An answer depends neither on the other images, nor on mode, threads or what was asked before."""
    alone = [runtime.predict([path])[0] for path in test_images[:8]]
    other = PatchcoreRuntime.load(bundle, **options)
    for _ in range(2):
        together = other.predict(test_images[:8])
        assert [answer.score for answer in together] == [answer.score for answer in alone]
        for one, same in zip(alone, together, strict=True):
            np.testing.assert_array_equal(one.anomaly_map, same.anomaly_map)
    pixels = [np.asarray(Image.open(path).convert("RGB")) for path in test_images[:8]]
    embeddings = runtime.embed(pixels)
    for image, embedding in zip(pixels, embeddings, strict=True):
        np.testing.assert_array_equal(runtime.embed([image])[0], embedding)


@pytest.mark.parametrize("mode", ["latency", "throughput", "auto"])
def test_bank_searched_in_bfloat16(bundle_copy, runtime, test_images, mode):
    """Scores are those of exact search, alone or among others."""
    manifest = json.loads((bundle_copy / MANIFEST).read_text("utf-8"))
    assert manifest["index"]["kind"] == runtime.bank.index == "flat"
    manifest["index"] |= {"kind": "bfloat16", "width": 2}
    (bundle_copy / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    approximate = PatchcoreRuntime.load(bundle_copy, mode=mode, cache=False)
    assert (approximate.bank.index, approximate.bank.width) == ("bfloat16", 2)
    found = approximate.predict(test_images[:12])
    for ours, expected in zip(found, runtime.predict(test_images[:12]), strict=True):
        assert ours.score == pytest.approx(expected.score, rel=1e-4)
        assert ours.verdict == expected.verdict
        assert np.mean(ours.patch_distances > expected.patch_distances * (1 + 1e-5)) < 0.01
    assert [again.score for again in approximate.predict(test_images[:3])] == [answer.score for answer in found[:3]]


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_compiled_network_is_kept(trained, tmp_path, test_images, precision):
    """Next to the bundle by default, one file for each part of the network and each mode; answers are the same."""
    path = export_bundle(trained.model, tmp_path / "bundle", precision=precision)
    expected = [answer.score for answer in PatchcoreRuntime.load(path, cache=False).predict(test_images[:4])]
    assert [file.name for file in tmp_path.iterdir()] == ["bundle"]
    for mode in ("latency", "throughput"):
        for _ in range(2):
            answers = PatchcoreRuntime.load(path, mode=mode).predict(test_images[:4])
            assert [answer.score for answer in answers] == expected
    parts = 2 if precision == "bf16" else 1
    kept = sorted((tmp_path / "bundle.cache").iterdir())
    assert [file.suffix for file in kept] == [".blob"] * 2 * parts
    PatchcoreRuntime.load(path, cache=tmp_path / "other")
    assert {file.name for file in (tmp_path / "other").iterdir()} < {file.name for file in kept}


def test_bundle_that_cannot_be_written_to(bundle, tmp_path, test_images):
    """Where the cache's folder cannot be made, the network is compiled every time."""
    (tmp_path / "file").write_text("")
    answer = PatchcoreRuntime.load(bundle, cache=tmp_path / "file" / "cache").predict(test_images[:1])[0]
    assert answer.score > 0


def test_stream_holds_few_images(bundle, test_images):
    """Images come from a generator, and are read when it is their turn."""
    runtime = PatchcoreRuntime.load(bundle, mode="throughput", threads=2)
    read = []

    def images():
        for path in test_images[:20]:
            read.append(path)
            yield path

    stream = runtime.stream(images())
    assert not read
    for number in range(20):
        assert next(stream).score > 0
        assert len(read) <= number + 1 + 2
    assert len(list(runtime.stream(test_images[:3]))) == 3


def test_mode_auto(bundle, runtime, test_images, monkeypatch):
    """An image that is alone has all threads, and one beside it its own; whoever asks, scores are the same."""
    auto = PatchcoreRuntime.load(bundle, mode="auto", threads=2)
    assert auto.mode == "auto"
    clock = SimpleNamespace(now=100.0, perf_counter=lambda: clock.now)
    with monkeypatch.context() as context:
        context.setattr("patchcore_plugin.runtime.runtime.time", clock)
        with auto._way() as alone, auto._way() as beside:
            assert (alone.bank.threads, beside.bank.threads) == (2, None)
            with auto._way() as third:
                clock.now += 3
            assert third is beside
        for after, expected in ((0, beside), (2.5, beside), (1, alone), (0, alone)):
            clock.now += after
            with auto._way() as way:
                assert way is expected
    assert auto.bank.vectors.ctypes.data == beside.bank.vectors.ctypes.data, "the bank is in memory once"
    expected = [prediction.score for prediction in runtime.predict(test_images)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda image: auto.predict([image])[0].score, test_images))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert auto._in_work == 0
    assert PatchcoreRuntime.load(bundle, mode="auto", threads=1).mode == "latency"
    assert PatchcoreRuntime.load(bundle, mode="auto", threads=2, device="HETERO:CPU").mode == "latency"
    monkeypatch.setattr("patchcore_plugin.runtime.runtime._TWICE_COMPILED_LIMIT", 1000)
    assert PatchcoreRuntime.load(bundle, mode="auto", threads=2).mode == "latency"


@pytest.mark.parametrize("mode", ["latency", "throughput", "auto"])
def test_what_happens_after_a_bad_image(bundle, test_images, tmp_path, mode):
    (tmp_path / "text.png").write_text("no image")
    runtime = PatchcoreRuntime.load(bundle, mode=mode)
    stream = runtime.stream([test_images[0], tmp_path / "text.png", *test_images[1:9]])
    assert next(stream).score > 0
    with pytest.raises(ImageError, match=r"text\.png cannot be read"):
        next(stream)
    assert next(stream, None) is None
    assert len(runtime.predict(test_images[:3])) == 3


@pytest.mark.parametrize("mode", ["latency", "throughput", "auto"])
def test_outcomes_go_on_after_a_bad_image(bundle, runtime, test_images, tmp_path, mode):
    """One outcome for each image, in order: all that was made of it, or its error."""
    (tmp_path / "text.png").write_text("no image")
    images = [tmp_path / "text.png", test_images[0], tmp_path / "absent.png", *test_images[1:5], tmp_path / "text.png"]
    outcomes = list(PatchcoreRuntime.load(bundle, mode=mode).stream_outcomes(images))
    assert len(outcomes) == len(images)
    for path, outcome in zip(images, outcomes, strict=True):
        if path.parent == tmp_path:
            kind, message = (ImageError, "cannot be read") if path.name == "text.png" else (FileNotFoundError, "absent.png")
            assert isinstance(outcome.error, kind)
            assert message in str(outcome.error)
            assert (outcome.pixels, outcome.embedding, outcome.prediction) == (None, None, None)
        else:
            assert outcome.error is None
            np.testing.assert_array_equal(outcome.pixels, np.asarray(Image.open(path).convert("RGB")))
            np.testing.assert_array_equal(outcome.embedding, runtime.embed([outcome.pixels])[0])
            assert outcome.prediction.score == runtime.predict([path])[0].score


class OneWay(io.BytesIO):
    """A file that can be read once, as a pipe."""

    def seek(self, *position):
        raise io.UnsupportedOperation


@pytest.mark.parametrize("mode", ["latency", "throughput", "auto"])
def test_each_image_is_decoded_once(bundle, test_images, mode):
    """Also where several callers share the thread that decodes ahead."""
    runtime = PatchcoreRuntime.load(bundle, mode=mode, threads=2)
    expected = [prediction.score for prediction in runtime.predict(test_images[:6])]

    def streams():
        return [OneWay(path.read_bytes()) for path in test_images[:6]]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: [prediction.score for prediction in runtime.stream(streams())], range(8)))
    assert found == [expected] * 8


def test_wrong_options(bundle):
    with pytest.raises(ValueError, match="mode must be 'latency', 'throughput' or 'auto', got 'fast'"):
        PatchcoreRuntime.load(bundle, mode="fast")
    with pytest.raises(ValueError, match="threads must be a whole number of at least 1, got 0"):
        PatchcoreRuntime.load(bundle, threads=0)


def test_images_of_any_size_and_kind(trained, runtime, test_images, tmp_path):
    """A 1024 x 768 color photo and a 300 x 300 gray one go in as they are, in one call, in any form."""
    gray = Image.open(test_images[0])
    assert (gray.size, gray.mode) == ((300, 300), "L")
    rng = np.random.default_rng(0)
    stripes = np.kron(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8), np.ones((32, 32, 1), np.uint8))
    photo = Image.fromarray(stripes)
    assert photo.size == (1024, 768)
    photo.save(tmp_path / "photo.png")
    sources = [test_images[0], tmp_path / "photo.png", str(test_images[1])]
    scores, maps, _ = torch_predictions(trained.model, sources)
    answers = runtime.predict(sources)
    np.testing.assert_allclose([answer.score for answer in answers], scores, rtol=1e-3)
    np.testing.assert_allclose([answer.anomaly_map for answer in answers], maps, rtol=1e-3)
    others = runtime.predict([gray, np.asarray(photo), np.asarray(Image.open(test_images[1]))])
    assert [answer.score for answer in others] == [answer.score for answer in answers]
    assert runtime.heatmap(photo, answers[1]).size == (1024, 768)
    assert runtime.heatmap(test_images[0], answers[0]).size == (300, 300)


@pytest.mark.parametrize("size", [(1, 1), (3, 2000), (2500, 1900), (256, 256), (255, 257)])
def test_extreme_sizes(trained, runtime, size, tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    picture.save(tmp_path / "image.png")
    scores, _, _ = torch_predictions(trained.model, [tmp_path / "image.png"])
    answer = runtime.predict([picture])[0]
    assert answer.score == pytest.approx(scores[0], rel=1e-3)
    assert runtime.heatmap(picture, answer).size == size


def test_threads(runtime, test_images):
    expected = [answer.score for answer in runtime.predict(test_images[:10])]
    results = {}

    def work(number):
        results[number] = [answer.score for answer in runtime.predict(test_images[number : 6 + number])]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert all(results[number] == expected[number : 6 + number] for number in range(4))


def test_wrong_input(runtime, tmp_path, test_images):
    with pytest.raises(TypeError, match=r"list of images, got one .*predict\(\[image\]\)"):
        runtime.predict(str(test_images[0]))
    for one in (str(test_images[0]), b"PNG", bytearray(b"PNG"), memoryview(b"PNG")):
        with pytest.raises(TypeError, match="list of images"):
            runtime.stream(one)
    with pytest.raises(TypeError, match="list of images"):
        runtime.predict(np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(TypeError, match="list of images"):
        runtime.predict(Image.new("L", (4, 4)))
    with pytest.raises(FileNotFoundError):
        runtime.predict([tmp_path / "absent.png"])
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ImageError, match=r"text\.png cannot be read"):
        runtime.predict([test_images[0], tmp_path / "text.png"])
    assert runtime.predict([]) == []


def test_crop_and_other_sizes(cells, tmp_path, test_images):
    """The paper's resize and crop, not square, in the graph."""
    pre_processor = FaissPatchcore.configure_pre_processor(image_size=(240, 200), center_crop_size=(193, 160))
    model = make_model(pre_processor=pre_processor, num_neighbors=1)
    make_engine(tmp_path).fit(model, datamodule=folder_datamodule(cells))
    runtime = PatchcoreRuntime.load(export_bundle(model, tmp_path / "bundle", index="flat"))
    scores, maps, labels = torch_predictions(model.eval(), test_images[::10])
    answers = runtime.predict(test_images[::10])
    np.testing.assert_allclose([answer.score for answer in answers], scores, rtol=1e-3)
    np.testing.assert_allclose([answer.anomaly_map for answer in answers], maps, rtol=1e-3)
    assert [answer.verdict == "anomalous" for answer in answers] == labels


def test_size_normalization_and_smoothing_travel(cells, tmp_path, test_images):
    """From the arguments to checkpoint, bundle and anomalib's own export: the same scores everywhere."""
    model = make_model(image_size=[160, 192], normalization="backbone", score_smoothing=1.5)
    engine = make_engine(tmp_path)
    engine.fit(model, datamodule=folder_datamodule(cells))
    loaded = FaissPatchcore.load_from_checkpoint(engine.best_model_path).eval()
    scores, maps, labels = torch_predictions(loaded, test_images[::10])
    np.testing.assert_allclose(torch_predictions(model.eval(), test_images[::10])[0], scores, rtol=1e-5)
    assert maps.shape[1:] == (160, 192)
    unsmoothed = maps.reshape(len(maps), -1).max(1)
    assert (scores < unsmoothed).all(), "the map is smoothed by half a patch alone"
    runtime = PatchcoreRuntime.load(export_bundle(loaded, tmp_path / "bundle"))
    assert runtime.manifest.preprocessing.mean == (0.5, 0.5, 0.5)
    assert runtime.manifest.embedding_dimension == 40 + 112
    answers = runtime.predict(test_images[::10])
    np.testing.assert_allclose([answer.score for answer in answers], scores, rtol=1e-3)
    np.testing.assert_allclose([answer.anomaly_map for answer in answers], maps, rtol=1e-3)
    assert [answer.verdict == "anomalous" for answer in answers] == labels
    graph = engine.export(loaded, "onnx", export_root=tmp_path)
    session = onnxruntime.InferenceSession(str(graph))
    images = torch.stack([read_image(path, as_tensor=True) for path in test_images[::10]])
    expected = loaded(images).pred_score
    np.testing.assert_allclose(session.run(["pred_score"], {"input": images.numpy()})[0], expected, rtol=1e-3, atol=1e-4)


def test_float16_model_exports(trained, tmp_path, test_images):
    model = FaissPatchcore.load_from_checkpoint(trained.checkpoint)
    model.model.half()
    runtime = PatchcoreRuntime.load(export_bundle(model, tmp_path / "bundle", index="flat"))
    assert model.model.memory_bank.dtype == torch.float16, "the model itself is left as it was"
    answer = runtime.predict(test_images[:1])[0]
    assert answer.score == pytest.approx(torch_predictions(trained.model, test_images[:1])[0][0], rel=0.01)


def test_model_without_thresholds(trained, tmp_path, test_images, caplog):
    model = FaissPatchcore.load_from_checkpoint(trained.checkpoint)
    model.post_processor = None
    runtime = PatchcoreRuntime.load(export_bundle(model, tmp_path / "bundle", index="flat"))
    assert "has no threshold" in caplog.text
    answer = runtime.predict(test_images[:1])[0]
    assert answer.score > 0
    assert (answer.verdict, answer.threshold, answer.normalized_score, answer.normalized_map) == (None, None, None, None)
    assert answer.ratio is None
    assert runtime.heatmap(test_images[0], answer).size == (300, 300)


@pytest.mark.parametrize("sensitivity", [0.0, 0.3, 0.8, 1.0])
def test_sensitivity(trained, tmp_path, test_images, sensitivity):
    model = FaissPatchcore.load_from_checkpoint(trained.checkpoint).eval()
    model.post_processor.image_sensitivity = sensitivity
    runtime = PatchcoreRuntime.load(export_bundle(model, tmp_path / "bundle", index="flat"))
    _, _, labels = torch_predictions(model, test_images[::4])
    assert [answer.verdict == "anomalous" for answer in runtime.predict(test_images[::4])] == labels


def test_unfitted_model_is_not_exported(tmp_path):
    with pytest.raises(MemoryBankError, match="train the model before exporting"):
        export_bundle(make_model(), tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


NORMALIZE = Normalize(mean=[0.5] * 3, std=[0.5] * 3)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (Compose([Resize((64, 64)), RandomHorizontalFlip(), NORMALIZE]), "has Resize, RandomHorizontalFlip, Normalize"),
        (Compose([Resize(64), NORMALIZE]), r"Resize with a height and a width.*has \[64\]"),
        (Compose([Resize((64, 64), antialias=False), NORMALIZE]), "antialias=True"),
        (Compose([Resize((64, 64), interpolation=InterpolationMode.BICUBIC), NORMALIZE]), "bilinear"),
        (None, "no pre-processor"),
    ],
)
def test_pre_processing_that_a_bundle_cannot_hold(trained, tmp_path, transform, message):
    from anomalib.pre_processing import PreProcessor

    model = FaissPatchcore.load_from_checkpoint(trained.checkpoint)
    model.pre_processor = PreProcessor(transform=transform)
    with pytest.raises(BundleError, match=message):
        export_bundle(model, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_tiled_model_with_positions_is_not_exported(trained, tmp_path):
    """A network of tiles does not know where in the image its patches lie."""
    model = FaissPatchcore.load_from_checkpoint(trained.checkpoint)
    model.model.tiler, model.model.position_weight = Tiler(tile_size=128, stride=128), 12.0
    with pytest.raises(BundleError, match="position_weight cannot be exported with tiles"):
        export_bundle(model, tmp_path / "bundle")


def test_other_backbone(cells, tmp_path, test_images):
    """A network of another family, with random weights: the conversion is what is tested."""
    torch.manual_seed(0)
    model = make_model(backbone="resnet18", layers=["layer2", "layer3"], pre_trained=False)
    make_engine(tmp_path).fit(model, datamodule=folder_datamodule(cells))
    runtime = PatchcoreRuntime.load(export_bundle(model, tmp_path / "bundle", index="flat"))
    scores, _, _ = torch_predictions(model.eval(), test_images[::20])
    np.testing.assert_allclose([answer.score for answer in runtime.predict(test_images[::20])], scores, rtol=1e-3)
    assert runtime.manifest.layers == ["layer2", "layer3"]
    assert runtime.manifest.layers != LAYERS


def test_network_is_complete_in_itself(bundle, runtime, test_images):
    """features.xml takes images of any size, in any OpenVINO program."""
    import openvino

    compiled = openvino.Core().compile_model(bundle / "features.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for size in [(300, 300), (768, 1024), (100, 90)]:
        images = [np.asarray(Image.open(path).convert("RGB").resize(size[::-1])) for path in test_images[:3]]
        result = compiled(np.stack(images))[0]
        np.testing.assert_allclose(result, runtime.embed(images), atol=1e-4 * np.abs(result).max())


def test_memory_of_a_large_photo(bundle):
    """24 megapixels are held as float once, and not for ever."""
    code = """if True:
        import sys, numpy, psutil
        from patchcore_plugin import PatchcoreRuntime
        runtime = PatchcoreRuntime.load(sys.argv[1])
        small = numpy.zeros((300, 300, 3), numpy.uint8)
        runtime.predict([small])
        before = psutil.Process().memory_info().rss
        runtime.predict([numpy.zeros((4000, 6000, 3), numpy.uint8)])
        runtime.predict([small])
        print("RESULT", psutil.Process().memory_info().rss - before)
    """
    done = subprocess.run([sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, check=True)
    assert int(done.stdout.split("RESULT")[1]) < 2 * 4 * 3 * 4000 * 6000


def test_pixel_sensitivity_moves_the_colors(trained, tmp_path, test_images):
    colored = []
    for sensitivity in (0.3, 0.5, 0.8):
        model = FaissPatchcore.load_from_checkpoint(trained.checkpoint)
        model.post_processor.pixel_sensitivity = sensitivity
        runtime = PatchcoreRuntime.load(export_bundle(model, tmp_path / f"bundle{sensitivity}", index="flat"))
        picture = np.asarray(runtime.heatmap(test_images[0], runtime.predict(test_images[:1])[0])).astype(int)
        colored.append(int((picture[:, :, 0] != picture[:, :, 2]).sum()))
    assert colored[0] < colored[1] < colored[2]


def test_rule_for_regions(bundle_copy, runtime, test_images):
    """In mm where the side of a pixel is known; what a limit leaves out is counted, and scores and verdicts stay."""
    plain = max(runtime.predict(test_images), key=lambda answer: len(answer.regions))
    image = test_images[[answer.score for answer in runtime.predict(test_images)].index(plain.score)]
    areas = sorted(region.area for region in plain.regions)
    assert len(areas) > 2
    assert plain.small_regions == 0

    def answer(**rule):
        change_manifest(bundle_copy, format_version=10, regions=rule)
        found = PatchcoreRuntime.load(bundle_copy).predict([image])[0]
        assert (found.score, found.verdict) == (plain.score, plain.verdict)
        return found

    found = answer(min_area=areas[1] * 0.05**2, mm_per_pixel=0.05)
    assert [region.area for region in found.regions] == [region.area for region in plain.regions if region.area >= areas[1]]
    assert found.small_regions == len(areas) - len(found.regions) > 0
    assert len(found.map_regions) == len(found.regions)
    first, same = found.regions[0], plain.regions[0]
    assert first.mm == pytest.approx((same.width * 0.05, same.height * 0.05, same.area * 0.05**2))
    assert same.mm is None
    found = answer(min_area=10**6)
    assert (found.regions, found.small_regions) == ([], len(areas))
    (everything,) = answer(close_gaps=300).regions
    assert everything.area == pytest.approx(sum(areas), abs=len(areas))
    change_manifest(bundle_copy, format_version=9)
    with pytest.raises(BundleError, match="format_version 9 has no regions"):
        PatchcoreRuntime.load(bundle_copy)


@pytest.mark.parametrize(
    "rule", [{"min_area": -1}, {"mm_per_pixel": 0}, {"mm_per_pixel": "x"}, {"close_gaps": 1.5}, {"a": 1}]
)
def test_rule_for_regions_that_cannot_be(bundle_copy, rule):
    change_manifest(bundle_copy, format_version=10, regions=rule)
    with pytest.raises(BundleError, match=r"regions\."):
        PatchcoreRuntime.load(bundle_copy)
