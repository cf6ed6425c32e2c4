// What a client has to bear. Each scenario drives one or more clients and waits for what must happen; whether all that was told
// is right is judged by checker.mjs, after each of them.

import assert from "node:assert/strict";

import { jwt, nowSeconds, until } from "../support.mjs";
import { HALF_OPEN, OTHER, PATIENCE, SAFE } from "./runner.mjs";

const BURST = 2_000;
const OWN_BURST = 300;
const SOAK_MS = 30_000;
const ROUND_MS = 1_500;
const SLOW_MESSAGES = 500;
const SLOW_BYTES = 32_000;
/** Seconds that a short-lived token lives. */
const SHORT = 9;

/** @type {{name: string, needs: string[], isLong: boolean, kills: boolean, deed: (t: import("./runner.mjs").Test) => Promise<void>}[]} */
export const SCENARIOS = [];

/** `long`: takes long, so it begins early. `kills`: kills the edge `OTHER`; only such a scenario has clients there. */
function scenario(name, deed, { needs = [], long = false, kills = false } = {}) {
  SCENARIOS.push({ name, deed, needs, isLong: long, kills });
}

// Being there -------------------------------------------------------------------------------------------------------------

scenario("connects, joins, is told messages and writes some", async (t) => {
  const { room, client } = await t.joined();
  await client.got(room, await t.says(room, 5));
  await client.acked(room, client.send(room, { text: "안녕, \"quoted\" 👍\n" }), client.send(room, null), client.send(room, [1, { a: false }]));
  assert.deepEqual(client.states.map(({ name }) => name).filter((name) => name !== "connecting"), ["online"]);
});

scenario("joins where it is told to", async (t) => {
  const room = await t.room();
  await t.says(room, 3);
  const { cursor } = t.witness.pushes.filter((push) => push.room === room).at(-1);
  await t.says(room, 20);
  const client = await t.client();
  client.connect((await t.wire()).url);
  await client.join(room, cursor);
  await client.got(room, await t.says(room));
  assert.equal([...client.messages.values()].filter(({ room: other }) => other === room).length, 21);
});

scenario("joins that are asked for twice are one", async (t) => {
  const { room, client } = await t.joined();
  for (let round = 0; round < 3; round += 1) {
    client.op("join", { room });
    client.op("join", { room });
    await client.got(room, await t.says(room, 3));
  }
});

scenario("is in several rooms with one connection", async (t) => {
  const { room, wire, client } = await t.joined();
  const rooms = [room, await t.room(), await t.room()];
  for (const other of rooms.slice(1)) await client.join(other);
  assert.equal(wire.count, 1);
  for (const each of rooms) await t.says(each, 10);
  wire.cut();
  for (const each of rooms) await t.says(each, 10);
  for (const each of rooms) client.send(each);
  wire.open();
  for (const each of rooms) await client.got(each, await t.says(each));
}, { needs: ["rooms"] });

scenario("leaves a room, and is told no more of it", async (t) => {
  const { room, client } = await t.joined();
  await client.got(room, await t.says(room, 3));
  client.op("leave", { room });
  await client.event("left", ({ event, room: other }) => event === "left" && other === room);
  await t.says(room, 3);
  const other = await t.room();
  await client.join(other);
  await client.got(other, await t.says(other));
  await client.join(room);
  await client.got(room, await t.says(room, 3));
}, { needs: ["leave", "rooms"] });

scenario("is told that a room is refused", async (t) => {
  const user = t.name("user");
  const allowed = await t.room();
  const client = await t.client({ user, tokens: () => t.token(user, { rooms: allowed, can: ["read", "write"] }) });
  client.connect((await t.wire()).url);
  client.op("join", { room: "chat:forbidden" });
  const { code } = await client.event("out", ({ event, room }) => event === "out" && room === "chat:forbidden", { deadline: PATIENCE });
  assert.equal(code, "forbidden");
  if (!t.can.includes("rooms")) return;
  await client.join(allowed);
  client.op("send", { room: "chat:forbidden", id: "no", body: 1 });
  const failed = await client.event("failed", ({ event, id }) => event === "failed" && id === "no");
  assert.equal(failed.code, "forbidden");
  await client.got(allowed, await t.says(allowed));
});

scenario("is told that it was taken out of a room, and does not come back to it", async (t) => {
  const { room, client } = await t.joined();
  await client.got(room, await t.says(room, 3));
  await t.http("DELETE", `rooms/${encodeURIComponent(room)}/sessions/${client.user}`);
  const { code } = await client.event("out", ({ event, room: other }) => event === "out" && other === room);
  assert.equal(code, "removed");
  await t.says(room, 3);
});

