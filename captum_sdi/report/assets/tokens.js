// Texts: as they are, with what was searched for marked, or tinted token by token.

/** A text, isolated from its neighbours whatever direction it runs in. */
function Text({ text, words }) {
  return html`<p class="text" dir="auto">${marked(text, words)}</p>`;
}

/** The pieces of a text, with every place marked at which the words stand. */
function marked(text, words) {
  if (!words) return text;
  const lower = text.toLowerCase();
  if (lower.length !== text.length) return text; // some letters change their length, and places with them
  const pieces = [];
  let start = 0;
  for (let found = lower.indexOf(words); found >= 0; found = lower.indexOf(words, start)) {
    pieces.push(text.slice(start, found), html`<mark>${text.slice(found, found + words.length)}</mark>`);
    start = found + words.length;
  }
  return [...pieces, text.slice(start)];
}

/** A text whose tokens are tinted by their influence. A click on a token ranks by it, where that is possible. */
function TintedText({ text, labels, values, errors, unit, chosen, onChoose }) {
  const largest = largestOf(values) || 1;
  const { pieces, isInPlace } = placedTokens(text, labels);
  return html`
    ${!isInPlace && text && html`<p class="text" dir="auto">${text}</p>`}
    <p class="text tinted" dir="auto">
      ${pieces.map(({ piece, token, isLoose }) =>
        token === null
          ? piece
          : html`<span
              class=${`token ${chosen === token ? "chosen" : ""} ${isLoose ? "loose" : ""}`}
              style=${{ "--tint": `${Math.round((100 * Math.abs(values[token])) / largest)}%`, "--side": sideColour(values[token]) }}
              title=${`token ${token + 1}: ${signed(values[token], unit)}${errors ? ` ± ${plain(errors[token], unit)}` : ""} ${unit.text}`}
              onClick=${onChoose && ((event) => { event.stopPropagation(); onChoose(token); })}
              >${piece}</span
            >`,
      )}
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
  const pieces = [{ piece: text.slice(0, start), token: null }];
  for (const [token, label] of labels.entries()) {
    if (!label) continue; // beyond the end of this text, or the first part of a letter
    const word = readable(label);
    const bare = word.trimStart() || word;
    const blanks = text.slice(start).length - text.slice(start).trimStart().length;
    const place = text.startsWith(bare, start) ? start : start + blanks;
    if (text.startsWith(bare, place)) {
      pieces.push({ piece: text.slice(start, place), token: null }, { piece: bare, token });
      start = place + bare.length;
    } else if (/^[<[|].*[>\]|]$/.test(label)) {
      pieces.push({ piece: label, token, isLoose: true }); // a special token, which the text does not show
    } else {
      return null;
    }
  }
  return [...pieces, { piece: text.slice(start), token: null }].filter(({ piece }) => piece);
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
