// The parts of the page: the list of test examples, one of them with its sources, the whole set, and how to read it.

const ROW_HEIGHT = 66; // of the list; page.css says the same
const ORDERS = {
  given: { name: "in order", compare: (left, right) => left.test - right.test },
  strongest: { name: "strongest influence first", compare: (left, right) => right.top - left.top },
  latest: { name: "latest loop steps first", compare: (left, right) => right.centre - left.centre },
  earliest: { name: "earliest loop steps first", compare: (left, right) => left.centre - right.centre },
  text: { name: "by text", compare: (left, right) => left.entry[0].localeCompare(right.entry[0]) },
};

/** The test examples, of which only those in sight are in the document: there may be thousands. */
function TestList({ tests, state, go }) {
  const box = useRef(null);
  const [view, setView] = useState({ top: 0, height: 800 });
  const measure = () => setView({ top: box.current.scrollTop, height: box.current.clientHeight });
  const place = tests.findIndex(({ test }) => test === state.test);
  useEffect(() => {
    const { scrollTop, clientHeight } = box.current;
    const [top, bottom] = [place * ROW_HEIGHT, (place + 1) * ROW_HEIGHT];
    if (top < scrollTop) box.current.scrollTop = top;
    if (bottom > scrollTop + clientHeight) box.current.scrollTop = bottom - clientHeight;
    measure();
  }, [place, tests.length]);
  const first = Math.max(0, Math.floor(view.top / ROW_HEIGHT) - 5);
  const last = Math.min(tests.length, Math.ceil((view.top + view.height) / ROW_HEIGHT) + 5);
  return html`<div class="list" ref=${box} onScroll=${measure} role="listbox" aria-label="Test examples" tabindex="0">
    <div class="all" style=${{ height: `${tests.length * ROW_HEIGHT}px` }}>
      ${tests.slice(first, last).map(
        (test, offset) => html`<button
          key=${test.test} role="option" aria-selected=${test.test === state.test} tabindex="-1"
          style=${{ top: `${(first + offset) * ROW_HEIGHT}px` }} onClick=${() => go({ test: test.test, train: null, view: "tests", isListOpen: false })}
        >
          <span class="excerpt" dir="auto">${marked(test.entry[0].slice(0, 160), state.search) || "(no text)"}</span>
          <span class="facts"><span>${test.test}</span><${Shape} shape=${test.shape} /></span>
        </button>`,
      )}
    </div>
  </div>`;
}

/** The profile of a test example over loop steps, as small as a word. */
function Shape({ shape }) {
  const width = Math.min(3.5, 72 / shape.length);
  return html`<svg class="shape" viewBox=${`0 0 ${width * shape.length} 12`} width=${width * shape.length} height="12" aria-hidden="true">
    ${shape.map((size, step) => html`<rect x=${step * width} y=${12 - 12 * size} width=${width * 0.8} height=${12 * size} />`)}
  </svg>`;
}

function TestView({ shown, test, state, go }) {
  const { proponents, opponents } = useMemo(() => sides(shown, state.rank), [shown, state.rank]);
  const all = [...proponents, ...opponents];
  const range = useMemo(() => rangeOf(shown.pairs), [shown]);
  const largest = largestOf(all.map(({ value }) => value));
  const unit = unitFor(Math.max(largest, largestOf(shown.pairs.map(({ total }) => total))));
  const common = { shown, state, unit, range, largest, go };
  const by = state.rank === "total" ? "" : ` at ${rankName(state.rank)}`;
  const hasContext = [test.entry, ...shown.pairs.map(({ entry }) => entry)].some(learnedOf);
  const question = useRef(null);
  useEffect(() => showLearned(question.current.querySelector(".text")), [test.test]);
  return html`<article>
    <header class="question">
      <p class="label">Test example ${test.test} <${Fields} entry=${test.entry} /></p>
      <div ref=${question} class="asked"><${TestText} shown=${shown} test=${test} state=${state} unit=${unit} go=${go} /></div>
      ${hasContext && html`<p class="note legend"><span class="context">Grey text</span> is context, such as a prompt: its tokens carry no loss. The bar stands where the rest begins.</p>`}
    </header>
    <${StepBar} shown=${shown} state=${state} go=${go} />
    <${RankNote} state=${state} unit=${unit} go=${go} />
    <div class="columns">
      <${Column} ...${common} title="Proponents" cards=${proponents} note=${`Training on them lowered this example’s loss${by}.`} />
      <${Column} ...${common} title="Opponents" cards=${opponents} note=${`Training on them raised this example’s loss${by}.`} />
    </div>
  </article>`;
}

/** Scroll a long text to where what is learned begins. */
function showLearned(box) {
  const learned = box?.querySelector(".learned");
  if (learned) box.scrollTop = learned.offsetTop - box.offsetTop - box.clientHeight / 2;
}

