#!/usr/bin/env python3
"""Follows the documents literally: runs the command blocks of README.md and docs/: run.py NATTER [PAGE...]

Every block with the fence language `sh` or `console` says on the line before the fence what is done with it; a block that
doesn't is a failure:

    <!-- run -->                         it is run, and must exit with 0
    <!-- run: starts up -->              it starts a `natter up`, which must become ready and runs until the end of the page
    <!-- run: with up -->                the same as `run`, beside the `natter up` of the page (or one that is started for it)
    <!-- run: with up, for 3 s -->       it does not end by itself: must run for so long, and is then interrupted
    <!-- run: with up, needs nats -->    only where there is a program of this name; listed as not run elsewhere
    <!-- not run: REASON -->             it is listed with the reason

In a `console` block the commands are the lines that begin with `$ `. Blocks run with `bash -e -o pipefail`, in a copy of the
repository without what was built or fetched, as in a clean clone; each page begins without data.

What differs from what a reader does, so that it needs no ports of its own and builds nothing:

- `natter`, `target/release/natter` and `cargo run --release --` are the given program.
- `natter up` takes free ports and prints JSON (`--port 0 --nats-port 0 --mongodb-port 0 --json`). The documented addresses
  (127.0.0.1:8080, :4222, :8090) are replaced in the blocks by those of that `up`; `tail`, `send` and `history export` get
  its `--url`, and other commands its servers by NATTER__NATS__URL and NATTER__MONGODB__URL. `natter edge` takes a free port.
  The nats CLI gets its server by NATS_URL.
- nats-server and mongod of `.natter/bin` are used where they were fetched before.
- `$TOKEN` is the token that this `up` prints. curl fails on HTTP errors (`fail-with-body` in its configuration).

Python 3 with its standard library; bash and curl. Prints the blocks that are not run, and `N passed, N failed` last.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
LANGUAGES = {"sh", "bash", "shell", "console"}
MARK = re.compile(r"<!-- (not run|run)(?:: (.+))? -->")
BLOCK_SECONDS = 120
READY_SECONDS = 180
STOP_SECONDS = 60

# `natter` on the PATH of the blocks.
NATTER = """#!/bin/sh
command=$1
case $command in
    up) shift; exec {natter} up --port 0 --nats-port 0 --mongodb-port 0 --json "$@" ;;
    tail | send) shift; exec {natter} "$command" --url "$NATTER_DOCS_URL" "$@" ;;
    edge) export NATTER__EDGE__LISTEN=127.0.0.1:0 ;;
    history) if [ "$2" = export ]; then shift 2; exec {natter} history export --url "$NATTER_DOCS_URL" "$@"; fi ;;
