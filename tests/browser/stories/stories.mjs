// Two users through the app, and what happens to them. Each story ends with the judgement: screen against history.

import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";

import { until } from "../../clients/support.mjs";
import { OTHER, PATIENCE, REPLAY } from "./harness.mjs";

/** Messages of 60 kB at most: more than the buffers of a system hold for a connection. */
const SLOW = 300;

async function two_talk(s) {
  const [ann, bob] = await s.both();
  const texts = [];
  for (let n = 1; n <= 10; n += 1) {
    texts.push(`ann ${n}`, `bob ${n}`);
    await Promise.all([ann.say(`ann ${n}`), bob.say(`bob ${n}`)]);
  }
  await s.judge([ann, bob], { texts });
}

async function reload_while_others_write(s) {
  const [ann, bob] = await s.both();
  await ann.say("before the reload");
  const [texts] = await Promise.all([s.writes(30), ann.page.reload()]);
  await ann.online();
  await ann.say("after the reload");
  await s.judge([ann, bob], { texts: [...texts, "before the reload", "after the reload"] });
}

async function back_and_forward(s) {
  const [ann, bob] = await s.both();
  await ann.page.evaluate(() => (globalThis.isTheSame = true));
  await ann.page.goto(`http://${s.up.address(OTHER)}/healthz`); // another origin: the port differs
  const texts = await s.writes(5);
  await ann.page.goBack({ waitUntil: "commit" });
  await ann.online(PATIENCE);
  const isTheSame = await ann.page.evaluate(() => globalThis.isTheSame === true && globalThis.seen.restored > 0);
  assert(isTheSame, "the page was loaded anew: it was not taken from the back/forward cache");
  await ann.say("back again");
  await s.judge([ann, bob], { texts: [...texts, "back again"] });
}

async function offline_and_online(s) {
  const [ann, bob] = await s.both();
  await ann.context.setOffline(true);
  ann.wire.cut();
  await ann.until("not connected", async () => (await ann.state()) !== "connected");
  await ann.say("written offline 1", "written offline 2");
  await ann.shows("written offline 2", "pending");
  const texts = await s.writes(5);
  assert(!(await ann.messages()).some(({ text }) => text === texts[0]), "what was said reached somebody who is offline");
  ann.wire.open();
  await ann.context.setOffline(false);
  await ann.online(PATIENCE);
  await s.judge([ann, bob], { texts: [...texts, "written offline 1", "written offline 2"] });
}

async function a_sleeping_tab(s) {
  const [ann, bob] = await s.both();
  const debug = await ann.context.newCDPSession(ann.page);
  await debug.send("Page.setWebLifecycleState", { state: "frozen" });
  ann.wire.cut(); // the edge does not hold on to a computer that sleeps
  const texts = await s.writes(8);
  ann.wire.open();
  await debug.send("Page.setWebLifecycleState", { state: "active" });
  await ann.online(PATIENCE);
  await ann.say("awake");
  await s.judge([ann, bob], { texts: [...texts, "awake"] });
}

async function a_half_open_connection_in_the_quiet(s) {
  const [ann, bob] = await s.both();
  ann.wire.freeze();
  const texts = await s.writes(3);
  await ann.shows(texts.at(-1), "sent", PATIENCE); // by a new connection: the old one gives nothing
  ann.wire.thaw();
  await s.judge([ann, bob], { texts });
}

async function a_half_open_connection_while_writing(s) {
  const [ann, bob] = await s.both();
  ann.wire.freeze();
  await ann.say("into the void 1", "into the void 2");
  await ann.shows("into the void 1", "pending");
  await bob.say("bob goes on");
  await ann.shows("into the void 2", "sent", PATIENCE);
  ann.wire.thaw(); // the first copies arrive after all
  await s.judge([ann, bob], { texts: ["into the void 1", "into the void 2", "bob goes on"] });
}

async function an_edge_is_killed(s) {
  const [ann, bob] = await s.both();
  const killed = s.up.killEdge(OTHER);
  await ann.say("while the edge dies");
  const texts = await s.writes(5);
  await killed;
  await ann.online(PATIENCE);
  await ann.say("after it");
  await s.judge([ann, bob], { texts: [...texts, "while the edge dies", "after it"] });
}

async function a_token_runs_out(s) {
  const [ann, bob] = await s.both({ ann: { token: s.token(s.ann, { ttl: 20 }) } });
  await ann.closed();
  const texts = await s.writes(5);
  await ann.renew(s.token(s.ann));
  await ann.say("with a new token");
  await s.judge([ann, bob], { texts: [...texts, "with a new token"] });
}

async function a_user_is_revoked(s) {
  const [ann, bob] = await s.both();
  await s.up.run("revoke", "--user", s.ann);
  await ann.closed();
  const { closes } = await ann.seen();
  assert(closes.includes(4002), `the connection was closed with ${closes}`);
  const before = await ann.messages();
  const [text] = await s.writes(1, () => "not for ann");
  await bob.shows(text);
  assert.deepEqual(await ann.messages(), before, "a revoked user was told something");
  await s.judge([bob], { texts: [text] });
}

