// What the stories share: a browser, users behind relays of their own, and the judgement at the end of each.

import fs from "node:fs";

import { ALL, Native, jwt, newName, nowSeconds, packages, until } from "../../clients/support.mjs";
import { PlainSocket } from "../../clients/conformance/websocket.mjs";
import { Wire } from "../../clients/conformance/wire.mjs";
import { App, spy } from "./app.mjs";

/** Nothing here may take longer: coming back after a fault with a back-off. */
export const PATIENCE = 45_000;
/** The edge that is never killed: the script's own connections and requests are there. */
export const SAFE = 1;
export const OTHER = 0;
/** More messages than a join replays: who missed so many is told `reset`. */
export const REPLAY = 60;
/** What axe-core finds serious in the app of today; it is printed, and goes from here when the app is mended: a list of messages that
 * is a log holds no list items for it, and who is here is too pale while the connection is lost. */
const KNOWN = ["listitem: ", "color-contrast: #count, #names"];
const PAGE = 100;

export const CONFIG = `
[auth]
leeway = "0s"

[edge]
drain_spread = "1s"

[limits]
commands_per_second = 100000
commands_burst = 100000
outbox = "256KiB"
outbox_stall = "2s"

[rooms]
replay_max = ${REPLAY}

[namespaces.chat]
durable = true
typing = true
history = true
presence = "users"
`;

const { chromium } = packages("../browser/stories")("playwright-core");
export const AXE = fs.readFileSync(packages("../browser/stories").resolve("axe-core/axe.min.js"), "utf8");

export function launch(executablePath) {
  return chromium.launch({
    executablePath,
    args: ["--no-sandbox", "--no-proxy-server", "--disable-dev-shm-usage"],
    ignoreDefaultArgs: ["--disable-back-forward-cache"],
  });
}

/** What a story is given; whatever it opens is closed at its end. */
export class Story {
  constructor({ up, browser }) {
    Object.assign(this, { up, browser, closing: [], apps: [], errors: [] });
    this.room = `chat:${newName("story-")}`;
    this.ann = newName("ann-");
    this.bob = newName("bob-");
  }

  token(user, { ttl = 3_600, can = ALL, ...claims } = {}) {
    const now = nowSeconds();
    return jwt({ sub: user, iat: now, exp: now + ttl, grants: [{ rooms: "*:*", can }], ...claims }, this.up.secret());
  }

  /** A user in a browser of their own, behind a wire of their own; not in the room yet. */
  async app(user, { edge = OTHER, ...options } = {}) {
    const wire = await Wire.start(this.up.address(edge));
    this.closing.push(() => wire.close());
    wire.server.on("connection", (inner) => inner.on("data", (data) => (inner.isSocket ||= data.includes("Upgrade: websocket"))));
    const context = await this.browser.newContext({ locale: "en-US", ...options });
    this.closing.push(() => context.close());
    await context.addInitScript(spy);
    const page = await context.newPage();
    page.on("pageerror", (error) => this.errors.push(`${user}: ${error.message}`));
    const app = new App(page, user);
    Object.assign(app, { wire, context, url: wire.url.replace(/^ws/, "http").replace(/\/ws$/, ""), doubled: [] });
    this.apps.push(app);
    return app;
  }

  /** Freezes the WebSocket of an app, and not the connections by which the browser fetches the page. */
  freezeSocket({ wire }) {
    wire.freeze();
    for (const link of wire.links) {
      if (link.inner.isSocket) continue;
      link.isFrozen = false;
      for (const act of link.held.splice(0)) act();
    }
  }

  async inRoom(user, { token = this.token(user), ...options } = {}) {
    const app = await this.app(user, options);
    await app.enter(app.url, token, this.room);
    return app;
  }

  /** Ann and Bob in the room, each having seen a word of the other. */
  async both(options = {}) {
    const [ann, bob] = await Promise.all([this.inRoom(this.ann, options.ann), this.inRoom(this.bob, { edge: SAFE, ...options.bob })]);
    await ann.say("hello from ann");
    await bob.shows("hello from ann");
    await bob.say("hello from bob");
    await ann.shows("hello from bob");
    return [ann, bob];
  }

