"""Accounting for a SLURM cluster of the tests: slurmdbd, and a MariaDB server that only this user can reach."""

import getpass
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.cluster import free_ports, poll, slurm, stop_daemons, write_config

CONFIG = """
AuthType=auth/none
DbdHost=localhost
DbdPort={port}
SlurmUser={user}
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser={user}
StorageLoc=slurm
PidFile={folder}/slurmdbd.pid
LogFile={folder}/slurmdbd.log
"""
OPTIONS = """
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStorageEnforce=associations,limits,qos
"""


@contextmanager
def run_database(folder: Path) -> Iterator[Path]:
    """Start a MariaDB server without any databases, and yield its socket."""
    tables = next(Path("/usr/share").glob("m*/m*_system_tables.sql"))
    (folder / "init.sql").write_text(f"CREATE DATABASE mysql;\nUSE mysql;\n{tables.read_text()}")
    (folder / "data").mkdir()
    socket = folder / "socket"
    files = {"datadir": folder / "data", "socket": socket, "init-file": folder / "init.sql", "log-error": folder / "log"}
    server = subprocess.Popen(
        [
            *("mariadbd", "--no-defaults", f"--user={getpass.getuser()}", "--skip-networking", "--skip-grant-tables"),
            *(f"--{option}={file}" for option, file in files.items()),
        ],
        stderr=subprocess.DEVNULL,
    )
    try:
        poll(socket.exists, 30, "start of MariaDB")
        yield socket
    finally:
        server.terminate()
        server.wait(30)


@contextmanager
def run_accounting(folder: Path) -> Iterator[str]:
    """Start accounting, in which this user has the account `vision` with the qos `long`.

    Args:
        folder: Folder of its configuration, data and logs.

    Yields:
        The lines of slurm.conf with which a cluster uses it.
    """
    (port,), user = free_ports(1), getpass.getuser()
    options = OPTIONS.format(port=port)
    config = folder / "slurmdbd.conf"
    config.touch(0o600)
    config.write_text(CONFIG.format(port=port, user=user, folder=folder))
    with run_database(folder) as socket, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(write_config(folder, options)))  # whose folder slurmdbd.conf is in
        patch.setenv("MYSQL_UNIX_PORT", str(socket))
        try:
            slurm("slurmdbd")
            poll(lambda: slurm("sacctmgr", "-i", "add", "cluster", "lab", check=False), 30, "start of slurmdbd")
            slurm("sacctmgr", "-i", "add", "qos", "long")
            slurm("sacctmgr", "-i", "add", "account", "vision")
            slurm("sacctmgr", "-i", "add", "user", user, "account=vision", "qos=normal,long")
            yield options
        finally:
            stop_daemons(folder)
