// The support chat: a button with what is unread, and the conversation. Copy this file, chat.jsx and their part of page.css.
import { NatterProvider, useUnread } from "@natter/client/react";
import { useEffect, useRef, useState } from "react";

import { Chat } from "./chat.jsx";

/** Asks the back end who this visitor is: where the edge is, the room, and a token for it. */
async function session() {
  const response = await fetch("/session", { method: "POST" });
  if (!response.ok) throw new Error(`the back end said ${response.status}`);
  return response.json();
}

export function Support() {
  const [known, setKnown] = useState(null);
  const [away, setAway] = useState(false);
  const first = useRef(null); // StrictMode runs effects twice: one visitor, one request
  useEffect(() => {
    first.current ??= session();
    first.current.then(setKnown, () => setAway(true));
  }, []);
  if (away) return <p className="support-away">Our chat is away. Write to help@example.org.</p>;
  if (!known) return null;
  // The first token is here already. Later ones are asked for when they are needed.
  let token = known.token;
  const getToken = async () => {
    const next = token ?? (await session()).token;
    token = null;
    return next;
  };
  return (
    <NatterProvider url={known.url} getToken={getToken} storage={localStorage}>
      <Widget room={known.room} />
    </NatterProvider>
  );
}

function Widget({ room }) {
  const [isOpen, setOpen] = useState(() => sessionStorage.getItem("support") === "open");
  const { rooms } = useUnread();
  const unread = isOpen ? 0 : (rooms[room] ?? 0);
  const button = useRef(null);
  useEffect(() => sessionStorage.setItem("support", isOpen ? "open" : "closed"), [isOpen]);
  const close = () => {
    setOpen(false);
    button.current?.focus();
  };
  return (
    <>
      {isOpen && <Chat room={room} onClose={close} />}
      <button ref={button} type="button" className="support-button" aria-expanded={isOpen} onClick={() => setOpen(!isOpen)}>
        {isOpen ? "Close" : "Ask us"}
        {unread > 0 && (
          <span className="support-badge" role="status">
            {unread}
            <span className="support-hidden"> new messages</span>
          </span>
        )}
      </button>
    </>
  );
}
