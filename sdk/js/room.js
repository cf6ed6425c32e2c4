// A room: the membership through reconnects, its cursor, messages in order and once, and everything that is done in it.

import { Emitter } from "./emitter.js";
import { NATTER, NatterError, backoff, newId, reaches, refOf } from "./protocol.js";

const JOIN_MS = 15_000;
const CATCH_UP_MS = 5_000; // the outbox waits at most so long for the backlog
const LINGER_MS = 1_000; // a room that nobody holds any more is left so much later: a page that changes holds it again
const SEEN = 4_096; // messages that are known not to be handed out twice
const TYPING_MS = 2_500; // between two signs of typing
const READ_MS = 300; // between two moves of the read marker
const WAITING = 10_000; // messages that wait for the reader of an iterator

/** @typedef {import("./natter.js").Natter} Natter */
/** @typedef {import("./protocol.js").Message} Message */
/** @typedef {import("./protocol.js").Joined} Joined */
/** @typedef {import("./protocol.js").Page} Page */
/** @typedef {import("./protocol.js").RoomRecord} RoomRecord */
/** @typedef {import("./outbox.js").SendHandle} SendHandle */
/** @typedef {string | {from: string, id: string}} Ref */

/**
 * `out`: the room can't be joined, or the user was taken out of it; `code` says why. Only another `join` tries again.
 * @typedef {{name: "idle" | "joining" | "joined" | "out", code?: string, message?: string}} RoomState
 */

/**
 * What is missing is between `since` and `cursor`; both may be unknown.
 * @typedef {{reason: string, since?: string, cursor?: string}} Reset
 */

/**
 * @typedef {object} RoomEvents
 * @property {Message} message every message, edit, reaction and so on, in the order of the room, each once
 * @property {{user: string}} typing
 * @property {import("./protocol.js").PresencePush} presence
 * @property {{user: string, cursor: string}} read
 * @property {Reset} reset messages may be missing here
 * @property {Joined} joined after each join; after `reset` where there is one
 * @property {RoomState} state
 * @property {SendHandle} outbox one's own message was added, sent, has failed, or was taken out
 */

/** @typedef {{id?: string, reply_to?: Ref, mentions?: string[]}} SendOptions */

/**
 * `client.room("chat:lobby")` gives it; there is one of each name.
 * @extends {Emitter<RoomEvents>}
 */
export class Room extends Emitter {
  /** @type {Natter} */ #client;
  #asked = false; // by `join`
  #holds = 0;
  #watchers = 0; // of these, who want to know who comes and goes
  #presenceAsked = false;
  #presenceOff = false; // the namespace has none, or the token does not cover it
  /** @type {RoomState} */ #state = Object.freeze({ name: "idle" });
  #joins = 0; // counts joins: an answer to an earlier one is not heard
  #attempt = 0;
  #told = false; // whether the membership that there is, or that is asked for, includes presence
  #wasIn = false;
  /** @type {Set<string>} */ #seen = new Set();
  #replay = 0; // messages of the backlog that are still to come
  /** @type {ReturnType<typeof setTimeout> | undefined} */ #again;
  /** @type {ReturnType<typeof setTimeout> | undefined} */ #linger;
  /** @type {ReturnType<typeof setTimeout> | undefined} */ #catchUp;
  /** @type {{resolve: (joined: Joined) => void, reject: (error: NatterError) => void}[]} */ #waiting = [];
  /** @type {Joined | null} */ #joined = null;
  #typed = 0;
  #typingOff = false;
  /** @type {string | null} */ #toRead = null; // where the read marker shall be
  /** @type {string | null} */ #hasRead = null; // where the edge was told that it is
  /** @type {ReturnType<typeof setTimeout> | undefined} */ #reading;
  #readAttempt = 0;

  /**
   * @internal
   * @param {Natter} client
   * @param {string} name
   */
  constructor(client, name) {
    super();
    this.#client = client;
    this.name = name;
    /**
     * The place of the last message that was handed out. `join` continues there.
     * @type {string | null}
     */
    this.cursor = null;
    /**
     * The read marker of the user, as far as it is known.
     * @type {string | null}
     */
    this.marker = null;
  }

  get client() {
    return this.#client;
  }

