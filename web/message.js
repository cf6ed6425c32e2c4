// One message as a node.

import { button, clock, element, full, sentence, t, textOf, told } from "./words-app.js";

/** What natter tells of the room. */
export function entry(view) {
  const node = element("p", "line", told(view.body));
  node.title = full(view.ts);
  return node;
}

const LIKE = "👍";

/** `joined`: it follows one of the same user, so the name is not said again. `answered`: the message that it answers, if known.
 * `act(name, view, key)` is called for `answer`, `react`, `edit` and `delete`. */
export function message(view, { joined, answered, seen, act }) {
  const { key, id, own, from, ts, body, status, deleted_at: deleted, edited_at: edited, reply_to: replyTo, reactions } = view;
  const node = element("article", `message${own ? " own" : ""}${joined ? " joined" : ""}`);
  node.tabIndex = -1;
  Object.assign(node.dataset, { id, key, from, state: status });
  const meta = element("p", "meta");
  const time = element("time", "", clock(ts));
  time.dateTime = new Date(ts).toISOString();
  time.title = full(ts);
  meta.append(element("span", joined ? "hidden" : "from", own ? t("you") : from), " ", time);
  if (edited && !deleted) meta.append(" ", element("span", "quiet", t("edited")));
  node.append(meta);
  if (replyTo) {
    const text = answered ? textOf(answered.body).slice(0, 120) : t("earlier");
    node.append(element("p", "answered", t("answerTo", { user: replyTo.slice(0, replyTo.lastIndexOf("/")), text })));
  }
  const said = element("p", deleted ? "quiet" : "body", deleted ? t("deleted") : textOf(body));
  said.dir = "auto";
  node.append(said);
  const files = !deleted && Array.isArray(body?.attachments) ? body.attachments.length : 0;
  if (files) node.append(element("p", "quiet", t(files === 1 ? "oneFile" : "files", { n: files })));
  if (reactions.length > 0) {
    const line = element("p", "reactions");
    for (const { key: reaction, count, mine } of reactions) {
      const one = button("reaction", `${reaction} ${count}`, () => act("react", view, reaction));
      one.dataset.reaction = reaction;
      one.ariaPressed = String(mine);
      one.ariaLabel = t("reactions", { key: reaction, n: count });
      line.append(one, " ");
    }
    node.append(line);
  }
  if (status !== "sent") node.append(notSent(view));
  else if (!deleted) node.append(acts(view, act));
  if (seen) node.append(element("p", "seen quiet", t("seen", { users: seen })));
  return node;
}

function acts(view, act) {
  const line = element("p", "acts");
  for (const name of view.own ? ["answer", "react", "edit", "delete"] : ["answer", "react"]) {
    const one = button("plain", t(name), () => act(name, view, LIKE));
    one.dataset.act = name;
    line.append(one);
  }
  return line;
}

function notSent({ status, handle, error }) {
  const line = element("p", status === "failed" ? "problem" : "quiet");
  if (status === "pending") {
    line.textContent = error ? t("waits", { why: sentence(error) }) : t("sending");
    return line;
  }
  line.append(t("notSent", { why: error ? sentence(error) : "" }), " ");
  line.append(button("plain", t("again"), () => handle.retry()), " ", button("plain", t("discard"), () => handle.cancel()));
  return line;
}
