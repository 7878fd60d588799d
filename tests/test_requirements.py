"""requirements.lock holds what the other files ask for, with hashes and without an address."""

import pathlib
import re

import pytest
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12")


def locked(python: str) -> dict[str, str]:
    """Return {name: version} of the packages that the lock has for a version of Python."""
    text = (ROOT / "requirements.lock").read_text()
    found = {}
    for entry in re.findall(r"^([\w.-]+==[^\\\n]+)\\?$", text, re.MULTILINE):
        requirement = Requirement(entry.strip())
        environment = {
            "python_version": python,
            "python_full_version": f"{python}.7",
            "sys_platform": "linux",
            "platform_machine": "x86_64",
        }
        if requirement.marker is None or requirement.marker.evaluate(environment):
            found[normal(requirement.name)] = str(requirement.specifier).removeprefix("==")
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("python", PYTHONS)
def test_what_is_asked_for_is_locked_within_its_bounds(python):
    versions = locked(python)
    asked = 0
    for file in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / file).read_text().splitlines():
            text = line.partition("#")[0].strip()
            if not text:
                continue
            requirement = Requirement(text)
            if requirement.marker and not requirement.marker.evaluate({"python_version": python}):
                continue
            version = versions[normal(requirement.name)]
            assert requirement.specifier.contains(version), f"{requirement}: {version}"
            asked += 1
    assert asked > 15


def test_each_package_has_hashes_and_no_address_is_named():
    text = (ROOT / "requirements.lock").read_text()
    entries = re.split(r"^(?=[\w.-]+==)", text, flags=re.MULTILINE)[1:]
    assert len(entries) > 60
    assert all("--hash=sha256:" in entry for entry in entries)
    assert "://" not in text and "--index" not in text.replace("--no-emit-index-url", "")
