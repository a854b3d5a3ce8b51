"""Build entry point; everything that can be declared is in pyproject.toml."""

from setuptools import setup

setup()
