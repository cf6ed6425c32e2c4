// What was said, as a list on the page: live pushes and pages of history, each message once.

import { NATTER, button, clock, element, told } from "./words.js";

const MOST = 400; // messages kept on the page while its end is shown
const MOST_PAST = 4_000; // and while somebody reads further up

/** A message is identified by its sender and id: nobody can take another's place. */
export const keyOf = (from, id) => `${from}/${id}`;
const refOf = (from, ref) => (ref.includes("/") ? ref : keyOf(from, ref));
export const isMessage = ({ kind }) => kind == null || kind === "message";
const isTold = ({ kind, from }) => kind === "system" && from === NATTER;
const attached = (body) =>
  (Array.isArray(body?.attachments) ? body.attachments : []).filter((one) => typeof one?.upload === "string");

export function bodyText(body) {
  if (typeof body === "string") return body;
  if (typeof body?.text === "string") return body.text;
  return attached(body).length > 0 ? "" : JSON.stringify(body ?? null);
}


/** What workers say of the files of a message, by upload: an object (a picture), or a text (a verdict). */
function filesSaid(into, annotations) {
  for (const said of Object.values(annotations ?? {})) {
    for (const [upload, one] of Object.entries(said?.files ?? {})) {
      const known = into.get(upload) ?? {};
      if (typeof one === "string") known.verdict = one;
      else if (one != null) Object.assign(known, { width: one.width, height: one.height, thumbnail: one.thumbnail });
      into.set(upload, known);
    }
  }
}

/** The reaction that a body means, as the history service reads it. */
function reactionOf(body) {
  const key = typeof body === "string" ? body : body?.key ?? body?.text;
  return typeof key === "string" && key ? { key, on: body?.remove !== true } : null;
}

export class Log {
  #list;
  #facts = new WeakMap(); // <li> -> what is known of its message
  #items = new Map(); // message key -> its <li>
  #changed;

  /** `changed` is called when there are other messages than before. */
  constructor(list, changed) {
    this.#list = list;
    this.#changed = changed;
    this.user = "";
    this.bottom = true; // whether it is scrolled to its end
    this.cut = () => {}; // called when the oldest messages were taken off the page
    this.showFile = () => ({ box: "", told() {} }); // what an attachment looks like, and how it takes what workers say of it
    this.answer = () => {}; // called with a message that is to be answered
    this.showThread = () => {}; // called with a message whose answers are to be shown
    let height = list.clientHeight;
    list.addEventListener("scroll", () => {
      // Where the list itself has become smaller, nobody has scrolled.
      if (list.clientHeight === height) this.bottom = list.scrollHeight - list.scrollTop - list.clientHeight < 40;
    });
    new ResizeObserver(() => {
      height = list.clientHeight;
      this.#follow();
    }).observe(list);
  }

  clear(user = this.user) {
    this.user = user;
    this.#list.replaceChildren();
    this.#items = new Map();
    this.bottom = true;
  }

