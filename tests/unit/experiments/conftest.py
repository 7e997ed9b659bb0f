"""Experiments without training: the smoke encoder, and a recipe of four tasks on it."""

import pytest

from comoe.config.load import load_recipe
from comoe.experiments.runner import Experiment
from comoe.starter.registry import resolve
from tests.helpers_compare import ROOT, experiment_of


@pytest.fixture(scope="session")
def encoder() -> str:
    return resolve(load_recipe(ROOT / "launch/configs/smoke.yaml"), progress=False).model.encoder


@pytest.fixture
def experiment(tmp_path, encoder) -> Experiment:
    return experiment_of(tmp_path, encoder)
