// Files: those that are chosen and uploaded before a message names them, and those that came with messages.

import { request, roomPath } from "./http.js";
import { button, element, sentence, size } from "./words.js";

const PICTURES = /^image\/(png|jpeg|gif|webp|avif)$/;
const THUMBNAIL = /^data:image\/webp;base64,/;
const WHY = {
  bad_id: "This file is not there any more.",
  pending: "This file is being checked.",
  infected: "This file was checked, and is held back.",
};
const TRIES = 20; // questions for a file after its verdict
const WIDEST = 320; // px of a picture on the page
const HIGHEST = 256;

/** Where a file is uploaded to, or comes from. */
function addressOf(url) {
  const address = new URL(url, document.baseURI);
  if (!/^https?:$/.test(address.protocol)) throw { code: "bad_request", message: "the address of the file is not one of the web" };
  return address.href;
}

function whyNot(error) {
  const isOff = error.status === 404 && error.code !== "unknown_namespace";
  return isOff ? "Files can't be sent here: uploads are switched off." : sentence(error);
}

/** Sends the bytes. `fetch` does not tell how far it is. */
function put({ url, headers }, file, progress, signal) {
  return new Promise((resolve, reject) => {
    const sending = new XMLHttpRequest();
    signal.addEventListener("abort", () => sending.abort());
    sending.upload.addEventListener("progress", ({ loaded }) => progress(loaded));
    sending.addEventListener("load", () => {
      if (sending.status >= 200 && sending.status < 300) {
        resolve();
        return;
      }
      let answer = {};
      try {
        answer = JSON.parse(sending.responseText);
      } catch {
        // Not an answer of natter's own: the status is all there is.
      }
      reject({ code: "internal", message: `the storage answered ${sending.status}`, ...answer });
    });
    sending.addEventListener("error", () => reject({ code: "disconnected" }));
    sending.addEventListener("abort", () => reject({ code: "aborted" }));
    sending.open("PUT", addressOf(url));
    for (const [name, value] of Object.entries(headers)) sending.setRequestHeader(name, value);
    sending.send(file);
  });
}

/** Width and height of a picture, so that the page does not jump when it comes. */
async function measure(file) {
  if (!PICTURES.test(file.type)) return {};
  try {
    const picture = await createImageBitmap(file);
    const { width, height } = picture;
    picture.close();
    return { width, height };
  } catch {
    return {}; // not a picture, whatever its name says
  }
}

/** The files that are chosen for the next message. */
export class Chosen {
  #list; #changed;
  #files = []; // {item, abort, attachment}: `attachment` once it is uploaded

  /** `changed` is called when one was added, removed or has arrived. */
  constructor(list, changed) {
    this.#list = list;
    this.#changed = changed;
  }

  get isBusy() {
    return this.#files.some(({ attachment, failed }) => !attachment && !failed);
  }

  get isEmpty() {
    return this.#files.length === 0;
  }

  get attachments() {
    return this.#files.flatMap(({ attachment }) => attachment ?? []);
  }

  clear() {
    for (const { abort } of this.#files) abort.abort();
    this.#files = [];
    this.#list.replaceChildren();
    this.#changed();
  }

  add(token, room, files) {
    for (const file of files) this.#add(token, room, file);
  }

  /** Puts files back that have been uploaded: of a draft, or of a message that was refused. */
  take(attachments) {
    for (const attachment of attachments) {
      const { one, remove } = this.#newOne(attachment);
      one.attachment = attachment;
      remove("Remove");
    }
    this.#changed();
  }

  #newOne({ name, size: bytes }) {
    const abort = new AbortController();
    const item = element("li");
    const note = element("span", "quiet", size(bytes));
    const one = { item, abort, attachment: null, failed: false };
    const end = button("plain", "", () => {
      abort.abort();
      this.#files = this.#files.filter((other) => other !== one);
      item.remove();
      this.#changed();
    });
    const remove = (content) => {
      end.textContent = content;
      end.ariaLabel = `${content} ${name}`;
    };
    item.append(element("span", "name", name), note, end);
    this.#files.push(one);
    this.#list.append(item);
    return { one, note, end, remove };
  }

