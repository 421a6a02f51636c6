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
function TintedText({ text, labels, values, unit, chosen, onChoose }) {
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
              title=${`token ${token + 1}: ${signed(values[token], unit)} ${unit.text}`}
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

/** Where tokens stand in their text. Those that do not, such as the beginning of a sequence, stand there by name; where
    most do not, the tokens stand one behind the other, below the text. */
function placedTokens(text, labels) {
  const pieces = [];
  let [start, nAbsent] = [0, 0];
  for (const [token, label] of labels.entries()) {
    if (!label) continue; // beyond the end of this text, or the first part of a letter
    const place = placeOfToken(text, label, start);
    if (!place) {
      nAbsent += 1;
      pieces.push({ piece: label, token, isLoose: true });
      continue;
    }
    if (place.start > start) pieces.push({ piece: text.slice(start, place.start), token: null });
    pieces.push({ piece: text.slice(place.start, place.end), token });
    start = place.end;
  }
  if (nAbsent > labels.length / 3) return { pieces: looseTokens(labels), isInPlace: false };
  return { pieces: [...pieces, { piece: text.slice(start), token: null }], isInPlace: true };
}

/** Where a token stands next, without the blanks before it; null where it does not. */
function placeOfToken(text, label, start) {
  const word = label.replace(/[Ġ▁]/g, " ").replace(/Ċ/g, "\n");
  const bare = word.trimStart() || word;
  const found = text.indexOf(bare, start);
  const isNear = found >= 0 && found - start <= 40;
  return isNear ? { start: found, end: found + bare.length } : null;
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
