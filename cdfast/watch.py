"""A heartbeat between ranks: which rank died, stopped or failed, said by all the others.

A collective waits for a rank that is gone until the process group's own time-out, and its error
names a connection, not a rank. This watch is independent of collectives: rank 0 listens on a TCP
port, every other rank connects to it, and a thread on each side sends a line of JSON per second.

A connection that ends without a farewell is a rank that died; one without a line for `timeout`
seconds is a rank that was stopped. Rank 0 tells the verdict to all ranks; each prints it and ends
with `RANK_LOST`, so that none waits for ever in a collective.
"""

from __future__ import annotations

import hmac
import json
import math
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from cdfast.config import ConfigError

# Exit status of a rank that ends because another one is gone (EX_TEMPFAIL: worth another try).
RANK_LOST = 75
# Below this a pause of the operating system would be taken for a stopped rank.
SHORTEST_TIMEOUT = 5.0
BEAT_SECONDS = 1.0
# After another rank's own error, time for the same error to be raised here: it says more.
SAME_ERROR_SECONDS = 1.0
# How long a broken collective waits for the watch to learn which rank broke it.
VERDICT_SECONDS = 2.0
_CONNECT_SECONDS = 30.0
_PART_SECONDS = 1.0
_LONGEST_LINE = 8192
_MOST_STRANGERS = 64
_RESTART = "Restart the same command with --resume."


@contextmanager
def watch_ranks(timeout: float = 300.0) -> Iterator[None]:
    """Watch all ranks while the body runs, on every rank; nothing is started in a single process.

    ```python
    with watch_ranks(timeout=300):
        trainer.train()
    ```

    If a rank dies, stops or fails, every other rank prints which and why, and ends with exit status
    `RANK_LOST` (75). A rank that fails raises its own error as ever. Once rank 0 has left the body,
    the others are no longer watched.

    Args:
        timeout: seconds without a line from a rank after which it counts as stopped. The line comes
            from a thread of its own, so this need not exceed a step, a save or an evaluation; it
            must exceed the longest time in which a healthy process runs no thread at all: a call
            into C that keeps the GIL, swapping, a node that is suspended. A rank whose main
            thread alone hangs still counts as alive: that is what `ddp_timeout` is for.

    Raises:
        ConfigError: `timeout` is below 5 s or not finite; a rank cannot reach rank 0.
    """
    if not SHORTEST_TIMEOUT <= timeout < math.inf:
        raise ConfigError(
            f"rank_timeout: expected at least {SHORTEST_TIMEOUT:g} seconds; got {timeout:g}. The "
            "default is 300."
        )
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        yield
        return
    watch = _Watch(dist.get_rank(), timeout)
    watch.connect()
    if watch.rank == 0 and (advice := restart_advice()):
        print(advice, file=sys.stderr, flush=True)
    watch.start()
    try:
        yield
    except BaseException as error:
        watch.fail(error)
        raise
    else:
        watch.leave()


def note(*, step: int | None = None, phase: str | None = None) -> None:
    """Say where this rank is, for the others' report should it be lost; costs nothing."""
    if _active is not None:
        _active.step = _active.step if step is None else step
        _active.phase = _active.phase if phase is None else phase


def restart_advice() -> str | None:
    """What to change so that a restart by torchrun meets anew; None where nothing is to be said.

    torchrun keeps one store over all restarts, and keys that killed processes have left in it make
    the next ones fail or wait. Source: torch 2.13, dynamic_rendezvous.py and rendezvous.py.
    """
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) == 0:
        return None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    text = (
        "warning: torchrun may restart this run, but its processes would meet in the store of those"
        " before, which fails more often than not. Before torchrun: "
        "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
    )
    if os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "0") == "1":
        text = (
            "warning: TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 has no effect without "
            "--rdzv-backend c10d (on one node: --standalone): restarts by torchrun may fail."
        )
    return text


@dataclass
class _Peer:
    """The other end of a connection, and what is known of it."""

    socket: socket.socket
    rank: int = -1  # until it has shown the token
    host: str = "?"
    pid: int = 0
    step: int = 0
    phase: str = ""
    last_seen: float = field(default_factory=time.monotonic)
    incoming: bytes = b""
    outgoing: bytes = b""

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    @property
    def where(self) -> str:
        return _where(self.step, self.phase)