scenario("edits, reacts and deletes", async (t) => {
  const { room, client } = await t.joined();
  const id = client.send(room, { text: "first" });
  await client.acked(room, id);
  const target = `${client.user}/${id}`;
  await client.change("edit", room, { target, body: { text: "second" } });
  await client.change("react", room, { target, key: "👍" });
  await client.change("delete", room, { target });
  const kinds = t.witness.pushes.filter((push) => push.room === room).map(({ kind }) => kind);
  assert.deepEqual(kinds, [undefined, "edit", "reaction", "delete"]);
}, { needs: ["changes"] });

scenario("moves its read marker", async (t) => {
  const { room, client } = await t.joined();
  const last = await t.says(room, 3);
  const { cursor } = await client.got(room, last);
  client.op("read", { room, cursor });
  await until("the marker", async () => {
    const { readers } = await t.witness.call("readers", { room });
    return readers.some((reader) => reader.user === client.user && reader.cursor === cursor);
  });
}, { needs: ["read"] });

scenario(`is told a burst of ${BURST} messages, and writes ${OWN_BURST} meanwhile`, async (t) => {
  const { room, client } = await t.joined();
  const ids = Array.from({ length: OWN_BURST }, () => client.send(room));
  const last = await t.says(room, BURST);
  await client.acked(room, ...ids);
  await client.got(room, last);
});

scenario("closes", async (t) => {
  const { room, wire, client } = await t.joined();
  await client.got(room, await t.says(room));
  client.op("close");
  await client.until("closed", () => client.state === "closed");
  await until("the end of the connection", () => wire.count === 0);
  neverAgain(t, wire);
});

// The network -------------------------------------------------------------------------------------------------------------

scenario("goes on after a cut, with what was said meanwhile", async (t) => {
  const { room, wire, client } = await t.joined();
  for (let round = 0; round < 3; round += 1) {
    await client.got(room, await t.says(room, 3));
    wire.cut();
    await client.until("offline", () => client.state !== "online");
    await t.says(room, 20);
    wire.open();
    await client.got(room, await t.says(room, 3));
  }
});

scenario("goes on after a cut in the middle of a burst", async (t) => {
  const { room, wire, client } = await t.joined();
  wire.slow(2);
  const burst = t.says(room, 500);
  await client.until("some messages", () => client.messages.size > 20);
  wire.cut();
  wire.open();
  await client.got(room, await burst);
});

scenario("writes during an outage, once", async (t) => {
  const { room, wire, client } = await t.joined();
  wire.cut();
  await client.until("offline", () => client.state !== "online");
  const ids = [client.send(room), client.send(room), client.send(room)];
  wire.open();
  await client.acked(room, ...ids);
});

scenario("writes once where the acknowledgement is lost", async (t) => {
  const { room, wire, client } = await t.joined();
  for (let round = 0; round < 3; round += 1) {
    wire.mute();
    const id = client.send(room);
    await t.seen(room, id);
    wire.cut();
    wire.open();
    await client.acked(room, id);
  }
});

scenario("writes once where the connection freezes, and the acknowledgement with it", async (t) => {
  const { room, wire, client } = await t.joined();
  wire.mute();
  const ids = [client.send(room), client.send(room)];
  await t.seen(room, ids[0]);
  await client.until("the first acknowledgement", () => client.settled.has(`${room} ${ids[0]}`), HALF_OPEN);
  await client.acked(room, ...ids);
}, { long: true });

scenario("notices a connection that is half open", async (t) => {
  const { room, wire, client } = await t.joined();
  await client.got(room, await t.says(room));
  wire.freeze();
  const began = Date.now();
  const last = await t.says(room, 3);
  await client.got(room, last, HALF_OPEN);
  assert.ok(Date.now() - began <= HALF_OPEN);
}, { long: true });

scenario("notices a half-open connection as soon as its heart-beat says", async (t) => {
  const room = await t.room();
  const wire = await t.wire();
  const client = await t.client();
  client.connect(wire.url, { heartbeat_ms: 2_000 });
  await client.join(room);
  await client.got(room, await t.says(room));
  wire.freeze();
  await client.got(room, await t.says(room, 3));
}, { needs: ["heartbeat"] });

scenario("bears a slow network", async (t) => {
  const { room, wire, client } = await t.joined();
  wire.slow(150);
  const ids = [client.send(room), client.send(room)];
  await client.got(room, await t.says(room, 50));
  await client.acked(room, ...ids);
  wire.cut();
  wire.open();
  await client.got(room, await t.says(room, 50));
});

// Edges -------------------------------------------------------------------------------------------------------------------

scenario("goes on after its edge was killed", async (t) => {
  const { room, client } = await t.joined({ edge: OTHER });
  await client.got(room, await t.says(room, 3));
  const killed = t.killEdge(OTHER);
  await client.until("offline", () => client.state !== "online");
  const ids = [client.send(room), client.send(room)];
  await t.says(room, 10);
  await killed;
  await client.acked(room, ...ids);
}, { kills: true });

