// Draws each panel at its size on the screen, again after each change of what is shown.
const LEFT = 62, RIGHT = 18, TOP = 10, BOTTOM = 24;
// The widest of the usual fonts at the size of report.css.
const CHARACTER = 7.5;
// With fewer values, each is a dot.
const FEW = 40;
const hidden = new Set();
const runs = [...document.querySelectorAll("header button")];
const panels = [...document.querySelectorAll("figure")].map(makePanel);

runs.forEach((button, run) =>
  button.addEventListener("click", () => {
    if (!hidden.delete(run)) hidden.add(run);
    button.setAttribute("aria-pressed", !hidden.has(run));
    for (const warning of document.querySelectorAll(`[data-run="${run}"]`)) warning.hidden = hidden.has(run);
    drawAll();
  }));
addEventListener("resize", drawAll);
drawAll();

function drawAll() {
  for (const draw of panels) draw();
  for (const table of document.querySelectorAll(".scroll")) showWhatIsCut(table);
}

function makePanel(figure) {
  const { lines, means, resumes, scale, style, steps: ends } = Object.fromEntries(
    Object.entries(figure.dataset).map(([key, value]) => [key, JSON.parse(value)]));
  const svg = figure.querySelector("svg");
  const button = figure.querySelector("button");
  const note = append(figure, "p", { class: "note faint" });
  const tip = append(figure.querySelector("figcaption"), "output", { class: "tip" });
  let across, cursor;

  function draw() {
    const wantsLog = button.getAttribute("aria-pressed") === "true";
    const shown = lines.map((line, run) => (hidden.has(run) ? [[], []] : line));
    const values = shown.flatMap(([, ofRun]) => ofRun);
    const positive = values.filter((value) => value > 0);
    const log = wantsLog && positive.length > 0;
    const width = Math.round(svg.getBoundingClientRect().width);
    const height = Math.round(Math.min(Math.max(0.38 * width, 200), 260));
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.replaceChildren();
    across = axis(...ends, LEFT, width - RIGHT, false);
    const up = axis(...range(log ? positive : values, log, scale), height - BOTTOM, TOP, log);
    drawGrid(svg, across, up, width, height);
    resumes.forEach((steps, run) => {
      for (const x of hidden.has(run) ? [] : steps.map(across))
        append(svg, "line", { class: `run${run} resume`, x1: x, x2: x, y1: TOP, y2: height - BOTTOM });
    });
    shown.forEach(([steps, ofRun], run) => {
      if (!ofRun.length) return;
      if (style === "events") {
        append(svg, "path", { class: `run${run} event`, d: bars(steps, ofRun, across, up, 3 * run) });
        return;
      }
      if (means[run]) append(svg, "path", { class: `run${run} each`, d: curve(steps, ofRun, across, up) });
      const [ofLine, line] = means[run] ?? [steps, ofRun];
      append(svg, "path", { class: `run${run}`, d: curve(ofLine, line, across, up) });
      // Also where the others go on, the end of a run is to be seen.
      const from = steps.length < FEW ? 0 : -1;
      const dots = [ofLine.slice(from), line.slice(from)];
      append(svg, "path", { class: `run${run} dots`, d: curve(...dots, across, up, true) });
    });
    cursor = append(svg, "line", { class: "cursor", visibility: "hidden", y1: TOP, y2: height - BOTTOM });
    note.textContent = values.length ? "" : "no run to show";
    if (wantsLog && values.length > positive.length)
      note.textContent = log ? "values at or below 0 are left out" : "no value above 0 for a logarithmic axis";
  }

  // In this panel, of each run, the values of the nearest step drawn.
  function point(event) {
    const box = svg.getBoundingClientRect();
    const place = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const wanted = ends[0] + ((place - LEFT) / (across(ends[1]) - LEFT)) * (ends[1] - ends[0]);
    const index = lines.map(([steps], run) => (hidden.has(run) ? -1 : nearest(steps, wanted)));
    const steps = index.flatMap((i, run) => (i < 0 ? [] : lines[run][0][i]));
    if (!steps.length) return;
    const step = steps.reduce((a, b) => (Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a));
    tip.replaceChildren(`step ${step.toLocaleString("en")}`);
    index.forEach((i, run) => {
      const [ofRun, values] = lines[run];
      // A run that had ended, or not begun, there has no value.
      const reach = (ends[1] - ends[0]) / 100;
      if (i < 0 || step > ofRun.at(-1) + reach || step < ofRun[0] - reach) return;
      const text = values[i].toLocaleString("en", { maximumSignificantDigits: 6 });
      append(tip, "span", { class: `run${run}` }).textContent = text;
    });
    cursor.setAttribute("x1", across(step));
    cursor.setAttribute("x2", across(step));
    cursor.setAttribute("visibility", "visible");
  }

  button.addEventListener("click", () => {
    button.setAttribute("aria-pressed", button.getAttribute("aria-pressed") === "false");
    draw();
  });
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointerleave", (event) => {
    // A finger that is lifted leaves, too: what it pointed at stays.
    if (event.pointerType === "touch") return;
    tip.replaceChildren();
    cursor.setAttribute("visibility", "hidden");
  });
  return draw;
}