class _Watch:
    """One rank's part: rank 0 has all others as peers, every other rank has rank 0."""

    def __init__(self, rank: int, timeout: float):
        self.rank, self.world, self.timeout = rank, dist.get_world_size(), timeout
        self.step, self.phase = 0, ""
        self.peers: dict[int, _Peer] = {}
        self.strangers: list[_Peer] = []
        self.listener: socket.socket | None = None
        self.token = ""
        # Guards the sockets, which both the thread and the end of the body write to.
        self.lock = threading.RLock()
        self.thread = threading.Thread(target=self._run, name="cdfast-watch", daemon=True)
        self.leaving = False  # the body is over: nothing is reported any more
        self.verdict: str | None = None
        self.report_at = math.inf
        self.waiting = False  # the main thread is out of its collective, and waits for the verdict
        self.suspected: tuple[_Peer, str, float] | None = None  # whose collective broke, until when

    # -- start -------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Rank 0 listens, the others connect; raises on every rank if one cannot."""
        offer: list[Any] = [None]
        if self.rank == 0:
            self.listener = _listen()
            self.token = secrets.token_hex(16)
            offer = [(_addresses(), self.listener.getsockname()[1], self.token)]
        dist.broadcast_object_list(offer, src=0)
        addresses, port, self.token = offer[0]
        problem = None
        if self.rank == 0:
            self._accept_all()
        else:
            problem = self._call(addresses, port)
        problems: list[Any] = [None] * self.world
        dist.all_gather_object(problems, problem)
        if any(problems):
            self._close()
            raise ConfigError(
                f"heartbeat: {'; '.join(p for p in problems if p)}. Expected TCP between all nodes "
                "on any port, as gloo and NCCL need it too. Set MASTER_ADDR to an address of rank "
                "0's node that all nodes reach."
            )

    def _accept_all(self) -> None:
        """Take in the other ranks until all are there or the time is up."""
        until = time.monotonic() + _CONNECT_SECONDS
        while len(self.peers) < self.world - 1 and time.monotonic() < until:
            self._receive(0.1)

    def _call(self, addresses: list[str], port: int) -> str | None:
        """Connect to rank 0; returns what went wrong, or None."""
        errors = []
        hello = {"token": self.token, "rank": self.rank}
        hello |= {"host": socket.gethostname(), "pid": os.getpid()}
        for address in addresses:
            try:
                connection = socket.create_connection(
                    (address, port), timeout=_CONNECT_SECONDS / len(addresses)
                )
                connection.sendall(json.dumps(hello).encode() + b"\n")
                answer = json.loads(connection.makefile("rb").readline(_LONGEST_LINE))
                self.peers[0] = _Peer(connection, 0, answer["host"], answer["pid"])
            # Something else may answer at an address that means another machine here.
            except (OSError, ValueError, TypeError, KeyError) as error:
                errors.append(f"{address} port {port}: {error!r}")
                continue
            connection.setblocking(False)
            return None
        return f"rank {self.rank} cannot reach rank 0 ({'; '.join(errors)})"

    def start(self) -> None:
        global _active, _fork_hook
        _active = self
        if not _fork_hook:
            os.register_at_fork(after_in_child=_forget_in_child)
            _fork_hook = True
        now = time.monotonic()
        for peer in self.peers.values():
            peer.last_seen = now
        self.thread.start()

    # -- the thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        next_beat = previous = time.monotonic()
        while not self.leaving and (self.peers or self.verdict or self.suspected):
            now = time.monotonic()
            if now >= next_beat:
                self._tell({"step": self.step, "phase": self.phase})
                next_beat = now + BEAT_SECONDS
            self._receive(0.1)
            now = time.monotonic()
            # Where this process was paused itself, the others' silence is its own.
            pause = max(0.0, now - previous - 2 * BEAT_SECONDS)
            previous = now
            with self.lock:
                for peer in self.peers.values():
                    peer.last_seen += min(pause, now - peer.last_seen)
            self._judge(now)

    def _judge(self, now: float) -> None:
        for peer in list(self.peers.values()):
            silent = now - peer.last_seen
            if silent > self.timeout:
                self._find(
                    f"{peer} has given no sign of life for {silent:.0f} s (rank_timeout "
                    f"{self.timeout:g} s), last {peer.where}: it was stopped, or its node is gone. "
                    f"End what is left of it. {_RESTART}"
                )
        if self.suspected and now > self.suspected[2]:
            culprit, verdict, _ = self.suspected
            self._find(verdict, SAME_ERROR_SECONDS, culprit)
        if self.verdict and (self.waiting or now >= self.report_at):
            self._report()

    def _find(self, verdict: str, grace: float = 0.0, culprit: _Peer | None = None) -> None:
        """The reason why the run ends: the first one stands, and all ranks are told.

        Args:
            grace: seconds until it is reported.
            culprit: a rank that reports its error itself.
        """
        with self.lock:
            if self.verdict is None:
                self.verdict = verdict
                self.report_at = time.monotonic() + grace
                self._tell({"verdict": verdict, "grace": grace}, culprit)

    def _report(self) -> None:
        """Print the verdict and end the process, wherever its main thread is."""
        with self.lock:
            if self.leaving:
                return
            print(f"rank {self.rank}: error: {self.verdict}", file=sys.stderr, flush=True)
            # The main thread may hold the lock of stdout for ever.
            flush = threading.Thread(target=sys.stdout.flush, daemon=True)
            flush.start()
            flush.join(1.0)
            self._part()
            # A threading exception or sys.exit would not reach a main thread inside a collective.
            os._exit(RANK_LOST)

    # -- messages ----------------------------------------------------------------------------------

    def _tell(self, message: dict[str, Any], culprit: _Peer | None = None) -> None:
        with self.lock:
            for peer in self.peers.values():
                if peer is not culprit:
                    self._send(peer, message)

    def _send(self, peer: _Peer, message: dict[str, Any] | None = None) -> None:
        if message is not None:
            # A stopped peer does not read: its beats need not be kept.
            if len(peer.outgoing) > _LONGEST_LINE and message.keys() == {"step", "phase"}:
                return
            peer.outgoing += json.dumps(message).encode() + b"\n"
        try:
            while peer.outgoing:
                peer.outgoing = peer.outgoing[peer.socket.send(peer.outgoing) :]
        except BlockingIOError:
            pass
        except OSError:
            peer.outgoing = b""  # its end is noticed where it is read

    def _receive(self, seconds: float) -> None:
        """Wait for lines and take in all that have come."""
        sockets = selectors.PollSelector()
        with self.lock:
            for peer in (*self.peers.values(), *self.strangers):
                sockets.register(peer.socket, selectors.EVENT_READ, peer)
            if self.listener is not None:
                sockets.register(self.listener, selectors.EVENT_READ)
        ready = sockets.select(seconds)
        with self.lock:
            if self.leaving:
                return
            for key, _ in ready:
                if key.data is None:
                    self._accept()
                else:
                    self._read(key.data)
            late = time.monotonic() - _CONNECT_SECONDS
            for peer in [p for p in self.strangers if p.last_seen < late]:
                self._drop_stranger(peer)

    def _accept(self) -> None:
        assert self.listener is not None
        try:
            connection, _ = self.listener.accept()
        except OSError:  # it went away again, or there are no file descriptors left
            return
        connection.setblocking(False)
        if len(self.strangers) >= self.world + _MOST_STRANGERS:
            self._drop_stranger(self.strangers[0])
        self.strangers.append(_Peer(connection))

    def _drop_stranger(self, peer: _Peer) -> None:
        self.strangers.remove(peer)
        peer.socket.close()

    def _read(self, peer: _Peer) -> None:
        closed = False
        try:
            while data := peer.socket.recv(65536):
                peer.incoming += data
                if peer.rank < 0 and len(peer.incoming) > _LONGEST_LINE:
                    break
            closed = not data
        except BlockingIOError:
            pass
        except OSError:
            closed = True
        *lines, peer.incoming = peer.incoming.split(b"\n")
        for line in lines:
            if peer.rank >= 0:
                self._take(peer, json.loads(line))
            elif not self._admit(peer, line):
                closed = True
                break
        if peer.rank < 0:
            if (closed or len(peer.incoming) > _LONGEST_LINE) and peer in self.strangers:
                self._drop_stranger(peer)
        elif closed and self.peers.get(peer.rank) is peer:
            del self.peers[peer.rank]
            peer.socket.close()
            self._died(peer)

    def _admit(self, peer: _Peer, line: bytes) -> bool:
        """Whether a stranger's first line proves it to be a rank of this run."""
        try:
            hello = json.loads(line)
            token, rank = str(hello["token"]), int(hello["rank"])
            host, pid = str(hello["host"]), int(hello["pid"])
        except (ValueError, TypeError, KeyError, RecursionError):
            return False
        if not hmac.compare_digest(token.encode(), self.token.encode()) or rank in self.peers:
            return False
        peer.rank, peer.host, peer.pid = rank, host, pid
        self.strangers.remove(peer)
        self.peers[rank] = peer
        self._send(peer, {"host": socket.gethostname(), "pid": os.getpid()})
        return True

    def _take(self, peer: _Peer, message: dict[str, Any]) -> None:
        peer.last_seen = time.monotonic()
        if "step" in message:
            peer.step, peer.phase = message["step"], message["phase"]
        if "verdict" in message:
            self._find(message["verdict"], message["grace"])
        elif "failed" in message:
            text = f"{peer} failed {peer.where}: {message['failed']}"
            if message["collective"]:
                until = time.monotonic() + VERDICT_SECONDS
                self.suspected = self.suspected or (peer, text, until)
            else:
                self._find(text, SAME_ERROR_SECONDS, peer)
        elif "bye" in message:
            del self.peers[peer.rank]
            peer.socket.close()

    def _died(self, peer: _Peer) -> None:
        ago = time.monotonic() - peer.last_seen
        self._find(
            f"{peer} died {peer.where}; last sign of life {ago:.1f} s ago. Its own output has the "
            f"reason. {_RESTART}"
        )

    # -- end ---------------------------------------------------------------------------------------

    def fail(self, error: BaseException) -> None:
        """Tell the others why this rank ends; a broken collective first waits for the true reason.

        Does not return if another rank turns out to be the reason.
        """
        if isinstance(error, SystemExit) and not error.code:
            return self.leave()
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:2000]
        broken = _is_broken_collective(error)
        if self.rank != 0:
            here = {"step": self.step, "phase": self.phase}
            self._tell({"failed": reason, "collective": broken, **here})
        if broken:
            self.waiting = True
            self.thread.join(VERDICT_SECONDS)  # the thread ends the process when it knows
        if self.rank == 0:
            text = f"rank 0 (host {socket.gethostname()}, pid {os.getpid()}) failed "
            text += f"{_where(self.step, self.phase)}: {reason}"
            self._tell({"verdict": text, "grace": SAME_ERROR_SECONDS})
        self.leave()

    def leave(self) -> None:
        """Say farewell; from here on nothing is reported."""
        global _active
        with self.lock:
            self.leaving = True
            self._tell({"bye": True})
        self.thread.join()
        _active = None
        self._part()

    def _part(self) -> None:
        """End all connections once the other ends have read everything.

        Closing one with unread lines resets it, and what was sent last may be lost with it: then a
        farewell would look like a death.
        """
        until = time.monotonic() + _PART_SECONDS
        left = [peer.socket for peer in self.peers.values()]
        for connection in left:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
        while left and time.monotonic() < until:
            left = [connection for connection in left if _is_open(connection)]
            time.sleep(0.01)
        self._close()

    def _close(self) -> None:
        for peer in (*self.peers.values(), *self.strangers):
            peer.socket.close()
        if self.listener is not None:
            self.listener.close()


