"""Requests drawn from the OpenAPI page, right and wrong ones: none makes the server fail."""

import json

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from support.server import serving

from rookery.serve.app import create_app
from rookery.serve.hosting import Limits

schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis: pip install schemathesis")

ROUTES = 20
ELSEWHERE = ("model", "state", "previous_response_id")
"""Names that are none of ours end in 404 before anything else is looked at: most requests leave them out."""


@pytest.fixture(scope="module")
def app(llm):
    app = create_app({"tiny": llm}, limits=Limits(max_tokens=2, seconds=20, rows=8))
    with serving(app) as address:
        app.state.address = address
        yield app


@pytest.fixture(scope="module")
def operations(app):
    page = schemathesis.openapi.from_url(f"{app.state.address}/openapi.json")
    return [found.ok() for found in page.get_all_operations()]


def asked(case, number):
    """The request, as a rule without names that are not known, and with a question where there is a conversation."""
    if isinstance(case.body, dict) and number % 4:
        for name in ELSEWHERE:
            case.body.pop(name, None)
        if isinstance(case.body.get("messages"), list):
            case.body["messages"].append({"role": "user", "content": "x"})
            case.body.pop("reasoning_effort", None)
    if isinstance(case.query, dict) and number % 4:
        case.query.pop("model", None)
    return case


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
@pytest.mark.parametrize("examples", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_no_request_makes_the_server_fail(app, operations, mode, examples):
    assert len(operations) == ROUTES
    right = mode == schemathesis.GenerationMode.POSITIVE
    statuses = set()
    for operation in operations:
        # every text is a possible id, so that only a body can be wrong
        if right or operation.body:
            statuses |= tried(operation, mode, examples if operation.body else examples // 4)
    assert 400 in statuses
    assert (200 in statuses) or not right
    assert app.state.models["tiny"].scheduler.load == (0, 0)


def tried(operation, mode, examples):
    """Statuses of so many requests."""
    statuses = []

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # whatever fails is told as it is: to find a smaller one takes minutes
    )
    @given(operation.as_strategy(generation_mode=mode))
    def every(case):
        reply = asked(case, len(statuses)).call()
        statuses.append(reply.status_code)
        what = f"{case.method} {case.formatted_path} {case.body!r}: {reply.text[:500]}"
        assert reply.status_code < 500, what
        if reply.status_code >= 400:
            assert set(json.loads(reply.content)["error"]) == {"message", "type", "param", "code"}, what
        assert "Traceback" not in reply.text, what

    every()
    return set(statuses)
