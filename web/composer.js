// Where a message is written. A draft stays with its room.

import { set, t, textOf } from "./words-app.js";

const $ = (id) => document.getElementById(id);

const DRAFTS = 200; // drafts that are kept; the oldest goes

export class Composer {
  #room = null;
  #drafts = new Map();
  #about = null; // {mode, view}: what is answered or edited
  #ended = new AbortController();

  /** `send(body, about)` takes what was written, `typing()` is called with each key. */
  constructor(send, typing) {
    const { signal } = this.#ended;
    const go = () => {
      const text = $("text").value.trim();
      if (!text) return;
      const about = this.#about ?? {};
      this.#end();
      $("text").value = "";
      send({ text }, about);
    };
    $("say").addEventListener("submit", (event) => {
      event.preventDefault();
      go();
    }, { signal });
    $("text").addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.#cancel();
      // While a syllable is composed, Enter ends it.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      go();
    }, { signal });
    $("writing").lastElementChild.addEventListener("click", () => this.#cancel(), { signal });
    $("text").addEventListener("input", () => $("text").value && typing(), { signal });
  }

  /** What is written next answers a message, or takes the place of its text. */
  write(mode, view) {
    this.#cancel();
    this.#about = { mode, view };
    const text = textOf(view.body).slice(0, 120);
    $("writing").dataset.mode = mode;
    $("writing").hidden = false;
    set($("writing").firstElementChild, t(mode === "edit" ? "editing" : "answering", { user: view.from, text }));
    if (mode === "edit") $("text").value = textOf(view.body);
    $("text").focus();
  }

  #end() {
    this.#about = null;
    $("writing").hidden = true;
  }

  #cancel() {
    if (this.#about?.mode === "edit") $("text").value = "";
    this.#end();
  }

  stop() {
    this.#end();
    this.#ended.abort();
    $("text").value = "";
    $("say").hidden = true;
  }

  open(room) {
    if (room === this.#room) return;
    this.#cancel();
    const text = $("text").value;
    if (this.#room) {
      this.#drafts.delete(this.#room);
      if (text) this.#drafts.set(this.#room, text);
      if (this.#drafts.size > DRAFTS) this.#drafts.delete(this.#drafts.keys().next().value);
    }
    this.#room = room;
    $("text").value = this.#drafts.get(room) ?? "";
    $("say").hidden = !room;
  }
}
