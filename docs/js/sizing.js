// The calculator of the sizing page. The arithmetic is that of kvcag/sizing.py; a test compares the two.
"use strict";

// Query heads share KV heads, so it is KV heads that count. Layers x KV heads x head dimension, as published.
const MODELS = {
  "SmolLM2-135M": { layers: 30, kvHeads: 3, headDim: 64 },
  "Qwen3-0.6B": { layers: 28, kvHeads: 8, headDim: 128 },
  "Qwen3-8B": { layers: 36, kvHeads: 8, headDim: 128 },
  "Llama-3.1-8B": { layers: 32, kvHeads: 8, headDim: 128 },
};
const DTYPE_BYTES = { bfloat16: 2, float16: 2, float32: 4 };
const SCALE_BYTES = 2; // int8 at rest: one bfloat16 scale a token and head, of keys and of values

function bytesPerToken({ layers, kvHeads, headDim }, dtype, int8) {
  const numbers = 2 * layers * kvHeads * headDim;
  return int8 ? numbers + 2 * layers * kvHeads * SCALE_BYTES : numbers * DTYPE_BYTES[dtype];
}

function breakEven(tokens, size, prefillTokensPerS, loadBytesPerS, latencyS) {
  const encodeS = tokens / prefillTokensPerS;
  const savedAToken = 1 / prefillTokensPerS - size / loadBytesPerS;
  const leftS = encodeS - latencyS;
  return {
    loadS: latencyS + (tokens * size) / loadBytesPerS,
    encodeS,
    evenTokens: savedAToken > 0 ? latencyS / savedAToken : Infinity,
    evenBytesPerS: leftS > 0 ? (tokens * size) / leftS : Infinity,
  };
}

function bytes(count) {
  if (!Number.isFinite(count)) return "no speed";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (count >= 1000 && unit < units.length - 1) {
    count /= 1000;
    unit += 1;
  }
  return `${unit && count < 100 ? count.toFixed(1) : Math.round(count)} ${units[unit]}`;
}

function seconds(s) {
  return s < 1 ? `${(1000 * s).toFixed(s < 0.01 ? 1 : 0)} ms` : `${s.toFixed(s < 100 ? 1 : 0)} s`;
}

// What is in the form → the rows of the table below it; a text where a number is missing.
function rows(form) {
  const named = ["layers", "kvHeads", "headDim", "tokens", "documents", "prefill", "load"];
  const wrong = named.find((name) => !(form[name] > 0));
  if (wrong || !(form.latency >= 0)) return "Every field needs a number above 0 (the latency may be 0).";
  const size = bytesPerToken(form, form.dtype, form.int8);
  const even = breakEven(form.tokens, size, form.prefill, form.load * 1e9, form.latency / 1000);
  const loads = even.loadS <= even.encodeS;
  return [
    ["Bytes a token", `${size.toLocaleString("en")} (${(size / 1024).toFixed(1)} KiB)`],
    ["One document", bytes(size * form.tokens)],
    ["All documents", bytes(size * form.tokens * form.documents)],
    ["Load one document", seconds(even.loadS)],
    ["Encode one document", seconds(even.encodeS)],
    ["Faster", `${loads ? "load" : "encode"}, ${(Math.max(even.loadS, even.encodeS) / Math.min(even.loadS, even.encodeS)).toFixed(1)}×`],
    ["Loading is faster", Number.isFinite(even.evenTokens) ? `from ${Math.max(1, Math.ceil(even.evenTokens)).toLocaleString("en")} tokens on` : "at no length"],
    ["Loading is faster above", `${bytes(even.evenBytesPerS)}${Number.isFinite(even.evenBytesPerS) ? " a second" : ""}`],
  ];
}

function show(calculator) {
  const form = {};
  for (const field of calculator.querySelectorAll("[name]")) {
    form[field.name] = field.type === "number" ? field.valueAsNumber : field.value;
  }
  form.int8 = form.kept === "int8";
  const made = rows(form);
  const body = calculator.querySelector("tbody");
  body.replaceChildren();
  for (const [name, value] of typeof made === "string" ? [[made, ""]] : made) {
    const row = body.insertRow();
    row.insertCell().textContent = name;
    row.insertCell().textContent = value;
  }
}

function start(calculator) {
  const field = (name) => calculator.querySelector(`[name=${name}]`);
  for (const name of [...Object.keys(MODELS), "another"]) field("model").add(new Option(name));
  field("model").value = "Qwen3-8B";
  const geometry = ["layers", "kvHeads", "headDim"];
  const fill = () => {
    const model = MODELS[field("model").value];
    for (const name of model ? geometry : []) field(name).value = model[name];
  };
  calculator.addEventListener("input", (event) => {
    if (event.target.name === "model") fill();
    else if (geometry.includes(event.target.name)) field("model").value = "another";
    show(calculator);
  });
  fill();
  show(calculator);
}

if (typeof document !== "undefined") {
  document.addEventListener("DOMContentLoaded", () => document.querySelectorAll(".calculator").forEach(start));
} else {
  module.exports = { MODELS, bytesPerToken, breakEven, rows };
}
