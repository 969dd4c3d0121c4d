"""The image, built from a plain Debian, and containers of it.

Everything lies in a storage of its own under the test's folder: no image or container of the machine's user
is seen or touched. Only a docker engine has no such thing; there the images get names of their own.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
SUITE = "bookworm"
BASE = "localhost/shopr1-plain-debian"
IMAGE = "localhost/shopr1-test"


def output(*command: str, env: dict[str, str] | None = None) -> str:
    """What a command that must succeed prints."""
    return subprocess.run(
        command, check=True, stdout=subprocess.PIPE, encoding="utf-8", env={**os.environ, **(env or {})}
    ).stdout


def succeeds(*command: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    return False


# --- a plain Debian ---------------------------------------------------------------------------------


def archive() -> str | None:
    """Where this machine's apt gets the suite from."""
    if not shutil.which("apt-get"):
        return None
    targets = output("apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME)", "Created-By: Packages")
    return next((line.split()[0] for line in targets.splitlines() if line.split()[1:] == [SUITE]), None)


def plain_debian(folder: Path, mirror: str) -> Path:
    """A tar file of a root with apt, and little else: no Python."""
    root = folder / "root"
    output("debootstrap", "--variant=minbase", SUITE, str(root), mirror)
    tar = folder / "root.tar"
    output("tar", "--directory", str(root), "--create", "--file", str(tar), ".")
    shutil.rmtree(root)
    return tar


# --- the image --------------------------------------------------------------------------------------


def find_builder() -> str | None:
    """buildah first: it needs neither a daemon nor a container runtime."""
    if shutil.which("buildah"):
        return "buildah"
    if shutil.which("podman"):
        return "podman"
    return "docker" if succeeds("docker", "version") else None


def use_storage(folder: Path) -> dict[str, str]:
    """What makes buildah and podman keep everything in this folder."""
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
    """This machine's configuration of pip, for a build: what it names on the disk is mounted there.

    Attributes:
        text: of a pip.conf.
        mounted: paths here, by their paths there.
    """

    def __init__(self) -> None:
        self.mounted: dict[str, Path] = {}
        printed = output(sys.executable, "-m", "pip", "config", "list")
        found = re.findall(r"^(?:\S+)\.([\w-]+)=(.*)$", printed, re.MULTILINE)
        values = {name: str(ast.literal_eval(value)) for name, value in found}
        lines = [f"{name} = {self._moved(value)}" for name, value in values.items()]
        self.text = "\n".join(["[global]", *lines, ""])

    def flags(self) -> str:
        return " ".join(f"--volume {here}:{there}:ro" for there, here in self.mounted.items())

    def _moved(self, value: str) -> str:
        return " ".join(map(self._moved_word, value.split()))

    def _moved_word(self, word: str) -> str:
        scheme, path = ("file://", Path(word[7:])) if word.startswith("file://") else ("", Path(word))
        if not path.is_absolute() or not path.exists():
            return word
        there = f"/mnt/{len(self.mounted)}"
        # The files of an index lie beside it, more often than in it.
        self.mounted[there] = path.parent if scheme else path
        return f"{scheme}{there}/{path.name}" if scheme else there


def build(builder: str, folder: Path) -> None:
    """docker/build.sh, with this machine's configuration of pip."""
    pip = PipConfiguration()
    (folder / "pip.conf").write_text(pip.text, "utf-8")
    environment = {"BUILDER": builder, "IMAGE": IMAGE, "BASE_IMAGE": BASE, "PIP_CONF": f"{folder}/pip.conf"}
    if builder != "docker":
        # A layer for each step is of no use to an image that is built once.
        more = os.environ.get("BUILD_FLAGS", "")
        environment["BUILD_FLAGS"] = f"--layers=false {pip.flags()} {more}"
        environment["BUILDAH_ISOLATION"] = "chroot"  # works with any container runtime and with none
    output(str(ROOT / "docker" / "build.sh"), env=environment)


