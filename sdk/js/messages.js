// The messages of a room, as one shows them: live ones and pages of history without a seam, changes applied, one's own in their
// place before they are sent.

import { apply, folded, isErased } from "./fold.js";
import { NATTER, backoff, compareCursors, longRef, refOf } from "./protocol.js";
import { Store } from "./snapshot.js";

const PAGE = 50;
const MOST = 2_000; // messages that are kept; the others are loaded again when they are wanted
const SPARE = 200; // taken away at once, above that
const MOST_RECORDED = 5_000;

/** @typedef {import("./protocol.js").Message} Message */
/** @typedef {import("./protocol.js").Page} Page */
/** @typedef {import("./protocol.js").NatterError} NatterError */
/** @typedef {import("./outbox.js").SendHandle} SendHandle */
/** @typedef {import("./room.js").Room} Room */

/**
 * A message as it is now. Does not change: where the message does, there is another object.
 * @typedef {object} MessageView
 * @property {string} key `<user>/<id>`
 * @property {string} id
 * @property {string} from
 * @property {number} ts when it was stored; of a message that is not sent yet, when it was written
 * @property {string} [cursor]
 * @property {any} body absent where it was deleted
 * @property {"system"} [kind] what natter tells of the room
 * @property {string} [reply_to] `<user>/<id>`
 * @property {readonly string[]} mentions
 * @property {boolean} own
 * @property {"sent" | "pending" | "failed"} status
 * @property {boolean} changing whether a change of one's own to it is under way
 * @property {number} [edited_at]
 * @property {number} [deleted_at]
 * @property {readonly {key: string, count: number, users: readonly string[], mine: boolean}[]} reactions
 * @property {Readonly<Record<string, any>>} annotations
 * @property {import("./protocol.js").Replies} [replies]
 * @property {SendHandle} [handle] of a message that waits or has failed: `retry`, `cancel`
 * @property {NatterError} [error] why it has failed, or why it waits
 */

/**
 * @typedef {object} MessagesSnapshot
 * @property {"idle" | "loading" | "ready" | "out"} state `out`: the room can't be read, `code` says why
 * @property {string} [code]
 * @property {readonly MessageView[]} messages the oldest first; those that are not sent yet at the end
 * @property {boolean} hasOlder whether `loadOlder` has something to load
 * @property {boolean} hasNewer whether the end is not shown: after `jump`, or far up
 * @property {number} newer messages that came while the end was not shown
 * @property {"older" | "newer" | "jump" | null} loading
 * @property {boolean} partial history could not tell everything just now
 * @property {NatterError | null} error why the last load has failed
 */

/** @typedef {{base: import("./fold.js").Folded, view: MessageView | null, overlay: string}} Item */

const isChange = (/** @type {{kind?: string}} */ { kind }) => kind != null && CHANGES.has(kind);
const CHANGES = new Set(["edit", "delete", "reaction", "annotation"]);
const isShown = (/** @type {Message} */ { kind, from }) =>
  kind == null || kind === "message" || (kind === "system" && from === NATTER);

/** @extends {Store<MessagesSnapshot>} */
export class MessageStore extends Store {
  /** @type {Room} */ #room;
  /** @type {Map<string, Item>} */ #items = new Map();
  /** @type {Item[]} */ #list = [];
  /** @type {WeakMap<SendHandle, {view: MessageView, overlay: string}>} */ #waiting = new WeakMap();
  #loaded = false;
  /** @type {string | null} */ #prev = null; // where there is more; null where there is not
  /** @type {string | null} */ #next = null;
  #atEnd = true;
  #newer = 0;
  #partial = false;
  /** @type {NatterError | null} */ #error = null;
  /** @type {"latest" | "older" | "newer" | "jump" | null} */ #loading = null;
  #turn = 0; // the list is another one than in the turn before: a page that was asked for then has no place in it
  /** @type {Message[] | null} */ #record = null; // what comes while a page is loaded
  /** @type {ReturnType<typeof setTimeout> | undefined} */ #again;
  #attempt = 0;

  /** @param {Room} room */
  constructor(room) {
    super();
    this.#room = room;
    this.loadOlder = this.loadOlder.bind(this);
    this.loadNewer = this.loadNewer.bind(this);
    this.jump = this.jump.bind(this);
    this.latest = this.latest.bind(this);
    this.find = this.find.bind(this);
  }

  get room() {
    return this.#room;
  }

