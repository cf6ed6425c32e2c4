"""What the Python tests of the Centrifugal protocol share: `natter up`, tokens, a relay that can be cut, waits."""

import asyncio
import base64
import hashlib
import hmac
import json
import os
import pathlib
import signal
import subprocess
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[3]
DEADLINE = 15  # seconds, for what should take milliseconds
START_DEADLINE = 180  # `natter up` may have to fetch its servers
STOP_DEADLINE = 40

SECRET = "a secret of Centrifugo's own tokens, 32 bytes or more"
CONFIG = f"""
[centrifugal]
hs256_secret = "{SECRET}"
default_namespace = "main"

[namespaces.main]
durable = true
typing = true
history = true
presence = "users"
everybody = ["read", "write", "presence", "history"]
"""


class Up:
    """A `natter up` with data of its own on free ports, for a `with` block."""

    def __init__(self, binary, edges=1):
        self.binary, self.edges = str(pathlib.Path(binary).resolve()), edges

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory(prefix="natter-centrifugal-")
        folder = pathlib.Path(self.folder.name)
        (folder / "config.toml").write_text(CONFIG)
        out, log = folder / "up.json", folder / "up.log"
        command = [self.binary, "up", "--config", folder / "config.toml", "--edges", str(self.edges), "--no-mongodb"]
        command += ["--json", "--port", "0", "--nats-port", "0", "--data", folder / "up"]
        # Nothing of what a person's machine says to natter.
        env = {name: value for name, value in os.environ.items() if not name.startswith("NATTER__")}
        with open(out, "w") as stdout, open(log, "w") as stderr:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True
            )
        try:
            deadline = time.monotonic() + START_DEADLINE
            while not out.read_text().endswith("\n"):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"natter up is not ready: {log.read_text()[-2000:]}")
                time.sleep(0.05)
        except BaseException:
            self.__exit__()
            raise
        self.region = json.loads(out.read_text().splitlines()[0])["regions"][0]
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_DEADLINE)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        self.folder.cleanup()

    def address(self, edge=0):
        """host:port of an edge."""
        return self.region["edges"][edge]["http"].split("//")[1].rstrip("/")


def jwt(claims, secret=SECRET):
    """A JWT with HS256."""

    def part(value):
        return base64.urlsafe_b64encode(value).rstrip(b"=")

    signed = part(b'{"alg":"HS256","typ":"JWT"}') + b"." + part(json.dumps(claims).encode())
    return (signed + b"." + part(hmac.new(secret.encode(), signed, hashlib.sha256).digest())).decode()


async def until(what, condition, deadline=DEADLINE):
    """Waits for a condition to give something true, and gives it back."""
    end = time.monotonic() + deadline
    while not (got := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {deadline} s")
        await asyncio.sleep(0.005)
    return got


class Relay:
    """Passes connections on to an address. All can be cut at once, and new ones are refused until it is opened again."""

    def __init__(self, target):
        self.target, self.refusing, self.writers, self.tasks = target, False, set(), set()

    async def start(self):
        self.server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = "127.0.0.1:{}".format(self.server.sockets[0].getsockname()[1])
        return self

    async def _accept(self, reader, writer):
        task = asyncio.current_task()
        self.tasks.add(task)
        try:
            await self._pass(reader, writer)
        finally:
            self.tasks.discard(task)

    async def _pass(self, reader, writer):
        if self.refusing:
            writer.transport.abort()
            return
        host, port = self.target.split(":")
        try:
            outer_reader, outer_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.transport.abort()
            return
        both = (writer, outer_writer)
        self.writers.update(both)
        if self.refusing:  # cut while it connected
            self.cut()
        await asyncio.gather(self._copy(reader, outer_writer, both), self._copy(outer_reader, writer, both))

    async def _copy(self, reader, writer, both):
        try:
            while some := await reader.read(65536):
                writer.write(some)
                await writer.drain()
        except OSError:
            pass  # closed by one of its ends
        for one in both:
            one.transport.abort()
            self.writers.discard(one)

    def cut(self):
        """Ends all connections without a close frame."""
        self.refusing = True
        for writer in list(self.writers):
            writer.transport.abort()

    def open(self, target=None):
        self.target, self.refusing = target or self.target, False

    async def close(self):
        self.cut()
        self.server.close()
        await asyncio.gather(*self.tasks)
