// SIMULATED: a socket and an edge that do what a test says. What is pure in the client (states, waits, order) is tested with them;
// everything else with a real natter in integration.test.mjs.

import { mock } from "node:test";

import { Natter } from "../natter.js";

/** Fake clocks for `setTimeout` and `Date`, and chance that is always one half. */
export function fakeTime(t) {
  mock.timers.enable({ apis: ["setTimeout", "Date"], now: 1_800_000_000_000 });
  const random = mock.method(Math, "random", () => 0.5);
  t.after(() => {
    mock.timers.reset();
    random.mock.restore();
  });
}

/** Lets promises that are settled go on. */
export async function settle() {
  for (let i = 0; i < 20; i += 1) await Promise.resolve();
}

/** Moves the fake clock, in steps, so that what waits for a promise in between goes on. */
export async function tick(ms, step = 50) {
  await settle();
  for (let left = ms; left > 0; left -= step) {
    mock.timers.tick(Math.min(left, step));
    await settle();
  }
}

/** A token as `claimsOf` reads it; nobody checks its signature here. */
export const tokenOf = (claims) => `e30.${Buffer.from(JSON.stringify(claims)).toString("base64url")}.c2ln`;

/** Makes a class of sockets that remembers what was done with each. */
export function fakeSockets() {
  const sockets = [];
  class FakeSocket {
    constructor(url, protocols) {
      Object.assign(this, { url, protocols, sent: [], closedWith: undefined });
      sockets.push(this);
    }

    send(text) {
      const frame = JSON.parse(text);
      this.sent.push(frame);
      this.answer?.(frame);
    }

    close(code) {
      this.closedWith = code;
    }

    // What the edge does:
    open() {
      this.onopen();
    }

    push(frame) {
      this.onmessage({ data: JSON.stringify(frame) });
    }

    end(code = 1006, reason = "") {
      this.onclose({ code, reason });
    }

    /** The commands of this name that were sent. */
    commands(op) {
      return this.sent.filter((frame) => frame.op === op);
    }

    reply(frame, fields) {
      this.push({ op: "ok", rid: frame.rid, ...fields });
    }
  }
  return { sockets, WebSocket: FakeSocket };
}

/** A client with fake sockets, and what belongs to it. `edge` answers commands: `{join: (frame) => fields}`. */
export function fakeClient(options = {}, edge = {}) {
  const { sockets, WebSocket } = fakeSockets();
  const client = new Natter({ url: "ws://edge.test", token: tokenOf({ sub: "kim" }), WebSocket, ...options });
  const states = [];
  client.on("state", (state) => states.push(state));
  const answers = { ping: () => ({ op: "pong" }), ...edge };
  const connected = async () => {
    await settle();
    const socket = sockets.at(-1);
    socket.answer = (frame) => {
      const fields = answers[frame.op]?.(frame, socket);
      if (fields) queueMicrotask(() => socket.push({ rid: frame.rid, ...fields }));
    };
    socket.open();
    await settle();
    return socket;
  };
  return { client, sockets, states, connected, answers, names: () => states.map(({ name }) => name) };
}

/** The answers of an edge with one room, a log of its own, and nothing else. */
export function fakeRoom(room, { epoch = "e1" } = {}) {
  const log = [];
  const cursor = (seq) => `r.${epoch}.${seq}.0`;
  return {
    log,
    cursor,
    head: () => cursor(log.length),
    /** Stores a message, and gives the push. */
    say(from, id, fields = {}) {
      const known = log.find((one) => one.from === from && one.id === id);
      if (known) return known;
      const message = { op: "msg", room, id, from, ts: 1_000 + log.length, ...fields };
      log.push(message);
      message.cursor = cursor(log.length);
      return message;
    },
    join(frame, socket) {
      const since = frame.since ? Number(frame.since.split(".")[2]) : log.length;
      const missed = log.slice(since);
      queueMicrotask(() => queueMicrotask(() => missed.forEach((message) => socket.push(message))));
      return { op: "joined", room, cursor: cursor(since), head: cursor(log.length), replay: missed.length };
    },
    send(frame, socket) {
      const { op: _op, rid: _rid, room: _room, id, ...fields } = frame;
      const before = log.length;
      const message = this.say("kim", id, fields);
      const dup = log.length === before;
      if (!dup) socket.push(message);
      return { op: "ack", room, id, cursor: message.cursor, ts: message.ts, dup };
    },
  };
}