  /** Loads the page before the oldest message. Resolves when that has happened, or failed. */
  async loadOlder() {
    const before = this.#prev;
    if (before == null || this.#loading) return;
    await this.#load("older", { before }, (page) => {
      this.#insert(page.messages, 0);
      this.#prev = page.prev ?? null;
      if (this.#list.length > MOST) this.#cutEnd();
    });
  }

  /** Loads the page after the newest message, where that is not the end. */
  async loadNewer() {
    const after = this.#next;
    if (after == null || this.#loading) return;
    await this.#load("newer", { after }, (page) => {
      this.#insert(page.messages, this.#list.length);
      this.#end(page, after);
      if (this.#list.length > MOST) this.#cutBeginning();
    });
  }

  /**
   * Shows the messages around one, or around a cursor. Resolves with whether the message is there.
   * @param {string | {from: string, id: string}} message
   */
  async jump(message) {
    const ref = refOf(message);
    if (this.#items.has(ref)) return true;
    this.#turn += 1;
    await this.#load("jump", { around: ref }, (page) => {
      this.#loaded = true;
      this.#newer = 0;
      this.#replace(page.messages);
      this.#prev = page.prev ?? null;
      this.#end(page, this.#list.at(-1)?.base.cursor ?? null);
    });
    if (!this.#loaded && !this.#loading) await this.#loadLatest(); // which it had stopped
    return this.#items.has(ref) || (!ref.includes("/") && !this.#error);
  }

  /** Shows the end of the room. */
  async latest() {
    if (!this.#atEnd) await this.#loadLatest();
  }

  /**
   * The message of this reference, if it is loaded or waits to be sent.
   * @param {string | {from: string, id: string}} message
   */
  find(message) {
    const key = refOf(message);
    return this.getSnapshot().messages.find((view) => view.key === key);
  }

  /** @internal @override */
  _start() {
    const room = this.#room;
    const offs = [
      room.on("message", (message) => this.#hear(message)),
      room.on("reset", () => (this.#loaded = false)),
      room.on("joined", ({ cursor }) => this.#joined(cursor != null)),
      room.on("state", () => this._change()),
      room.on("outbox", (handle) => this.#sent(handle)),
      room.client.on("user", () => this._change()),
      room.hold(),
    ];
    if (room.state.name === "joined") this.#joined(room.cursor != null);
    this._change();
    return () => {
      for (const off of offs) off();
      this.#turn += 1;
      this.#loading = null;
      this.#record = null;
      this.#loaded = false; // what is said from now on is not heard
      clearTimeout(this.#again);
    };
  }

  // Pages -----------------------------------------------------------------------------------------------------------------

  /** @param {boolean} durable */
  #joined(durable) {
    if (!durable) {
      this.#loaded = true;
      this._change();
    } else if (!this.#loaded) {
      this.#loadLatest();
    }
  }

  // Everything until the join is in the newest page, and everything after it comes live: nothing is between the two.
  async #loadLatest() {
    this.#turn += 1;
    await this.#load("latest", {}, (page) => {
      this.#loaded = true;
      this.#replace(page.messages);
      this.#prev = page.prev ?? null;
      this.#next = null;
      this.#atEnd = true;
      this.#newer = 0;
    });
  }

  /**
   * Loads a page, and shows it with `take`. What comes meanwhile may be newer than the page or older: it is applied to it once
   * more, which changes nothing where the page knew it.
   * @param {"latest" | "older" | "newer" | "jump"} what
   * @param {object} where
   * @param {(page: Page) => void} take
   */
  async #load(what, where, take) {
    const turn = this.#turn;
    clearTimeout(this.#again);
    this.#loading = what;
    this.#record = [];
    this._change();
    try {
      const page = await this.#room.history({ limit: PAGE, ...where });
      if (turn !== this.#turn) return;
      this.#attempt = 0;
      this.#error = null;
      this.#partial = page.partial === true;
      const record = this.#record;
      this.#record = null;
      this.#loading = null;
      take(page);
      if (record.length >= MOST_RECORDED) this.#loadLatest();
      else for (const message of record) this.#hear(message, true);
    } catch (caught) {
      if (turn !== this.#turn) return;
      this.#record = null;
      this.#loading = null;
      this.#failed(what, /** @type {NatterError} */ (caught));
    }
    this._change();
  }

  /**
   * @param {"latest" | "older" | "newer" | "jump"} what
   * @param {NatterError} error
   */
  #failed(what, error) {
    this.#error = error;
    if (what === "older" && !error.retry) this.#prev = null;
    if (what !== "latest") return;
    if (error.retry) {
      // Where the connection was lost, the next join loads it.
      if (this.#room.state.name === "joined") {
        this.#again = setTimeout(() => this.#loadLatest(), 1_000 + backoff((this.#attempt += 1)));
      }
    } else {
      this.#loaded = true; // without history, or without the right to it: what comes live is all there is
      this.#prev = null;
    }
  }

  /** @param {Message[]} messages */
  #replace(messages) {
    const before = this.#items;
    this.#items = new Map();
    this.#list = [];
    for (const message of messages) this.#put(message, this.#list.length, before.get(refOf(message)));
  }

  /**
   * Puts those of a page that are not known at a place of the list.
   * @param {Message[]} messages
   * @param {number} at
   */
  #insert(messages, at) {
    for (const message of messages) {
      if (!this.#items.has(refOf(message))) this.#put(message, at++);
    }
  }

  /**
   * @param {Message} message
   * @param {number} at
   * @param {Item} [before] what it was
   */
  #put(message, at, before) {
    const base = folded(message);
    const same = before && !before.overlay && JSON.stringify(plain(base)) === JSON.stringify(plain(before.base));
    /** @type {Item} */
    const item = same ? before : { base, view: null, overlay: "" };
    this.#items.set(refOf(message), item);
    this.#list.splice(at, 0, item);
  }

  /**
   * @param {Page} page
   * @param {string | null} after
   */
  #end(page, after) {
    this.#next = page.next ?? (page.partial ? after : null);
    this.#atEnd = this.#next == null;
    if (this.#atEnd) this.#newer = 0;
  }

  #cutEnd() {
    this.#forget(this.#list.splice(MOST));
    this.#next = this.#list.at(-1)?.base.cursor ?? null;
    this.#atEnd = this.#next == null;
  }

  #cutBeginning() {
    this.#forget(this.#list.splice(0, this.#list.length - MOST));
    this.#prev = this.#list[0]?.base.cursor ?? null;
  }

