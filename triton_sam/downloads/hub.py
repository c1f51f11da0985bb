"""Files of the Hugging Face hub: where they are, their hashes, and who may have them.

The hub is asked through ``huggingface_hub``, so that its own settings hold: ``HF_TOKEN`` or the
token that ``hf auth login`` kept, and ``HF_ENDPOINT`` for a mirror.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, get_hf_file_metadata, get_token, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from ..errors import DownloadError, GatedModelError
from .remote import RemoteFile
from .transfer import Interrupted, Patience, new_client, retrying

_HUB = "https://huggingface.co"

# A SHA-256 for large files, the id of a git blob for small ones; a mirror's own ETag is neither.
_DIGEST = re.compile("[0-9a-f]{64}|[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class HubFile(RemoteFile):
    """A file of a hub repository; the hub tells its size and hash when it is located."""

    repository: str
    path: str
    revision: str
    patience: Patience

    def locate(self) -> RemoteFile:
        """The file at the commit that the revision is now, with its size and hash.

        Raises :class:`GatedModelError` where a token or an accepted licence is missing.
        """
        with _explained(self.repository, self.url):
            new_client(self.patience).close()  # the hub's own would not explain itself
            return retrying(self.patience)(self._ask)

    def _ask(self) -> RemoteFile:
        token = get_token()
        with _transient():
            found = get_hf_file_metadata(
                self.url, token=token or False, timeout=self.patience.connect_s
            )
        known = found.etag if found.etag and _DIGEST.fullmatch(found.etag) else None
        pinned = found.commit_hash or self.revision
        return replace(
            self,
            url=hf_hub_url(self.repository, self.path, revision=pinned, endpoint=endpoint()),
            nbytes=found.size,
            digest=self.digest or known,
            headers={"Authorization": f"Bearer {token}"} if token else {},
        )

    def refused(self, status: int) -> DownloadError:
        return _refusal(self.repository, self.url, status)


def hub_file(
    repository: str,
    path: str,
    target: Path,
    *,
    revision: str = "main",
    nbytes: int | None = None,
    sha256: str | None = None,
    patience: Patience | None = None,
) -> HubFile:
    """``path`` of the hub's ``repository``, to be put at ``target``."""
    return HubFile(
        target=target,
        url=hf_hub_url(repository, path, revision=revision, endpoint=endpoint()),
        origin=f"{repository}@{revision}/{path}",
        nbytes=nbytes,
        digest=sha256,
        repository=repository,
        path=path,
        revision=revision,
        patience=patience or Patience(),
    )


def list_files(repository: str, folder: str, revision: str = "main") -> dict[str, int]:
    """Path and size in bytes of each file in a ``folder`` of a hub repository."""
    # The listing is tried again by huggingface_hub itself.
    with _explained(repository, f"{endpoint()}/{repository}"), _transient():
        new_client(Patience()).close()
        api = HfApi(endpoint=endpoint(), token=get_token() or False)
        tree = api.list_repo_tree(repository, folder, revision=revision)
        return {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}


def endpoint() -> str:
    """The hub or the mirror that stands in for it."""
    return os.environ.get("HF_ENDPOINT", _HUB).rstrip("/")


@contextmanager
def _transient() -> Iterator[None]:
    """What a second attempt may cure becomes :class:`Interrupted`."""
    try:
        yield
    except HfHubHTTPError as exc:
        status = exc.response.status_code
        if status == 429 or status >= 500:
            raise Interrupted(f"the hub answered {status}") from exc
        raise
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as exc:
        raise DownloadError(
            f"HF_ENDPOINT is {endpoint()!r}, and not an address such as {_HUB}."
        ) from exc
    except httpx2.HTTPError as exc:
        raise Interrupted(" ".join(str(exc).split()) or type(exc).__name__) from exc


@contextmanager
def _explained(repository: str, url: str) -> Iterator[None]:
    try:
        yield
    except Interrupted as exc:
        raise DownloadError(
            f"The hub could not be asked about {url}: {exc}. Check the network, the proxy and "
            "HF_ENDPOINT."
        ) from exc
    except HfHubHTTPError as exc:
        status = exc.response.status_code
        if isinstance(exc, GatedRepoError | RepositoryNotFoundError):
            status = 403 if status == 403 else 401
        raise _refusal(repository, url, status) from exc


def _refusal(repository: str, url: str, status: int) -> DownloadError:
    page = f"{_HUB}/{repository}"
    if status == 401 and get_token() is None:
        return GatedModelError(
            f"{repository} is given only to accounts that have accepted its licence (401, no "
            f"token was sent). Accept it on {page}, make a token with read access on "
            f"{_HUB}/settings/tokens, and set HF_TOKEN to it or run `hf auth login` "
            "(`pixi run hf-login`)."
        )
    if status == 401:
        return GatedModelError(
            f"The hub does not accept your token for {repository} (401). Make a new one with read "
            f"access on {_HUB}/settings/tokens, and set HF_TOKEN to it or run `hf auth login` "
            "(`pixi run hf-login`)."
        )
    if status == 403:
        return GatedModelError(
            f"The account of your token has not been given access to {repository} (403). Accept "
            f"the licence on {page} and wait until it is granted; a fine-grained token in HF_TOKEN "
            "also needs access to gated repositories."
        )
    return DownloadError(f"{url} cannot be fetched: the hub answered {status}. Check HF_ENDPOINT.")
