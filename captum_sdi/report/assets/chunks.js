"use strict";
// What the file holds, unpacked when somebody looks at it. A chunk is JSON, compressed, in base64; the first few are plain.

const { html, render, useEffect, useMemo, useRef, useState } = preactHtm;
const facts = JSON.parse(document.getElementById("facts").textContent);
const unpacked = new Map(); // from a chunk's name to a promise of its content

function chunk(name) {
  if (!unpacked.has(name)) unpacked.set(name, unpack(name));
  return unpacked.get(name);
}

async function unpack(name) {
  const element = await arrived(`chunk-${name}`);
  if (element.type === "application/json") return JSON.parse(element.textContent);
  const binary = atob(element.textContent);
  const bytes = new Uint8Array(binary.length);
  for (let place = 0; place < binary.length; place += 1) bytes[place] = binary.charCodeAt(place);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).json();
}

/** An element, once all of it was read: the page is drawn while most of the file still comes in. */
async function arrived(id) {
  const element = document.getElementById(id);
  if (element?.nextSibling || document.readyState !== "loading") return element;
  await new Promise((resume) => { setTimeout(resume, 10); });
  return arrived(id);
}

async function textEntry(number) {
  if (number < 0) return null;
  const texts = await chunk(`texts-${Math.floor(number / facts.textsPerChunk)}`);
  return texts[number % facts.textsPerChunk];
}

async function pairRow(test) {
  const rows = await chunk(`pairs-${Math.floor(test / facts.testsPerChunk)}`);
  return rows[test % facts.testsPerChunk];
}

/** Everything that the page shows of one test example: its pairs with their texts, its maps and step matrices. */
async function loadTest(test) {
  const row = await pairRow(test);
  const entries = await Promise.all(row.text.map(textEntry));
  const withMap = facts.maps.map((map, number) => [map, number]).filter(([map]) => test < map.tests);
  const maps = await Promise.all(withMap.map(([, number]) => chunk(`map-${number}-${test}`)));
  const matrices = test < facts.matrices ? (await chunk(`matrices-${test}`))[0] : null;
  const pairs = row.train.map((train, place) => ({
    train,
    entry: entries[place],
    total: row.total[place],
    error: row.error[place],
    steps: row.steps[place],
    stepErrors: row.stepErrors[place],
    prelude: row.prelude[place],
    coda: row.coda[place],
    matrix: matrices && matrices.train.includes(train) ? matrices.values[matrices.train.indexOf(train)] : null,
  }));
  return { test, pairs, maps: maps.map((rows) => indexedMap(rows[0])) };
}

/** A map of one test example, with the place of each training example in it. */
function indexedMap(map) {
  return { ...map, placeOf: new Map(map.train.map((train, place) => [train, place])) };
}

/** The numbers of the test examples of which a training example's text holds the words. */
async function testsWithTrainingText(words) {
  const found = new Set();
  const nChunks = Math.ceil(facts.tests / facts.testsPerChunk);
  for (let number = 0; number < nChunks; number += 1) {
    const rows = await chunk(`pairs-${number}`);
    for (const [place, row] of rows.entries()) {
      const entries = await Promise.all(row.text.map(textEntry));
      if (entries.some((entry) => entry && entryHolds(entry, words))) found.add(number * facts.testsPerChunk + place);
    }
  }
  return found;
}

function entryHolds(entry, words) {
  const fields = Object.values(entry[1] ?? {});
  return [entry[0], ...fields].some((text) => text.toLowerCase().includes(words));
}
