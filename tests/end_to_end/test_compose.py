"""The compose file and Dockerfiles: valid, pinned, on loopback, and in agreement with the settings they set."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml
from tests.support.paths import ROOT

pytestmark = pytest.mark.service

SERVICES = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
DOCKERFILES = {name: ROOT / service["build"]["dockerfile"] for name, service in SERVICES.items() if "build" in service}
PINNED = re.compile(r"[\w./-]+:\d[\w.-]*\d[\w.-]*")


def compose_command():
    """The compose command of this machine, or None."""
    for command in (["docker-compose"], ["docker", "compose"]):
        if shutil.which(command[0]) and not subprocess.run([*command, "version"], capture_output=True).returncode:
            return command
    return None


def base_images(dockerfile):
    return re.findall(r"^FROM (\S+)", dockerfile.read_text(), flags=re.MULTILINE)


def test_compose_accepts_the_file():
    command = compose_command()
    if command is None:
        pytest.skip("no docker-compose command here: install Debian's docker-compose package")
    done = subprocess.run([*command, "config"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(yaml.safe_load(done.stdout)["services"]) == set(SERVICES)


def test_every_image_is_pinned():
    images = [service["image"] for service in SERVICES.values()]
    images += [image for dockerfile in DOCKERFILES.values() for image in base_images(dockerfile)]
    assert len(images) == 5
    assert [image for image in images if not PINNED.fullmatch(image)] == []


def test_every_port_is_on_loopback():
    ports = [port for service in SERVICES.values() for port in service["ports"]]
    assert len(ports) == 6
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []


def test_every_path_exists():
    for dockerfile in DOCKERFILES.values():
        for line in re.findall(r"^COPY (.+)$", dockerfile.read_text(), flags=re.MULTILINE):
            for source in line.split()[:-1]:
                assert (ROOT / source).exists(), f"{dockerfile}: {source}"
    for service in SERVICES.values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith("./") or (ROOT / source).exists(), source


def test_images_get_every_package_of_the_wheel():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert [package for package in wheel["packages"] if f"!{package}" not in ignored] == []
    for dockerfile in DOCKERFILES.values():
        copied = [line.split()[1] for line in dockerfile.read_text().splitlines() if line.startswith("COPY")]
        missing = [package for package in wheel["packages"] if not {package, package.split("/")[0]} & set(copied)]
        assert missing == [], dockerfile


def test_no_container_runs_as_root_of_ours():
    for dockerfile in DOCKERFILES.values():
        assert re.findall(r"^USER (\S+)", dockerfile.read_text(), flags=re.MULTILINE) == ["kar"]


def test_the_sidecar_understands_its_environment():
    program = "from kar_sidecar.settings import Settings; print(Settings.read().model_dump_json())"
    environment = SERVICES["sidecar"]["environment"]
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    settings = json.loads(done.stdout)
    assert settings["releases"] == "/kar/releases"
    assert settings["triton_address"] == "triton:8001"
    assert settings["store"] == "aerospike:aerospike:3000/kar/entities"
    published = {int(port.split(":")[-1]) for port in SERVICES["sidecar"]["ports"]}
    assert published == {settings["grpc_port"], settings["metrics_port"]}


def test_triton_sees_the_models_of_every_release(tmp_path):
    """The start script with a `tritonserver` of our own, which lists its repository and ends."""
    for release in ("aaa", "bbb"):
        (tmp_path / "releases" / release / "triton" / "gpu" / f"adaptor_{release}").mkdir(parents=True)
        (tmp_path / "releases" / release / "triton" / "cpu" / f"cpu_{release}").mkdir(parents=True)
    (tmp_path / "releases" / "active").write_text("aaa\n")
    server = tmp_path / "bin" / "tritonserver"
    server.parent.mkdir()
    server.write_text(
        f"#!{sys.executable}\nimport os, sys\nprint(*sys.argv[1:])\nprint(*sorted(os.listdir('{tmp_path}/models')))\n"
    )
    server.chmod(0o755)
    done = subprocess.run(
        ["sh", ROOT / "deploy" / "triton" / "serve.sh", "--log-verbose=1"],
        env={
            "PATH": f"{server.parent}:{os.defpath}",
            "KAR_RELEASES": str(tmp_path / "releases"),
            "KAR_MODELS": str(tmp_path / "models"),
        },
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    options, models = done.stdout.splitlines()
    assert f"--model-repository={tmp_path}/models --model-control-mode=explicit" in options
    assert options.endswith("--log-verbose=1")
    assert models == "adaptor_aaa adaptor_bbb"
    linked = tmp_path / "releases" / "bbb" / "triton" / "gpu" / "adaptor_bbb"
    assert (tmp_path / "models" / "adaptor_bbb").resolve() == linked
