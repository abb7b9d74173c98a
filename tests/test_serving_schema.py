"""Whatever our OpenAPI document allows, and more: no request makes the server fail, and every answer is what the document says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance  # which does not know that some fields exclude each other

import longreach
from longreach.serving.limits import Limits
from served import Served, served

EXAMPLES = 10
OPERATIONS = {
    "GET /health", "GET /metrics", "GET /v1/models", "GET /v1/models/{name}", "POST /tokenize", "POST /v1/completions", "POST /v1/chat/completions",
    "GET /v1/documents", "POST /v1/documents", "GET /v1/documents/{name}", "DELETE /v1/documents/{name}",
    "GET /page/state", "GET /page/methods", "GET /page/sight", "GET /page/sample",
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model, tokenizer = longreach.load("nano")
    limits, folder = Limits(answer=4, seconds=5), tmp_path_factory.mktemp("documents")
    with longreach.extend(model, context=64) as extension, served(extension, tokenizer, limits=limits, documents=folder) as found:
        yield found


def ask(operation: Any, mode: GenerationMode, url: str, examples: int) -> Counter[int]:
    """-> how many answers had each status."""
    seen: Counter[int] = Counter()

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate], derandomize=True, database=None)
    def asked(case: Any) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict) and "documents" not in case.path:
            case.body["model"] = "nano"  # or all answers are about the name of the model
        answer = case.call(base_url=url)
        assert answer.status_code < 500, (case.as_curl_command(), answer.text)
        case.validate_response(answer, excluded_checks=[positive_data_acceptance])
        seen[answer.status_code] += 1

    asked()
    return seen


@pytest.mark.parametrize("examples", [EXAMPLES, pytest.param(10 * EXAMPLES, marks=pytest.mark.slow)])
def test_no_request_makes_it_fail(server: Served, examples: int) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = {found.ok().label: found.ok() for found in schema.get_all_operations()}
    assert set(operations) == OPERATIONS
    total: Counter[int] = Counter()
    for label, operation in operations.items():
        right = ask(operation, GenerationMode.POSITIVE, server.url, examples)
        if operation.method == "post":
            total += right
            wrong = ask(operation, GenerationMode.NEGATIVE, server.url, examples)
            assert wrong == {400: examples}, (label, wrong)
    assert total[200] + total[201] >= examples // 4, total  # much of what is drawn is allowed by the document, and contradicts itself
    documented = {status for path in schema.raw_schema["paths"].values() for operation in path.values() for status in operation["responses"]}
    assert documented == {"200", "201", "400", "401", "403", "404", "408", "409", "413", "415", "429", "500", "503"}