/** The text of a test example, tinted by the pair that is open, or by all pairs of the map together. */
function TestText({ shown, test, state, unit, go }) {
  const text = test.entry[0];
  const { map, axis } = mapAlong(shown, TEST_TOKENS);
  const learned = learnedOf(test.entry);
  if (!map) return html`<${Text} text=${text || "No text was given for this example."} learned=${learned} words=${state.search} />`;
  const trains = map.placeOf.has(state.train) ? [state.train] : map.train;
  const profiles = trains.map((train) => axisProfile(map, train, axis, rankStep(state.rank)));
  const labels = tokenLabels(map, axis);
  const values = labels.map((_, token) => sumOf(profiles.map((profile) => profile.values[token])));
  const errors = profiles.length === 1 ? profiles[0].errors : null; // those of several pairs are not independent
  const [kind, label] = splitRank(state.rank);
  const who = trains.length === 1 ? `training example ${trains[0]}` : `${trains.length} training examples together`;
  return html`<${TintedText} text=${text} learned=${learned} labels=${labels} values=${values} errors=${errors} unit=${unit}
      chosen=${kind === axis ? Number(label) : null} onChoose=${(token) => go({ rank: `${axis}:${token}` })} />
    <p class="note">Tint: influence of ${who} ${axis === "token" ? "on the loss of each token" : "by the position where gradients arise"}${rankStep(state.rank) ? ` through ${rankName(state.rank)}` : ""}. Click a token to rank by it.</p>`;
}

/** The loop as a scale: bars of what acts at each step, a slider over them, and a button that plays them. */
function StepBar({ shown, state, go }) {
  const bins = useMemo(() => profileOfSteps(shown), [shown]);
  const depth = bins.filter(({ rank }) => rank.startsWith("step:")).length;
  const step = rankStep(state.rank);
  const largest = Math.max(...bins.map(({ up, down }) => Math.max(up, -down))) || 1;
  const every = Math.ceil(depth / 16); // of many steps, not every number has room
  const isNamed = (name) => !Number(name) || Number(name) === 1 || Number(name) % every === 0;
  const unit = unitFor(largest);
  useEffect(() => {
    if (!state.isPlaying) return undefined;
    const timer = setInterval(() => go((now) => ({ rank: `step:${(rankStep(now.rank) % depth) + 1}` })), 900);
    return () => clearInterval(timer);
  }, [state.isPlaying, depth]);
  return html`<section class="step-bar" aria-label="Loop steps">
    <div class="controls">
      <button class="play" aria-pressed=${state.isPlaying} onClick=${() => go({ isPlaying: !state.isPlaying })}>
        ${state.isPlaying ? "❚❚ Pause" : "▶ Play the loop"}
      </button>
      <input type="range" min="0" max=${depth} step="1" value=${step} aria-label="Loop step; 0 is the total"
        onInput=${(event) => go({ rank: Number(event.target.value) ? `step:${event.target.value}` : "total", isPlaying: false })} />
      <output>${state.rank === "total" ? "all steps" : rankName(state.rank)}</output>
    </div>
    <div class="bins">
      <button class=${`bin total ${state.rank === "total" ? "now" : ""}`} onClick=${() => go({ rank: "total", isPlaying: false })}><span class="name">total</span></button>
      ${bins.map(
        ({ rank, name, up, down }) => html`<button
          key=${rank} class=${`bin ${Number(name) ? "" : "outer"} ${state.rank === rank ? "now" : ""}`} data-rank=${rank} onClick=${() => go({ rank, isPlaying: false })}
          title=${`${rankName(rank)}: proponents ${signed(up, unit)}, opponents ${signed(down, unit)} ${unit.text}`}
        >
          <span class="up"><span style=${{ height: `${(100 * up) / largest}%` }}></span></span>
          <span class="down"><span style=${{ height: `${(-100 * down) / largest}%` }}></span></span>
          <span class="name">${isNamed(name) ? name : "\u00a0"}</span>
        </button>`,
      )}
    </div>
    <p class="note">Sum over the ${shown.pairs.length} training examples in this file, by loop step of the test example. Click a step to rank by it.</p>
  </section>`;
}

function RankNote({ state, unit, go }) {
  const isTotal = state.rank === "total";
  return html`<p class="rank-note">
    <span>Ranked by <b>${rankName(state.rank)}</b>; numbers are influence${unit.text && html`, <b>${unit.text}</b>`}.</span>
    ${!isTotal && !facts.hasAll && html`<span> Only the training examples in this file are ranked: others may be stronger here.</span>`}
    ${!isTotal && html` <button class="link" onClick=${() => go({ rank: "total", isPlaying: false })}>Back to the total</button>`}
    <label><input type="checkbox" checked=${state.ownScale} onChange=${() => go({ ownScale: !state.ownScale })} /> each curve on its own scale</label>
  </p>`;
}

