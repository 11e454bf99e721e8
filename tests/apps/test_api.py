"""The page's programming interface, called as other programs call it, and what the page serves besides."""

from __future__ import annotations

import asyncio
import json
import socket
import urllib.request
from pathlib import Path

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

from apps.common import api
from engine import Request, read_metadata
from tests.apps.conftest import serving
from tests.apps.fake import paint


@pytest.fixture(scope="module")
def client(page, tmp_path_factory) -> Client:
    return Client(page.url, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return answer.read().decode()


def test_generate_gives_the_picture_and_its_measurements(page, client):
    picture, facts = client.predict(
        prompt="a red cube", seed=11, steps=3, width=128, height=144, precision="bf16", api_name="/generate"
    )
    path = picture if isinstance(picture, str) else picture["path"]
    request = Request("a red cube", 11, 3, None, 128, 144).resolved(page.studio.choice.spec)
    with Image.open(path) as image:
        assert image.convert("RGB").tobytes() == paint(request, "bf16").tobytes()
    assert read_metadata(path) == facts["settings"]
    assert (facts["settings"]["seed"], facts["settings"]["precision"]) == (11, "bf16")
    assert facts["measurements"]["weight_bytes"] == 60_000_000


def test_the_same_call_gives_the_same_bytes(client):
    pictures = [client.predict(prompt="a cone", seed=3, steps=2, api_name="/generate")[0] for _ in range(2)]
    first, second = (Path(p if isinstance(p, str) else p["path"]).read_bytes() for p in pictures)
    assert first == second


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"prompt": ""}, "prompt: expected a description of the picture, got an empty text"),
        ({"prompt": "x" * 10_000}, "prompt: expected at most 4000 characters, got 10000"),
        ({"prompt": "x", "width": 250}, "width: expected a whole number from 128 to 512, a multiple of 16, got 250"),
        ({"prompt": "x", "steps": 0}, "steps: expected a whole number from 1 to 50, got 0"),
        ({"prompt": "x", "precision": "int3"}, "precision: expected one of bf16, int4, got 'int3'"),
        ({"prompt": "x", "style": "Baroque"}, "style: expected one of"),
        ({"prompt": "a naked child"}, "The prompt was refused: "),
    ],
)
def test_a_bad_call_gives_one_sentence(client, values, words):
    with pytest.raises(AppError) as caught:
        client.predict(**values, api_name="/generate")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_style_is_part_of_what_is_painted_and_checked(client):
    facts = client.predict(prompt="a {prompt} cube", steps=1, style="Manga", api_name="/generate")[1]
    assert facts["settings"]["prompt"].startswith("a manga panel of a {prompt} cube, ")


def test_only_generate_is_public_and_its_parameters_are_described(client):
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(endpoints) == {"/generate"}
    names = {parameter["parameter_name"]: parameter for parameter in endpoints["/generate"]["parameters"]}
    own = {"prompt", "seed", "steps", "guidance", "style", "style_words", "width", "height", "precision"}
    assert set(names) == own | {"lora", "lora_file", "lora_strength"}
    assert names["precision"]["type"] == {"enum": ["bf16", "int4"]}
    assert not names["prompt"]["parameter_has_default"]
    assert all(parameter["parameter_has_default"] for name, parameter in names.items() if name != "prompt")


def test_the_endpoint_documents_every_argument(studio):
    document = api.endpoint(studio).__doc__ or ""
    for control in studio.controls:
        assert f"    {control.name}: " in document


def test_openapi_names_the_endpoint(page):
    assert any(path.endswith("generate") for path in json.loads(fetch(f"{page.url}gradio_api/openapi.json"))["paths"])


def test_generate_is_an_mcp_tool(page):
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    async def heard(*_):
        """A client that listens to progress gets the picture itself; Gradio answers others with its address."""

    async def call():
        async with (
            streamablehttp_client(f"{page.url}gradio_api/mcp/") as (read, write, _),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            tools = (await session.list_tools()).tools
            values = {"prompt": "a red cube", "steps": 2}
            return (
                tools,
                await session.call_tool("generate", values, progress_callback=heard),
                await session.call_tool("generate", values),
            )

    tools, answer, plain = asyncio.run(call())
    assert [tool.name for tool in tools] == ["generate"]
    assert "Seed of the noise" in tools[0].inputSchema["properties"]["seed"]["description"]
    assert not answer.isError
    assert [part.type for part in answer.content] == ["image", "text", "text"]
    assert "ms_per_step" in answer.content[-1].text
    assert "flux_t2i-7-int4.png" in plain.content[0].text


def test_two_calls_at_once_take_turns():
    with serving("--precisions", "int4") as served:
        client = Client(served.url, verbose=False)
        jobs = [client.submit(prompt="a cube", seed=seed, steps=4, api_name="/generate") for seed in range(3)]
        assert sorted(job.result(timeout=60)[1]["settings"]["seed"] for job in jobs) == [0, 1, 2]


def test_the_page_names_nothing_outside_itself(page):
    html = fetch(page.url)
    for elsewhere in ("fonts.googleapis", "fonts.gstatic", "cdnjs", "jsdelivr", "unpkg", "huggingface.co/front"):
        assert elsewhere not in html


def test_starting_needs_no_network(monkeypatch):
    real = socket.socket.connect

    def connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"reached out to {address}")
        return real(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    with serving() as served:
        assert "Nibble Studio" in fetch(served.url)
