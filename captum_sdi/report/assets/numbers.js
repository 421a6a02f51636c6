// Numbers as they are read: one power of ten for all that are compared, a true minus, and exact ones on demand.

const SUPERSCRIPTS = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };

/** The unit in which numbers of at most this size are written. */
function unitFor(largest) {
  if (!(largest > 0)) return { scale: 1, text: "" };
  const exponent = Math.floor(Math.log10(largest));
  if (exponent >= -1 && exponent < 4) return { scale: 1, text: "" };
  const power = 3 * Math.floor(exponent / 3);
  return { scale: 10 ** power, text: `×10${raised(power)}` };
}

/** Three digits of a number that is large in its unit, as many decimals of one that is small, a power of a tiny one. */
function signed(value, unit) {
  const scaled = value / unit.scale;
  const size = Math.abs(scaled);
  const decimals = size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 || size === 0 ? 2 : 3;
  const isTiny = size > 0 && size < 0.0005;
  const digits = isTiny ? scaled.toExponential(1) : scaled.toFixed(decimals);
  return withMinus(`${scaled > 0 ? "+" : ""}${digits}`);
}

function plain(value, unit) {
  const scaled = value / unit.scale;
  if (scaled === 0) return "0";
  return scaled < 0.01 ? scaled.toExponential(0).replace("e-", "e−") : scaled.toFixed(scaled < 10 ? 2 : 0);
}

function exact(value) {
  return `${value > 0 ? "+" : ""}${withPower(value, 4)}`;
}

function magnitude(error) {
  return error === 0 ? "0" : withPower(error, 2);
}

function withPower(value, digits) {
  const exponent = value === 0 ? 0 : Math.floor(Math.log10(Math.abs(value)));
  if (exponent >= -2 && exponent < 5) return withMinus(value.toPrecision(digits));
  return withMinus(`${(value / 10 ** exponent).toFixed(digits - 1)}×10${raised(exponent)}`);
}

function raised(exponent) {
  return [...String(exponent)].map((sign) => SUPERSCRIPTS[sign]).join("");
}

function withMinus(text) {
  return text.replace(/-/g, "−");
}

function percent(share) {
  return `${Number((100 * share).toPrecision(2))}%`;
}

function largestOf(values) {
  return values.reduce((largest, value) => Math.max(largest, Math.abs(value)), 0);
}

function sumOf(values) {
  return values.reduce((sum, value) => sum + value, 0);
}

/** Round numbers that divide a range into at most five parts. */
function niceTicks(low, high) {
  const span = high - low || 1;
  const rough = span / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const ticks = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step * 1e-9; tick += step) ticks.push(tick);
  return ticks.map((tick) => (Math.abs(tick) < step * 1e-9 ? 0 : tick));
}
