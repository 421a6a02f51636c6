// Pictures of numbers by loop step, drawn as SVG: a small one in every card, a large one with axes, and tables of colours.

const SMALL = { width: 168, height: 56, left: 2, right: 2, top: 4, bottom: 4 };
const LARGE = { width: 520, height: 210, left: 58, right: 14, top: 12, bottom: 38 };

function horizontal(frame, n) {
  const room = frame.width - frame.left - frame.right;
  return (place) => frame.left + (n < 2 ? room / 2 : (room * (place + 0.5)) / n);
}

function vertical(frame, [low, high]) {
  const room = frame.height - frame.top - frame.bottom;
  return (value) => frame.top + (room * (high - Math.min(high, Math.max(low, value)))) / (high - low || 1);
}

/** The range that holds all trajectories with two standard errors, and zero. */
function rangeOf(pairs) {
  let [low, high] = [0, 0];
  for (const { steps, stepErrors } of pairs) {
    for (const [step, value] of steps.entries()) {
      low = Math.min(low, value - 2 * stepErrors[step]);
      high = Math.max(high, value + 2 * stepErrors[step]);
    }
  }
  return low === high ? [-1, 1] : [low, high];
}

function linePath(points) {
  return points.map(([x, y], place) => `${place ? "L" : "M"}${x.toFixed(1)},${y.toFixed(1)}`).join("");
}

function bandPath(steps, errors, x, y) {
  const upper = steps.map((value, step) => [x(step), y(value + 2 * errors[step])]);
  const lower = steps.map((value, step) => [x(step), y(value - 2 * errors[step])]);
  return `${linePath([...upper, ...lower.reverse()])}Z`;
}

/** A trajectory with its band of two standard errors and, under the pointer, its numbers. */
function Trajectory({ pair, range, unit, chosenStep, isLarge, onStep }) {
  const frame = isLarge ? LARGE : SMALL;
  const [hovered, setHovered] = useState(null);
  const { steps, stepErrors } = pair;
  const [x, y] = [horizontal(frame, steps.length), vertical(frame, range)];
  const points = steps.map((value, step) => [x(step), y(value)]);
  const shownStep = hovered ?? (chosenStep ? chosenStep - 1 : null);
  const column = (frame.width - frame.left - frame.right) / Math.max(1, steps.length);
  const name = `Influence by loop step: ${steps.map(exact).join(", ")}`;
  return html`<figure class=${`trajectory ${isLarge ? "large" : ""}`}>
    <svg viewBox=${`0 0 ${frame.width} ${frame.height}`} role="img" aria-label=${name} onMouseLeave=${() => setHovered(null)}>
      ${isLarge && html`<${Axes} frame=${frame} range=${range} unit=${unit} x=${x} y=${y} n=${steps.length} />`}
      <line class="zero" x1=${frame.left} x2=${frame.width - frame.right} y1=${y(0)} y2=${y(0)} />
      <path class="band" d=${bandPath(steps, stepErrors, x, y)} />
      <path class="line" d=${linePath(points)} />
      ${points.map(([px, py], step) =>
        isLarge || step === shownStep || steps.length === 1
          ? html`<circle class=${step === shownStep ? "point now" : "point"} cx=${px} cy=${py} r=${isLarge ? 3.5 : 3} />`
          : null,
      )}
      ${steps.map(
        (_, step) => html`<rect
          class="column" x=${x(step) - column / 2} y="0" width=${column} height=${frame.height}
          onMouseEnter=${() => setHovered(step)}
          onClick=${(event) => { event.stopPropagation(); onStep(step + 1); }}
        />`,
      )}
    </svg>
    ${hovered !== null &&
    html`<figcaption class="bubble" style=${{ left: `${(100 * x(hovered)) / frame.width}%` }}>
      step ${hovered + 1}: <b>${exact(steps[hovered])}</b> ± ${magnitude(stepErrors[hovered])}
    </figcaption>`}
  </figure>`;
}

function Axes({ frame, range, unit, x, y, n }) {
  const every = Math.ceil(n / 12);
  const bottom = frame.height - frame.bottom;
  return html`<g class="axes">
    ${niceTicks(range[0] / unit.scale, range[1] / unit.scale).map(
      (tick) => html`<g>
        <line class="grid" x1=${frame.left} x2=${frame.width - frame.right} y1=${y(tick * unit.scale)} y2=${y(tick * unit.scale)} />
        <text x=${frame.left - 8} y=${y(tick * unit.scale)} dy="0.32em" text-anchor="end">${withMinus(String(Number(tick.toPrecision(6))))}</text>
      </g>`,
    )}
    ${Array.from({ length: n }, (_, step) => step)
      .filter((step) => step % every === 0)
      .map((step) => html`<text x=${x(step)} y=${bottom + 15} text-anchor="middle">${step + 1}</text>`)}
    <text class="name" x=${(frame.left + frame.width - frame.right) / 2} y=${frame.height - 5} text-anchor="middle">loop step</text>
    <text class="name" transform=${`translate(12 ${(frame.top + bottom) / 2}) rotate(-90)`} text-anchor="middle">influence ${unit.text}</text>
  </g>`;
}