_active: _Watch | None = None
_fork_hook = False


def _forget_in_child() -> None:
    """A data loader's worker must not hold the connection open when its parent is killed."""
    global _active
    if _active is not None:
        _active._close()
        _active = None


def _listen() -> socket.socket:
    """A server socket on a free port: of this machine alone where torchrun says that all ranks are
    on it, else of all interfaces.
    """
    local = os.environ.get("LOCAL_WORLD_SIZE") == str(dist.get_world_size())
    if local:
        server = socket.create_server(("127.0.0.1", 0))
    elif socket.has_dualstack_ipv6():
        server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    else:
        server = socket.create_server(("", 0))
    server.setblocking(False)
    return server


def _addresses() -> list[str]:
    """Where other ranks may reach this one, the likeliest first."""
    if os.environ.get("LOCAL_WORLD_SIZE") == str(dist.get_world_size()):
        return ["127.0.0.1"]
    named = [os.environ.get("MASTER_ADDR"), socket.gethostname(), socket.getfqdn()]
    return list(dict.fromkeys(name for name in named if name))


def _is_open(connection: socket.socket) -> bool:
    """Whether the other end has not closed it yet; discards what it has sent."""
    try:
        return bool(connection.recv(65536))
    except BlockingIOError:
        return True
    except OSError:
        return False


def _where(step: int, phase: str) -> str:
    return f"at step {step}" + (f" ({phase})" if phase else "")


def _is_broken_collective(error: BaseException) -> bool:
    """Whether another rank's end may be what raised this."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    signs = ("gloo", "Gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)
