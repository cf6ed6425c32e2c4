// Messages of one's own until the edge has acknowledged them: in the order in which they were written, with the same id on
// every try, over reconnects and, with a storage, over reloads.

import { Emitter } from "./emitter.js";
import { NatterError, backoff } from "./protocol.js";

const PATIENCE_MS = 15_000; // a longer wait than this, told by the edge, is for the writer to decide
const MOST = 1_000; // messages that wait

/** @typedef {import("./natter.js").Natter} Natter */
/** @typedef {import("./protocol.js").Ack} Ack */

/**
 * What a `send` has besides the room and the id.
 * @typedef {{body?: any, kind?: string, target?: string, reply_to?: string, mentions?: string[]}} Fields
 */

/**
 * As much of a Storage (`localStorage`, `sessionStorage`) as is needed. Each message is an entry of its own, so several tabs
 * may use one; a message that two of them send has one id and is stored once.
 * @typedef {Pick<Storage, "getItem" | "setItem" | "removeItem" | "key" | "length">} OutboxStorage
 */

/**
 * What became of a message of one's own. Events: `state`.
 * @extends {Emitter<{state: SendHandle}>}
 */
export class SendHandle extends Emitter {
  #box;
  /** @type {(ack: Ack) => void} */ #resolve = () => {};
  /** @type {(error: NatterError) => void} */ #reject = () => {};

  /**
   * @internal
   * @param {Outbox} box
   * @param {{room: string, id: string, fields: Fields, at: number, tried?: boolean}} entry
   */
  constructor(box, { room, id, fields, at, tried = false }) {
    super();
    this.#box = box;
    this.room = room;
    this.id = id;
    /** @type {Readonly<Fields>} */
    this.fields = fields;
    /** When it was written, by the clock of this machine. */
    this.at = at;
    /** @type {"pending" | "sent" | "failed"} */
    this.state = "pending";
    /**
     * Why it failed, or why it still waits.
     * @type {NatterError | null}
     */
    this.error = null;
    /**
     * What the edge answered. Where the message itself came back first, `dup` is not known, and false.
     * @type {Ack | null}
     */
    this.ack = null;
    /** Whether it was sent at least once. @internal */
    this._tried = tried;
    /** Whether it would survive a reload. */
    this.stored = false;
    /**
     * Resolves when it is sent, rejects when it has failed. After `retry` there is a new one.
     * @type {Promise<Ack>}
     */
    this.done = this.#promise();
  }

  #promise() {
    const done = new Promise((resolve, reject) => {
      this.#resolve = resolve;
      this.#reject = reject;
    });
    done.catch(() => {}); // who does not look at it looks at `state`
    return done;
  }

  /** Sends a failed message again, with the same id. */
  retry() {
    if (this.state !== "failed") return;
    this.done = this.#promise();
    this._settle("pending", null);
    this.#box._again(this);
  }

  /** Takes it out of the outbox. A message that was sent before, and whose answer was lost, may have arrived all the same. */
  cancel() {
    if (this.state === "sent") return;
    this.#box._remove(this);
    this._settle("failed", new NatterError("canceled", "canceled"));
  }

  /**
   * @internal
   * @param {SendHandle["state"]} state
   * @param {NatterError | null} error
   * @param {Ack | null} [ack]
   */
  _settle(state, error, ack = null) {
    this.state = state;
    this.error = error;
    if (ack) {
      this.ack = ack;
      this.#resolve(ack);
    } else if (state === "failed" && error) {
      this.#reject(error);
    }
    this._emit("state", this);
    this.#box._changed(this);
  }
}

const full = () => new NatterError("outbox_full", `${MOST} messages wait to be sent`);

export class Outbox {
  #client;
  #storage;
  /** @type {Map<string, SendHandle[]>} */ #rooms = new Map();
  /** @type {Map<string, SendHandle>} room -> the one that is under way */ #busy = new Map();
  /** @type {Map<string, {timer: ReturnType<typeof setTimeout>, attempt: number}>} */ #waits = new Map();
  #count = 0;
  #number = 0;

