"""The http reward: candidates scored by a service."""

import json
import os
import time
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import pyarrow as pa

from rewards.errors import RewardError, name_examples
from rewards.group import Group, Groups, TitleCatalog

JSON = "application/json"
ARROW = "application/vnd.apache.arrow.stream"
RETRIED = {408, 425, 429, 500, 502, 503, 504}
"""Status codes that may pass."""
LONGEST_PAUSE_S = 30.0

REQUEST_SCHEMA = pa.schema(
    [
        pa.field("example_id", pa.int64()),
        pa.field("policy_version", pa.int64()),
        pa.field("user_id", pa.string()),
        pa.field("history_titles", pa.list_(pa.string())),
        pa.field("target_title", pa.string()),
        pa.field("candidate_titles", pa.list_(pa.string())),
        pa.field("candidate_classes", pa.list_(pa.int32())),
        pa.field("scores", pa.list_(pa.float32())),
    ]
)
"""What a service is sent of each group; see rewards.group.Group."""


class Http:
    """The registered reward `http`: groups are posted in batches, one list of floats per group comes back.

    json: the body is {"groups": [{<fields of REQUEST_SCHEMA>}, ...]}, the answer {"rewards": [[float, ...], ...]}.
    arrow: the body is an Arrow IPC stream in REQUEST_SCHEMA, the answer one with a list column `rewards`.
    """

    def __init__(
        self,
        catalog: TitleCatalog,
        url: str,
        format: Literal["json", "arrow"] = "json",
        token_env: str | None = None,
        timeout_s: float = 20.0,
        retries: int = 3,
        backoff_s: float = 0.5,
        batch: int = 64,
    ) -> None:
        """token_env: environment variable that holds a bearer token. timeout_s: longest silence of the service.

        retries: how often a request is repeated when the connection fails, it times out or the status is one of
        RETRIED, after backoff_s, then twice as long each time. batch: groups per request. Raises RewardError for a bad
        value or an unset variable.
        """
        if not isinstance(url, str) or not isinstance(token_env, str | None):
            raise RewardError(
                f"reward 'http': url={url!r} and token_env={token_env!r} must be texts: quote them in YAML"
            )
        numbers = all(isinstance(value, int | float) for value in (timeout_s, backoff_s))
        whole = all(isinstance(value, int) for value in (retries, batch))
        in_range = numbers and whole and timeout_s > 0 and retries >= 0 and backoff_s >= 0 and batch >= 1
        if format not in ("json", "arrow") or not in_range:
            raise RewardError(
                f"reward 'http': format={format!r} must be json or arrow, timeout_s={timeout_s!r} greater than 0, "
                f"retries={retries!r} and backoff_s={backoff_s!r} 0 or more, batch={batch!r} 1 or more; retries and "
                "batch are whole numbers"
            )
        self.url, self.format, self.retries, self.backoff_s, self.batch = url, format, retries, backoff_s, batch
        headers = {"Content-Type": JSON if format == "json" else ARROW}
        if token_env:
            token = os.environ.get(token_env, "").strip()  # files of secrets often end in a new line
            if not token:
                raise RewardError(f"reward 'http': the environment variable {token_env} with the token is not set")
            if not (token.isascii() and token.isprintable()):  # which a library would show, to say so
                raise RewardError(
                    f"reward 'http': the token in the environment variable {token_env} has characters that a header "
                    "cannot have; set it to printable ASCII"
                )
            headers["Authorization"] = f"Bearer {token}"
        self.client = httpx.Client(headers=headers, timeout=timeout_s)

    def __call__(self, groups: Groups) -> list[list[float]]:
        return [row for first in range(0, len(groups), self.batch) for row in self._score(groups, first)]

    def _score(self, groups: Groups, first: int) -> list[list[float]]:
        rows = [_row(groups[index]) for index in range(first, min(first + self.batch, len(groups)))]
        where = f"reward 'http' on {name_examples([row['example_id'] for row in rows])}: {self.url}"
        response = self._post(_json(rows) if self.format == "json" else _arrow(rows), where)
        rewards = _from_json(response, where) if self.format == "json" else _from_arrow(response, where)
        if len(rewards) != len(rows):
            raise RewardError(f"{where} answered {len(rewards)} lists for {len(rows)} groups")
        return rewards

    def _post(self, body: bytes, where: str) -> httpx.Response:
        """The first good answer. Raises RewardError for a bad one, or when the retries are spent."""
        failure = ""
        for pause in self._pauses():
            time.sleep(pause)
            try:
                response = self.client.post(self.url, content=body)
            except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
                raise RewardError(f"{where} is no usable address: {error}") from error
            except httpx.TransportError as error:
                failure = f"{type(error).__name__}: {error}"
                continue
            except httpx.RequestError as error:  # such as a body that is not what its headers say
                raise RewardError(f"{where} answered what cannot be read: {error}") from error
            if response.is_success:
                return response
            failure = f"status {response.status_code}: {_beginning(response)}"
            if response.status_code not in RETRIED:
                raise RewardError(f"{where} refused, {failure}")
        raise RewardError(f"{where} failed {self.retries + 1} times, at last with {failure}")

    def _pauses(self) -> Iterator[float]:
        """Seconds to wait before each attempt: none before the first, doubling before the others."""
        yield 0.0
        for attempt in range(self.retries):
            yield min(self.backoff_s * 2**attempt, LONGEST_PAUSE_S)


def _row(group: Group) -> dict[str, Any]:
    return {name: getattr(group, name) for name in REQUEST_SCHEMA.names}


def _json(rows: list[dict[str, Any]]) -> bytes:
    return json.dumps({"groups": rows}).encode()


def _arrow(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, REQUEST_SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(rows, REQUEST_SCHEMA))
    return sink.getvalue().to_pybytes()


def _from_json(response: httpx.Response, where: str) -> list[list[float]]:
    try:
        rewards = response.json()["rewards"]
    except (ValueError, KeyError, TypeError) as error:
        raise RewardError(f'{where} answered no JSON object with "rewards", but {_beginning(response)}') from error
    if not isinstance(rewards, list):
        raise RewardError(f'{where}: "rewards" must be a list of lists, not {_beginning(response)}')
    return rewards


def _from_arrow(response: httpx.Response, where: str) -> list[list[float]]:
    try:
        return pa.ipc.open_stream(response.content).read_all()["rewards"].to_pylist()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise RewardError(
            f"{where} answered no Arrow stream with a column `rewards` ({error}), but {_beginning(response)}"
        ) from error


def _beginning(response: httpx.Response, most: int = 200) -> str:
    """The first bytes of an answer, for messages."""
    return repr(response.content[:most].decode(errors="replace"))