scenario("goes to another edge where its own was killed", async (t) => {
  const { room, client, second } = await onTwo(t);
  const killed = t.killEdge(OTHER);
  second.open();
  await client.acked(room, client.send(room));
  await client.got(room, await t.says(room, 10));
  await killed;
}, { needs: ["edges"], kills: true });

scenario("goes to another edge where its own drains", async (t) => {
  const { room, client, second } = await onTwo(t);
  second.open();
  const drained = t.killEdge(OTHER, "SIGTERM");
  const ids = [];
  // Some are on their way while it drains.
  await client.until("the other edge", () => {
    if (ids.length < 200) ids.push(client.send(room));
    return second.count === 1;
  });
  await client.acked(room, ...ids);
  await client.got(room, await t.says(room, 10));
  await drained;
}, { needs: ["edges"], kills: true });

/** A client that is on the edge that may be killed, and knows the other one, which can't be reached yet. */
async function onTwo(t) {
  const room = await t.room();
  const [first, second] = [await t.wire(OTHER), await t.wire(SAFE)];
  second.cut();
  const client = await t.client();
  client.connect([first.url, second.url]);
  await client.join(room);
  await client.got(room, await t.says(room, 3));
  assert.equal(first.count, 1);
  return { room, client, first, second };
}

scenario("comes back where it was too slow", async (t) => {
  const { room, wire, client } = await t.joined();
  const closed = async () => {
    const response = await fetch(`http://${t.up.address(SAFE)}/metrics`);
    const [, count] = (await response.text()).match(/^natter_session_closed_total\{[^}]*too_slow[^}]*\} (\d+)/m) ?? [];
    return Number(count ?? 0);
  };
  const before = await closed();
  wire.stall();
  const body = "x".repeat(SLOW_BYTES);
  const last = await t.says(room, SLOW_MESSAGES, (n) => ({ n, body }), 4);
  await until("the end of the session", async () => (await closed()) > before, { deadline: PATIENCE });
  wire.unstall();
  await client.got(room, last);
});

// Cursors -----------------------------------------------------------------------------------------------------------------

scenario("says that a cursor of another log is no use", async (t) => {
  const room = await t.room();
  await t.says(room, 3);
  const { cursor } = t.witness.pushes.filter((push) => push.room === room).at(-1);
  const [region, epoch, seq, print] = cursor.split(".");
  const client = await t.client();
  client.connect((await t.wire()).url);
  await client.join(room, [region, [...epoch].reverse().join(""), seq, print].join("."));
  await client.event("a reset", ({ event, reason }) => event === "reset" && reason === "epoch");
  await client.got(room, await t.says(room, 3));
});

scenario("says that a cursor is from the future", async (t) => {
  const room = await t.room();
  await t.says(room, 3);
  const { cursor } = t.witness.pushes.filter((push) => push.room === room).at(-1);
  const [region, epoch, , print] = cursor.split(".");
  const client = await t.client();
  client.connect((await t.wire()).url);
  await client.join(room, [region, epoch, "900000000", print].join("."));
  const { reason } = await client.event("a reset", ({ event }) => event === "reset");
  assert.ok(["future", "epoch"].includes(reason), reason);
  await client.got(room, await t.says(room, 3));
});

scenario("says that a cursor can't be read", async (t) => {
  const room = await t.room();
  const client = await t.client();
  client.connect((await t.wire()).url);
  client.op("join", { room, since: "no cursor" });
  const told = ({ event, reason, code }) => (event === "reset" || event === "out") && (reason ?? code) === "bad_cursor";
  await client.event("a reset, or a refusal", told, { deadline: PATIENCE });
});

// Tokens ------------------------------------------------------------------------------------------------------------------

scenario("renews its token before it ends", async (t) => {
  const user = t.name("user");
  const end = nowSeconds() + SHORT;
  const { room, client } = await t.joined({ user, tokens: (asked) => t.token(user, asked === 1 ? { ttl: SHORT } : {}) });
  await client.until("another token", () => client.asked >= 2);
  await until("the end of the first token", () => nowSeconds() > end + 1);
  await client.got(room, await t.says(room));
  await client.acked(room, client.send(room));
  assert.equal(client.asked, 2);
  assert.ok(client.states.every(({ name }) => name === "connecting" || name === "online"), JSON.stringify(client.states));
}, { long: true });

