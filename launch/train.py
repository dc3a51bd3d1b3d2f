"""Train: `deepspeed launch/train.py [experiment=NAME] [group.setting=value ...]`, or `python launch/train.py` for one process."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the launcher leaves the repository's root off the path
sys.argv = [argument for argument in sys.argv if not argument.startswith("--local_rank")]  # Hydra knows no such option

import hydra
from omegaconf import DictConfig

from launch.config import HARDWARE_EXPERIMENT, register_defaults, to_config, with_experiment
from launch.default_data import make_if_missing
from shapediff.engine.trainer import train
from shapediff.errors import ShapediffError


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(settings: DictConfig) -> None:
    """Turn settings into a typed config, make the default data set if it is asked for and missing, train."""
    is_main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if is_main else logging.ERROR, format="%(message)s", force=True)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        config = to_config(settings)
        if is_main:  # the other ranks wait for this one where they join it
            make_if_missing(config.data)
        sys.exit(train(config))
    except ShapediffError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    sys.argv = with_experiment(sys.argv, HARDWARE_EXPERIMENT)
    register_defaults()
    main()
