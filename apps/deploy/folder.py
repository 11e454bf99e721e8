"""A complete Space in a folder: README.md, requirements.txt, app.py, the wheel and the small model's weights."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from apps.deploy import wheel
from apps.deploy.plan import ROOT, ZERO, DeployError, Plan, check_folder
from engine import __version__

__all__ = ["app_file", "front_matter", "pins", "readme", "requirements", "write"]

# Spaces install these themselves, gradio at the version of the README; a pin of ours could contradict theirs.
_PLATFORM = ("gradio", "spaces", "huggingface_hub")
# The only versions that ZeroGPU runs; the newest is taken.
_ZERO_TORCH = ("2.8.0", "2.9.1", "2.10.0", "2.11.0")
# Without it a Space with no GPU would install gigabytes of CUDA.
_CPU_TORCH = "--extra-index-url https://download.pytorch.org/whl/cpu"
# For those who push the folder with git; the hub's own upload finds out by itself.
_LARGE_FILES = ("*.safetensors", "*.whl", "*.png", "*.model", "tokenizer.json")

_APP = '''"""{title}, as a Hugging Face Space.

Written by `python -m apps.deploy {slug}`; write it anew rather than edit it.
"""

import os
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
if sys.version_info[:2] != ({python}):
    raise SystemExit("The wheel beside this file is for Python {dotted}; README.md asks the Space for it.")
os.environ["ENGINE_ZOO"] = str(HERE / "weights")
# Spaces switch on server-side rendering, with which this page was not tried.
os.environ["GRADIO_SSR_MODE"] = "false"

# requirements.txt is installed before these files are there, so the wheel cannot stand in it. It is unpacked here.
packages = tempfile.TemporaryDirectory(prefix="nibble-")
with zipfile.ZipFile(HERE / "{wheel}") as wheel:
    wheel.extractall(packages.name)
sys.path.insert(0, packages.name)
{spaces}
from apps.common.cli import main
from apps.{slug}.run import APP

if __name__ == "__main__":
    raise SystemExit(main(APP, {flags}))
'''
_SPACES = "\nimport spaces  # before torch, as ZeroGPU wants it\n"


def write(plan: Plan, folder: Path, build: Callable[[Path, bool], Path] = wheel.build) -> Path:
    """Write the Space into `folder`, which must be empty or not there; it appears whole or not at all.

    Raises DeployError where that cannot be.
    """
    check_folder(folder)
    for weights in plan.weights:
        if not weights.is_dir():
            raise DeployError(f"model: the weights of {plan.spec.title} are not in {weights}; fetch the checkout again")
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _fill(plan, partial, build)
        partial.chmod(0o755)
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def _fill(plan: Plan, folder: Path, build: Callable[[Path, bool], Path]) -> None:
    # ZeroGPU's cards have compute capability 12.0, for which no kernel is ready, and show another before they are lent.
    built = build(folder, not plan.cpu and not plan.zero)
    large = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in _LARGE_FILES)
    texts = {
        "README.md": readme(plan),
        "requirements.txt": requirements(plan),
        "app.py": app_file(plan, built.name),
        ".gitattributes": large,
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    for weights in plan.weights:
        shutil.copytree(weights, folder / "weights" / weights.name)


def pins() -> dict[str, str]:
    """What requirements.txt of the checkout pins: name to version."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return {found[1]: found[2] for line in lines if (found := re.fullmatch(r"([\w-]+)(?:\[\w+\])?==([\w.+]+)", line))}


def requirements(plan: Plan) -> str:
    """The pins of the checkout, less what Spaces install themselves; on ZeroGPU with a torch that it has."""
    wanted = {name: version for name, version in pins().items() if name not in _PLATFORM}
    if plan.zero:
        wanted["torch"] = _ZERO_TORCH[-1]
    lines = [f"{name}=={version}" for name, version in wanted.items()]
    return "\n".join([_CPU_TORCH, *lines] if plan.cpu else lines) + "\n"


def front_matter(plan: Plan) -> dict[str, object]:
    """The settings at the head of a Space's README.md, in the hub's own words."""
    painted = " and ".join(precision.upper() for precision in plan.precisions)
    settings: dict[str, object] = {
        "title": f"Nibble Studio: {plan.app.title}",
        "emoji": "🎨",
        "colorFrom": "indigo",
        "colorTo": "green",
        "sdk": "gradio",
        "sdk_version": pins()["gradio"],
        "python_version": plan.python,
        "app_file": "app.py",
        "license": "apache-2.0",
        "short_description": f"{plan.app.title}, in {painted}{' side by side' * (len(plan.precisions) > 1)}",
        "tags": ["mcp-server", "image-generation", "quantization"],
    }
    if plan.repositories:
        # Large weights are fetched when the Space starts; half an hour, the default, may not do.
        settings |= {"models": list(plan.repositories), "startup_duration_timeout": "1h"}
    # ZeroGPU is not among the values that the hub documents here.
    return settings if plan.hardware == ZERO else settings | {"suggested_hardware": plan.hardware}


def readme(plan: Plan) -> str:
    """README.md: the settings and a few words."""
    # JSON's strings, numbers and lists are YAML's too.
    settings = "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in front_matter(plan).items())
    gated = (
        f"\nThe weights are gated: give this Space a secret named `HF_TOKEN`, a read token of an account that has "
        f"accepted the licence of {' and '.join(plan.repositories)}.\n"
    )
    return (
        f"---\n{settings}---\n\n# {plan.app.title}\n\n{plan.app.summary}\n\n"
        f"It paints with {plan.spec.title} ({plan.spec.licence or 'see its model card'}). The page is also an API and "
        f"an MCP tool; the link is in its footer.\n{gated if plan.spec.gated else ''}\n"
        f"Written by `python -m apps.deploy {plan.app.slug}` of Nibble Studio {__version__}.\n"
    )


def app_file(plan: Plan, wheel: str) -> str:
    """app.py: unpack the wheel, then the app's own command line with the flags of a host."""
    # The port is Gradio's own first choice, which is where Spaces look.
    flags = ["--host", "0.0.0.0", "--model", plan.spec.name, "--precisions", *plan.precisions]
    major, minor = plan.python.split(".")
    return _APP.format(
        title=plan.app.title,
        slug=plan.app.slug,
        python=f"{major}, {minor}",
        dotted=plan.python,
        wheel=wheel,
        spaces=_SPACES if plan.zero else "",
        flags=json.dumps(flags),
    )
