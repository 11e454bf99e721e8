"""The sketch app where the GPU is lent call by call: `spaces` as on ZeroGPU, with a lender of our own.

Run as a program, since `spaces` changes torch for the whole process; prints what happened as one JSON object. With a
CUDA device and a torch for it the GPU is real; without, the engine stays on the CPU and all else is the same.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

FORK = {"idle": False, "nvidiaIndex": 0, "nvidiaUUID": "0", "allowToken": "token"}
seconds: list[int] = []


class Lender(BaseHTTPRequestHandler):
    """Grants every wish; `idle` is false, so that each call gets a new fork."""

    def do_POST(self) -> None:
        asked = urlparse(self.path)
        if asked.path == "/schedule":
            seconds.append(int(parse_qs(asked.query)["durationSeconds"][0]))
        answer = json.dumps(FORK).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def never() -> bool:
    return False


def borrow_from(port: int, scratch: Path) -> str:
    """Import `spaces` as a Space on ZeroGPU does. Returns the device to load onto."""
    (scratch / "cgroup").write_text("0::/here\n")
    os.environ |= {
        "SPACES_ZERO_GPU": "true",
        "SPACES_ZERO_DEVICE_API_URL": f"http://127.0.0.1:{port}",
        "ZEROGPU_PROC_SELF_CGROUP_PATH": str(scratch / "cgroup"),
        "ZEROGPU_OFFLOAD_DIR": str(scratch / "tensors"),
    }
    import torch

    real = torch.version.cuda is not None and Path("/dev/nvidiactl").exists()
    if torch.version.cuda is None:
        # What `spaces` looks for and a torch without CUDA lacks.
        torch.version.cuda, torch._C._cuda_init, torch.cuda._is_in_bad_fork = "13.0", never, never
    import spaces.zero.torch

    if not real:
        spaces.zero.torch.init = lambda uuid: None
        spaces.zero.torch.move = lambda callback=None: None
    return "cuda" if real else "cpu"


def main() -> None:
    scratch = Path(tempfile.mkdtemp(prefix="nibble-lent-"))
    lender = ThreadingHTTPServer(("127.0.0.1", 0), Lender)
    threading.Thread(target=lender.serve_forever, daemon=True).start()
    device = borrow_from(lender.server_port, scratch)

    from gradio_client import Client, handle_file

    from apps.common import cli, runner
    from apps.sketch.run import APP

    studio = cli.open_studio(APP, cli.parser(APP).parse_args(["--device", device, "--precisions", "bf16"]))
    demo = cli.launch(studio, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    page = APP.examples[0]["canvas"]["background"]
    drawing = shutil.copy(page, studio.pictures.folder)

    def paint(alpha: float, events=runner.events, stop: bool = False) -> list[str]:
        values = {"prompt": APP.examples[0]["prompt"], "canvas": {"background": drawing}, "sketch_guidance": alpha}
        job, happened = studio.job(values, ("bf16",)), []
        for event in events(studio.pool, job):
            happened.append(type(event).__name__)
            if isinstance(event, runner.Finished):
                happened.append(hashlib.sha256(event.result.image.tobytes()).hexdigest())
            if stop:
                job.stop.set()
        return happened

    told = {
        "device": device,
        "weak": paint(0.2),
        "strong": paint(0.9),
        "weak again": paint(0.2),
        "stopped": paint(0.2, stop=True),
    }
    answer, facts = Client(demo.local_url, verbose=False).predict(
        prompt="a purple cone", canvas={"background": handle_file(page)}, api_name="/generate"
    )
    told |= {"api": Path(answer).stat().st_size, "settings": facts["settings"], "seconds": seconds}
    # The same with no fork, last: a process that has used the CPU's threads is not one to fork.
    told["here"] = paint(0.2, runner.on_device) if device == "cpu" else told["weak"]
    print(json.dumps(told), flush=True)
    studio.pictures.close()
    shutil.rmtree(scratch, ignore_errors=True)
    for child in multiprocessing.active_children():
        child.kill()
    # Forks and servers hold threads that would keep a plain end waiting.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
