"""How does an open data set get here, whole, over a connection that breaks?"""

import hashlib
import http.client
import os
import shutil
import ssl
import sys
import tarfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from support.disk.files import InputError, one_line

ATTEMPTS, PAUSE = 6, 2.0  # connections that bring nothing new; seconds before the next, doubling
BROKEN = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


def fetch(url: str, path: Path, md5: str) -> None:
    """A file from an address, by way of `<path>.partial`, from which the next download continues if this one
    is interrupted. Raises InputError unless its size is what the server says, and its MD5 is `md5`."""
    part = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    vain, most = 0, -1
    while problem := transfer(url, part):
        have = part.stat().st_size
        vain, most = (0, have) if have > most else (vain + 1, most)
        if vain >= ATTEMPTS:
            raise InputError(f"{url}: {problem}; run it again later: it continues after {have} bytes")
        time.sleep(PAUSE * 2**vain)
    if md5:
        with open(part, "rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found != md5:
            part.unlink()
            raise InputError(f"{url}: MD5 {found}, {md5} expected; it is deleted, download it again")
    os.replace(part, path)


def transfer(url: str, part: Path) -> str:
    """Appends to `part` as many of the missing bytes as one connection brings. Returns "" if none are missing
    any more, or else what went wrong. Raises InputError if another try would not help."""
    try:
        with open(part, "ab") as file:
            have = file.tell()
            headers = {"User-Agent": "prepare.py"} | ({"Range": f"bytes={have}-"} if have else {})
            with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as reply:
                begin = have if reply.status == 206 else 0  # some servers begin anew
                total = begin + int(reply.headers.get("Content-Length", -begin))
                file.truncate(begin)
                facts = {"desc": part.stem, "initial": begin, "total": total or None}
                with tqdm.wrapattr(file, "write", **facts) as sink:
                    shutil.copyfileobj(reply, sink, 1 << 20)
        size = part.stat().st_size
        return "" if total in (0, size) else f"the server announced {total} bytes and sent {size}"
    except urllib.error.HTTPError as error:
        problem = f"the server answered {error.code} {error.reason}"
        if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{have}":
            return ""  # everything was there before
        if error.code == 416:  # what is there is longer than the file
            part.write_bytes(b"")
        elif error.code < 500 and error.code != 429:
            raise InputError(f"{url}: {problem}; get it by hand into {part.with_suffix('')}") from error
        return problem
    except BROKEN as error:
        return f"the connection broke ({one_line(error)})"
    except OSError as error:
        why = f"cannot be written ({error.strerror})"
        raise InputError(f"{part}: {why}; make room and run it again, which continues") from error


def unpack(archive: Path, target: Path) -> None:
    """A zip or tar into a folder, whole or not at all. What would land outside is never written: of a
    tar that is an error, of a zip it is left out. Raises InputError."""
    if archive.suffix == ".tar" and not hasattr(tarfile, "data_filter"):
        fix = f"unpack it by hand into {target}, and run this again"
        raise InputError(f"{archive}: only Python 3.11.4 and newer unpack this safely; {fix}")
    part = target.with_name(target.name + ".partial")
    shutil.rmtree(part, ignore_errors=True)
    print(f"unpacking {archive}", file=sys.stderr)
    try:
        shutil.unpack_archive(archive, part, **({"filter": "data"} if archive.suffix == ".tar" else {}))
        os.replace(part, target)
    except Exception as error:  # a damaged archive can raise nearly anything
        why = f"cannot be unpacked ({one_line(error)})"
        raise InputError(f"{archive}: {why}; make room, or delete it and download it again") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
