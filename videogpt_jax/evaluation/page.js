"use strict";

const find = (selector, inside = document) => [...inside.querySelectorAll(selector)];
const byId = (id) => document.getElementById(id);

// Light, dark, or as the system says. ---------------------------------------------------------

byId("theme").onclick = () => {
  const root = document.documentElement;
  const dark = root.dataset.theme === "dark" ||
      (!root.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  root.dataset.theme = dark ? "light" : "dark";
};

// Sorting by a column; what has no value comes last. ---------------------------------------------

function valueOf(row, column) {
  const cell = row.cells[column];
  return cell.dataset.value === undefined ? null : Number(cell.dataset.value);
}

function sort(table, heading) {
  const column = heading.cellIndex;
  const numeric = heading.classList.contains("number");
  const before = heading.getAttribute("aria-sort");
  const down = before ? before === "ascending" : numeric;
  for (const other of find("th", table)) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  const sign = down ? -1 : 1;
  const compare = (a, b) => {
    if (!numeric) {
      return sign * a.cells[column].textContent.localeCompare(
          b.cells[column].textContent, undefined, {numeric: true});
    }
    const [x, y] = [valueOf(a, column), valueOf(b, column)];
    if (x === null || y === null) return (x === null) - (y === null);
    return sign * (x - y);
  };
  const body = table.tBodies[0];
  body.append(...[...body.rows].sort(compare));
}

for (const table of find("table.sortable")) {
  for (const button of find("th button", table)) {
    button.onclick = () => sort(table, button.closest("th"));
  }
}

addEventListener("beforeprint", () => find("details").forEach((x) => { x.open = true; }));

// Videos: those of a row play in step, and only the rows that are seen are loaded. -----------------

const HOLD_MS = 400;  // the last frame stays so long
const APART = 0.5;  // frames; a video that is farther off jumps, one that is nearer hurries or waits
const HASTE = 6;  // per second: the share of what it is off that it makes up for

const speed = () => Number(byId("speed").value);

class Row {
  constructor(element) {
    this.element = element;
    this.videos = find("video", element);
    this.fps = Number(element.dataset.fps) || 25;
    this.given = Number(element.dataset.given);
    this.scrub = element.querySelector(".scrub");
    this.frame = element.querySelector(".frame");
    this.seen = this.held = false;
    this.restart = null;
    this.scrub.oninput = () => {
      this.held = true;
      this.update();
      this.seek(this.scrub.value * this.length());
    };
    for (const video of this.videos) {
      video.onclick = () => { this.held = !this.held; this.update(); };
      video.onerror = () => {
        if (video.getAttribute("src")) video.parentElement.classList.add("broken");
      };
      video.onloadedmetadata = () => {
        video.classList.toggle("small", video.videoWidth < 256);
        video.playbackRate = speed();
      };
    }
  }

  // Those that can be played and are shown.
  usable() {
    return this.videos.filter((v) => v.readyState >= 1 && !v.error && v.offsetParent);
  }

  length() {
    return Math.max(0, ...this.usable().map((v) => v.duration));
  }

  // The one that leads: the longest.
  leader() {
    return this.usable().reduce((a, b) => (a && a.duration >= b.duration ? a : b), null);
  }

  load(seen) {
    this.seen = seen;
    for (const video of this.videos) {
      if (seen && !video.getAttribute("src")) {
        video.src = video.dataset.src;
        video.preload = "auto";
      } else if (!seen && video.getAttribute("src")) {
        video.removeAttribute("src");  // players are scarce
        video.load();
      }
    }
    this.update();
  }

  update() {
    const run = this.seen && !this.held && playing;
    for (const video of this.videos) {
      if (!run) video.pause();
      else if (video.paused && !video.ended) video.play().catch(() => {});
    }
  }

  seek(seconds) {
    clearTimeout(this.restart);
    this.restart = null;
    for (const video of this.usable()) {
      video.currentTime = Math.min(Math.max(seconds, 0), video.duration - 0.5 / this.fps);
    }
  }

  step(frames) {
    const leader = this.leader();
    if (leader) this.seek((Math.floor(leader.currentTime * this.fps + 0.01) + frames + 0.5) / this.fps);
  }

  tick() {
    const leader = this.leader();
    if (!leader) return;
    const time = leader.currentTime;
    const count = Math.max(1, Math.round(leader.duration * this.fps));
    const frame = Math.min(Math.floor(time * this.fps + 0.01), count - 1);
    const future = this.given > 0 && frame >= this.given;
    this.element.classList.toggle("future", future);
    const kind = this.given > 0 ? (future ? ", predicted" : ", given") : "";
    this.frame.textContent = `frame ${frame + 1} of ${count}${kind}`;
    if (document.activeElement !== this.scrub || !this.held) {
      this.scrub.value = time / leader.duration;
    }
    if (this.held || !playing) return;
    if (leader.ended) {
      this.restart ??= setTimeout(() => { this.seek(0); this.update(); }, HOLD_MS);
      return;
    }
    leader.playbackRate = speed();
    for (const video of this.usable()) {
      if (video === leader || video.seeking) continue;
      const off = Math.min(time, video.duration - 0.5 / this.fps) - video.currentTime;
      if (Math.abs(off) > APART / this.fps) video.currentTime += off;
      video.playbackRate = speed() * (1 + Math.max(-0.5, Math.min(HASTE * off, 0.5)));
      if (video.paused && !video.ended) video.play().catch(() => {});
    }
    if (leader.paused) leader.play().catch(() => {});
  }
}

let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
const table = document.querySelector("table.videos");
const rows = table ? find("tbody tr", table).map((element) => new Row(element)) : [];

function setPlaying(value) {
  playing = value;
  byId("play").textContent = playing ? "Pause" : "Play";
  for (const row of rows) {
    if (playing) row.held = false;
    row.update();
  }
}

// A condition on a value, such as PSNR>20, or a word of the name.
function condition(token) {
  const parts = /^([^<>=]+)(<=|>=|<|>|=)(-?[\d.]+(?:e-?\d+)?)$/i.exec(token);
  if (!parts) return (row) => row.cells[0].querySelector("span").textContent.toLowerCase()
      .includes(token.toLowerCase());
  const plain = (text) => text.toLowerCase().replace(/[^a-z0-9]/g, "");
  const heading = find("th.number", table).find(
      (th) => plain(th.textContent).startsWith(plain(parts[1])));
  if (!heading) return () => false;
  const limit = Number(parts[3]);
  const compare = {
    "<": (x) => x < limit, ">": (x) => x > limit, "<=": (x) => x <= limit,
    ">=": (x) => x >= limit, "=": (x) => x === limit,
  }[parts[2]];
  return (row) => {
    const value = valueOf(row, heading.cellIndex);
    return value !== null && compare(value);
  };
}

function filter() {
  const conditions = byId("filter").value.trim().split(/\s+/).filter(Boolean).map(condition);
  let count = 0;
  for (const {element} of rows) {
    element.hidden = !conditions.every((fits) => fits(element));
    count += !element.hidden;
  }
  byId("count").textContent = `${count} of ${rows.length}`;
}

if (table) {
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      rows.find((row) => row.element === entry.target).load(entry.isIntersecting);
    }
  }, {rootMargin: "200px"});
  for (const row of rows) observer.observe(row.element);
  byId("play").onclick = () => setPlaying(!playing);
  byId("speed").onchange = () => {
    for (const video of find("video", table)) video.playbackRate = speed();
  };
  byId("size").oninput = () => table.style.setProperty("--size", `${byId("size").value}px`);
  byId("filter").oninput = filter;
  for (const box of find(".columns input")) {
    box.onchange = () => find(`.c${box.dataset.column}`, table)
        .forEach((cell) => { cell.hidden = !box.checked; });
  }
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.matches("input, select, button")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (event.key === " ") setPlaying(!playing);
    else if (event.key === "/") byId("filter").focus();
    else if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      if (playing) setPlaying(false);
      for (const row of rows) if (row.seen) row.step(event.key === "ArrowLeft" ? -1 : 1);
    } else return;
    event.preventDefault();
  });
  setPlaying(playing);
  (function tick() {
    for (const row of rows) if (row.seen) row.tick();
    requestAnimationFrame(tick);
  })();
}
