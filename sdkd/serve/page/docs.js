// The page of the API: every operation of openapi.json, its fields, and an example for the command line.

import { KEY } from "./client.js";
import { $, make } from "./dom.js";

const TYPES = { string: "text", integer: "whole number", number: "number", boolean: "true or false", object: "object" };
const BOUNDS = [["minimum", "maximum", ""], ["minItems", "maxItems", " of them"]];
const [JSON_BODY, FORM] = ["application/json", "multipart/form-data"];
const FILE = "%s"; // where an example has a file's base64, as printf has it
const IN_BASE64 = new Set(["image", "init_images", "mask", "png"]);
const SAMPLES = { prompt: "a lighthouse in a storm", sd_model_checkpoint: "MODEL" };
// What openapi.json has no place for: how clients find an API.
const GROUPS = {
  sdkd: (server) => `What the page itself uses, with progress, previews and times. Address: \`${server}/api\``,
  OpenAI: (server) => `For OpenAI’s clients and what is made like them. Their base address: \`${server}/v1\``,
  A1111: (server) => `For programs made for AUTOMATIC1111’s web UI. Their address: \`${server}\``,
};

const server = new URL(".", location.href).href.replace(/\/$/, ""); // a proxy may add a folder
let spec = null;

// Text in which `code` is marked as in Markdown.
function words(text) {
  return text.split("`").map((part, place) => (place % 2 ? make("code", { textContent: part }) : part));
}

// A schema without its reference, which leads into the body's own definitions or into the whole description's.
function resolved(schema, body) {
  if (!schema.$ref) return schema;
  const follow = (root) => schema.$ref.split("/").slice(1).reduce((found, name) => found?.[name], root);
  return { ...(follow(body) ?? follow(spec)), ...schema, $ref: undefined };
}

const isFile = (schema) => schema.format === "binary" || schema.contentMediaType !== undefined;

// What a value may be: a field that may be left out is a choice with null in this description.
function choices(schema, body) {
  const found = resolved(schema, body);
  const all = (found.anyOf ?? found.oneOf ?? [found]).map((one) => resolved(one, body));
  return all.length > 1 ? all.filter(({ type }) => type !== "null") : all;
}

function typeOf(schema, body) {
  return choices(schema, body).map((one) => {
    const values = one.enum ?? ("const" in one ? [one.const] : null);
    if (values) return values.map((value) => JSON.stringify(value)).join(" or ");
    if (one.type === "array") return `list of ${typeOf(one.items ?? {}, body)}s`;
    return isFile(one) ? "file" : (TYPES[one.type] ?? "any value");
  }).join(" or ");
}

function boundsOf(schema, body) {
  for (const one of choices(schema, body)) {
    for (const [low, high, unit] of BOUNDS) {
      const [least, most] = [one[low], one[high]];
      if (least !== undefined && most !== undefined) return least === most ? `${least}${unit}` : `${least} to ${most}${unit}`;
      if (least !== undefined) return `${least}${unit} or more`;
      if (most !== undefined) return `${most}${unit} or less`;
    }
  }
  return "";
}

// The fields of an object, and those of objects inside it: `loras[].name`.
function fieldsOf(schema, body, before = "") {
  const { properties = {}, required = [] } = resolved(schema, body);
  return Object.entries(properties).flatMap(([name, field]) => {
    const own = { name: before + name, schema: field, body, needed: required.includes(name), text: resolved(field, body).description };
    return [own, ...choices(field, body).flatMap((one) => fieldsOf(one.items ?? one, body, `${before}${name}${one.items ? "[]" : ""}.`))];
  });
}

// { kind, fields } of the body, or null where there is none.
function bodyOf(operation) {
  const content = operation.requestBody?.content ?? {};
  const kind = [JSON_BODY, FORM].find((each) => content[each]);
  if (kind === undefined) return null;
  const { schema = {} } = content[kind];
  return { kind, fields: fieldsOf(schema, schema) };
}

