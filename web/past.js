// The past of a room: pages of its history above what came live, and a search that leads there.

import { request, roomPath } from "./http.js";
import { bodyText } from "./log.js";
import { button, clock, element, sentence } from "./words.js";

const PAGE = 50; // messages a page
const NEAR = 120; // px from the end of the list at which the next page is asked for
const REST_MS = 3_000; // after an answer that did not reach far enough
const HITS = 20;

/**
 * Loads what is older than the list shows when its top is reached. After a jump to somewhere far back (`away`) the list ends
 * there, and what is newer is loaded when its bottom is reached, until it is the present again.
 */
export class Past {
  #list; #log; #parts; #redraw;
  #client = null;
  #room = "";
  #token = "";
  #more = false; // whether there may be older messages than shown
  #loading = false;
  #turn = 0; // the list is another one than in the turn before: pages that were asked for then have no place in it
  #rest = 0; // nothing is asked for by scrolling before this time
  #search = 0; // number of the last search
  #button = element("button", "quiet", "");
  #older = element("li", "older");

  /** `parts`: the elements `find`, `query`, `hits`, `now`; `redraw` shows what came live anew. */
  constructor(list, log, parts, redraw) {
    this.#list = list;
    this.#log = log;
    this.#parts = parts;
    this.#redraw = redraw;
    this.away = false;
    this.#button.type = "button";
    this.#older.append(this.#button);
    this.#button.addEventListener("click", () => this.#loadOlder());
    log.cut = () => this.#offer(true);
    list.addEventListener("scroll", () => {
      if (performance.now() < this.#rest) return;
      if (list.scrollTop < NEAR) this.#loadOlder();
      if (this.away && list.scrollHeight - list.scrollTop - list.clientHeight < NEAR) this.#loadNewer();
    });
    parts.now.addEventListener("click", () => this.goToNow());
    parts.find.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#find(parts.query.value.trim());
    });
    parts.query.addEventListener("input", () => parts.query.value || this.#closeHits());
    parts.find.addEventListener("keydown", ({ key }) => key === "Escape" && this.#closeHits());
    parts.hits.addEventListener("keydown", ({ key }) => {
      if (key !== "Escape") return;
      this.#closeHits();
      parts.query.focus();
    });
  }

  /** A room is entered, or entered anew. */
  enter(client, room, token) {
    this.#client = client;
    this.#room = room;
    this.#token = token;
    this.#anew();
    this.#setAway(false);
    this.#offer(false);
    this.#closeHits();
    this.#parts.query.value = "";
    this.#parts.find.hidden = true;
  }

  /** The client has joined: what was said before is loaded. `reset`: the log was cleared, wherever one was in it. */
  async joined(durable, reset = false) {
    if (reset) this.#setAway(false);
    if (!durable) return;
    this.#anew(); // what a lost connection did not answer
    if (this.away) return;
    await this.#load({}, (page) => {
      this.#parts.find.hidden = false;
      this.#offerAfter(page, this.#log.end(true) === page.messages[0]?.cursor);
    });
    this.#fill();
  }

  /** One may not be in the room any more: nothing more is to be had. */
  left() {
    this.#anew();
    this.#parts.find.hidden = true;
    this.#offer(false);
    this.#closeHits();
  }

  async goToNow() {
    this.#setAway(false);
    this.#log.clear();
    this.#offer(false);
    this.#redraw();
    await this.joined(true);
  }

  async #loadOlder() {
    const before = this.#log.end(true);
    if (!this.#more || before == null) return;
    const focused = document.activeElement === this.#button;
    await this.#load({ before }, (page) => this.#offerAfter(page, true));
    // The button went away with the last page.
    if (focused && document.activeElement !== this.#button) this.#list.focus();
    this.#fill();
  }

  async #loadNewer() {
    const after = this.#log.end(false);
    if (after == null) return;
    await this.#load({ after }, (page) => {
      if (page.next == null && !page.partial) {
        this.#setAway(false);
        this.#redraw(); // what came live while we looked elsewhere
      }
    });
  }

  /** As long as there is nothing to scroll, scrolling can't ask for more. */
  #fill() {
    if (this.#more && performance.now() >= this.#rest && this.#list.scrollHeight <= this.#list.clientHeight) {
      this.#loadOlder();
    }
  }

  /** Nobody waits any more for a page that is under way. */
  #anew() {
    this.#turn += 1;
    this.#loading = false;
  }

  /** Loads a page, and calls `first` before and `then` after it is shown. */
  async #load(where, then, first = () => {}) {
    if (this.#loading) return;
    this.#loading = true;
    const turn = this.#turn;
    const page = await this.#page(where);
    if (turn !== this.#turn) return; // another room, another connection, or another place in the past
    this.#loading = false;
    if (page == null) return;
    first();
    this.#log.learn(page.messages);
    then(page);
  }

  /** A page; `null` where it is not to be had, or nobody waits for it any more. */
  async #page(where) {
    const turn = this.#turn;
    try {
      return await this.#client.call("history", { room: this.#room, limit: PAGE, ...where });
    } catch (error) {
      if (turn !== this.#turn || error.code === "disconnected") return null;
      if (error.retry) {
        this.#wait();
      } else {
        this.#parts.find.hidden = true; // without the right, or no history is kept
        this.#offer(false);
      }
      return null;
    }
  }

  #offerAfter(page, reachesTop) {
    if (page.partial) this.#wait();
    else if (reachesTop) this.#offer(page.prev != null);
  }

  #wait() {
    this.#rest = performance.now() + REST_MS;
    this.#offer(true, "Older messages are not available just now. Try again");
  }

  /** Whether older messages are offered: by a button, for those who do not scroll. */
  #offer(more, label = "Show older messages") {
    this.#more = more;
    if (!more) {
      this.#older.remove();
      return;
    }
    this.#button.textContent = label;
    if (this.#list.firstElementChild !== this.#older) {
      const fromEnd = this.#list.scrollHeight - this.#list.scrollTop;
      this.#list.prepend(this.#older);
      this.#list.scrollTop = this.#list.scrollHeight - fromEnd;
    }
  }

  #setAway(away) {
    this.away = away;
    this.#parts.now.hidden = !away;
  }

  // Search ----------------------------------------------------------------------------------------------------------------

  async #find(words, before) {
    if (!words) {
      this.#closeHits();
      return;
    }
    const number = (this.#search += 1);
    const fields = new URLSearchParams({ q: words, limit: HITS, ...(before && { before }) });
    let answer;
    try {
      answer = await request(this.#token, "GET", `${roomPath(this.#room)}/search?${fields}`);
    } catch (error) {
      answer = { problem: sentence(error) };
    }
    if (number !== this.#search) return;
    this.#show(answer, before, () => this.#find(words, answer.next));
  }

  /** The answers to a message. */
  async showThread({ from, id, text }, before) {
    const number = (this.#search += 1);
    const mine = this.#client;
    let answer;
    try {
      const page = await mine.call("history", { room: this.#room, thread: `${from}/${id}`, limit: HITS, before });
      answer = { messages: page.messages.toReversed(), next: page.prev, partial: page.partial };
    } catch (error) {
      answer = { problem: sentence(error) };
    }
    if (number !== this.#search || mine !== this.#client) return;
    this.#show(answer, before, () => this.showThread({ from, id, text }, answer.next));
    if (before) return;
    const title = element("li", "bar");
    const close = button("plain", "Close", () => {
      this.#closeHits();
      this.#list.focus();
    });
    title.append(element("h2", "", `Answers to ${from}: ${text}`), close);
    this.#parts.hits.prepend(title);
    close.focus();
  }

  #show({ messages, problem, partial, next }, before, more) {
    const { hits } = this.#parts;
    hits.hidden = false;
    if (before) hits.lastElementChild.remove();
    else hits.replaceChildren();
    const found = (messages ?? []).map((message) => this.#hit(message));
    hits.append(...found);
    if (problem) hits.append(element("li", "error", problem));
    else if (partial) hits.append(element("li", "quiet", "Not everything could be read just now."));
    else if (hits.childElementCount === 0) hits.append(element("li", "quiet", "No messages found."));
    if (next != null) {
      const item = element("li");
      item.append(button("quiet", "More", more));
      hits.append(item);
    }
    if (before) found[0]?.firstElementChild.focus();
  }

  #hit(message) {
    const hit = button("hit", "", () => this.#jump(message));
    const meta = element("span", "meta");
    meta.append(element("span", "from", message.from), element("time", "", clock(message.ts)));
    hit.append(meta, element("span", "body", bodyText(message.body)));
    const item = element("li");
    item.append(hit);
    return item;
  }

  #closeHits() {
    this.#search += 1;
    this.#parts.hits.hidden = true;
    this.#parts.hits.replaceChildren();
  }

  async #jump({ from, id, cursor }) {
    if (!this.#log.find(from, id)) {
      this.#anew();
      await this.#load({ around: cursor }, (page) => {
        this.#offerAfter(page, true);
        if (page.next == null && !page.partial) {
          this.#setAway(false);
          this.#redraw();
        }
      }, () => {
        this.#setAway(true);
        this.#log.clear();
        this.#log.bottom = false;
      });
    }
    const item = this.#log.find(from, id);
    if (!item) return;
    item.scrollIntoView({ block: "center" });
    for (const other of this.#list.querySelectorAll(".found")) other.classList.remove("found");
    item.classList.add("found");
    item.tabIndex = -1;
    item.focus({ preventScroll: true });
  }

  /** Messages were erased: they must not be found again, either. */
  erased() {
    this.#closeHits();
  }
}
