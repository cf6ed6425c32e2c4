// The driver of the SDK in sdk/js. See README.md for the protocol.
//
//     node --experimental-websocket sdk.mjs [--break FAULT]
//
// FAULT spoils what it does, to show that the checker can fail: drop, repeat, reorder, newid, ack, swap, reset, state,
// token. The flag of Node is needed for version 20 only.

import { createInterface } from "node:readline";

import { Natter, NatterError } from "../../../sdk/js/natter.js";

const CAN = ["asks_again", "changes", "edges", "leave", "ordered", "read", "rooms"];
/** Which message is spoiled. */
const SPOILED = 3;

const fault = process.argv[2] === "--break" ? process.argv[3] : undefined;
const print = (line) => process.stdout.write(`${JSON.stringify(line)}\n`);

/** @type {Natter} */ let client;
let answer = () => {};
let heard = 0;
let sent = 0;
let held = null; // a message that is told too late
let swapped = null; // one that is written too late
const followed = new Set();

function tell(line) {
  if (fault === "reset" && line.event === "reset") return;
  if (line.event === "message") {
    heard += 1;
    if (fault === "drop" && heard === SPOILED) return;
    if (fault === "repeat" && heard === SPOILED) print(line);
    if (fault === "reorder" && heard === SPOILED) {
      held = line;
      return;
    }
  }
  // In one write: the runner must not have answered in between.
  if (fault === "token" && line.event === "token?") process.stdout.write(`${JSON.stringify(line)}\n`.repeat(2));
  else print(line);
  if (line.event === "message" && held) {
    print(held);
    held = null;
  }
  if (fault === "state" && line.event === "state" && line.name === "online") print(line);
}

function askToken({ reason }) {
  tell({ event: "token?", reason });
  return new Promise((resolve) => (answer = resolve));
}

/** @param {string} name */
function roomOf(name) {
  const room = client.room(name);
  if (followed.has(name)) return room;
  followed.add(name);
  room.on("joined", ({ cursor, reset }) => tell({ event: "joined", room: name, cursor, reset }));
  room.on("reset", ({ reason }) => tell({ event: "reset", room: name, reason }));
  room.on("message", ({ id, from, cursor, body, kind, target }) =>
    tell({ event: "message", room: name, id, from, cursor, body, kind, target }));
  room.on("state", (state) => {
    if (state.name === "out") tell({ event: "out", room: name, code: state.code });
    if (state.name === "idle") tell({ event: "left", room: name });
  });
  return room;
}

/** Tells what becomes of a handle of the outbox. */
function settle(room, id, handle) {
  handle.done.then(
    ({ cursor, dup }) => tell({ event: "acked", room, id, as: handle.id, cursor, dup }),
    (error) => tell({ event: "failed", room, id, as: handle.id, code: error instanceof NatterError ? error.code : String(error) }),
  );
}

const OPS = {
  connect({ urls }) {
    client = new Natter({ url: urls, getToken: askToken });
    client.on("state", ({ name, reason }) => tell({ event: "state", name, reason }));
    client.connect();
  },
  token({ token }) {
    answer(token);
  },
  join({ room, since }) {
    roomOf(room).join({ since }).catch(() => {}); // the state of the room says it
  },
  leave({ room }) {
    roomOf(room).leave();
  },
  send({ room, id, body }) {
    sent += 1;
    if (fault === "ack" && sent === SPOILED) {
      tell({ event: "acked", room, id });
      return;
    }
    if (fault === "swap" && sent === SPOILED) {
      swapped = { op: "send", room, id, body };
      return;
    }
    // As a client does that takes a new id for each try.
    if (fault === "newid" && sent === SPOILED) roomOf(room).send(body, { id: `${id}-again` });
    settle(room, id, roomOf(room).send(body, { id }));
    if (swapped) {
      const { op, ...fields } = swapped;
      swapped = null;
      OPS[op](fields);
    }
  },
  edit({ room, id, target, body }) {
    settle(room, id, roomOf(room).edit(target, body));
  },
  delete({ room, id, target }) {
    settle(room, id, roomOf(room).delete(target));
  },
  react({ room, id, target, key }) {
    settle(room, id, roomOf(room).react(target, key));
  },
  read({ room, cursor }) {
    roomOf(room).read(cursor);
  },
  close() {
    client.close();
  },
};

print({ hello: 1, name: "@natter/client", can: CAN });
for await (const text of createInterface({ input: process.stdin })) {
  const { op, ...fields } = JSON.parse(text);
  if (!OPS[op]) throw new Error(`an operation that this driver does not know: ${op}`);
  OPS[op](fields);
}
client?.close();
process.exit(0);
