"""Clients that others wrote, against a running server: what they show is what the engine says.

The `openai` Python package is in test_server.py, beside the rest of what goes over a socket.
"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from support.server import serving

from rookery.serve.app import create_app

NPM = Path(__file__).parent / "npm"


@pytest.fixture(scope="module")
def address(llm):
    with serving(create_app({"tiny": llm})) as address:
        yield f"{address}/v1"


@pytest.fixture(scope="module")
def shown(address):
    """What the clients from npm print."""
    if shutil.which("node") is None:
        pytest.skip("needs node: apt-get install nodejs npm")
    if not (NPM / "node_modules").is_dir():
        pytest.skip("needs packages from npm: make npm-clients")
    done = subprocess.run(["node", NPM / "clients.mjs", address], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_openais_npm_package_gets_what_the_engine_says(shown, llm):
    shown = shown["openai"]
    assert shown["completion"] == llm.generate("Once", 8, temperature=0)
    assert shown["chat"] == shown["streamed"] == llm.session().say("Hello", 8, seed=4)
    session = llm.session()
    assert shown["responses"] == [session.say(text, 8, temperature=0) for text in ("Hello", "More")]
    assert_fits(shown["call"])
    assert (shown["embedding"], shown["models"]) == (256, ["tiny"])
    assert shown["error"] == [True, 404, "model_not_found"]


def test_vercels_ai_package_gets_what_the_engine_says(shown, llm):
    shown = shown["vercel"]
    assert shown["completion"]  # the package writes roles into the prompt
    assert shown["chat"].strip() == shown["streamed"] == llm.session().say("Hello", 8, seed=4)
    assert_fits(shown["call"])
    assert_fits(shown["object"])
    assert shown["embedding"] == 256


def assert_fits(answer):
    assert answer["city"] in ("Oslo", "Rome")
    assert answer["days"] in (1, 2, 3)


def test_langchain_streams_calls_tools_and_gives_objects(address, llm):
    langchain = pytest.importorskip("langchain_openai", reason="needs langchain: pip install langchain-openai")
    model = langchain.ChatOpenAI(base_url=address, api_key="none", model="tiny", max_tokens=8, seed=4)
    want = llm.session().say("Hello", 8, seed=4)
    assert model.invoke("Hello").content == want
    assert "".join(chunk.content for chunk in model.stream("Hello")).strip() == want
    schema = {
        "title": "weather",
        "description": "Asks for the weather",
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 3}},
        "required": ["city", "days"],
        "additionalProperties": False,
    }
    model = langchain.ChatOpenAI(base_url=address, api_key="none", model="tiny", max_tokens=300, seed=4)
    for method in ("json_schema", "function_calling"):
        assert_fits(model.with_structured_output(schema, method=method).invoke("Weather?"))
    (call,) = model.bind_tools([schema], tool_choice="weather").invoke("Weather?").tool_calls
    assert call["name"] == "weather"
    assert_fits(call["args"])
    vectors = langchain.OpenAIEmbeddings(
        base_url=address, api_key="none", model="tiny", check_embedding_ctx_length=False
    ).embed_documents(["a cat", "a dog"])
    assert [len(vector) for vector in vectors] == [256, 256]
