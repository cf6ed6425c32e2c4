// Shows notifications of natter while the page is closed, and opens the room of one that is clicked. It does nothing else: no
// request of the page goes through it.

const at = (room) => new URL(room ? `./#room=${encodeURIComponent(room)}` : "./", self.registration.scope).href;

self.addEventListener("push", (event) => {
  let note = {};
  try {
    note = event.data?.json() ?? {};
  } catch {
    // Not from natter: a browser must show something for each all the same.
  }
  const shown = self.registration.showNotification(note.title ?? "natter", {
    body: note.text ?? "There is a new message.",
    // A later one of the same room takes its place.
    tag: note.room,
    renotify: Boolean(note.room),
    timestamp: note.at,
    data: { room: note.room },
  });
  const badge = note.badge == null ? null : self.navigator.setAppBadge?.(note.badge);
  event.waitUntil(Promise.allSettled([shown, badge]));
});

self.addEventListener("notificationclick", (event) => {
  event.notification.close();
  const url = at(event.notification.data?.room);
  const open = async () => {
    const windows = await self.clients.matchAll({ type: "window", includeUncontrolled: true });
    const page = windows.find((client) => client.url.startsWith(self.registration.scope));
    if (!page) return self.clients.openWindow(url);
    page.postMessage({ open: event.notification.data?.room });
    return page.focus();
  };
  event.waitUntil(open());
});
