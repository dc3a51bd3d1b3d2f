"""Every file of conf/experiment: its first lines say how to run it, and what they say is true."""

from __future__ import annotations

import argparse
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import torch

from launch.config import compose
from shapediff.config_io import to_dict
from shapediff.engine.config import TrainConfig
from shapediff.engine.planning import Plan
from shapediff.hardware import ACCELERATORS
from shapediff.methods import WganGpConfig
from shapediff.models import PRESETS

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
RESOLUTION = 32
"""Of data sets whose resolution an experiment leaves open."""


def head(name: str) -> dict[str, str]:
    """The labelled first lines of an experiment, continued lines joined."""
    first, *lines = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert first == "# @package _global_"
    found: dict[str, str] = {}
    for line in lines:
        match = re.match(r"# (\w+):\s+(.*)", line)
        if match:
            found[match[1]] = match[2]
        elif line.startswith("#           "):
            found[list(found)[-1]] += " " + line[1:].strip()
        else:
            break
    return found


def parsed(tool: str, arguments: list[str]) -> argparse.Namespace:
    """As the tool itself reads them; a mistake ends the test."""
    return import_module(f"data_tools.{tool}")._parser().parse_args(arguments)


def test_there_is_what_is_promised() -> None:
    assert {
        "chairs32",
        "shapes32",
        "shapes64",
        "octree32",
        "modelnet10",
        "cpu",
        "gpu",
        "quickstart",
        "shape_vae",
        "shape_vae64",
        "latent32",
        "wgan",
    } == set(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_first_lines_say_how_on_what_how_long_and_how_well(name: str) -> None:
    assert list(head(name)) == ["Command", "Hardware", "Time", "Metric"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_it_builds(name: str) -> None:
    """Composed and built without memory; its batch divides over 1 to 4 GPUs."""
    config = compose([f"experiment={name}"], experiment="")
    method = config.method.build(resolution=config.data.resolution or RESOLUTION, num_classes=12)
    method.check_sampling(config.sampling)
    with torch.device("meta"):
        networks = method.build_networks(config.model)
    assert all(p.is_meta for network in networks.values() for p in network.parameters())
    for world_size in (1, 2, 4):
        config.train.split(world_size)


def test_the_steps_of_the_generator_are_those_of_its_experiment() -> None:
    """docs/training.md counts them for experiment=wgan, and for the method as it is by default."""
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    match = re.search(
        r"`train.steps=(\d+)` is ([\d,]+) steps of the generator with the experiment's \w+, and ([\d,]+) with", page
    )
    assert match
    steps, *written = (int(number.replace(",", "")) for number in match.groups())
    method = compose(["experiment=wgan"], experiment="").method
    assert isinstance(method, WganGpConfig)
    assert written == [steps // config.num_critic_steps for config in (method, WganGpConfig())]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_its_commands_are_understood(name: str) -> None:
    """Each by the parser that would read it; the folders lead from one to the next and to data.path."""
    *preparing, training = (shlex.split(command) for command in head(name)["Command"].split("&&"))
    if name == "quickstart":
        assert (
            training == ["make", "quickstart"]
            and "experiment=quickstart" in (ROOT / "tools" / "quickstart.sh").read_text()
        )
        return
    assert training[:2] == ["deepspeed", "launch/train.py"]
    config = compose(training[2:], experiment="")
    assert config == compose([f"experiment={name}"], experiment="")
    out = None
    for python, script, *arguments in preparing:
        assert python == "python"
        args = parsed(Path(script).stem, arguments)
        if script == "data_tools/prepare.py":
            assert args.meshes == out and args.resolution == config.data.resolution
        out = args.out
    assert out is None or out == Path(config.data.path)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_estimates_are_those_of_the_plan(name: str) -> None:
    said = re.findall(r"([\d.]+) hours on one (\w+)", head(name)["Time"])
    assert bool(said) == ("estimated" in head(name)["Time"])
    for hours, gpu in said:
        assert planned(name, gpu).hours() == pytest.approx(float(hours), rel=0.05, abs=0.05)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_it_fits_the_hardware_it_names(name: str) -> None:
    for gigabytes, settings in re.findall(r"of (\d+) GB(?: with ([\w.=]+))?", head(name)["Hardware"]):
        plan = planned(name, "rtx4090", *settings.split())
        assert plan.memory().total <= int(gigabytes) * 10**9 * 0.95


def planned(name: str, gpu: str, *settings: str) -> Plan:
    config = compose([f"experiment={name}", *settings], experiment="")
    resolution = config.data.resolution or RESOLUTION
    return Plan(config, resolution=resolution, num_classes=12, gpu=ACCELERATORS[gpu], num_gpus=1, autocast=True)


def test_a_model_of_choice_takes_the_place_of_the_experiment_s() -> None:
    config = compose(["experiment=shapes64", "model=dit3d_b4"], experiment="")
    assert to_dict(config.model) == to_dict(PRESETS["dit3d_b4"])
    assert isinstance(config, TrainConfig) and config.data.resolution == 64