async function too_slow_4003(s) {
  const [ann] = await s.both();
  const closed = /^natter_session_closed_total\{[^}]*too_slow[^}]*\} (\d+)/m;
  const before = await s.metric(closed);
  ann.wire.stall();
  const filler = () => randomBytes(45_000).toString("base64"); // what can't be compressed
  const texts = [];
  await until("the end of the session", async () => {
    if (texts.length < SLOW) texts.push(...await s.writes(10, (n) => `${texts.length + n} ${filler()}`));
    return (await s.metric(closed)) > before;
  }, { deadline: PATIENCE });
  ann.wire.unstall();
  // The edge has counted a 4003. The frame that says so can't pass the stalled bytes, so the browser may read 1006.
  await ann.until("closed", async () => (await ann.seen()).closes.length > 0, PATIENCE);
  await ann.online(PATIENCE);
  await ann.say("quick again");
  // So many messages may be more than a join replays: what is on screen is the end of history, without a gap.
  await s.judge([ann], { texts: [...texts, "quick again"], whole: false });
}

async function more_was_missed_than_is_replayed(s) {
  const [ann, bob] = await s.both();
  ann.wire.cut();
  await ann.say("kept over the reset");
  const texts = await s.writes(2 * REPLAY);
  ann.wire.open();
  await ann.online(PATIENCE);
  // The newest page of history is on screen, without a gap; older ones come by scrolling.
  await s.judge([ann], { texts: [...texts, "kept over the reset"], whole: false });
  await until("all of it, by scrolling up", async () => {
    await ann.toTop();
    return (await ann.messages()).some(({ text }) => text === "hello from ann");
  });
  await s.judge([ann, bob], { texts });
}

async function the_outbox_survives_a_reload(s) {
  const [ann, bob] = await s.both();
  s.freezeSocket(ann); // only the connection that is there; the reload makes another one
  await ann.say("kept 1", "kept 2", "kept 3");
  for (const text of ["kept 1", "kept 2", "kept 3"]) await ann.shows(text, "pending");
  await ann.page.reload();
  await ann.online(PATIENCE);
  for (const text of ["kept 1", "kept 2", "kept 3"]) await ann.shows(text, "sent", PATIENCE);
  ann.wire.thaw(); // and now the first copies come, too
  await s.judge([ann, bob], { texts: ["kept 1", "kept 2", "kept 3"] });
}

async function a_refused_message_is_retried(s) {
  const [ann, bob] = await s.both();
  const path = `rooms/${s.room}`;
  await s.request("PATCH", path, { frozen: true });
  await ann.say("refused at first");
  await ann.shows("refused at first", "failed");
  assert(!(await s.history()).some(({ text }) => text === "refused at first"), "a refused message was stored");
  await s.request("PATCH", path, { frozen: false });
  await ann.retry("refused at first");
  await bob.shows("refused at first");
  await s.judge([bob], { texts: ["refused at first"] });
  // The page that leaves the refused one standing is judged by what was sent.
  const sent = (await ann.messages()).filter(({ text, status }) => text === "refused at first" && status === "sent");
  assert.equal(sent.length, 1, "the retried message is not on screen exactly once");
}

async function nothing_serious_for_a_screen_reader(s) {
  const [ann, bob] = await s.both();
  for (const viewport of [{ width: 1280, height: 800 }, { width: 390, height: 844 }]) {
    await ann.page.setViewportSize(viewport);
    for (const colorScheme of ["light", "dark"]) {
      await ann.page.emulateMedia({ colorScheme });
      const where = `${viewport.width} px, ${colorScheme}`;
      await s.axe(ann, `conversation, ${where}`);
      await ann.openDetails();
      await s.axe(ann, `details, ${where}`);
      await ann.closeDialog();
    }
  }
  await ann.back();
  await s.axe(ann, "list, 390 px");
  await ann.openNewRoom();
  await s.axe(ann, "new room, 390 px");
  await ann.closeDialog();
  bob.wire.cut();
  await bob.until("not connected", async () => (await bob.state()) !== "connected");
  await s.axe(bob, "not connected");
}

/** Those that wait long run beside the others; the one that kills an edge runs alone. */
export const LONG = [a_half_open_connection_in_the_quiet, a_half_open_connection_while_writing, a_token_runs_out, too_slow_4003];
export const STORIES = [
  two_talk,
  reload_while_others_write,
  back_and_forward,
  offline_and_online,
  a_sleeping_tab,
  a_user_is_revoked,
  more_was_missed_than_is_replayed,
  the_outbox_survives_a_reload,
  a_refused_message_is_retried,
  nothing_serious_for_a_screen_reader,
];
export const LAST = [an_edge_is_killed];
