// What pairs are ranked by: "total", "prelude", "coda", "step:3" (from 1), or a label of a map's axis, "layer:core.0".

function splitRank(rank) {
  const colon = rank.indexOf(":");
  return colon < 0 ? [rank, ""] : [rank.slice(0, colon), rank.slice(colon + 1)];
}

function rankStep(rank) {
  const [kind, label] = splitRank(rank);
  return kind === "step" ? Number(label) : 0;
}

/** A pair's value and standard error by a rank; a null value where the page does not hold it. */
function ranked(pair, rank, shown) {
  const [kind, label] = splitRank(rank);
  if (kind === "total") return { value: pair.total, error: pair.error };
  if (kind === "prelude" || kind === "coda") return { value: pair[kind], error: null };
  if (kind === "step") {
    const step = Number(label) - 1;
    return { value: pair.steps[step] ?? null, error: pair.stepErrors[step] ?? null };
  }
  const map = mapWith(shown, kind);
  const profile = map && axisProfile(map, pair.train, kind);
  const place = map ? placeOnAxis(map, kind, label) : -1;
  if (!profile || place < 0) return { value: null, error: null };
  return { value: profile.values[place], error: profile.errors && profile.errors[place] };
}

function rankName(rank) {
  const [kind, label] = splitRank(rank);
  if (kind === "step") return `loop step ${label}`;
  if (TEST_TOKENS.includes(kind)) return `${kind} ${Number(label) + 1}`;
  return label ? `${kind} ${label}` : kind;
}

/** The pairs of either sign by falling size; those without a value by this rank are left out. */
function sides(shown, rank) {
  const scored = shown.pairs.map((pair) => ({ pair, ...ranked(pair, rank, shown) })).filter(({ value }) => value !== null);
  const proponents = scored.filter(({ value }) => value >= 0).sort((left, right) => right.value - left.value);
  const opponents = scored.filter(({ value }) => value < 0).sort((left, right) => left.value - right.value);
  return { proponents, opponents };
}

/** Cards in their order, those behind each other with the same text as one: they would fill the page with copies. */
function withoutCopies(cards) {
  const groups = [];
  for (const card of cards) {
    const last = groups[groups.length - 1];
    const isCopy = last && card.pair.entry && last.pair.entry && saysTheSame(card.pair.entry, last.pair.entry);
    if (isCopy) last.copies.push(card.pair);
    else groups.push({ ...card, copies: [] });
  }
  return groups;
}

/** Whether two examples have the same text, of which the same parts are learned. */
function saysTheSame(entry, other) {
  return entry[0] === other[0] && String(learnedOf(entry)) === String(learnedOf(other));
}

/** Whether a card is of a training example, or of a copy of it. */
function standsFor({ pair, copies }, train) {
  return pair.train === train || copies.some((copy) => copy.train === train);
}

function isWithinError({ value, error }) {
  return error !== null && Math.abs(value) < error;
}

/** The sums of positive and of negative influence of all listed pairs, by bin. */
function profileOfSteps(shown) {
  const depth = largestOf(shown.pairs.map((pair) => pair.steps.length));
  const bins = [];
  if (facts.hasPrelude) bins.push({ rank: "prelude", name: "prelude", values: shown.pairs.map((pair) => pair.prelude) });
  for (let step = 0; step < depth; step += 1) {
    bins.push({ rank: `step:${step + 1}`, name: `${step + 1}`, values: shown.pairs.map((pair) => pair.steps[step] ?? 0) });
  }
  if (facts.hasCoda) bins.push({ rank: "coda", name: "coda", values: shown.pairs.map((pair) => pair.coda) });
  return bins.map(({ rank, name, values }) => ({
    rank,
    name,
    up: sumOf(values.filter((value) => value > 0)),
    down: sumOf(values.filter((value) => value < 0)),
  }));
}

// --- maps ---

const TEST_TOKENS = ["token", "position"]; // axes that split the test example's text
const TRAIN_TOKENS = ["train_token", "train_position"];
const INDEPENDENT = ["layer", "parameter", "checkpoint", "update"]; // axes whose sketches have hashes of their own

