"""Damage checkpoints and LoRAs in every way of bench/fuzz_mutations.py and see that each is refused in one sentence.

    python bench/fuzz_checkpoint.py                    20000 damaged files, besides truncated headers
    python bench/fuzz_checkpoint.py --trials 500       a quick look

Each file is opened and every tensor of it read; where the model's configuration was damaged, a model is built from it.
A trial is good when that raises one of the engine's errors with a message of one line, or works (a bit in a weight is
no damage that anybody could see). Another exception, a crash, more than `--seconds`, or more than `--mib` of the
process's own memory on top of the files' size is a failure, and the file is kept. Prints what was tried; exits 1 after
failures. Trials run in child processes, which a crash or a hang cannot take along.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.fuzz_mutations import MUTATIONS, damage_config, specials, truncations
from bench.load_time import Peak

DATA = Path(__file__).resolve().parent.parent / "tests" / "data"
MIB = 2**20
# Cut at every byte of the header; the others, whose headers are read by the same code, at every 61st.
WHOLE = ("sana", "t5", "lora-xlabs")


def bases(folder: Path) -> dict[str, Path]:
    """A small file of each kind: name -> the file that is damaged (where a folder is opened, its largest file)."""
    import torch
    from safetensors.torch import load_file, save_file

    from engine.checkpoint.translate import convert

    flux, sana = DATA / "flux_tiny_int4.safetensors", DATA / "sana_tiny_int4.safetensors"
    convert(flux, folder / "canonical", "canonical")
    convert(folder / "canonical", folder / "exact.safetensors", "nunchaku")
    convert(flux, folder / "lite", "nunchaku_lite")
    shutil.copytree(DATA / "flux_tiny_nvfp4_legacy", folder / "nvfp4")
    (folder / "nvfp4" / "expected.safetensors").unlink()
    rest = {name: value for name, value in load_file(flux).items() if "transformer_blocks." not in name}
    save_file(rest, folder / "nvfp4" / "unquantized_layers.safetensors")
    awq = load_file(DATA / "pack_t5_awq.safetensors")
    t5 = {f"encoder.block.0.layer.0.SelfAttention.q.{p}": awq[f"a.{p}"] for p in ("qweight", "scales", "scaled_zeros")}
    t5["encoder.final_layer_norm.weight"] = torch.ones(256, dtype=torch.bfloat16)
    save_file(t5, folder / "t5.safetensors", metadata={"config": json.dumps({"d_model": 256, "num_layers": 1})})
    for name in ("diffusers", "kohya_bfl", "xlabs"):
        shutil.copy(DATA / "lora" / f"{name}.safetensors", folder / f"lora-{name}.safetensors")
    shutil.copy(flux, folder / "flux.safetensors")
    shutil.copy(sana, folder / "sana.safetensors")
    single = {path.stem: path for path in folder.glob("*.safetensors")}
    largest = {path.name: _largest(path) for path in folder.iterdir() if path.is_dir()}
    return single | largest


def open_all(path: Path, build: bool = False) -> None:
    """Open what lies at `path` and read every tensor; `build` also makes the model."""
    from engine import SVDQuantFluxTransformer, SVDQuantSanaTransformer
    from engine.checkpoint.layouts import open_checkpoint
    from engine.checkpoint.quantization import read_quantization
    from engine.lora import read_lora

    if path.name.startswith("lora-"):
        read_lora(path)
        return
    with closing(open_checkpoint(path)) as source:
        kind = read_quantization(source).model_class
        for name in source:
            source[name]
    model = {"FluxTransformer2DModel": SVDQuantFluxTransformer, "SanaTransformer2DModel": SVDQuantSanaTransformer}
    if build and kind in model:
        model[kind].from_pretrained(path, device="cpu")


def outcome(path: Path, build: bool = False) -> str:
    """ "refused" or "opened", else what is wrong about how it was refused."""
    from engine.errors import EngineError

    try:
        open_all(path, build)
    except EngineError as error:
        text = str(error)
        return "refused" if "\n" not in text and 10 < len(text) < 2000 else f"bad message: {text[:300]!r}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    return "opened"


def _largest(folder: Path) -> Path:
    return max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)


Job = tuple[str, Callable[[], bytes], Path, bool]


def jobs(files: dict[str, Path], trials: int, seed: int) -> Iterator[Job]:
    """(what, damaged bytes, file to put them into, whether to build a model)."""
    for name, path in files.items():
        data = path.read_bytes()
        for cut in truncations(data, 1 if name in WHOLE else 61):
            yield f"{name}: truncated", (lambda cut=cut: cut), path, False
        for what, special in specials(data):
            yield f"{name}: {what}", (lambda special=special: special), path, False
    rng = random.Random(seed)
    datas = {name: path.read_bytes() for name, path in files.items()}
    texts = [path for name in ("lite", "nvfp4", "canonical") for path in files[name].parent.glob("*.json")]
    for _ in range(trials):
        own = random.Random(rng.randrange(2**63))
        if own.random() < 0.1:
            file = own.choice(texts)
            yield f"{file.name}", (lambda f=file, r=own: damage_config(f.read_text(), r).encode()), file, True
            continue
        name, (what, change) = own.choice(sorted(files)), own.choice(sorted(MUTATIONS.items()))
        build = what == "metadata" and own.random() < 0.5
        yield f"{name}: {what}", (lambda c=change, d=datas[name], r=own: c(d, r)), files[name], build


def trial(job: Job) -> dict[str, Any]:
    """Put the damaged bytes in place, open, put the good ones back."""
    what, damaged, path, build = job
    good, data = path.read_bytes(), damaged()
    whole = path.parent if path.parent.name in ("lite", "nvfp4", "canonical") else path
    path.write_bytes(data)
    began = time.monotonic()
    try:
        with Peak() as peak:
            result = outcome(whole, build)
        grown = peak.most - peak.before - len(data)
        told = {"what": what, "result": result, "seconds": time.monotonic() - began, "mib": grown / MIB}
        return told | ({} if result in ("refused", "opened") else {"file": keep(path)})
    finally:
        path.write_bytes(good)


def keep(path: Path) -> str:
    """A copy of a file that was not refused as it should be."""
    handle, name = tempfile.mkstemp(prefix="fuzz-", suffix=f"-{path.name}")
    with open(handle, "wb") as file:
        file.write(path.read_bytes())
    return name


def work(shares: int, share: int, trials: int, seed: int, pipe: Any) -> None:
    """Every `shares`-th job, in a child process with files of its own."""
    import logging

    import torch

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # diffusers tells of every configuration entry that it does not know
    with tempfile.TemporaryDirectory() as folder:
        files = bases(Path(folder))
        open_all(files["sana"], True)  # imports and first allocations are no trial's
        for index, job in enumerate(jobs(files, trials, seed)):
            if index % shares == share:
                pipe.send({"begins": job[0]})
                pipe.send(trial(job))
    pipe.send(None)


def gather(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Results of all child processes; one that dies or is silent for too long is a failure."""
    context = multiprocessing.get_context("spawn")
    rows: list[dict[str, Any]] = []
    children: dict[Any, tuple[Any, str]] = {}  # pipe -> process, what it tries
    for share in range(options.jobs):
        mine, theirs = context.Pipe(False)
        child = context.Process(target=work, args=(options.jobs, share, options.trials, options.seed, theirs))
        child.start()
        theirs.close()
        children[mine] = child, "start"
    while children:
        ready = wait(list(children), options.seconds + 60)
        for pipe in ready or list(children):
            child, last = children[pipe]
            try:
                message = pipe.recv() if ready else {"what": last, "result": "hangs"}
            except EOFError:
                child.join()
                message = {"what": last, "result": f"the process died ({child.exitcode})"}
            if message is not None and "begins" in message:
                children[pipe] = child, message["begins"]
                continue
            rows += [] if message is None else [message]
            if message is None or "seconds" not in message:
                child.kill()
                del children[pipe]
    return rows


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, run the trials, print a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20_000, help="damaged files, besides truncated and single ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="child processes")
    parser.add_argument("--seconds", type=float, default=20, help="that one file may take")
    parser.add_argument("--mib", type=float, default=512, help="of memory that one file may take on top of its size")
    options = parser.parse_args(argv)
    began = time.monotonic()
    rows = gather(options)
    kinds = Counter((row["what"].partition(": ")[2] or row["what"], row["result"]) for row in rows)
    for (kind, result), count in sorted(kinds.items()):
        print(f"{count:7}  {kind}: {result}")
    bad = [row for row in rows if row["result"] not in ("refused", "opened")]
    bad += [row for row in rows if row.get("seconds", 0) > options.seconds or row.get("mib", 0) > options.mib]
    slow, large = (max((row.get(key, 0.0) for row in rows), default=0.0) for key in ("seconds", "mib"))
    print(f"{len(rows)} files in {time.monotonic() - began:.0f} s: {len(bad)} failures; at most {slow:.2f} s a file, "
          f"{large:.0f} MiB on top of its size")  # fmt: skip
    for row in bad[:50]:
        print(json.dumps(row))
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
