// Stores: what a page shows, kept up to date. Each has `subscribe` and `getSnapshot`, and there is one for each room or client.

import { MessageStore } from "./messages.js";
import { backoff, reaches } from "./protocol.js";
import { Store, oneFor } from "./snapshot.js";

export { MessageStore } from "./messages.js";
export { Store } from "./snapshot.js";

const LISTED = 1_000; // people, and readers: the first page of the list, which is as long as the edge makes one
const LOOK_AGAIN_MS = 2_000; // at least, before the list of who is here is asked for once more
const TYPING_MS = 6_000; // a sign of typing is repeated every 2.5 s

/** @typedef {import("./natter.js").Natter} Natter */
/** @typedef {import("./room.js").Room} Room */
/** @typedef {import("./protocol.js").Summary} Summary */
/** @typedef {import("./protocol.js").PresentUser} PresentUser */
/** @typedef {import("./protocol.js").PresencePush} PresencePush */
/** @typedef {import("./protocol.js").NatterError} NatterError */
/** @typedef {import("./messages.js").MessageView} MessageView */
/** @typedef {import("./messages.js").MessagesSnapshot} MessagesSnapshot */

/**
 * The messages of a room: edits, reactions, deletes and annotations applied, one's own before they are sent, pages of history.
 * @type {(room: Room) => MessageStore}
 */
export const messages = oneFor((room) => new MessageStore(room));

// Who is here -------------------------------------------------------------------------------------------------------------

/**
 * `count` is null where it is not told. `named`: `users` are all who are here, and nobody else.
 * @typedef {{count: number | null, users: readonly PresentUser[], named: boolean}} PresenceSnapshot
 */

/** @extends {Store<PresenceSnapshot>} */
class PresenceStore extends Store {
  #room;
  /** @type {number | null} */ #count = null;
  /** @type {Map<string, PresentUser>} */ #users = new Map();
  #named = false;
  /** @type {PresencePush[] | null} */ #early = null; // what came while the list is asked for
  /** @type {ReturnType<typeof setTimeout> | undefined} */ #again;

  /** @param {Room} room */
  constructor(room) {
    super();
    this.#room = room;
  }

