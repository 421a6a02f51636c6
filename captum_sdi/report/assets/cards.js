// A card for each training example: its numbers, its trajectory, its text and, opened, everything that is known of it.

const CARDS_AT_FIRST = 20;
const LONG_TEXT = 900; // characters, beyond which a text is folded until somebody asks
const LONG_CONTEXT = 200; // characters before what is learned, of which a folded text shows the last

function Column({ title, note, cards, shown, state, unit, range, largest, go }) {
  const [nCards, setNCards] = useState(CARDS_AT_FIRST);
  const groups = useMemo(() => withoutCopies(cards), [cards]);
  const openPlace = groups.findIndex((card) => standsFor(card, state.train));
  const nShown = Math.max(nCards, openPlace + 1);
  const nMore = groups.length - nShown;
  return html`<section class=${`column-of-cards ${title.toLowerCase()}`}>
    <h2>${title} <span class="count">${cards.length}</span></h2>
    <p class="note">${note}</p>
    ${cards.length === 0 && html`<p class="empty">None among the training examples in this file.</p>`}
    <ol>
      ${groups.slice(0, nShown).map(
        (card, place) => html`<${Card}
          key=${card.pair.train} card=${card} place=${place} shown=${shown} state=${state} unit=${unit} range=${range} largest=${largest} go=${go}
        />`,
      )}
    </ol>
    ${nMore > 0 && html`<button class="more" onClick=${() => setNCards(nShown + 50)}>Show ${Math.min(50, nMore)} more of ${nMore}</button>`}
  </section>`;
}

function Card({ card, place, shown, state, unit, range, largest, go }) {
  const { pair, value, error } = card;
  const isOpen = standsFor(card, state.train);
  const isFaint = isWithinError(card);
  const ownRange = state.ownScale ? rangeOf([pair]) : range;
  const toggle = () => go({ train: isOpen ? null : pair.train });
  const onStep = (step) => go({ rank: `step:${step}` });
  return html`<li class=${`card ${isOpen ? "open" : ""} ${isFaint ? "faint" : ""}`} data-train=${pair.train}>
    <header onClick=${toggle}>
      <div class="numbers">
        <span class="rank">${place + 1}</span>
        <b class="value" title=${exact(value)}>${signed(value, unit)}</b>
        ${error !== null && html`<span class="error" title=${`standard error of the sketch ± ${magnitude(error)}`}>± ${plain(error, unit)}</span>`}
        ${isFaint && html`<span class="tag">below its error</span>`}
        <span class="extent"><span style=${{ width: `${(100 * Math.abs(value)) / (largest || 1)}%` }}></span></span>
      </div>
      <${Trajectory} pair=${pair} range=${ownRange} unit=${unit} chosenStep=${rankStep(state.rank)} onStep=${onStep} />
    </header>
    <${TrainText} pair=${pair} shown=${shown} state=${state} unit=${unit} />
    <footer>
      <button class="name" aria-expanded=${isOpen} onClick=${toggle}>#${pair.train}</button>
      <${Fields} entry=${pair.entry} />
      <${Copies} copies=${card.copies} unit=${unit} />
      ${state.rank !== "total" && html`<span class="total">total ${signed(pair.total, unit)}</span>`}
    </footer>
    ${isOpen && html`<${Details} pair=${pair} shown=${shown} state=${state} unit=${unit} go=${go} />`}
  </li>`;
}

/** The training examples behind a card that say the same. */
function Copies({ copies, unit }) {
  if (!copies.length) return null;
  const names = copies.map(({ train, total }) => `#${train} ${signed(total, unit)}`).join(", ");
  const few = copies.slice(0, 5).map(({ train }) => `#${train}`).join(", ");
  const more = copies.length > 5 ? ` and ${copies.length - 5} more` : "";
  return html`<span class="copies" title=${`totals: ${names}`}>the same text: ${few}${more}</span>`;
}

