"""The wheel of this checkout, for the Python that runs this."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from apps.deploy.plan import ROOT, DeployError

__all__ = ["build"]


def build(folder: Path, cuda: bool) -> Path:
    """Build the wheel into `folder` and return its path; the kernels are compiled, which takes half a minute or more.

    With `cuda` the CUDA kernels are built too where nvcc is found. Raises DeployError with what pip said last.
    """
    platform = sysconfig.get_platform()
    if platform != "linux-x86_64":
        raise DeployError(f"wheel: Spaces run on linux-x86_64 and this machine is {platform}; run this command on one")
    if not (ROOT / "pyproject.toml").is_file():
        raise DeployError(f"wheel: expected a checkout of the project in {ROOT}; run this command in one")
    with tempfile.TemporaryDirectory(prefix="nibble-wheel-") as scratch:
        done = subprocess.run(_pip(folder, Path(scratch), cuda), capture_output=True, text=True, check=False)
    if done.returncode:
        said = " | ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise DeployError(f"wheel: pip could not build it ({said})")
    return next(folder.glob("*.whl"))


def _pip(folder: Path, scratch: Path, cuda: bool) -> list[str]:
    # A build folder of its own: the one of `pip install -e .` may be in use.
    settings = [f"build-dir={scratch}", *([] if cuda else ["cmake.define.CUDA=OFF"])]
    options = [word for setting in settings for word in ("--config-settings", setting)]
    return [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(folder), *options, str(ROOT)]
