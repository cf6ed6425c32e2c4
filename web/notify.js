// The button that asks for notifications while the page is closed.

import { request } from "./http.js";
import { userOf } from "./natter.js";

const DEVICE = "natter:device";
const OWNER = "natter:device-user"; // whose messages this browser shows

/** The name of this browser among the user's devices. */
function device() {
  try {
    const name = localStorage.getItem(DEVICE) ?? `browser-${crypto.randomUUID()}`;
    localStorage.setItem(DEVICE, name);
    return name;
  } catch {
    return "browser";
  }
}

/** Another user is here: the messages of the one before must not be shown any more. The service removes the device then. */
async function release(user) {
  const before = owner();
  if (before === null || before === user) return;
  const registration = await navigator.serviceWorker.getRegistration(new URL("sw.js", document.baseURI));
  const subscription = await registration?.pushManager.getSubscription();
  await subscription?.unsubscribe();
  own(user);
}

function owner() {
  try {
    return localStorage.getItem(OWNER);
  } catch {
    return null; // without a store nothing is known
  }
}

function own(user) {
  try {
    localStorage.setItem(OWNER, user);
  } catch {
    // The same.
  }
}

const bytes = (text) => Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), (c) => c.charCodeAt(0));

export class Notices {
  #button;
  #token = "";
  #key = null;

  /** `open(room)` shows a room whose notification was clicked, `tell(text)` is for those who listen. */
  constructor(button, { open, tell }) {
    this.#button = button;
    button.addEventListener("click", () => this.#ask().catch((error) => tell(`Notifications: ${error.message}`)));
    navigator.serviceWorker?.addEventListener("message", ({ data }) => {
      if (typeof data?.open === "string") open(data.open);
    });
  }

  /** Shows the button if the edge and the browser can do it, and it was not done. */
  async enter(token) {
    this.#token = token;
    this.#button.hidden = true;
    if (!token || !("serviceWorker" in navigator && "PushManager" in window && "Notification" in window)) return;
    await release(userOf(token));
    const { devices, vapid_public_key: key } = await request(token, "GET", "v1/devices");
    if (!key || token !== this.#token) return;
    this.#key = key;
    this.#button.hidden = devices.some((known) => known.device === device()) && Notification.permission === "granted";
  }

  async #ask() {
    const token = this.#token;
    if ((await Notification.requestPermission()) !== "granted") return;
    await navigator.serviceWorker.register(new URL("sw.js", document.baseURI));
    const registration = await navigator.serviceWorker.ready;
    // One that was made with another key of the edge can't be kept.
    await (await registration.pushManager.getSubscription())?.unsubscribe();
    const subscription = await registration.pushManager.subscribe({
      userVisibleOnly: true,
      applicationServerKey: bytes(this.#key),
    });
    const body = { kind: "webpush", subscription: subscription.toJSON() };
    await request(token, "PUT", `v1/devices/${device()}`, { body });
    own(userOf(token));
    this.#button.hidden = true;
  }
}
