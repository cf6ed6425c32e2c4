// Figures of the page, as Lighthouse has them, and pictures of its main states. Sizes are limits; times are told, and judge nothing.

import fs from "node:fs";
import path from "node:path";

import { Native, newName, until } from "../../clients/support.mjs";
import { PlainSocket } from "../../clients/conformance/websocket.mjs";
import { SAFE } from "./harness.mjs";

const KIB = 1024;
/** What the browser fetches for a first visit, in bytes on the wire. */
const LIMITS = { all: 400 * KIB, requests: 40 };
const MESSAGES = 10_000;
/** Milliseconds of scrolling up, at most. */
const SCROLL_TIME = 20_000;
const WINDOW = 200;

/** Writes many messages, `WINDOW` of them at once. */
async function fill(story, count) {
  const native = await Native.open(PlainSocket, story.up.address(SAFE), story.token("service"));
  try {
    for (let n = 0; n < count; n += WINDOW) {
      const some = Array.from({ length: Math.min(WINDOW, count - n) }, (_, at) => (
        native.call("send", { room: story.room, id: newName(), body: { text: `message ${n + at} of many, as long as one that people write` } })));
      for (const reply of await Promise.all(some)) {
        if (reply.op !== "ack") throw new Error(`a message that fills the room: ${JSON.stringify(reply)}`);
      }
    }
  } finally {
    native.close();
  }
  await until("history has the last message", async () => {
    const { messages } = await story.request("GET", `rooms/${story.room}/messages?limit=1`);
    return messages.at(-1)?.body.text.startsWith(`message ${count - 1} `);
  }, { deadline: 60_000 });
}

export async function figures(story) {
  await fill(story, MESSAGES);
  const app = await story.app(story.ann, { edge: SAFE });
  const debug = await app.context.newCDPSession(app.page);
  await debug.send("Network.enable");
  const got = new Map();
  debug.on("Network.responseReceived", ({ requestId, response }) => got.set(requestId, { url: response.url, bytes: 0 }));
  debug.on("Network.loadingFinished", ({ requestId, encodedDataLength }) => {
    if (got.has(requestId)) got.get(requestId).bytes = encodedDataLength;
  });
  await app.enter(app.url, story.token(story.ann), story.room);
  await app.until("a message", async () => (await app.count()) > 0);
  const code = [...got.values()].filter(({ url }) => url.startsWith("http") && !new URL(url).pathname.startsWith("/v1/"));
  const bytes = code.reduce((sum, one) => sum + one.bytes, 0);
  const first = await app.seen();
  const loading = first.longTasks.length;

  const end = performance.now() + SCROLL_TIME;
  let most = 0;
  let frames = { worst: 0, slow: 0 };
  const began = performance.now();
  while (performance.now() < end) {
    const turn = await app.scrollTurn(MESSAGES);
    most = Math.max(most, turn.loaded);
    frames = { worst: Math.max(frames.worst, turn.worst), slow: frames.slow + turn.slow };
    if (turn.isFirst) break;
  }
  const tasks = (await app.seen()).longTasks.slice(loading);
  const table = [
    ["transferred for a first visit", `${(bytes / KIB).toFixed(1)} KiB in ${code.length} requests (at most ${LIMITS.all / KIB} KiB, ${LIMITS.requests})`],
    ["first message on screen", `${Math.round(first.first)} ms after the navigation`],
    ["one can write", `${Math.round(first.ready)} ms`],
    ["long tasks while loading", `${loading}, ${Math.round(first.longTasks.reduce((sum, one) => sum + one.duration, 0))} ms`],
    [`scrolled up, of ${MESSAGES} messages`, `${most} in ${((performance.now() - began) / 1000).toFixed(1)} s`],
    ["long tasks while scrolling", `${tasks.length}, the longest ${Math.round(Math.max(0, ...tasks.map((one) => one.duration)))} ms`],
    ["frames over 50 ms while scrolling", `${frames.slow}, the longest ${Math.round(frames.worst)} ms`],
  ];
  for (const [what, value] of table) console.log(`      ${what.padEnd(38)} ${value}`);
  if (bytes > LIMITS.all || code.length > LIMITS.requests) throw new Error(`the page is too large: ${bytes} bytes, ${code.length} requests`);
}

/** Pictures of the main states, at both widths, in both languages, light and dark. */
export async function pictures(story, folder) {
  fs.mkdirSync(folder, { recursive: true });
  const bob = await story.inRoom(story.bob);
  await bob.say("Is the room at the station still free?", "안녕하세요, 아직 예약할 수 있나요?");
  await bob.shows("안녕하세요, 아직 예약할 수 있나요?");
  for (const [locale, colorScheme] of ["en-US", "ko-KR"].flatMap((one) => [[one, "light"], [one, "dark"]])) {
    const app = await story.inRoom(story.ann, { edge: SAFE, locale, colorScheme });
    await app.shows("안녕하세요, 아직 예약할 수 있나요?");
    for (const width of [1280, 390]) {
      const shoot = async (state) => {
        const [wide, inner] = await app.page.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
        await app.page.screenshot({ path: path.join(folder, `${state}-${width}-${locale.slice(0, 2)}-${colorScheme}.png`) });
        if (wide > inner) throw new Error(`${state}: ${wide} px wide in ${inner} px`);
      };
      await app.page.setViewportSize({ width, height: width === 390 ? 844 : 800 });
      await shoot("conversation");
      await app.openDetails();
      await shoot("details");
      await app.closeDialog();
      if (width === 390) {
        await app.back();
        await shoot("list");
      }
      await app.openNewRoom();
      await shoot("new-room");
      await app.closeDialog();
    }
    app.wire.cut();
    await app.until("not connected", async () => (await app.state()) !== "connected");
    await app.page.screenshot({ path: path.join(folder, `offline-390-${locale.slice(0, 2)}-${colorScheme}.png`) });
    await app.context.close();
  }
}