def configuration(builder: str) -> dict[str, Any]:
    """User, entry point and so on of the image."""
    if builder == "buildah":
        found = json.loads(output("buildah", "inspect", "--type", "image", IMAGE))["Docker"]["config"]
    else:
        found = json.loads(output(builder, "image", "inspect", IMAGE))[0]["Config"]
    return dict(found)


def remove_all(builder: str) -> None:
    """Everything in the storage of `use_storage`; of a docker engine the two images."""
    if builder == "docker":
        subprocess.run(["docker", "rmi", "--force", IMAGE, BASE], check=False)
        return
    # Containers first; buildah does not know podman's, nor its volumes.
    for command in ("podman rm --all --force", "podman volume rm --all --force", "buildah rm --all"):
        succeeds(*command.split())
    succeeds(builder, "rmi", "--all", "--force")


# --- containers -------------------------------------------------------------------------------------


class Engine:
    """docker or podman, with everything taken away from the container that compose.yaml takes away."""

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
        """Sends the container its stop signal, and kills it a minute later."""
        output(*self.command, "stop", "--time", "60", self.name)

    def works(self) -> bool:
        """Whether containers can be run here at all."""
        return succeeds(*self._run("--pull", "never"), BASE, "true")

    def _run(self, *flags: str) -> list[str]:
        hardened = ["--read-only", "--cap-drop", "all", "--security-opt", "no-new-privileges"]
        hardened += ["--tmpfs", "/tmp:mode=1777", *_limits()]
        return [*self.command, "run", "--rm", "--network", "host", *hardened, *flags]


class Chroot:
    """buildah, where no container runtime works: another root and another user, and no more than that."""

    def __init__(self) -> None:
        self._entrypoint = configuration("buildah")["Entrypoint"]
        self._container = output("buildah", "from", IMAGE).strip()

    def run(self, program: str, *arguments: str) -> list[str]:
        return [*self._run(), program, *arguments]

    def serve(self, *flags: str) -> list[str]:
        return [*self._run(*flags), *self._entrypoint]

    def terminate(self, pid: int) -> None:
        """Signals the service itself: buildah, the first process, would kill it."""
        os.kill(_innermost(pid), signal.SIGTERM)

    def _run(self, *flags: str) -> list[str]:
        return ["buildah", "run", "--isolation", "chroot", *flags, self._container, "--"]


class Checkout:
    """No container at all: the service of this repository, to compare with."""

    def serve(self, *flags: str) -> list[str]:
        environment = [flag.removeprefix("--env=") for flag in flags]
        return ["env", *environment, sys.executable, "-m", "shopr1_service", "serve"]

    def terminate(self, pid: int) -> None:
        os.kill(pid, signal.SIGTERM)


Runner = Engine | Chroot


def working_engine(builder: str) -> Engine | None:
    """One that runs containers of what the builder has built."""
    # Where podman's defaults fail, they often do because there is no systemd, or because cgroups are mixed.
    podman = [Engine("podman"), Engine("podman", "--runtime", "runc", "--cgroup-manager", "cgroupfs")]
    candidates = [Engine("docker")] if builder == "docker" else podman
    return next((engine for engine in candidates if engine.works()), None)


def _limits() -> Iterator[str]:
    """An engine's own limits are refused where this process may not have as much."""
    for name, limit in (("nofile", resource.RLIMIT_NOFILE), ("nproc", resource.RLIMIT_NPROC)):
        _, hard = resource.getrlimit(limit)
        most = hard if 0 < hard < 30_000 else 30_000
        yield from ("--ulimit", f"{name}={most}:{most}")


def _innermost(pid: int) -> int:
    """The last of a chain of processes, each of which has started the next."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    children = [child for task in tasks for child in (task / "children").read_text("utf-8").split()]
    return _innermost(int(children[0])) if children else pid
