// A small client of natter's native protocol (natter.v1). The chat page on top of it is page.js.
//
// It keeps one promise: `cursor` is the position of the last message it handed out, so a reconnect or a reload asks for
// exactly what is missing.

const SUBPROTOCOL = "natter.v1";
const BACKOFF_BASE_MS = 250;
const BACKOFF_CAP_MS = 10_000;
const LATER_MS = 5_000; // at least, where the edge says "later"
const HEALTHY_MS = 5_000; // a connection that lived this long starts the backoff anew
const CALL_MS = 10_000; // an edge answers a publish within 5 s, whatever happens behind it
const QUIET_MS = 25_000; // after so long without a frame we ask whether the edge is still there; CALL_MS later it is not
const JOIN_MS = 15_000;
const READ_EVERY_MS = 300; // between two moves of our read marker
const LOOK_AGAIN_MS = 2_000; // at least, before the list of who is here is asked for once more
const WAIT_MS = 15_000; // a message is repeated by itself after at most so long; longer waits are for its writer to decide
const LISTED = 1_000; // people, and readers: the first page of the list, which is as long as the edge makes one

// What close codes advise (1006 and unknown ones below 4000: come back).
const NEW_TOKEN = 4001;
const NEVER = new Set([1002, 1003, 1007, 1009, 4002, 4004, 4006]);
const LATER = new Set([1011, 4005]);
const REASONS = new Map([
  [4001, "the token is not valid or has expired"],
  [4002, "the token was revoked"],
  [4003, "this tab read too slowly"],
  [4004, "protocol error"],
  [4005, "too many sessions or commands"],
  [4006, "the session was ended by the service"],
  [4010, "the edge is shutting down"],
]);

/**
 * One session that follows one room, or none, through reconnects, and watches all rooms of its user.
 *
 * A session that may not be in its room, or not any more, goes on without it: its state is `out`.
 *
 * Events (CustomEvent, data in `detail`): `state` {state, why?, retryMs?}, `joined` {cursor, replay, reset?, reason?},
 * `msg`, `typing`, `people` {user?, info?, state?, counted?} (`here`, `people` or `named` changed; with a user where one
 * came or left, `counted` where names are not told any more), `readers` (`readers` changed), `watching` {rooms, next?},
 * `inbox` {rooms, gone?}, `token_expiring`, `kicked` {code}, `refused` {code, message, retry}.
 */
export class Natter extends EventTarget {
  #url; #token; #room;
  #socket = null;
  #opened = 0;
  #heard = 0; // when the last frame came; the edge's WebSocket pings are not told to a page
  #quiet = 0; // timer
  #attempt = 0;
  #retry = 0; // timer
  #leave = 0; // timer: told to go elsewhere
  #stopped = false;
  #final = false; // whether the edge has ended it for another reason than the token's end
  #out = false; // whether it may not be in its room
  #rid = 0;
  #calls = new Map(); // rid -> {resolve, reject, timer}
  #presence = true; // whether to ask for it; until the edge says that it is off, or that the token does not cover it
  #early = null; // presence pushes that came while the list is asked for
  #look = 0; // timer
  #wanted = null; // the cursor that our read marker shall have
  #told = null; // the one that the edge was told last
  #telling = false;

  /** @param {{url: string, token: string, room?: string, cursor?: string}} options */
  constructor({ url, token, room, cursor }) {
    super();
    this.#url = url;
    this.#token = token;
    this.#room = room;
    this.cursor = cursor ?? null;
    this.joined = false;
    this.user = userOf(token);
    this.here = null; // how many people are in the room; null where that is not told
    this.people = new Map(); // user -> info: who they are, as far as that is told
    this.named = false; // whether `people` are all who are here, and nobody else
    this.readers = new Map(); // user -> cursor up to which they have read
  }

