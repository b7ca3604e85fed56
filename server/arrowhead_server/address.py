# SPDX-License-Identifier: Apache-2.0
"""Where a server listens, and whether it can."""

import socket
from contextlib import ExitStack
from dataclasses import dataclass

from arrowhead_server.errors import PortInUseError

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Address:
    """Where a server listens: one IPv4 address, four ports."""

    host: str = LOOPBACK
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    health_port: int = 8003

    @property
    def local_host(self) -> str:
        """The host by which this machine itself reaches the server."""
        return LOOPBACK if self.host == "0.0.0.0" else self.host  # noqa: S104 (compared, not bound)


def check_ports(address: Address) -> None:
    """Asks for each of Triton's ports once, so that the message can name the option.

    Raises:
        PortInUseError: Somebody listens there, or the address is none of this machine's.
    """
    for option in ("http_port", "grpc_port", "metrics_port"):
        port: int = getattr(address, option)
        with socket.socket() as probe:
            # As Triton does: connections of its predecessor may still be in TIME_WAIT.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address.host, port))
            except OSError as error:
                flag = f"--{option.replace('_', '-')}"
                raise PortInUseError(
                    f"cannot listen on {address.host}:{port} ({error.strerror}): "
                    f"choose another port with {flag}"
                ) from error


def free_address() -> Address:
    """A loopback address with four ports that are free now."""
    with ExitStack() as stack:
        ports = []
        for _ in range(4):
            held = stack.enter_context(socket.socket())
            held.bind((LOOPBACK, 0))
            ports.append(held.getsockname()[1])
    return Address(LOOPBACK, *ports)