function parametersOf(operation, item) {
  return [...(item.parameters ?? []), ...(operation.parameters ?? [])].map((one) => (
    { name: one.name, schema: one.schema ?? {}, body: {}, needed: one.required, text: one.description, where: one.in }
  ));
}

// The value that an example has for a field; undefined for one that it leaves out.
function sampleOf({ name, schema, body, needed }) {
  const [one] = choices(schema, body);
  const told = schema.example ?? schema.examples?.[0] ?? one?.examples?.[0];
  if (told !== undefined && (needed || name in SAMPLES)) return told;
  if (name in SAMPLES) return SAMPLES[name];
  if (!needed || name.includes(".")) return undefined;
  if (isFile(one)) return `@${name}.png`;
  if (IN_BASE64.has(name)) return one.type === "array" ? [FILE] : FILE;
  return { array: [], object: {}, integer: 1, number: 1, boolean: false }[one?.type] ?? name.toUpperCase();
}

// As the shell takes it: as it is where nothing in it is special.
const quoted = (text) => (/[^\w./:@=-]/.test(text) ? `'${text.replaceAll("'", "'\\''")}'` : text);

function curlOf(method, path, parameters, body) {
  const filled = path.replace(/\{(\w+)\}/g, (_, name) => name.toUpperCase());
  const asked = parameters.filter(({ where, needed }) => where === "query" && needed).map((one) => `${one.name}=${sampleOf(one)}`);
  const address = quoted(`${server}${filled}${asked.length ? "?" : ""}${asked.join("&")}`);
  const parts = [`curl ${method === "GET" || (method === "POST" && body) ? "" : `-X ${method} `}${address}`];
  // The page keeps a key of the server under this name, as long as the tab is open.
  if (sessionStorage.getItem(KEY) !== null) parts.push("-H 'Authorization: Bearer KEY'");
  let before = "";
  const samples = (body?.fields ?? []).map((field) => [field.name, sampleOf(field)]).filter(([, value]) => value !== undefined);
  if (body?.kind === FORM) parts.push(...samples.map(([name, value]) => `-F ${quoted(`${name}=${value}`)}`));
  if (body?.kind === JSON_BODY) {
    const json = quoted(JSON.stringify(Object.fromEntries(samples)).replaceAll('":', '": ').replaceAll(',"', ', "'));
    // A file is longer than an argument may be: it goes through a pipe.
    if (json.includes(FILE)) before = `printf ${json} "$(base64 < image.png | tr -d '\\n')" |\n`;
    parts.push(`-H 'Content-Type: ${JSON_BODY}'`, `-d ${before ? "@-" : json}`);
  }
  if (samples.some(([name]) => name === "prompt")) parts.push("-o answer.json");
  return before + parts.join(" \\\n  ");
}

// Roles, since a table that is laid out otherwise on narrow screens is none any more for some screen readers.
const cell = (className, ...children) => make("td", { role: "cell", className }, ...children);

function row({ name, schema, body, needed, text, where }) {
  const bounds = boundsOf(schema, body);
  const usual = resolved(schema, body).default ?? null;
  const shown = usual === null ? "optional" : make("code", { textContent: JSON.stringify(usual) });
  return make(
    "tr", { role: "row" },
    make("th", { role: "rowheader", scope: "row", className: "name" }, make("code", { textContent: name }),
      where ? make("small", { textContent: `in the ${where}` }) : null),
    cell("type", typeOf(schema, body), bounds ? make("small", { textContent: bounds }) : null),
    needed ? cell("default needed", "required") : cell("default", shown),
    cell("text", ...words(text ?? "")),
  );
}

function table(fields, label) {
  const head = ["Name", "Type", "Default", "Description"].map((name) => make("th", { role: "columnheader", scope: "col", textContent: name }));
  return make(
    "table", { role: "table", "aria-label": `Fields of ${label}` },
    make("thead", { role: "rowgroup" }, make("tr", { role: "row" }, ...head)),
    make("tbody", { role: "rowgroup" }, ...fields.map(row)),
  );
}

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // only pages of this machine and of https have a clipboard
    const area = make("textarea", { value: text, className: "unseen", "aria-hidden": "true" });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}

