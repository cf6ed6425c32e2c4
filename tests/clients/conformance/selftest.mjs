// Shows that the checker can fail: runs a driver that spoils what it does, each time in another way, and looks whether the
// checker finds that; and gives the checker small logs by hand.
//
//     node selftest.mjs NATTER
//
// Its last line is `N passed, N failed`; it exits with 0 or 1.

import assert from "node:assert/strict";
import path from "node:path";

import { Results, Up } from "../support.mjs";
import { RULES, check } from "./checker.mjs";
import { Faults, hello } from "./runner.mjs";
import { CONFIG, runScenario } from "./run.mjs";

/** What `sdk.mjs --break` does, and the rule that must see it. */
const BROKEN = {
  drop: "missing",
  repeat: "repeated",
  reorder: "order",
  newid: "id",
  ack: "unstored",
  swap: "sequence",
  state: "state",
  token: "token",
  reset: "cursor",
};
const DRIVER = [process.execPath, "--experimental-websocket", path.join(import.meta.dirname, "sdk.mjs")];

/** A bit of everything. */
async function everything(t) {
  const { room, wire, client } = await t.joined();
  const last = await t.says(room, 6);
  for (let n = 0; n < 6; n += 1) client.send(room);
  wire.cut();
  await t.says(room, 6);
  wire.open();
  await client.got(room, await t.says(room, 6));
  // Somewhere else, of which it is told that the cursor is of no use there.
  const other = await t.room();
  await t.says(other, 3);
  await client.join(other, t.witness.pushes.find(({ id }) => last.endsWith(`/${id}`)).cursor.replace(/\.[^.]*\./, ".nowhere."));
  await client.got(other, await t.says(other));
}

const SCENARIO = { name: "everything", needs: [], deed: everything };

// Logs by hand ------------------------------------------------------------------------------------------------------------

const ROOM = "chat:a";
const message = (n, more) => ({ room: ROOM, from: "w", id: `m${n}`, cursor: `r.e.${n}.0`, body: n, ...more });
const told = (n, more) => ({ event: "message", ...message(n), ...more });
const joined = (n, more) => ({ event: "joined", room: ROOM, cursor: `r.e.${n}.0`, ...more });

/** The rules that are broken where a room has these messages, and a client was asked for and has told this. */
function rulesOf(stored, ops, lines) {
  const log = [{ who: "runner", what: "client", client: "c", user: "u", can: ["ordered"] }];
  for (const op of [{ op: "connect" }, { op: "join", room: ROOM }, ...ops]) log.push({ who: "runner", what: "op", client: "c", op });
  log.push({ who: "client", client: "c", line: { event: "state", name: "online" } });
  for (const line of lines) log.push({ who: "client", client: "c", line });
  log.push({ who: "runner", what: "log", room: ROOM, messages: stored });
  return [...new Set(check(log).map(({ rule }) => rule))];
}

const three = [1, 2, 3].map((n) => message(n));
const own = (n, id) => message(n, { from: "u", id });
const send = (id, n) => ({ op: "send", room: ROOM, id, body: n });
const acked = (id, n) => ({ event: "acked", room: ROOM, id, cursor: `r.e.${n}.0` });