  /** @internal @override */
  _start() {
    const room = this.#room;
    const offs = [
      room.on("joined", () => this.#look()),
      room.on("presence", (push) => (this.#early ? this.#early.push(push) : this.#hear(push))),
      room.on("state", ({ name }) => name === "out" && this.#forget()),
      room.hold({ presence: true }),
    ];
    if (room.state.name === "joined") this.#look();
    return () => {
      for (const off of offs) off();
      this.#forget();
    };
  }

  #forget() {
    clearTimeout(this.#again);
    this.#again = undefined;
    this.#early = null;
    this.#count = null;
    this.#users = new Map();
    this.#named = false;
    this._change();
  }

  /** @param {number} [attempt] */
  async #look(attempt = 0) {
    clearTimeout(this.#again);
    this.#again = undefined;
    /** @type {PresencePush[]} */
    const early = [];
    this.#early = early;
    try {
      const { count, users = [] } = await this.#room.presence({ limit: LISTED });
      if (early !== this.#early) return; // of an earlier join
      this.#count = count;
      this.#users = new Map(users.map((user) => [user.user, Object.freeze(user)]));
      this.#named = users.length === count;
    } catch (error) {
      if (early !== this.#early) return;
      const { retry, code } = /** @type {NatterError} */ (error);
      if (!retry) this.#count = null; // not told here
      else if (code !== "disconnected") this.#again = setTimeout(() => this.#look(attempt + 1), 1_000 + backoff(attempt));
    }
    this.#early = null;
    // Older than the list or newer: what is true comes last.
    for (const push of early) this.#hear(push);
    this._change();
  }

  /** @param {PresencePush} push */
  #hear({ count, user, state, info, at }) {
    if (this.#count == null) return;
    if (count != null) {
      // Many are here, or come and go: from now on the names are of the past.
      this.#count = count;
      this.#named = false;
    } else if (!this.#named) {
      // Names again. All in the room are told at once, and shall not ask in the same moment.
      this.#again ??= setTimeout(() => this.#look(), LOOK_AGAIN_MS * (1 + Math.random()));
    } else if (user != null) {
      const known = this.#users.get(user);
      if (state === "leave") {
        this.#users.delete(user);
      } else {
        const unreachable = state === "unreachable" ? /** @type {const} */ ({ state }) : {};
        this.#users.set(user, Object.freeze({ user, info: info ?? known?.info, since: known?.since ?? at, ...unreachable }));
      }
      this.#count = this.#users.size;
    }
    this._change();
  }

  /** @internal @override */
  _build() {
    return { count: this.#count, users: Object.freeze([...this.#users.values()]), named: this.#named };
  }
}

/**
 * Who is in a room.
 * @type {(room: Room) => Store<PresenceSnapshot>}
 */
export const presence = oneFor((room) => new PresenceStore(room));

// Who is typing -----------------------------------------------------------------------------------------------------------

/** @extends {Store<readonly string[]>} */
class TypingStore extends Store {
  #room;
  /** @type {Map<string, ReturnType<typeof setTimeout>>} */ #users = new Map();

  /** @param {Room} room */
  constructor(room) {
    super();
    this.#room = room;
  }

  /** @internal @override */
  _start() {
    const room = this.#room;
    const offs = [
      room.on("typing", ({ user }) => {
        const known = this.#users.get(user);
        clearTimeout(known);
        this.#users.set(user, setTimeout(() => this.#stopped(user), TYPING_MS));
        if (!known) this._change();
      }),
      room.on("message", ({ from, kind }) => kind == null && this.#stopped(from)),
      room.hold(),
    ];
    return () => {
      for (const off of offs) off();
      for (const user of [...this.#users.keys()]) this.#stopped(user);
    };
  }

  /** @param {string} user */
  #stopped(user) {
    clearTimeout(this.#users.get(user));
    if (this.#users.delete(user)) this._change();
  }

  /** @internal @override */
  _build() {
    return [...this.#users.keys()];
  }
}

/**
 * The users who are typing in a room, without oneself.
 * @type {(room: Room) => Store<readonly string[]>}
 */
export const typing = oneFor((room) => new TypingStore(room));

// Who has read what -------------------------------------------------------------------------------------------------------

/** @extends {Store<ReadonlyMap<string, string>>} */
class ReadersStore extends Store {
  #room;
  /** @type {Map<string, string>} */ #readers = new Map();

  /** @param {Room} room */
  constructor(room) {
    super();
    this.#room = room;
  }

  /** @internal @override */
  _start() {
    const room = this.#room;
    const offs = [
      room.on("reset", () => {
        this.#readers.clear();
        this._change();
      }),
      room.on("joined", () => this.#ask()),
      room.on("read", ({ user, cursor }) => this.#read(user, cursor)),
      // Who says something has read what was before. Only those known: a program that publishes need not be a reader.
      room.on("message", ({ from, kind, cursor }) => {
        if (kind == null && cursor != null && this.#readers.has(from)) this.#read(from, cursor);
      }),
      room.hold(),
    ];
    if (room.state.name === "joined") this.#ask();
    return () => {
      for (const off of offs) off();
    };
  }

  async #ask() {
    try {
      const { readers } = await this.#room.readers({ limit: LISTED });
      for (const { user, cursor } of readers) this.#read(user, cursor);
    } catch {
      // An ephemeral room, or no right to it; after a lost connection the next join asks. What is pushed counts.
    }
  }

  /**
   * @param {string} user
   * @param {string} cursor
   */
  #read(user, cursor) {
    const marker = this.#readers.get(user);
    if (marker != null && reaches(marker, cursor)) return;
    this.#readers.set(user, cursor);
    this._change();
  }

  /** @internal @override */
  _build() {
    return new Map(this.#readers);
  }
}

/**
 * Up to where the users of a room have read: user -> cursor. `reaches(cursor, message.cursor)` says whether a message is read.
 * @type {(room: Room) => Store<ReadonlyMap<string, string>>}
 */
export const readers = oneFor((room) => new ReadersStore(room));

// The inbox ---------------------------------------------------------------------------------------------------------------

/**
 * Pinned rooms first, then those in which something was said last.
 * @typedef {{state: "loading" | "ready" | "refused", rooms: readonly Summary[], hasMore: boolean, error: NatterError | null}} InboxSnapshot
 */

/** @extends {Store<InboxSnapshot>} */
export class InboxStore extends Store {
  #client;
  /** @type {Map<string, Summary>} */ #rooms = new Map();
  /** @type {InboxSnapshot["state"]} */ #state = "loading";
  /** @type {NatterError | null} */ #error = null;
  /** @type {import("./watch.js").Watch | null} */ #watch = null;

  /** @param {Natter} client */
  constructor(client) {
    super();
    this.#client = client;
    this.loadMore = this.loadMore.bind(this);
  }

  /** Loads the next page of rooms. */
  async loadMore() {
    try {
      await this.#watch?.more();
      this.#error = null;
    } catch (error) {
      this.#error = /** @type {NatterError} */ (error);
    }
    this._change();
  }

  /** @internal @override */
  _start() {
    const watch = this.#client.watch({ mine: true });
    this.#watch = watch;
    let length = 0;
    const offs = [
      watch.on("rooms", ({ rooms, gone, first }) => {
        if (first) {
          length = this.#rooms.size;
          this.#rooms.clear();
        }
        for (const room of gone) this.#rooms.delete(room);
        for (const summary of rooms) {
          if (summary.archived) this.#rooms.delete(summary.room);
          else this.#rooms.set(summary.room, Object.freeze(summary));
        }
        this.#state = "ready";
        this._change();
        // After a reconnect the list is to be as long as it was.
        if (!gone.length && watch.hasMore && this.#rooms.size < length) this.loadMore();
      }),
      watch.on("ended", ({ error }) => {
        this.#state = "refused";
        this.#error = error;
        this._change();
      }),
    ];
    return () => {
      for (const off of offs) off();
      watch.stop();
      this.#watch = null;
    };
  }

  /** @internal @override @returns {InboxSnapshot} */
  _build() {
    const rank = (/** @type {Summary} */ { pinned, last }) => (pinned ? 1e15 : 0) + (last?.ts ?? 0);
    const rooms = [...this.#rooms.values()].sort((a, b) => rank(b) - rank(a));
    return { state: this.#state, rooms: Object.freeze(rooms), hasMore: this.#watch?.hasMore ?? false, error: this.#error };
  }
}

/**
 * The rooms of the user with what is new in them, live.
 * @type {(client: Natter) => InboxStore}
 */
export const inbox = oneFor((client) => new InboxStore(client));

// What is unread ----------------------------------------------------------------------------------------------------------

/**
 * `total` and `mentions` leave out muted rooms; `capped`: it is more than that.
 * @typedef {{total: number, mentions: number, capped: boolean, rooms: Readonly<Record<string, number>>}} UnreadSnapshot
 */

/** @extends {Store<UnreadSnapshot>} */
class UnreadStore extends Store {
  #inbox;

  /** @param {Natter} client */
  constructor(client) {
    super();
    this.#inbox = inbox(client);
  }

  /** @internal @override */
  _start() {
    return this.#inbox.subscribe(() => this._change());
  }

  /** @internal @override @returns {UnreadSnapshot} */
  _build() {
    const { rooms, hasMore } = this.#inbox.getSnapshot();
    const loud = rooms.filter(({ muted }) => !muted);
    const sum = (/** @type {"unread" | "mentions"} */ name) => loud.reduce((total, room) => total + (room[name] ?? 0), 0);
    return {
      total: sum("unread"),
      mentions: sum("mentions"),
      capped: hasMore || loud.some(({ capped }) => capped),
      rooms: Object.freeze(Object.fromEntries(rooms.map(({ room, unread = 0 }) => [room, unread]))),
    };
  }
}

/**
 * How much is unread, in all rooms of the inbox that are loaded.
 * @type {(client: Natter) => Store<UnreadSnapshot>}
 */
export const unread = oneFor((client) => new UnreadStore(client));
