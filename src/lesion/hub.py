"""The hub of models and datasets: how it is asked, with which token, and what its refusals mean in words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

REPOSITORY = r"[A-Za-z0-9_][A-Za-z0-9_.-]*(?:/[A-Za-z0-9_.-]+)?"


def ask(call: Any, repository: str, revision: str, hint: str = "", **options: Any) -> Any:
    """Asks the hub: `call(repository, revision=…, token=…, **options)`, a function of its library.

    What goes wrong becomes a ValueError that names repository and revision and does not hold on to the request: that
    has the token. `hint` is added where there is no such repository.
    """
    from huggingface_hub import errors

    token = hub_token()
    try:
        return call(repository, revision=revision, token=token, **options)
    except errors.GatedRepoError:
        said = "is gated: accept its licence on the hub and set HF_TOKEN"
    except errors.RevisionNotFoundError:
        said = "is not there: the repository has no such branch, tag or commit"
    except errors.RepositoryNotFoundError:
        said = f"is not on the hub, or it is private and HF_TOKEN is not set{hint}"
    except errors.LocalEntryNotFoundError as error:
        status = getattr(getattr(error.__cause__, "response", None), "status_code", None)
        offline = isinstance(error.__cause__, errors.OfflineModeIsEnabled)
        why = "HF_HUB_OFFLINE is set" if offline else f"the hub answers {status}" if status else "no hub answers"
        said = f"is not in the hub's cache, or not all of it, and {why}"
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        said = f"was refused by the hub with status {status}" + ("; is HF_TOKEN right?" if status == 401 else "")
    except (errors.HTTPError, errors.XetDownloadError, OSError, RuntimeError) as error:
        said = f"could not be fetched: {getattr(error, 'strerror', None) or type(error).__name__}"
    raise ValueError(f"{repository}@{revision} {said}")


def hub_token() -> str | None:
    """The token of the environment (HF_TOKEN), else of the hub login, else HF_TOKEN in a `.env` file here."""
    from huggingface_hub import get_token

    token, env = get_token(), Path(".env")
    if token is None and env.is_file():
        pattern = r"\s*(?:export\s+)?HF_TOKEN\s*=\s*([\"']?)([^\"'\s#]+)\1\s*(?:#.*)?"
        lines = env.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        token = next((match[2] for line in lines if (match := re.fullmatch(pattern, line))), None)
    if token is not None and not re.fullmatch("[!-~]+", token):
        raise ValueError("the hub token (HF_TOKEN) holds a character that no token has")  # and it is not shown
    return token