/** Colours for numbers of either sign, symmetric about zero, with a scale. */
function ColourTable({ rows, errors, rowNames, columnNames, rowTitle, columnTitle, unit, onColumn, onRow }) {
  const largest = largestOf(rows.flat()) || 1;
  return html`<div class="colour-table">
    <table>
      <thead>
        <tr><th></th><th colspan=${columnNames.length}>${columnTitle}</th></tr>
        <tr><th class="row-title">${rowTitle}</th>
          ${columnNames.map((name) => html`<th>${onColumn ? html`<button onClick=${() => onColumn(name)}>${name}</button>` : name}</th>`)}</tr>
      </thead>
      <tbody>
        ${rows.map(
          (row, place) => html`<tr>
            <th>${onRow ? html`<button onClick=${() => onRow(rowNames[place])}>${rowNames[place]}</button>` : rowNames[place]}</th>
            ${row.map(
              (value, column) => html`<td
                style=${{ "--tint": `${Math.round((100 * Math.abs(value)) / largest)}%`, "--side": sideColour(value) }}
                title=${exact(value) + (errors ? ` ± ${magnitude(errors[place][column])}` : "")}
              ></td>`,
            )}
          </tr>`,
        )}
      </tbody>
    </table>
    <p class="scale" aria-hidden="true">
      <span>${signed(-largest, unit)}</span><span class="ramp"></span><span>${signed(largest, unit)} ${unit.text}</span>
    </p>
  </div>`;
}

/** Means with a band, one for each bin: at which steps influence acts over all test examples. */
function ShareChart({ shares, chosen }) {
  const names = binNames();
  const kept = names.map((name, bin) => ({ name, bin })).filter(({ name }) => name !== null);
  const ticks = niceTicks(0, 1.2 * (Math.max(...kept.map(({ bin }) => shares.high[bin])) || 1));
  const top = ticks[ticks.length - 1];
  const frame = { ...LARGE, width: 640, height: 220 };
  const [x, y] = [horizontal(frame, kept.length), vertical(frame, [0, top])];
  const width = Math.min(34, (0.62 * (frame.width - frame.left - frame.right)) / kept.length);
  const every = Math.ceil(kept.length / 24);
  const bottom = frame.height - frame.bottom;
  return html`<svg class="shares" viewBox=${`0 0 ${frame.width} ${frame.height}`} role="img" aria-label="Share of influence by loop step">
    <g class="axes">
      ${ticks.map((tick) => html`<g>
        <line class="grid" x1=${frame.left} x2=${frame.width - frame.right} y1=${y(tick)} y2=${y(tick)} />
        <text x=${frame.left - 8} y=${y(tick)} dy="0.32em" text-anchor="end">${percent(tick)}</text></g>`)}
      <text class="name" x=${(frame.left + frame.width - frame.right) / 2} y=${frame.height - 5} text-anchor="middle">loop step</text>
      <text class="name" transform=${`translate(12 ${(frame.top + bottom) / 2}) rotate(-90)`} text-anchor="middle">share of |influence|</text>
    </g>
    ${kept.map(({ name, bin }, place) => html`<g class=${chosen === name ? "bar now" : "bar"}>
      <title>${`${name}: ${percent(shares.mean[bin])} (10% to 90% of test examples: ${percent(shares.low[bin])} to ${percent(shares.high[bin])})`}</title>
      <rect x=${x(place) - width / 2} width=${width} y=${y(shares.mean[bin])} height=${Math.max(0, y(0) - y(shares.mean[bin]))} />
      <line class="whisker" x1=${x(place)} x2=${x(place)} y1=${y(shares.low[bin])} y2=${y(shares.high[bin])} />
      ${(place % every === 0 || !/^\d/.test(name)) && html`<text x=${x(place)} y=${bottom + 15} text-anchor="middle">${name}</text>`}
    </g>`)}
  </svg>`;
}

/** The name of each bin in the order of the shares; null for one that is empty throughout. */
function binNames() {
  const steps = Array.from({ length: facts.steps }, (_, step) => String(step + 1));
  return [facts.hasPrelude ? "prelude" : null, ...steps, facts.hasCoda ? "coda" : null];
}
