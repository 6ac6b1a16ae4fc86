"""The http reward against a real server: what is sent, what comes back, and every way it can fail."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pyarrow as pa
import pytest

from rewards.errors import RewardError
from rewards.http import ARROW, JSON, REQUEST_SCHEMA, Http
from rewards.interface import score
from rewards.samples import SampleCatalog, sample_groups

Answer = Callable[[bytes], tuple[int, bytes]]


class Service:
    """Answers requests with a list of answers in turn, the last one for ever, and remembers what it was asked."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.asked: list[tuple[dict[str, str], bytes]] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                service.asked.append((dict(self.headers), body))
                answer = service.answers.pop(0) if len(service.answers) > 1 else service.answers[0]
                status, content = answer(body)
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/score"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    yield service
    service.server.shutdown()
    service.server.server_close()


def title_lengths_json(body: bytes) -> tuple[int, bytes]:
    groups = json.loads(body)["groups"]
    return 200, json.dumps({"rewards": [[len(t) for t in group["candidate_titles"]] for group in groups]}).encode()


def title_lengths_arrow(body: bytes) -> tuple[int, bytes]:
    table = pa.ipc.open_stream(body).read_all()
    assert table.schema.equals(REQUEST_SCHEMA)
    rewards = [[float(len(t)) for t in titles] for titles in table["candidate_titles"].to_pylist()]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, pa.schema([("rewards", pa.list_(pa.float64()))])) as writer:
        writer.write_table(pa.table({"rewards": rewards}))
    return 200, sink.getvalue().to_pybytes()


def cut_short() -> bytes:
    """An answer whose last values are missing."""
    sink = pa.BufferOutputStream()
    table = pa.table({"rewards": [[1.0] * 6] * 4})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()[:-20]


def always(status: int, content: bytes) -> Answer:
    return lambda body: (status, content)


def ask(url: str, **args: Any) -> list[list[float]]:
    return score("http", Http(SampleCatalog(), url, **({"backoff_s": 0.01} | args)), sample_groups()).to_pylist()


EXPECTED = [[float(len(title)) for title in group.candidate_titles] for group in sample_groups()]


@pytest.mark.parametrize(("format", "answer"), [("json", title_lengths_json), ("arrow", title_lengths_arrow)])
def test_batches_go_out_and_rewards_come_back(service: Service, format: str, answer: Answer) -> None:
    service.answers = [answer]
    assert ask(service.url, format=format, batch=3) == EXPECTED
    assert len(service.asked) == 2
    assert service.asked[0][0]["Content-Type"] == {"json": JSON, "arrow": ARROW}[format]


def test_everything_a_scorer_may_need_is_sent(service: Service) -> None:
    service.answers = [title_lengths_json]
    ask(service.url)
    (sent, *_) = json.loads(service.asked[0][1])["groups"]
    group = sample_groups()[0]
    assert sent == {name: getattr(group, name) for name in REQUEST_SCHEMA.names}


