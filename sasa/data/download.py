"""Data sets from the network: fetched and checked by torchvision, bounded in time by us."""

import http.client
import os
import queue
import socket
import tarfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from pathlib import Path

from sasa.console import one_line, printable
from sasa.data.errors import DataError

NETWORK_WAIT_S = 10.0
_DEBIAN_FASHION = "/usr/share/datasets/fashion-mnist"


def resolve_auto(data_dir: str | Path, has_gpu: bool) -> tuple[str, str]:
    """What `--dataset auto` stands for here, and why: (name, reason). Downloads CIFAR10 where there is a GPU."""
    shown = printable(data_dir)
    if any(os.path.exists(Path(data_dir, name)) for name in ("cifar-10-batches-py", "cifar-10-python.tar.gz")):
        return "CIFAR10", f"CIFAR-10 is in {shown}"
    if not has_gpu:
        return "DIGITS", f"no CIFAR-10 in {shown} and no GPU to train on it: the embedded DIGITS"
    try:
        from torchvision.datasets import CIFAR10

        download(CIFAR10, data_dir, otherwise="the embedded DIGITS instead")
    except DataError as error:
        return "DIGITS", str(error)
    return "CIFAR10", f"CIFAR-10 downloaded to {shown}"


def download(kind: type, data_dir: str | Path, otherwise: str | None = None) -> None:
    """Lets torchvision fetch and check a set. Without a network this ends within NETWORK_WAIT_S.

    An archive that lies in data_dir already is only unpacked.

    Args:
        kind: torchvision's class of the set.
        otherwise: the end of the error's line; None is what to do.

    Raises:
        DataError: none of the mirrors answers, or what came is not what it should be.
    """
    where = f"{kind.__name__} is not in {printable(data_dir)}"
    if otherwise is None:
        otherwise = "put its files there, or choose --dataset DIGITS, which needs none"
        if kind.__name__ == "FashionMNIST":
            otherwise = f"put its files there, or install Debian's dataset-fashion-mnist, --data-dir {_DEBIAN_FASHION}"
    mirrored = hasattr(kind, "mirrors")
    urls = [mirror + kind.resources[0][0] for mirror in kind.mirrors] if mirrored else [kind.url]
    archive = archive_of(kind, data_dir)
    lies_there = os.path.isfile(archive)
    if not (lies_there and has_whole_archive(kind, data_dir)) and (problem := _unreachable(urls)) is not None:
        damaged = f"; {printable(archive)} is not the whole archive" if lies_there else ""
        raise DataError(f"{where} and cannot be downloaded ({problem}){damaged}: {otherwise}")
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_WAIT_S)  # torchvision sets none, and a line that falls silent would hang the run
    try:
        kind(str(data_dir), download=True)
    except (RuntimeError, OSError, EOFError, http.client.HTTPException, tarfile.TarError, zlib.error) as error:
        raise DataError(f"{where} and the download failed ({one_line(error)}): {otherwise}") from error
    finally:
        socket.setdefaulttimeout(before)


def archive_of(kind: type, data_dir: str | Path) -> Path:
    """Where torchvision keeps a set's archive; a set of several files has none, and its folder stands for it."""
    return Path(data_dir) / getattr(kind, "filename", "")


def has_whole_archive(kind: type, data_dir: str | Path) -> bool:
    """Whether the archive has torchvision's checksum."""
    from torchvision.datasets.utils import check_integrity

    return check_integrity(str(archive_of(kind, data_dir)), kind.tgz_md5)


def _unreachable(urls: list[str]) -> str | None:
    """None where one of the addresses answers within NETWORK_WAIT_S, else why not.

    In threads, because no timeout bounds the look-up of a name.
    """
    answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def ask(url: str) -> None:
        try:
            request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "pytorch/vision"})
            urllib.request.urlopen(request, timeout=NETWORK_WAIT_S).close()
            answers.put(None)
        except urllib.error.HTTPError:
            answers.put(None)  # someone is there: the download itself will say what is wrong
        except Exception as error:
            answers.put(f"{urllib.parse.urlparse(url).hostname}: {one_line(getattr(error, 'reason', error))}")

    for url in urls:
        threading.Thread(target=ask, args=(url,), daemon=True).start()
    end, problem = time.monotonic() + NETWORK_WAIT_S, f"no answer within {NETWORK_WAIT_S:g} s"
    for _ in urls:
        try:
            problem = answers.get(timeout=max(end - time.monotonic(), 0))
        except queue.Empty:
            break
        if problem is None:
            return None
    return problem