  /**
   * @param {Natter} client
   * @param {OutboxStorage} [storage]
   */
  constructor(client, storage) {
    this.#client = client;
    this.#storage = storage;
  }

  /**
   * What waits in a room or has failed, in the order in which it was written.
   * @param {string} room
   * @returns {readonly SendHandle[]}
   */
  of(room) {
    return this.#rooms.get(room) ?? [];
  }

  /** All rooms in which something waits or has failed. */
  rooms() {
    return [...this.#rooms.keys()];
  }

  /**
   * @internal
   * @param {string} room
   * @param {string} id
   * @param {Fields} fields
   */
  _add(room, id, fields) {
    const known = this.of(room).find((handle) => handle.id === id);
    if (known) return known;
    const handle = new SendHandle(this, { room, id, fields, at: Date.now() });
    if (this.#count >= MOST) {
      handle._settle("failed", full());
      return handle;
    }
    this.#insert(handle);
    this.#store(handle);
    this._changed(handle);
    if (this.#client.state.name === "idle") this.#client.connect();
    this._flush(room);
    return handle;
  }

  /** The user is known: what an earlier page has left is taken up, before what was written since. @internal */
  _restore() {
    const storage = this.#storage;
    if (!storage) return;
    const prefix = this.#prefix();
    const found = [];
    for (let i = 0; i < storage.length; i += 1) {
      const key = storage.key(i);
      if (key?.startsWith(prefix)) found.push(key);
    }
    /** @type {any[]} */
    const entries = [];
    for (const key of found) {
      try {
        entries.push(JSON.parse(storage.getItem(key) ?? ""));
      } catch {
        storage.removeItem(key); // not ours, or cut off: nothing can be done with it
      }
    }
    const earlier = [...this.#rooms.values()].flat();
    this.#rooms.clear();
    this.#count = 0;
    const restored = [];
    for (const entry of entries.sort((a, b) => a.at - b.at || a.number - b.number)) {
      const handle = new SendHandle(this, { ...entry, tried: true });
      handle.stored = true;
      if (entry.failed) {
        handle.state = "failed";
        handle.error = new NatterError(entry.failed.code, entry.failed.message);
      }
      this.#insert(handle);
      restored.push(handle);
    }
    for (const handle of earlier) {
      if (this.of(handle.room).some(({ id }) => id === handle.id)) continue;
      this.#insert(handle);
      this.#store(handle);
    }
    for (const handle of restored) this._changed(handle);
    this._flushAll();
  }

  /** @internal */
  _flushAll() {
    for (const room of this.rooms()) this._flush(room);
  }

  /**
   * Sends the first message of a room that waits. One at a time: so they are stored in their order, whatever fails.
   * @internal
   * @param {string} room
   */
  _flush(room) {
    const client = this.#client;
    if (this.#busy.has(room) || this.#waits.get(room)?.timer || !client._ready) return;
    const handle = this.of(room).find(({ state }) => state === "pending");
    if (!handle) return;
    // What was sent before may have been stored: then the room's backlog tells, and it needs no repeat. And who is in the
    // room has its messages shown after those that they answer, in every region.
    if (client._room(room)?._behind) return;
    this.#busy.set(room, handle);
    handle._tried = true;
    client._command("send", { room, id: handle.id, ...handle.fields }, (error, ack) => {
      this.#busy.delete(room);
      this.#answered(handle, error, ack);
    });
  }

  /**
   * A message of the user has come back.
   * @internal
   * @param {string} room
   * @param {import("./protocol.js").Message} message
   */
  _heard(room, { id, cursor, ts }) {
    const handle = this.of(room).find((one) => one.id === id);
    if (handle && handle.state !== "sent" && handle._tried) this.#sent(handle, { room, id, cursor, ts, dup: false });
  }

  /** @internal @param {SendHandle} handle */
  _again(handle) {
    if (!this.of(handle.room).includes(handle)) {
      if (this.#count >= MOST) {
        handle._settle("failed", full());
        return;
      }
      this.#insert(handle);
    }
    this.#store(handle);
    this._flush(handle.room);
  }

  /** The connection is gone: with the next one everything is sent at once. @internal */
  _rest() {
    for (const room of [...this.#waits.keys()]) this.#forgetWait(room);
  }

  /** @internal @param {SendHandle} handle */
  _remove(handle) {
    const { room, id } = handle;
    const handles = this.#rooms.get(room);
    const at = handles?.indexOf(handle) ?? -1;
    if (!handles || at < 0) return;
    handles.splice(at, 1);
    this.#count -= 1;
    if (handles.length === 0) this.#rooms.delete(room);
    if (this.#client.user != null) this.#storage?.removeItem(this.#key(room, id));
    // The wait was for this one.
    const wait = this.#waits.get(room);
    if (wait && at === 0) {
      clearTimeout(wait.timer);
      this.#waits.delete(room);
      this._flush(room);
    }
  }

  /** @internal @param {SendHandle} handle */
  _changed(handle) {
    this.#client._room(handle.room)?._emit("outbox", handle);
  }

  /**
   * @param {SendHandle} handle
   * @param {NatterError | null} error
   * @param {Ack} ack
   */
  #answered(handle, error, ack) {
    const { room } = handle;
    if (handle.state !== "pending" || !this.of(room).includes(handle)) {
      this._flush(room); // settled by what came first, or canceled
    } else if (!error) {
      this.#sent(handle, ack);
    } else if (error.code === "disconnected" || error.code === "closed") {
      // Sent again when there is a connection.
    } else if (error.retry && (error.retryAfterMs ?? 0) <= PATIENCE_MS) {
      const attempt = this.#waits.get(room)?.attempt ?? 0;
      const timer = setTimeout(() => {
        this.#waits.set(room, { timer: /** @type {any} */ (undefined), attempt: attempt + 1 });
        this._flush(room);
      }, error.retryAfterMs ?? backoff(attempt));
      this.#waits.set(room, { timer, attempt });
      handle._settle("pending", error);
    } else {
      this.#forgetWait(room);
      // A message waits for its writer to decide. An edit or a reaction that was refused is over.
      if (handle.fields.kind) this._remove(handle);
      handle._settle("failed", error);
      if (!handle.fields.kind) this.#store(handle);
      this._flush(room);
    }
  }

  /**
   * @param {SendHandle} handle
   * @param {Ack} ack
   */
  #sent(handle, { room, id, cursor, ts, dup }) {
    this.#forgetWait(room);
    this._remove(handle);
    handle._settle("sent", null, { room, id, cursor, ts, dup });
    this._flush(room);
  }

  /** @param {string} room */
  #forgetWait(room) {
    clearTimeout(this.#waits.get(room)?.timer);
    this.#waits.delete(room);
  }

  /** @param {SendHandle} handle */
  #insert(handle) {
    const handles = this.#rooms.get(handle.room) ?? [];
    this.#rooms.set(handle.room, handles);
    handles.push(handle);
    this.#count += 1;
  }

  /** @param {SendHandle} handle */
  #store(handle) {
    if (!this.#storage || this.#client.user == null) return;
    const { room, id, fields, at, state, error } = handle;
    const failed = state === "failed" && error ? { code: error.code, message: error.message } : undefined;
    const entry = { room, id, fields, at, number: (this.#number += 1), failed };
    try {
      this.#storage.setItem(this.#key(room, id), JSON.stringify(entry));
      handle.stored = true;
    } catch {
      handle.stored = false; // full, or not allowed: it is sent all the same
    }
  }

  #prefix() {
    return `natter.outbox.${encodeURIComponent(this.#client.user ?? "")}/`;
  }

  /**
   * @param {string} room
   * @param {string} id
   */
  #key(room, id) {
    return `${this.#prefix()}${room}/${id}`;
  }
}
