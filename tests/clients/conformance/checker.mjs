// Judges the operation log of a scenario. It knows nothing of scenarios, drivers or networks: only what the log says was asked
// for, what a client told, and what the edge has stored. README.md lists the rules.
//
// Entries of the log:
//
//     {who: "runner", what: "client", client, user, can}   a client begins; `can` is what its driver declares
//     {who: "runner", what: "op", client, op}              an operation was given to it
//     {who: "client", client, line}                        a line of its driver
//     {who: "runner", what: "log", room, messages}         all that the stream has of a room, read by a connection of the runner
//     anything else                                        for people

export const RULES = Object.freeze({
  missing: "a message that came after the join was not told, and no reset says so",
  repeated: "a message was told twice",
  order: "a message was told after one that the room has later",
  early: "a message from before the join was told",
  unknown: "a message was told that the room does not have",
  content: "a message was told, or stored, with another content",
  cursor: "a cursor went back, or is of no place of the room",
  unstored: "a message was acknowledged, and the room does not have it",
  twice: "a message is stored twice",
  id: "a message is stored under an id that nobody has asked for",
  sequence: "messages of one client are not stored in the order in which they were written",
  ack: "an acknowledgement that nobody waits for, or with another cursor",
  unsettled: "a message was neither acknowledged nor refused",
  state: "a state follows one that it can't follow, or something was told in the wrong state",
  token: "a token was asked for while one was asked for",
  protocol: "a line that is none of the driver's protocol",
});

/** What may follow which. A client that does not tell `connecting` leaves it out. */
const AFTER = {
  idle: ["connecting", "online", "offline", "closed"],
  connecting: ["online", "offline", "closed"],
  online: ["connecting", "offline", "closed"],
  offline: ["connecting", "online", "offline", "closed"],
  closed: [],
};

const EVENTS = ["state", "token?", "joined", "left", "out", "reset", "message", "acked", "failed", "log"];
const WRITES = { send: undefined, edit: "edit", delete: "delete", react: "reaction" };

const keyOf = ({ from, id }) => `${from}/${id}`;
const same = (a, b) => canonical(a) === canonical(b);

/** JSON with the fields in one order. */
function canonical(value) {
  if (value === undefined) return "undefined";
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  if (Array.isArray(value)) return `[${value.map(canonical)}]`;
  return `{${Object.keys(value).sort().map((name) => `${JSON.stringify(name)}:${canonical(value[name])}`)}}`;
}

/** Of a cursor the sequence in each log. The form is in docs/protocol.md; a client needs none of this. */
function placesOf(cursor) {
  const places = new Map();
  for (const part of String(cursor).split("_")) {
    const [region, epoch, seq] = part.split(".");
    if (!/^\d+$/.test(seq ?? "")) return null;
    places.set(`${region}.${epoch}`, Number(seq));
  }
  return places;
}

/** Whether place `a` is at `b` or after it; null where they can't be compared. */
function isAtOrAfter(a, b) {
  const [left, right] = [placesOf(a), placesOf(b)];
  if (!left || !right || ![...left.keys()].some((log) => right.has(log))) return null;
  return [...right].every(([log, seq]) => !left.has(log) || left.get(log) >= seq);
}

/** What the edge has stored of a room. */
class Stored {
  constructor(messages) {
    this.messages = messages;
    this.places = new Map();
    for (const [at, message] of messages.entries()) {
      const key = keyOf(message);
      this.places.set(key, [...(this.places.get(key) ?? []), at]);
    }
  }

  /** The index of the first message after a cursor; null where it is of another log. */
  after(cursor) {
    for (const [at, message] of this.messages.entries()) {
      const isBehind = isAtOrAfter(cursor, message.cursor);
      if (isBehind === null) return null;
      if (!isBehind) return at;
    }
    return this.messages.length;
  }
}

/** The faults in a log, each `{rule, client, room, text}`. */
export function check(log) {
  const faults = [];
  const stored = new Map();
  for (const entry of log) {
    if (entry.who === "runner" && entry.what === "log") stored.set(entry.room, new Stored(entry.messages));
  }
  const clients = new Map();
  for (const entry of log) {
    if (entry.who === "runner" && entry.what === "client") clients.set(entry.client, new Client(entry, stored, faults));
    else if (entry.who === "runner" && entry.what === "op") clients.get(entry.client)?.onOp(entry.op);
    else if (entry.who === "client") clients.get(entry.client)?.onLine(entry.line);
  }
  for (const client of clients.values()) client.atEnd();
  checkStored(stored, [...clients.values()], faults);
  return faults;
}

