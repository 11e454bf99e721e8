"""The direction of imports, and what importing costs: read from the source, and tried in a new process."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# package -> what it must never import, whether at the top or inside a function
FORBIDDEN = {
    "engine": ("gradio", "spaces", "apps", "safety", "zoo", "bench"),
    "safety": ("gradio", "diffusers", "engine", "apps", "zoo"),
    "apps": ("engine.kernels", "zoo", "bench"),
}


def sources(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"{package} has no sources"
    return found


def imports(path: Path) -> set[str]:
    """Every module that a file names in an import, relative ones made absolute; `from a import b` gives a and a.b."""
    package = path.relative_to(ROOT).parent.parts
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names.update([module, *(f"{module}.{alias.name}" for alias in node.names)])
    return names


def offenders(path: Path, forbidden: tuple[str, ...]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for name in sorted(imports(path))
        for root in forbidden
        if name == root or name.startswith(root + ".")
    ]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_go_one_way(package: str) -> None:
    assert [line for path in sources(package) for line in offenders(path, FORBIDDEN[package])] == []


def test_only_one_module_sees_the_kernels() -> None:
    allowed = ROOT / "engine" / "ops" / "backends.py"
    found = [
        line
        for package in FORBIDDEN
        for path in sources(package)
        if path != allowed and path.parent.name != "kernels"
        for line in offenders(path, ("engine.kernels",))
    ]
    assert found == []


def test_the_kernels_include_no_framework() -> None:
    include = re.compile(r'^\s*#\s*include\s*[<"](torch|ATen|c10|caffe2)\b', re.MULTILINE)
    files = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    assert files
    assert [str(path.relative_to(ROOT)) for path in files if include.search(path.read_text(encoding="utf-8"))] == []


def run_python(code: str) -> str:
    """What `code` prints in a new interpreter, warnings as shown to users."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_engine_is_light() -> None:
    code = (
        "import sys, time\n"
        "import torch\n"
        "start = time.process_time()\n"
        "import engine\n"
        "took = time.process_time() - start\n"
        "heavy = [m for m in ('gradio', 'spaces', 'safety', 'apps', 'diffusers', 'transformers') if m in sys.modules]\n"
        "print(heavy, torch.cuda.is_initialized(), took < 2.0)\n"
    )
    assert run_python(code).strip() == "[] False True"


def test_the_word_list_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\n"
        "from safety import check\n"
        "assert not check('nude').allowed\n"
        "print([m for m in ('torch', 'transformers', 'diffusers', 'gradio', 'engine') if m in sys.modules])\n"
    )
    assert run_python(code).strip() == "[]"


# There is no CPU build of torchvision, so nothing on the way to a picture may need it.
# None in sys.modules makes `import torchvision` fail, and finding it too, as where it is not installed.
WITHOUT_TORCHVISION = "import sys\nsys.modules['torchvision'] = None\n"


def test_nothing_needs_torchvision() -> None:
    modules = ("engine.generate", "engine.doctor", "safety.nsfw", "safety.qwen3guard", "apps.flux_t2i.run")
    code = WITHOUT_TORCHVISION + (
        "".join(f"import {module}\n" for module in modules) + "from diffusers import FluxPipeline\n"
        "from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast\n"
        "print('fine')\n"
    )
    assert run_python(code).strip().endswith("fine")