/** What can be said of the set: when influence acts, and which training examples act most on themselves. */
function SetView({ state }) {
  return html`<article class="set">
    <h2>When influence acts</h2>
    <p class="note">Share of absolute influence by loop step: the mean over ${facts.tests.toLocaleString("en")} test examples, with lines from the 10th to the 90th percentile. Noise of a sketch counts, too, and pulls shares together.</p>
    <${ShareChart} shares=${facts.shares} chosen=${splitRank(state.rank)[1]} />
    <h2>Influence on themselves</h2>
    ${facts.self
      ? html`<p class="note">The highest are candidates for wrong labels and for what is learned by heart. Compare with the plain loss of each, which finds wrong labels as well.</p><${SelfTable} state=${state} />`
      : html`<p class="empty">Self-influence was not given to this page.</p>`}
  </article>`;
}

function SelfTable({ state }) {
  const [rows, setRows] = useState([]);
  const nChunks = Math.ceil(facts.self.rows / facts.self.perChunk);
  const [nLoaded, setNLoaded] = useState(1);
  const [nShown, setNShown] = useState(50);
  useEffect(() => { loadSelf(Math.min(nLoaded, nChunks)).then(setRows); }, [nLoaded]);
  const unit = unitFor(rows.length ? Math.abs(rows[0].total) : 0);
  const range = useMemo(() => rangeOf(rows), [rows]);
  const found = rows.filter(({ entry }) => !state.search || (entry && entryHolds(entry, state.search)));
  const more = () => { setNShown(nShown + 100); if (nShown + 100 >= rows.length) setNLoaded(nLoaded + 1); };
  return html`<ol class="self">
      ${found.slice(0, nShown).map((row) => html`<li class=${isWithinError({ value: row.total, error: row.error }) ? "card faint" : "card"} key=${row.train}>
        <header>
          <div class="numbers"><b class="value" title=${exact(row.total)}>${signed(row.total, unit)}</b> <span class="error">± ${plain(row.error, unit)} ${unit.text}</span></div>
          <${Trajectory} pair=${row} range=${range} unit=${unit} chosenStep=${0} onStep=${() => {}} />
        </header>
        ${row.entry ? html`<${Text} text=${row.entry[0]} learned=${learnedOf(row.entry)} words=${state.search} />` : null}
        <footer><span class="name">#${row.train}</span><${Fields} entry=${row.entry} /></footer>
      </li>`)}
    </ol>
    ${nShown < facts.self.rows && html`<button class="more" onClick=${more}>Show more of ${facts.self.rows.toLocaleString("en")}</button>`}`;
}

async function loadSelf(nChunks) {
  const numbers = Array.from({ length: nChunks }, (_, number) => number);
  const rows = (await Promise.all(numbers.map((number) => chunk(`self-${number}`)))).flat();
  const entries = await Promise.all(rows.map(([, text]) => textEntry(text)));
  return rows.map(([train, , total, error, steps, stepErrors], place) => ({
    train, total, error, steps, stepErrors, entry: entries[place],
  }));
}

function AboutView() {
  return html`<article class="about">
    <h2>How to read this page</h2>
    <dl>
      <dt>Sign</dt><dd>Positive, blue: a proponent. A gradient step on the training example lowers the loss of the test example. Negative, orange: an opponent.</dd>
      <dt>Steps</dt><dd>The number at a loop step is the part that acts through this step of the <em>test</em> example’s computation. Prelude and coda are what acts before and after the loop. Together they sum to the total, which is TracIn.</dd>
      <dt>Texts</dt><dd>Of a prompt with its completion, and of a conversation, the grey parts are context: their tokens carry no loss. Influence is of the rest of a training text on the rest of the test text.</dd>
      <dt>Scale</dt><dd>Drops in test loss over the steps of training that used the example, to first order; of normalised scores, shares without a unit. Compare training examples of one test example with each other; compare test examples by shares of their steps, not by sizes.</dd>
      <dt>Errors</dt><dd>± is the standard error of the sketch; bands are two of them. What is smaller than its error is grey and says nothing. The strongest of many are overstated by some of their own noise.</dd>
      <dt>What is here</dt><dd>${facts.hasAll ? "Every training example was scored, and all are here." : "For each test example, the strongest training examples by what the scores were asked for. One that is not here may still be strong at a single step."}</dd>
    </dl>
    <h2>Keys</h2>
    <dl class="keys">
      <dt><kbd>j</kbd> <kbd>k</kbd></dt><dd>next, previous test example</dd>
      <dt><kbd>→</kbd> <kbd>←</kbd></dt><dd>next, previous loop step</dd>
      <dt><kbd>n</kbd> <kbd>b</kbd></dt><dd>open the next, the previous training example</dd>
      <dt><kbd>0</kbd></dt><dd>rank by the total</dd>
      <dt><kbd>p</kbd></dt><dd>play the loop, or stop</dd>
      <dt><kbd>/</kbd></dt><dd>search</dd>
      <dt><kbd>Esc</kbd></dt><dd>close what is open</dd>
      <dt><kbd>?</kbd></dt><dd>this page</dd>
    </dl>
    <p class="note">captum_sdi ${facts.version}. Drawn with Preact (MIT) and htm (Apache-2.0), which travel in this file; it loads nothing.</p>
  </article>`;
}
