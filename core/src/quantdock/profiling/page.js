"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const whole = data.seconds;
  let from = 0, to = whole;

  const make = (name, className, text) => {
    const made = document.createElement(name);
    made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const bytes = (amount) => {
    const units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let unit = 0;
    while (amount >= 1024 && unit < 4) { amount /= 1024; unit += 1; }
    return (unit ? amount.toFixed(2) : String(Math.round(amount))) + " " + units[unit];
  };
  const time = (seconds) =>
    seconds >= 1 ? seconds.toFixed(3) + " s" : seconds >= 1e-3 ? (seconds * 1e3).toFixed(2) + " ms" : (seconds * 1e6).toFixed(0) + " µs";

  // Tables: a click on a column's name sorts.
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
    heads.forEach((head, column) => {
      const button = make("button", "", head.textContent);
      button.type = "button";
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const falling = head.getAttribute("aria-sort") !== "descending";
        const key = (row) => {
          const cell = row.cells[column];
          return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent;
        };
        const order = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true }));
        const rows = [...body.rows].sort((a, b) => (falling ? order(key(b), key(a)) : order(key(a), key(b))));
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", falling ? "descending" : "ascending");
        body.append(...rows);
      });
    });
  }

  // Zoom: all plots show the same stretch of time.
  const reset = make("button", "reset", "Show all of it");
  reset.type = "button";
  reset.hidden = true;
  document.body.append(reset);

  const ticks = () => {
    const power = 10 ** Math.floor(Math.log10((to - from) / 8));
    const step = power * [1, 2, 5, 10].find((factor) => power * factor * 8 >= to - from);
    const [unit, name] = step >= 0.1 ? [1, "s"] : step >= 1e-4 ? [1e3, "ms"] : [1e6, "µs"];
    const found = [];
    for (let index = Math.ceil(from / step); index * step <= to + step * 1e-9; index += 1)
      found.push([index * step, parseFloat((index * step * unit).toPrecision(8)) + " " + name]);
    return found;
  };
  const zoom = (start, end) => {
    if (end - start < whole * 1e-5) return;
    from = Math.max(0, start);
    to = Math.min(whole, end);
    const span = to - from, percent = (at) => (100 * (at - from)) / span + "%";
    for (const svg of document.querySelectorAll("svg.view")) {
      const height = svg.viewBox.baseVal.height;
      svg.setAttribute("viewBox", [(1000 * from) / whole, 0, (1000 * span) / whole, height].join(" "));
    }
    for (const axis of document.querySelectorAll(".ticks-x")) {
      axis.replaceChildren(...ticks().map(([at, text]) => {
        const tick = make("span", "", text);
        tick.style.left = percent(at);
        return tick;
      }));
    }
    for (const stage of document.querySelectorAll(".stage")) {
      const begun = Math.max(from, Number(stage.dataset.start));
      const ended = Math.min(to, Number(stage.dataset.start) + Number(stage.dataset.seconds));
      stage.hidden = ended <= begun;
      stage.style.left = percent(begun);
      stage.style.width = (100 * (ended - begun)) / span + "%";
    }
    reset.hidden = span >= whole * 0.9999;
  };
  reset.addEventListener("click", () => zoom(0, whole));
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") zoom(0, whole); });

  // Pointing: what happened there.
  const tip = make("div", "tip");
  tip.hidden = true;
  tip.setAttribute("role", "status");
  document.body.append(tip);
  const canvases = [...document.querySelectorAll(".canvas")];
  const cursors = canvases.map((canvas) => {
    const cursor = make("div", "cursor");
    cursor.hidden = true;
    canvas.append(cursor);
    return cursor;
  });

  const { kinds, labels, threads, spans } = data.timeline;
  const stepAt = (thread, seconds, slack) => {
    const at = seconds * 1e6, room = slack * 1e6;
    let best = null;
    for (const span of spans) {
      if (span[2] !== thread || span[3] - room > at || span[3] + span[4] + room < at) continue;
      const hit = span[3] <= at && span[3] + span[4] >= at;
      if (best === null || (hit && !best.hit) || (hit === best.hit && span[4] < best.span[4])) best = { span, hit };
    }
    return best && best.span;
  };
  const describe = (span) => {
    const lines = [kinds[span[0]] + (span[6] ? " (failed)" : "") + ": " + labels[span[1]], time(span[4] / 1e6) + " from " + time(span[3] / 1e6)];
    if (span[5]) lines.push(bytes(span[5]) + (span[4] ? ", " + bytes(span[5] / (span[4] / 1e6)) + "/s" : ""));
    lines.push(threads[span[2]]);
    return lines;
  };
  const overview = (seconds) => {
    const lines = [time(seconds)];
    const stage = data.stages.find((one) => one.start <= seconds && seconds <= one.start + one.seconds);
    if (stage) lines[0] += " · " + stage.name;
    const memory = data.memory;
    let index = memory.at.findIndex((at) => at > seconds);
    index = (index < 0 ? memory.at.length : index) - 1;
    if (index >= 0 && memory.known)
      lines.push("resident " + bytes(memory.own[index] + memory.mapped[index]) + " (own " + bytes(memory.own[index]) + ", files " + bytes(memory.mapped[index]) + ")");
    if (index >= 0 && data.plan) lines.push("in flight " + bytes(memory.in_flight[index]));
    const bin = Math.min(data.rates.read.length - 1, Math.floor(seconds / data.rates.interval));
    lines.push("read " + bytes(data.rates.read[bin]) + "/s, quantized " + bytes(data.rates.quantize[bin]) + "/s");
    return lines;
  };
  const hide = () => {
    tip.hidden = true;
    for (const cursor of cursors) cursor.hidden = true;
  };
  const show = (event, canvas) => {
    const box = canvas.getBoundingClientRect(), part = (event.clientX - box.left) / box.width;
    if (part < 0 || part > 1) return hide();
    const seconds = from + part * (to - from);
    for (const cursor of cursors) {
      cursor.hidden = false;
      cursor.style.left = 100 * part + "%";
    }
    const lanes = canvas.querySelector(".lanes");
    let lines = overview(seconds);
    if (lanes !== null) {
      const row = Math.floor((event.clientY - lanes.getBoundingClientRect().top) / 24);
      const span = row < 0 ? null : stepAt(row, seconds, (2 * (to - from)) / box.width);
      if (span !== null) lines = describe(span);
    }
    tip.textContent = lines.join("\n");
    tip.hidden = false;
    const size = tip.getBoundingClientRect();
    const flip = event.clientX + 16 + size.width > innerWidth;
    tip.style.left = Math.max(4, flip ? event.clientX - 16 - size.width : event.clientX + 16) + "px";
    tip.style.top = Math.max(4, Math.min(innerHeight - size.height - 8, event.clientY + 16)) + "px";
  };
  for (const canvas of canvases) {
    const brush = make("div", "brush");
    brush.hidden = true;
    canvas.append(brush);
    let begun = null;
    const part = (event) => {
      const box = canvas.getBoundingClientRect();
      return Math.max(0, Math.min(1, (event.clientX - box.left) / box.width));
    };
    canvas.addEventListener("pointerdown", (event) => {
      if (event.pointerType === "touch" || event.button) return;
      begun = part(event);
      canvas.setPointerCapture(event.pointerId);
      event.preventDefault();
    });
    canvas.addEventListener("pointermove", (event) => {
      show(event, canvas);
      if (begun === null) return;
      const now = part(event);
      brush.hidden = false;
      brush.style.left = 100 * Math.min(begun, now) + "%";
      brush.style.width = 100 * Math.abs(now - begun) + "%";
    });
    canvas.addEventListener("pointerup", (event) => {
      if (begun === null) return;
      const ends = [begun, part(event)].sort((a, b) => a - b), start = from, span = to - from;
      begun = null;
      brush.hidden = true;
      if (ends[1] - ends[0] > 0.005) zoom(start + ends[0] * span, start + ends[1] * span);
    });
    canvas.addEventListener("pointercancel", () => { begun = null; brush.hidden = true; });
    canvas.addEventListener("pointerleave", hide);
  }
  const hint = make("div", "hint");
  hint.append(make("span", "quiet", "Drag across a plot to zoom into a stretch of time, Escape to see all of it again."));
  const engine = data.stages.find((stage) => stage.name === "load");
  if (engine !== undefined) {
    const button = make("button", "engine", "Show the engine's work only");
    button.type = "button";
    button.addEventListener("click", () => zoom(engine.start, engine.start + engine.seconds));
    hint.append(button);
  }
  document.querySelector("main").prepend(hint);
})();
