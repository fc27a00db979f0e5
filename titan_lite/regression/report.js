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
    tip.replaceChildren();
    let step = null;
    lines.forEach(([steps, values], run) => {
      const index = nearest(steps, wanted);
      if (index < 0) return;
      step ??= steps[index];
      const span = document.createElement("span");
      span.className = `run${run}`;
      span.textContent = values[index].toPrecision(6).replace(/\.?0+$/, "");
      tip.append(span);
    });
    if (step === null) return;
    tip.prepend(`step ${step}`);
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
  return low > 0 && wanted - sorted[low - 1] < sorted[low] - wanted ? low - 1 : low;
}