  /** The cursor of the oldest or the newest message that has one. */
  end(oldest) {
    const items = [...this.#list.querySelectorAll(".message[data-cursor]")];
    return (oldest ? items[0] : items.at(-1))?.dataset.cursor;
  }

  find(from, id) {
    return this.#items.get(keyOf(from, id));
  }

  line(content, kind) {
    const item = element("li", "line", content);
    if (kind) item.classList.add(kind);
    this.#add(item);
  }

  /** Takes what came live. */
  hear(message) {
    const { id, from, ts, cursor, body, reply_to: answered } = message;
    if (!isMessage(message) && !isTold(message)) {
      this.#change(message);
      return;
    }
    const key = keyOf(from, id);
    const known = this.#items.get(key);
    const item = known ?? this.#newItem(from, id, isTold(message));
    const facts = this.#facts.get(item);
    // A message that a page brought before has its place, and may have been edited since.
    if (facts.ts == null) {
      facts.ts = ts;
      Object.assign(facts, { body, answered, note: "" });
      this.#draw(item); // first: the list follows what it is as high as
      // A pending one moves to its place in the room's order. Without a cursor there is no order but that of arrival.
      const later = cursor == null ? null : this.#laterThan(item, message);
      if (later) this.#list.insertBefore(item, later);
      else this.#add(item);
      this.#countAnswer(from, answered);
    }
    item.classList.remove("pending", "failed");
    if (cursor != null) item.dataset.cursor = cursor;
    this.#items.set(key, item);
    this.#changed();
  }

  /** A message of ours that is on its way. */
  send(id, body, answered) {
    const item = this.#newItem(this.user, id);
    item.classList.add("pending");
    Object.assign(this.#facts.get(item), { body, answered, note: "sending…" });
    this.#items.set(keyOf(this.user, id), item);
    this.#draw(item);
    this.bottom = true;
    this.#add(item);
    return item;
  }

  /** Why it is still on its way. */
  note(item, note) {
    if (!item.classList.contains("pending")) return;
    this.#facts.get(item).note = note;
    this.#draw(item);
  }

  /** What became of it: `ts` if it was sent, else why not. In a durable room the push settles it before or after that. */
  settle(item, { ts, note = "" }) {
    if (!item.classList.contains("pending")) return;
    item.classList.remove("pending");
    item.classList.toggle("failed", ts == null);
    const facts = this.#facts.get(item);
    facts.note = note;
    this.#draw(item);
    if (ts != null) item.querySelector("time").textContent = clock(ts);
  }

  /** Takes a page of history: messages as they are now. Who reads further up is not moved. */
  learn(messages) {
    const list = this.#list;
    const fromEnd = list.scrollHeight - list.scrollTop;
    for (const message of messages) {
      const key = keyOf(message.from, message.id);
      const item = this.#items.get(key) ?? this.#newItem(message.from, message.id, isTold(message));
      const facts = this.#facts.get(item);
      item.classList.remove("pending", "failed");
      if (facts.ts == null) {
        Object.assign(facts, { ts: message.ts, note: "", answered: message.reply_to });
        item.dataset.cursor = message.cursor;
        list.insertBefore(item, this.#laterThan(item, message));
        this.#items.set(key, item);
      }
      // What came live meanwhile may be newer than the page.
      if (facts.edited == null || (message.edited_at ?? 0) >= facts.edited) {
        facts.body = message.body;
        facts.edited = message.edited_at ?? null;
      }
      facts.deleted ||= message.deleted_at != null;
      facts.counts = new Map(Object.entries(message.reactions ?? {}));
      facts.answers = message.replies ?? { count: 0 };
      filesSaid(facts.files, message.annotations);
      this.#draw(item);
    }
    list.scrollTop = this.bottom ? list.scrollHeight : list.scrollHeight - fromEnd;
    this.#changed();
  }

  /** Drops what was erased: all, or what one user said; up to a time, if that is told. */
  erase({ user, before }) {
    for (const [key, item] of this.#items) {
      const { ts } = this.#facts.get(item);
      if (ts == null || (before != null && ts > before)) continue;
      if (user == null || item.dataset.from === user) {
        item.remove();
        this.#items.delete(key);
      }
    }
    this.#changed();
  }

  /** A message has one answer more. A page of history brings the true number. */
  #countAnswer(from, answered) {
    const item = typeof answered === "string" ? this.#items.get(refOf(from, answered)) : null;
    if (!item) return;
    this.#facts.get(item).answers.count += 1;
    this.#draw(item);
  }

  #change({ from, ts, kind, target, body }) {
    const item = target == null ? null : this.#items.get(refOf(from, target));
    if (!item) return; // older than what is shown
    const facts = this.#facts.get(item);
    if (kind === "edit" && ts >= (facts.edited ?? 0)) {
      facts.body = body;
      facts.edited = ts;
    } else if (kind === "delete") {
      facts.deleted = true;
    } else if (kind === "reaction") {
      const { key, on } = reactionOf(body) ?? {};
      if (key == null) return;
      if (!facts.reactions.has(key)) facts.reactions.set(key, new Map());
      facts.reactions.get(key).set(from, on);
    } else if (kind === "annotation" && from.startsWith("$worker.")) {
      // Members may annotate, too. In a page of history it is not told whose word it is.
      filesSaid(facts.files, body);
    }
    this.#draw(item);
    this.#follow();
  }

  /** The first message after the place of `item`; null at the end. */
  #laterThan(item, message) {
    const others = this.#list.querySelectorAll(".message");
    let later = null;
    for (let i = others.length - 1; i >= 0; i -= 1) {
      if (others[i] === item) continue;
      if (!this.#isLater(others[i], message)) break;
      later = others[i];
    }
    return later;
  }

  #isLater(item, { ts, cursor }) {
    const facts = this.#facts.get(item);
    if (facts.ts == null) return true; // pending: at the end
    if (facts.ts !== ts || item.dataset.cursor == null) return facts.ts > ts;
    const [origin, , seq] = item.dataset.cursor.split(".");
    const [other, , at] = cursor.split(".");
    return origin === other ? Number(seq) > Number(at) : origin > other;
  }

