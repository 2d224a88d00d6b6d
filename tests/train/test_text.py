"""The data commands read rows as training does, and load no part of training that needs a model."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

from llamafactory.hparams.run_config import RunConfig
from llamafactory.hparams.train import TrainConfig
from llamafactory.train.text import data_seed


def test_the_seed_of_rows_is_that_of_the_run_unless_given() -> None:
    cfg = RunConfig(command="train", train=TrainConfig(seed=7))
    assert data_seed(cfg) == 7
    assert data_seed(replace(cfg, train=TrainConfig(seed=7, data_seed=9))) == 9


def test_reading_text_loads_neither_the_loop_nor_model_classes() -> None:
    code = "import sys, llamafactory.train.text; print([n for n in sys.modules if n in sys.argv[1:]])"
    heavy = ["llamafactory.train.build", "transformers.modeling_utils", "accelerate", "peft"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
