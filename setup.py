"""What pyproject.toml cannot say: recipes and DeepSpeed files of the checkout become part of the package."""

from setuptools import find_packages, setup

DATA = {"comoe.recipes": "launch/configs", "comoe.ds_configs": "ds_configs"}

setup(
    # The benchmarks measure a checkout.
    packages=[*find_packages(include=["comoe*"], exclude=["comoe.benchmarks*"]), *DATA],
    package_dir=DATA,
    include_package_data=False,
    package_data={
        "comoe": ["py.typed"],
        "comoe.recipes": ["*.yaml"],
        "comoe.ds_configs": ["*.json"],
    },
)
