"""What the scripts of this folder share: where the servers are, a model of an answer, and a list of named checks."""

import os
import sys
import time
import traceback
from importlib import metadata
from typing import Annotated

from pydantic import BaseModel, Field

URL = os.environ["STRATA_URL"]
TLS_URL = os.environ["STRATA_TLS_URL"]
EMBEDDINGS_URL = os.environ["STRATA_EMBEDDINGS_URL"]
KEY = os.environ["STRATA_KEY"]
MODEL = "smollm2"
API_VERSION = "2024-10-21"
CAPITAL = "Name the capital of France."
WEATHER = "What is the weather in Paris, and what is it in London?"

CHECKS = []

# Of a bounded length, so that a model that repeats itself closes its JSON before its tokens are used up.
Short = Annotated[str, Field(max_length=16)]


class Capital(BaseModel):
    """What the small model says is not checked, only that it has this form."""

    country: Short
    city: Short


def check(name: str):
    """Registers a function as the check of this name."""

    def register(function):
        CHECKS.append((name, function))
        return function

    return register


def raises(kind: type[Exception], call) -> Exception:
    """The error of the call, which must be of this kind."""
    try:
        answer = call()
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was expected, this came: {answer!r}")


def main(package: str) -> None:
    """Runs all checks; each gets a line, and any that fails fails the script."""
    failed = 0
    for name, function in CHECKS:
        began = time.monotonic()
        try:
            function()
            print(f"ok  {package} {metadata.version(package)}: {name} ({time.monotonic() - began:.1f} s)", flush=True)
        except Exception:
            failed += 1
            traceback.print_exc()
            print(f"FAILED  {package} {metadata.version(package)}: {name}", flush=True)
    sys.exit(failed > 0)