  get state() {
    return this.#state;
  }

  // Being in it -----------------------------------------------------------------------------------------------------------

  /**
   * Joins, and stays in the room over reconnects, until `leave`. Resolves when the room is joined, rejects where it is
   * refused; while there is no connection it waits. `since`: a cursor that was kept; `null`: from now on. Without it the room
   * continues where it was left, if it was joined before. `presence`: also tell who comes and goes.
   * @param {{since?: string | null, presence?: boolean}} [options]
   * @returns {Promise<Joined>}
   */
  join({ since, presence = false } = {}) {
    const anew = since !== undefined && since !== this.cursor;
    if (since !== undefined) this.cursor = since;
    this.#asked = true;
    this.#presenceAsked ||= presence;
    if (anew && this.#state.name !== "idle") {
      this.#joins += 1; // an answer about another place is not heard
      this.#stop();
      this.#become({ name: "joining" });
    }
    const joined = new Promise((resolve, reject) => this.#waiting.push({ resolve, reject }));
    joined.catch(() => {}); // the state says it too
    this.#enter();
    return joined;
  }

  /** Leaves. Stores and hooks that show the room keep it. */
  leave() {
    this.#asked = this.#presenceAsked = false;
    this.#update();
  }

  /**
   * Is in the room until the function that it gives is called. What shows a room holds it.
   * @param {{presence?: boolean}} [options]
   * @returns {() => void}
   */
  hold({ presence = false } = {}) {
    this.#holds += 1;
    if (presence) this.#watchers += 1;
    clearTimeout(this.#linger);
    this.#enter();
    let held = true;
    return () => {
      if (!held) return;
      held = false;
      this.#holds -= 1;
      if (presence) this.#watchers -= 1;
      clearTimeout(this.#linger);
      this.#linger = setTimeout(() => this.#update(), LINGER_MS);
    };
  }

  /** `for await (const message of room)`: see `listen`. */
  [Symbol.asyncIterator]() {
    return this.listen();
  }

  /**
   * The messages from now on, or after `since`: joins, and leaves at the end. Where messages may be missing there is one of
   * kind `reset`, from `$natter`, whose body has the reason. Throws where the room is refused, or where the reader is 10,000
   * messages behind. `signal` ends it.
   * @param {{since?: string | null, signal?: AbortSignal}} [options]
   * @returns {AsyncGenerator<Message, void, void>}
   */
  async *listen({ since, signal } = {}) {
    /** @type {Message[]} */
    const waiting = [];
    /** @type {NatterError | null} */
    let failed = null;
    let wake = () => {};
    const add = (/** @type {Message} */ message) => {
      if (waiting.length < WAITING) waiting.push(message);
      else failed ??= new NatterError("too_slow", `more than ${WAITING} messages wait to be read`);
      wake();
    };
    const end = () => wake();
    signal?.addEventListener("abort", end);
    if (since !== undefined) this.cursor = since;
    const offs = [
      () => signal?.removeEventListener("abort", end),
      this.on("message", add),
      this.on("reset", (reset) => add(this.#gap(reset))),
      this.on("state", ({ name, code = "out", message = "not in the room" }) => {
        if (name === "out") failed ??= new NatterError(code, message);
        wake();
      }),
      this.#client.on("state", ({ name, reason }) => {
        if (name === "closed") failed ??= new NatterError("closed", `the client is closed: ${reason}`);
        wake();
      }),
      this.hold(),
    ];
    try {
      while (!signal?.aborted) {
        const message = waiting.shift();
        if (message) yield message;
        else if (failed) throw failed;
        else await new Promise((resolve) => (wake = () => resolve(undefined)));
      }
    } finally {
      for (const off of offs) off();
    }
  }

  /**
   * @param {Reset} reset
   * @returns {Message}
   */
  #gap({ reason, since, cursor }) {
    const ts = Date.now();
    return { room: this.name, id: `reset-${ts}`, from: NATTER, ts, kind: "reset", cursor, body: { reason, since } };
  }

  get #wanted() {
    return this.#asked || this.#holds > 0;
  }

  get #wantsPresence() {
    return (this.#presenceAsked || this.#watchers > 0) && !this.#presenceOff;
  }

  /** Somebody wants to be in it: also where it was refused before. */
  #enter() {
    if (this.#state.name === "out" || this.#state.name === "idle") this.#become({ name: "joining" });
    const { name } = this.#client.state;
    if (name === "closed") {
      this.#refuse(new NatterError("closed", `the client is closed: ${this.#client.state.reason}`));
      return;
    }
    this.#client.connect();
    if (this.#state.name === "joined" && this.#joined) this.#grant(this.#joined);
    this.#update();
  }

  /** Joins, joins anew, or leaves, as is wanted. */
  #update() {
    if (!this.#wanted) {
      const { name } = this.#state;
      if (name === "idle") return;
      this.#joins += 1;
      this.#stop();
      const there = name === "joined" || name === "joining";
      this.#become({ name: "idle" });
      this.#refuse(new NatterError("left", "the room was left"));
      if (there && this.#client._ready) this.#client._command("leave", { room: this.name }, () => {});
    } else if (this.#client._ready && this.#state.name !== "out") {
      const joining = this.#state.name === "joined" || this.#again !== undefined || this.#pending;
      if (!joining || (this.#wantsPresence && !this.#told)) this.#join();
    }
  }

  #pending = false; // whether a join is under way

  // The reply is handled in the turn in which it is read: the messages behind it must find the room joined.
  #join() {
    const number = (this.#joins += 1);
    const since = this.cursor ?? undefined;
    const presence = this.#wantsPresence;
    this.#stop();
    this.#told = presence;
    this.#pending = true;
    const fields = { room: this.name, since, presence: presence || undefined, read: true };
    this.#client._command("join", fields, (error, joined) => {
      if (number !== this.#joins) return;
      this.#pending = false;
      if (!error) this.#enterAt(joined, since);
      else this.#joinFailed(error, presence);
    }, JOIN_MS);
  }

  /**
   * @param {NatterError} error
   * @param {boolean} presence
   */
  #joinFailed(error, presence) {
    if (error.code === "disconnected") return; // the next connection joins
    if (presence && (error.code === "forbidden" || error.code === "bad_request")) {
      this.#presenceOff = true;
      this.#join();
    } else if (error.code === "bad_cursor" && this.cursor != null) {
      const since = this.cursor;
      this.cursor = null;
      this._emit("reset", { reason: "bad_cursor", since });
      this.#join();
    } else if (error.retry) {
      this.#again = setTimeout(() => {
        this.#again = undefined;
        this.#update();
      }, error.retryAfterMs ?? backoff((this.#attempt += 1)));
    } else {
      this.#out(error.code, error.message);
    }
  }

  /**
   * @param {Joined} joined
   * @param {string | undefined} since
   */
  #enterAt(joined, since) {
    const before = this.#wasIn;
    this.#wasIn = true;
    this.#attempt = 0;
    this.#joined = joined;
    this.cursor = joined.cursor ?? null;
    this.#replay = joined.replay;
    if (joined.replay) this.#catchUp = setTimeout(() => this.#caughtUp(), CATCH_UP_MS);
    const again = this.#state.name === "joined"; // only to hear more of it
    this.#become({ name: "joined" });
    if (joined.reset) {
      this.marker = this.#toRead = this.#hasRead = null;
      this._emit("reset", { reason: joined.reason ?? "unknown", since, cursor: joined.cursor });
    } else if (joined.cursor == null && before && !again) {
      this._emit("reset", { reason: "ephemeral" }); // what was said meanwhile is nowhere
    }
    if (joined.marker != null) this.#mark(joined.marker);
    // An edge that died may have taken our last marker with it.
    if (this.#toRead != null && !reaches(joined.marker ?? "", this.#toRead)) {
      this.#hasRead = null;
      this.#sendRead();
    }
    this._emit("joined", joined);
    this.#grant(joined);
    if (!joined.replay) this.#caughtUp();
  }

  #caughtUp() {
    clearTimeout(this.#catchUp);
    this.#replay = 0;
    this.#client.outbox._flush(this.name);
  }

  /**
   * @param {string} code
   * @param {string} message
   */
  #out(code, message) {
    this.#joins += 1;
    this.#stop();
    this.#presenceOff = false; // it may have been the room that was refused
    this.#become({ name: "out", code, message });
    this.#refuse(new NatterError(code, message));
    this.#client.outbox._flush(this.name); // the edge decides; a send needs no join
  }

  #stop() {
    clearTimeout(this.#again);
    clearTimeout(this.#catchUp);
    this.#again = undefined;
    this.#pending = false;
    this.#told = false;
    this.#replay = 0;
  }

  /** @param {RoomState} state */
  #become(state) {
    if (state.name === this.#state.name && state.code === this.#state.code) return;
    this.#state = Object.freeze(state);
    this._emit("state", this.#state);
  }

  /** @param {Joined} joined */
  #grant(joined) {
    for (const { resolve } of this.#waiting.splice(0)) resolve(joined);
  }

  /** @param {NatterError} error */
  #refuse(error) {
    for (const { reject } of this.#waiting.splice(0)) reject(error);
  }

  // From the client -------------------------------------------------------------------------------------------------------

  /** Whether it is wanted, and what was missed is not here yet. @internal */
  get _behind() {
    const { name } = this.#state;
    return name === "joining" || (name === "joined" && this.#replay > 0);
  }

  /** @internal */
  _open() {
    this.#update();
    if (this.#state.name === "idle") this.#sendRead();
  }

  /** @internal */
  _lost() {
    this.#joins += 1;
    this.#stop();
    clearTimeout(this.#reading);
    this.#reading = undefined;
    if (this.#state.name === "joined") this.#become({ name: "joining" });
  }

  /** The client is closed. @internal @param {string} reason */
  _closed(reason) {
    this.#refuse(new NatterError("closed", `the client is closed: ${reason}`));
  }

  /** @internal @param {any} frame */
  _push(frame) {
    const { op, room: _room, ...push } = frame;
    if (this.#state.name !== "joined") return; // left, or about to join anew, from where the cursor is
    if (op === "msg") {
      this.#hear({ room: this.name, ...push });
    } else if (op === "typing" || op === "presence") {
      this._emit(op, push);
    } else if (op === "read") {
      if (push.user === this.#client.user) this.#mark(push.cursor);
      this._emit("read", push);
    } else if (op === "kicked" && push.code === "reset") {
      // The log was made anew: our cursor tells the edge so, and it answers with `reset`.
      this.#become({ name: "joining" });
      this.#join();
    } else if (op === "kicked") {
      this.#out(push.code, `taken out of the room: ${push.code}`);
    }
  }

  /** @param {Message} message */
  #hear(message) {
    const { from, id, cursor } = message;
    if (cursor != null) this.cursor = cursor;
    const key = refOf(message);
    if (!this.#seen.has(key)) {
      this.#seen.add(key);
      if (this.#seen.size > SEEN) this.#seen.delete(/** @type {string} */ (this.#seen.values().next().value));
      if (from === this.#client.user) this.#client.outbox._heard(this.name, message);
      this._emit("message", message);
    }
    if (this.#replay > 0 && (this.#replay -= 1) === 0) this.#caughtUp();
  }

  // Saying something ------------------------------------------------------------------------------------------------------

  /**
   * Sends a message: at once, or when there is a connection. It is in the outbox until the edge has acknowledged it.
   * @param {any} body
   * @param {SendOptions} [options] `id`: a ULID by default
   * @returns {SendHandle}
   */
  send(body, { id = newId(), reply_to, mentions } = {}) {
    return this.#client.outbox._add(this.name, id, { body, reply_to: reply_to && refOf(reply_to), mentions });
  }

  /**
   * An answer to a message.
   * @param {Ref} message
   * @param {any} body
   * @param {SendOptions} [options]
   */
  reply(message, body, options) {
    return this.send(body, { ...options, reply_to: message });
  }

  /**
   * Replaces the body of a message.
   * @param {Ref} message
   * @param {any} body
   * @param {{mentions?: string[]}} [options]
   */
  edit(message, body, { mentions } = {}) {
    return this.#change("edit", message, { body, mentions });
  }

  /** Deletes a message, for everybody. @param {Ref} message */
  delete(message) {
    return this.#change("delete", message, {});
  }

  /**
   * Adds a reaction, or takes it back.
   * @param {Ref} message
   * @param {string} key such as "👍"
   * @param {boolean} [on]
   */
  react(message, key, on = true) {
    return this.#change("reaction", message, { body: on ? { key } : { key, remove: true } });
  }

  /**
   * Adds facts to a message; each field replaces the earlier one of its name.
   * @param {Ref} message
   * @param {object} fields
   */
  annotate(message, fields) {
    return this.#change("annotation", message, { body: fields });
  }

  /** @param {Ref} message */
  pin(message) {
    return this.#change("pin", message, {});
  }

  /** @param {Ref} message */
  unpin(message) {
    return this.#change("unpin", message, {});
  }

  /**
   * @param {string} kind
   * @param {Ref} message
   * @param {import("./outbox.js").Fields} fields
   */
  #change(kind, message, fields) {
    return this.#client.outbox._add(this.name, newId(), { kind, target: refOf(message), ...fields });
  }

  /** Tells the others that one is typing. May be called with each key: it is sent every 2.5 s. */
  typing() {
    const now = Date.now();
    if (this.#state.name !== "joined" || this.#typingOff || now - this.#typed < TYPING_MS) return;
    this.#typed = now;
    this.#client._command("typing", { room: this.name }, (error) => {
      this.#typingOff ||= error?.code === "bad_request"; // the namespace has none
    });
  }

  /**
   * Moves the read marker of the user up to a message, or up to the last one that came; never back. Sent every 300 ms at
   * most, and again after a reconnect where it may be lost.
   * @param {string | Message | null} [place] a cursor, or a message that has one
   */
  read(place = this.cursor) {
    const cursor = typeof place === "string" ? place : place?.cursor;
    if (cursor == null) return;
    const known = this.#toRead ?? this.marker;
    if (known != null && reaches(known, cursor)) return;
    this.#toRead = cursor;
    this.#sendRead();
  }

  /** @param {boolean} [now] */
  #sendRead(now = false) {
    const cursor = this.#toRead;
    if (cursor == null || cursor === this.#hasRead || !this.#client._ready || (this.#reading && !now)) return;
    const next = (/** @type {number} */ ms) => {
      this.#reading = setTimeout(() => {
        this.#reading = undefined;
        this.#sendRead();
      }, ms);
    };
    clearTimeout(this.#reading);
    next(READ_MS);
    this.#hasRead = cursor;
    this.#client._command("read", { room: this.name, cursor }, (error, reply) => {
      if (!error) {
        this.#readAttempt = 0;
        if (reply.cursor != null) this.#mark(reply.cursor);
      } else if (error.retry) {
        if (this.#hasRead === cursor) this.#hasRead = null;
        clearTimeout(this.#reading);
        this.#reading = undefined;
        if (this.#client._ready) next(Math.max(READ_MS, backoff((this.#readAttempt += 1))));
      } // else: there is no marker here, or not there
    });
  }

  /** The page goes away: what was read a moment ago must not count as unread. @internal */
  _leave() {
    this.#sendRead(true);
  }

  /** @param {string} cursor */
  #mark(cursor) {
    if (this.marker == null || !reaches(this.marker, cursor)) this.marker = cursor;
  }

  // Asking for something --------------------------------------------------------------------------------------------------

  /**
   * A page of history, the oldest message first; without `before`, `after`, `around` the newest page.
   * @param {{before?: string, after?: string, around?: string, limit?: number, thread?: string}} [options]
   * @returns {Promise<Page>}
   */
  history(options = {}) {
    return this.request("history", options);
  }

  /**
   * Search in this room.
   * @param {{q?: string, from?: string, mentions?: string[], reply_to?: string, before?: string, limit?: number}} query
   * @returns {Promise<{messages: Message[], next?: string, partial?: boolean}>}
   */
  search(query) {
    return this.request("search", query);
  }

  /**
   * Who is in the room.
   * @param {{after?: string, limit?: number}} [options]
   * @returns {Promise<{count: number, users?: import("./protocol.js").PresentUser[], next?: string}>}
   */
  presence(options = {}) {
    return this.request("presence", options);
  }

  /**
   * Who has read up to where.
   * @param {{after?: string, limit?: number}} [options]
   * @returns {Promise<{readers: {user: string, cursor: string, at: number}[], next?: string}>}
   */
  readers(options = {}) {
    return this.request("readers", options);
  }

  /** Its record: members, settings, pins. @returns {Promise<RoomRecord>} */
  record() {
    return this.request("room");
  }

  /**
   * Changes settings; with `version` only if the record still has that one.
   * @param {{title?: string, info?: any, archived?: boolean, frozen?: boolean, slow_mode_s?: number, assignee?: string, alert?: false, version?: string}} settings
   * @returns {Promise<RoomRecord>}
   */
  settings(settings) {
    return this.request("settings", settings);
  }

  /**
   * Adds a member, changes one, or removes one (`{state: "out"}`; oneself: leaves for good).
   * @param {string} user
   * @param {{role?: "reader" | "member" | "moderator" | "owner", state?: "in" | "out" | "banned", muted_until?: number}} [change]
   * @returns {Promise<RoomRecord>}
   */
  member(user, change = {}) {
    return this.request("member", { user, ...change });
  }

  /**
   * Mutes, pins or archives the room in one's own inbox.
   * @param {{muted?: boolean, pinned?: boolean, archived?: boolean}} change
   * @returns {Promise<void>}
   */
  async arrange(change) {
    await this.request("arrange", change);
  }

  /**
   * Any command in this room.
   * @param {string} op
   * @param {object} [fields]
   */
  request(op, fields = {}) {
    return this.#client.request(op, { room: this.name, ...fields });
  }

  /**
   * Uploads a file. What it gives goes into the `attachments` of a message's body.
   * @param {Blob & {name?: string}} file
   * @param {{name?: string, type?: string, onProgress?: (share: number) => void, signal?: AbortSignal}} [options]
   * @returns {Promise<{upload: string, name: string, type: string, size: number}>}
   */
  async upload(file, { name = file.name || "file", type = file.type || "application/octet-stream", onProgress, signal } = {}) {
    const { size } = file;
    const granted = await this.#client.http("POST", `rooms/${encodeURIComponent(this.name)}/uploads`, {
      body: { name, type, size },
      signal,
    });
    const { url, headers } = granted.put;
    await put(this.#client.address(url), headers, file, onProgress, signal);
    return { upload: granted.upload, name, type, size };
  }

  /**
   * Where an uploaded file is, for a short time; it needs no token there.
   * @param {string} upload
   * @returns {Promise<{url: string, expires: number}>}
   */
  async download(upload) {
    const path = `rooms/${encodeURIComponent(this.name)}/uploads/${encodeURIComponent(upload)}?redirect=false`;
    const { url, expires } = await this.#client.http("GET", path);
    return { url: this.#client.address(url), expires };
  }
}

/**
 * @param {string} url
 * @param {Record<string, string>} headers
 * @param {Blob} file
 * @param {((share: number) => void) | undefined} onProgress
 * @param {AbortSignal | undefined} signal
 */
async function put(url, headers, file, onProgress, signal) {
  signal?.throwIfAborted();
  const failed = (/** @type {number} */ status) => {
    const retry = status === 0 || status === 408 || status >= 500;
    return new NatterError("upload_failed", status ? `the storage answered ${status}` : "the storage did not answer", { retry, status });
  };
  if (!globalThis.XMLHttpRequest || !onProgress) {
    const response = await fetch(url, { method: "PUT", headers, body: file, signal }).catch((cause) => {
      signal?.throwIfAborted();
      throw new NatterError("upload_failed", "the storage did not answer", { retry: true, cause });
    });
    if (!response.ok) throw failed(response.status);
    onProgress?.(1);
    return;
  }
  // Only this tells how far it is.
  await new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    const abort = () => request.abort();
    request.open("PUT", url);
    for (const [name, value] of Object.entries(headers)) request.setRequestHeader(name, value);
    request.upload.onprogress = ({ loaded, total }) => onProgress(total ? loaded / total : 0);
    request.onload = () => (request.status < 300 ? resolve(undefined) : reject(failed(request.status)));
    request.onerror = () => reject(failed(0));
    request.onabort = () => reject(signal?.reason ?? failed(0));
    request.onloadend = () => signal?.removeEventListener("abort", abort);
    signal?.addEventListener("abort", abort);
    request.send(file);
  });
}
