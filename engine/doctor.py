"""Say what this machine can run, and why: `python -m engine.doctor [--json]`."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["examine", "main"]

_ABOUT = {
    "amx": "8-bit matrix tiles (AMX-INT8)",
    "avx512": "AVX-512 with VNNI dot products",
    "avx2": "AVX2",
    "scalar": "compiled, without vector instructions",
    "sm90a": "Hopper (H100, H200), W4A8 with e4m3 tokens; W4A4 runs on sm80's kernels",
    "sm80": "Ampere and later, W4A4 and W4A8 by integers; taken after a self-check, since it was tested on Hopper only",
    "sm120a": "RTX 50, NVFP4 weights and tokens; compiled, never run, taken where ENGINE_BACKEND=sm120a says so",
    "reference": "plain torch: right everywhere, slow",
}
_PACKAGES = ("torch", "diffusers", "transformers", "gradio", "safetensors")


def examine() -> dict[str, Any]:
    """Collect versions, devices with every backend's verdict, and the models that can be opened here."""
    import torch

    from engine import __version__, ops
    from engine.models.catalogue import CATALOGUE

    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    return {
        "nibble": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "devices": [_device(device, ops.backends) for device in devices],
        "models": [_model(spec) for spec in CATALOGUE.values()],
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device(device: Any, backends: Any) -> dict[str, Any]:
    import torch

    from engine.errors import BackendError

    report: dict[str, Any] = {"device": str(device), "name": _processor()}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        report |= {
            "name": torch.cuda.get_device_name(device),
            "capability": f"{major}.{minor}",
            "memory_gib": round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1),
        }
    else:
        report["threads"] = torch.get_num_threads()
    report["backends"] = []
    for row in backends.table(device):
        why = row.why or backends.objection(row.name, device)
        report["backends"].append({"name": row.name, "runs": not why, "why": why or _ABOUT.get(row.name, "")})
    try:
        with warnings.catch_warnings():
            # Falling back to the reference warns whoever runs a model; here it is what the report is about.
            warnings.simplefilter("ignore", RuntimeWarning)
            report["chosen"] = backends.select(device).name
    except BackendError as error:
        report |= {"chosen": None, "error": str(error)}
    return report


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        return names[0] if names else platform.processor()
    except OSError:
        return platform.processor() or platform.machine()


def _model(spec: Any) -> dict[str, Any]:
    here = {"bf16": spec.local or _cached(spec.source, "model_index.json")}
    for precision, place in spec.checkpoints.items():
        repository, _, file = place.rpartition("/")
        here[precision] = Path(place).exists() or _cached(repository, file)
    return {
        "name": spec.name,
        "source": spec.source,
        "on_this_machine": here,
        "made_when_asked_for": [precision for precision in spec.checkpoints if here["bf16"] and spec.makes(precision)],
        "download_gib": spec.download_gib,
    }


def _cached(repository: str, file: str) -> bool:
    """Whether a hub file was downloaded before; a path on this machine is no hub id."""
    from huggingface_hub import try_to_load_from_cache

    if Path(repository).is_absolute() or repository.count("/") != 1:
        return False
    return isinstance(try_to_load_from_cache(repository, file), str)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; exit status 1 when some device has no backend that can run."""
    parser = argparse.ArgumentParser(
        prog="python -m engine.doctor",
        description="Say which kernels each device of this machine gets and why, and which models can be opened.",
        epilog="ENGINE_BACKEND=avx2 (or another name below) forces one backend; one that cannot run is then an error.",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    args = parser.parse_args(argv)
    report = examine()
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    return 0 if all(device["chosen"] for device in report["devices"]) else 1


def _print(report: dict[str, Any]) -> None:
    packages = ", ".join(f"{name} {version or 'absent'}" for name, version in report["packages"].items())
    print(f"Nibble Studio {report['nibble']} on Python {report['python']}: {packages}")
    for device in report["devices"]:
        extra = (
            f", compute capability {device['capability']}, {device['memory_gib']} GiB" if "capability" in device else ""
        )
        print(f"\n{device['device']}: {device['name']}{extra}")
        for row in device["backends"]:
            mark = "->" if row["name"] == device["chosen"] else "  "
            print(f"  {mark} {row['name']:<10} {'runs' if row['runs'] else 'no':<5} {row['why']}")
        if device.get("error"):
            print(f"  !! {device['error']}")
    print("\nmodels on this machine:")
    for model in report["models"]:
        have = [precision for precision, here in model["on_this_machine"].items() if here]
        have += [f"{precision} (made when asked for)" for precision in model["made_when_asked_for"]]
        print(f"  {model['name']:<16} {', '.join(have) or _absent(model)}")


def _absent(model: dict[str, Any]) -> str:
    if Path(model["source"]).is_absolute():
        return "not in this checkout; zoo/README.md tells how it is trained"
    return f"not here; about {model['download_gib']:g} GiB from {model['source']}"


if __name__ == "__main__":
    sys.exit(main())
