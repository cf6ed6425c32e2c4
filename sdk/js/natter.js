// The client: `new Natter({ url, getToken })`. See README.md.

import { Connection } from "./connection.js";
import { Outbox } from "./outbox.js";
import { Room } from "./room.js";
import { Watch } from "./watch.js";

export { TRANSITIONS } from "./connection.js";
export { SendHandle } from "./outbox.js";
export { NATTER, NatterError, claimsOf, compareCursors, longRef, newId, reaches, refOf } from "./protocol.js";
export { Room, Watch };

/** @typedef {import("./connection.js").State} State */
/** @typedef {import("./connection.js").TokenRequest} TokenRequest */
/** @typedef {import("./protocol.js").Message} Message */
/** @typedef {import("./protocol.js").Page} Page */
/** @typedef {import("./protocol.js").Joined} Joined */
/** @typedef {import("./protocol.js").Ack} Ack */
/** @typedef {import("./protocol.js").Summary} Summary */
/** @typedef {import("./protocol.js").RoomRecord} RoomRecord */

/**
 * @typedef {object} NatterExtras
 * @property {import("./outbox.js").OutboxStorage} [storage] `localStorage` or `sessionStorage`: the outbox survives reloads
 *
 * @typedef {import("./connection.js").ConnectionOptions & NatterExtras} NatterOptions
 */

/**
 * @typedef {object} NatterEvents
 * @property {State} state
 * @property {string} user who the user is; once, when the first token is there
 * @property {any} push every push of the edge, as it came
 */

/** @extends {Connection<NatterEvents>} */
export class Natter extends Connection {
  /** @type {Map<string, Room>} */ #rooms = new Map();
  /** @type {Set<Watch>} */ #watches = new Set();

  /** @param {NatterOptions} options */
  constructor({ storage, ...options }) {
    super(options);
    /** Messages of one's own that wait, or have failed. */
    this.outbox = new Outbox(this, storage);
    if (this.user != null) this.outbox._restore();
    this.on("state", ({ name, reason = "closed" }) => {
      if (name === "closed") for (const room of this.#rooms.values()) room._closed(reason);
    });
  }

  /**
   * The room of this name; the same object each time. It is not joined by that.
   * @param {string} name such as `chat:lobby`
   */
  room(name) {
    let room = this.#rooms.get(name);
    if (!room) this.#rooms.set(name, (room = new Room(this, name)));
    return room;
  }

  /**
   * Makes a room, or finds it: the same fields give the same room.
   * @param {{namespace: string, kind: "dm" | "group" | "open", ref?: string, key?: string, name?: string, members?: string[], title?: string, info?: any}} fields
   * @returns {Promise<RoomRecord>}
   */
  createRoom(fields) {
    return this.request("create", fields);
  }

  /**
   * The directory of rooms.
   * @param {{namespace?: string, ref?: string, member?: string, kind?: string, archived?: boolean, limit?: number, after?: string}} [query]
   * @returns {Promise<{rooms: (Omit<RoomRecord, "members"> & {members: string[], member_count: number, active_at: number})[], next?: string}>}
   */
  rooms(query = {}) {
    const given = Object.entries(query).filter(([, value]) => value !== undefined);
    return this.http("GET", `rooms?${new URLSearchParams(given.map(([name, value]) => [name, String(value)]))}`);
  }

  /**
   * A page of the rooms of the user with what is new in them. `inbox` of store.js keeps the list up to date.
   * @param {{after?: string, limit?: number, archived?: boolean}} [options]
   * @returns {Promise<{rooms: Summary[], next?: string}>}
   */
  inbox(options = {}) {
    return this.request("inbox", options);
  }

  /**
   * How many messages are unread.
   * @param {string[]} rooms
   * @returns {Promise<{rooms: {room: string, count: number, capped?: boolean}[]}>}
   */
  unread(rooms) {
    return this.request("unread", { rooms });
  }

  /**
   * Search over all rooms of the user.
   * @param {{q?: string, from?: string, mentions?: string[], before?: string, limit?: number}} query
   * @returns {Promise<{messages: Message[], next?: string, partial?: boolean}>}
   */
  search(query) {
    return this.request("search", query);
  }

  /**
   * Begins or ends a block of another user: no direct messages between the two.
   * @param {string} user
   * @param {boolean} [blocked]
   */
  async block(user, blocked = true) {
    await this.request("block", { user, blocked });
  }

  /**
   * Is told what is new in rooms without joining them: in one's own, in some, or in all of a pattern.
   * @param {import("./watch.js").WatchQuery} query
   * @param {{limit?: number}} [options] rooms of a page, 1 to 200
   */
  watch(query, { limit } = {}) {
    const watch = new Watch(this, query, limit);
    this.#watches.add(watch);
    if (this._ready) watch._open();
    else if (this.state.name !== "closed") this.connect();
    return watch;
  }

  // From the connection, and from what it has made ------------------------------------------------------------------------

  /** @internal @param {string} name */
  _room(name) {
    return this.#rooms.get(name);
  }

  /** @internal @param {Watch} watch */
  _unwatch(watch) {
    const number = watch._number;
    this.#watches.delete(watch);
    if (number == null || [...this.#watches].some((other) => other._number === number)) return;
    this._command("unwatch", { watch: number }, () => {});
  }

  /** @internal @override */
  _onOpen() {
    for (const room of this.#rooms.values()) room._open();
    for (const watch of this.#watches) watch._open();
    this.outbox._flushAll();
  }

  /** @internal @override */
  _onLost() {
    this.outbox._rest();
    for (const room of this.#rooms.values()) room._lost();
    for (const watch of this.#watches) watch._lost();
  }

  /** @internal @override @param {any} push */
  _onPush(push) {
    if (push.op === "inbox") {
      for (const watch of [...this.#watches]) if (watch._number === push.watch) watch._push(push);
    } else if (push.room != null) {
      this.#rooms.get(push.room)?._push(push);
    }
    this._emit("push", push);
  }

  /** @internal @override */
  _onUser() {
    this.outbox._restore();
    this._emit("user", /** @type {string} */ (this.user));
  }

  /** @internal @override */
  _onLeave() {
    for (const room of this.#rooms.values()) room._leave();
  }
}
