"""How does an open data set get here, whole, over a connection that breaks?"""

import errno
import hashlib
import http.client
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from support.files import InputError, one_line

ATTEMPTS, PAUSE = 6, 2.0  # connections that bring nothing new; seconds before the next, doubling


class Download(NamedTuple):
    """Files by name: address, and MD5 where it is known. Archives among them are unpacked. `by_hand` says how
    to get what cannot be downloaded without an account."""

    files: dict[str, tuple[str, str]]
    licence: str = ""
    citation: str = ""
    by_hand: str = ""


def download(name: str, what: Download, raw_dir: Path) -> Path:
    """Gets and unpacks a data set; what is there already is not asked for again. Returns its folder. Raises
    InputError."""
    if what.by_hand:
        raise InputError(f"{name}: {what.by_hand}")
    target = raw_dir / name
    print(f"{name}: licence {what.licence}\nplease cite: {what.citation}")
    for file, (url, md5) in what.files.items():
        path = target / file
        if not path.exists():
            fetch(url, path, md5)
        if path.suffix in (".zip", ".tar") and not (target / path.stem).exists():
            unpack(path, target / path.stem)
    return target


def fetch(url: str, path: Path, md5: str) -> None:
    """A file from an address, by way of `<path>.partial`, which an interrupted download leaves and the next
    one goes on with. Its size must be what the server says, its MD5 `md5`. Raises InputError."""
    part = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    vain, most = 0, -1
    while problem := transfer(url, part):
        have = part.stat().st_size if part.exists() else 0
        vain, most = (0, have) if have > most else (vain + 1, most)
        if vain >= ATTEMPTS:
            raise InputError(f"{url}: {problem} ({have} bytes are there); run it again later: it goes on")
        time.sleep(PAUSE * 2**vain)
    if md5:
        with open(part, "rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found != md5:
            part.unlink()
            raise InputError(f"{url}: MD5 {found}, {md5} expected; it is deleted, download it again")
    os.replace(part, path)


def transfer(url: str, part: Path) -> str:
    """What one connection brings of what `part` still misses, added to it; and why that is not all, or "".
    Raises InputError where another try would not help."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "prepare.py"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as reply:
            begin, total = 0, int(reply.headers.get("Content-Length", -1))
            if reply.status == 206:
                span = re.match(r"bytes (\d+)-\d+/(\d+)", reply.headers.get("Content-Range", ""))
                begin, total = (int(span[1]), int(span[2])) if span else (-1, -1)
                if begin != have:
                    part.unlink()
                    return "the server sent another part than was asked for"
            bar = tqdm(desc=part.stem, initial=begin, total=max(total, 0) or None, unit="B", unit_scale=True)
            with open(part, "ab" if begin else "wb") as file, bar:
                while block := reply.read(1 << 20):
                    file.write(block)
                    bar.update(len(block))
    except urllib.error.HTTPError as error:
        problem = f"the server answered {error.code} {error.reason}"
        if error.code == 416:  # what is there is longer than the file
            part.unlink(missing_ok=True)
        elif error.code < 500 and error.code != 429:
            raise InputError(f"{url}: {problem}; get it by hand into {part.with_suffix('')}") from error
        return problem
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
        return f"the connection broke ({one_line(error)})"
    except OSError as error:
        raise InputError(f"{part}: cannot be written ({error.strerror}); mend it and run again") from error
    size = part.stat().st_size
    if size > total >= 0:
        part.unlink()
    return "" if total in (-1, size) else f"the server announced {total} bytes and sent {size}"


def unpack(archive: Path, target: Path) -> None:
    """A zip or tar into a folder, whole or not at all. What would land outside is never written: of a
    tar that is an error, of a zip it is left out. Raises InputError."""
    part = target.with_name(target.name + ".partial")
    shutil.rmtree(part, ignore_errors=True)
    print(f"unpacking {archive}", file=sys.stderr)
    try:
        shutil.unpack_archive(archive, part, **({"filter": "data"} if archive.suffix == ".tar" else {}))
        os.replace(part, target)
    except Exception as error:  # a damaged archive can raise nearly anything
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        mend = "free some space" if full else "delete it and download it again"
        raise InputError(f"{archive}: cannot be unpacked ({one_line(error)}); {mend}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
