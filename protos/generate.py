"""Generates the Python code of every proto beside it; with --check, fails when committed code is stale."""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def generate(out: Path) -> None:
    """Write `*_pb2.py`, `*_pb2.pyi` and `*_pb2_grpc.py` of all protos below `out`."""
    protos = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I."]
    command += [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run([*command, *protos], cwd=ROOT, check=True)


def main() -> int:
    """Generate in place, or compare with what is committed."""
    if "--check" not in sys.argv[1:]:
        generate(ROOT)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*_pb2*")}
    committed = {path.relative_to(ROOT): path.read_bytes() for path in ROOT.rglob("*_pb2*.py*")}
    committed = {path: data for path, data in committed.items() if "__pycache__" not in path.parts}
    stale = sorted(str(path) for path in fresh.keys() | committed.keys() if fresh.get(path) != committed.get(path))
    if stale:
        print("generated code is stale; run `make protos`:", *stale, sep="\n  ")
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
