"""Data loaders whose workers are spawned, as on Windows and macOS: they get the data sets by pickle."""

import pickle
import subprocess
import sys

import pytest
from helpers.training import ROOT, folder_datamodule, make_engine, make_model

RUN = """
import multiprocessing, sys
from patchcore_plugin.cli import main
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    main(sys.argv[1:])
"""


def test_data_sets_can_be_pickled(few, tmp_path):
    """The small twin: those of a training with images left out, after it."""
    (tmp_path / "leave_out.txt").write_text(f"{sorted((few / 'train/good').iterdir())[0]}\n", encoding="utf-8")
    datamodule = folder_datamodule(few)
    model = make_model(exclude=str(tmp_path / "leave_out.txt"))
    make_engine(tmp_path, limit_val_batches=0).fit(model, datamodule=datamodule)
    again = pickle.loads(pickle.dumps(datamodule.train_data))
    assert len(again) == len(datamodule.train_data) == 7
    assert again[0].image.equal(datamodule.train_data[0].image)


@pytest.mark.slow
def test_training_with_spawned_workers(few, tmp_path):
    (tmp_path / "run.py").write_text(RUN, encoding="utf-8")
    options = {"data.init_args.root": few, "data.init_args.num_workers": 1}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "run.py", "train", "--config", str(ROOT / "configs" / "elpv.yaml"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(tmp_path.rglob("model.ckpt"))