scenario("waits for a token that comes late, and asks once at a time", async (t) => {
  const user = t.name("user");
  let give;
  const late = new Promise((resolve) => (give = resolve));
  const tokens = async (asked) => {
    if (asked === 2) await late;
    return t.token(user, asked === 1 ? { ttl: SHORT } : {});
  };
  const room = await t.room();
  const wire = await t.wire();
  const client = await t.client({ user, tokens });
  client.connect(wire.url);
  // A client that does nothing else while it waits is not in the room before it has the other token.
  client.op("join", { room });
  await client.until("another token is asked for", () => client.asked === 2);
  await until("the end of the session", () => wire.count === 0, { deadline: PATIENCE });
  await t.says(room, 5);
  give();
  await client.event("joined", ({ event }) => event === "joined", { deadline: PATIENCE });
  await client.until("online", () => client.state === "online", PATIENCE);
  await client.got(room, await t.says(room));
}, { long: true });

scenario("asks for another token where one is refused", async (t) => {
  const user = t.name("user");
  const bad = jwt({ sub: user, exp: nowSeconds() + 3_600 }, "not the secret");
  const { room, client } = await t.joined({ user, tokens: (asked) => (asked === 1 ? bad : t.token(user)) });
  assert.equal(client.asked, 2);
  await client.got(room, await t.says(room));
}, { needs: ["asks_again"] });

scenario("stops where there is no token", async (t) => {
  const wire = await t.wire();
  const client = await t.client({ tokens: () => null });
  client.connect(wire.url);
  client.op("join", { room: t.name("chat:none") });
  await client.until("closed", () => client.state === "closed");
  assert.equal(wire.accepted, 0);
  neverAgain(t, wire);
});

scenario("stops for good where its user is revoked", async (t) => {
  const { room, wire, client } = await t.joined();
  await client.got(room, await t.says(room));
  await t.up.run("revoke", "--user", client.user, "--block");
  await client.until("closed", () => client.state === "closed");
  neverAgain(t, wire);
});

scenario("stops for good where a back end ends its session", async (t) => {
  const { room, wire, client } = await t.joined();
  await client.got(room, await t.says(room));
  await t.http("DELETE", `users/${client.user}/sessions`);
  await client.until("closed", () => client.state === "closed");
  neverAgain(t, wire);
});

/** From now on nobody may connect over this wire. It is looked at after all scenarios, with the driver left running. */
function neverAgain(t, wire) {
  const { accepted } = wire;
  t.later.push(() => assert.equal(wire.accepted, accepted, "connections of a client that had stopped"));
}

// By chance ---------------------------------------------------------------------------------------------------------------

scenario("bears faults by chance, two clients at once", async (t) => {
  const { random } = t;
  const chance = (share) => random() < share;
  const pick = (list) => list[Math.floor(random() * list.length)];
  const between = (low, high) => low + Math.floor(random() * (high - low));
  const room = await t.room();
  const both = [];
  for (const edge of [OTHER, SAFE]) {
    const wire = await t.wire(edge);
    const client = await t.client();
    client.connect(wire.url);
    await client.join(room);
    both.push({ client, wire, ids: [] });
  }
  let killed = Promise.resolve();
  let isDown = false;
  // A round has something to be said, and faults, in an order and number that the seed gives; the next one begins when
  // everybody has what was said in it, or after a while.
  const faults = {
    none: () => {},
    cut: ({ wire }) => wire.cut(),
    blink: ({ wire }) => {
      wire.cut();
      wire.open();
    },
    freeze: ({ wire }) => wire.freeze(),
    mute: ({ wire }) => wire.mute(),
    slow: ({ wire }) => wire.slow(between(1, 40)),
    move: ({ wire }) => {
      wire.cut();
      wire.open(t.up.address(pick([OTHER, SAFE])));
    },
    kill: () => {
      if (isDown) return;
      isDown = true;
      killed = t.killEdge(OTHER, chance(0.3) ? "SIGTERM" : "SIGKILL").finally(() => (isDown = false));
      killed.catch(() => {}); // awaited at the end
    },
  };
  const end = Date.now() + SOAK_MS;
  while (Date.now() < end) {
    for (let deed = between(2, 8); deed > 0; deed -= 1) {
      const one = pick(both);
      const what = pick(["fault", "says", "sends", "sends"]);
      if (what === "fault") faults[pick(Object.keys(faults))](one);
      else if (what === "says") await t.says(room, between(1, 30));
      else for (let count = between(1, 10); count > 0; count -= 1) one.ids.push(one.client.send(room));
    }
    const last = await t.says(room);
    const heal = chance(0.6);
    if (heal) {
      for (const { wire } of both) {
        wire.thaw();
        wire.slow(0);
        if (wire.refusing) wire.open();
      }
    }
    // What a muted connection has lost can only come over the next one.
    const until = Date.now() + ROUND_MS;
    const hasAll = () => both.every(({ client }) => client.messages.has(`${room} ${last}`)) || Date.now() > until;
    await both[0].client.until("the end of a round", hasAll);
  }
  for (const { wire } of both) {
    wire.slow(0);
    wire.cut();
    wire.open();
  }
  await killed;
  for (const { client, ids } of both) if (ids.length) await client.acked(room, ...ids);
}, { kills: true });
