from __future__ import annotations

import sys

import pydantic

from llamafactory.extras.packages import install_hint, is_installed, version


def test_installed_packages_are_found_without_importing_them() -> None:
    assert is_installed("pydantic")
    assert not is_installed("no_such_package_anywhere")
    assert is_installed("ensurepip")
    assert "ensurepip" not in sys.modules


def test_versions_are_those_of_distributions() -> None:
    assert version("pydantic") == pydantic.__version__
    assert version("no-such-package-anywhere") is None


def test_the_hint_is_a_command() -> None:
    assert install_hint("api") == 'pip install "llamafactory[api]"'