function mapWith(shown, axis) {
  return shown.maps.find((map) => map.axes.includes(axis)) ?? null;
}

/** The first map that has one of the axes, and which; an empty object where none has. */
function mapAlong(shown, axes) {
  const map = shown.maps.find((one) => axes.some((axis) => one.axes.includes(axis)));
  return map ? { map, axis: axes.find((axis) => map.axes.includes(axis)) } : {};
}

/** The texts of the tokens along an axis, or their numbers where they are not known. */
function tokenLabels(map, axis, train) {
  const tokens = TEST_TOKENS.includes(axis) ? map.testTokens : map.trainTokens[map.placeOf.get(train)];
  return tokens ?? map.labels[map.axes.indexOf(axis)].map((label) => `[${label}]`);
}

function placeOnAxis(map, axis, label) {
  const labels = map.labels[map.axes.indexOf(axis)];
  return TEST_TOKENS.includes(axis) ? Number(label) : labels.indexOf(label);
}

/** A pair's influence and standard errors along one axis of a map, summed over the others, or at the loop step given. */
function axisProfile(map, train, axis, step = 0) {
  const stepAxis = step ? map.axes.indexOf("step") : -1;
  const stepPlace = stepAxis < 0 ? -1 : map.labels[stepAxis].findIndex((label) => stepNumber(label) === step);
  return axisSums(map, train, [axis], (places) => stepAxis < 0 || places[stepAxis] === stepPlace);
}

/** A pair's influence and standard errors along two axes of a map, summed over the others, as rows. */
function axisTable(map, train, rowAxis, columnAxis) {
  const sums = axisSums(map, train, [rowAxis, columnAxis], () => true);
  const width = map.labels[map.axes.indexOf(columnAxis)].length;
  return sums && { values: inRows(sums.values, width), errors: sums.errors && inRows(sums.errors, width) };
}

/** Sums over all axes but those that are kept. Errors of steps and tokens share a sketch's hashes and are added as they
    are, an upper bound; those of independent axes are added in squares. A map of exact scores has none. */
function axisSums(map, train, kept, isTaken) {
  const pair = map.placeOf.get(train);
  if (pair === undefined) return null;
  const sizes = map.labels.map((labels) => labels.length);
  const size = productOf(sizes);
  const keptAxes = kept.map((axis) => map.axes.indexOf(axis));
  const others = map.axes.filter((axis) => INDEPENDENT.includes(axis) && !kept.includes(axis));
  const otherAxes = others.map((axis) => map.axes.indexOf(axis));
  const nOther = productOf(otherAxes.map((axis) => sizes[axis]));
  const values = new Array(productOf(keptAxes.map((axis) => sizes[axis]))).fill(0);
  const bounds = new Float64Array(values.length * nOther);
  for (let flat = 0; flat < size; flat += 1) {
    const places = unravelled(flat, sizes);
    if (!isTaken(places)) continue;
    const target = ravelled(places, keptAxes, sizes);
    values[target] += map.values[pair * size + flat];
    if (map.errors) bounds[target * nOther + ravelled(places, otherAxes, sizes)] += map.errors[pair * size + flat];
  }
  const errors = values.map((_, target) => Math.hypot(...bounds.subarray(target * nOther, (target + 1) * nOther)));
  return { values, errors: map.errors ? errors : null };
}

function inRows(flat, width) {
  return Array.from({ length: flat.length / width }, (_, row) => flat.slice(row * width, (row + 1) * width));
}

function productOf(sizes) {
  return sizes.reduce((product, length) => product * length, 1);
}

function ravelled(places, axes, sizes) {
  return axes.reduce((flat, axis) => flat * sizes[axis] + places[axis], 0);
}

function unravelled(flat, sizes) {
  const places = [];
  for (let axis = sizes.length - 1; axis >= 0; axis -= 1) {
    places[axis] = flat % sizes[axis];
    flat = Math.floor(flat / sizes[axis]);
  }
  return places;
}

/** The number, from 1, in a label such as "3" or "step 3"; 0 in "prelude" and "coda". */
function stepNumber(label) {
  const digits = label.match(/\d+/);
  return digits ? Number(digits[0]) : 0;
}