  /** @param {Item[]} items */
  #forget(items) {
    for (const { base } of items) this.#items.delete(refOf(base));
  }

  // What comes live -------------------------------------------------------------------------------------------------------

  /**
   * @param {Message} message
   * @param {boolean} [again] from the record
   */
  #hear(message, again = false) {
    if (this.#record && this.#record.length < MOST_RECORDED) this.#record.push(message);
    if (isShown(message)) {
      this.#add(message, again);
    } else if (isChange(message) && message.target != null) {
      const item = this.#items.get(longRef(message.from, message.target));
      if (!item) return; // older than what is shown
      apply(item.base, message);
      item.view = null;
    } else if (message.kind === "erase") {
      const gone = this.#list.filter(({ base }) => isErased(base, message.body));
      this.#forget(gone);
      this.#list = this.#list.filter(({ base }) => this.#items.has(refOf(base)));
    } else {
      return;
    }
    this._change();
  }

  /**
   * @param {Message} message
   * @param {boolean} again
   */
  #add(message, again) {
    const known = this.#items.get(refOf(message));
    if (known) {
      // Its acknowledgement came first, with the place of this message alone.
      known.base.cursor ??= message.cursor;
      return;
    }
    if (!this.#atEnd) {
      if (!again) this.#newer += 1;
      return; // a page brings it
    }
    let at = this.#list.length;
    while (at > 0 && isAfter(this.#list[at - 1].base, message)) at -= 1;
    if (at === 0 && this.#list.length > 0 && this.#prev != null) return; // older than what is shown: a repeat of what was stored before
    this.#put(message, at);
    if (this.#list.length > MOST + SPARE) this.#cutBeginning();
    if (typeof message.reply_to !== "string") return;
    const answered = this.#items.get(longRef(message.from, message.reply_to));
    if (answered) {
      const { from, id, ts } = message;
      const replies = answered.base.replies ?? { count: 0 };
      answered.base.replies = { ...replies, count: replies.capped ? replies.count : replies.count + 1, last: { from, id, ts } };
      answered.view = null;
    }
  }

  /** Something of one's own has changed; it may not come back as a message, or later. @param {SendHandle} handle */
  #sent({ id, state, ack, fields }) {
    const { user } = this.#room.client;
    const { kind = "message" } = fields;
    if (state === "sent" && ack && user != null && (kind === "message" || CHANGES.has(kind))) {
      const { kind: _kind, ...said } = fields;
      this.#hear({ ...said, kind: kind === "message" ? undefined : kind, id, from: user, ts: ack.ts || Date.now(), cursor: ack.cursor });
    }
    this._change();
  }

  // The snapshot ----------------------------------------------------------------------------------------------------------

  /**
   * @internal
   * @override
   * @returns {MessagesSnapshot}
   */
  _build() {
    const room = this.#room;
    const user = room.client.user ?? "";
    /** @type {SendHandle[]} */
    const waiting = [];
    /** @type {Map<string, SendHandle[]>} */
    const overlays = new Map();
    for (const handle of room.client.outbox.of(room.name)) {
      const { kind, target } = handle.fields;
      if (kind == null) {
        if (!this.#items.has(`${user}/${handle.id}`)) waiting.push(handle);
      } else if (target != null && handle.state === "pending" && CHANGES.has(kind)) {
        const key = longRef(user, target);
        overlays.set(key, [...(overlays.get(key) ?? []), handle]);
      }
    }
    const messages = this.#list.map((item) => this.#viewOf(item, overlays.get(refOf(item.base)), user));
    for (const handle of waiting) messages.push(this.#viewOfWaiting(handle, overlays.get(`${user}/${handle.id}`), user));
    const { name, code } = room.state;
    const loading = this.#loading === "latest" ? (this.#loaded ? "jump" : null) : this.#loading;
    return {
      state: name === "out" ? "out" : this.#loaded ? "ready" : name === "idle" ? "idle" : "loading",
      ...(name === "out" && { code }),
      messages: Object.freeze(messages),
      hasOlder: this.#prev != null,
      hasNewer: !this.#atEnd,
      newer: this.#newer,
      loading,
      partial: this.#partial,
      error: this.#error,
    };
  }

  /**
   * @param {Item} item
   * @param {SendHandle[]} changes
   * @param {string} user
   */
  #viewOf(item, changes = [], user) {
    const overlay = changes.map(({ id }) => id).join();
    if (!item.view || item.overlay !== overlay) {
      item.view = view(item.base, changes, user, {});
      item.overlay = overlay;
    }
    return item.view;
  }

  /**
   * @param {SendHandle} handle
   * @param {SendHandle[]} changes
   * @param {string} user
   */
  #viewOfWaiting(handle, changes = [], user) {
    const overlay = [handle.state, handle.error?.code, user, ...changes.map(({ id }) => id)].join();
    const known = this.#waiting.get(handle);
    if (known?.overlay === overlay) return known.view;
    const { body, reply_to, mentions } = handle.fields;
    const base = folded({ id: handle.id, from: user, ts: handle.at, body, reply_to, mentions });
    const made = view(base, changes, user, { status: handle.state, handle, error: handle.error ?? undefined });
    this.#waiting.set(handle, { view: made, overlay });
    return made;
  }
}

/** As JSON knows it. @param {import("./fold.js").Folded} base */
const plain = (base) => ({ ...base, reactions: [...base.reactions.values()].map((one) => ({ ...one, users: [...one.users] })) });

/**
 * Whether `a` comes after `b` in the room, as far as their cursors tell.
 * @param {{cursor?: string}} a
 * @param {{cursor?: string}} b
 */
function isAfter(a, b) {
  return a.cursor != null && b.cursor != null && (compareCursors(a.cursor, b.cursor) ?? 0) > 0;
}

/**
 * @param {import("./fold.js").Folded} base
 * @param {SendHandle[]} changes of one's own that are under way
 * @param {string} user
 * @param {Pick<Partial<MessageView>, "status" | "handle" | "error">} more
 * @returns {MessageView}
 */
function view(base, changes, user, more) {
  const shown = { ...base, reactions: new Map(base.reactions) };
  for (const { id, at, fields } of changes) apply(shown, { ...fields, id, from: user, ts: Math.max(at, shown.edited_at ?? 0) });
  const { id, from, ts, cursor, body, kind, reply_to, mentions = [], edited_at, deleted_at, annotations = {}, replies } = shown;
  const isDeleted = deleted_at != null;
  const reactions = [...shown.reactions.values()].map(({ key, count, users }) =>
    Object.freeze({ key, count, users: Object.freeze([...users]), mine: users.has(user) }),
  );
  return Object.freeze({
    key: refOf(base),
    id,
    from,
    ts,
    cursor,
    body: isDeleted ? undefined : body,
    ...(kind === "system" && { kind }),
    reply_to: typeof reply_to === "string" ? longRef(from, reply_to) : undefined,
    mentions,
    own: from === user,
    status: "sent",
    changing: changes.length > 0,
    edited_at,
    deleted_at,
    reactions: isDeleted ? [] : reactions,
    annotations: isDeleted ? {} : annotations,
    replies,
    ...more,
  });
}
