// Talks with the server: the key, errors, and the events of a drawing.

import { $ } from "./dom.js";

export const KEY = "sdkd-api-key"; // in the session's storage
const BROKEN = "The connection broke before the drawing was finished.";

export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export class Cancelled extends Error {}

let asked = null; // one dialog, however many requests wait for it

function askKey(again) {
  asked ??= new Promise((resolve) => {
    const dialog = $("key-dialog");
    const over = (key) => {
      asked = null;
      resolve(key);
    };
    $("key-text").textContent = again
      ? "The server did not accept that key."
      : "This server asks for its API key. It is kept until this tab is closed.";
    $("key").value = "";
    $("key-form").onsubmit = () => {
      sessionStorage.setItem(KEY, $("key").value.trim());
      dialog.returnValue = "given";
    };
    $("key-cancel").onclick = () => dialog.close("");
    dialog.returnValue = "";
    dialog.onclose = () => over(sessionStorage.getItem(KEY) !== null && dialog.returnValue !== "");
    $("key-submit").value = "given";
    dialog.showModal();
  });
  return asked;
}

async function errorOf(response) {
  let told = null;
  try {
    told = await response.json();
  } catch {
    // A proxy's page, say: the status has to do.
  }
  const detail = typeof told?.detail === "string" ? told.detail : null;
  const message = told?.error?.message ?? detail ?? `The server answered ${response.status} ${response.statusText}`;
  const wait = response.headers.get("Retry-After");
  return new ServerError(wait ? `${message} (try again in ${wait} s)` : message, response.status);
}

async function send(path, options) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key === null ? {} : { Authorization: `Bearer ${key}` }) };
  try {
    return await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw new Cancelled();
    throw new ServerError("The server cannot be reached. Is it still running?", 0);
  }
}

// A good response; asks for the key as often as the server refuses it. Addresses are relative: a proxy may add a folder.
export async function request(path, options = {}) {
  let response = await send(path, options);
  while (response.status === 401) {
    const refused = await errorOf(response);
    const again = sessionStorage.getItem(KEY) !== null;
    sessionStorage.removeItem(KEY);
    if (!(await askKey(again))) throw refused;
    response = await send(path, options);
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

// Blocks of server-sent events: [kind, data] each.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read().catch(() => {
      throw new ServerError(BROKEN, 0);
    });
    if (done) return;
    text = (text + value).replaceAll("\r\n", "\n");
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const lines = block.split("\n").map((line) => line.split(/: ?(.*)/s, 2));
      const kind = lines.find(([name]) => name === "event")?.[1] ?? "message";
      const data = lines.filter(([name]) => name === "data").map(([, rest]) => rest);
      if (data.length) yield [kind, JSON.parse(data.join("\n"))];
    }
  }
}

async function follow(body, watch) {
  const images = [];
  for await (const [kind, data] of events(body)) {
    if (kind === "error") throw new ServerError(data.message, data.code);
    if (kind === "cancelled") throw new Cancelled();
    if (kind === "image") images.push(data);
    watch(kind, data);
    if (kind === "done") return { images, timing: data.timing };
  }
  throw new ServerError(BROKEN, 0);
}

// Starts a drawing: `finished` is a promise of its images and times, `cancel` stops it; `watch(kind, data)` sees its events.
export function draw(wanted, watch) {
  const stop = new AbortController();
  let id = null;

  const seen = (kind, data) => {
    id = data.id ?? id;
    watch(kind, data);
  };

  async function run() {
    const body = JSON.stringify({ ...wanted, stream: true });
    const headers = { "Content-Type": "application/json" };
    const response = await request("api/images", { method: "POST", headers, body, signal: stop.signal });
    try {
      return await follow(response.body, seen);
    } catch (error) {
      if (stop.signal.aborted) throw new Cancelled();
      throw error;
    }
  }

  // A job that is over already (404) has its images on the way: they are still wanted.
  async function cancel() {
    if (id !== null) {
      const address = `api/images/${encodeURIComponent(id)}`;
      const over = await request(address, { method: "DELETE" }).then(() => false, (error) => error.status === 404);
      if (over) return;
    }
    stop.abort();
  }

  return { finished: run(), cancel };
}
