"""``applianced``: composition. Starts everything in one order and stops it in the reverse."""

import argparse
import asyncio
import gc
import json
import logging
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import uvloop

from appliance import __version__, heap
from appliance.config import Config, read_config
from appliance.engine import Engine
from appliance.errors import ConfigError
from appliance.guardian import Guardian
from appliance.inventory.asking import directories_of, take_inventory
from appliance.server import listen
from appliance.server.grpc import GrpcServer
from appliance.server.http import HttpServer
from appliance.server.native import NativeServer

_log = logging.getLogger("appliance")

#: Descriptors asked for; a connection takes one, a region of its two.
_DESCRIPTORS = 65536


class _JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def _start_logging(config: Config) -> None:
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(levelname)s %(name)s: %(message)s")
    handler.setFormatter(_JsonLines() if config.log.json_lines else text)
    logging.basicConfig(level=config.log.level.upper(), handlers=[handler])
    logging.raiseExceptions = False  # a full disk or closed pipe behind stderr must not disturb serving


def _say(state: str) -> None:
    """Tell systemd (sd_notify(3)); does nothing outside a unit."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        try:
            notify.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
        except OSError as error:
            _log.warning("cannot notify systemd: %s", error.strerror)


class Daemon:
    """The running whole: engine, transports, sockets."""

    def __init__(self, config: Config, directory: Path, guardian: Guardian) -> None:
        self._config = config
        self._directory = directory
        self._guardian = guardian
        self._admin_uids = frozenset((0, os.geteuid(), *config.access.admin_uids))
        self._stopping = asyncio.Event()

    def request_stop(self) -> None:
        """Begin to stop; called from signal handlers."""
        self._stopping.set()

    async def run(self) -> None:
        """Start, serve until told to stop, stop.

        Raises:
            ConfigError: A socket cannot be had.
        """
        config, directory = self._config, self._directory
        began = time.monotonic()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.request_stop)
        engine = Engine(config, await take_inventory(directories_of(config)))
        native = NativeServer(engine, config.limits, self._admin_uids)
        grpc = GrpcServer(engine, config)
        http = HttpServer(engine, config)
        paths = {name: directory / f"{name}.sock" for name in ("infer", "grpc", "http")}
        made: list[Path] = []  # what is not ours stays when starting fails

        def note(path: Path) -> None:
            made.append(path)
            self._guardian.entrust(path.name)

        try:
            native.start(listen.unix_socket(paths["infer"]))
            note(paths["infer"])
            http_tcp = listen.tcp_socket(config.listen.http_tcp) if config.listen.http_tcp else None
            http_unix = listen.unix_socket(paths["http"])
            note(paths["http"])
            await http.start(http_unix, http_tcp)
            grpc_tcp = listen.tcp_socket(config.listen.grpc_tcp) if config.listen.grpc_tcp else None
            grpc_unix = listen.unix_socket(paths["grpc"])
            note(paths["grpc"])
            await grpc.start(grpc_unix, grpc_tcp)
            endpoints = http.endpoints
            endpoints.update({name: str(path) for name, path in paths.items()})
            if grpc_tcp is not None:
                endpoints["grpc_tcp"] = f"{config.listen.grpc_tcp.rpartition(':')[0]}:{grpc_tcp.getsockname()[1]}"
            _log.info("listening in %s after %.2f s", directory, time.monotonic() - began)
            note(self._write_endpoints(endpoints))
            await self._serve(engine, began)
        finally:
            _say("STOPPING=1")
            grace = config.shutdown.grace_seconds
            native.stop_accepting()
            engine.begin_drain()
            ends = asyncio.gather(engine.stop(grace), grpc.stop(grace), http.stop(grace), return_exceptions=True)
            for problem in filter(None, await ends):
                _log.error("stopping did not go well", exc_info=problem)
            await native.stop()
            for path in made:
                listen.remove(path)
            _log.info("stopped")

    async def _serve(self, engine: Engine, began: float) -> None:
        starting = asyncio.ensure_future(engine.start())
        stopping = asyncio.ensure_future(self._stopping.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting
            ready = sum(status.state == "ready" for status in engine.statuses())
            _log.info(
                "ready after %.2f s with %d of %d models", time.monotonic() - began, ready, len(engine.statuses())
            )
            _say(f"READY=1\nSTATUS=serving {ready} models")
            # What start-up made lives as long as the daemon: collections need not look at it again.
            gc.collect()
            gc.freeze()
            heap.trim()
        else:
            starting.cancel()
        await stopping

    def _write_endpoints(self, endpoints: dict[str, str]) -> Path:
        """Leave ``endpoints.json`` beside the sockets, so that programs find the ports of ``:0`` addresses.

        Raises:
            ConfigError: It cannot be written.
        """
        path = self._directory / "endpoints.json"
        temporary = path.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(endpoints), encoding="utf-8")
            temporary.chmod(0o640)  # for whom the sockets are
            temporary.replace(path)
        except OSError as error:
            raise ConfigError(f"cannot write {str(path)!r}: {error.strerror}") from error
        return path


def _raise_descriptor_limit() -> None:
    """Allow as many descriptors as the defaults of `limits` can need: often a process has 1024 unless it asks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="applianced", description="Serves models on this machine.")
    parser.add_argument("--config", type=Path, help="configuration file; its keys are listed in docs/configuration.md")
    parser.add_argument("--socket-dir", help="directory of the Unix sockets (listen.directory)")
    parser.add_argument("--models", help="model repository (repository.path)")
    parser.add_argument(
        "--tcp", action="store_true", help="also listen on 127.0.0.1:8001 (gRPC) and 127.0.0.1:8000 (HTTP)"
    )
    parser.add_argument("--check", action="store_true", help="check the configuration and exit")
    parser.add_argument("--version", action="version", version=f"applianced {__version__}")
    return parser.parse_args(argv)


def _overrides(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    overrides: dict[str, dict[str, Any]] = {}
    if arguments.socket_dir:
        overrides.setdefault("listen", {})["directory"] = arguments.socket_dir
    if arguments.tcp:
        overrides.setdefault("listen", {}).update(grpc_tcp="127.0.0.1:8001", http_tcp="127.0.0.1:8000")
    if arguments.models:
        overrides["repository"] = {"path": arguments.models}
    return overrides


def main(argv: list[str] | None = None) -> int:
    """Run the daemon until SIGTERM or SIGINT. Exit code 1: it could not start; 2: the command line is wrong."""
    heap.limit_arenas()
    arguments = _arguments(argv)
    try:
        config = read_config(arguments.config, _overrides(arguments))
        if arguments.check:
            return 0
        _start_logging(config)
        _raise_descriptor_limit()
        directory = config.socket_directory().absolute()
        listen.prepare_directory(directory)
        lock = listen.lock_directory(directory)
        guardian = Guardian(str(directory), listen.LOCK_NAME)
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(_run(config, directory, guardian))
        finally:
            os.close(lock)
    except ConfigError as error:
        print(f"applianced: {error}", file=sys.stderr)  # noqa: T201 - logging may not be set up yet
        return 1
    return 0


async def _run(config: Config, directory: Path, guardian: Guardian) -> None:
    try:
        await Daemon(config, directory, guardian).run()
    finally:
        # The loop's handlers go with it: a second signal while it closes would end an orderly stop as a death.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))


if __name__ == "__main__":
    sys.exit(main())
