// What the list of conversations knows, without a page: the rooms of a pattern, those of them that a filter finds, their order.

const PAGE = 200; // rooms of a page of a watch: the most that an edge gives
const READ_AHEAD = 1_000; // rooms that are loaded without being asked for
const PAGES = 40; // pages that are asked for in a row: those of a filter may be empty
const MOST = 5_000; // rooms that are kept; above, the oldest without an alert go

const activity = ({ last, alert }) => last?.ts ?? alert?.at ?? 0;

/** One watch, with as many of its pages as are wanted. */
class Source {
  #watch;
  #wanted = READ_AHEAD;
  #pages = 0;
  #heard;
  loading = true;
  waiting = 0; // rooms with news that the edge has not told yet
  partial = false;
  error = null; // why the next page did not come
  refused = null; // why there is no watch
  /** Names of rooms that were there before a reconnect and have not come again. */
  stale = new Set();
  names = new Set();

  /** `heard(summaries, gone)` after each change. */
  constructor(client, query, heard) {
    this.#heard = heard;
    this.#watch = client.watch(query, { limit: PAGE });
    this.#watch.on("rooms", (change) => this.#hear(change));
    this.#watch.on("ended", ({ error }) => {
      this.loading = false;
      this.refused = error;
      this.#heard([], []);
    });
  }

  get hasMore() {
    return this.#watch.hasMore;
  }

  stop() {
    this.#heard = () => {};
    this.#watch.stop();
  }

  more() {
    this.#wanted = this.names.size + READ_AHEAD;
    this.#pages = 0;
    this.error = null;
    this.#read();
  }

  #hear({ rooms, gone, first, next, missed, partial }) {
    const isPage = first || next !== undefined;
    if (first) {
      // After a reconnect the list is to be as long as it was.
      this.#wanted = Math.max(READ_AHEAD, this.names.size);
      this.#pages = 0;
      this.stale = this.names;
      this.names = new Set();
      this.partial = false;
    }
    if (partial) this.partial = true;
    if (!isPage) this.waiting = missed ?? 0;
    for (const { room } of rooms) {
      this.names.add(room);
      this.stale.delete(room);
    }
    for (const room of gone) this.names.delete(room);
    let left = gone;
    if (isPage && !this.hasMore) {
      left = [...gone, ...this.stale];
      this.stale = new Set();
    }
    if (isPage) this.#read();
    this.#heard(rooms, left);
  }

  async #read() {
    this.loading = this.hasMore && this.names.size < this.#wanted && this.#pages < PAGES;
    if (!this.loading) return;
    this.#pages += 1;
    try {
      await this.#watch.more();
    } catch (error) {
      // A lost connection begins the watch anew; anything else is for the button that loads more.
      this.loading = false;
      if (error.code !== "disconnected") this.error = error;
      this.#heard([], []);
    }
  }
}

/** Event `change`: something is to be shown. */
export class Desk extends EventTarget {
  #client;
  #pattern;
  #base;
  #narrow = null;
  #asked = "";
  dropped = false;
  /** @type {Map<string, import("./sdk/protocol.js").Summary>} */
  rooms = new Map();

  constructor(client, pattern) {
    super();
    this.#client = client;
    this.#pattern = pattern;
    // All rooms: so alerts are told whatever the list is narrowed down to.
    this.#base = new Source(client, { pattern }, (summaries, gone) => this.#heard(summaries, gone));
  }

  stop() {
    this.#base.stop();
    this.#narrow?.stop();
  }

  /** Narrows the list down to what the edge finds; null: all. */
  narrow(filter) {
    const asked = JSON.stringify(filter);
    if (asked === this.#asked) return;
    this.#asked = asked;
    this.#narrow?.stop();
    this.#narrow = filter && new Source(this.#client, { pattern: this.#pattern, filter }, (summaries) => this.#heard(summaries, []));
    this.#changed();
  }

  #heard(summaries, gone) {
    for (const summary of summaries) this.rooms.set(summary.room, Object.freeze(summary));
    for (const room of gone) this.rooms.delete(room);
    if (this.rooms.size > MOST) this.#drop();
    this.#changed();
  }

  #drop() {
    const spare = [...this.rooms.values()].filter(({ alert }) => !alert).sort((a, b) => activity(a) - activity(b));
    for (const { room } of spare.slice(0, this.rooms.size - MOST + PAGE)) this.rooms.delete(room);
    this.dropped = true;
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }

  /** What was just done here, until the edge tells it. */
  patch(room, fields) {
    const known = this.rooms.get(room);
    if (!known) return;
    this.rooms.set(room, Object.freeze({ ...known, ...fields }));
    this.#changed();
  }

  more() {
    (this.#narrow ?? this.#base).more();
  }

  /** The rooms to show, newest activity first. `alerts`, `nobody`: only such, which the edge has no filter for. */
  shown({ alerts = false, nobody = false } = {}) {
    const { names, stale } = this.#narrow ?? { names: this.rooms, stale: new Set() };
    return [...this.rooms.values()]
      .filter((one) => (names.has(one.room) || stale.has(one.room)) && (!alerts || one.alert) && (!nobody || !one.assignee))
      .sort((a, b) => activity(b) - activity(a) || (a.room < b.room ? -1 : 1));
  }

  /** All rooms with an alert, the newest first. */
  alerts() {
    return [...this.rooms.values()].filter(({ alert }) => alert).sort((a, b) => b.alert.at - a.alert.at);
  }

  /** Everybody who looks after something. */
  assignees() {
    return [...new Set([...this.rooms.values()].map(({ assignee }) => assignee).filter(Boolean))].sort();
  }

  /** How the list is doing. `refused`: why nothing can be followed; `bad`: why the filter can't be used. */
  get state() {
    const source = this.#narrow ?? this.#base;
    const { loading, hasMore, waiting, partial } = source;
    return { loading, hasMore, waiting, partial, dropped: this.dropped, refused: this.#base.refused, bad: this.#narrow?.refused ?? source.error };
  }
}
