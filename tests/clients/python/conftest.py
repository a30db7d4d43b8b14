"""The server under test, as `run.sh` started it: its address and its key."""

import os

import httpx
import pytest


@pytest.fixture(scope="session")
def base_url():
    return os.environ["EPSMOE_BASE_URL"]


@pytest.fixture(scope="session")
def api_key():
    return os.environ["EPSMOE_API_KEY"]


@pytest.fixture(scope="session")
def model():
    return os.environ["EPSMOE_MODEL"]


@pytest.fixture(scope="session")
def http(base_url, api_key):
    with httpx.Client(base_url=base_url, headers={"authorization": f"Bearer {api_key}"}, timeout=60) as client:
        yield client
