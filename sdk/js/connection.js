// One session with an edge, through reconnects: the state machine, tokens, commands and their replies, signs of life.

import { Emitter } from "./emitter.js";
import { NatterError, adviceOf, backoff, claimsOf, errorOf } from "./protocol.js";

const SUBPROTOCOL = "natter.v1";
const CONNECT_MS = 10_000; // until a new connection must have answered
const CALL_MS = 10_000; // an edge answers a command within 5 s, whatever happens behind it
const QUIET_MS = 25_000; // after so long without a frame we ask whether the edge is still there; CALL_MS later it is not
const PROBE_MS = 5_000; // the same, where there is a reason to doubt (the page was hidden, the network changed)
const ASLEEP_MS = 60_000; // after so long the edge has ended the session: it does so after 45 s
const HEALTHY_MS = 5_000; // a connection that lived this long starts the back-off anew
const LATER_MS = 5_000; // at least, where the edge says "later"
const TOKEN_MS = 30_000; // for `getToken`
const TOKEN_LEFT_MS = 5_000; // a token that ends sooner is not used for a new connection
const MOST_CALLS = 4_096; // commands that wait for a reply

/**
 * The states, and what follows which:
 *
 * | from | to | when |
 * |---|---|---|
 * | `idle` | `connecting` | `connect`, or the first join, send or request |
 * | `connecting` | `online` | the edge has sent its first frame: the token is good |
 * | `connecting`, `online` | `offline` | no answer, no token, the connection was lost, the page was put aside |
 * | `online` | `connecting` | the edge drains: to another one, at once |
 * | `offline` | `connecting` | `retryAt` has come, or there is a reason to try earlier (the network, the page is back) |
 * | `idle`, `connecting`, `online`, `offline` | `closed` | `close`, or the edge or `getToken` said: do not come back |
 * | `closed` | `connecting` | `connect` |
 */
export const TRANSITIONS = Object.freeze({
  idle: ["connecting", "closed"],
  connecting: ["online", "offline", "closed"],
  online: ["offline", "connecting", "closed"],
  offline: ["connecting", "closed"],
  closed: ["connecting"],
});

/** @typedef {Readonly<{name: "idle" | "connecting" | "online" | "offline" | "closed", reason?: string, retryAt?: number}>} State */

/** @typedef {{reason: "first" | "expiring" | "refused", signal: AbortSignal}} TokenRequest */

/**
 * As much of a WebSocket as is needed; browsers, Node from 22 on, and the package `ws` have one.
 * @typedef {{new (url: string, protocols: string[]): any}} WebSocketClass
 */

/**
 * @typedef {object} ConnectionOptions
 * @property {string | string[]} url of the edge, or of several: `https://chat.example.org`, `wss://edge-1.example.org/ws`
 * @property {(request: TokenRequest) => string | null | Promise<string | null>} [getToken] gives a token of the user; `null`
 *   if there is none, which closes the client. Where it throws, it is asked again later
 * @property {string} [token] in place of `getToken`, where the token lives as long as is needed
 * @property {WebSocketClass} [WebSocket] where there is no global one (Node 20)
 * @property {typeof fetch} [fetch] for uploads and the other requests over HTTP
 */

/**
 * @typedef {object} Call
 * @property {(error: NatterError | null, reply?: any) => void} done
 * @property {ReturnType<typeof setTimeout>} timer
 */

/**
 * @template {Record<string, any>} Events
 * @extends {Emitter<Events & {state: State}>}
 */
export class Connection extends Emitter {
  /** @type {string[]} */ #urls;
  #turn = 0; // which of them
  /** @type {State} */ #state = Object.freeze({ name: "idle" });
  /** @type {ConnectionOptions["getToken"]} */ #getToken;
  /** @type {WebSocketClass} */ #WebSocket;
  /** @type {typeof fetch} */ #fetch;
  /** @type {string | null} */ #token = null;
  /** @type {string | null} */ #refused = null; // the token that the edge did not take
  /** @type {Promise<string> | null} */ #asking = null;
  #renewing = false;
  /** @type {any} */ #socket = null;
  #life = 0; // counts connections, also those that are only tried
  #opened = 0;
  #heard = 0; // when the last frame came; the edge's WebSocket pings are not told to a page
  #attempt = 0;
  #notBefore = 0; // the edge said "later"
  /** @type {ReturnType<typeof setTimeout> | undefined} */ #retry;
  /** @type {ReturnType<typeof setTimeout> | undefined} */ #quiet;
  /** @type {ReturnType<typeof setTimeout> | undefined} */ #drain;
  #rid = 0;
  /** @type {Map<number, Call>} */ #calls = new Map();
  /** @type {Set<(error: NatterError | null) => void>} */ #waiting = new Set(); // for the state `online`
  /** @type {(() => void) | null} */ #unlisten = null;

