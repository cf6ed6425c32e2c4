// The app at `/` as the stories see it: every selector stands here, and in no other file.

import { DEADLINE, until } from "../../clients/support.mjs";

/** Runs in the page before its own scripts: what can only be seen from inside. */
export function spy() {
  globalThis.seen = { doubled: [], closes: [], restored: 0, longTasks: [], first: null, ready: null };
  const { seen } = globalThis;
  globalThis.WebSocket = class extends WebSocket {
    constructor(...args) {
      super(...args);
      this.addEventListener("close", ({ code }) => seen.closes.push(code));
    }
  };
  addEventListener("pageshow", ({ persisted }) => (seen.restored += persisted ? 1 : 0));
  new PerformanceObserver((list) => {
    for (const { startTime, duration } of list.getEntries()) seen.longTasks.push({ startTime, duration });
  }).observe({ type: "longtask", buffered: true });
  // After every change of the page: is a message there twice? The texts of a story are all different.
  new MutationObserver(() => {
    const known = new Set();
    for (const item of document.querySelectorAll("#log .message")) {
      const body = item.querySelector(".body")?.textContent;
      if (!body) continue;
      seen.first ??= performance.now();
      const key = `${item.dataset.from}: ${body}`;
      if (known.has(key) && seen.doubled.length < 20) seen.doubled.push(key);
      known.add(key);
    }
    const text = document.querySelector("#text");
    if (text && !text.disabled) seen.ready ??= performance.now();
  }).observe(document, { childList: true, subtree: true, attributes: true, attributeFilter: ["disabled"] });
}

export class App {
  constructor(page, user) {
    Object.assign(this, { page, user });
  }

  /** Comes with a link that has a token and a room. */
  async enter(url, token, room) {
    await this.page.goto("about:blank"); // where only the part behind # differs, nothing would be loaded
    await this.page.goto(`${url}/#token=${token}&room=${room}`);
    await this.online();
  }

  /** Puts another token into the form. */
  async renew(token) {
    await this.page.fill("#token", token);
    await this.page.click("#join");
    await this.online();
  }

  state() {
    return this.page.evaluate(() => document.querySelector("#state")?.dataset.state);
  }

  async online(deadline = DEADLINE) {
    await this.until("connected, and one can write", () => this.page.evaluate(() => (
      document.querySelector("#state")?.dataset.state === "connected" && document.querySelector("#text").disabled === false)), deadline);
  }

  closed() {
    return this.until("closed", async () => (await this.state()) === "closed", 2 * DEADLINE);
  }

  /** Waits; says what was on screen if it was in vain. */
  async until(what, condition, deadline) {
    try {
      return await until(`${this.user}: ${what}`, condition, { deadline });
    } catch (error) {
      const shown = await this.page.evaluate(() => document.body.innerText.slice(-1_500)).catch((gone) => gone.message);
      throw new Error(`${error.message}; on screen:\n${shown}`);
    }
  }

  /** What is on screen of the conversation: `{from, text, status}`, in order. */
  messages() {
    return this.page.evaluate(() => [...document.querySelectorAll("#log .message:not(.system)")].map((item) => ({
      from: item.dataset.from,
      text: item.querySelector(".body")?.textContent ?? "",
      status: ["pending", "failed"].find((name) => item.classList.contains(name)) ?? "sent",
    })));
  }

  shows(text, status = "sent", deadline = DEADLINE) {
    const isIt = (one) => one.text === text && one.status === status;
    return this.until(`"${text}" is ${status}`, async () => (await this.messages()).some(isIt), deadline);
  }

  async say(...texts) {
    for (const text of texts) {
      await this.page.fill("#text", text);
      await this.page.click("#send");
    }
  }

  /** Sends again what was refused: its text went back to where it was written. */
  async retry(text) {
    await this.until("the refused text is back", async () => (await this.page.inputValue("#text")) === text);
    await this.page.click("#send");
  }

  /** What is said beside the messages. */
  lines() {
    return this.page.evaluate(() => [...document.querySelectorAll("#log .line")].map((line) => line.textContent));
  }

  async openNewRoom() {
    await this.page.click("#new");
    await this.page.waitForSelector("#make[open]");
  }

  async openDetails() {
    await this.page.click("#about");
    await this.page.waitForSelector("#panel[open]");
  }

  async closeDialog() {
    await this.page.keyboard.press("Escape");
    await this.page.waitForSelector("dialog[open]", { state: "detached" });
  }

  async back() {
    if (await this.page.isVisible("#back")) await this.page.click("#back");
  }

  async toTop() {
    await this.page.evaluate(() => (document.querySelector("#log").scrollTop = 0));
  }

  count() {
    return this.page.evaluate(() => document.querySelectorAll("#log .message").length);
  }

  /** Scrolls to the top, and looks at the frames until older messages have come, a second at most. */
  scrollTurn(total) {
    return this.page.evaluate((total) => new Promise((resolve) => {
      const list = document.querySelector("#log");
      const oldest = () => list.querySelector(".message .body")?.textContent;
      const before = oldest();
      const began = performance.now();
      let last = began;
      let [worst, slow] = [0, 0];
      const look = (now) => {
        const took = now - last;
        last = now;
        if (took > 50) slow += 1;
        worst = Math.max(worst, took);
        if (oldest() !== before || now - began > 1_000) {
          const [, number] = oldest().match(/^message (\d+) /) ?? [];
          resolve({ worst, slow, loaded: total - Number(number), isFirst: Number(number) === 0 });
          return;
        }
        list.scrollTop = list.scrollTop > 400 ? list.scrollTop - 400 : 0;
        requestAnimationFrame(look);
      };
      requestAnimationFrame((now) => {
        last = now;
        look(now);
      });
    }), total);
  }

  seen() {
    return this.page.evaluate(() => globalThis.seen);
  }
}
