// What users of the types may write, and what they may not. Checked by tsc against the .d.ts files that are packed.

import { Natter, NatterError, compareCursors, newId, reaches, refOf } from "@natter/client";
import type { Ack, Message, State, Summary } from "@natter/client";
import { NatterProvider, useConnection, useInbox, useMessages, usePresence, useSend, useTyping } from "@natter/client/react";
import { Backend, HookError, signToken, verifyHook } from "@natter/client/server";
import { inbox, messages, presence, typing, unread } from "@natter/client/store";

const client = new Natter({
  url: ["https://one.example.org", "wss://two.example.org/ws"],
  getToken: async ({ reason, signal }) => {
    const why: "first" | "expiring" | "refused" = reason;
    const response = await fetch(`/token?${why}`, { signal });
    return response.ok ? await response.text() : null;
  },
  storage: localStorage,
});
// @ts-expect-error: a url is needed
new Natter({ token: "" });
// @ts-expect-error: no such option
new Natter({ url: "", token: "", tokn: "" });

const off: () => void = client.on("state", ({ name, reason, retryAt }) => {
  const state: State["name"] = name;
  const at: number | undefined = retryAt;
  return [state, reason?.length, at];
});
off();
// @ts-expect-error: no such event
client.on("stat", () => {});
// @ts-expect-error: not to be written
client.state.name = "online";

const room = client.room("chat:lobby");
const joined: Promise<{ cursor?: string; replay: number }> = room.join({ since: null, presence: true });
void joined;
room.on("message", ({ from, body, kind }) => [from.length, body.text, kind?.length]);
room.on("reset", ({ reason }) => reason.length);
// @ts-expect-error: no such field
room.on("typing", ({ name }) => name);
const handle = room.send({ text: "hello" }, { id: newId(), reply_to: { from: "lee", id: "m1" }, mentions: ["lee"] });
const state: "pending" | "sent" | "failed" = handle.state;
const ack: Promise<Ack> = handle.done;
handle.on("state", ({ error }) => error?.retryAfterMs);
void [state, ack, room.react("lee/m1", "👍", false), room.upload(new File([], "x"), { onProgress: (share) => share.toFixed() })];
// @ts-expect-error: not an option of a message
room.send("x", { kind: "edit" });

async function all(): Promise<void> {
  for await (const message of room.listen({ since: "c", signal: AbortSignal.timeout(1) })) {
    const one: Message = message;
    const order: number | undefined = compareCursors(one.cursor ?? "", "b");
    void [order, reaches("a", "b"), refOf(one)];
  }
  for await (const { id } of room) id.length;
  const { messages: page, prev } = await room.history({ limit: 10 });
  void [page[0].reactions?.["👍"].count, prev?.length, (await room.record()).members[0].role];
  await client.createRoom({ namespace: "chat", kind: "dm", members: ["kim"] });
  // @ts-expect-error: no such kind
  await client.createRoom({ namespace: "chat", kind: "party" });
  const found: Summary[] = (await client.inbox()).rooms;
  void found;
}
void all;

const shown = messages(room).getSnapshot();
const bodies: string[] = shown.messages.filter(({ status }) => status === "failed").map(({ key }) => key);
// @ts-expect-error: snapshots are read only
shown.messages.push(shown.messages[0]);
const stop: () => void = inbox(client).subscribe(() => {});
const counts: [number | null, number, readonly string[]] = [presence(room).getSnapshot().count, unread(client).getSnapshot().total, typing(room).getSnapshot()];
void [bodies, stop, counts];

export function Chat() {
  const { messages: list, loadOlder, hasOlder } = useMessages("chat:lobby");
  const send = useSend(room);
  const { users, typing: type } = useTyping(room);
  const { name } = useConnection();
  const { rooms } = useInbox();
  void [list[0]?.body, hasOlder && loadOlder(), send({ text: "" }).id, users.length, type(), name, rooms[0]?.unread, usePresence(room).named];
  return null;
}
NatterProvider({ client });
NatterProvider({ url: "", getToken: () => null });
// @ts-expect-error: neither a client nor options
NatterProvider({ children: null });

const signed: Promise<string> = signToken({ user: "kim", grants: [{ rooms: "chat:*", can: ["read"] }] }, "secret", { alg: "HS256" });
// @ts-expect-error: no such algorithm
void signToken({ user: "kim", grants: [] }, "secret", { alg: "none" });
const checked: Promise<any> = verifyHook(new Headers(), "{}", ["whsec_"], { tolerance: 10 });
const backend = new Backend({ url: "https://one.example.org", token: () => signed });
void [checked, backend.publish("chat:a", 1, { as: "kim" }).then(({ dup }) => dup)];
try {
  // nothing
} catch (error) {
  if (error instanceof NatterError && error.retry) void error.code;
  if (error instanceof HookError && error.code === "too_old") void 0;
}