function example(text, label) {
  const button = make("button", {
    type: "button", className: "copy", textContent: "Copy", "aria-label": `Copy the example of ${label}`,
    async onclick() {
      await copied(text);
      button.focus();
      button.textContent = "Copied";
      $("status").textContent = "Copied";
      setTimeout(() => (button.textContent = "Copy"), 2000);
    },
  });
  return make("div", { className: "example" }, make("pre", {}, make("code", { textContent: text })), button);
}

const letters = (text) => text.toLowerCase().replace(/[^a-z0-9]/g, "");

function operationOf(path, method, operation, item) {
  const label = `${method} ${path}`;
  const parameters = parametersOf(operation, item);
  const body = bodyOf(operation);
  const fields = [...parameters, ...(body?.fields ?? [])];
  const [first, ...more] = (operation.description ?? operation.summary ?? "").split(/\n\s*\n/);
  const named = letters(path).endsWith(letters(first)); // a route without words: its name once more
  const told = body === null ? "" : body.kind === FORM ? `The body is a form (${FORM}).` : "The body is a JSON object.";
  return make(
    "details", { className: "operation", id: label.replace(/\W+/g, "-").toLowerCase(), "data-operation": label },
    make("summary", {}, make("h3", {}, make("span", { className: `method ${method.toLowerCase()}`, textContent: method }), " ", make("code", { textContent: path })),
      make("span", { className: "short" }, ...words(named ? "" : first))),
    make("div", { className: "inside" },
      ...more.map((text) => make("p", {}, ...words(text))),
      told ? make("p", { className: "hint", textContent: told }) : null,
      fields.length ? table(fields, label) : null,
      example(curlOf(method, path, parameters, body), label)),
  );
}

function groups() {
  const found = new Map();
  for (const [path, item] of Object.entries(spec.paths)) {
    for (const method of ["get", "post", "put", "patch", "delete"].filter((each) => item[each])) {
      const tag = item[method].tags?.[0] ?? "Others";
      found.set(tag, [...(found.get(tag) ?? []), operationOf(path, method.toUpperCase(), item[method], item)]);
    }
  }
  return [...found];
}

function openNamed() {
  const named = $(decodeURIComponent(location.hash.slice(1)));
  if (named?.matches("details")) {
    named.open = true;
    named.scrollIntoView();
    named.querySelector("summary").focus({ preventScroll: true });
  }
}

function show() {
  $("version").textContent = spec.info.version;
  const list = make("ol");
  for (const [tag, operations] of groups()) {
    const id = `group-${tag.toLowerCase()}`;
    const told = spec.tags?.find(({ name }) => name === tag)?.description ?? GROUPS[tag]?.(server) ?? "";
    $("groups").append(make("section", { "aria-labelledby": id }, make("h2", { id, textContent: tag }),
      make("p", { className: "hint" }, ...words(told)), ...operations));
    const links = operations.map((one) => make("li", {}, make("a", { href: `#${one.id}`, textContent: one.dataset.operation })));
    list.append(make("li", {}, make("a", { href: `#${id}`, textContent: tag }), make("ol", {}, ...links)));
  }
  $("contents").append(list);
  $("open-all").disabled = false;
  $("open-all").addEventListener("click", () => {
    const open = $("open-all").textContent === "Open all";
    $("open-all").textContent = open ? "Close all" : "Open all";
    for (const one of document.querySelectorAll("details")) one.open = open;
  });
  document.querySelector("details:has(table)")?.setAttribute("open", ""); // shows what is inside the others
  addEventListener("hashchange", openNamed);
  openNamed();
  document.documentElement.dataset.ready = "true";
}

try {
  const response = await fetch("openapi.json");
  if (!response.ok) throw new Error(`The server answered ${response.status}.`);
  spec = await response.json();
  show();
} catch (error) {
  $("error").textContent = `The description of the API could not be read. ${error.message}`;
}