esac
exec {natter} "$@"
"""

# `cargo` on the PATH of the blocks.
CARGO = """#!/bin/sh
if [ "$1 $2 $3" = "run --release --" ]; then shift 3; exec natter "$@"; fi
echo "cargo $*: the documents' blocks build nothing here" >&2
exit 1
"""


class Block:
    """One block of commands, and what its page says is to be done with it."""

    def __init__(self, page, line, language, text, mark):
        self.page, self.name = page, f"{page}:{line}"
        self.run, self.reason, self.up, self.starts, self.seconds = None, None, False, False, None
        self.commands = commands_of(text) if language == "console" else text
        found = MARK.fullmatch(mark.strip())
        what = found and found[2] or ""
        if found and found[1] == "not run" and what:
            self.run, self.reason = False, what
        elif found and found[1] == "run":
            wanted = re.fullmatch(r"(?:(starts|with) up)?(?:,? ?needs (\w+))?(?:,? ?for (\d+) s)?", what)
            if wanted:
                self.run, self.up, self.starts = True, wanted[1] == "with", wanted[1] == "starts"
                self.seconds = int(wanted[3]) if wanted[3] else None
            if wanted and wanted[2] and not shutil.which(wanted[2]):
                self.run, self.reason = False, f"needs {wanted[2]}, which is not here"


def commands_of(text):
    """The commands of a block that shows their output too."""
    commands, goes_on = [], False
    for line in text.splitlines():
        if line.startswith("$ ") or goes_on:
            commands.append(line if goes_on else line[2:])
            goes_on = line.endswith("\\")
    return "\n".join(commands) + "\n"


def blocks_of(path):
    """The blocks of a page, in their order."""
    page, found, fence = path.relative_to(ROOT), [], None
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        if fence is None and line.strip().startswith("```"):
            fence = (number, line.strip()[3:].strip())
        elif fence is not None and line.strip() == "```":
            start, language = fence
            if language in LANGUAGES:
                text = "\n".join(lines[start + 1 : number]) + "\n"
                mark = lines[start - 1] if start else ""
                found.append(Block(page, start + 1, language, text, mark))
            fence = None
    return found


class Up:
    """A running `natter up`, or none (`up` is None)."""

    def __init__(self, runner):
        self.runner, self.process, self.up = runner, None, None

    def start(self, commands):
        """Starts it by a block; what went wrong, or None."""
        out, log = self.runner.scratch / "up.json", self.runner.scratch / "up.log"
        with open(out, "w") as stdout, open(log, "w") as stderr:
            self.process = self.runner.popen(commands, self.runner.env, stdout=stdout, stderr=stderr)
        deadline = time.monotonic() + READY_SECONDS
        while not out.read_text().endswith("\n"):
            if self.process.poll() is not None or time.monotonic() > deadline:
                return f"natter up is not ready: {log.read_text()}"
            time.sleep(0.1)
        self.up = json.loads(out.read_text().splitlines()[0])
        return None

    def env(self):
        """What the other blocks of the page are given."""
        region = self.up["regions"][0]
        env = {
            "TOKEN": self.up["token"],
            "NATTER_DOCS_URL": region["edges"][0]["ws"],
            "NATTER__NATS__URL": region["nats"],
            "NATS_URL": region["nats"],
        }
        if self.up["mongodb"]:
            env["NATTER__MONGODB__URL"] = self.up["mongodb"]
        return env

    def addressed(self, commands):
        """Commands with the addresses of this `up`."""
        region = self.up["regions"][0]
        places = {"127.0.0.1:8080": region["edges"][0]["http"], "127.0.0.1:4222": region["nats"]}
        if region["history"]:
            places["127.0.0.1:8090"] = region["history"][0]["http"]
        for documented, own in places.items():
            commands = commands.replace(documented, own.split("//")[1].split("/")[0])
        return commands

    def stop(self):
        """Ends it, and whatever it has left; what went wrong, or None."""
        if self.process is None:
            return None
        trouble = None
        if self.up:
            try:
                os.kill(self.up["pid"], signal.SIGTERM)
                self.process.wait(STOP_SECONDS)
                if self.process.returncode:
                    trouble = f"natter up ended with {self.process.returncode}"
            except (subprocess.TimeoutExpired, ProcessLookupError) as error:
                trouble = f"natter up did not end: {error}"
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process = self.up = None
        return trouble


class Runner:
    """Runs blocks in a copy of the repository."""

    def __init__(self, natter, scratch):
        self.scratch, self.clone = scratch, scratch / "clone"
        shutil.copytree(ROOT, self.clone, ignore=shutil.ignore_patterns("target", ".natter", ".git", "__pycache__"))
        for folder in ("bin", "home", "clone/target/release"):
            (scratch / folder).mkdir(parents=True)
        program(scratch / "bin/natter", NATTER.format(natter=natter))
        program(scratch / "bin/cargo", CARGO)
        (self.clone / "target/release/natter").symlink_to(scratch / "bin/natter")
        (scratch / "home/.curlrc").write_text("fail-with-body\nsilent\nshow-error\nmax-time = 60\n")
        self.env = {"PATH": f"{scratch}/bin:{os.environ['PATH']}", "HOME": f"{scratch}/home"}
        for name in ("nats-server", "mongod"):
            fetched = ROOT / ".natter/bin" / name
            if fetched.exists():
                self.env[f"NATTER__SERVERS__{name.upper().replace('-', '_')}"] = str(fetched.resolve())

    def popen(self, commands, env, **more):
        """A block as a process with a group of its own."""
        shell = ["bash", "-e", "-o", "pipefail", "-c", commands]
        return subprocess.Popen(
            shell, cwd=self.clone, env=env, stdin=subprocess.DEVNULL, text=True, start_new_session=True, **more
        )

    def block(self, commands, env, seconds):
        """Runs a block; what went wrong, or None."""
        process = self.popen(commands, self.env | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            said, _ = process.communicate(timeout=seconds or BLOCK_SECONDS)
            if process.returncode:
                return f"exit code {process.returncode}: {said}"
            return f"ended by itself before {seconds} s: {said}" if seconds else None
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT if seconds else signal.SIGKILL)
        try:
            process.communicate(timeout=10)
            return None if seconds else f"not done after {BLOCK_SECONDS} s"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return "did not end when it was interrupted"

    def page(self, blocks):
        """Runs the blocks of a page; (name, what went wrong or None) of each, and of the end of an `up`."""
        up = Up(self)
        try:
            for block in blocks:
                if block.run is None:
                    yield block.name, "the line before the fence does not say whether it is run (see tests/docs/run.py)"
                elif block.starts:
                    trouble = "a page starts one natter up" if up.process else up.start(block.commands)
                    yield block.name, trouble
                elif block.run and block.up:
                    trouble = None if up.up else up.start("natter up")
                    env = up.env() if up.up else {}
                    yield block.name, trouble or self.block(up.addressed(block.commands), env, block.seconds)
                elif block.run:
                    yield block.name, self.block(block.commands, {}, block.seconds)
        finally:
            began, trouble = up.process is not None, up.stop()
            shutil.rmtree(self.clone / ".natter", ignore_errors=True)
        if began:
            yield f"{blocks[0].page}: the end of natter up", trouble


def program(path, text):
    path.write_text(text)
    path.chmod(0o755)


def main():
    natter = str(pathlib.Path(shutil.which(sys.argv[1]) or sys.argv[1]).resolve())
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if sys.argv[2:]:
        pages = [pathlib.Path(page).resolve() for page in sys.argv[2:]]
    passed, failed, not_run = 0, 0, []
    with tempfile.TemporaryDirectory(prefix="natter-docs-") as scratch:
        runner = Runner(natter, pathlib.Path(scratch))
        for path in pages:
            blocks = blocks_of(path)
            not_run += [block for block in blocks if block.run is False]
            for name, trouble in runner.page(blocks):
                if trouble is None:
                    passed += 1
                    print(f"ok: {name}", flush=True)
                else:
                    failed += 1
                    print(f"FAILED: {name}: {trouble}", flush=True)
    print(f"not run: {len(not_run)}")
    for block in not_run:
        print(f"  {block.name}: {block.reason}")
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
