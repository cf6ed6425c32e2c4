// A click on a notification of the chat page opens its room. Headless Chromium shows no notification that could be clicked, so the
// click is a stand-in: the event that the browser would hand to the service worker, with the notification that is really there.
//
//     node tests/browser/click.mjs NATTER
//
// It needs playwright-core, which is installed for the SDK's tests. The last line is `N passed, N failed`; 77 if there is no Chromium.

import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import fs from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";
import { fileURLToPath } from "node:url";

import { Results, Up, findChromium, jwt, nowSeconds, until } from "../clients/support.mjs";

const ROOT = fileURLToPath(new URL("../..", import.meta.url));
const [binary] = process.argv.slice(2);
if (!binary) {
  console.error("usage: node tests/browser/click.mjs NATTER");
  process.exit(64);
}
const program = findChromium();
if (!program) {
  console.log("skipped: no Chromium");
  process.exit(77);
}
const sdk = path.join(ROOT, "sdk/js");
if (!fs.existsSync(path.join(sdk, "node_modules/playwright-core"))) {
  const npm = spawnSync("npm", ["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"], { cwd: sdk, stdio: "inherit" });
  if (npm.status !== 0) process.exit(1);
}
const { chromium } = createRequire(path.join(sdk, "package.json"))("playwright-core");

const results = new Results();
const up = await Up.start(binary);
const browser = await chromium.launch({ executablePath: program, args: ["--no-sandbox"] });
try {
  const base = up.edge(0).http.replace(/\/$/, "");
  const context = await browser.newContext();
  await context.grantPermissions(["notifications"], { origin: base });
  const page = await context.newPage();
  const now = nowSeconds();
  const grants = [{ rooms: "*:*", can: ["read", "write", "presence", "history"] }];
  const token = jwt({ sub: "kim", iat: now, exp: now + 3600, grants }, up.secret());
  await page.goto(`${base}/#token=${token}&room=chat:lobby`);
  const shows = (room) => until(`the page shows ${room}`, () => page.evaluate((name) => document.querySelector("#app")?.dataset.room === name, room));
  await shows("chat:lobby");
  const [worker] = await Promise.all([
    context.waitForEvent("serviceworker"),
    page.evaluate(() => navigator.serviceWorker.register("sw.js").then(() => navigator.serviceWorker.ready).then(() => {})),
  ]);

  await results.run("a notification is shown while the tab is hidden", async () => {
    const other = await context.newPage(); // in front of it
    await other.bringToFront();
    await worker.evaluate(() => {
      const data = JSON.stringify({ title: "lee in Tea", text: "hi", room: "chat:tea", message: "lee/1", at: 1 });
      self.dispatchEvent(new PushEvent("push", { data }));
    });
    const shown = await until("it is there", async () => {
      const all = await worker.evaluate(() => self.registration.getNotifications().then((notes) => notes.map(({ title, body }) => [title, body])));
      return all.length > 0 && all;
    });
    assert.deepEqual(shown, [["lee in Tea", "hi"]]);
    await other.close();
  });

  await results.run("a click on it opens the room in the page that is there, and takes it away", async () => {
    await worker.evaluate(async () => {
      const [notification] = await self.registration.getNotifications();
      self.dispatchEvent(new NotificationEvent("notificationclick", { notification }));
    });
    await shows("chat:tea");
    assert.equal(await worker.evaluate(() => self.registration.getNotifications().then((notes) => notes.length)), 0);
  });

  await results.run("a click without a page opens one at the room", async () => {
    // Chromium opens windows only for a click of a person, so what is asked of it is what is checked.
    await page.goto("about:blank");
    const asked = await worker.evaluate(async () => {
      let asked = null;
      self.clients.openWindow = async (url) => void (asked = url);
      await self.registration.showNotification("lee in Tea", { data: { room: "chat:tea" } });
      const [notification] = await self.registration.getNotifications();
      self.dispatchEvent(new NotificationEvent("notificationclick", { notification }));
      while (asked == null) await new Promise((resolve) => setTimeout(resolve, 5));
      return asked;
    });
    assert.equal(asked, `${base}/#room=chat%3Atea`);
  });
} finally {
  await browser.close();
  await up.stop();
}
process.exit(results.sum());
