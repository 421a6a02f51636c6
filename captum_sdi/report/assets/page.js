// The page: its state, which the address remembers, and the keys.

const START = { test: 0, rank: "total", train: null, view: "tests", typed: "", search: "", order: "given", isDeep: false, ownScale: false, isPlaying: false, isListOpen: false, theme: null };

/** The selection that an address names; what it does not name is as at the start. */
function selectionFrom(hash) {
  const named = new URLSearchParams(hash.replace(/^#/, ""));
  const test = Number(named.get("test") ?? 0);
  const train = named.get("train");
  return {
    test: Number.isInteger(test) && test >= 0 && test < facts.tests ? test : 0,
    rank: knownRank(named.get("rank") ?? "total"),
    train: train === null ? null : Number(train),
    view: ["set", "about"].includes(named.get("view")) ? named.get("view") : "tests",
  };
}

/** A rank that this page can have; the total in place of any other. */
function knownRank(rank) {
  const [kind, label] = splitRank(rank);
  if (kind === "step") return Number(label) >= 1 && Number(label) <= facts.steps ? rank : "total";
  const isOuter = (kind === "prelude" && facts.hasPrelude) || (kind === "coda" && facts.hasCoda);
  return isOuter || facts.maps.some(({ axes }) => axes.includes(kind)) ? rank : "total";
}

function addressOf({ test, rank, train, view }) {
  const named = new URLSearchParams({ test });
  if (rank !== "total") named.set("rank", rank);
  if (train !== null) named.set("train", train);
  if (view !== "tests") named.set("view", view);
  return `#${named}`;
}

function Page({ tests, first }) {
  const [state, setState] = useState(() => ({ ...START, ...selectionFrom(location.hash) }));
  const go = (change) => setState((now) => ({ ...now, ...(typeof change === "function" ? change(now) : change) }));
  const [shown, setShown] = useState(first);
  const [deepFound, setDeepFound] = useState(null);
  const listed = useMemo(() => listedTests(tests, state, deepFound), [tests, state.search, state.order, deepFound]);

  useEffect(() => {
    if (shown.test === state.test) return undefined;
    let isCurrent = true;
    loadTest(state.test).then((loaded) => isCurrent && setShown(loaded));
    return () => { isCurrent = false; };
  }, [state.test]);
  useEffect(() => {
    try { history.replaceState(null, "", addressOf(state)); } catch { /* a frame in a notebook has no address */ }
  }, [state.test, state.rank, state.train, state.view]);
  useEffect(() => {
    const follow = () => go(selectionFrom(location.hash));
    addEventListener("hashchange", follow);
    return () => removeEventListener("hashchange", follow);
  }, []);
  useEffect(() => {
    if (state.theme) document.documentElement.dataset.theme = state.theme;
  }, [state.theme]);
  useEffect(() => {
    let isCurrent = true;
    if (!state.isDeep || !state.search) setDeepFound(null);
    else testsWithTrainingText(state.search).then((found) => isCurrent && setDeepFound(found));
    return () => { isCurrent = false; };
  }, [state.search, state.isDeep]);
  useEffect(() => {
    const press = (event) => pressed(event, { go, listed, shown });
    addEventListener("keydown", press);
    return () => removeEventListener("keydown", press);
  });
  useEffect(() => {
    const card = document.querySelector(".card.open");
    if (card) card.scrollIntoView({ block: "nearest" });
  }, [state.train, shown]);

  return html`
    <${TopBar} state=${state} go=${go} />
    <div class=${`body ${state.isListOpen ? "list-open" : ""}`}>
      <nav>
        <${Search} state=${state} go=${go} nFound=${listed.length} isSearching=${state.isDeep && state.search && !deepFound} />
        <${TestList} tests=${listed} state=${state} go=${go} />
      </nav>
      <main aria-busy=${shown.test !== state.test}>
        ${state.view === "set" && html`<${SetView} state=${state} />`}
        ${state.view === "about" && html`<${AboutView} />`}
        ${state.view === "tests" && html`<${TestView} key=${shown.test} shown=${shown} test=${tests[shown.test]} state=${state} go=${go} />`}
      </main>
    </div>
  `;
}

function TopBar({ state, go }) {
  const views = { tests: "Test examples", set: "The whole set", about: "How to read" };
  const isDark = state.theme ? state.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  return html`<header class="top">
    <button class="menu" aria-label="List of test examples" onClick=${() => go({ isListOpen: !state.isListOpen })}>☰</button>
    <h1>${facts.title}</h1>
    <div class="tabs" role="tablist">
      ${Object.entries(views).map(([view, name]) => html`<button role="tab" aria-selected=${state.view === view} onClick=${() => go({ view })}>${name}</button>`)}
    </div>
    <button class="theme" title="Light or dark" aria-label="Light or dark" onClick=${() => go({ theme: isDark ? "light" : "dark" })}>${isDark ? "☀" : "☾"}</button>
  </header>`;
}

function Search({ state, go, nFound, isSearching }) {
  return html`<div class="search">
    <input type="search" id="search" placeholder="Search   /" aria-label="Search in texts" value=${state.typed}
      onInput=${(event) => go({ typed: event.target.value, search: event.target.value.toLowerCase() })} />
    <label><input type="checkbox" checked=${state.isDeep} onChange=${() => go({ isDeep: !state.isDeep })} /> in training texts, too</label>
    <div class="order">
      <span role="status">${isSearching ? "searching…" : `${nFound.toLocaleString("en")} of ${facts.tests.toLocaleString("en")}`}</span>
      <select aria-label="Order" value=${state.order} onChange=${(event) => go({ order: event.target.value })}>
        ${Object.entries(ORDERS).map(([order, { name }]) => html`<option value=${order}>${name}</option>`)}
      </select>
    </div>
  </div>`;
}

/** The test examples that the search leaves, in the order that was chosen. */
function listedTests(tests, state, deepFound) {
  const found = tests.filter((test) => !state.search || entryHolds(test.entry, state.search) || deepFound?.has(test.test));
  return found.sort(ORDERS[state.order].compare);
}

function pressed(event, { go, listed, shown }) {
  const isTyping = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) && event.target.type !== "checkbox";
  if (event.key === "Escape") {
    event.target.blur();
    go({ train: null, typed: "", search: "", isPlaying: false, isListOpen: false, view: "tests" });
    return;
  }
  if (event.key === "Enter" && event.target.id === "search" && listed.length) {
    event.target.blur();
    go({ test: listed[0].test, train: null, view: "tests", isListOpen: false });
    return;
  }
  if (isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
  const act = keyActions({ go, listed, shown })[event.key];
  if (!act) return;
  event.preventDefault();
  act();
}

/** What each key does, from the state as it is when the key arrives: a second one may come before the page is drawn. */
function keyActions({ go, listed, shown }) {
  const goToTest = (offset) => go((now) => {
    const place = listed.findIndex(({ test }) => test === now.test);
    const next = listed[place + offset];
    return next ? { test: next.test, train: null, view: "tests" } : {};
  });
  const depth = largestOf(shown.pairs.map(({ steps }) => steps.length));
  const rankOf = (step) => (step > 0 ? `step:${Math.min(depth, step)}` : "total");
  const goByStep = (offset) => go((now) => ({ rank: rankOf(rankStep(now.rank) + offset), isPlaying: false }));
  const openNext = (offset) => go((now) => ({ train: neighbour(shown, now, offset) }));
  return {
    j: () => goToTest(1),
    k: () => goToTest(-1),
    ArrowRight: () => goByStep(1),
    ArrowLeft: () => goByStep(-1),
    n: () => openNext(1),
    b: () => openNext(-1),
    0: () => go({ rank: "total", isPlaying: false }),
    p: () => go((now) => ({ isPlaying: !now.isPlaying })),
    "/": () => document.getElementById("search").focus(),
    "?": () => go((now) => ({ view: now.view === "about" ? "tests" : "about" })),
  };
}

/** The training example that stands so many places behind the open one, first the proponents, then the opponents. */
function neighbour(shown, state, offset) {
  const { proponents, opponents } = sides(shown, state.rank);
  const cards = [...withoutCopies(proponents), ...withoutCopies(opponents)];
  const trains = cards.map(({ pair }) => pair.train);
  const place = cards.findIndex((card) => standsFor(card, state.train));
  return trains[place < 0 && offset < 0 ? trains.length - 1 : place + offset] ?? state.train;
}

async function start() {
  const root = document.getElementById("page");
  if (!("DecompressionStream" in window && CSS.supports("color", "light-dark(red, blue)"))) {
    root.textContent = "This browser cannot show the page: use Chrome 123, Firefox 120, Safari 17.5 or newer.";
    return;
  }
  const rows = await chunk("tests");
  const tests = rows.map((row, test) => ({ ...row, test }));
  const first = await loadTest(selectionFrom(location.hash).test);
  root.textContent = "";
  render(html`<${Page} tests=${tests} first=${first} />`, root);
}

start();
