"""A scorer of its own: FastAPI, no part of rere, whatever language or machine it might run on.

SCORER_TOKEN=secret uvicorn scorer:app --port 8900
"""

import os

from fastapi import FastAPI, Header, HTTPException
from pydantic import BaseModel

app = FastAPI()


class Group(BaseModel):
    """What this scorer reads of a group; more is sent, see rewards.http.REQUEST_SCHEMA."""

    history_titles: list[str]
    target_title: str
    candidate_titles: list[str]


class Request(BaseModel):
    groups: list[Group]


class Response(BaseModel):
    rewards: list[list[float]]
    """One list per group, one float per candidate."""


@app.get("/health")
def health() -> str:
    return "ready"


@app.post("/score")
def score(request: Request, authorization: str = Header("")) -> Response:
    """1 for the target, 0.2 for a title that is not in the history, 0 for one that the user has already."""
    if authorization != f"Bearer {os.environ['SCORER_TOKEN']}":
        raise HTTPException(401, "send the token of SCORER_TOKEN")
    return Response(rewards=[[_value(title, group) for title in group.candidate_titles] for group in request.groups])


def _value(title: str, group: Group) -> float:
    if title == group.target_title:
        return 1.0
    return 0.0 if title in group.history_titles or not title else 0.2