/** Each message once, and only what was asked for. */
function checkStored(stored, clients, faults) {
  for (const [room, { messages, places }] of stored) {
    for (const [key, at] of places) {
      if (at.length > 1) faults.push({ rule: "twice", room, text: `${key} is stored ${at.length} times` });
    }
    for (const message of messages) {
      const writers = clients.filter(({ user }) => user === message.from);
      if (writers.length === 0) continue; // of the runner itself
      const written = writers.map((writer) => writer.written(room, message.id)).find(Boolean);
      const [client] = writers.map(({ name }) => name);
      const fault = (rule, text) => faults.push({ rule, client, room, text: `${keyOf(message)}: ${text}` });
      if (!written) fault("id", `stored ${JSON.stringify(message.body)}`);
      else {
        const { op } = written;
        if (message.kind !== WRITES[op.op]) fault("content", `stored with kind ${message.kind} for ${op.op}`);
        if (op.op !== "delete" && op.op !== "react" && !same(op.body, message.body)) fault("content", "stored with another body");
        if (op.target !== undefined && ![op.target, op.target.replace(`${message.from}/`, "")].includes(message.target)) {
          fault("content", `stored with the target ${message.target} for ${op.target}`);
        }
      }
    }
  }
}

class Client {
  constructor({ client, user, can }, stored, faults) {
    this.name = client;
    this.user = user;
    this.can = can;
    this.stored = stored;
    this.faults = faults;
    this.state = "idle";
    this.asking = false;
    this.rooms = new Map();
  }

  fault(rule, room, text) {
    this.faults.push({ rule, client: this.name, room, text });
  }

  room(name) {
    let room = this.rooms.get(name);
    if (!room) this.rooms.set(name, (room = new ClientRoom(this, name)));
    return room;
  }

  /** What was asked to be written under an id: the id of the operation, or the one that the client has chosen for it. */
  written(room, id) {
    const writes = [...(this.rooms.get(room)?.writes.values() ?? [])];
    return writes.find((write) => (write.as ?? write.op.id) === id);
  }

  onOp(op) {
    if (op.op === "connect" && this.state === "closed") this.state = "idle";
    else if (op.op === "token") this.asking = false;
    else if (op.op === "join") this.room(op.room).asked = op.since === undefined ? "any" : { since: op.since };
    else if (op.op === "leave") this.room(op.room).isLeaving = true;
    else if (op.op in WRITES) this.room(op.room).writes.set(op.id, { op });
  }

  onLine(line) {
    const { event, room } = line;
    if (!EVENTS.includes(event)) this.fault("protocol", room, JSON.stringify(line));
    else if (event === "state") {
      if (!AFTER[this.state].includes(line.name)) this.fault("state", undefined, `${line.name} after ${this.state}`);
      if (line.name in AFTER) this.state = line.name;
    } else if (event === "token?") {
      if (this.asking) this.fault("token", undefined, "two at once");
      this.asking = true;
    } else if (event !== "log") {
      const needsConnection = event === "joined" || event === "message";
      if (needsConnection && this.state !== "online") this.fault("state", room, `${event} while ${this.state}`);
      this.room(room).onLine(line);
    }
  }

  atEnd() {
    for (const room of this.rooms.values()) room.atEnd();
  }
}

/** What one client was told of one room, and what it has written there. */
class ClientRoom {
  constructor(client, name) {
    this.client = client;
    this.name = name;
    this.stored = client.stored.get(name) ?? new Stored([]);
    this.asked = "any";
    this.isLeaving = false;
    this.isIn = false;
    this.isReset = false;
    this.writes = new Map();
    /** Of the stretch without a gap that is told now: where it begins and what it has. */
    this.stretch = null;
  }

  fault(rule, text) {
    this.client.fault(rule, this.name, text);
  }

  onLine(line) {
    if (line.event === "joined") this.onJoined(line);
    else if (line.event === "message") this.onMessage(line);
    else if (line.event === "reset") this.isReset = true;
    else if (line.event === "left" || line.event === "out") {
      this.endStretch(false);
      this.isLeaving = this.isIn = false;
    } else this.onSettled(line);
  }

