// Texts: as they are, with what was searched for marked, or tinted token by token.

/** A text, isolated from its neighbours whatever direction it runs in; what is before the start stands on paper only. */
function Text({ text, learned, words, start = 0 }) {
  const parts = runs(text, start, text.length, { learned, found: placesOf(text, words) });
  const skipped = html`<span class="skipped">${text.slice(0, start)}</span><span class="ellipsis">… </span>`;
  return html`<p class="text" dir="auto">${start > 0 && skipped}${parts.map((run) => html`<${Run} ...${run} />`)}</p>`;
}

/** A text with every place marked at which the words stand. */
function marked(text, words) {
  return runs(text, 0, text.length, { found: placesOf(text, words) }).map((run) => html`<${Run} ...${run} />`);
}

/** Where words stand in a text, as pairs of places. */
function placesOf(text, words) {
  const lower = text.toLowerCase();
  if (!words || lower.length !== text.length) return []; // some letters change their length, and places with them
  const places = [];
  for (let found = lower.indexOf(words); found >= 0; found = lower.indexOf(words, found + words.length)) {
    places.push([found, found + words.length]);
  }
  return places;
}

/** Which parts of an example's text are learned, as pairs of places; undefined where all of it is. */
function learnedOf(entry) {
  return entry?.[2];
}

/** A text from a place to another, cut where context ends, what is learned begins, or what was searched for stands. */
function runs(text, start, end, { learned, found = [] }) {
  const cuts = [...(learned ?? []), ...found].flat().filter((place) => place > start && place < end);
  const places = [start, ...cuts.sort((left, right) => left - right), Math.min(end, text.length)];
  const parts = places.slice(1).map((stop, number) => [places[number], stop]).filter(([first, stop]) => first < stop);
  return parts.map(([first, stop]) => {
    const around = (spans) => spans.find((span) => span[0] < stop && span[1] > first);
    const span = learned && around(learned);
    const isFirst = first > 0 && span?.[0] === first;
    return { piece: text.slice(first, stop), isContext: learned && !span, isFirst, isFound: around(found) };
  });
}

/** A part of a text: quiet where it is context, with a bar where what is learned begins behind that. */
function Run({ piece, isContext, isFirst, isFound, children = piece }) {
  const content = isFound ? html`<mark>${children}</mark>` : children;
  if (isContext) return html`<span class="context" title="context: no loss on these tokens">${content}</span>`;
  return isFirst ? html`<span class="learned">${content}</span>` : content;
}

/** A text whose tokens are tinted by their influence. A click on a token ranks by it, where that is possible. */
function TintedText({ text, learned, labels, values, errors, unit, chosen, onChoose }) {
  const largest = largestOf(values) || 1;
  const { pieces, isInPlace } = placedTokens(text, labels);
  const known = isInPlace ? learned : undefined;
  return html`
    ${!isInPlace && text && html`<${Text} text=${text} learned=${learned} />`}
    <p class="text tinted" dir="auto">
      ${pieces.map(({ piece, token, isLoose, start }) => {
        const parts = runs(text, start, start + piece.length, { learned: known });
        if (token === null) return parts.map((run) => html`<${Run} ...${run} />`);
        const run = parts.findLast(({ isContext }) => !isContext) ?? parts[0]; // a token is learned where a part of it is
        return html`<${Run} ...${run}><span
              class=${`token ${chosen === token ? "chosen" : ""} ${isLoose ? "loose" : ""}`}
              style=${{ "--tint": `${Math.round((100 * Math.abs(values[token])) / largest)}%`, "--side": sideColour(values[token]) }}
              title=${`token ${token + 1}: ${signed(values[token], unit)}${errors ? ` ± ${plain(errors[token], unit)}` : ""} ${unit.text}`}
              onClick=${onChoose && ((event) => { event.stopPropagation(); onChoose(token); })}
              >${piece}</span
            ><//>`;
      })}
    </p>
  `;
}

function sideColour(value) {
  return value < 0 ? "var(--opponent)" : "var(--proponent)";
}

/** Where tokens stand in their text: from its beginning, or, of a completion, where they stand last. Tokens that are not
    those of the text, such as targets of another kind, stand one behind the other below it. */
function placedTokens(text, labels) {
  const joined = labels.map(readable).join("").trim();
  const starts = [0, joined ? text.lastIndexOf(joined) : -1].filter((start) => start >= 0);
  for (const start of starts) {
    const pieces = piecesFrom(text, labels, start);
    if (pieces) return { pieces, isInPlace: true };
  }
  return { pieces: looseTokens(labels), isInPlace: false };
}

/** The pieces of a text whose tokens stand one behind the other from a place on; null where they do not. */
function piecesFrom(text, labels, start) {
  const pieces = [{ piece: text.slice(0, start), token: null, start: 0 }];
  for (const [token, label] of labels.entries()) {
    if (!label) continue; // beyond the end of this text, or the first part of a letter
    const word = readable(label);
    const bare = word.trimStart() || word;
    const blanks = text.slice(start).length - text.slice(start).trimStart().length;
    const place = text.startsWith(bare, start) ? start : start + blanks;
    if (text.startsWith(bare, place)) {
      pieces.push({ piece: text.slice(start, place), token: null, start }, { piece: bare, token, start: place });
      start = place + bare.length;
    } else if (/^[<[|].*[>\]|]$/.test(label)) {
      pieces.push({ piece: label, token, isLoose: true, start: text.length }); // a special token, which the text does not show
    } else {
      return null;
    }
  }
  return [...pieces, { piece: text.slice(start), token: null, start }].filter(({ piece }) => piece);
}

/** A token without the signs that some tokenizers write for blanks and line breaks. */
function readable(label) {
  return label.replace(/[Ġ▁]/g, " ").replace(/Ċ/g, "\n");
}

function looseTokens(labels) {
  return labels.map((label, token) => ({ piece: label, token, isLoose: true })).filter(({ piece }) => piece);
}

/** The fields of an example beside its text, such as an id. */
function Fields({ entry }) {
  if (!entry || !entry[1]) return null;
  return html`<span class="fields">
    ${Object.entries(entry[1]).map(([name, value]) => html`<span class="field"><i>${name}</i> ${value}</span>`)}
  </span>`;
}
