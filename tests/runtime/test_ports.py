"""Ports for the rendezvous of processes."""

import socket

import pytest

from bigtrain.runtime import ports


@pytest.mark.parametrize(("given", "first", "last"), [("32768\t60999\n", 32768, 60999), ("1024\t40000\n", 1024, 40000)])
def test_outside(tmp_path, monkeypatch, given, first, last):
    """A port is outside Linux's ephemeral range and can be bound."""
    file = tmp_path / "range"
    file.write_text(given)
    monkeypatch.setattr(ports, "GIVEN", file)
    for port in {ports.free_port() for _ in range(30)}:
        assert 10_000 <= port < 65_536 and not first <= port <= last
        with socket.socket() as listening:
            listening.bind(("", port))


def test_no_port_outside(tmp_path, monkeypatch):
    """Where Linux may give any port, it gives this one too."""
    file = tmp_path / "range"
    file.write_text("1024 65535")
    monkeypatch.setattr(ports, "GIVEN", file)
    assert ports.free_port() > 0


def test_in_use(monkeypatch):
    """A port in use by another program is skipped; if all are in use, the error says so."""
    with socket.socket() as other:
        other.bind(("", 0))
        taken = other.getsockname()[1]
        monkeypatch.setattr(ports.random.SystemRandom, "sample", lambda self, others, count: [taken, taken])
        with pytest.raises(OSError, match="no port of this machine is free"):
            ports.free_port()