  /** @param {ConnectionOptions} options */
  constructor({ url, getToken, token, WebSocket: Socket = globalThis.WebSocket, fetch: get = globalThis.fetch }) {
    super();
    if (!Socket) throw new TypeError("there is no WebSocket here: pass one, `new Natter({ WebSocket, … })`");
    this.#urls = [url].flat().map(endpoint);
    if (this.#urls.length === 0) throw new TypeError("url: at least one");
    if (!getToken && !token) throw new TypeError("getToken, or token, is needed");
    this.#getToken = getToken;
    this.#token = token ?? null;
    this.#WebSocket = Socket;
    this.#fetch = (...args) => get(...args);
    /**
     * The user of the token; null before there was one.
     * @type {string | null}
     */
    this.user = null;
    if (token) this.user = claimsOf(token).sub ?? null;
  }

  /** What it is doing. A new object with each change. */
  get state() {
    return this.#state;
  }

  /** What the token says: `grants`, `info`, `exp`. Unchecked, only for what a page shows. */
  get claims() {
    return claimsOf(this.#token ?? "");
  }

  /** Begins, or begins again after `close`. */
  connect() {
    const { name } = this.#state;
    if (name === "idle" || name === "closed") {
      this.#attempt = this.#notBefore = 0;
      this.#refused = null;
      this.#listen();
      this.#open();
    } else if (name === "offline") {
      this.hurry();
    }
  }

  /** Ends it. What waits in the outbox stays there, until `connect`. */
  close() {
    this.#end("closed");
  }

  /** Tries at once instead of at `retryAt`; a connection that is there is asked whether it still works. */
  hurry() {
    if (this.#state.name === "online") this.#probe(PROBE_MS);
    else if (this.#state.name === "offline" && Date.now() >= this.#notBefore) this.#open();
  }

  /**
   * Sends a command and gives its reply. While there is no connection it waits for one, at most 10 s; a command whose
   * connection was lost is not repeated. Rejects with a `NatterError`.
   * @param {string} op
   * @param {object} [fields]
   * @returns {Promise<any>}
   */
  async request(op, fields = {}) {
    await this._online();
    return new Promise((resolve, reject) => {
      this._command(op, fields, (error, reply) => (error ? reject(error) : resolve(reply)));
    });
  }

  /**
   * A request over HTTP to the edge, with the token; the JSON of the answer, null where it is empty.
   * @param {string} method
   * @param {string} path below `/v1/`; what comes from people goes through `encodeURIComponent`
   * @param {{body?: any, headers?: Record<string, string>, signal?: AbortSignal}} [options]
   * @returns {Promise<any>}
   */
  async http(method, path, options = {}) {
    for (let again = false; ; again = true) {
      const token = this.#usable() ?? (await this.#askToken(again ? "refused" : this.#token ? "expiring" : "first"));
      try {
        return await this.#request(token, method, path, options);
      } catch (error) {
        if (again || !this.#getToken || !(error instanceof NatterError) || error.status !== 401) throw error;
        if (this.#token === token) this.#token = null;
      }
    }
  }

  /**
   * Where something of the edge is; `path` may be absolute.
   * @param {string} path
   */
  address(path) {
    const base = this.#urls[this.#turn].replace(/^ws/, "http").replace(/ws$/, "");
    // A path that begins with `/` is below the edge, also where a proxy has put that below a folder.
    return new URL(path.replace(/^\//, ""), base).href;
  }

  /**
   * Resolves while it is online.
   * @internal
   * @param {number} [ms]
   * @returns {Promise<void>}
   */
  async _online(ms = CALL_MS) {
    if (this.#state.name === "online") return;
    if (this.#state.name === "closed") throw new NatterError("closed", `the client is closed: ${this.#state.reason}`);
    this.connect();
    await new Promise((resolve, reject) => {
      const done = (/** @type {NatterError | null} */ error) => {
        this.#waiting.delete(done);
        clearTimeout(timer);
        if (error) reject(error);
        else resolve(undefined);
      };
      const timer = setTimeout(() => done(new NatterError("disconnected", "not connected", { retry: true })), ms);
      this.#waiting.add(done);
    });
  }

  /** Whether commands can be sent. @internal */
  get _ready() {
    return this.#opened > 0;
  }

  /**
   * Sends a command; `done` is called once, and in the same turn as the reply is read, so before any frame after it.
   * @internal
   * @param {string} op
   * @param {object} fields
   * @param {Call["done"]} done
   * @param {number} [ms] to wait for the reply
   */
  _command(op, fields, done, ms = CALL_MS) {
    if (!this._ready) {
      done(new NatterError("disconnected", "not connected", { retry: true }));
      return;
    }
    if (this.#calls.size >= MOST_CALLS) {
      done(new NatterError("limit", `${MOST_CALLS} commands wait for their replies`, { retry: true }));
      return;
    }
    const life = this.#life;
    const rid = (this.#rid += 1);
    const sent = Date.now();
    const timer = setTimeout(() => {
      this.#calls.delete(rid);
      done(new NatterError("timeout", `no answer to ${op}`, { retry: true }));
      // Where nothing at all has come, the connection is taken for dead.
      if (life === this.#life && this.#heard <= sent) this.#lost(1006, "no_answer");
    }, ms);
    this.#calls.set(rid, { done, timer });
    this.#socket.send(JSON.stringify({ op, rid, ...fields }));
  }

  /** Commands may be sent. @internal */
  _onOpen() {}

  /** The connection is gone; replies that were waited for have been refused. @internal */
  _onLost() {}

  /** A push. @internal @param {any} _frame */
  _onPush(_frame) {}

  /** Who the user is has become known. @internal */
  _onUser() {}

  /** The page goes away, perhaps for good: the last moment to send something. @internal */
  _onLeave() {}

  // The machine -----------------------------------------------------------------------------------------------------------

  /** @param {State} state */
  #become(state) {
    this.#state = Object.freeze(state);
    const { name, reason } = state;
    const error =
      name === "closed" ? new NatterError("closed", `the client is closed: ${reason}`) : name === "online" ? null : undefined;
    if (error !== undefined) for (const done of [...this.#waiting]) done(error);
    // @ts-ignore: a generic map of events can't be seen to have this one
    this._emit("state", this.#state);
  }

  /** @param {string} [reason] why it is done again */
  async #open(reason) {
    const life = this.#drop();
    this.#become(reason ? { name: "connecting", reason } : { name: "connecting" });
    const asked = this.#usable() == null;
    let token;
    try {
      token = this.#usable() ?? (await this.#askToken(this.#refused ? "refused" : "first"));
    } catch (error) {
      if (life !== this.#life) return;
      const { code, retry } = /** @type {NatterError} */ (error);
      if (retry) this.#wait(code);
      else this.#end(code);
      return;
    }
    if (life !== this.#life) return;
    if (asked && token === this.#refused) {
      this.#end("bad_token"); // the edge would refuse it again
      return;
    }
    const url = this.#urls[this.#turn];
    let socket;
    try {
      socket = new this.#WebSocket(url, [SUBPROTOCOL, `bearer.${token}`]);
    } catch (error) {
      // A page of https may not use ws; or the token has characters that no token has.
      this.#end(`cannot_connect: ${/** @type {Error} */ (error).message}`);
      return;
    }
    this.#socket = socket;
    this.#quiet = setTimeout(() => life === this.#life && this.#lost(1006, "no_answer"), CONNECT_MS);
    socket.onopen = () => {
      if (life !== this.#life) return;
      this.#opened = this.#heard = Date.now();
      // Its answer shows that the token is good, if nothing else does.
      this._command("ping", {}, () => {});
      this._onOpen();
    };
    socket.onmessage = (/** @type {{data: any}} */ { data }) => life === this.#life && this.#receive(data);
    socket.onerror = () => {}; // a close follows, with all that is told
    socket.onclose = (/** @type {{code: number, reason: string}} */ { code, reason: text }) =>
      life === this.#life && this.#lost(code, text);
  }

  /** @param {any} data */
  #receive(data) {
    this.#heard = Date.now();
    let frame;
    try {
      frame = JSON.parse(data);
    } catch {
      return; // not natter's; the next one may be
    }
    if (this.#state.name === "connecting" && frame.op !== "error") {
      this.#refused = null;
      this.#watch();
      this.#become({ name: "online" });
    }
    const call = this.#calls.get(frame.rid);
    if (call) {
      this.#calls.delete(frame.rid);
      clearTimeout(call.timer);
      if (frame.op === "error") call.done(errorOf(frame));
      else {
        const { op: _op, rid: _rid, ...reply } = frame;
        call.done(null, reply);
      }
    } else if (frame.rid === undefined) {
      this.#hear(frame);
    } // else: a reply that came too late
  }

  /** @param {any} frame */
  #hear(frame) {
    if (frame.op === "token_expiring") {
      this.#renew();
    } else if (frame.op === "reconnect") {
      const life = this.#life;
      clearTimeout(this.#drain);
      this.#drain = setTimeout(() => life === this.#life && this.#move("draining"), frame.after_ms ?? 0);
    }
    this._onPush(frame);
  }

  /** To the next edge, at once. @param {string} reason */
  #move(reason) {
    this.#attempt = 0;
    this.#turn = (this.#turn + 1) % this.#urls.length;
    this.#open(reason);
  }

  /**
   * The connection has ended, or is taken for dead.
   * @param {number} code
   * @param {string} [text]
   */
  #lost(code, text) {
    const lived = this.#opened ? Date.now() - this.#opened : 0;
    const { advice, reason } = adviceOf(code, text);
    const why = code === 1006 && text ? text : reason;
    const token = this.#token;
    const isMoving = this.#drain !== undefined;
    this.#drop();
    if (isMoving && advice === "back") {
      this.#move("draining");
      return;
    }
    if (advice === "never" || (advice === "token" && !this.#getToken)) {
      this.#end(why);
      return;
    }
    if (advice === "token") {
      this.#refused = token;
      this.#token = null;
    }
    if (lived >= HEALTHY_MS) this.#attempt = 0;
    // This edge may be gone; but it was not its fault that a token was bad, or that we were slow.
    if (code !== 4001 && code !== 4003) this.#turn = (this.#turn + 1) % this.#urls.length;
    this.#wait(why, advice === "later" ? LATER_MS : 0);
  }

  /**
   * @param {string} reason
   * @param {number} [later]
   */
  #wait(reason, later = 0) {
    this.#drop();
    const ms = Math.ceil(later + backoff(this.#attempt));
    this.#attempt += 1;
    const now = Date.now();
    this.#notBefore = later ? now + ms : now + Math.min(ms, 250); // also for who hurries
    this.#retry = setTimeout(() => this.#open(), ms);
    this.#become({ name: "offline", reason, retryAt: now + ms });
  }

  /** @param {string} reason */
  #end(reason) {
    this.#drop();
    this.#unlisten?.();
    this.#unlisten = null;
    if (this.#state.name !== "closed") this.#become({ name: "closed", reason });
  }

  /** Ends the connection that is there, if one is; the number of the next one. */
  #drop() {
    const socket = this.#socket;
    const wasReady = this._ready;
    this.#life += 1;
    this.#socket = null;
    this.#opened = 0;
    clearTimeout(this.#retry);
    clearTimeout(this.#quiet);
    clearTimeout(this.#drain);
    this.#drain = undefined;
    const calls = [...this.#calls.values()];
    this.#calls.clear();
    for (const { done, timer } of calls) {
      clearTimeout(timer);
      done(new NatterError("disconnected", "the connection was lost", { retry: true }));
    }
    if (wasReady) this._onLost();
    // Nobody waits for the edge to agree: nothing that this socket still says is heard.
    socket?.close(1000);
    return this.#life;
  }

  // Signs of life ---------------------------------------------------------------------------------------------------------

  /** Notices a connection on which nothing comes any more, though it was never closed. Costs nothing while frames come. */
  #watch() {
    clearTimeout(this.#quiet);
    // Not at once where nothing has come for long: the answer to a probe may be under way.
    const due = Math.max(Date.now() + 1_000, this.#heard + QUIET_MS);
    this.#quiet = setTimeout(() => {
      const silent = Date.now() - this.#heard;
      if (Date.now() - due > ASLEEP_MS) this.#lost(1006, "asleep"); // the computer was: the edge has given us up
      else if (silent < QUIET_MS) this.#watch();
      else this.#probe(CALL_MS);
    }, due - Date.now());
  }

  /** @param {number} ms */
  #probe(ms) {
    const life = this.#life;
    clearTimeout(this.#quiet);
    this._command("ping", {}, () => life === this.#life && this.#watch(), ms);
  }

  /** A page tells when it is worth to try, or to doubt. Elsewhere nothing does. */
  #listen() {
    const { window, document } = globalThis;
    if (this.#unlisten || !window?.addEventListener || !document) return;
    const hurry = () => {
      if (document.visibilityState !== "hidden") this.hurry();
    };
    // A page that the browser keeps for "back" may not have a connection; and who closes a tab is gone at once.
    const leave = () => {
      if (this.#state.name !== "online" && this.#state.name !== "connecting") return;
      this._onLeave();
      this.#drop();
      this.#become({ name: "offline", reason: "page_hidden" });
    };
    /** @type {[EventTarget, string, () => void][]} */
    const listeners = [
      [window, "online", hurry],
      [window, "offline", hurry],
      [window, "pageshow", hurry],
      [window, "pagehide", leave],
      [document, "visibilitychange", hurry],
      [document, "resume", hurry],
    ];
    for (const [target, name, fn] of listeners) target.addEventListener(name, fn);
    this.#unlisten = () => {
      for (const [target, name, fn] of listeners) target.removeEventListener(name, fn);
    };
  }

  // Tokens ----------------------------------------------------------------------------------------------------------------

  /** The token that is there, if it can still be used. */
  #usable() {
    if (!this.#token || !this.#getToken) return this.#token;
    const { exp } = claimsOf(this.#token);
    return exp != null && exp * 1000 < Date.now() + TOKEN_LEFT_MS ? null : this.#token;
  }

  /**
   * A new token; who asks while one is asked for gets the same one.
   * @param {TokenRequest["reason"]} reason
   */
  #askToken(reason) {
    this.#asking ??= this.#fetchToken(reason).finally(() => (this.#asking = null));
    return this.#asking;
  }

  /** @param {TokenRequest["reason"]} reason */
  async #fetchToken(reason) {
    const over = new AbortController();
    /** @type {ReturnType<typeof setTimeout> | undefined} */
    let timer;
    const late = new Promise((_, reject) => {
      timer = setTimeout(() => reject(new Error(`no token within ${TOKEN_MS} ms`)), TOKEN_MS);
    });
    let token;
    try {
      if (!this.#getToken) throw new NatterError("token_expired", "the token has ended");
      token = await Promise.race([this.#getToken({ reason, signal: over.signal }), late]);
    } catch (error) {
      if (error instanceof NatterError && !error.retry) throw error;
      throw new NatterError("no_token", "getToken failed", { retry: true, cause: error });
    } finally {
      clearTimeout(timer);
      over.abort();
    }
    if (typeof token !== "string" || !token) throw new NatterError("no_token", "getToken gave no token");
    const { sub } = claimsOf(token);
    // What waits in the outbox is of the user before.
    if (this.user != null && sub != null && sub !== this.user) {
      throw new NatterError("another_user", `getToken gave a token of ${sub}; a client has one user, ${this.user}`);
    }
    this.#token = token;
    if (this.user == null && sub != null) {
      this.user = sub;
      this._onUser();
    }
    return token;
  }

  /** Replaces the token of the session before it ends. */
  async #renew() {
    if (this.#renewing || !this.#getToken) return;
    this.#renewing = true;
    const life = this.#life;
    const before = this.#token;
    for (let attempt = 2; life === this.#life; attempt += 1) {
      try {
        const token = await this.#askToken("expiring");
        if (life !== this.#life) break;
        if (token === before) throw new NatterError("no_token", "getToken gave the same token", { retry: true });
        await this.request("refresh", { token });
        break;
      } catch (error) {
        const { code, retry } = /** @type {NatterError} */ (error);
        if (code === "another_user") this.#end(code);
        // The session goes on until its token has ended; then `getToken` is asked once more.
        if (!retry) break;
      }
      await new Promise((resolve) => setTimeout(resolve, 1_000 + backoff(attempt)));
    }
    this.#renewing = false;
  }

  /**
   * @param {string} token
   * @param {string} method
   * @param {string} path
   * @param {{body?: any, headers?: Record<string, string>, signal?: AbortSignal}} options
   */
  async #request(token, method, path, { body, headers, signal }) {
    let response;
    let answer;
    try {
      response = await this.#fetch(this.address(`v1/${path}`), {
        method,
        headers: { authorization: `Bearer ${token}`, ...headers },
        body: body === undefined ? undefined : JSON.stringify(body),
        signal: signal ?? AbortSignal.timeout(CALL_MS + PROBE_MS), // longer than an edge waits for its database
      });
      const text = await response.text();
      answer = text ? JSON.parse(text) : null;
    } catch (cause) {
      signal?.throwIfAborted();
      throw new NatterError("disconnected", "the edge did not answer", { retry: true, cause, status: response?.status });
    }
    if (response.ok) return answer;
    throw errorOf(answer, response.status);
  }
}

/**
 * The address of an edge's WebSocket. `http` means `ws`, because people copy it from the address bar.
 * @param {string} text
 */
function endpoint(text) {
  const url = new URL(text, globalThis.location?.href);
  url.protocol = url.protocol.replace(/^http/, "ws");
  if (!/^wss?:$/.test(url.protocol)) throw new TypeError(`url: ${text} is neither ws, wss, http nor https`);
  url.hash = url.search = "";
  if (!url.pathname.endsWith("/ws")) url.pathname = `${url.pathname.replace(/\/$/, "")}/ws`;
  return url.href;
}
