"""Paths and names that are typed, checked before anything heavy is imported: a mistyped one is said at once.

Imports nothing that takes time.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import threading
import urllib.request
from argparse import Namespace
from pathlib import Path
from urllib.parse import urlsplit

FILES = (".csv", ".json", ".jsonl", ".parquet", ".tsv", ".txt")
"""Ends of the names of files of examples."""
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
HUB = "https://huggingface.co"
PATIENCE = 1.5
"""Seconds to wait for a connection; the Hub's own client tries for a minute."""
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
YES = {"1", "on", "true", "yes"}


def check_places(options: Namespace) -> None:
    """Check that models, tokenizers and data sets are here, or can be asked for, and an index where one is read.

    Raises:
        FileNotFoundError: If there is no such file of examples.
        ValueError: If one of the others is neither here nor can be asked for.
    """
    if options.command in ("score", "show") and not options.index.is_dir():
        raise ValueError(f"There is no index at {options.index}; captum-sdi index writes one.")
    for option in ("model", "tokenizer"):
        name = getattr(options, option, None)
        if name is not None:
            check_name(f"--{option}", name)
    for option in ("train", "query"):
        for path in getattr(options, option, None) or ():
            if not isinstance(path, Path):  # of captum-sdi plot, a query is a position
                continue
            if may_be_on_hub(path):
                check_name(f"--{option}", str(path), kind="datasets")
            elif not path.exists():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def may_be_on_hub(path: Path | str) -> bool:
    """Return whether a path to nothing may be the name of a data set on the Hub.

    Example:
        >>> may_be_on_hub("owner/a-set"), may_be_on_hub("trian.jsonl"), may_be_on_hub("a/path/to/nothing")
        (True, False, False)
    """
    name = str(path)
    return HUB_NAME.fullmatch(name) is not None and not name.endswith(FILES) and not os.path.exists(name)


def check_name(option: str, name: str, kind: str = "models") -> None:
    """Check that a name is here, or one of a kind that the Hub may know.

    Raises:
        ValueError: If it is a path to nothing, or the Hub cannot be asked.
    """
    if os.path.exists(name):
        return
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise ValueError(f"There is no folder {name}; say with {option} where the {option[2:]} is.")
    if cached_folder(name, kind).is_dir():
        return
    here = "folder" if kind == "models" else "file or folder"
    refusal = f"{option} {name} is no {here}, and the Hub does not give it"
    offline = [variable for variable in OFFLINE if os.environ.get(variable, "").lower() in YES]
    if offline:
        raise ValueError(f"{refusal}: {offline[0]} is set, and it was never downloaded.")
    host = hub_host()
    if not is_reachable(*host):
        raise ValueError(f"{refusal}: {host[0]} cannot be reached from here. Is the name mistyped?")


def cached_folder(name: str, kind: str = "models") -> Path:
    """Return where the Hub's client keeps what it downloaded of a name."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    return cache / f"{kind}--{name.replace('/', '--')}"


def hub_host() -> tuple[str, int]:
    """Return the host and the port that are connected to first: the Hub's, or those of a proxy on the way."""
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT") or HUB)
    proxy = urllib.request.getproxies().get(endpoint.scheme)
    first = urlsplit(proxy) if proxy else endpoint
    default_port = 80 if first.scheme == "http" else 443
    return first.hostname or "", first.port or default_port


def is_reachable(host: str, port: int) -> bool:
    """Return whether a connection can be made within `PATIENCE`; a thread, as looking a name up knows no limit."""
    connected = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((host, port), PATIENCE).close()
        except OSError:
            return
        connected.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return connected.is_set()
