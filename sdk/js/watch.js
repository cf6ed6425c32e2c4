// A watch: what is new in rooms, without joining them, through reconnects.

import { Emitter } from "./emitter.js";
import { NatterError, backoff } from "./protocol.js";

/** @typedef {import("./natter.js").Natter} Natter */
/** @typedef {import("./protocol.js").Summary} Summary */
/** @typedef {{mine: true} | {rooms: string[]} | {pattern: string, filter?: Record<string, any>}} WatchQuery */

/**
 * `first`: these are the first rooms of the list, which is read anew (at the beginning, and after each reconnect). `next`:
 * there are more, which `more` asks for. `missed`: rooms with something new that are not told now.
 * @typedef {{rooms: Summary[], gone: string[], first?: boolean, next?: boolean, partial?: boolean, missed?: number}} WatchChange
 */

/**
 * Events: `rooms`; `ended` {error}: the edge has refused it, or ended it.
 * @extends {Emitter<{rooms: WatchChange, ended: {error: NatterError}}>}
 */
export class Watch extends Emitter {
  #client;
  #query;
  #limit;
  /** @type {number | null} */ #number = null;
  /** @type {string | null} */ #next = null;
  #asked = 0;
  #attempt = 0;
  /** @type {ReturnType<typeof setTimeout> | undefined} */ #again;

  /**
   * @internal
   * @param {Natter} client
   * @param {WatchQuery} query
   * @param {number} [limit]
   */
  constructor(client, query, limit) {
    super();
    this.#client = client;
    this.#query = query;
    this.#limit = limit;
  }

  /** Whether `more` has something to ask for. */
  get hasMore() {
    return this.#next != null;
  }

  /** Asks for the next page; it comes as `rooms`. */
  async more() {
    const [watch, after] = [this.#number, this.#next];
    if (watch == null || after == null) return;
    const page = await this.#client.request("watch", { watch, after, limit: this.#limit });
    if (watch !== this.#number || after !== this.#next) return; // another connection: the list begins anew
    this.#next = page.next ?? null;
    this._emit("rooms", { rooms: page.rooms, gone: [], next: this.hasMore, partial: page.partial });
  }

  /** Ends it. */
  stop() {
    this.#client._unwatch(this);
    this._lost();
  }

  /** @internal */
  get _number() {
    return this.#number;
  }

  /** @internal */
  _open() {
    const asked = (this.#asked += 1);
    this.#client._command("watch", { ...this.#query, limit: this.#limit }, (error, page) => {
      if (asked !== this.#asked) return;
      if (error?.retry) {
        if (error.code === "disconnected") return; // with the next connection
        const wait = error.retryAfterMs ?? backoff((this.#attempt += 1));
        this.#again = setTimeout(() => this._open(), wait);
      } else if (error) {
        this.#end(error);
      } else {
        this.#attempt = 0;
        this.#number = page.watch;
        this.#next = page.next ?? null;
        const { rooms, partial } = page;
        this._emit("rooms", { rooms, gone: [], first: true, next: this.hasMore, partial });
      }
    });
  }

  /** @internal */
  _lost() {
    this.#asked += 1;
    this.#number = this.#next = null;
    clearTimeout(this.#again);
  }

  /** @internal @param {any} push */
  _push({ rooms = [], gone = [], more, ended }) {
    if (rooms.length || gone.length || more) this._emit("rooms", { rooms, gone, missed: more });
    if (ended) this.#end(new NatterError(ended, "the edge has ended the watch"));
  }

  /** @param {NatterError} error */
  #end(error) {
    this._lost();
    this.#client._unwatch(this);
    this._emit("ended", { error });
  }
}
