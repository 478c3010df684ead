// Times in the viewer's zone, keys, and the output of a ticket. Pages work without it. The live parts are htmx's.
"use strict";
(() => {
  const $ = (what, within = document) => within.querySelector(what);
  const all = (what, within = document) => [...within.querySelectorAll(what)];
  const whole = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });
  const clock = new Intl.DateTimeFormat(undefined, { timeStyle: "medium", hourCycle: "h23" });
  const units = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];

  const age = (seconds) => {
    const [size, unit] = units.find(([one]) => seconds >= one) || units[3];
    return `${Math.floor(Math.max(0, seconds) / size)} ${unit}`;
  };
  const show = (time) => {
    const at = new Date(time.dateTime);
    if (isNaN(at)) return;
    const { age: isAge, clock: isClock } = time.dataset;
    const exact = whole.format(at);
    const short = Date.now() - at < 43200000 ? clock.format(at) : exact;
    const text = isAge !== undefined ? age((Date.now() - at) / 1000) : isClock !== undefined ? clock.format(at) : short;
    if (time.textContent !== text) time.textContent = text;
    if (time.title !== exact) time.title = exact;
  };
  const times = () => all("time").forEach(show);
  setInterval(() => document.hidden || all("time[data-age]").forEach(show), 1000);

  // --- the output of a ticket ---
  const MOST_LINES = 5000;
  const follows = () => $("#follow")?.checked;
  const output = () => {
    const log = $("#log");
    if (!log) return;
    if (follows()) {
      for (const line of all(".line", log).slice(0, -MOST_LINES)) line.remove();
      log.scrollTop = log.scrollHeight;
    }
    find();
  };
  const find = () => {
    const text = $("#find")?.value.toLowerCase() || "";
    const lines = all("#log .line");
    lines.forEach((line) => line.classList.toggle("hit", text !== "" && line.textContent.toLowerCase().includes(text)));
    if ($("#found")) $("#found").textContent = text && `${all("#log .hit").length} of ${lines.length} lines`;
  };
  const nextHit = () => {
    const hits = all("#log .hit");
    if (!hits.length) return;
    if ($("#follow")) $("#follow").checked = false;
    const top = $("#log").scrollTop;
    const base = $("#log").offsetTop;
    (hits.find((hit) => hit.offsetTop - base > top + 1) || hits[0]).scrollIntoView({ block: "start" });
  };

  const stay = (event) => { // whoever looks at earlier lines is not taken away from them
    if (event.type === "click" ? !event.target.closest(".earlier") : !event.target.closest("#log") || event.deltaY > 0) return;
    if ($("#follow")) $("#follow").checked = false;
  };
  for (const name of ["click", "wheel", "touchmove"]) document.addEventListener(name, stay, { capture: true, passive: true });

  // --- keys ---
  let went = -Infinity; // when `g` was pressed
  const links = () => all("a[data-open]");
  const row = () => document.activeElement?.closest?.("[data-row]");
  const move = (by) => {
    const some = links();
    const at = some.findIndex((link) => row()?.contains(link));
    some[at < 0 ? 0 : Math.min(some.length - 1, Math.max(0, at + by))]?.focus();
  };
  const keys = {
    j: () => move(1),
    k: () => move(-1),
    x: () => $("input[type=checkbox]", row() || document.createElement("i"))?.click(),
    "/": () => $("#find, input[type=search]")?.focus(),
    "?": () => $("#keys").showModal(),
    g: (at) => { went = at; },
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    const at = event.target;
    if (at.matches?.("textarea, select, input:not([type=checkbox])")) {
      if (event.key === "Escape") at.blur();
      if (event.key === "Enter" && at.id === "find") nextHit();
      return;
    }
    if ($("dialog[open]")) return;
    const go = event.timeStamp - went < 1500 && all("[data-go]").find((link) => link.dataset.go === event.key);
    went = -Infinity;
    const target = go || $(`[data-key="${CSS.escape(event.key)}"]`, row() || document);
    if (go || target) target.click();
    else if (keys[event.key]) keys[event.key](event.timeStamp);
    else return;
    event.preventDefault();
  });

  // --- forms ---
  document.addEventListener("change", (event) => {
    if (event.target.id === "pick-all") all("input[name=id]").forEach((one) => { one.checked = event.target.checked; });
    if (event.target.id === "follow") output();
  });
  document.addEventListener("input", (event) => event.target.id === "find" && find());
  document.addEventListener("htmx:after:swap", () => { times(); output(); });
  // htmx notices that a page goes into the background, not that it is there already when its stream begins.
  document.addEventListener("htmx:sse:after:connection", () => {
    setTimeout(() => document.hidden && document.dispatchEvent(new Event("visibilitychange")));
  });
  document.addEventListener("htmx:before:request", (event) => { // rows must not move below somebody who selects them
    if (event.target.id === "list" && $("#list input:checked, #list input:focus")) event.preventDefault();
  });
  times();
  output();
})();
