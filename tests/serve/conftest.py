import httpx
import pytest

from rookery.engine.llm import LLM
from rookery.serve.app import create_app
from rookery.serve.hosting import Limits


@pytest.fixture(scope="session")
def llm():
    """The embedded model, as if it had been trained to converse."""
    return LLM(template="g1")


@pytest.fixture
def make(llm):
    """Client of a server with these limits and keys; everything runs in this process, without a socket."""
    import contextlib

    @contextlib.asynccontextmanager
    async def client(*, limits=None, models=None, **options):
        app = create_app(models or {"tiny": llm}, limits=limits or Limits(), **options)
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://rookery", timeout=60) as client:
                client.app = app
                yield client

    return client