  async #add(token, room, file) {
    const { one, note, end, remove } = this.#newOne(file);
    const { abort } = one;
    const bar = element("progress");
    bar.ariaLabel = `Upload of ${file.name}`;
    bar.max = Math.max(1, file.size);
    end.before(bar);
    remove("Cancel");
    this.#changed();
    const type = file.type || "application/octet-stream";
    try {
      const granted = await request(token, "POST", `${roomPath(room)}/uploads`, { body: { name: file.name, type, size: file.size } });
      abort.signal.throwIfAborted();
      await put(granted.put, file, (sent) => { bar.value = sent; }, abort.signal);
      one.attachment = { upload: granted.upload, name: file.name, type, size: file.size, ...await measure(file) };
    } catch (error) {
      if (abort.signal.aborted) return;
      one.failed = true;
      note.className = "error";
      note.textContent = whyNot(error);
      note.role = "alert";
    }
    bar.remove();
    remove("Remove");
    this.#changed();
  }
}

/**
 * A file that came with a message: its name and size, and the picture, if it is one. What `attachment` says was written by
 * its sender.
 */
export function fileOf(attachment, { token, room }, settled) {
  const { upload, type } = attachment;
  const name = typeof attachment.name === "string" && attachment.name ? attachment.name : "file";
  const box = element("div");
  let waiting = null; // what is to be done once the file is checked
  let isJudged = false, tries = 0; // whether a worker has said something of it
  const open = async (use, isWanted = true) => {
    try {
      const path = `${roomPath(room)}/uploads/${encodeURIComponent(upload)}?redirect=false`;
      use(addressOf((await request(token, "GET", path)).url));
      problem.textContent = "";
    } catch (error) {
      problem.textContent = WHY[error.code] ?? sentence(error);
      if (error.code === "infected") picture?.gone();
      if (error.code !== "pending") return;
      // A picture comes by itself. What was clicked does not: a window that opens later would surprise.
      if (!isWanted) waiting = use;
      else waiting ??= () => {};
      // The verdict is seen here a moment before the edge knows of it.
      if (isJudged && (tries += 1) < TRIES) setTimeout(again, error.retry_after_ms ?? 2000);
    }
  };
  const again = () => {
    const use = waiting;
    waiting = null;
    if (use && box.isConnected) open(use, false);
  };
  const show = () => open((url) => {
    const link = element("a");
    Object.assign(link, { href: url, target: "_blank", rel: "noopener noreferrer" });
    link.click();
  });
  const link = button("file", name, show);
  link.role = "link";
  link.append(" ", element("span", "quiet", size(attachment.size)));
  const problem = element("div", "problem");
  box.append(link, problem);
  const picture = PICTURES.test(type) ? pictureOf(attachment, name, show, open, settled) : null;
  if (picture) box.prepend(picture.frame);
  /** What workers say of it. Anybody may have said it who may annotate: whether the file is given out, the edge decides. */
  const told = (said) => {
    picture?.told(said);
    isJudged ||= said.verdict != null;
    if (isJudged) again();
  };
  return { box, told };
}

function pictureOf({ width, height }, name, show, open, settled) {
  const frame = button("picture", "", show);
  frame.ariaLabel = `Open the picture ${name}`;
  const picture = element("img");
  picture.alt = name;
  const measure = (wide, high) => {
    if (!(wide > 0 && high > 0)) return;
    const scale = Math.min(1, WIDEST / wide, HIGHEST / high);
    picture.width = Math.max(1, Math.round(wide * scale));
    picture.height = Math.max(1, Math.round(high * scale));
  };
  measure(width, height);
  let isWhole = false; // whether it is the file itself, which a thumbnail does not replace
  picture.addEventListener("load", settled);
  picture.addEventListener("error", () => {
    if (isWhole) frame.remove(); // the link beside it says what is the matter. A thumbnail can be anything.
  });
  frame.append(picture);
  // Only what is looked at is loaded.
  const near = new IntersectionObserver((entries) => {
    if (!entries.some(({ isIntersecting }) => isIntersecting)) return;
    near.disconnect();
    open((url) => {
      isWhole = true;
      picture.src = url;
    }, false);
  }, { rootMargin: "300px" });
  near.observe(frame);
  return {
    frame,
    gone: () => {
      near.disconnect();
      frame.remove();
    },
    told: ({ width: wide, height: high, thumbnail }) => {
      if (isWhole) return;
      measure(wide, high);
      if (THUMBNAIL.test(thumbnail) && picture.src !== thumbnail) picture.src = thumbnail;
    },
  };
}