/** Name: what is stored, asked for, told; the rules that are broken. */
const LOGS = {
  "all is well": [three, [], [joined(1), told(2), told(3)], []],
  "nothing is told": [three, [], [joined(1)], ["missing"]],
  "the end is missing": [three, [], [joined(0), told(1), told(2)], ["missing"]],
  "a gap": [three, [], [joined(0), told(1), told(3)], ["missing"]],
  "a gap over a reconnect": [three, [], [joined(0), told(1), joined(2), told(3)], ["missing"]],
  "a gap that a reset tells": [three, [], [joined(0), told(1), { event: "reset", room: ROOM }, joined(2), told(3)], []],
  "a gap after a reset": [three, [], [{ event: "reset", room: ROOM }, joined(0), told(1), told(3)], ["missing"]],
  "another place than was asked for": [three, [{ op: "join", room: ROOM, since: "r.e.1.0" }], [joined(2), told(3)], ["cursor"]],
  "the place that was asked for": [three, [{ op: "join", room: ROOM, since: "r.e.2.0" }], [joined(2), told(3)], []],
  "one twice": [three, [], [joined(1), told(2), told(2), told(3)], ["repeated"]],
  "one twice, over a reconnect": [three, [], [joined(1), told(2), joined(1), told(2), told(3)], ["cursor", "repeated"]],
  "from before the join": [three, [], [joined(2), told(2), told(3)], ["early"]],
  "another order": [three, [], [joined(0), told(1), told(3), told(2)], ["cursor", "order"]],
  "another body": [three, [], [joined(2), told(3, { body: "3" })], ["content"]],
  "one that is not there": [three, [], [joined(2), told(3), told(4)], ["unknown"]],
  "after it has left": [three, [], [joined(1), told(2), { event: "left", room: ROOM }, told(3)], ["early"]],
  "no more after it has left": [three, [], [joined(1), told(2), { event: "left", room: ROOM }], []],
  "written": [[own(1, "a")], [send("a", 1)], [joined(1), acked("a", 1)], []],
  "acknowledged, not stored": [[], [send("a", 1)], [joined(0), acked("a", 1)], ["unstored"]],
  "stored twice": [[own(1, "a"), own(2, "a")], [send("a", 1)], [joined(2), acked("a", 1)], ["content", "twice"]],
  "stored under another id": [[own(1, "a"), own(2, "b")], [send("a", 1)], [joined(2), acked("a", 1)], ["id"]],
  "stored with another body": [[own(1, "a")], [send("a", "1")], [joined(1), acked("a", 1)], ["content"]],
  "never settled": [[own(1, "a")], [send("a", 1)], [joined(1)], ["unsettled"]],
  "acknowledged twice": [[own(1, "a")], [send("a", 1)], [joined(1), acked("a", 1), acked("a", 1)], ["ack"]],
  "acknowledged elsewhere": [[own(1, "a")], [send("a", 1)], [joined(1), acked("a", 2)], ["ack"]],
  "another order of one's own": [[own(1, "b"), own(2, "a")], [send("a", 2), send("b", 1)], [joined(2), acked("a", 2), acked("b", 1)], ["sequence"]],
  "told while offline": [three, [], [joined(1), { event: "state", name: "offline" }, told(2)], ["state"]],
  "online twice": [[], [], [joined(0), { event: "state", name: "online" }], ["state"]],
  "back after the end": [[], [], [{ event: "state", name: "closed" }, { event: "state", name: "connecting" }], ["state"]],
  "two tokens at once": [[], [], [{ event: "token?" }, { event: "token?" }], ["token"]],
  "what is no event": [[], [], [{ event: "mesage" }], ["protocol"]],
};

async function main() {
  const [binary] = process.argv.slice(2);
  if (!binary) {
    console.error("usage: node selftest.mjs NATTER");
    return 64;
  }
  const results = new Results();
  const seen = new Set();
  for (const [name, [stored, ops, lines, expected]] of Object.entries(LOGS)) {
    await results.run(`log: ${name}`, () => assert.deepEqual(rulesOf(stored, ops, lines).sort(), expected));
    for (const rule of expected) seen.add(rule);
  }
  await results.run("each rule has a log that breaks it", () => assert.deepEqual([...seen].sort(), Object.keys(RULES).sort()));

  const { can } = await hello(DRIVER);
  const up = await Up.start(binary, { config: CONFIG, edges: 2 });
  const run = (more) => runScenario(SCENARIO, { up, command: [...DRIVER, ...more], can, seed: 1 });
  try {
    await results.run("a driver that spoils nothing", () => run([]));
    const broken = Object.entries(BROKEN).map(([fault, rule]) =>
      results.run(`a driver that spoils: ${fault}`, async () => {
        const error = await run(["--break", fault]).then(() => null, (failure) => failure);
        assert.ok(error instanceof Faults, `nothing was found: ${error}`);
        const rules = error.faults.map((found) => found.rule);
        assert.ok(rules.includes(rule), `found ${rules}; not ${rule}`);
      }),
    );
    await Promise.all(broken);
  } finally {
    await up.stop();
  }
  return results.sum();
}

process.exit(await main());
