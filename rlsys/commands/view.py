"""`rlsys view`: pages about a run on this machine, or one file with them."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
from collections.abc import Sequence
from pathlib import Path

from rlsys.errors import CheckpointError, ConfigError
from rlsys.files import write_text
from rlsys.outputs import check_file

PORT = 6007
GENERATOR = '<meta name="generator" content="rlsys view">'
"""Line by which `rlsys view` knows a page that it wrote."""
HEAD = 1000
"""Bytes at the beginning of a page that have this line."""


def run(run_dirs: Sequence[Path], host: str, port: int, export: Path | None, *, overwrite: bool = False) -> None:
    """Serve the pages of one or two runs until the user stops the command, or write them into a file.

    Raises:
        ConfigError: a folder is no run directory, the address or the file cannot be used, or a package is missing.
    """
    try:
        from rlsys.viewer.app import LOCAL, build
        from rlsys.viewer.run_files import RunFiles

        if export is None:
            import uvicorn
    except ModuleNotFoundError as error:
        raise ConfigError(f"`rlsys view` needs the package {error.name}: pip install 'rlsys[view]'") from None
    if export is not None:
        if not export.parent.is_dir():
            raise ConfigError(f"--export {export}: no folder {export.parent}; make it, or choose another name")
        check_file(export, "--export", overwrite=overwrite, own=lambda content: GENERATOR.encode() in content[:HEAD])
    runs = [RunFiles(path) for path in run_dirs]
    if export is not None:
        write_page(runs, export)
        return
    listener = listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    page = "trees" if runs[0].trees.has_files() and not runs[0].rows() else ""
    print(f"http://{shown}:{listener.getsockname()[1]}/{page}  (Ctrl-C ends it)", flush=True)
    local = is_loopback(host)
    if not local:
        print(f"--host {host}: everybody who reaches this address can read the run and mark chains", flush=True)
    app = build(runs, hosts=(*LOCAL, host) if local else ())
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off"))
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])


def write_page(runs: Sequence[object], path: Path) -> None:
    """Write the pages into one file.

    Raises:
        ConfigError: the file cannot be written.
    """
    from rlsys.viewer import export

    text = export.page(runs)  # type: ignore[arg-type]
    try:
        write_text(path, text)
    except CheckpointError as error:
        raise ConfigError(f"--export: {error.message}") from None
    print(f"written: {path} ({len(text.encode()) / 1e6:.1f} MB)")


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address.

    Raises:
        ConfigError: the address or the port cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError, OverflowError) as error:
        raise ConfigError(f"--host: expected an address of this machine, found {host!r} ({error})") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"--port: {port} is in use; give another one, or 0 for any free one") from None
        raise ConfigError(f"--host, --port: {host} port {port} cannot be used: {error.strerror}") from None
    return listener


def is_loopback(host: str) -> bool:
    """Return whether an address is one of this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