  async request(method, path, fields, { user = "service", can = [...ALL, "manage", "moderate", "admin"] } = {}) {
    const response = await fetch(`http://${this.up.address(SAFE)}/v1/${path}`, {
      method,
      headers: { authorization: `Bearer ${this.token(user, { can })}` },
      body: fields === undefined ? undefined : JSON.stringify(fields),
    });
    const text = await response.text();
    if (!response.ok) throw new Error(`${method} ${path}: ${response.status} ${text}`);
    return text ? JSON.parse(text) : null;
  }

  /** A service writes messages, one after the other; their texts. */
  async writes(count, text = (n) => `from a service ${n}`) {
    const native = await Native.open(PlainSocket, this.up.address(SAFE), this.token("service"));
    const texts = [];
    try {
      for (let n = 1; n <= count; n += 1) {
        const said = text(n);
        const reply = await native.call("send", { room: this.room, id: newName(), body: { text: said } });
        if (reply.op !== "ack") throw new Error(`a message of the service: ${JSON.stringify(reply)}`);
        texts.push(said);
      }
    } finally {
      native.close();
    }
    return texts;
  }

  /** What the API says was said in the room: `{from, text}`, in order. */
  async history() {
    let all = [];
    for (let before = ""; ;) {
      const page = await this.request("GET", `rooms/${this.room}/messages?limit=${PAGE}${before}`);
      all = [...page.messages.filter(({ kind }) => kind == null || kind === "message"), ...all];
      const oldest = page.messages[0]?.cursor;
      if (!oldest) return all.map(({ from, body }) => ({ from, text: body.text }));
      before = `&before=${encodeURIComponent(oldest)}`;
    }
  }

  async metric(pattern) {
    const text = await (await fetch(`http://${this.up.address(OTHER)}/metrics`)).text();
    return Number(text.match(pattern)?.[1] ?? 0);
  }

  /** After the faults: a last message comes to everybody, and the screen of each shows what history has: each message once, in
   * order. `texts` must be among them. `whole`: from the first message; else from some message to the end without a gap. */
  async judge(apps, { texts = [], whole = true, deadline = PATIENCE } = {}) {
    const [marker] = await this.writes(1, () => `the end ${newName()}`);
    const line = ({ from, text }) => `${from}: ${text}`;
    const said = await until("history has the last message", async () => {
      const all = (await this.history()).map(line);
      return all.some((one) => one.endsWith(marker)) && all;
    }, { deadline });
    if (new Set(said).size !== said.length) throw new Error(`a message is stored twice:\n${said.join("\n")}`);
    for (const text of texts) {
      if (!said.some((one) => one.endsWith(`: ${text}`))) throw new Error(`"${text.slice(0, 60)}" is not stored:\n${said.join("\n").slice(-2_000)}`);
    }
    for (const app of apps) {
      await app.shows(marker, "sent", deadline);
      let shown;
      const isSame = async () => {
        const messages = await app.messages();
        shown = messages.map(line);
        if (messages.some(({ status }) => status !== "sent")) return false;
        const wanted = whole ? said : said.slice(-shown.length);
        return shown.length > 0 && shown.length === wanted.length && shown.every((one, at) => one === wanted[at]);
      };
      await until("the screen shows what history has", isSame, { deadline }).catch((error) => {
        throw new Error(`${app.user}: ${error.message}\non screen:\n  ${shown.map((one) => one.slice(0, 80)).join("\n  ")}\nin history:\n  ${said.map((one) => one.slice(0, 80)).join("\n  ")}`);
      });
      const { doubled } = await app.seen();
      if (doubled.length) throw new Error(`${app.user}: was on screen twice at some time: ${doubled.join("; ")}`);
    }
    if (this.errors.length) throw new Error(`errors that nobody caught: ${this.errors.join("; ")}`);
  }

  async axe(app, what) {
    await app.page.evaluate(AXE); // as an expression of the debugger, which the Content-Security-Policy does not concern
    const found = await app.page.evaluate(async () => {
      const { violations } = await globalThis.axe.run({ resultTypes: ["violations"] });
      return violations.filter(({ impact }) => ["serious", "critical"].includes(impact))
        .map(({ id, nodes }) => `${id}: ${nodes.slice(0, 3).map(({ target }) => target.join(" ")).join(", ")}`);
    });
    const isKnown = (one) => KNOWN.some((rule) => one.startsWith(rule));
    for (const one of found.filter(isKnown)) console.log(`known ${what}: ${one}`);
    if (!found.every(isKnown)) throw new Error(`axe-core, ${what}: ${found.join("; ")}`);
  }

  async close() {
    for (const close of this.closing.reverse()) await close();
  }
}