  onJoined({ cursor }) {
    const begins = this.isReset || !this.stretch || this.asked?.since !== undefined;
    if (this.stretch && cursor !== undefined && isAtOrAfter(cursor, this.stretch.cursor) === false && !this.asked?.since) {
      this.fault("cursor", `joined at ${cursor}, which is before ${this.stretch.cursor}`);
    }
    const { since } = this.asked ?? {};
    if (since !== undefined && !this.isReset && !(isAtOrAfter(cursor, since) && isAtOrAfter(since, cursor))) {
      this.fault("cursor", `joined at ${cursor}, not at ${since}, and no reset says so`);
    }
    if (begins) {
      // Up to a reset something may be missing; up to another join too, since it says where to go on.
      this.endStretch(false);
      const from = cursor === undefined ? 0 : this.stored.after(cursor);
      if (from === null) this.fault("cursor", `joined at ${cursor}, which is no place of the room`);
      this.stretch = { from: from ?? 0, next: from ?? 0, cursor, seen: new Set(), skipped: new Map() };
    }
    this.asked = null;
    this.isReset = false;
    this.isIn = true;
  }

  onMessage(line) {
    const { stretch } = this;
    const key = keyOf(line);
    if (!stretch || !this.isIn) {
      this.fault("early", `${key} without a join`);
      return;
    }
    if (line.cursor !== undefined) {
      if (stretch.cursor !== undefined && isAtOrAfter(line.cursor, stretch.cursor) === false) {
        this.fault("cursor", `${key} has ${line.cursor}, which is before ${stretch.cursor}`);
      }
      stretch.cursor = line.cursor;
    }
    const [at] = this.stored.places.get(key) ?? [];
    if (at === undefined) {
      this.fault("unknown", key);
      return;
    }
    const original = this.stored.messages[at];
    for (const field of ["body", "kind", "target"]) {
      if (!same(line[field], original[field])) this.fault("content", `${key}: ${field} is ${JSON.stringify(line[field])}`);
    }
    if (stretch.seen.has(at)) this.fault("repeated", key);
    else if (at < stretch.from) this.fault("early", key);
    else if (at < stretch.next) {
      this.fault("order", `${key} came late`);
      stretch.skipped.delete(at);
    } else {
      for (let skipped = stretch.next; skipped < at; skipped += 1) stretch.skipped.set(skipped, key);
      stretch.next = at + 1;
    }
    stretch.seen.add(at);
  }

  /** `isWhole`: everything up to the end of the log should have come. */
  endStretch(isWhole) {
    const { stretch, stored } = this;
    if (!stretch) return;
    for (const [at, before] of stretch.skipped) this.fault("missing", `${keyOf(stored.messages[at])}, before ${before}`);
    if (isWhole) {
      for (const message of stored.messages.slice(stretch.next)) this.fault("missing", `${keyOf(message)}, at the end`);
    }
    this.stretch = null;
  }

  onSettled({ event, id, as, cursor, code }) {
    const write = this.writes.get(id);
    if (!write) {
      this.fault("ack", `${event} for ${id}, which was not asked for`);
      return;
    }
    if (write.settled) this.fault("ack", `${event} for ${id}, after ${write.settled}`);
    write.settled = event;
    write.as = as;
    write.cursor = cursor;
    if (event === "failed" && typeof code !== "string") this.fault("protocol", `failed ${id} without a code`);
  }

  atEnd() {
    const { client, stored } = this;
    this.endStretch(this.isIn && !this.isLeaving && client.state === "online");
    let last = -1;
    for (const [id, write] of this.writes) {
      const key = `${client.user}/${write.as ?? id}`;
      const [at] = stored.places.get(key) ?? [];
      if (write.settled === "acked" && at === undefined) this.fault("unstored", key);
      if (!write.settled && client.state !== "closed") this.fault("unsettled", key);
      if (at === undefined) continue;
      const { cursor } = stored.messages[at];
      const isThere = write.cursor == null || (isAtOrAfter(write.cursor, cursor) && isAtOrAfter(cursor, write.cursor));
      if (write.settled === "acked" && !isThere) {
        this.fault("ack", `${key} has the cursor ${write.cursor}; it is at ${cursor}`);
      }
      if (at < last && client.can.includes("ordered")) this.fault("sequence", key);
      last = Math.max(last, at);
    }
  }
}