  #newItem(from, id, isSystem = false) {
    const item = element("li", isSystem ? "message system" : "message");
    item.dataset.id = id;
    item.dataset.from = from;
    if (from === this.user) item.classList.add("own");
    const meta = element("div", "meta");
    const read = element("button", "read");
    read.type = "button";
    read.hidden = true;
    read.ariaExpanded = "false";
    read.ariaLive = "off"; // it is inside of a log, which reads out every change
    const answer = button("quiet answer", "Answer", () => this.answer({ from, id, text: this.#textOf(item) }));
    answer.ariaLabel = `Answer ${from}`;
    meta.append(element("span", "from", from), element("time", ""), element("span", "note"), answer, read);
    item.append(meta, element("div", "answered"), ...["body", "files", "reactions", "answers"].map((part) => element("div", part)));
    this.#facts.set(item, {
      ts: null, body: null, isSystem, note: "", edited: null, deleted: false, counts: new Map(), reactions: new Map(),
      answered: null, answers: { count: 0 }, drawn: null, files: new Map(), shown: new Map(),
    });
    return item;
  }

  #textOf(item) {
    const { body, deleted, isSystem } = this.#facts.get(item);
    if (deleted) return "";
    return isSystem ? told(body) : bodyText(body);
  }

  #draw(item) {
    const facts = this.#facts.get(item);
    const { ts, body, note, edited, deleted, counts, reactions, answered, answers } = facts;
    const time = item.querySelector("time");
    if (ts != null) {
      time.textContent = clock(ts);
      time.dateTime = new Date(ts).toISOString();
    }
    if (facts.isSystem && ts != null) item.title = clock(ts);
    item.querySelector(".body").textContent = this.#textOf(item);
    item.querySelector(".answer").hidden = facts.isSystem || deleted || ts == null;
    this.#drawAnswered(item, answered);
    const files = deleted ? null : body;
    if (facts.drawn !== files) {
      // Not with every reaction: a picture would be loaded again.
      facts.drawn = files;
      facts.shown = new Map(attached(files).map((one) => [one.upload, this.showFile(one)]));
      item.querySelector(".files").replaceChildren(...[...facts.shown.values()].map(({ box }) => box));
    }
    for (const [upload, said] of facts.files) facts.shown.get(upload)?.told(said);
    const { from, id } = item.dataset;
    const thread = button("quiet", answers.count === 1 ? "1 answer" : `${answers.count}${answers.capped ? "+" : ""} answers`, () =>
      this.showThread({ from, id, text: this.#textOf(item) }));
    item.querySelector(".answers").replaceChildren(...(answers.count > 0 ? [thread] : []));
    item.querySelector(".note").textContent = deleted ? "deleted" : note || (edited == null ? "" : "edited");
    const shown = [];
    for (const key of deleted ? [] : new Set([...counts.keys(), ...reactions.keys()])) {
      // What the page counted, and on top of it what came live.
      const { count = 0, users = [] } = counts.get(key) ?? {};
      let total = count;
      for (const [user, on] of reactions.get(key) ?? []) {
        if (users.includes(user) !== on) total += on ? 1 : -1;
      }
      if (total > 0) shown.push(element("span", "reaction", total > 1 ? `${key} ${total}` : key));
    }
    item.querySelector(".reactions").replaceChildren(...shown);
  }

  /** What a message answers, where that is on the page; else by whom it was. */
  #drawAnswered(item, answered) {
    const line = item.querySelector(".answered");
    line.hidden = typeof answered !== "string";
    if (line.hidden) return;
    const key = refOf(item.dataset.from, answered);
    const first = this.#items.get(key);
    const words = first ? this.#textOf(first).slice(0, 80) : "";
    line.textContent = `to ${key.slice(0, key.lastIndexOf("/"))}${words && `: ${words}`}`;
  }

  /** Something on the page has become as high as it is now. */
  settled() {
    this.#follow();
  }

  #add(item) {
    const list = this.#list;
    list.append(item);
    const most = this.bottom ? MOST : MOST_PAST;
    if (list.childElementCount > most) {
      const spare = [...list.children].filter((one) => !one.matches(".older")).slice(0, list.childElementCount - most);
      for (const oldest of spare) {
        this.#items.delete(keyOf(oldest.dataset.from, oldest.dataset.id));
        oldest.remove();
      }
      this.cut();
    }
    this.#follow();
  }

  #follow() {
    if (this.bottom) this.#list.scrollTop = this.#list.scrollHeight;
  }
}
