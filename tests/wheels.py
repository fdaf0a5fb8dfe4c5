"""Wheels of this checkout, as `pip wheel --no-deps .` makes them, without a build."""

import base64
import hashlib
import zipfile
from pathlib import Path

import workers

ROOT = Path(__file__).parent.parent
PACKAGES = ("workers", "orchestrator", "pipelines")


def make_wheel(folder: Path, build: str = "shipped", name: str = "vitscale") -> Path:
    """Of the same version, with a local part that tells it from what is installed."""
    version = f"{workers.__version__}+{build}"
    files = {
        str(path.relative_to(ROOT)): path.read_bytes()
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*"))
        if path.suffix in (".py", ".css")
    }
    old = f'__version__ = "{workers.__version__}"'.encode()
    assert files["workers/__init__.py"].count(old) == 1
    files["workers/__init__.py"] = files["workers/__init__.py"].replace(
        old, f'__version__ = "{version}"'.encode()
    )
    about = f"{name}-{version}.dist-info"
    files[f"{about}/METADATA"] = f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n".encode()
    files[f"{about}/WHEEL"] = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    rows = [f"{path},sha256={_digest(data)},{len(data)}" for path, data in files.items()]
    record = f"{about}/RECORD"
    files[record] = "\n".join([*rows, f"{record},,", ""]).encode()
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in files.items():
            archive.writestr(path, data)
    return wheel


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
