// Where a message is written. A draft stays with its room.

const $ = (id) => document.getElementById(id);

const DRAFTS = 200; // drafts that are kept; the oldest goes

export class Composer {
  #room = null;
  #drafts = new Map();
  #ended = new AbortController();

  /** `send(body)` takes what was written, `typing()` is called with each key. */
  constructor(send, typing) {
    const { signal } = this.#ended;
    const go = () => {
      const text = $("text").value.trim();
      if (!text) return;
      send({ text });
      $("text").value = "";
    };
    $("say").addEventListener("submit", (event) => {
      event.preventDefault();
      go();
    }, { signal });
    $("text").addEventListener("keydown", (event) => {
      // While a syllable is composed, Enter ends it.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      go();
    }, { signal });
    $("text").addEventListener("input", () => $("text").value && typing(), { signal });
  }

  stop() {
    this.#ended.abort();
    $("text").value = "";
    $("say").hidden = true;
  }

  open(room) {
    if (room === this.#room) return;
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
