// The list of rooms: those that the user is in, live with what is new in them, and below them the others that this tab has
// opened, which it asks for unread messages from time to time.

import { request } from "./http.js";
import { element, sentence, titleOf } from "./words.js";

const KEPT = 30; // opened rooms that are remembered
const ASK_EVERY_MS = 5_000;

const badgeOf = ({ count, capped }) => `${count}${capped ? "+" : ""}`;

/**
 * `current` is the room that is shown. `behind` is what is unread there: its number is known here sooner than by the edge,
 * and what is being read shall not count for a moment.
 */
export class Rooms {
  #parts; #memory; #open; #tell; #changed;
  #user = ""; #token = ""; #client = null;
  #mine = new Map(); // room -> its summary
  #next = { false: null, true: null }; // the rest of the list, and of that of the archived ones
  #opened = []; // {room, durable}: in the order in which they were opened; kept over a reload
  #unread = new Map(); // room -> {count, capped?}: of those that were opened
  #named = { room: "", title: "" }; // the room that is shown, as it was called last: one may be put out of it
  #aside = false; // whether the archived ones are shown
  #asking = 0; // timer

  /**
   * `parts`: the elements `list`, `more`, `aside`, `problem`. `open(room)` shows a room, `tell(text)` is for those who listen
   * to the page, `changed()` is called when a number or a title may be another.
   */
  constructor(parts, { memory, open, tell, changed }) {
    this.#parts = parts;
    this.#memory = memory;
    this.#open = open;
    this.#tell = tell;
    this.#changed = changed;
    this.current = "";
    this.behind = 0;
    parts.more.addEventListener("click", () => this.#page(this.#next[this.#aside]));
    parts.aside.addEventListener("click", () => {
      this.#aside = !this.#aside;
      parts.aside.ariaPressed = String(this.#aside);
      if (this.#aside) this.#page();
      this.draw();
    });
  }

  /** A room is shown, or none (an empty name); perhaps to another user than before. */
  enter(client, user, token, room) {
    this.#client = client;
    this.#token = token;
    if (user !== this.#user) {
      const kept = this.#memory.get("natter:tab");
      this.#user = user;
      this.#opened = kept?.user === user ? kept.rooms : [];
      this.#mine = new Map();
      this.#unread = new Map();
      this.#next = { false: null, true: null };
    }
    this.current = room;
    this.#unread.delete(room);
    client.addEventListener("watching", ({ detail }) => this.#take(detail, false));
    client.addEventListener("inbox", ({ detail }) => this.#hear(detail));
    this.draw();
  }

  /** The room that is shown was joined. */
  joined(durable) {
    let opened = this.#opened.find(({ room }) => room === this.current);
    if (!opened) {
      opened = { room: this.current };
      this.#opened.push(opened);
      this.#opened.splice(0, this.#opened.length - KEPT);
    }
    opened.durable = durable;
    this.#remember();
    this.#askTitle(opened);
    this.#parts.list.querySelector("[aria-current]")?.scrollIntoView({ block: "nearest" });
  }

  /** Of a room that the user is not named in, if it has a record. */
  async #askTitle(opened) {
    try {
      const { title, ref } = await this.#client.call("room", { room: opened.room });
      Object.assign(opened, { title, ref });
      this.#remember();
    } catch (error) {
      if (!error.retry) Object.assign(opened, { title: undefined, ref: undefined }); // nobody has made it
    }
  }

  /** The user can't be in the room any more. */
  forget(room) {
    this.#opened = this.#opened.filter((one) => one.room !== room);
    this.#mine.delete(room);
    this.#remember();
  }

  #remember() {
    this.#memory.set("natter:tab", { user: this.#user, rooms: this.#opened });
    this.draw();
  }

  summary(room) {
    return this.#mine.get(room);
  }

  /** What the room that is shown is called. */
  get title() {
    const room = this.current;
    const known = this.#mine.get(room) ?? this.#opened.find((one) => one.room === room);
    if (known || this.#named.room !== room) this.#named = { room, title: titleOf(known ?? { room }) };
    return this.#named.title;
  }

  get namespaces() {
    return [...this.#mine.keys(), ...this.#opened.map(({ room }) => room)].map((room) => room.split(":")[0]);
  }

  /** What is unread in all rooms that are neither muted nor archived. */
  get waiting() {
    const counts = [{ count: this.behind }];
    for (const [room, summary] of this.#mine) {
      if (room !== this.current && !summary.muted && !summary.archived) counts.push({ count: summary.unread, capped: summary.capped });
    }
    for (const [room, one] of this.#unread) if (room !== this.current && !this.#mine.has(room)) counts.push(one);
    const total = { count: counts.reduce((sum, { count }) => sum + count, 0), capped: counts.some(({ capped }) => capped) };
    return total.count > 0 ? badgeOf(total) : "";
  }

  /** Mutes, pins or archives a room for this user alone. */
  async arrange(room, how) {
    await request(this.#token, "PATCH", `v1/inbox/${encodeURIComponent(room)}`, { body: how });
    // The push comes too; who clicked need not wait for it.
    if (this.#mine.has(room)) Object.assign(this.#mine.get(room), how);
    this.draw();
  }

  // The user's own ---------------------------------------------------------------------------------------------------------

  /** A page of the list. The first one replaces what was known. */
  #take({ rooms, next }, aside, isFurther = false) {
    if (!isFurther) {
      for (const [room, { archived }] of this.#mine) if (Boolean(archived) === aside) this.#mine.delete(room);
    }
    for (const summary of rooms) this.#mine.set(summary.room, summary);
    this.#next[aside] = next ?? null;
    this.#parts.problem.textContent = "";
    this.draw();
  }

  async #page(after) {
    const [mine, aside] = [this.#client, this.#aside];
    const fields = new URLSearchParams({ ...(after && { after }), ...(aside && { archived: "true" }) });
    try {
      const page = await request(this.#token, "GET", `v1/inbox?${fields}`);
      if (mine === this.#client) this.#take(page, aside, after != null);
    } catch (error) {
      if (mine === this.#client) this.#parts.problem.textContent = sentence(error);
    }
  }

  #hear({ rooms = [], gone = [] }) {
    for (const summary of rooms) {
      const { room, unread, muted, archived } = summary;
      const before = this.#mine.get(room)?.unread ?? 0;
      if (unread > before && room !== this.current && !muted && !archived) this.#tell(`${unread} unread in ${titleOf(summary)}`);
      this.#mine.set(room, summary);
    }
    for (const room of gone) this.#mine.delete(room);
    this.draw();
  }

  // Those that were opened -------------------------------------------------------------------------------------------------

  ask(after) {
    clearTimeout(this.#asking);
    this.#asking = setTimeout(async () => {
      const mine = this.#client;
      const others = this.#opened.filter(({ room, durable }) => durable && room !== this.current && !this.#mine.has(room));
      try {
        const rooms = others.map(({ room }) => room);
        const counts = others.length === 0 ? [] : (await mine.call("unread", { rooms })).rooms;
        if (mine !== this.#client) return;
        for (const { room, count } of counts) {
          if (count > 0 && !this.#unread.get(room)?.count) this.#tell(`${count} unread in ${room}`);
        }
        this.#unread = new Map(counts.map((one) => [one.room, one]));
      } catch (error) {
        if (mine !== this.#client || error.code === "disconnected") return; // the next join begins anew
        if (!error.retry) {
          this.#unread.clear(); // not to be had here
          this.draw();
          return;
        }
      }
      this.draw();
      this.ask(ASK_EVERY_MS);
    }, after);
  }

  // On the page ------------------------------------------------------------------------------------------------------------

  draw() {
    const { list, more } = this.#parts;
    const mine = [...this.#mine.values()].filter(({ archived }) => Boolean(archived) === this.#aside);
    const at = ({ pinned, last }) => [pinned ? 1 : 0, last?.ts ?? 0];
    mine.sort((one, other) => at(other)[0] - at(one)[0] || at(other)[1] - at(one)[1]);
    const opened = this.#aside ? [] : this.#opened.filter(({ room }) => !this.#mine.has(room));
    const wanted = [...mine, ...opened];
    const buttons = new Map([...list.children].map((button) => [button.dataset.room, button]));
    let before = null;
    for (const summary of wanted) {
      const button = buttons.get(summary.room) ?? this.#newButton(summary.room);
      buttons.delete(summary.room);
      this.#drawOne(button, summary);
      // One that is moved loses the focus.
      const place = before ? before.nextElementSibling : list.firstElementChild;
      if (place !== button) {
        const focused = document.activeElement === button;
        list.insertBefore(button, place);
        if (focused) button.focus();
      }
      before = button;
    }
    for (const button of buttons.values()) button.remove();
    more.hidden = this.#next[this.#aside] == null;
    this.#changed();
  }

  /** What is unread in the room that is shown is another number. */
  drawCurrent() {
    const button = this.#parts.list.querySelector("[aria-current]");
    if (button) this.#drawOne(button, this.#mine.get(this.current) ?? this.#opened.find(({ room }) => room === this.current));
    this.#changed();
  }

  #drawOne(button, summary) {
    const { room, last, muted, pinned, unread = 0, capped } = summary;
    const isMine = this.#mine.has(room);
    const part = (name) => button.querySelector(name);
    button.ariaCurrent = room === this.current ? "true" : null;
    button.classList.toggle("is-muted", Boolean(muted));
    button.title = room;
    part(".name").textContent = titleOf(summary);
    const waiting = isMine ? { count: unread, capped } : this.#unread.get(room) ?? { count: 0 };
    const shown = room === this.current ? { count: Math.min(this.behind, waiting.count) } : waiting;
    part(".badge").hidden = shown.count === 0;
    part(".badge").firstElementChild.textContent = badgeOf(shown);
    const text = last?.text ?? "…";
    part(".last").textContent = last ? `${last.from === this.#user ? "you" : last.from}: ${text || "(a file)"}` : "";
    part(".marks").textContent = [pinned && "pinned", muted && "muted"].filter(Boolean).join(", ");
  }

  #newButton(room) {
    const made = element("button");
    made.type = "button";
    made.dataset.room = room;
    const badge = element("span", "badge");
    badge.append(element("span"), element("span", "hidden", " unread"));
    const [name, last, marks] = ["name", "last", "marks"].map((part) => element("span", part));
    made.append(name, " ", badge, " ", last, " ", marks);
    made.addEventListener("click", () => this.#open(room));
    return made;
  }
}