/** A training example's text: tinted where a map knows its tokens, folded where it is long. */
function TrainText({ pair, shown, state, unit }) {
  const [isUnfolded, setIsUnfolded] = useState(false);
  if (!pair.entry) return html`<p class="empty">No text was given for this example.</p>`;
  const text = pair.entry[0];
  const { map, axis } = mapAlong(shown, TRAIN_TOKENS);
  const profile = map && axisProfile(map, pair.train, axis, rankStep(state.rank));
  const isFolded = text.length > LONG_TEXT && !isUnfolded;
  const learned = learnedOf(pair.entry);
  const start = isFolded ? foldStart(learned) : 0;
  return html`<div class=${isFolded ? "folded" : ""}>
      ${profile
        ? html`<${TintedText} text=${text} learned=${learned} labels=${tokenLabels(map, axis, pair.train)} values=${profile.values} errors=${profile.errors} unit=${unit} />`
        : html`<${Text} text=${text} learned=${learned} words=${state.search} start=${start} />`}
    </div>
    ${text.length > LONG_TEXT &&
    html`<button class="unfold" onClick=${() => setIsUnfolded(!isUnfolded)}>
      ${isFolded ? `Show all ${text.length.toLocaleString("en")} characters` : "Fold"}
    </button>`}`;
}

/** Where a folded text begins: at its beginning, or some way before what is learned, which has to be seen. */
function foldStart(learned) {
  const first = learned?.[0]?.[0] ?? 0;
  return first > 2 * LONG_CONTEXT ? first - LONG_CONTEXT : 0;
}

function Details({ pair, shown, state, unit, go }) {
  const onStep = (step) => go({ rank: `step:${step}` });
  const table = useMemo(() => layerTable(shown, pair), [shown, pair]);
  return html`<div class="details">
    <${Trajectory} pair=${pair} range=${rangeOf([pair])} unit=${unit} chosenStep=${rankStep(state.rank)} isLarge onStep=${onStep} />
    <${StepTable} pair=${pair} unit=${unit} />
    ${pair.matrix && html`<${StepMatrix} matrix=${pair.matrix} />`}
    ${table && html`<h3>By layer and loop step</h3>
      <${ColourTable} ...${table} unit=${unitFor(largestOf(table.rows.flat()))} rowTitle="layer" columnTitle="loop step of the test example"
        onRow=${(label) => go({ rank: `layer:${label}` })}
        onColumn=${(label) => stepNumber(label) && onStep(stepNumber(label))} />`}
  </div>`;
}

function StepTable({ pair, unit }) {
  const bins = pair.steps.map((value, step) => ({ name: `${step + 1}`, value, error: pair.stepErrors[step] }));
  if (facts.hasPrelude) bins.unshift({ name: "prelude", value: pair.prelude, error: null });
  if (facts.hasCoda) bins.push({ name: "coda", value: pair.coda, error: null });
  bins.unshift({ name: "total", value: pair.total, error: pair.error });
  return html`<div class="scroll"><table class="steps">
    <tr><th>loop step</th>${bins.map(({ name }) => html`<th>${name}</th>`)}</tr>
    <tr><th>influence ${unit.text}</th>${bins.map((bin) => html`<td class=${isWithinError(bin) ? "faint" : ""}>${signed(bin.value, unit)}</td>`)}</tr>
    <tr><th>± error of the sketch</th>${bins.map(({ error }) => html`<td>${error === null ? "" : plain(error, unit)}</td>`)}</tr>
  </table></div>`;
}

function StepMatrix({ matrix }) {
  const names = (length) => Array.from({ length }, (_, step) => String(step + 1));
  return html`<h3>Step by step</h3>
    <${ColourTable} rows=${matrix} rowNames=${names(matrix.length)} columnNames=${names(matrix[0].length)}
      rowTitle="of training" columnTitle="loop step of the test example" unit=${unitFor(largestOf(matrix.flat()))} />`;
}

/** A pair's influence by layer and loop step, where a map has both; without a prelude and a coda that are empty. */
function layerTable(shown, pair) {
  const map = shown.maps.find(({ axes }) => axes.includes("layer") && axes.includes("step"));
  const table = map && axisTable(map, pair.train, "layer", "step");
  if (!table) return null;
  const { values, errors } = table;
  const steps = map.labels[map.axes.indexOf("step")];
  const kept = steps.map((_, place) => place).filter((place) => stepNumber(steps[place]) || values.some((row) => row[place]));
  const inSight = (row) => kept.map((place) => row[place]);
  return {
    rows: values.map(inSight),
    errors: errors && errors.map(inSight),
    rowNames: map.labels[map.axes.indexOf("layer")],
    columnNames: kept.map((place) => steps[place]),
  };
}