def test_the_token_comes_from_the_environment(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    service.answers = [title_lengths_json]
    monkeypatch.setenv("SCORER_TOKEN", "abc")
    ask(service.url, token_env="SCORER_TOKEN")
    assert service.asked[0][0]["Authorization"] == "Bearer abc"
    monkeypatch.delenv("SCORER_TOKEN")
    with pytest.raises(RewardError, match="environment variable SCORER_TOKEN with the token is not set"):
        ask(service.url, token_env="SCORER_TOKEN")


def test_a_token_that_no_header_can_hold_is_not_shown(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    service.answers = [title_lengths_json]
    monkeypatch.setenv("SCORER_TOKEN", "abc\n")  # as files of secrets have it
    ask(service.url, token_env="SCORER_TOKEN")
    assert service.asked[0][0]["Authorization"] == "Bearer abc"
    for secret in ("ab\nc", "äbc"):
        monkeypatch.setenv("SCORER_TOKEN", secret)
        with pytest.raises(RewardError, match="SCORER_TOKEN has characters that a header cannot have") as error:
            ask(service.url, token_env="SCORER_TOKEN")
        assert secret not in str(error.value)


def test_a_body_that_is_not_what_its_headers_say_is_refused_at_once(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def corrupt(*_: Any, **__: Any) -> None:
        raise httpx.DecodingError("incorrect header check")

    monkeypatch.setattr(httpx.Client, "post", corrupt)
    with pytest.raises(RewardError, match="answered what cannot be read: incorrect header check"):
        ask(service.url)


def test_a_passing_failure_is_retried(service: Service) -> None:
    service.answers = [always(503, b"starting"), always(500, b"oops"), title_lengths_json]
    assert ask(service.url, retries=2) == EXPECTED
    assert len(service.asked) == 3


def test_pauses_double_up_to_the_longest(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("rewards.http.time.sleep", pauses.append)
    service.answers = [always(503, b"busy")]
    with pytest.raises(RewardError, match="failed 5 times"):
        ask(service.url, retries=4, backoff_s=5.0)
    assert pauses == [0, 5, 10, 20, 30]


def test_a_lasting_500_names_the_answer_after_bounded_retries(service: Service) -> None:
    service.answers = [always(500, b"division by zero")]
    with pytest.raises(RewardError, match=r"groups 0, 1, 2, 3: .*failed 3 times, at last with status 500: 'division"):
        ask(service.url, retries=2)
    assert len(service.asked) == 3


def test_a_refusal_is_not_retried(service: Service) -> None:
    service.answers = [always(401, b"no token")]
    with pytest.raises(RewardError, match="refused, status 401: 'no token'"):
        ask(service.url)
    assert len(service.asked) == 1


def test_a_refused_connection_is_named() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/score"
    with pytest.raises(RewardError, match=rf"{url} failed 2 times, at last with ConnectError: .*refused"):
        ask(url, retries=1)


def test_a_service_that_is_too_slow_is_named(service: Service) -> None:
    service.answers = [lambda body: (time.sleep(1.0), title_lengths_json(body))[1]]
    with pytest.raises(RewardError, match="failed 1 times, at last with ReadTimeout"):
        ask(service.url, timeout_s=0.1, retries=0)


@pytest.mark.parametrize(
    ("format", "content", "message"),
    [
        ("json", b"<html>hello</html>", r"answered no JSON object with \"rewards\", but '<html>hello</html>'"),
        ("json", b"x" * 300, "but 'x{200}'$"),
        ("json", b"[1, 2]", 'answered no JSON object with "rewards"'),
        ("json", b'{"rewards": 3}', '"rewards" must be a list of lists'),
        ("json", b'{"rewards": [[1]]}', "answered 1 lists for 4 groups"),
        ("json", b'{"rewards": [[1], [1], [1], [1]]}', "returned 1 values .* for group 0, which has 6 candidates"),
        ("json", b'{"rewards": [[1,1,1,1,1,1], [], [], []]}', "group 1, which has 6 candidates"),
        ("json", b'{"rewards": [[1,1,1,1,1,NaN]' + 3 * b", [1,1,1,1,1,1]" + b"]}", "nan .*must be a finite float32"),
        ("json", b'{"rewards": [null, null, null, null]}', "returned None for group 0"),
        ("arrow", b"junk", "answered no Arrow stream with a column `rewards`"),
        ("arrow", cut_short(), "answered no Arrow stream with a column `rewards`"),
    ],
)
def test_garbage_is_shown(service: Service, format: str, content: bytes, message: str) -> None:
    service.answers = [always(200, content)]
    with pytest.raises(RewardError, match=message):
        ask(service.url, format=format)
    assert len(service.asked) == 1


@pytest.mark.parametrize("url", ["localhost:80", "ftp://host/", "http://host:port/"])
def test_what_is_no_address_is_named(url: str) -> None:
    with pytest.raises(RewardError, match="is no usable address"):
        ask(url)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"format": "xml"}, "format='xml' must be json or arrow"),
        ({"timeout_s": 0}, "timeout_s=0 greater than 0"),
        ({"retries": -1}, "retries=-1 and backoff_s=0.5 0 or more"),
        ({"backoff_s": -1.0}, r"backoff_s=-1\.0 0 or more"),
        ({"batch": 0}, "batch=0 1 or more"),
        ({"batch": 1.5}, r"batch=1\.5 1 or more; retries and batch are whole"),
        ({"retries": "3"}, "retries='3' and backoff_s"),
        ({"timeout_s": [1]}, r"timeout_s=\[1\] greater than 0"),
        ({"timeout_s": float("nan")}, "timeout_s=nan greater than 0"),
        ({"format": {"json": None}}, r"format=\{'json': None\} must be json or arrow"),
        ({"url": {"::": None}}, r"url=\{'::': None\} and token_env=None must be texts: quote them"),
        ({"token_env": 7}, "token_env=7 must be texts"),
    ],
)
def test_bad_arguments_are_refused(argument: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        Http(SampleCatalog(), **{"url": "http://h"} | argument)
