"""Keys of object stores (S3, Google Cloud Storage, Azure; HTTP to read), used as paths are.

An `ObjectKey` has those methods of `pathlib.Path` that are needed here, so that most code need not
know which of the two it has. There are no folders: a key "holds" the objects whose keys go on from
it after a slash. What goes wrong is an OSError, in one line. The environment of each process says
who may do what (``AWS_ACCESS_KEY_ID``, a role of the machine, and so on); no secret is ever taken
from an address, kept, pickled or shown.
"""

from __future__ import annotations

import os
import re
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import quote, unquote

from tilepipe.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from obstore import PutMode, UpdateVersion
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

SCHEMES = ("s3", "gs", "az", "http", "https")
"""What an address may begin with, before ``://``."""
RETRIES = 7
"""How often a request that fails is repeated, each time after longer: 7 to 60 s in all."""


@dataclass(frozen=True, slots=True, order=True)
class ObjectKey:
    """An address in an object store: of an object, or of what all objects below it begin with."""

    root: str
    """Scheme and bucket, such as ``s3://bucket``."""
    path: str
    """What follows, without slashes at its ends; may be empty."""

    @classmethod
    def parse(cls, address: str) -> ObjectKey:
        """Return the key of an address; BadRequest for one that is none, or without obstore.

        >>> ObjectKey.parse("s3://bucket/scans/volume.zarr/").name
        'volume.zarr'
        """
        scheme, _, rest = address.partition("://")
        if scheme not in SCHEMES:
            raise BadRequest(f"address (={scheme}://...) must begin with one of {SCHEMES}")
        if re.search(r"[@?#\s]", rest):  # a name with its password, a signature: not to be shown
            raise BadRequest(
                f"address (={scheme}://...) must be a bucket and a path, without user, password or"
                " signature; give credentials by the environment"
            )
        bucket, *names = rest.rstrip("/").split("/")
        if scheme.startswith("http"):
            names = [unquote(name) for name in names]
        if not bucket or "\\" in rest or any(name in ("", ".", "..") for name in names):
            raise BadRequest(f"address (={address}) must be {scheme}://BUCKET/PATH")
        try:
            import obstore  # noqa: F401  every key that there is can be used
        except ImportError as error:
            raise BadRequest(
                f"address (={address}) needs obstore ({error}): pip install 'tilepipe[cloud]'"
            ) from error
        return cls(f"{scheme}://{bucket}", "/".join(names))

    def __str__(self) -> str:
        return f"{self.root}/{self.path}".rstrip("/")

    def __truediv__(self, name: str) -> ObjectKey:
        return ObjectKey(self.root, f"{self.path}/{name}".strip("/"))

    @property
    def name(self) -> str:
        """Return the last part of the key."""
        return self.path.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """Return the last part of the key without its suffix."""
        return self.name.removesuffix(self.suffix)

    @property
    def suffix(self) -> str:
        """Return what the last part ends with, such as ``.zarr``."""
        before, dot, after = self.name.rpartition(".")
        return dot + after if before and after else ""

    @property
    def parents(self) -> tuple[ObjectKey, ...]:
        """Return the keys that hold this one, from near to far."""
        names = self.path.split("/") if self.path else []
        return tuple(ObjectKey(self.root, "/".join(names[:n])) for n in reversed(range(len(names))))

    @property
    def parent(self) -> ObjectKey:
        """Return the key that holds this one; at the top it is the key itself."""
        return self.parents[0] if self.path else self

    def with_name(self, name: str) -> ObjectKey:
        """Return its neighbour of that name."""
        return self.parent / name

    @property
    def can_write(self) -> bool:
        """Return whether there is a way to write there, permitted or not."""
        return not self.root.startswith("http")

    def is_file(self) -> bool:
        """Return whether it is an object."""
        import obstore

        try:
            with plain_errors(self):
                obstore.head(_store(self.root), self.path)
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Return whether it holds objects; empty ones, by which some show folders, do not count."""
        import obstore

        with plain_errors(self):
            pages = obstore.list(_store(self.root), self.path or None)
            return any(entry["size"] for page in pages for entry in page)

    def exists(self) -> bool:
        """Return whether it is an object or holds some."""
        return self.is_dir() or (self.path != "" and self.is_file())

    def _listed(self) -> tuple[list[ObjectKey], list[ObjectKey]]:
        """Return what holds something itself, in order, and the objects, down to the next slash."""
        import obstore

        with plain_errors(self):
            page = obstore.list_with_delimiter(_store(self.root), self.path or None)
        inner = sorted(ObjectKey(self.root, path.rstrip("/")) for path in page["common_prefixes"])
        names = (entry["path"] for entry in page["objects"])
        return inner, [ObjectKey(self.root, name) for name in names if name != self.path]

    def iterdir(self) -> Iterator[ObjectKey]:
        """Yield what it holds, down to the next slash."""
        inner, objects = self._listed()
        yield from (*inner, *objects)

    def folders(self) -> list[ObjectKey]:
        """Return what it holds that holds something itself, in order."""
        return self._listed()[0]

    def read_bytes(self) -> bytes:
        """Return the whole object; FileNotFoundError where there is none."""
        return self.read_tagged()[0]

    def read_tagged(self) -> tuple[bytes, UpdateVersion]:
        """Return the whole object, and the tag that its store gives this content."""
        import obstore

        with plain_errors(self):
            response = obstore.get(_store(self.root), self.path)
            return bytes(response.bytes()), _tag(response.meta["e_tag"], response.meta["version"])

    def read_text(self) -> str:
        """Return the whole object as text."""
        return self.read_bytes().decode()

    def open(self, mode: str) -> BinaryIO:
        """Open the object to read all of it."""
        assert mode == "rb"
        return BytesIO(self.read_bytes())

    def write_bytes(
        self, content: bytes, *, tag: UpdateVersion | None = None, new: bool = False
    ) -> UpdateVersion:
        """Write the object, whole or not at all, and return its tag.

        With ``tag`` only over the content that it stands for, with ``new`` only where there is
        none: else FileExistsError. Two who may not take each other's object for their own must
        write different contents.
        """
        import obstore

        mode: PutMode = "create" if new else tag or "overwrite"
        try:
            with plain_errors(self):  # in one piece: conditions on several are rare
                store = _store(self.root)
                response = obstore.put(store, self.path, content, mode=mode, use_multipart=False)
                return _tag(response["e_tag"], response["version"])
        except (FileExistsError, FileNotFoundError):
            if mode == "overwrite":
                raise
            with suppress(FileNotFoundError):  # an answer may have been lost, and asked for again
                present, tag = self.read_tagged()
                if present == content:
                    return tag
            raise FileExistsError(f"{self} was written by another") from None

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object; there is no error where there is none."""
        import obstore

        with suppress(FileNotFoundError), plain_errors(self):  # S3 does not say so, others do
            obstore.delete(_store(self.root), self.path)

    def objects(self) -> Iterator[tuple[ObjectKey, int]]:
        """Yield the objects that it holds, in it or below, with their sizes in bytes."""
        import obstore

        with plain_errors(self):
            for page in obstore.list(_store(self.root), self.path or None):
                for entry in page:
                    yield ObjectKey(self.root, entry["path"]), entry["size"]

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: there are no folders."""

    def rmdir(self) -> None:
        """Do nothing: there are no folders."""

    def store(self) -> ObjectStore:
        """Return the store of what it holds; its objects may be large."""
        return _store(self.root, self.path, timeout="120s")


def remove_keys(keys: Sequence[ObjectKey]) -> None:
    """Remove objects of one bucket, a thousand at most, at once."""
    if not keys:  # as in a folder: what speaks to object stores need not be installed
        return
    import obstore

    with suppress(FileNotFoundError), plain_errors(keys[0]):
        obstore.delete(_store(keys[0].root), [key.path for key in keys])


def local_path(path: str | Path, what: str) -> Path:
    """Return the path of what must lie in a file system; BadRequest for an address.

    >>> local_path("networks/unet.pt", "model").name
    'unet.pt'
    """
    scheme, mark, _ = str(path).partition("://")
    if mark:
        raise BadRequest(f"{what} (={scheme}://...) must be a local file; copy it")
    return Path(path)


def explain(error: BaseException) -> str:
    """Return what an error says, as one line; of a store's answer its code and message.

    >>> explain(ValueError("GET s3.test/b: <Code>Slow</Code><Message>Less</Message>"))
    'Slow: Less'
    >>> explain(ValueError("GET s3.test/b?signature=abc: timeout"))
    'GET s3.test/b: timeout'
    """
    text = str(error) or type(error).__name__
    answer = re.search(r"<Code>(.*?)</Code>.*?<Message>(.*?)</Message>", text, re.DOTALL)
    if answer:
        return f"{answer[1]}: {answer[2]}"
    text = text.partition("\n\nDebug source")[0]
    return re.sub(r"(\w/[^\s?]*)\?[^\s:]+", r"\1", " ".join(text.split()))


def _tag(e_tag: str | None, version: str | None) -> UpdateVersion:
    """Return what a store knows a content by; they differ in which of the two they have."""
    tag: UpdateVersion = {}
    if e_tag is not None:
        tag["e_tag"] = e_tag
    if version is not None:
        tag["version"] = version
    return tag


def is_of_store(error: BaseException) -> bool:
    """Return whether it is a store that says so, and not what reads its objects."""
    return type(error).__module__.startswith("obstore")


@contextmanager
def plain_errors(key: object) -> Iterator[None]:
    """Raise what a store says as an OSError of one line."""
    from obstore import exceptions

    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{key}: {explain(error)}") from None
    except (exceptions.AlreadyExistsError, exceptions.PreconditionError) as error:
        raise FileExistsError(f"{key}: {explain(error)}") from None
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
        raise PermissionError(f"{key}: {explain(error)}") from None
    except exceptions.BaseError as error:
        raise OSError(f"{key}: {explain(error)}") from None


@cache
def _store(root: str, path: str = "", *, timeout: str = "20s") -> ObjectStore:
    """Return the store of a bucket, or of what one of its keys holds."""
    from obstore.store import from_url

    options: ClientConfig = {"connect_timeout": "10s", "timeout": timeout}
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "") if root.startswith("s3") else root
    if endpoint.startswith("http://"):
        options["allow_http"] = True
    patience: RetryConfig = {
        "max_retries": RETRIES,
        "retry_timeout": timedelta(seconds=60),
        "backoff": {  # with its own, of 0.1 s, seven are over in two seconds
            "init_backoff": timedelta(seconds=1),
            "max_backoff": timedelta(seconds=10),
            "base": 3,
        },
    }
    quoted = f"{root}/{quote(path)}"  # as a URL it would be read with %2F as a slash
    with plain_errors(root):
        return from_url(quoted, retry_config=patience, client_options=options)
