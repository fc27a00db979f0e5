// Shows the values under the pointer: in each panel, of each run, those of the nearest step drawn.
for (const figure of document.querySelectorAll("figure[data-lines]")) {
  const lines = JSON.parse(figure.dataset.lines);
  const [left, right, first, last] = JSON.parse(figure.dataset.axes);
  const svg = figure.querySelector("svg");
  const tip = document.createElement("div");
  tip.className = "tip";
  figure.append(tip);
  const cursor = svg.querySelector(".cursor");
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const wanted = first + ((x - left) / (right - left)) * (last - first);
    const found = lines.map(([steps]) => nearest(steps, wanted));
    const steps = found.map((index, run) => lines[run][0][index]).filter((step) => step !== undefined);
    const step = steps.reduce((a, b) => (Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a));
    tip.replaceChildren(`step ${step.toLocaleString("en")}`);
    found.forEach((index, run) => {
      const [ofRun, values] = lines[run];
      // A run that had ended, or not begun, there has no value.
      const reach = (last - first) / 100;
      if (index < 0 || step > ofRun.at(-1) + reach || step < ofRun[0] - reach) return;
      const span = document.createElement("span");
      span.className = `run${run}`;
      span.textContent = values[index].toLocaleString("en", { maximumSignificantDigits: 6 });
      tip.append(span);
    });
    const place = left + ((step - first) / (last - first)) * (right - left);
    cursor.setAttribute("x1", place);
    cursor.setAttribute("x2", place);
    cursor.setAttribute("visibility", "visible");
  });
  svg.addEventListener("pointerleave", () => {
    tip.replaceChildren();
    cursor.setAttribute("visibility", "hidden");
  });
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
