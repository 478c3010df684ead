// A shell in a sandbox, by the API's WebSocket. docs/api.md describes its messages.
import { Terminal } from "./xterm-6.0.0.mjs";
import { FitAddon } from "./xterm-fit-0.11.0.mjs";
import { Unicode11Addon } from "./xterm-unicode11-0.9.0.mjs";

const WINDOW_BYTES = 256 << 10; // of output that came and is not shown yet: more fills memory, and Ctrl+C comes late
const PIECE_BYTES = 32 << 10;
const $ = (id) => document.getElementById(id);
const parts = $("terminal-parts");
const { sandbox, user } = parts.dataset;

// xterm.js makes <style> elements and style attributes. The policy of all pages forbids both, since they might come from
// markup. The same said by a script is allowed: as a sheet of its own, and as properties of an element.
const create = document.createElement.bind(document);
function setAttribute(name, value) {
  if (name === "style") this.style.cssText = value;
  else Element.prototype.setAttribute.call(this, name, value);
}
document.createElement = (name, options) => {
  const made = create(name === "style" ? "template" : name, options);
  if (name === "span") made.setAttribute = setAttribute;
  if (name === "style") {
    const sheet = new CSSStyleSheet();
    document.adoptedStyleSheets.push(sheet);
    Object.defineProperty(made, "textContent", { set: (text) => sheet.replaceSync(text) });
  }
  return made;
};

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const theme = () => {
  const [red, green, yellow, blue, magenta, cyan] = ["red", "green", "amber", "blue", "violet", "cyan"].map(colour);
  const [text, muted, ground] = ["text", "muted", "raised"].map(colour);
  return {
    background: ground, foreground: text, cursor: text, cursorAccent: ground, selectionBackground: `${colour("link")}55`,
    black: colour("term-black"), white: colour("term-white"), brightBlack: muted, brightWhite: colour("term-bright"),
    red, green, yellow, blue, magenta, cyan, brightRed: red, brightGreen: green, brightYellow: yellow,
    brightBlue: blue, brightMagenta: magenta, brightCyan: cyan,
  };
};