  connect() {
    clearTimeout(this.#retry);
    this.#emit("state", { state: "connecting" });
    const socket = new WebSocket(this.#url, [SUBPROTOCOL, `bearer.${this.#token}`]);
    this.#socket = socket;
    this.#opened = 0;
    setTimeout(() => {
      if (socket === this.#socket && !this.#opened) this.#lost(1006, "the edge does not answer");
    }, CALL_MS);
    socket.onopen = () => {
      if (socket !== this.#socket) return;
      this.#opened = this.#heard = performance.now();
      this.#watch();
      this.#watchRooms();
      if (this.#room && !this.#out) this.#join();
      else this.#emit("state", { state: this.#out ? "out" : "connected" });
    };
    socket.onmessage = (event) => {
      if (socket !== this.#socket) return;
      this.#heard = performance.now();
      this.#receive(event.data);
    };
    socket.onclose = (event) => {
      if (socket === this.#socket) this.#lost(event.code, event.reason);
    };
  }

  /** Ends it; no event follows. */
  stop() {
    this.#stopped = true;
    clearTimeout(this.#retry);
    // What was read a moment ago must not count as unread.
    if (this.#owed) this.#sendRead().catch(() => {});
    this.#drop(1000);
  }

  /** Connects at once instead of at the end of the wait; a connection that is there is asked whether it still works. */
  hurry() {
    if (this.#stopped) return;
    if (!this.#socket) this.connect();
    else if (this.#opened) this.#probe();
  }

  /** Notices a connection on which nothing comes any more, though it was never closed. Costs nothing while frames come. */
  #watch() {
    clearTimeout(this.#quiet);
    // Not at once where nothing has come for long: a socket that is closing answers no probe.
    const wait = Math.max(1_000, this.#heard + QUIET_MS - performance.now());
    this.#quiet = setTimeout(() => {
      if (performance.now() - this.#heard < QUIET_MS) this.#watch();
      else this.#probe();
    }, wait);
  }

  /** Asks for a sign of life. Where none comes, `call` gives the connection up. */
  #probe() {
    clearTimeout(this.#quiet);
    const socket = this.#socket;
    const watch = () => socket === this.#socket && this.#watch();
    this.call("ping").then(watch, watch);
  }

  /**
   * Publishes `fields` under `id` until the edge acknowledges it; the same id each time, so it is stored once.
   * Rejects with {code, message} when the edge will never take it; `closed` if the session was stopped or needs a new token:
   * it may be sent in another one. `wait` is told of an error after which it is repeated.
   */
  async publish(id, fields, wait) {
    for (let attempt = 0; ; attempt += 1) {
      if (this.#stopped) throw { code: this.#final ? "ended" : "closed", message: "the session has ended" };
      if (this.#out) throw { code: "out", message: "this session is not in the room" };
      try {
        if (this.joined) return await this.call("send", { room: this.#room, id, ...fields });
      } catch (error) {
        if (!error.retry || error.retry_after_ms > WAIT_MS) throw error;
        if (error.retry_after_ms != null) {
          wait(error);
          await sleep(error.retry_after_ms);
          continue;
        }
      }
      if (this.joined) await sleep(jitter(attempt));
      else await this.#comeback();
    }
  }

  /** Until joined again, or a second has passed: a session that was stopped meanwhile must be noticed. */
  #comeback() {
    return new Promise((resolve) => {
      const over = new AbortController(); // or each second leaves a listener behind
      const done = () => {
        over.abort();
        clearTimeout(timer);
        resolve();
      };
      const timer = setTimeout(done, 1_000);
      this.addEventListener("joined", done, { signal: over.signal });
    });
  }

  typing() {
    if (this.joined) this.call("typing", { room: this.#room }).catch(() => {});
  }

  /** Asks once more who is here, where that is not known. */
  look(afterMs = LOOK_AGAIN_MS * (1 + Math.random())) {
    if (this.named || this.here == null) return;
    this.#look ||= setTimeout(() => {
      this.#look = 0;
      this.#lookAround();
    }, afterMs);
  }

  /** Moves this user's read marker to `cursor`, soon; only ever forward. */
  read(cursor) {
    if (cursor == null || (this.#wanted != null && reaches(this.#wanted, cursor))) return;
    this.#wanted = cursor;
    this.#tellRead();
  }

  async #tellRead() {
    if (this.#telling) return;
    this.#telling = true;
    while (this.#owed) {
      const cursor = this.#wanted;
      try {
        const { cursor: marker } = await this.#sendRead();
        this.#told = cursor;
        this.#hasRead(this.user, marker);
      } catch (error) {
        if (!error.retry) this.#told = cursor; // not to be had here
      }
      await sleep(READ_EVERY_MS);
    }
    this.#telling = false;
  }

  get #owed() {
    return this.joined && this.#wanted != null && this.#wanted !== this.#told;
  }

  #sendRead() {
    return this.call("read", { room: this.#room, cursor: this.#wanted });
  }

  /**
   * Sends a command and gives its reply; rejects with {code, message, retry}. Where nothing at all came in the time for an
   * answer, the connection is taken for dead: what is repeated then goes over a new one.
   */
  call(op, fields = {}) {
    const socket = this.#socket;
    if (socket?.readyState !== WebSocket.OPEN) {
      return Promise.reject({ code: "disconnected", message: "not connected", retry: true });
    }
    const rid = (this.#rid += 1);
    const sent = performance.now();
    return new Promise((resolve, reject) => {
      const timer = setTimeout(() => {
        this.#calls.delete(rid);
        reject({ code: "timeout", message: `no answer to ${op}`, retry: true });
        if (socket === this.#socket && this.#heard <= sent) this.#lost(1006, "the edge does not answer");
      }, CALL_MS);
      this.#calls.set(rid, { resolve, reject, timer });
      socket.send(JSON.stringify({ op, rid, ...fields }));
    });
  }

  // The reply is handled by a callback of `#receive` and not by awaiting: the messages behind it may already be in the
  // browser's queue, and must find the session joined.
  #join() {
    const socket = this.#socket;
    const rid = (this.#rid += 1);
    const again = (attempt) => {
      if (socket === this.#socket) setTimeout(() => socket === this.#socket && this.#join(), jitter(attempt));
    };
    const timer = setTimeout(() => {
      this.#calls.delete(rid);
      if (socket === this.#socket) this.#lost(1006, "no answer to join");
    }, JOIN_MS);
    this.#calls.set(rid, {
      timer,
      resolve: (joined) => {
        this.joined = true;
        if (joined.cursor != null) this.cursor = joined.cursor;
        this.#emit("state", { state: "connected" });
        this.#meet(joined);
        this.#emit("joined", joined);
      },
      reject: (error) => {
        if (error.code === "disconnected") return; // `#lost` takes care
        if (this.#presence && (error.code === "forbidden" || error.code === "bad_request")) {
          this.#presence = false;
          this.#join();
          return;
        }
        this.#emit("refused", error);
        if (error.retry) again(3);
        else this.#leaveRoom();
      },
    });
    const since = this.cursor ?? undefined; // `undefined` is left out
    const wants = { presence: this.#presence || undefined, read: true };
    socket.send(JSON.stringify({ op: "join", rid, room: this.#room, since, ...wants }));
  }

  /** The session may not be in its room, or not any more. */
  #leaveRoom() {
    this.#out = true;
    this.joined = false;
    this.here = null;
    this.#early = null;
    clearTimeout(this.#look);
    this.#look = 0;
    this.#emit("people", {});
    this.#emit("state", { state: "out" });
  }

  async #watchRooms() {
    const watching = await this.#ask("watch", { mine: true });
    if (watching) this.#emit("watching", watching);
  }

  /** After a join: who is here, and who has read up to where. */
  #meet(joined) {
    if (joined.reset) {
      this.readers.clear();
      this.#wanted = this.#told = null;
    }
    if (this.#presence) this.#lookAround();
    if (joined.cursor == null) return; // an ephemeral room: nothing to have read
    if (joined.marker != null) this.#hasRead(this.user, joined.marker);
    // An edge that died may have taken our last marker with it.
    if (this.#wanted != null && !reaches(joined.marker ?? "", this.#wanted)) {
      this.#told = null;
      this.#tellRead();
    }
    this.#ask("readers").then((page) => {
      for (const { user, cursor } of page?.readers ?? []) this.#hasRead(user, cursor);
    });
  }

  /** Asks for a list, by default of the room, until this connection answers; null where it refuses. */
  async #ask(op, fields = { room: this.#room, limit: LISTED }) {
    const socket = this.#socket;
    for (let attempt = 1; socket === this.#socket; attempt += 1) {
      try {
        return await this.call(op, fields);
      } catch (error) {
        if (!error.retry) break;
      }
      await sleep(jitter(attempt));
    }
    return null;
  }

  async #lookAround() {
    const early = [];
    this.#early = early;
    const page = await this.#ask("presence");
    if (early !== this.#early) return; // of an earlier join
    this.#early = null;
    this.here = page?.count ?? null;
    this.people = new Map(page?.users?.map(({ user, info }) => [user, info]));
    this.named = this.people.size === this.here;
    this.#emit("people", {});
    // Older than the list or newer: what is true comes last.
    for (const push of early) this.#comeOrGo(push);
  }

  #comeOrGo({ count, user, state, info }) {
    if (this.here == null) return;
    if (count != null) {
      // Many are here, or come and go: from now on the names are of the past.
      this.here = count;
      this.named = false;
      this.#emit("people", { counted: true });
    } else if (!this.named) {
      this.look(); // names again; all in the room are told at once, and shall not ask in the same moment
    } else {
      const known = this.people.has(user);
      const details = info ?? this.people.get(user);
      if (state === "leave") this.people.delete(user);
      else this.people.set(user, details);
      this.here = this.people.size;
      this.#emit("people", known === (state === "leave") ? { user, info: details, state } : {});
    }
  }

  /** Whoever says something has read what was before. Only those known: a program that publishes need not be a reader. */
  #hasSaid({ from, cursor, kind = "message" }) {
    if (cursor == null || kind !== "message") return;
    if (this.readers.has(from) || this.people.has(from)) this.#hasRead(from, cursor);
  }

  #hasRead(user, cursor) {
    const marker = this.readers.get(user);
    if (marker != null && reaches(marker, cursor)) return;
    this.readers.set(user, cursor);
    this.#emit("readers", {});
  }

  #receive(text) {
    let frame;
    try {
      frame = JSON.parse(text);
    } catch {
      return; // not ours; the next one may be
    }
    if (frame.rid != null) {
      const call = this.#calls.get(frame.rid);
      if (!call) return; // late
      this.#calls.delete(frame.rid);
      clearTimeout(call.timer);
      if (frame.op === "error") call.reject(frame);
      else call.resolve(frame);
      return;
    }
    if (frame.room != null && frame.room !== this.#room) return;
    switch (frame.op) {
      case "msg":
        if (frame.cursor != null) this.cursor = frame.cursor;
        this.#emit("msg", frame);
        this.#hasSaid(frame);
        break;
      case "presence":
        if (this.#early) this.#early.push(frame);
        else this.#comeOrGo(frame);
        break;
      case "read":
        this.#hasRead(frame.user, frame.cursor);
        break;
      case "kicked":
        if (frame.code === "reset") {
          // The room was made anew: our cursor tells the edge so, and it answers with `reset`.
          this.joined = false;
          this.#join();
        } else {
          this.#leaveRoom();
          this.#emit("kicked", frame);
        }
        break;
      case "reconnect":
        clearTimeout(this.#leave);
        this.#leave = setTimeout(() => {
          this.#attempt = 0;
          this.#drop(1000);
          this.connect();
        }, frame.after_ms ?? 0);
        break;
      case "error":
        this.#emit("refused", frame);
        break;
      default:
        this.#emit(frame.op, frame);
    }
  }

  #lost(code, reason) {
    const lived = this.#opened ? performance.now() - this.#opened : 0;
    this.#drop();
    const why = REASONS.get(code) ?? reason;
    if (code === NEW_TOKEN || NEVER.has(code)) {
      this.#final = code !== NEW_TOKEN;
      this.#end(`${why || "closed"} (${code})`);
      return;
    }
    if (lived >= HEALTHY_MS) this.#attempt = 0;
    const retryMs = jitter(this.#attempt) + (LATER.has(code) ? LATER_MS : 0);
    this.#attempt += 1;
    this.#emit("state", { state: "reconnecting", why, retryMs });
    this.#retry = setTimeout(() => this.connect(), retryMs);
  }

  #end(why) {
    this.#stopped = true;
    this.#drop(1000);
    this.#emit("state", { state: "closed", why });
  }

  #drop(code) {
    const socket = this.#socket;
    this.#socket = null;
    this.joined = false;
    this.#early = null;
    clearTimeout(this.#quiet);
    clearTimeout(this.#look);
    this.#look = 0;
    clearTimeout(this.#leave);
    const calls = [...this.#calls.values()];
    this.#calls.clear();
    for (const call of calls) {
      clearTimeout(call.timer);
      call.reject({ code: "disconnected", message: "the connection was lost", retry: true });
    }
    // Nobody waits for the edge to agree: nothing that this socket still says is heard.
    socket?.close(code);
  }

  #emit(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}

/**
 * Whether `marker` is at `cursor` or beyond, both of one room. To a client cursors are opaque; their wire form, which
 * docs/protocol.md documents (`origin.epoch.seq.fingerprint`, several joined with `_`), is needed only to compare them.
 */
export function reaches(marker, cursor) {
  const places = (text) => text.split("_").map((place) => place.split("."));
  const seqs = new Map(places(marker).map(([origin, epoch, seq]) => [`${origin}.${epoch}`, Number(seq)]));
  return places(cursor).every(([origin, epoch, seq]) => (seqs.get(`${origin}.${epoch}`) ?? 0) >= Number(seq));
}

/** Exponential backoff with full jitter. */
function jitter(attempt) {
  return Math.random() * Math.min(BACKOFF_CAP_MS, BACKOFF_BASE_MS * 2 ** attempt);
}

function sleep(ms) {
  return new Promise((resolve) => setTimeout(resolve, ms));
}

/** A new message id: 48 bits of time and 80 of chance in Crockford's base 32 (a ULID). */
export function newId() {
  const alphabet = "0123456789ABCDEFGHJKMNPQRSTVWXYZ";
  let time = Date.now();
  let head = "";
  for (let i = 0; i < 10; i += 1) {
    head = alphabet[time % 32] + head;
    time = Math.floor(time / 32);
  }
  return head + Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => alphabet[byte % 32]).join("");
}

/** What a token says; only for display, the edge is the judge. */
function claimsOf(token) {
  try {
    const claims = token.split(".")[1].replaceAll("-", "+").replaceAll("_", "/");
    const bytes = Uint8Array.from(atob(claims), (c) => c.charCodeAt(0));
    return JSON.parse(new TextDecoder().decode(bytes)) ?? {};
  } catch {
    return {};
  }
}

/** The user a token is for. */
export const userOf = (token) => claimsOf(token).sub ?? "";

/** The rooms that a token covers, with its rights there. */
export function grantsOf(token) {
  const { grants } = claimsOf(token);
  return Array.isArray(grants) ? grants : [];
}