// The ends of the axis of values, with a margin around them.
function range(values, log, scale) {
  let low = values.reduce((a, b) => Math.min(a, b), Infinity);
  let high = values.reduce((a, b) => Math.max(a, b), -Infinity);
  if (!values.length) return [0, 1];
  if (log) {
    const margin = (high / low) ** 0.03 * (high > low ? 1 : 1.1);
    return [low / margin, high * margin];
  }
  if (scale === "from zero") low = Math.min(low, 0);
  // A range of fewer digits than labels have is no range.
  const size = Math.max(Math.abs(low), Math.abs(high));
  const margin = high - low > 1e-5 * size ? 0.05 * (high - low) : 0.05 * size || 1;
  return [scale === "from zero" && low === 0 ? 0 : low - margin, high + margin];
}

// From values to places between two ends of the drawing.
function axis(low, high, begin, end, log) {
  const scale = log ? Math.log : (value) => value;
  const place = (value) => begin + ((scale(value) - scale(low)) / (scale(high) - scale(low))) * (end - begin);
  return Object.assign(place, { low, high, begin, log });
}

// About `count` round values between two ends, with a text for each; `whole`: integers only.
function ticks({ low, high, log }, count, whole = false) {
  if (log) {
    const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
    const every = 1 + Math.floor((last - first) / (2 * count));
    const factors = high / low < 1e3 ? [1, 2, 5] : [1];
    const marks = [];
    for (let power = first; power <= last; power += every)
      for (const factor of factors) marks.push(Number(`${factor}e${power}`));
    const inside = marks.filter((mark) => low <= mark && mark <= high);
    if (inside.length > 2) return inside.map((mark) => [mark, label(mark, mark)]);
  }
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  let step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  if (whole) step = Math.max(step, 1);
  const first = Math.ceil(low / step), number = Math.floor(high / step + 1e-9) - first + 1;
  return Array.from({ length: number }, (_, i) => [(first + i) * step, label((first + i) * step, step)]);
}

// A value with the digits that tell it from others a step away.
function label(value, step) {
  const size = Math.abs(value), digits = (of) => Math.floor(Math.log10(of) + 1e-9);
  if (size > step / 2 && (size < 1e-3 || size >= 1e7))
    return shorten(value, digits(size) - digits(step), "scientific").toLowerCase();
  return shorten(size > step / 2 ? value : 0, -digits(step), "standard");
}

function shorten(value, decimals, notation) {
  return value.toLocaleString("en", { notation, maximumFractionDigits: Math.max(decimals, 0) });
}

function drawGrid(svg, across, up, width, height) {
  for (const [value, words] of ticks(up, 5)) {
    const y = up(value);
    append(svg, "line", { x1: LEFT, x2: width - RIGHT, y1: y, y2: y });
    append(svg, "text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }).textContent = words;
  }
  const y = height - 7;
  append(svg, "text", { x: LEFT - 26, y, "text-anchor": "end" }).textContent = "step";
  const widest = across.high.toLocaleString("en").length * CHARACTER;
  const count = Math.min(Math.max(Math.floor((width - LEFT - RIGHT) / (widest + 24)), 1), 6);
  for (const [value, words] of ticks(across, count, true)) {
    // A long one at the right end moves inwards.
    const x = Math.min(across(value), width - (words.length * CHARACTER) / 2);
    append(svg, "text", { x, y, "text-anchor": "middle" }).textContent = words;
  }
}

// A line from value to value, or a dot at each; a logarithmic axis has gaps at those below it.
function curve(steps, values, across, up, dots = false) {
  let path = "", isOpen = false;
  values.forEach((value, i) => {
    const isDrawn = !up.log || value > 0;
    if (isDrawn) {
      const place = `${across(steps[i]).toFixed(1)},${up(value).toFixed(1)}`;
      path += isOpen && !dots ? `L${place}` : `M${place}h0`;
    }
    isOpen = isDrawn;
  });
  return path;
}

function bars(steps, values, across, up, shift) {
  return values.map((value, i) => up.log && value <= 0 ? "" :
    `M${(across(steps[i]) + shift).toFixed(1)},${up.begin}V${up(value).toFixed(1)}`).join("");
}

// Below a table: whether there is more of it to the right.
function showWhatIsCut(table) {
  const hint = table.nextElementSibling;
  const update = () => {
    const more = table.scrollWidth - table.clientWidth - table.scrollLeft > 1;
    hint.hidden = table.scrollWidth - table.clientWidth <= 1;
    hint.textContent = more ? "more columns to the right: scroll sideways" : "more columns to the left";
    table.classList.toggle("cut", more);
  };
  table.onscroll = update;
  update();
}

function append(parent, name, attributes) {
  const element = document.createElementNS(parent.namespaceURI, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  parent.append(element);
  return element;
}

function nearest(sorted, wanted) {
  let low = 0;
  let high = sorted.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < wanted) low = middle + 1;
    else high = middle;
  }
  const isBefore = low > 0 && wanted - sorted[low - 1] < sorted[low] - wanted;
  return sorted.length ? low - isBefore : -1;
}
