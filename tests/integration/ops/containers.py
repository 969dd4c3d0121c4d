"""The image, built from a plain Debian, and containers of it.

Images and containers are in a separate storage under the test's folder, apart from those of the machine's
user. A docker engine has no separate storage; there the images have names of their own.
"""

import ast
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
SUITE = "bookworm"
BASE = "localhost/shopr1-plain-debian"
IMAGE = "localhost/shopr1-test"


def output(*command: str, env: dict[str, str] | None = None) -> str:
    """Standard output of a command that must succeed."""
    return subprocess.run(
        command, check=True, stdout=subprocess.PIPE, encoding="utf-8", env={**os.environ, **(env or {})}
    ).stdout


def succeeds(*command: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    return False


# --- root file systems --------------------------------------------------------------------------------


def archive() -> str | None:
    """The mirror from which this machine's apt gets the suite."""
    if not shutil.which("apt-get"):
        return None
    targets = output("apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME)", "Created-By: Packages")
    return next((line.split()[0] for line in targets.splitlines() if line.split()[1:] == [SUITE]), None)


def plain_debian(folder: Path, mirror: str) -> Path:
    """A tar file of a minimal root file system with apt and without Python."""
    return _packed(_debian(folder, mirror))


# The extension modules of Python's library are linked with these.
_PYTHON_LIBRARIES = (
    *("ca-certificates", "netbase", "tzdata", "libbz2-1.0", "libexpat1", "libffi8", "libgdbm6"),
    *("liblzma5", "libncursesw6", "libnsl2", "libreadline8", "libsqlite3-0", "libssl3", "libuuid1", "zlib1g"),
)


def python_slim(folder: Path, mirror: str) -> Path | None:
    """The same as python:3.11-slim is made: with a Python that was built from source, below /usr/local.

    None: this machine's Python is Debian's own, so there is none to copy.
    """
    source = Path(sys.base_prefix)
    if source == Path("/usr"):
        return None
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    root = _debian(folder, mirror, *_PYTHON_LIBRARIES)
    local = root / "usr" / "local"
    unused = shutil.ignore_patterns("site-packages", "test", "__pycache__", "config-*")
    shutil.copytree(source / "lib" / version, local / "lib" / version, symlinks=True, ignore=unused)
    (local / "lib" / version / "site-packages").mkdir()
    for library in (source / "lib").glob("libpython*"):
        shutil.copy2(library, local / "lib", follow_symlinks=False)
    shutil.copy2(source / "bin" / version, local / "bin")
    (local / "bin" / "python3").symlink_to(version)
    output("chroot", str(root), "ldconfig")
    for file in (root / "var" / "lib" / "apt" / "lists").glob("*Packages*"):  # the official image has none
        file.unlink()
    return _packed(root)


def _debian(folder: Path, mirror: str, *packages: str) -> Path:
    root = folder / "root"
    include = [f"--include={','.join(packages)}"] if packages else []
    output("debootstrap", "--variant=minbase", *include, SUITE, str(root), mirror)
    return root


def _packed(root: Path) -> Path:
    tar = root.with_suffix(".tar")
    output("tar", "--directory", str(root), "--create", "--file", str(tar), ".")
    shutil.rmtree(root)
    return tar


# --- the image --------------------------------------------------------------------------------------


def find_builder() -> str | None:
    """An available builder. buildah is preferred: it needs neither a daemon nor a container runtime."""
    if shutil.which("buildah"):
        return "buildah"
    if shutil.which("podman"):
        return "podman"
    return "docker" if succeeds("docker", "version") else None


def use_storage(folder: Path) -> dict[str, str]:
    """Environment variables that move the storage of buildah and podman into this folder."""
    driver = os.environ.get("STORAGE_DRIVER", "overlay")
    settings = {"driver": driver, "graphroot": f"{folder}/graph", "runroot": f"{folder}/run"}
    lines = ["[storage]", *(f'{name} = "{value}"' for name, value in settings.items()), ""]
    file = folder / "storage.conf"
    file.write_text("\n".join(lines), "utf-8")
    return {"CONTAINERS_STORAGE_CONF": str(file)}


def import_root(builder: str, tar: Path) -> None:
    if builder != "buildah":
        output(builder, "import", str(tar), BASE)
        return
    container = output("buildah", "from", "scratch").strip()
    output("buildah", "add", "--quiet", container, str(tar), "/")
    output("buildah", "commit", "--quiet", "--rm", container, BASE)


class PipConfiguration:
    """This machine's configuration of pip, for a build. Paths that it names are mounted into the build.

    Attributes:
        text: content of the pip.conf.
        mounted: paths on this machine, by their paths in the build.
    """

    def __init__(self) -> None:
        self.mounted: dict[str, Path] = {}
        printed = output(sys.executable, "-m", "pip", "config", "list")
        found = re.findall(r"^(?:\S+)\.([\w-]+)=(.*)$", printed, re.MULTILINE)
        values = {name: str(ast.literal_eval(value)) for name, value in found}
        lines = [f"{name} = {self._relocated(value)}" for name, value in values.items()]
        self.text = "\n".join(["[global]", *lines, ""])

    def flags(self) -> str:
        return " ".join(f"--volume {here}:{there}:ro" for there, here in self.mounted.items())

    def _relocated(self, value: str) -> str:
        return " ".join(map(self._relocated_word, value.split()))

    def _relocated_word(self, word: str) -> str:
        scheme, path = ("file://", Path(word[7:])) if word.startswith("file://") else ("", Path(word))
        if not path.is_absolute() or not path.exists():
            return word
        there = f"/mnt/{len(self.mounted)}"
        # The files of an index are usually next to it, not below it.
        self.mounted[there] = path.parent if scheme else path
        return f"{scheme}{there}/{path.name}" if scheme else there


def build(builder: str, folder: Path) -> None:
    """docker/build.sh, with this machine's configuration of pip."""
    pip = PipConfiguration()
    (folder / "pip.conf").write_text(pip.text, "utf-8")
    environment = {"BUILDER": builder, "IMAGE": IMAGE, "BASE_IMAGE": BASE, "PIP_CONF": f"{folder}/pip.conf"}
    if builder != "docker":
        # Layers are useless for an image that is built once.
        more = os.environ.get("BUILD_FLAGS", "")
        environment["BUILD_FLAGS"] = f"--layers=false {pip.flags()} {more}"
        environment["BUILDAH_ISOLATION"] = "chroot"  # works without a container runtime
    output(str(ROOT / "docker" / "build.sh"), env=environment)


def configuration(builder: str, image: str = IMAGE) -> dict[str, Any]:
    """The image's configuration: user, entry point etc."""
    if builder == "buildah":
        found = json.loads(output("buildah", "inspect", "--type", "image", image))["Docker"]["config"]
    else:
        found = json.loads(output(builder, "image", "inspect", image))[0]["Config"]
    return dict(found)


def remove_all(builder: str) -> None:
    """Remove everything in the storage of `use_storage`, or the two images of a docker engine."""
    if builder == "docker":
        subprocess.run(["docker", "rmi", "--force", IMAGE, BASE], check=False)
        return
    # Containers first: buildah knows neither podman's containers nor its volumes.
    for command in ("podman rm --all --force", "podman volume rm --all --force", "buildah rm --all"):
        succeeds(*command.split())
    succeeds(builder, "rmi", "--all", "--force")


# --- containers -------------------------------------------------------------------------------------


class Engine:
    """docker or podman, with the restrictions of compose.yaml."""

    name = "shopr1-test"

    def __init__(self, *command: str) -> None:
        self.command = command

    def run(self, program: str, *arguments: str) -> list[str]:
        """The command that runs a program in a new container."""
        return [*self._run("--entrypoint", program), IMAGE, *arguments]

    def serve(self, *flags: str) -> list[str]:
        """The command that runs the image's entry point in a new container."""
        return [*self._run("--name", self.name, *flags), IMAGE]

    def terminate(self, _pid: int) -> None:
        """Send the container its stop signal, and kill it a minute later."""
        output(*self.command, "stop", "--time", "60", self.name)

    def works(self) -> bool:
        """Whether this engine can run containers on this machine."""
        return succeeds(*self._run("--pull", "never"), BASE, "true")

    def _run(self, *flags: str) -> list[str]:
        hardened = ["--read-only", "--cap-drop", "all", "--security-opt", "no-new-privileges"]
        hardened += ["--tmpfs", "/tmp:mode=1777", *_limits()]
        return [*self.command, "run", "--rm", "--network", "host", *hardened, *flags]


class Chroot:
    """buildah without a container runtime: only the root file system and the user differ."""

    def __init__(self, image: str = IMAGE) -> None:
        self._entrypoint = configuration("buildah", image).get("Entrypoint") or []
        self._container = output("buildah", "from", image).strip()

    def copy(self, file: str, path: str) -> None:
        """Copy a file of this machine into the container."""
        output("buildah", "copy", "--quiet", self._container, file, path)

    def run(self, program: str, *arguments: str) -> list[str]:
        return self.run_with((), program, *arguments)

    def run_with(self, flags: Sequence[str], program: str, *arguments: str) -> list[str]:
        return [*self._run(*flags), program, *arguments]

    def serve(self, *flags: str) -> list[str]:
        return [*self._run(*flags), *self._entrypoint]

    def terminate(self, pid: int) -> None:
        """Signal the service itself, because buildah, the first process, would kill it."""
        os.kill(_innermost(pid), signal.SIGTERM)

    def _run(self, *flags: str) -> list[str]:
        return ["buildah", "run", "--isolation", "chroot", *flags, self._container, "--"]


class Checkout:
    """The service of this repository without a container, for comparison."""

    def serve(self, *flags: str) -> list[str]:
        environment = [flag.removeprefix("--env=") for flag in flags]
        return ["env", *environment, sys.executable, "-m", "shopr1_service", "serve"]

    def terminate(self, pid: int) -> None:
        os.kill(pid, signal.SIGTERM)


Runner = Engine | Chroot


def working_engine(builder: str) -> Engine | None:
    """An engine that runs containers of the builder's images."""
    # podman's defaults often fail without systemd or with mixed cgroups.
    podman = [Engine("podman"), Engine("podman", "--runtime", "runc", "--cgroup-manager", "cgroupfs")]
    candidates = [Engine("docker")] if builder == "docker" else podman
    return next((engine for engine in candidates if engine.works()), None)


def _limits() -> Iterator[str]:
    """Limits that this process may set: an engine's default limits can exceed them."""
    for name, limit in (("nofile", resource.RLIMIT_NOFILE), ("nproc", resource.RLIMIT_NPROC)):
        _, hard = resource.getrlimit(limit)
        most = hard if 0 < hard < 30_000 else 30_000
        yield from ("--ulimit", f"{name}={most}:{most}")


def _innermost(pid: int) -> int:
    """The last process of a chain in which each has started the next."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    children = [child for task in tasks for child in (task / "children").read_text("utf-8").split()]
    return _innermost(int(children[0])) if children else pid
