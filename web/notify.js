// The button that asks for notifications while the page is closed.

import { request } from "./http.js";

const DEVICE = "natter:device";

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
    const subscription = await registration.pushManager.subscribe({
      userVisibleOnly: true,
      applicationServerKey: bytes(this.#key),
    });
    const body = { kind: "webpush", subscription: subscription.toJSON() };
    await request(token, "PUT", `v1/devices/${device()}`, { body });
    this.#button.hidden = true;
  }
}