parts.hidden = false;
const terminal = new Terminal({
  allowProposedApi: true, // of the widths of Unicode 11
  fontFamily: colour("mono"), fontSize: 13, scrollback: 5000, minimumContrastRatio: 4.5, theme: theme(),
  cursorBlink: !matchMedia("(prefers-reduced-motion: reduce)").matches,
});
const fit = new FitAddon();
terminal.loadAddon(fit);
terminal.loadAddon(new Unicode11Addon());
terminal.unicode.activeVersion = "11";
terminal.parser.registerOscHandler(8, () => true); // no link is made of what a guest writes
terminal.open($("terminal"));
terminal.textarea.setAttribute("aria-describedby", "terminal-keys"); // which say how to get out
fit.fit();
new ResizeObserver(() => fit.fit()).observe($("terminal"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { terminal.options.theme = theme(); });

// --- the shell ---

let socket = null; // while it is open
let typed = false;
const send = (message) => socket?.send(JSON.stringify(message));
const hidden = /[\u0000-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;
const say = (text) => {
  const number = (one) => `⟨U+${one.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;
  $("terminal-said").textContent = (text.charAt(0).toUpperCase() + text.slice(1)).replace(hidden, number);
};
const end = (text, again = true) => {
  socket = null;
  typed = false;
  say(text);
  $("terminal-again").hidden = !again;
};

// What the API says. Throws why not, as a sentence.
const ask = async (method, path) => {
  let answer;
  try {
    answer = await fetch(path, { method });
  } catch {
    throw new Error("The server does not answer.");
  }
  if (answer.status === 401) throw new Error("You are logged out: load this page again.");
  const said = await answer.json();
  if (!answer.ok) throw new Error(`${said.detail}.`);
  return said;
};

// The state of the sandbox; null if it has none any more, which has been said then.
const look = async () => {
  const { state, error } = await ask("GET", sandbox);
  const gone = { ended: "The sandbox has ended", lost: "The sandbox is lost" }[state];
  if (gone) end(`${gone}${error ? `: ${error}` : ""}.`, false);
  return gone ? null : state;
};

// A shell has ended that said nothing of its end; ``fault``: what the server said.
const cut = async (fault) => {
  socket = null;
  const state = await look();
  if (state === "paused") end("The sandbox was put to sleep, and the shell has ended. Connect again to wake it.");
  else if (state) end(fault ? `The shell has ended: ${fault}.` : "The connection was cut, and the shell has ended with it.");
};

const connect = async () => {
  $("terminal-again").hidden = true;
  try {
    const state = await look();
    if (!state) return;
    say({ paused: "The sandbox sleeps: it is resumed…", starting: "The VM starts…" }[state] || "Connecting…");
    await ask("POST", `${sandbox}/resume`);
  } catch (error) {
    end(error.message);
    return;
  }
  const one = new WebSocket(`${location.origin.replace(/^http/, "ws")}${sandbox}/exec/live`);
  one.binaryType = "arraybuffer";
  let [taken, told, fault, ended] = [0, 0, "", false];
  one.onopen = () => {
    socket = one;
    terminal.write("\x1bc"); // nothing of an earlier shell, such as its modes, is left
    send({
      argv: JSON.parse(parts.dataset.argv), user, env: { COLORTERM: "truecolor" },
      pty: [terminal.cols, terminal.rows], window_bytes: WINDOW_BYTES,
    });
  };
  one.onmessage = ({ data }) => {
    if (typeof data !== "string") {
      const bytes = new Uint8Array(data, 1);
      terminal.write(bytes, () => {
        taken += bytes.length;
        if (taken - told < WINDOW_BYTES / 4 || socket !== one) return;
        told = taken;
        send({ op: "taken", bytes: taken });
      });
      return;
    }
    const { started, exit, error } = JSON.parse(data);
    if (started) {
      say(`Connected, as ${user}.`);
      terminal.focus();
    }
    fault = error || fault;
    ended = Boolean(exit);
    if (exit) end(`The shell has ended (${exit.code === null ? `signal ${exit.signal}` : `status ${exit.code}`}).`);
  };
  one.onclose = () => ended || cut(fault).catch((error) => end(error.message));
};

const type = (bytes) => {
  typed = true;
  for (let at = 0; at < bytes.length; at += PIECE_BYTES) socket?.send(bytes.subarray(at, at + PIECE_BYTES));
};
terminal.onData((text) => type(new TextEncoder().encode(text)));
terminal.onBinary((text) => type(Uint8Array.from(text, (one) => one.charCodeAt(0))));
terminal.onResize(({ cols, rows }) => send({ op: "resize", size: [cols, rows] }));

// --- keys, and what is around it ---

terminal.attachCustomKeyEventHandler((event) => {
  if (!event.ctrlKey || !event.shiftKey || event.altKey || event.metaKey) return true;
  const letter = /^[a-z]$/i.test(event.key) ? event.key.toUpperCase() : event.code.slice(3); // of any keyboard
  if (letter === "X") {
    if (event.type === "keydown") $("terminal-leave").focus();
  } else if (letter === "C") {
    if (event.type === "keydown") document.execCommand("copy"); // the API of the clipboard needs HTTPS
  } else return true;
  event.preventDefault();
  return false;
});
$("terminal").addEventListener("keydown", (event) => event.stopPropagation()); // the page's own keys are not for here
$("terminal-again").addEventListener("click", connect);
$("terminal-reader").addEventListener("change", ({ target }) => {
  terminal.options.screenReaderMode = target.checked;
  localStorage.setItem("screen-reader", target.checked ? "yes" : "");
});
$("terminal-reader").checked = terminal.options.screenReaderMode = localStorage.getItem("screen-reader") === "yes";
addEventListener("beforeunload", (event) => { // Ctrl+W deletes a word in a shell, and closes a tab
  if (socket !== null && typed) event.preventDefault();
});
connect();
