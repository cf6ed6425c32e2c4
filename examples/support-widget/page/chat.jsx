import { useConnection, useMessages, useNatter, usePresence, useSend, useTyping } from "@natter/client/react";
import { useEffect, useRef, useState } from "react";

const clock = (ts) => new Date(ts).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });

export function Chat({ room, onClose }) {
  const me = useNatter().user;
  const connection = useConnection();
  const { messages, hasOlder, loading, loadOlder, room: joined } = useMessages(room);
  const { users } = usePresence(room);
  const { users: typists, typing } = useTyping(room);
  const send = useSend(room);
  const [text, setText] = useState("");
  const list = useRef(null);
  const field = useRef(null);
  const newest = messages.at(-1);

  useEffect(() => field.current?.focus(), []);
  // What is shown is read.
  useEffect(() => {
    if (newest && document.visibilityState === "visible") joined.read();
  }, [newest?.key, joined]);
  useEffect(() => {
    list.current.scrollTop = list.current.scrollHeight;
  }, [newest?.key, typists.length]);

  const submit = (event) => {
    event.preventDefault();
    if (!text.trim()) return;
    send({ text: text.trim() });
    setText("");
    field.current.focus(); // the button is disabled now, and would lose it
  };
  const isHere = users.some(({ user }) => user !== me);
  const where = connection.name === "online" ? (isHere ? "We are here" : "Leave us a message") : "Connecting…";

  return (
    <section className="support-chat" aria-label="Support" onKeyDown={(event) => event.key === "Escape" && onClose()}>
      <header>
        <h2>Support</h2>
        <span role="status" data-connection={connection.name}>{where}</span>
      </header>
      <ol ref={list} role="log" aria-label="Messages" tabIndex={0}>
        {hasOlder && (
          <li>
            <button type="button" disabled={loading} onClick={loadOlder}>Earlier messages</button>
          </li>
        )}
        {messages.filter(({ kind, deleted_at }) => !kind && !deleted_at).map((message) => (
          <Message key={message.key} message={message} />
        ))}
      </ol>
      <p className="support-typing" aria-live="polite">{typists.length > 0 && "Somebody is typing…"}</p>
      <form onSubmit={submit}>
        <input
          ref={field}
          aria-label="Your message"
          placeholder="Your message"
          maxLength={4000}
          value={text}
          onChange={(event) => {
            setText(event.target.value);
            typing();
          }}
        />
        <button disabled={!text.trim()}>Send</button>
      </form>
    </section>
  );
}

function Message({ message: { id, own, ts, body, status, handle, error } }) {
  return (
    <li data-id={id} data-state={status} className={own ? "own" : ""}>
      <p>{body?.text}</p>
      {status === "sent" && <time dateTime={new Date(ts).toISOString()}>{clock(ts)}</time>}
      {status === "pending" && <small>sending…</small>}
      {status === "failed" && (
        <small role="alert">
          Not sent{error ? `: ${error.message}` : ""}. <button type="button" onClick={() => handle.retry()}>Try again</button>
        </small>
      )}
    </li>
  );
}
